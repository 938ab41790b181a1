"""What figures need beyond the table: series in time, rank histograms, spectra, stations; all JSON-able."""

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.verification.base import Sums
from appa_lite.verification.bootstrap import block_length
from appa_lite.verification.cases import Cases
from appa_lite.verification.extremes import COST_LOSS, Threshold, economic_value, independent_events, split
from appa_lite.verification.reliability import claim, design_effect, reliability
from appa_lite.verification.spectra import Box
from appa_lite.verification.tally import Against, Tally, series

MOST_LEADS = 6


class Details:
    """Collects, variable by variable, and returns lists of flat mappings, and ``kind``: truth or observations.

    series: ``system, variable, time, lead_time, rmse, spread``, one value per case. ranks: ``system, variable, lead_time,
    frequencies``. spectra: ``system, variable, lead_time, wavenumber, unit, members, mean?, truth``. stations: ``system,
    variable, station, time, observation, mean, std``. reliability: ``system, variable, lead_time, threshold, value, events,
    independent_events, claim, probability, observed, expected, low, high, share``. economic_value: ``system, variable, lead_time,
    threshold, value, events, independent_events, cost_loss, economic_value``. notes: ``variable, note``.
    """

    def __init__(self, against: Against, block: int | None = None):
        self.kind, self.cases, self.against, self.block = against.kind, against.cases, against, block
        names = ("series", "ranks", "spectra", "stations", "reliability", "economic_value", "notes")
        self.found: dict[str, list[dict]] = {name: [] for name in names}

    def to_dict(self) -> dict:
        return {"kind": self.kind, **self.found}

    def add(self, tally: Tally, box: Box | None) -> None:
        """The curves that follow from the sums over all cases; ``box`` is where spectra are of."""
        if box is not None and box.note:
            self.found["notes"].append({"variable": tally.variable, "note": box.note})
        for system, sums in tally.sums.items():
            self._curves(system, tally.variable, sums, self.cases)
        for lead, index in _some_leads(self.cases):
            block = self.block or block_length(series(next(iter(tally.sums.values()))["squared_error"], index))  # as intervals have
            for system, sums in tally.sums.items():
                for t in tally.thresholds:
                    self._extremes({"system": system, "variable": tally.variable, "lead_time": lead}, sums, t, index, block)

    def _extremes(self, where: dict, sums: dict[str, Sums], threshold: Threshold, index: np.ndarray, block: int) -> None:
        joint = split(sums[f"contingency_{threshold.label}"].total.values[index])
        events = sums[f"events_{threshold.label}"]
        total, compared = events.total.values[index], float(events.weight.values[index].sum())
        value = float(threshold.value) if threshold.value.ndim == 0 else None
        where |= {"threshold": threshold.label, "value": value, "events": int(total.sum())}
        where |= {"independent_events": independent_events(total, block)}
        curve = economic_value(joint.sum(0), COST_LOSS)
        self.found["economic_value"].append(where | {"cost_loss": COST_LOSS.tolist(), "economic_value": _plain(curve)})
        if joint.shape[-1] > 2:
            effect = design_effect(joint, block)
            curves = {key: _plain(v) for key, v in reliability(joint, block).items()}
            known = claim(joint.sum() / effect, total.sum() / max(compared, 1.0))
            self.found["reliability"].append(where | {"claim": known, **curves})

    def _curves(self, system: str, variable: str, sums: dict[str, Sums], cases: Cases) -> None:
        per_case = {key: series(sums[key]) for key in ("squared_error", "variance") if key in sums}
        self.found["series"].append(
            {
                "system": system,
                "variable": variable,
                "time": _iso(cases.time),
                "lead_time": _plain(cases.seconds),
                "rmse": _plain(np.sqrt(per_case["squared_error"])),
                "spread": _plain(np.sqrt(per_case["variance"])),
            }
        )
        for lead, index in _some_leads(cases):
            where = {"system": system, "variable": variable, "lead_time": lead}
            if "ranks" in sums:
                self.found["ranks"].append(where | {"frequencies": _plain(_pooled(sums["ranks"], index))})
            if "spectrum_truth" in sums:
                axis = sums["spectrum_truth"].total["wavenumber"]
                curves = {k: _plain(_pooled(sums[f"spectrum_{k}"], index)) for k in ("members", "truth")}
                self.found["spectra"].append(where | {"wavenumber": _plain(axis.values), "unit": axis.attrs.get("units", ""), **curves})

    def stations(self, system: str, variable: str, forecast: xr.DataArray, truth: xr.DataArray) -> None:
        """Time series at the observations' stations; the standard deviation includes the observation's error."""
        against = self.against
        if against.kind != "observations" or "station" not in against.rows:
            return
        mean, std = against.envelope(forecast, truth)
        rows, start = against.rows.iloc[against.slots.row], against.cases.time[against.slots.case]
        keep = start == start.min() if against.cases.forecasts else np.full(start.shape, True)  # of forecasts only the first
        names = rows["station"].astype(str).to_numpy()
        for station in sorted(set(names[keep]) - {"", "nan", "None", "<NA>"})[:12]:
            at = np.flatnonzero(keep & (names == station))
            at = at[np.argsort(rows["time"].to_numpy()[at], kind="stable")]
            if pd.Index(rows["time"].to_numpy()[at]).has_duplicates or len(at) < 3:
                continue  # a track, not a series
            self.found["stations"].append(
                {
                    "system": system,
                    "variable": variable,
                    "station": station,
                    "time": _iso(rows["time"].to_numpy()[at]),
                    "observation": _plain(rows["observation"].to_numpy()[at]),
                    "mean": _plain(mean[at]),
                    "std": _plain(std[at]),
                }
            )


def _pooled(sums: Sums, index: np.ndarray) -> np.ndarray:
    weight = sums.weight.values[index].sum()
    return sums.total.values[index].sum(0) / weight if weight > 0 else np.full(sums.total.shape[-1], np.nan)


def _some_leads(cases: Cases) -> list[tuple[float | None, np.ndarray]]:
    if not cases.forecasts:
        return [(None, np.arange(len(cases)))]
    leads = np.unique(cases.seconds)
    leads = leads[leads > 0] if (leads > 0).any() else leads
    chosen = leads[np.unique(np.linspace(0, leads.size - 1, min(MOST_LEADS, leads.size)).round().astype(int))]
    return [(float(s), np.flatnonzero(cases.seconds == s)) for s in chosen]


def _iso(times: np.ndarray) -> list[str]:
    return np.datetime_as_string(np.asarray(times).astype("datetime64[s]")).tolist()


def _plain(values: np.ndarray) -> list[float | None]:
    """Python floats of six digits, None where not finite."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in np.asarray(values, dtype=np.float64)]
