"""The page of a comparison: who is how far on the way from climatology to the oracle, at what cost, calibrated where."""

from collections.abc import Mapping, Sequence
from html import escape

from appa_lite.verification import page
from appa_lite.verification.charts import Line, colours, line_chart
from appa_lite.verification.comparison import BASELINES, ORACLE, PERSISTENCE, Trial, lookup, mean_costs, spread_out
from appa_lite.verification.page import Section
from appa_lite.verification.score_figures import words
from appa_lite.verification.tables import Record, duration, format_number


class Shown:
    """The records of a comparison, and the order in which systems, variables and leads are shown."""

    def __init__(self, records: Sequence[Record], trials: Sequence[Trial], reference: str):
        self.records, self.trials, self.reference, self.table = records, trials, reference, lookup(records)
        self.families = list(dict.fromkeys(t.family for t in trials))
        self.colours = colours([*self.families, *BASELINES]) | {ORACLE: "k"}
        names = list(dict.fromkeys(str(r["variable"]) for r in records))
        self.views = {v: [n for n in names if n.startswith(f"{v}_")] for v in names if not any(v.startswith(f"{o}_") for o in names)}
        self.leads = sorted({r["lead_time"] for r in records if r["lead_time"]})

    def curve(self, variable: str, system: str, metric: str, band: bool = True) -> Line | None:
        rows = [(lead, self.table.get((variable, lead, system, metric))) for lead in self.leads]
        rows = [(lead, r) for lead, r in rows if r is not None]
        if not rows:
            return None
        x, y = [lead / 86400 for lead, _ in rows], [r["value"] for _, r in rows]
        edges = ([r[k] for _, r in rows] for k in ("low", "high")) if band else (None, None)
        return Line(words(system), x, y, self.colours[system], "line" if system in self.families else "dashed", *edges)

    def chart(self, variable: str, metric: str, ylabel: str, systems: Sequence[str], zero: bool = False) -> str | None:
        lines = [line for s in systems if (line := self.curve(variable, s, metric, band=s in self.families)) is not None]
        return line_chart(lines, words(variable), "lead time (days)", ylabel, zero=zero) if lines else None


def comparison_page(records: Sequence[Record], trials: Sequence[Trial], settings: Mapping, commands: Sequence[str]) -> str:
    """HTML, self-contained; ``settings`` are those of ``compare``."""
    shown = Shown(records, trials, settings["reference"])
    sections = [_skills(shown), _curves(shown), _pooled(shown), _extremes(shown), _costs(shown), _commands(commands)]
    test, seeds = settings["test"], settings["seeds"]
    facts = [
        (str(len(shown.families)), "families"),
        (str(seeds), "trainings of each"),
        (duration(max(t.seconds_train for t in trials)), "longest training"),
        (str(test["trajectories"] * test["starts"]), f"forecasts of {test['members']} members"),
    ]
    title = f"Forecasts compared: {words(str(settings['experiment']))}"
    subtitle = "the same data, the same training time, an oracle that samples the law itself"
    return page.build_report(title, subtitle, facts, [s for s in sections if s is not None])


def _skills(shown: Shown) -> Section:
    groups = []
    for variable in shown.views:
        for lead in spread_out(shown.leads, 4):
            lines = []
            for system in (*shown.families, ORACLE, PERSISTENCE):
                metrics = ("crps_fair_skill_score", "crps_fair", "rmse", "spread_skill", "rank_u")
                cells = [_cell(shown.table.get((variable, lead, system, m)), False) for m in metrics]
                row = shown.table.get((variable, lead, system, "crps_fair"))
                spread = "" if row is None or row["seed_std"] is None else format_number(row["seed_std"])
                lines.append([escape(words(system)), *cells, spread, _verdict(shown, variable, lead, system)])
            groups.append((f"{words(variable)}, {duration(lead)} ahead", lines))
    header = ["", "CRPS skill", "fair CRPS", "RMSE", "spread / skill", "rank U", "CRPS over seeds", f"against {words(shown.reference)}"]
    lead = (
        "CRPS skill is zero for climatology and one for the oracle. Intervals (90 %) are of initial times and trainings; the last "
        "column but one is the standard deviation over trainings. A verdict is given only where the interval of the paired "
        "difference of CRPS excludes zero."
    )
    return Section("Skill", lead, page.table(header, groups))


def _verdict(shown: Shown, variable: str, lead: float, system: str) -> str:
    row = shown.table.get((variable, lead, system, f"crps_fair_wins_{shown.reference}"))
    return "" if row is None else {1.0: "better", -1.0: "worse"}.get(row["value"], "no difference seen")


