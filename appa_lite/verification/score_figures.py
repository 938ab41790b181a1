"""Tables and charts of scores: each takes records or details and returns HTML."""

from collections.abc import Sequence
from html import escape

import numpy as np

from appa_lite.verification import page
from appa_lite.verification.charts import Line, bar_chart, colours, line_chart
from appa_lite.verification.tables import Record, duration, format_number, leads
from appa_lite.verification.views import viewed

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


def plain(records: Sequence[Record]) -> list[Record]:
    """Those of the fields themselves, not of views of them."""
    return [r for r in records if not viewed(str(r["variable"]))[1]]


def score_table(records: Sequence[Record], most_leads: int = 4) -> str:
    """All systems and variables; the best of each column is bold."""
    records = plain(records)
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


def extremes_table(records: Sequence[Record], most_leads: int = 3) -> str:
    """Scores of exceedances with the events behind them, a group per variable, quantile and lead; empty without extremes."""
    labels = dict.fromkeys(str(r["metric"]).removeprefix("events_") for r in records if str(r["metric"]).startswith("events_"))
    lookup, groups = {(r["variable"], r["lead_time"], r["system"], r["metric"]): r for r in records}, []
    for variable in dict.fromkeys(r["variable"] for r in plain(records)):
        for label in labels:
            for lead in leads(records, most_leads):
                lines = []
                for system in dict.fromkeys(r["system"] for r in records):
                    columns = (f"{m}_{label}" for m in ("twcrps", "brier", "rev", "events", "independent_events"))
                    cells = [lookup.get((variable, lead, system, m)) for m in columns]
                    lines += [[escape(words(system)), *(_cell(c, False) for c in cells)]] if any(cells) else []
                ahead = f", {duration(lead)} ahead" if lead is not None else ""
                groups += [(f"{variable} above its {label[1:]} % quantile{ahead}", lines)] if lines else []
    header = ["", "threshold-weighted CRPS", "fair Brier score", "economic value", "exceedances", "independent"]
    return page.table(header, groups) if groups else ""


def lead_curves(records: Sequence[Record]) -> str:
    """RMSE and spread against lead time, a chart per variable."""
    records = [r for r in plain(records) if r["lead_time"] is not None] or plain(records)
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


def pooled_calibration(records: Sequence[Record]) -> str:
    """Spread over skill against the size of the window whose mean is scored, a chart per variable, at the middle lead."""
    curves: dict[tuple[str, str], dict[int, Record]] = {}
    rows = [r for r in records if r["metric"] == "spread_skill"]
    chosen = leads(rows, 2)[0] if rows else None
    for r in (r for r in rows if r["lead_time"] == chosen):
        variable, view = viewed(str(r["variable"]))
        size = view.removeprefix("mean") or "1"
        if size.isdigit():
            curves.setdefault((variable, str(r["system"])), {})[int(size)] = r
    drawn, colour = [], colours(list(dict.fromkeys(r["system"] for r in records)))
    for variable in dict.fromkeys(v for (v, _), found in curves.items() if len(found) > 1):
        lines = []
        for system, found in ((s, found) for (v, s), found in curves.items() if v == variable):
            rows = [found[size] for size in sorted(found)]
            band = [[r[end] for r in rows] for end in ("low", "high")] if all(r["low"] is not None for r in rows) else [None, None]
            lines.append(Line(words(system), sorted(found), [r["value"] for r in rows], colour[system], "line", *band))
        lines.append(Line("", [1, max(max(line.x) for line in lines)], [1, 1], "k", "dashed"))
        ahead = f", {duration(chosen)} ahead" if chosen is not None else ""
        drawn.append(line_chart(lines, variable + ahead, "window (cells along a side)", "spread / skill", "log"))
    return page.charts(drawn)


def _middle(entries: Sequence[dict]) -> list[dict]:
    wanted = sorted({e["lead_time"] for e in entries if e["lead_time"] is not None})
    return [e for e in entries if e["lead_time"] == (wanted[len(wanted) // 2] if wanted else None)]


def _event(entry: dict) -> str:
    value = f" {format_number(entry['value'])}" if entry["value"] is not None else ""
    ahead = f", {duration(entry['lead_time'])} ahead" if entry["lead_time"] is not None else ""
    counts = f"{entry['events']} exceedances, {entry['independent_events']} independent"
    return f"{entry['variable']} above its {entry['threshold'][1:]} % quantile{value}{ahead}: {counts}"


def reliability(entries: Sequence[dict]) -> str:
    """Observed frequency against forecast probability with consistency bars: the first system, in the middle of its leads."""
    drawn, first = [], entries[0]["system"]
    css = colours(list(dict.fromkeys(e["system"] for e in entries)))[first]
    for e in (e for e in _middle(entries) if e["system"] == first and e["events"]):
        claim = "" if e["claim"] else "; too few cases for a claim"
        lines = [
            Line("perfect ensemble of this size", e["probability"], e["expected"], "k", "dashed", e["low"], e["high"]),
            Line(words(first), e["probability"], e["observed"], css),
            Line("", e["probability"], e["observed"], css, "points"),
        ]
        drawn.append(line_chart(lines, _event(e) + claim, "share of members", "observed frequency", zero=True))
    return page.charts(drawn)


def economic_value(entries: Sequence[dict]) -> str:
    """Relative economic value against the cost-loss ratio, all systems, in the middle of the leads."""
    drawn, colour = [], colours(list(dict.fromkeys(e["system"] for e in entries)))
    chosen = [e for e in _middle(entries) if e["events"] and e["system"] != "climatology"]
    for key in dict.fromkeys((e["variable"], e["threshold"]) for e in chosen):
        same = [e for e in chosen if (e["variable"], e["threshold"]) == key]
        lines = [Line(words(e["system"]), e["cost_loss"], e["economic_value"], colour[e["system"]]) for e in same]
        drawn.append(line_chart(lines, _event(same[0]), "cost / loss", "economic value", "log", zero=True))
    return page.charts(drawn)


def notes(entries: Sequence[dict]) -> str:
    return "".join(f"<p>{escape(e['variable'])}: {escape(e['note'])}.</p>" for e in entries)


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
