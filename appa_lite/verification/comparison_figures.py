"""Figures of a comparison: what the tables do not show of ranks, spectra, reliability, economic value and return levels."""

from collections.abc import Sequence

from appa_lite.verification import page
from appa_lite.verification.charts import Line, bar_chart, line_chart
from appa_lite.verification.comparison import CLIMATOLOGY, ORACLE, PERSISTENCE, Trial, lookup
from appa_lite.verification.free_runs import PREFIX
from appa_lite.verification.score_figures import words
from appa_lite.verification.tables import Record, duration
from appa_lite.verification.views import viewed

LOWEST = -1.0  #: of skills in a chart: what is further below climatology would hide the others
COLOURS = ("c0", "c5", "c3", "c1", "c4", "c6", "c7")  #: of families, in turn


class Shown:
    """The records of a comparison, and the order in which systems, variables and leads are shown."""

    def __init__(self, records: Sequence[Record], trials: Sequence[Trial], reference: str):
        self.records, self.trials, self.reference, self.table = records, trials, reference, lookup(records)
        self.families = list(dict.fromkeys(t.family for t in trials))
        self.colours = {f: COLOURS[n % len(COLOURS)] for n, f in enumerate(self.families)} | {
            ORACLE: "k",
            CLIMATOLOGY: "c2",
            PERSISTENCE: "c2",
        }
        names = list(dict.fromkeys(str(r["variable"]) for r in records))
        self.views = {v: [n for n in names if n != v and viewed(n)[0] == v] for v in names if not viewed(v)[1]}
        self.energies = [n for n in names if viewed(n) == (n, "energy")]  #: of velocities
        self.leads = sorted({r["lead_time"] for r in records if r["lead_time"]})

    @property
    def middle(self) -> float:
        return self.leads[len(self.leads) // 2]

    def style(self, system: str) -> str:
        return "line" if system in self.families else "points" if system == PERSISTENCE else "dashed"

    def curve(self, variable: str, system: str, metric: str, band: bool = True) -> Line | None:
        rows = [(lead, self.table.get((variable, lead, system, metric))) for lead in self.leads]
        least = LOWEST if metric.endswith("_skill_score") else -float("inf")
        rows = [(lead, r) for lead, r in rows if r is not None and r["value"] >= least]
        if not rows:
            return None
        x, y = [lead / 86400 for lead, _ in rows], [r["value"] for _, r in rows]
        edges = ([None if r[k] is None else max(r[k], least) for _, r in rows] for k in ("low", "high")) if band else (None, None)
        return Line(words(system), x, y, self.colours[system], self.style(system), *edges)

    def chart(self, variable: str, metric: str, ylabel: str, systems: Sequence[str], zero: bool = False) -> str | None:
        lines = [line for s in systems if (line := self.curve(variable, s, metric, band=s in self.families)) is not None]
        return line_chart(lines, words(variable), "lead time (days)", ylabel, zero=zero) if lines else None


def middle_lead(entries: Sequence[dict]) -> list[dict]:
    """Those of the details' entries that are in the middle of their leads."""
    found = sorted({e["lead_time"] for e in entries if e["lead_time"] is not None})
    return [e for e in entries if e["lead_time"] == (found[len(found) // 2] if found else None)]


def window_calibration(shown: Shown, variable: str) -> str | None:
    """Spread over skill against the size of the window whose mean is scored."""
    lines = []
    for system in (*shown.families, ORACLE):
        sizes = {1: variable} | {int(viewed(n)[1][4:]): n for n in shown.views[variable] if viewed(n)[1].startswith("mean")}
        rows = {k: shown.table.get((n, shown.middle, system, "spread_skill")) for k, n in sizes.items()}
        rows = {k: rows[k] for k in sorted(rows) if rows[k] is not None}
        if len(rows) > 1:
            band = [[r[end] for r in rows.values()] for end in ("low", "high")] if system in shown.families else [None, None]
            values = [r["value"] for r in rows.values()]
            lines.append(Line(words(system), list(rows), values, shown.colours[system], shown.style(system), *band))
    title = f"{words(variable)}, {duration(shown.middle)} ahead"
    return line_chart(lines, title, "cells along a side of the window", "spread / skill", "log", zero=True) if lines else None


def ranks(shown: Shown, entries: Sequence[dict]) -> str:
    """A histogram for every family and the oracle, flat if calibrated."""
    drawn = []
    for e in middle_lead(entries):
        if e["system"] in (*shown.families, ORACLE) and e["variable"] in shown.views:
            heights = [len(e["frequencies"]) * (v or 0.0) for v in e["frequencies"]]
            title = f"{words(e['system'])}: {words(e['variable'])}, {duration(e['lead_time'])} ahead"
            drawn.append(bar_chart(heights, title, "rank of the truth", "frequency / flat", shown.colours[e["system"]]))
    return page.charts(drawn)


def spectra(shown: Shown, entries: Sequence[dict], truth: str) -> str:
    """Of the members of every family, and of ``truth``, at the last lead."""
    drawn, lead = [], max((e["lead_time"] for e in entries if e["lead_time"] is not None), default=None)
    for variable in shown.views:
        mine = [e for e in entries if (e["variable"], e["lead_time"]) == (variable, lead) and e["system"] in shown.families]
        if mine:
            lines = [Line(words(e["system"]), e["wavenumber"], e["members"], shown.colours[e["system"]]) for e in mine]
            lines.append(Line(truth, mine[0]["wavenumber"], mine[0]["truth"], "k", "dashed"))
            unit = mine[0]["unit"].removeprefix("1/") or "unit length"
            ahead = "" if lead is None else f", {duration(lead)} ahead"
            drawn.append(line_chart(lines, words(variable) + ahead, f"wavenumber (cycles per {unit})", "power", "log", "log"))
    return page.charts(drawn)


def reliability(shown: Shown, entries: Sequence[dict]) -> str:
    """Of every family and the oracle at the lowest threshold, with consistency bars."""
    drawn = []
    for e in middle_lead([e for e in entries if e["variable"] in shown.views and e["events"]]):
        if e["system"] in (*shown.families, ORACLE) and e["threshold"] == entries[0]["threshold"]:
            colour, claim = shown.colours[e["system"]], "" if e["claim"] else " (too few for a claim)"
            lines = [
                Line("a perfect ensemble of this size", e["probability"], e["expected"], "c2", "dashed", e["low"], e["high"]),
                Line(words(e["system"]), e["probability"], e["observed"], colour),
                Line("", e["probability"], e["observed"], colour, "points"),
            ]
            title = f"{words(e['system'])}: {words(e['variable'])} above {e['threshold']}, {duration(e['lead_time'])} ahead{claim}"
            drawn.append(line_chart(lines, title, "share of members", "observed frequency", zero=True))
    return page.charts(drawn)


def economic_value(shown: Shown, entries: Sequence[dict]) -> str:
    """Against the cost-loss ratio, all families and the oracle, a chart for every threshold that was exceeded."""
    drawn, chosen = [], [e for e in middle_lead(entries) if e["events"] and e["variable"] in shown.views]
    for variable, threshold in dict.fromkeys((e["variable"], e["threshold"]) for e in chosen):
        same = [e for e in chosen if (e["variable"], e["threshold"]) == (variable, threshold)]
        same = [e for e in same if e["system"] in (*shown.families, ORACLE)]
        lines = [
            Line(words(e["system"]), e["cost_loss"], e["economic_value"], shown.colours[e["system"]], shown.style(e["system"]))
            for e in same
        ]
        ahead, events = duration(same[0]["lead_time"]), same[0]["independent_events"]
        title = f"{words(variable)} above {threshold}, {ahead} ahead: {events} independent events"
        drawn.append(line_chart(lines, title, "cost / loss", "relative economic value", "log", zero=True))
    return page.charts(drawn)


def levels(shown: Shown, variable: str, periods: Sequence[int]) -> str | None:
    """Return levels against their period, of free runs and of the simulator."""
    lines = []
    for system in (*shown.families, ORACLE):
        rows = {p: shown.table.get((variable, None, system, f"{PREFIX}level_{p:g}")) for p in periods}
        rows = {p: r for p, r in rows.items() if r is not None}
        if rows:
            value, low, high = ([r[k] for r in rows.values()] for k in ("value", "low", "high"))
            name = "simulator" if system == ORACLE else words(system)
            lines.append(Line(name, list(rows), value, shown.colours[system], shown.style(system), low, high))
    return line_chart(lines, words(variable), "return period (frames)", "level", "log") if lines else None
