"""Forecasts at the positions and times of observations, which may lie off the grid and between its times."""

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification.cases import Cases, Slots, ensemble_dims
from appa_lite.verification.grid import grid_dims, interpolate

ALIASES = {"lat": "latitude", "lon": "longitude", "value": "observation"}


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """An observation table under the names this room uses; times UTC without zone, missing values left out, missing errors zero."""
    table = table.rename(columns={k: v for k, v in ALIASES.items() if k in table and v not in table})
    missing = [c for c in ("time", "variable", "observation") if c not in table]
    if missing:
        raise UserError(f"expected an observation table with columns time, variable, observation, found no {', '.join(missing)}")
    time = pd.to_datetime(table["time"], utc=True).dt.tz_localize(None).astype("datetime64[ns]")
    table = table.assign(time=time, error_std=table["error_std"].fillna(0.0) if "error_std" in table else 0.0)
    table = table[np.isfinite(table["observation"].astype(float))]
    return table.sort_values("time", kind="stable").reset_index(drop=True)


def positions(table: pd.DataFrame, dims: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The table's coordinates (M,), one entry per grid dimension."""
    missing = [d for d in dims if d not in table]
    if missing:
        raise UserError(f"the forecast's grid has dimensions {', '.join(dims)}: the observation table has no column {', '.join(missing)}")
    return {d: table[d].to_numpy(dtype=np.float64) for d in dims}


def predict(array: xr.DataArray, table: pd.DataFrame, cases: Cases, slots: Slots, periodic: tuple[bool, ...]) -> xr.DataArray:
    """The forecast of every observation in its slot, (case, [number | moment], place): bilinear in space, linear in time.

    A column ``bias`` of the table (the station's mean difference from the gridded field) is added to the prediction.
    """
    where = positions(table, grid_dims(array))
    members = ensemble_dims(array)
    values = np.full((slots.row.size, *(array.sizes[d] for d in members)), np.nan, dtype=np.float32 if members else np.float64)
    for part, state in _timelines(array, cases):
        chosen = np.isin(slots.case, part)
        rows = slots.row[chosen]
        points = {d: v[rows] for d, v in where.items()}
        values[chosen] = interpolate(state, points, table["time"].to_numpy()[rows], periodic).values
    if "bias" in table:
        bias = np.nan_to_num(table["bias"].to_numpy(dtype=np.float64)[slots.row])
        values = _shifted(values, bias, members)
    packed = slots.pack(values, members)
    return packed.assign_coords({d: array[d] for d in members if d in array.coords})


def _shifted(values: np.ndarray, bias: np.ndarray, members: tuple[str, ...]) -> np.ndarray:
    if "moment" in members:  # the mean moves, the standard deviation stays
        return np.stack([values[:, 0] + bias, values[:, 1]], axis=1)
    return values + bias.reshape(-1, *[1] * (values.ndim - 1))


def _timelines(array: xr.DataArray, cases: Cases):
    """The case numbers and states (time, ..., grid) along valid time: of an analysis once, of forecasts per initial time."""
    if "case" in array.dims:  # a baseline: one state per case
        if not cases.forecasts:
            yield np.arange(len(cases)), array.rename(case="time").assign_coords(time=cases.valid)
            return
        for start in pd.unique(cases.time):
            index = np.flatnonzero(cases.time == start)
            yield index, array.isel(case=index).rename(case="time").assign_coords(time=cases.valid[index])
    elif not cases.forecasts:
        yield np.arange(len(cases)), array
    else:
        for start in pd.unique(cases.time):
            run = array.sel(time=start, drop=True)
            valid = start + run["prediction_timedelta"].values
            yield np.flatnonzero(cases.time == start), run.rename(prediction_timedelta="time").assign_coords(time=valid)


def truth_of(table: pd.DataFrame, cases: Cases, slots: Slots) -> xr.DataArray:
    """The observations in their slots (case, place), with the coordinate ``error_std``."""
    truth = slots.pack(table["observation"].to_numpy(dtype=np.float64)[slots.row])
    error = slots.pack(table["error_std"].to_numpy(dtype=np.float64)[slots.row])
    return truth.assign_coords(error_std=error, **cases.coords())
