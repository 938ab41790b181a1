"""What verification needs to know of a dataset's grid: its names, weights and spacing, and how to read it at a point."""

import json

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.core.errors import UserError

GRIDS = (("latitude", "longitude"), ("y", "x"), ("x",))
NUMBER, MOMENT = "number", "moment"
NAMES = {
    "latitude": ("lat", "nav_lat"),
    "longitude": ("lon", "nav_lon"),
    NUMBER: ("member", "ensemble", "realization", "ensemble_member"),
    "prediction_timedelta": ("lead_time", "step", "lead", "forecast_period"),
    "time": ("init_time", "initial_time", "forecast_reference_time", "reference_time"),
    "level": ("isobaricInhPa", "pressure_level", "plev"),
}
REACH = 1.5  # cells
EARTH_RADIUS = 6371.0  # km
LENGTHS = {"m": 1e-3, "metre": 1e-3, "meters": 1e-3, "km": 1.0}  # to km


def grid_dims(array: xr.DataArray | xr.Dataset) -> tuple[str, ...]:
    """The grid dimensions, rows first: ``latitude, longitude``, ``y, x`` or ``x``."""
    for dims in GRIDS:
        if all(d in array.dims for d in dims):
            return dims
    raise UserError(f"expected a grid with dimensions latitude, longitude or y, x or x, found {list(array.dims)}")


