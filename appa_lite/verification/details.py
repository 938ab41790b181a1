"""What figures need beyond the table: series in time, rank histograms, spectra, stations; all JSON-able."""

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.verification.base import Sums
from appa_lite.verification.cases import Cases

MOST_LEADS = 6


class Details:
    """Collects, system by system, and returns ``{kind, series, ranks, spectra, stations}``: lists of flat mappings.

    series: ``system, variable, time, lead_time, rmse, spread``, one value per case. ranks: ``system, variable, lead_time,
    frequencies``. spectra: ``system, variable, lead_time, wavenumber, unit, members, mean?, truth``. stations: ``system,
    variable, station, time, observation, mean, std``.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.found: dict[str, list[dict]] = {"series": [], "ranks": [], "spectra": [], "stations": []}

    def to_dict(self) -> dict:
        return {"kind": self.kind, **self.found}

    def add(self, system: str, variable: str, sums: dict[str, Sums], cases: Cases) -> None:
        """The curves that follow from a system's sums over all cases."""
        per_case = {key: _ratio(sums[key]) for key in ("squared_error", "variance") if key in sums}
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

    def stations(self, system: str, variable: str, forecast: xr.DataArray, truth: xr.DataArray, against) -> None:
        """Time series at the observations' stations; the standard deviation includes the observation's error."""
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


def _ratio(sums: Sums) -> np.ndarray:
    total, weight = sums.total.values, sums.weight.values
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)


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
