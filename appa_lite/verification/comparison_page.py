"""The page of a comparison: who is how far on the way from climatology to the oracle, at what cost, calibrated where."""

from collections.abc import Mapping, Sequence
from html import escape

from appa_lite.verification import comparison_figures as figures
from appa_lite.verification import page
from appa_lite.verification.charts import Line, line_chart
from appa_lite.verification.comparison import BASELINES, ORACLE, PERSISTENCE, Trial, mean_costs, spread_out
from appa_lite.verification.comparison_figures import Shown
from appa_lite.verification.free_runs import PREFIX
from appa_lite.verification.page import Section
from appa_lite.verification.score_figures import words
from appa_lite.verification.tables import Record, duration, format_number


def comparison_page(
    records: Sequence[Record], trials: Sequence[Trial], settings: Mapping, commands: Sequence[str], details: Mapping[str, list]
) -> str:
    """HTML, self-contained; ``settings`` are those of ``compare``, ``details`` what ``score_trials`` gives for figures."""
    shown = Shown(records, trials, settings["reference"])
    sections = [_skills(shown), _curves(shown), _pooled(shown), _ranks(shown, details), _extremes(shown, details)]
    sections += [_free_runs(shown, details, settings["free"]), _costs(shown, settings["test"]["lead"]), _commands(commands)]
    test, seeds = settings["test"], settings["seeds"]
    facts = [
        (str(len(shown.families)), "families, ensembles and variants"),
        (str(seeds), "trainings of each"),
        (duration(min(t.seconds_train for t in trials)), "for each training"),
        (str(test["trajectories"] * test["starts"]), f"forecasts of {test['members']} members"),
    ]
    title = f"Forecasts compared: {words(str(settings['experiment']))}"
    known = "known exactly" if test["analysis_error"] is None else f"analyses with errors of {test['analysis_error']:g}"
    subtitle = f"the same data, the same training time, initial states {known}; the oracle is the simulator's own ensemble"
    return page.build_report(title, subtitle, facts, [s for s in sections if s is not None])


def _skills(shown: Shown) -> Section:
    groups = []
    for variable in shown.views:
        for lead in (None, *spread_out(shown.leads, 4)):
            lines = []
            for system in (*shown.families, ORACLE, PERSISTENCE):
                metrics = ("crps_fair_skill_score", "crps_fair", "rmse", "spread_skill", "rank_u")
                cells = [_cell(shown.table.get((variable, lead, system, m)), False) for m in metrics]
                row = shown.table.get((variable, lead, system, "crps_fair"))
                spread = "" if row is None or row["seed_std"] is None else format_number(row["seed_std"])
                lines.append([escape(words(system)), *cells, spread, _verdict(shown, variable, lead, system)])
            groups.append((f"{words(variable)}, {_ahead(lead)}", lines))
    header = ["", "CRPS skill", "fair CRPS", "RMSE", "spread / skill", "rank U", "CRPS over seeds", f"against {words(shown.reference)}"]
    lead = (
        "CRPS skill is zero for climatology and one for the oracle. Intervals (90 %) are of initial times and trainings; the last "
        "column but one is the standard deviation over trainings. A verdict is given only where the interval of the paired "
        "difference of CRPS excludes zero."
    )
    return Section("Skill", lead, page.table(header, groups))


def _ahead(lead: float | None) -> str:
    return "all leads together" if lead is None else f"{duration(lead)} ahead"


def _verdict(shown: Shown, variable: str, lead: float | None, system: str) -> str:
    scored, every = (shown.table.get((variable, lead, s, "crps_fair")) for s in (system, ORACLE))
    if scored is None or scored["count"] < every["count"]:
        return "not finite everywhere"
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
    names = [view for views in shown.views.values() for view in views] + shown.energies
    drawn = [figures.window_calibration(shown, variable) for variable in shown.views]
    drawn += [shown.chart(n, "spread_skill", "spread / skill", [*shown.families, ORACLE], zero=True) for n in names]
    if not any(drawn):
        return None
    lead = (
        "Means over neighbouring cells, energy and gradients: a model that is calibrated cell by cell can be twice as wide as "
        "its errors in area means, where the errors of its members are correlated wrongly."
    )
    return Section("Calibration of pooled fields", lead, page.charts([d for d in drawn if d]))


def _ranks(shown: Shown, details: Mapping[str, list]) -> Section | None:
    parts = [figures.ranks(shown, details.get("ranks", [])), figures.spectra(shown, details.get("spectra", []), "truth")]
    if not any("<figure" in part for part in parts):
        return None
    lead = (
        "Of the first training. A histogram that is a U is overconfident, a hill too wide. The members' spectra should be the truth's; "
        "the mean of an ensemble is smoother than any state."
    )
    return Section("Rank histograms and spectra", lead, "".join(parts))