def standardise(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset under this package's names: known synonyms renamed, axes ascending, levels as variables ``name_level``."""
    renames = {other: name for name, others in NAMES.items() for other in others if other in dataset.dims and name not in dataset.dims}
    dataset = dataset.rename(renames)
    for dim in grid_dims(dataset):
        if dim in dataset.coords and dataset[dim].size > 1 and float(dataset[dim][0]) > float(dataset[dim][-1]):
            dataset = dataset.isel({dim: slice(None, None, -1)})
    if "prediction_timedelta" in dataset.coords and dataset["prediction_timedelta"].dtype.kind != "m":
        lead = dataset["prediction_timedelta"]
        unit = {"hours": "h", "hour": "h", "h": "h", "days": "D", "day": "D", "seconds": "s"}.get(lead.attrs.get("units", "hours"), "h")
        dataset = dataset.assign_coords(prediction_timedelta=pd.to_timedelta(lead.values, unit=unit).to_numpy())
    if "level" in dataset.dims:
        flat = {}
        for name, array in dataset.data_vars.items():
            levels = array.level.values if "level" in array.dims else [None]
            flat.update({name if v is None else f"{name}_{v:g}": array if v is None else array.sel(level=v, drop=True) for v in levels})
        dataset = xr.Dataset(flat, attrs=dataset.attrs)
    for dim in ("time", NUMBER):
        if dim in dataset.coords and dim not in dataset.dims:
            dataset = dataset.expand_dims(dim)
    if "time" in dataset.coords and dataset["time"].dtype.kind != "M":
        try:
            dataset = dataset.assign_coords(time=dataset.indexes["time"].to_datetimeindex(time_unit="ns"))
        except (AttributeError, ValueError) as error:
            raise UserError("times could not be read as standard dates: give 'time' CF units and a standard calendar") from error
    return dataset


def area_weights(array: xr.DataArray | xr.Dataset) -> xr.DataArray:
    """w = cos(latitude) / mean(cos(latitude)); one on a plane, a ring, or a list of observations."""
    if "latitude" not in array.dims:
        return xr.DataArray(1.0)
    weights = np.cos(np.deg2rad(array["latitude"].astype(np.float64)))
    return (weights / weights.mean()).reset_coords(drop=True)


def spacing(array: xr.DataArray) -> tuple[tuple[float, ...], str]:
    """Distance between neighbours along every grid dimension, rows first, and its unit (``km`` where it is known)."""
    dims = grid_dims(array)
    steps = [float(np.ptp(array[d].values)) / max(array.sizes[d] - 1, 1) if d in array.coords else 1.0 for d in dims]
    if dims[0] == "latitude":
        degree = np.pi / 180 * EARTH_RADIUS
        middle = np.deg2rad(float(array["latitude"].mean()))
        return (steps[0] * degree, steps[1] * degree * np.cos(middle)), "km"
    unit = array[dims[-1]].attrs.get("units", "m" if len(dims) == 2 and steps[-1] > 10 else "") if dims[-1] in array.coords else ""
    if unit in LENGTHS and len(dims) == 2:
        return tuple(s * LENGTHS[unit] for s in steps), "km"
    return tuple(steps), "" if unit in LENGTHS or unit == "1" else unit


def periodicity(dataset: xr.Dataset) -> tuple[bool, ...]:
    """Whether each grid dimension wraps around: from the stored field specification, else rings and full longitude circles do."""
    dims = grid_dims(dataset)
    for key in ("spec", "field_spec", "appa_lite_spec"):
        if key in dataset.attrs:
            spec = dataset.attrs[key]
            grid = (json.loads(spec) if isinstance(spec, str) else spec).get("grid", {})
            if "periodic" in grid:
                return tuple(bool(p) for p in grid["periodic"])[-len(dims) :]
    if len(dims) == 1:
        return (True,)
    x = np.asarray(dataset[dims[1]].values, dtype=np.float64)
    whole = dims[1] == "longitude" and x.size > 1 and abs((x[-1] - x[0]) * x.size / (x.size - 1) - 360) < 1e-3
    return False, bool(whole)


def corners(grid: xr.Dataset | xr.DataArray, positions: dict[str, np.ndarray], shift: tuple[float, ...], periodic: tuple[bool, ...]):
    """Bilinear interpolation's corners: flat cell indices (M, K), weights (M, K), K = 4 on a plane and 2 on a ring, and cells (M, D).

    A value of cell i stands at ``x_i + shift * dx``. Positions up to half a cell beyond the outermost cells take the edge's
    value; further out all weights are NaN.
    """
    dims = grid_dims(grid)
    count = len(positions[dims[0]])
    indices, weights, cells = np.zeros((count, 1), dtype=np.int64), np.ones((count, 1)), []
    for dim, offset, wraps in zip(dims, shift, periodic, strict=True):
        axis = np.asarray(grid[dim].values, dtype=np.float64)
        size, step = axis.size, (axis[-1] - axis[0]) / max(axis.size - 1, 1) or 1.0
        position = np.asarray(positions[dim], dtype=np.float64)
        if dim == "longitude":
            position = axis[0] - step / 2 + (position - axis[0] + step / 2) % 360
        exact = np.allclose(np.diff(axis), step, rtol=1e-3)
        cell = (position - axis[0]) / step if exact else np.interp(position, axis, np.arange(size), left=-1, right=size)
        outside = ((cell < -0.5 - 1e-9) | (cell > size - 0.5 + 1e-9)) & (not wraps)
        cell = cell - offset
        cells.append(cell)
        low = np.floor(cell if wraps else np.clip(cell, 0, max(size - 2, 0))).astype(np.int64)
        fraction = cell - low if wraps else np.clip(cell - low, 0.0, 1.0)
        pair = np.stack([low, low + 1], axis=-1)
        pair = pair % size if wraps else np.minimum(pair, size - 1)
        share = np.where(outside[:, None], np.nan, np.stack([1 - fraction, fraction], axis=-1))
        indices = (indices[:, :, None] * size + pair[:, None, :]).reshape(count, -1)
        weights = (weights[:, :, None] * share[:, None, :]).reshape(count, -1)
    return indices, weights, np.stack(cells, axis=-1)


def to_nearest(exists: np.ndarray, indices: np.ndarray, weights: np.ndarray, cells: np.ndarray) -> None:
    """Where no corner exists, the nearest cell that does takes all the weight, if it is within ``REACH`` cells; in place."""
    bare = np.flatnonzero(np.isfinite(weights).all(1) & ~exists.ravel()[indices].any(1))
    places = np.argwhere(exists)
    for row in bare if places.size else ():
        distance = np.linalg.norm(places - cells[row], axis=-1)
        if distance.min() <= REACH:
            indices[row] = np.ravel_multi_index(places[distance.argmin()], exists.shape)


def interpolate(array: xr.DataArray, positions: dict[str, np.ndarray], times: np.ndarray, periodic: tuple[bool, ...]) -> xr.DataArray:
    """An array (time, ..., grid) at M points: bilinear in space, linear in time; dims (row, ...).

    The attribute ``grid_shift = [dy, dx]`` (cells) places staggered values. Missing corners are left out and the others'
    weights renormalised; a point without any takes the nearest cell within 1.5 cells. Beyond, outside the grid or outside
    the period it is NaN.

    Args:
        positions: coordinates (M,) of the points, one entry per grid dimension.
        times: datetime64 (M,).
    """
    dims = grid_dims(array)
    others = [d for d in array.dims if d not in ("time", *dims)]
    array = array.transpose("time", *others, *dims)
    shift = tuple(np.atleast_1d(array.attrs.get("grid_shift", (0.0, 0.0))).astype(float))[-len(dims) :]
    indices, weights, cells = corners(array, positions, shift, periodic)
    to_nearest(np.isfinite(array.isel(dict.fromkeys(("time", *others), 0)).values), indices, weights, cells)
    axis = array["time"].values.astype("datetime64[ns]").astype(np.int64)
    moment = np.asarray(times).astype("datetime64[ns]").astype(np.int64)
    after = np.clip(np.searchsorted(axis, moment, side="left"), 0, axis.size - 1)
    before = np.where(axis[after] == moment, after, np.maximum(after - 1, 0))
    inside = (moment >= axis[0]) & (moment <= axis[-1])
    fraction = (moment - axis[before]) / np.maximum(axis[after] - axis[before], 1)
    values = np.where(inside, 0.0, np.nan).reshape(-1, *[1] * len(others)) + np.zeros([array.sizes[d] for d in others])
    for frame in np.unique(np.concatenate([before[inside], after[inside]])):  # one frame in memory at a time
        state = np.asarray(array.isel(time=int(frame)).values, dtype=np.float64).reshape(*values.shape[1:], -1)
        for side, share in ((before, 1 - fraction), (after, fraction)):
            rows = np.flatnonzero(inside & (side == frame) & (share > 0))
            found = np.moveaxis(state[..., indices[rows]], -2, 0)  # (rows, ..., K)
            w = np.expand_dims(weights[rows], tuple(range(1, found.ndim - 1))) * np.isfinite(found)
            with np.errstate(invalid="ignore"):
                point = (w * np.nan_to_num(found)).sum(-1) / w.sum(-1)
            values[rows] += np.expand_dims(share[rows], tuple(range(1, point.ndim))) * point
    coords = {d: array[d] for d in others if d in array.coords}
    return xr.DataArray(values, dims=("row", *others), coords=coords)
