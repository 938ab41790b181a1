"""The report: everything a run directory holds, told in the order in which one asks for it."""

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification import maps, page, score_figures
from appa_lite.verification.page import Section
from appa_lite.verification.score_figures import words
from appa_lite.verification.tables import Record, duration, format_number, leads
from appa_lite.verification.verify import Verification

LIMIT = 11e6  # characters of a page
HEADINGS = {"reanalysis": "Scores of the reanalysis", "withheld": "Scores at withheld observations", "forecast": "Scores of the forecast"}

FIGURES = (  # of the details: key, heading, what is seen, how it is drawn
    ("series", "Error and spread in time", "RMSE of the mean; dashed, the ensemble's own spread.", score_figures.time_series),
    (
        "ranks",
        "Rank histograms",
        "Where the truth falls among the members: flat if reliable, a U if overconfident.",
        score_figures.rank_histograms,
    ),
    ("spectra", "Spectra", "Power by wavenumber: members should follow the truth.", score_figures.spectra),
    ("notes", "Where spectra are of", "A spectrum needs every cell of a rectangle.", score_figures.notes),
    (
        "reliability",
        "Reliability of extremes",
        "Quantiles are of the training climatology. The band is where a perfect ensemble of this size falls nine times in ten.",
        score_figures.reliability,
    ),
    (
        "economic_value",
        "Economic value of extremes",
        "One is a perfect forecast, zero the better of always and never acting, when acting at the best probability for each ratio.",
        score_figures.economic_value,
    ),
    ("stations", "Withheld reports", "Dots were never assimilated; the band is the 90 % prediction of them.", score_figures.stations),
)


@dataclass
class Run:
    """What a run directory holds; whatever is None is not shown."""

    title: str = "Reanalysis and forecast"
    truth: xr.Dataset | None = None
    observations: pd.DataFrame | None = None
    withheld: pd.DataFrame | None = None
    reanalysis: xr.Dataset | None = None
    optimal_interpolation: xr.Dataset | None = None
    forecast: xr.Dataset | None = None
    scores: dict[str, list[Record]] = field(default_factory=dict)  # by 'reanalysis', 'withheld', 'forecast'
    details: dict[str, dict] = field(default_factory=dict)
    events: list[tuple[str, str, bytes | None]] = field(default_factory=list)  # name, what is known of it in lines, PNG
    commands: list[str] = field(default_factory=list)


def report(run: Run) -> str:
    """The page of a run, with as many frames of its maps as keep it below 11 MB."""
    for frames in (24, 16, 10, 6, 3):
        html = page.build_report(run.title, subtitle(run), facts(run), sections(run, frames), footer(run))
        if len(html) < LIMIT:
            break
    return html


def subtitle(run: Run) -> str:
    """The period, the members, what was observed."""
    parts = []
    for what, data in (("reanalysis", run.reanalysis), ("forecast", run.forecast)):
        if data is not None:
            start, *_, end = (data["time"].values[0], data["time"].values[-1])
            members = f"{data.sizes['number']} members, " if "number" in data.sizes else ""
            when = f"{day(start)} to {day(end)}"
            if "prediction_timedelta" in data.dims:
                when = f"from {day(start)}, {duration(float(data['prediction_timedelta'].values[-1] / np.timedelta64(1, 's')))} ahead"
            parts.append(f"{what}: {members}{when}")
    return "; ".join(parts)


def facts(run: Run) -> list[tuple[str, str]]:
    """At most five numbers that say what came out: how much was observed, and errors beside the best rival's."""
    found = []
    if run.observations is not None:
        found.append((f"{len(run.observations):,}", f"observations of {join(run.observations['variable'].unique())}"))
    for kind, records in run.scores.items():
        if not records:
            continue
        lead = leads(records, 2)[0]
        rmse = {(r["variable"], r["system"]): r["value"] for r in score_figures.plain(records) if _is_rmse(r, lead)}
        first = records[0]["system"]
        for variable in [v for v, system in rmse if system == first][:2]:
            rivals = {s: value for (v, s), value in rmse.items() if v == variable and s != first}
            rival = min(rivals, key=rivals.get, default=None)
            if rival is not None and rivals[rival] > 0:
                change = f"{100 * (rmse[variable, first] / rivals[rival] - 1):+.0f} %".replace("-", "\u2212")
                ahead = f", {duration(lead)} ahead" if lead else ""
                where = " at withheld observations" if kind == "withheld" else ""
                found.append((change, f"RMSE of {variable}{where}{ahead}: {words(first)} against {words(rival)}"))
    return found[:5]


def _is_rmse(record: Record, lead: float | None) -> bool:
    return record["metric"] == "rmse" and record["lead_time"] == lead


def sections(run: Run, frames: int) -> list[Section]:
    """Every section that the run has something for."""
    out = []
    if run.reanalysis is not None:
        body = maps.analysis_maps(run.reanalysis, run.truth, run.optimal_interpolation, run.observations, frames)
        lead = "What was observed around each time, and the ensemble given all observations of the period, before and after."
        out.append(Section("Reanalysis", lead, body))
    out += _evidence(run) + _scores(run, "reanalysis") + _scores(run, "withheld")
    if run.forecast is not None:
        lead = "Each member starts from a member of the analysis; nothing is observed after the initial time."
        out.append(Section("Forecast", lead, maps.forecast_maps(run.forecast, run.truth, frames)))
    out += _scores(run, "forecast") + _events(run)
    if run.commands:
        out.append(Section("How this was made", "The commands, in order.", page.commands(run.commands)))
    return out


