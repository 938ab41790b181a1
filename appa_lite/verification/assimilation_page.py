"""The page of a comparison of assimilation methods: who is nearer to the truth, as sure as it may be, at what cost."""

from collections.abc import Mapping, Sequence
from html import escape

from appa_lite.verification import page
from appa_lite.verification.assimilation_scores import BY_TRUTH, CLIMATOLOGY, DIVERGED, RESIDUAL, lookup
from appa_lite.verification.charts import Line, colours, line_chart
from appa_lite.verification.page import Section
from appa_lite.verification.score_figures import words
from appa_lite.verification.tables import Record, format_number


def assimilation_page(
    records: Sequence[Record], tuned: Sequence[Record], settings: Mapping, reference: str, commands: Sequence[str]
) -> str:
    """HTML, self-contained; ``tuned`` are the tables of ``tune`` with the column ``method``, ``settings`` those of ``compare``."""
    systems = [s for s in dict.fromkeys(r["system"] for r in records) if s != CLIMATOLOGY]
    design = settings["twins"]
    facts = [
        (str(len(systems)), "methods"),
        (str(design["truths"]), "truths"),
        (str(design["frames"]), "frames scored of each"),
    ]
    sections = [_scores(records, systems, reference), _truths(records, systems), _costs(records, systems), _tuned(tuned)]
    sections.append(Section("Commands", "What was run; every line can be typed by itself.", page.commands(commands)))
    title = f"Assimilation methods compared: {words(str(settings['experiment']))}"
    return page.build_report(title, "the same observations of the same truths for all", facts, [s for s in sections if s is not None])


def _scores(records: Sequence[Record], systems: Sequence[str], reference: str) -> Section:
    table, groups = lookup(records), []
    for variable in dict.fromkeys(str(r["variable"]) for r in records):
        lines = []
        for system in (*systems, CLIMATOLOGY):
            found = [table.get((variable, system, m)) for m in (*BY_TRUTH, f"rmse_minus_{reference}")]
            lost, residual = (table.get((variable, system, m)) for m in (DIVERGED, RESIDUAL))
            verdict = table.get((variable, system, f"rmse_wins_{reference}"))
            said = "" if verdict is None else {1.0: "better", -1.0: "worse"}.get(verdict["value"], "no difference seen")
            truths = "" if lost is None else f"{lost['value'] * lost['count']:.0f} of {lost['count']}"
            lines.append([escape(words(system)), *map(_cell, found), said, truths, _cell(residual)])
        groups.append((words(variable), lines))
    header = ["", "RMSE", "fair CRPS", "spread / error", f"RMSE minus {words(reference)}", "", "diverged", "one-step residual"]
    lead = (
        "Means over truths with intervals (90 %) that take truths as independent; differences are of the same truths. A method "
        "diverged where its RMSE is above the climatology's, and is left out of its own mean there. One-step residual: how far a "
        "frame drawn from the prior alone is from what the model makes of the frame before, in climatological standard deviations."
    )
    return Section("Scores", lead, page.table(header, groups))


def _truths(records: Sequence[Record], systems: Sequence[str]) -> Section:
    shades, drawn = colours([*systems, CLIMATOLOGY]), []
    for variable in dict.fromkeys(str(r["variable"]) for r in records):
        for metric, name in (("rmse", "RMSE"), ("spread_skill", "spread / error")):
            lines = []
            for system in systems:
                rows = [r for r in records if (r["system"], r["variable"], r["metric"]) == (system, variable, metric)]
                rows = [r for r in rows if r["seed"] is not None]
                if rows:
                    lines.append(Line(words(system), [r["seed"] for r in rows], [r["value"] for r in rows], shades[system], "points"))
            drawn.append(line_chart(lines, words(variable), "truth", name, zero=metric == "spread_skill"))
    return Section("Truth by truth", "Gaps: members that blew up.", page.charts(drawn))


def _costs(records: Sequence[Record], systems: Sequence[str]) -> Section:
    lines = []
    for system in systems:
        row = next(r for r in records if r["system"] == system)
        keys = ("members", "seconds_per_member", "network_calls")
        lines.append([escape(words(system)), *(format_number(row[k]) if row[k] else "" for k in keys)])
    lead = "One thread, with the time to load a model or to spin up members. A call is one evaluation of the network on one window."
    return Section("Cost", lead, page.table(["", "members", "seconds a member", "network calls a member"], [("", lines)]))


def _tuned(tuned: Sequence[Record]) -> Section | None:
    groups = []
    for method in dict.fromkeys(str(r["method"]) for r in tuned):
        rows = [r for r in tuned if r["method"] == method]
        keys = [k for k in rows[0] if "." in k or k == "members"]
        settings = dict.fromkeys(tuple(r[k] for k in keys) for r in rows)
        lines = []
        for chosen in settings:
            same = [r for r in rows if tuple(r[k] for k in keys) == chosen]
            errors = ", ".join(f"{r['variable']} {format_number(r['rmse'])}" for r in same if r["rmse"] is not None) or "members blew up"
            said = ", ".join(f"{k} {v}" for k, v in zip(keys, chosen, strict=True))
            lines.append([f"<b>{escape(said)}</b>" if same[0]["best"] else escape(said), escape(errors)])
        groups.append((words(method), lines))
    if not groups:
        return None
    return Section("Settings", "RMSE on a validation truth; what was chosen is bold.", page.table(["", "RMSE"], groups))


def _cell(record: Record | None) -> str:
    if record is None or record["value"] is None:
        return ""
    small = "" if record["low"] is None else f"<small>{format_number(record['low'])} to {format_number(record['high'])}</small>"
    return (format_number(record["value"]) + small).replace("-", "\u2212")
