"""The page of a comparison of assimilation methods: who is nearer to the truth, as sure as it may be, at what cost."""

from collections.abc import Mapping, Sequence
from html import escape

from appa_lite.verification import page
from appa_lite.verification.assimilation_scores import BY_TRUTH, CLIMATOLOGY, DIVERGED, RESIDUAL, groups, lookup
from appa_lite.verification.charts import Line, colours, line_chart
from appa_lite.verification.comparison import spread_out
from appa_lite.verification.page import Section
from appa_lite.verification.score_figures import words
from appa_lite.verification.tables import Record, duration, format_number

HEADER = ("", "RMSE", "fair CRPS", "spread / error")


def assimilation_page(
    records: Sequence[Record], tuned: Sequence[Record], settings: Mapping, reference: str, commands: Sequence[str]
) -> str:
    """HTML, self-contained; ``tuned`` are the tables of ``tune`` with the column ``method``, ``settings`` those of ``compare``."""
    systems = [s for s in dict.fromkeys(r["system"] for r in records if r["lead_time"] is None) if s != CLIMATOLOGY]
    design = settings["twins"]
    facts = [
        (str(len(systems)), "methods"),
        (str(design["truths"]), "truths"),
        (str(design["frames"]), "frames scored of each"),
    ]
    sections = [
        _scores(records, reference),
        _truths(records, systems),
        _forecasts(records, reference),
        _costs(records, systems),
        _tuned(tuned),
    ]
    sections.append(Section("Commands", "What was run; every line can be typed by itself.", page.commands(commands)))
    title = f"Assimilation methods compared: {words(str(settings['experiment']))}"
    return page.build_report(title, "the same observations of the same truths for all", facts, [s for s in sections if s is not None])


def _scores(records: Sequence[Record], reference: str) -> Section:
    table, blocks = lookup(records), []
    for (variable, lead), systems in groups(records).items():
        if lead is not None:
            continue
        lines = []
        for system in systems:
            lost, residual = (table.get((variable, None, system, m)) for m in (DIVERGED, RESIDUAL))
            truths = "" if lost is None else f"{lost['value'] * lost['count']:.0f} of {lost['count']}"
            lines.append([*_line(table, (variable, None, system), reference), truths, _cell(residual)])
        blocks.append((words(variable), lines))
    header = [*HEADER, f"RMSE minus {words(reference)}", "", "diverged", "one-step residual"]
    lead = (
        "Means over truths with intervals (90 %) that take truths as independent; differences are of the same truths. A method "
        "diverged where its RMSE is above the climatology's, and is left out of its own mean there. One-step residual: how far a "
        "frame drawn from the prior alone is from what the model makes of the frame before, in climatological standard deviations."
    )
    return Section("Analyses", lead, page.table(header, blocks))


def _forecasts(records: Sequence[Record], reference: str) -> Section | None:
    table, blocks, drawn = lookup(records), [], []
    found = {(v, lead): s for (v, lead), s in groups(records).items() if lead is not None}
    shown = spread_out(sorted({lead for _, lead in found}), 4)
    blocks = [
        (f"{words(v)}, {duration(lead)} ahead", [_line(table, (v, lead, s), reference) for s in systems])
        for (v, lead), systems in found.items()
        if lead in shown
    ]
    for variable in dict.fromkeys(v for v, _ in found):
        systems = dict.fromkeys(s for (v, _), names in found.items() if v == variable for s in names)
        shades = colours(list(systems))
        for metric, name in (("rmse", "RMSE"), ("spread_skill", "spread / error")):
            lines = []
            for system in systems:
                rows = [table.get((variable, lead, system, metric)) for v, lead in found if v == variable]
                rows = [r for r in rows if r is not None and r["value"] is not None]
                edges = ([r[k] for r in rows] for k in ("low", "high"))
                lines.append(
                    Line(words(system), [r["lead_time"] / 86400 for r in rows], [r["value"] for r in rows], shades[system], "line", *edges)
                )
            drawn.append(line_chart([line for line in lines if line.x], words(variable), "lead time (days)", name, zero=True))
    if not blocks:
        return None
    lead = "From the last analysis of each truth. Persistence is of the truth itself."
    return Section("Forecasts", lead, page.table([*HEADER, f"RMSE minus {words(reference)}", ""], blocks) + page.charts(drawn))


def _line(table: Mapping[tuple, Record], place: tuple, reference: str) -> list[str]:
    found = [table.get((*place, m)) for m in (*BY_TRUTH, f"rmse_minus_{reference}")]
    verdict = table.get((*place, f"rmse_wins_{reference}"))
    said = "" if verdict is None else {1.0: "better", -1.0: "worse"}.get(verdict["value"], "no difference seen")
    return [escape(words(place[2])), *map(_cell, found), said]


def _truths(records: Sequence[Record], systems: Sequence[str]) -> Section:
    shades, drawn = colours([*systems, CLIMATOLOGY]), []
    records = [r for r in records if r["lead_time"] is None]
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
        row = next(r for r in records if r["system"] == system and r["lead_time"] is None)
        keys = ("members", "seconds_per_member", "network_calls")
        lines.append([escape(words(system)), *(format_number(row[k]) if row[k] else "" for k in keys)])
    lead = "One thread, with the time to load a model or to spin up members. A call is one evaluation of the network on one window."
    return Section("Cost", lead, page.table(["", "members", "seconds a member", "network calls a member"], [("", lines)]))


def _tuned(tuned: Sequence[Record]) -> Section | None:
    blocks = []
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
        blocks.append((words(method), lines))
    if not blocks:
        return None
    return Section("Settings", "RMSE on a validation truth; what was chosen is bold.", page.table(["", "RMSE"], blocks))


def _cell(record: Record | None) -> str:
    if record is None or record["value"] is None:
        return ""
    small = "" if record["low"] is None else f"<small>{format_number(record['low'])} to {format_number(record['high'])}</small>"
    return (format_number(record["value"]) + small).replace("-", "\u2212")