def footer(run: Run) -> str:
    source = next((d.attrs["source"] for d in (run.reanalysis, run.forecast) if d is not None and "source" in d.attrs), "appa_lite")
    return f"Made by {source}. Intervals are 90 %, by block bootstrap."


def _scores(run: Run, kind: str) -> list[Section]:
    """One section of table and charts; none without scores."""
    records, details = run.scores.get(kind, []), run.details.get(kind, {})
    if kind == "withheld" and not details:
        details = _at_withheld(run)
    if not records and not details:
        return []
    parts = []
    if kind == "forecast" and records:
        parts.append(_part("Error against lead time", "Dashed: the ensemble's own spread.", score_figures.lead_curves(records)))
    if records:
        parts.append(score_figures.score_table(records))
    pooled = score_figures.pooled_calibration(records)
    if "<figure" in pooled:
        lead = "One at every size if the members' errors are correlated as the truth's; above, area means are over-dispersed."
        parts.append(_part("Calibration of area means", lead, pooled))
    extremes = score_figures.extremes_table(records)
    if extremes:
        lead = "Quantiles are of the training climatology. Under ten independent events no interval is given."
        parts.append(_part("Extremes", lead, extremes))
    for key, title, lead, draw in FIGURES:
        if details.get(key) and not (key == "series" and kind != "reanalysis"):
            parts.append(_part(title, lead, draw(details[key])))
    against = "withheld observations, their errors accounted for" if details.get("kind") == "observations" else "the truth"
    lead = f"Against {against}. Bold is the best of its column, the small print the 90 % interval; spread / skill is best at one."
    return [Section(HEADINGS[kind], lead if records else "Reports that were never assimilated.", "".join(parts))]


def _evidence(run: Run) -> list[Section]:
    """What the analysis says about itself, where it was written with it."""
    if run.reanalysis is None or "evidence" not in run.reanalysis.attrs:
        return []
    records, effective = json.loads(run.reanalysis.attrs["evidence"]), run.reanalysis.attrs["effective_members"]
    columns = {"rows": "values used", "chi_square": "chi-square", "desroziers": "Desroziers ratio", "bias": "bias"}
    columns |= {"withheld": "withheld", "crps": "CRPS", "spread_skill": "spread / skill", "coverage": "coverage"}
    shown = {key: name for key, name in columns.items() if any(key in r for r in records)}
    lines = [[escape(words(r["kind"])), *(format_number(r[k]) if k in r else "" for k in shown)] for r in records]
    body = page.table(["", *shown.values()], [("", lines)])
    ranks = [
        {"system": "reanalysis", "variable": r["kind"], "lead_time": None, "frequencies": _shares(r["ranks"])}
        for r in records
        if "ranks" in r
    ]
    if ranks:
        expected = next(100 * r["coverage_expected"] for r in records if "ranks" in r)
        lead = (
            f"Ranks of withheld values among members with the error of an observation: flat is right, and a coverage of {expected:.0f} %."
        )
        body += _part("Values never assimilated", lead, score_figures.rank_histograms(ranks))
    lead = f"Chi-square and Desroziers ratio are one where prior and stated errors are right; {effective:.3g} members count as independent."
    return [Section("Evidence", lead, body)]


def _events(run: Run) -> list[Section]:
    """What `extremes` found: how likely each event is, and what it looks like."""
    parts = []
    for name, told, picture in run.events:
        first, *rest = told.splitlines()
        image = ""
        if picture is not None:
            image = (
                f'<figure><img style="width:100%" alt="{escape(first)}" src="data:image/png;base64,{b64encode(picture).decode()}"></figure>'
            )
        parts.append(
            f"<h3>{escape(name.capitalize())}</h3><p><strong>{escape(first)}</strong><br>{'<br>'.join(map(escape, rest))}</p>{image}"
        )
    lead = "Probabilities are those of the model's law, not of the world's; members are drawn given the event."
    return [Section("Rare events", lead, "".join(parts))] if parts else []


def _shares(counts: Sequence[int]) -> list[float]:
    return [count / sum(counts) for count in counts]


def _part(title: str, lead: str, body: str) -> str:
    return f"<h3>{title}</h3><p>{lead}</p>{body}"


def _at_withheld(run: Run) -> dict:
    """The reanalysis at the withheld stations, where nobody has scored it there."""
    if run.withheld is None or run.reanalysis is None or any(d.get("stations") for d in run.details.values()):
        return {}
    try:
        details = Verification(replicates=20, spectra=False).evaluate({"reanalysis": run.reanalysis}, observations=run.withheld).details
    except UserError:  # other names or another period: verify can tell, a page need not
        return {}
    return {"kind": "observations", "stations": details["stations"]} if details["stations"] else {}


def join(names: Sequence[str]) -> str:
    names = [str(n) for n in names]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def day(time: np.datetime64) -> str:
    return f"{pd.Timestamp(time):%-d %B %Y}"