def _extremes(shown: Shown, details: Mapping[str, list]) -> Section | None:
    groups = []
    for variable in shown.views:
        labels = list(dict.fromkeys(str(r["metric"]).removeprefix("twcrps_") for r in shown.records if _is_tail(r, variable)))
        for lead in (None, shown.leads[0], shown.middle):
            for label in labels:
                events = shown.table.get((variable, lead, ORACLE, f"events_{label}"))
                if events is None or not events["value"]:
                    continue
                single = shown.table.get((variable, lead, ORACLE, f"independent_events_{label}"))
                lines = []
                for system in (*shown.families, ORACLE):
                    keys = (f"twcrps_{label}_skill_score", f"twcrps_{label}", f"brier_{label}_skill_score", f"rev_{label}")
                    lines.append([escape(words(system)), *(_cell(shown.table.get((variable, lead, system, k)), False) for k in keys)])
                seen = f"{events['value']:.0f} events ({single['value']:.0f} independent)"
                groups.append((f"{words(variable)} above {label}, {_ahead(lead)}, {seen}", lines))
    if not groups:
        return None
    lead = (
        "Thresholds are quantiles of the training data. Threshold-weighted CRPS and Brier scores are fair; intervals are left out "
        "where independent events are too few. Such scores guard against gross errors; they cannot rank tails from so few events. "
        "Figures are of the first training: grey is where a perfect ensemble of this size falls nine times in ten; the relative "
        "economic value is one for a perfect forecast and zero for the better of always and never acting."
    )
    drawn = figures.reliability(shown, details.get("reliability", [])) + figures.economic_value(shown, details.get("economic_value", []))
    return Section("Extremes", lead, page.table(["", "twCRPS skill", "twCRPS", "Brier skill", "relative value"], groups) + drawn)


def _free_runs(shown: Shown, details: Mapping[str, list], free: Mapping) -> Section | None:
    """Who stays with the simulator when left alone, and who reaches its extremes."""
    columns = {
        "lost": "runs lost",
        "mean_shift": "shift of the mean",
        "std_ratio": "std / simulator's",
        "energy_ratio": "energy / simulator's",
    }
    columns |= {"log_spectral_distance": "log-spectral distance (dB)", "correlation_length_ratio": "correlation length / simulator's"}
    groups = []
    for variable in shown.views:
        rows = {f: [shown.table.get((variable, None, f, f"{PREFIX}{m}")) for m in columns] for f in shown.families}
        groups.append((words(variable), [[escape(words(f)), *(_cell(c, False) for c in cells)] for f, cells in rows.items() if any(cells)]))
    if not any(lines for _, lines in groups):
        return None
    body, periods = page.table(["", *columns.values()], groups), free["periods"]
    names = [n for v, views in shown.views.items() for n in (v, f"{v}_energy")]
    groups = []
    for name in names:
        rows = {f: [shown.table.get((name, None, f, f"{PREFIX}level_{p:g}_minus_{ORACLE}")) for p in periods] for f in shown.families}
        lines = [[escape(words(f)), *(_cell(c, False) for c in cells)] for f, cells in rows.items() if any(cells)]
        groups += [(f"{words(name)}: return level minus the simulator's", lines)] if lines else []
    if groups:
        body += page.table(["", *(f"once in {p} frames" for p in periods)], groups)
    drawn = [d for d in (figures.levels(shown, n, periods) for n in names) if d]
    body += page.charts(drawn) + figures.spectra(shown, details.get("free_runs", []), "simulator")
    lead = (
        f"{free['runs']} runs of {free['frames']} frames of the first training of every family, from initial states of the test, beside "
        "the simulator's trajectories. A run is lost where it leaves the simulator's range threefold; the rest is of those that do not. "
        "Return levels are of generalised Pareto fits to declustered peaks, left out under 30 of them; what differs has an interval "
        "without zero."
    )
    return Section("Free runs", lead, body)


def _is_tail(record: Record, variable: str) -> bool:
    metric = str(record["metric"])
    return record["variable"] == variable and metric.startswith("twcrps_q") and metric.count("_") == 1


def _costs(shown: Shown, steps: int) -> Section:
    lines, points = [], []
    variable, lead = next(iter(shown.views)), shown.middle
    for family in shown.families:
        cost = mean_costs([t for t in shown.trials if t.family == family])
        row = shown.table.get((variable, lead, family, "crps_fair_skill_score"))
        cells = [
            f"{cost['parameters']:.0f}",
            duration(cost["seconds_train"]),
            f"{cost['steps_train']:.0f}",
            f"{cost['learning_rate']:g}",
            format_number(cost["network_calls"] / steps),
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
        "network calls a member and frame",
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
