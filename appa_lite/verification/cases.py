"""Cases: which states of a forecast are compared with what. A case is a valid time of an analysis, or an initial time and a lead."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification.grid import GRIDS, NUMBER, grid_dims

CHUNK_VALUES = 2e7  # values of a forecast in memory at a time


@dataclass(frozen=True)
class Cases:
    """Initial times (N,) datetime64[ns] and leads (N,) timedelta64[ns], NaT for analyses; ordered by time."""

    time: np.ndarray
    lead: np.ndarray

    @classmethod
    def of(cls, dataset: xr.Dataset) -> "Cases":
        """All the cases of a forecast or analysis dataset."""
        if "time" not in dataset.dims:
            raise UserError(f"expected a dimension 'time' (CF) in a forecast or analysis, found {list(dataset.dims)}")
        time = dataset["time"].values.astype("datetime64[ns]")
        if "prediction_timedelta" not in dataset.dims:
            return cls(time, np.full(time.size, np.timedelta64("NaT", "ns")))
        lead = dataset["prediction_timedelta"].values.astype("timedelta64[ns]")
        return cls(np.repeat(time, lead.size), np.tile(lead, time.size))

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, index) -> "Cases":
        return Cases(self.time[index], self.lead[index])

    @property
    def forecasts(self) -> bool:
        return not np.isnat(self.lead).all()

    @property
    def valid(self) -> np.ndarray:
        return self.time + np.where(np.isnat(self.lead), np.timedelta64(0, "ns"), self.lead)

    @property
    def seconds(self) -> np.ndarray:
        """Leads (N,) in seconds, NaN for analyses."""
        return self.lead / np.timedelta64(1, "s")

    def keys(self) -> pd.MultiIndex:
        return pd.MultiIndex.from_arrays([self.time.astype("int64"), self.lead.astype("int64")])

    def coords(self) -> dict:
        return {"time": ("case", self.time), "prediction_timedelta": ("case", self.lead)}

    def chunks(self, values_per_case: int) -> Iterator[slice]:
        """Slices of cases that fit in memory."""
        step = max(int(CHUNK_VALUES // max(values_per_case, 1)), 1)
        return (slice(start, start + step) for start in range(0, len(self), step))


def common_cases(systems: dict[str, xr.Dataset]) -> Cases:
    """The cases that all systems hold, in order of time."""
    every = {name: Cases.of(dataset) for name, dataset in systems.items()}
    first, *others = every.items()
    for name, cases in others:
        if cases.forecasts != first[1].forecasts:
            kinds = {True: "a forecast (with prediction_timedelta)", False: "an analysis (without)"}
            raise UserError(f"'{first[0]}' is {kinds[first[1].forecasts]} but '{name}' is {kinds[cases.forecasts]}: verify them apart")
    cases = first[1]
    for name, other in others:
        cases = cases[cases.keys().isin(other.keys())]
        if not len(cases):
            raise UserError(f"'{first[0]}' ({_period(first[1])}) and '{name}' ({_period(other)}) have no time in common")
    return cases[np.lexsort((cases.lead, cases.time))]


def _period(cases: Cases) -> str:
    return f"{str(cases.valid.min())[:16]} to {str(cases.valid.max())[:16]}"


def gather(array: xr.DataArray, cases: Cases) -> xr.DataArray:
    """The states of an array (time, [prediction_timedelta], ...) or (case, ...) at the given cases: (case, ...)."""
    if "case" in array.dims:
        raise ValueError("an array that is laid out by case is indexed, not gathered")
    rows = pd.DatetimeIndex(array["time"].values).get_indexer(pd.DatetimeIndex(cases.time))
    if not cases.forecasts:
        out = array.isel(time=rows).drop_vars("time").rename(time="case")
        return out.transpose("case", ...)
    columns = pd.TimedeltaIndex(array["prediction_timedelta"].values).get_indexer(pd.TimedeltaIndex(cases.lead))
    array = array.transpose("time", "prediction_timedelta", ...)
    values = np.concatenate(  # one initial time at a time: what is on disk is read no further than it must be
        [
            array.isel(time=int(row), prediction_timedelta=columns[rows == row]).values for row in pd.unique(rows)
        ]  # cases are ordered by time
    )
    kept = {
        n: c
        for n, c in array.coords.items()
        if not set(c.dims) & {"time", "prediction_timedelta"} and n not in ("time", "prediction_timedelta")
    }
    return xr.DataArray(values, dims=("case", *array.dims[2:]), coords=kept, name=array.name, attrs=array.attrs)


def truth_at(truth: xr.DataArray, cases: Cases) -> xr.DataArray:
    """The truth (case, grid) at the valid times of cases, with the cases' coordinates; NaN where it has no such time.

    A truth with leads of its own is read at the cases themselves.
    """
    if "prediction_timedelta" in truth.dims:
        return gather(truth, cases).assign_coords(cases.coords())
    rows = pd.DatetimeIndex(truth["time"].values).get_indexer(pd.DatetimeIndex(cases.valid))
    out = truth.isel(time=np.maximum(rows, 0)).drop_vars("time").rename(time="case").transpose("case", ...)
    return out.where(xr.DataArray(rows >= 0, dims="case")).assign_coords(cases.coords())


def known_to(truth: xr.Dataset, cases: Cases) -> Cases:
    """The cases whose valid time the truth holds."""
    own = "prediction_timedelta" in truth.dims
    kept = cases[cases.keys().isin(Cases.of(truth).keys()) if own else np.isin(cases.valid, truth["time"].values.astype("datetime64[ns]"))]
    if not len(kept):
        times = truth["time"].values
        period = f"{str(times[0])[:16]} to {str(times[-1])[:16]}"
        raise UserError(f"the forecast ({_period(cases)}) and the truth ({period}) have no time in common")
    return kept


def check_grid(name: str, dataset: xr.Dataset, truth: xr.Dataset) -> None:
    """Refuse a dataset whose grid is not the truth's."""
    dims = next((g for g in GRIDS if all(d in truth.dims for d in g)), None)
    if dims != grid_dims(dataset):
        raise UserError(f"'{name}' has the grid dimensions {grid_dims(dataset)}, the truth {dims}: interpolate one to the other first")
    for dim in dims:
        ours, theirs = dataset[dim].values, truth[dim].values
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-5, atol=1e-4 * np.ptp(theirs) / max(len(theirs), 1)):
            raise UserError(
                f"'{name}' has {ours.size} values of {dim} ({ours[0]:g} to {ours[-1]:g}), the truth {theirs.size} "
                f"({theirs[0]:g} to {theirs[-1]:g}): interpolate one to the other's grid first"
            )


