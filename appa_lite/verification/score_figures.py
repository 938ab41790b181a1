"""Tables and charts of scores: each takes records or details and returns HTML."""

from collections.abc import Sequence
from html import escape

import numpy as np

from appa_lite.verification import page
from appa_lite.verification.charts import Line, bar_chart, colours, line_chart
from appa_lite.verification.tables import Record, duration, format_number, leads

NAMES = {
    "rmse": "RMSE",
    "crps_fair": "fair CRPS",
    "spread_skill": "spread / skill",
    "bias": "bias",
    "rank_slope": "rank slope",
    "rank_u": "rank U",
}
BEST = ("rmse", "crps_fair")


def words(name: str) -> str:
    return name.replace("_", " ")


def score_table(records: Sequence[Record], most_leads: int = 4) -> str:
    """All systems and variables; the best of each column is bold."""
    columns = [m for m in NAMES if any(r["metric"] == m for r in records)]
    lookup = {(r["variable"], r["lead_time"], r["system"], r["metric"]): r for r in records}
    systems, groups = list(dict.fromkeys(r["system"] for r in records)), []
    for variable in dict.fromkeys(r["variable"] for r in records):
        for lead in leads(records, most_leads):
            rows = {s: [lookup.get((variable, lead, s, m)) for m in columns] for s in systems}
            rows = {s: cells for s, cells in rows.items() if any(cells)}
            best = {}
            for k, metric in enumerate(columns):
                values = {s: cells[k]["value"] for s, cells in rows.items() if cells[k] and metric in BEST}
                best[k] = min(values, key=values.get) if values else None
            lines = [[escape(words(s)), *(_cell(c, best[k] == s) for k, c in enumerate(cells))] for s, cells in rows.items()]
            groups.append((variable + (f", {duration(lead)} ahead" if lead is not None else ""), lines))
    return page.table(["", *(NAMES[m] for m in columns)], groups)


def lead_curves(records: Sequence[Record]) -> str:
    """RMSE and CRPS against lead time, a chart per variable."""
    drawn, colour = [], colours(list(dict.fromkeys(r["system"] for r in records)))
    for variable in dict.fromkeys(r["variable"] for r in records):
        lines = []
        for system, css in colour.items():
            for metric, style in (("rmse", "line"), ("spread", "dashed")):
                rows = sorted(
                    (r for r in records if (r["system"], r["variable"], r["metric"]) == (system, variable, metric)),
                    key=lambda r: r["lead_time"] or 0,
                )
                if not rows or (metric == "spread" and system in ("climatology", "persistence")):
                    continue
                x, y = [(r["lead_time"] or 0) / 86400 for r in rows], [r["value"] for r in rows]
                band = [[r[k] for r in rows] for k in ("low", "high")] if metric == "rmse" and rows[0]["low"] is not None else [None, None]
                lines.append(Line(words(system) + (", spread" if metric == "spread" else ""), x, y, css, style, *band))
        if lines:
            drawn.append(line_chart(lines, variable, "lead time (days)", "RMSE", zero=True))
    return page.charts(drawn)


def time_series(series: Sequence[dict]) -> str:
    """RMSE and spread of every system in time, a chart per variable."""
    drawn, colour = [], colours(list(dict.fromkeys(s["system"] for s in series)))
    for variable in dict.fromkeys(s["variable"] for s in series):
        lines = []
        for s in (s for s in series if s["variable"] == variable):
            when = _seconds(s["time"])
            lines.append(Line(words(s["system"]), when, s["rmse"], colour[s["system"]]))
            if any(v is not None for v in s["spread"]) and s["system"] != "climatology":
                lines.append(Line(words(s["system"]) + ", spread", when, s["spread"], colour[s["system"]], "dashed"))
        drawn.append(line_chart(lines, variable, "", "RMSE", xkind="time", zero=True))
    return page.charts(drawn)


def rank_histograms(ranks: Sequence[dict]) -> str:
    """Bars of the frequency over that of a flat histogram: the first system, in the middle of its leads."""
    colour = colours(list(dict.fromkeys(r["system"] for r in ranks)))
    shown = [r for r in ranks if r["system"] == ranks[0]["system"]]
    wanted = sorted({r["lead_time"] for r in shown if r["lead_time"] is not None})
    wanted = {wanted[len(wanted) // 2]} if wanted else {None}
    drawn = []
    for r in (r for r in shown if r["lead_time"] in wanted):
        heights = [len(r["frequencies"]) * (v or 0.0) for v in r["frequencies"]]
        ahead = f", {duration(r['lead_time'])} ahead" if r["lead_time"] is not None else ""
        drawn.append(
            bar_chart(
                heights,
                r["variable"] + ahead,
                f"rank of the truth among {len(heights) - 1} members",
                "frequency / flat",
                colour[r["system"]],
            )
        )
    return page.charts(drawn)


def spectra(entries: Sequence[dict]) -> str:
    """Members of every system and the truth, log-log."""
    drawn, colour = [], colours(list(dict.fromkeys(e["system"] for e in entries)))
    lead = max((e["lead_time"] for e in entries if e["lead_time"] is not None), default=None)
    for variable in dict.fromkeys(e["variable"] for e in entries):
        chosen = [
            e for e in entries if e["variable"] == variable and e["lead_time"] == lead and e["system"] not in ("climatology", "persistence")
        ]
        if not chosen:
            continue
        unit = chosen[0]["unit"].removeprefix("1/")
        lines = [Line("truth", chosen[0]["wavenumber"], chosen[0]["truth"], "k")]
        lines += [Line(f"{words(e['system'])}, members", e["wavenumber"], e["members"], colour[e["system"]], "dashed") for e in chosen]
        ahead = f", {duration(lead)} ahead" if lead is not None else ""
        drawn.append(line_chart(lines, variable + ahead, f"wavenumber (cycles per {unit or 'unit length'})", "power", "log", "log"))
    return page.charts(drawn)


def stations(entries: Sequence[dict], most: int = 12) -> str:
    """Reports as dots, the first system's mean and envelope, kriging's mean."""
    first, drawn = entries[0]["system"], []
    for e in [e for e in entries if e["system"] == first][:most]:
        when, mean = _seconds(e["time"]), np.array([np.nan if v is None else v for v in e["mean"]])
        std = np.array([np.nan if v is None else v for v in e["std"]])
        lines = [Line(words(first), when, mean, "c0", "line", mean - 1.645 * std, mean + 1.645 * std)]
        same = [o for o in entries if o["system"] == "kriging" and (o["variable"], o["station"]) == (e["variable"], e["station"])]
        lines += [Line("kriging", _seconds(o["time"]), o["mean"], "c4", "dashed") for o in same]
        lines.append(Line("withheld reports", when, e["observation"], "k", "points"))
        drawn.append(line_chart(lines, f"{e['station']}: {e['variable']}", "", e["variable"], xkind="time"))
    return page.charts(drawn)


def _cell(record: Record | None, best: bool) -> str:
    if record is None or record["value"] is None:
        return ""
    value = format_number(record["value"]).replace("-", "\u2212")
    interval = ""
    if record["low"] is not None:
        interval = f"<small>{format_number(record['low'])} to {format_number(record['high'])}</small>".replace("-", "\u2212")
    return (f"<b>{value}</b>" if best else value) + interval


def _seconds(times: Sequence[str]) -> np.ndarray:
    return np.array(times, dtype="datetime64[s]").astype(np.float64)
