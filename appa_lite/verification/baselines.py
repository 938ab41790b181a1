"""Forecasts that cost nothing, as datasets in the layout of the forecast they stand beside: scored by the same code."""

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification.cases import Cases
from appa_lite.verification.grid import MOMENT, NUMBER, grid_dims

SEASONS = {"hour": "hour", "dayofyear": "dayofyear", "month": "month"}


def climatology_forecast(climatology: xr.Dataset, variable: str, cases: Cases) -> xr.DataArray | None:
    """The climatological mean, and Gaussian where ``<variable>_std`` is given, of every case: (case, [moment], grid).

    Dimensions ``hour``, ``dayofyear`` and ``month`` are looked up by the valid time. None when it lacks the variable.
    """
    if variable not in climatology:
        return None
    valid = xr.DataArray(pd.DatetimeIndex(cases.valid), dims="case")
    lookup = {dim: getattr(valid.dt, part) for dim, part in SEASONS.items() if dim in climatology.dims}
    parts = [climatology[n].sel(lookup) if lookup else climatology[n] for n in (variable, f"{variable}_std") if n in climatology]
    parts = [p if "case" in p.dims else p.expand_dims(case=len(cases)) for p in parts]
    extra = set(parts[0].dims) - {"case", *grid_dims(parts[0])}
    if extra:
        raise UserError(f"the climatology of '{variable}' has dimensions {sorted(extra)}: expected the grid and hour, dayofyear or month")
    if len(parts) == 1:
        return parts[0].transpose("case", ...)
    joined = xr.concat(parts, pd.Index(["mean", "std"], name=MOMENT), coords="minimal", compat="override")
    return joined.transpose("case", MOMENT, ...).assign_attrs(climatology[variable].attrs)


def persistence_forecast(initial: xr.DataArray, cases: Cases) -> xr.DataArray | None:
    """The state at the initial time, kept: (case, grid). None for analyses, and where no initial state is known."""
    if not cases.forecasts:
        return None
    known = pd.DatetimeIndex(initial["time"].values).get_indexer(pd.DatetimeIndex(cases.time))
    if (known < 0).all():
        return None
    states = initial.isel(time=xr.DataArray(np.maximum(known, 0), dims="case"))
    return states.where(xr.DataArray(known >= 0, dims="case")).drop_vars("time").transpose("case", ...)


def initial_states(forecast: xr.DataArray, truth: xr.DataArray | None) -> xr.DataArray | None:
    """What persistence persists: the truth at the initial time, else the forecast's own mean at lead zero; (time, grid)."""
    if truth is not None and "prediction_timedelta" not in truth.dims:
        return truth
    forecast = forecast if truth is None else truth
    if "prediction_timedelta" not in forecast.dims or np.timedelta64(0, "ns") not in forecast["prediction_timedelta"].values:
        return None
    start = forecast.sel(prediction_timedelta=np.timedelta64(0, "ns"), drop=True)
    return start.mean(NUMBER) if NUMBER in start.dims else start
