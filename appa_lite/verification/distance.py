"""Scores by the distance to what was observed: an analysis can be calibrated where it was told, and not where it was not."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from scipy.spatial import cKDTree

from appa_lite.core.errors import UserError
from appa_lite.verification.grid import grid_dims, periodicity
from appa_lite.verification.stations import positions, tidy
from appa_lite.verification.views import View

NEAR = 2.0  #: cells from the nearest observation of the same frame that still count as near


class Distance(View):
    """The field itself in some of its cells: those ``observed``, those ``near`` an observation, or those ``beyond``.

    Args:
        name: of the class of cells; keep: bool (time, grid), the cells at every time of the truth.
    """

    def __init__(self, name: str, keep: xr.DataArray):
        self.name, self.keep = name, keep

    def apply(self, field: xr.DataArray, dims: tuple[str, ...], periodic: tuple[bool, ...]) -> xr.DataArray:
        return field

    def pair(self, forecast: xr.DataArray, truth: xr.DataArray, periodic: tuple[bool, ...]) -> tuple[xr.DataArray, xr.DataArray]:
        lead = truth["prediction_timedelta"].values if "prediction_timedelta" in truth.coords else np.timedelta64("NaT", "ns")
        valid = truth["time"].values + np.where(np.isnat(lead), np.timedelta64(0, "ns"), lead)
        rows = pd.DatetimeIndex(self.keep["time"].values).get_indexer(pd.DatetimeIndex(valid))
        keep = self.keep.isel(time=rows).transpose("time", *grid_dims(truth)).values
        return forecast, truth.where(xr.DataArray(keep, dims=("case", *grid_dims(truth))))


def distances(observed: pd.DataFrame, truth: xr.Dataset) -> Mapping[str, Sequence[Distance]]:
    """The three classes of cells for every variable of an observation table, by their distance at the frame nearest in time.

    ``observed``: the cell of an observation; ``near``: within 2 cells of one; ``beyond``: the others.

    Raises:
        UserError: no observation at any time of the truth.
    """
    table, dims = tidy(observed), grid_dims(truth)
    times = truth["time"].values.astype("datetime64[ns]")
    step = np.diff(times).min() if len(times) > 1 else np.timedelta64(1, "h")
    frame = pd.DatetimeIndex(times).get_indexer(pd.DatetimeIndex(table["time"]), method="nearest", tolerance=step / 2)
    if not (frame >= 0).any():
        raise UserError(f"observed=...: no observation falls on a time of the truth ({str(times[0])[:16]} to {str(times[-1])[:16]})")
    table, frame = table[frame >= 0].reset_index(drop=True), frame[frame >= 0]
    axes = [np.asarray(truth[d].values, dtype=np.float64) for d in dims]
    steps = [(axis[-1] - axis[0]) / max(axis.size - 1, 1) or 1.0 for axis in axes]
    places = np.stack([(x - axis[0]) / step for x, axis, step in zip(positions(table, dims).values(), axes, steps, strict=True)], axis=-1)
    sizes = np.array([axis.size for axis in axes])
    periodic = np.array(periodicity(truth))
    places = np.where(periodic, np.mod(np.mod(places, sizes), sizes), places)  # twice: -1e-17 mod n is n
    cells = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), axis=-1).reshape(-1, len(dims))
    found = {}
    for variable in table["variable"].unique():
        away = np.full((len(times), len(cells)), np.inf)
        at = np.zeros(away.shape, dtype=bool)
        for t in np.unique(frame):
            here = places[((table["variable"] == variable) & (frame == t)).to_numpy()]
            if len(here):
                away[t] = cKDTree(here, boxsize=np.where(periodic, sizes, 0)).query(cells)[0]  # 0: bounded
                nearest = np.where(periodic, np.mod(np.rint(here), sizes), np.clip(np.rint(here), 0, sizes - 1)).astype(int)
                at[t, np.ravel_multi_index(tuple(nearest.T), sizes)] = True
        classes = {"observed": at, "near": ~at & (away <= NEAR), "beyond": ~at & (away > NEAR)}
        arrays = {k: xr.DataArray(v.reshape(len(times), *sizes), {"time": times}, ("time", *dims)) for k, v in classes.items()}
        found[variable] = [Distance(name, keep) for name, keep in arrays.items()]
    return found