def _curves(shown: Shown) -> Section:
    every, drawn = [*shown.families, *BASELINES], []
    for variable in shown.views:
        drawn.append(shown.chart(variable, "crps_fair", "fair CRPS", every, zero=True))
        drawn.append(shown.chart(variable, "crps_fair_skill_score", "CRPS skill", shown.families))
        drawn.append(shown.chart(variable, "spread_skill", "spread / skill", [*shown.families, ORACLE], zero=True))
    return Section("Against lead time", "Solid: learned; dashed: oracle and baselines; bands: 90 %.", page.charts([d for d in drawn if d]))


def _pooled(shown: Shown) -> Section | None:
    names = [view for views in shown.views.values() for view in views]
    drawn = [shown.chart(n, "spread_skill", "spread / skill", [*shown.families, ORACLE], zero=True) for n in names]
    if not any(drawn):
        return None
    lead = (
        "Means over neighbouring cells, energy and gradients: a model that is calibrated cell by cell can be twice as wide as "
        "its errors in area means, where the errors of its members are correlated wrongly."
    )
    return Section("Calibration of pooled fields", lead, page.charts([d for d in drawn if d]))


def _extremes(shown: Shown) -> Section | None:
    groups = []
    for variable in shown.views:
        labels = list(dict.fromkeys(str(r["metric"]).removeprefix("twcrps_") for r in shown.records if _is_tail(r, variable)))
        for lead in spread_out(shown.leads, 2):
            for label in labels:
                events = shown.table.get((variable, lead, ORACLE, f"events_{label}"))
                single = shown.table.get((variable, lead, ORACLE, f"independent_events_{label}"))
                lines = []
                for system in (*shown.families, ORACLE):
                    keys = (f"twcrps_{label}_skill_score", f"twcrps_{label}", f"brier_{label}_skill_score", f"rev_{label}")
                    lines.append([escape(words(system)), *(_cell(shown.table.get((variable, lead, system, k)), False) for k in keys)])
                seen = f", {events['value']:.0f} events ({single['value']:.0f} independent)" if events and single else ""
                groups.append((f"{words(variable)} above {label}, {duration(lead)} ahead{seen}", lines))
    if not groups:
        return None
    lead = (
        "Thresholds are quantiles of the training data. Threshold-weighted CRPS and Brier scores are fair; intervals are left out "
        "where independent events are too few. Such scores guard against gross errors; they cannot rank tails from so few events."
    )
    return Section("Extremes", lead, page.table(["", "twCRPS skill", "twCRPS", "Brier skill", "relative value"], groups))


def _is_tail(record: Record, variable: str) -> bool:
    metric = str(record["metric"])
    return record["variable"] == variable and metric.startswith("twcrps_q") and metric.count("_") == 1


def _costs(shown: Shown) -> Section:
    lines, points = [], []
    variable, lead = next(iter(shown.views)), shown.leads[len(shown.leads) // 2]
    for family in shown.families:
        cost = mean_costs([t for t in shown.trials if t.family == family])
        row = shown.table.get((variable, lead, family, "crps_fair_skill_score"))
        cells = [
            f"{cost['parameters']:.0f}",
            duration(cost["seconds_train"]),
            f"{cost['steps_train']:.0f}",
            f"{cost['learning_rate']:g}",
            format_number(cost["network_calls"]),
        ]
        lines.append([escape(words(family)), *cells, format_number(cost["seconds_per_member"]), _cell(row, False)])
        if row is not None:
            points.append(Line(words(family), [cost["seconds_per_member"]], [row["value"]], shown.colours[family], "points"))
    header = [
        "",
        "parameters",
        "training",
        "steps",
        "learning rate",
        "network calls a member",
        "seconds a member",
        f"CRPS skill, {duration(lead)}",
    ]
    chart = (
        line_chart(points, f"{words(variable)}, {duration(lead)} ahead", "seconds a member", "CRPS skill", xkind="log") if points else ""
    )
    return Section("Cost", "One thread. A call is one evaluation of the network.", page.table(header, [("", lines)]) + page.charts([chart]))


def _commands(lines: Sequence[str]) -> Section:
    return Section("Commands", "What was run; every line can be typed by itself.", page.commands(lines))


def _cell(record: Record | None, best: bool) -> str:
    if record is None or record["value"] is None:
        return ""
    value = format_number(record["value"])
    small = "" if record["low"] is None else f"<small>{format_number(record['low'])} to {format_number(record['high'])}</small>"
    return ((f"<b>{value}</b>" if best else value) + small).replace("-", "\u2212")