def on_longitudes(dataset: xr.Dataset, truth: xr.Dataset) -> xr.Dataset:
    """The dataset on the truth's turn of the circle: -180 to 180 or 0 to 360."""
    if "longitude" not in dataset.coords or "longitude" not in truth.coords:
        return dataset
    east, west = dataset["longitude"].values.astype(np.float64), float(truth["longitude"].values[0])
    turned = west + (east - west + 1e-6) % 360 - 1e-6
    if np.allclose(turned, east):
        return dataset
    order = np.argsort(turned)
    return dataset.isel(longitude=order).assign_coords(longitude=("longitude", turned[order], dataset["longitude"].attrs))


# observations


@dataclass(frozen=True)
class Slots:
    """Observations of one variable, sorted into cases: row, case and place (K,) of each comparison; ``shape`` (cases, places)."""

    row: np.ndarray
    case: np.ndarray
    place: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def assign(cls, times: np.ndarray, cases: Cases) -> "Slots":
        """Each observation goes to the case nearest in valid time, once per initial time; those outside the period to none."""
        times = np.asarray(times).astype("datetime64[ns]").astype(np.int64)
        rows, found = [], []
        for start in pd.unique(cases.time) if cases.forecasts else [None]:
            index = np.flatnonzero(cases.time == start) if start is not None else np.arange(len(cases))
            valid = cases.valid[index].astype(np.int64)
            inside = np.flatnonzero((times >= valid[0]) & (times <= valid[-1]))
            upper = np.clip(np.searchsorted(valid, times[inside]), 0, valid.size - 1)
            lower = np.maximum(upper - 1, 0)
            nearest = np.where(times[inside] - valid[lower] < valid[upper] - times[inside], lower, upper)
            rows.append(inside)
            found.append(index[nearest])
        row, case = np.concatenate(rows), np.concatenate(found)
        order = np.lexsort((row, case))
        row, case = row[order], case[order]
        place = np.arange(row.size) - np.searchsorted(case, case)
        return cls(row, case, place, (len(cases), int(place.max()) + 1 if place.size else 0))

    def pack(self, values: np.ndarray, dims: tuple[str, ...] = ()) -> xr.DataArray:
        """Values (K, *dims) to (case, *dims, place), NaN in empty places."""
        out = np.full((*self.shape, *values.shape[1:]), np.nan)
        out[self.case, self.place] = values
        return xr.DataArray(out, dims=("case", "place", *dims)).transpose("case", *dims, "place")


def ensemble_dims(array: xr.DataArray) -> tuple[str, ...]:
    """``number`` or ``moment``, whichever it has."""
    return tuple(d for d in (NUMBER, "moment") if d in array.dims)
