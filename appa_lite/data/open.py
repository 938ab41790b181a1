"""Other people's gridded data, and our own: names, axes, calendars and missing values recognised, or refused with a reason."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable
from appa_lite.core.store import open_dataset

NAMES = {
    "time": ("time", "t", "valid_time", "Time", "XTIME"),
    "latitude": ("latitude", "lat", "nav_lat", "LAT", "Latitude"),
    "longitude": ("longitude", "lon", "nav_lon", "LON", "Longitude"),
    "y": ("y", "Y", "projection_y_coordinate"),
    "x": ("x", "X", "projection_x_coordinate"),
    "trajectory": ("trajectory",),
    "number": ("number", "member", "realization", "ensemble", "ens"),
}
DEGREES = {"latitude": ("degrees_north", "degree_north", "degrees_N"), "longitude": ("degrees_east", "degree_east", "degrees_E")}
OPTIONS = {"step", "start", "end", "level", "fill", "periodic"}
LEADING = ("trajectory", "number")


def open_fields(
    source: str | os.PathLike | xr.Dataset, variables: Sequence[str] | None = None, options: Mapping[str, Any] | None = None
) -> tuple[xr.Dataset, FieldSpec]:
    """A dataset in our names and order ``(trajectory, time, number, <grid>)``, ascending axes, and what it holds.

    Args:
        source: ``.zarr`` or ``.nc``, or a dataset.
        variables: the prognostic variables, in order; default: those of a dataset of ours, or every gridded one.
        options: ``start, end`` (dates, inclusive); ``level`` (the value of the vertical coordinate to keep); ``fill``
            (``interpolate``: cells missing at some times are filled linearly in time); ``periodic`` ([rows, columns], for
            planes and rings); ``step`` (seconds between frames, for a dataset of a single time).

    Raises:
        UserError: what cannot be recognised, with the reason.
    """
    options = dict(options or {})
    if set(options) - OPTIONS:
        raise UserError(f"unknown options of a dataset {sorted(set(options) - OPTIONS)}: known: {', '.join(sorted(OPTIONS))}")
    name = "the dataset" if isinstance(source, xr.Dataset) else str(source)
    dataset = source if isinstance(source, xr.Dataset) else open_dataset(source)
    try:
        spec = _stored_spec(dataset)
        if spec is None:
            return _foreign(dataset, variables, options)
        if variables is not None:
            kept = tuple(spec.variables[spec.index(name)] for name in variables)
            spec = replace(spec, variables=kept, derived=tuple(d for d in spec.derived if set(d.inputs) <= set(variables)))
        if _same_grid(dataset, spec):
            return _own(dataset, spec, options)
        dataset, cut = _foreign(dataset, spec.names, options)
        return dataset, replace(cut, derived=spec.derived)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _stored_spec(dataset: xr.Dataset) -> FieldSpec | None:
    if "field_spec" not in dataset.attrs:
        return None
    try:
        return FieldSpec.from_dict(json.loads(dataset.attrs["field_spec"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"its attribute field_spec is damaged ({error}): remove it to read the file as any other") from error


def _same_grid(dataset: xr.Dataset, spec: FieldSpec) -> bool:
    """Whether the dataset is still on the grid it was written with, rather than a part of it that somebody cut out."""
    axes = dict(zip(spec.grid.dims, (spec.grid.y, spec.grid.x)[-len(spec.grid.dims) :], strict=True))
    return all(dim in dataset.coords and np.array_equal(dataset[dim].values, values) for dim, values in axes.items())


def _own(dataset: xr.Dataset, spec: FieldSpec, options: Mapping[str, Any]) -> tuple[xr.Dataset, FieldSpec]:
    """A dataset that says itself what it holds."""
    absent = [name for name in spec.names if name not in dataset]
    if absent:
        raise UserError(f"variables {absent} are missing: it has {', '.join(map(str, dataset.data_vars))}")
    for variable in spec.variables:
        if dataset[variable.name].attrs.get("units", "1") != variable.units:
            found = dataset[variable.name].attrs.get("units", "1")
            raise UserError(f"'{variable.name}' is in {found} but was written in {variable.units}: convert it back")
    dataset = _period(dataset, options)
    if dataset.sizes.get("time", 0) > 1 and "prediction_timedelta" not in dataset.dims:
        step = _step(dataset, options)
        spec = spec if abs(step - spec.step) <= 1e-6 * spec.step else replace(spec, step=step)
    return dataset, spec


def _foreign(dataset: xr.Dataset, variables: Sequence[str] | None, options: Mapping[str, Any]) -> tuple[xr.Dataset, FieldSpec]:
    dataset = _renamed(dataset)
    dims = _grid_dims(dataset)
    dataset = _time(_level(dataset, dims, options), options)
    dataset = dataset[_select(dataset, variables, dims)]
    dataset = _longitudes(_ascending(dataset, dims), dims)
    dataset = dataset.transpose(*(d for d in ("trajectory", "time", "number") if d in dataset.dims), *dims)
    dataset, mask = _missing(dataset, dims, options)
    names = list(dataset.data_vars)
    attrs = {n: dataset[n].attrs for n in names}
    spec = FieldSpec(
        variables=tuple(
            Variable(
                name=str(n),
                units=str(attrs[n].get("units", "1")),
                standard_name=str(attrs[n].get("standard_name", "")),
                long_name=str(attrs[n].get("long_name", "")),
                shift=tuple(float(s) for s in attrs[n].get("grid_shift", (0.0, 0.0))),
            )
            for n in names
        ),
        grid=_grid(dataset, dims, options),
        step=_step(dataset, options),
        mask=None if mask.all() else tuple(map(tuple, mask.tolist())),
    )
    return dataset, spec


# Names


def _renamed(dataset: xr.Dataset) -> xr.Dataset:
    """Dimensions under our names, recognised by name, standard name, units or axis of their coordinate."""
    wanted = {}
    for dim in dataset.dims:
        target = next((ours for ours, theirs in NAMES.items() if dim in theirs), None) or _by_attributes(dataset, str(dim))
        if target and target != dim:
            if target in wanted.values() or target in dataset.variables:
                raise UserError(f"'{dim}' and another of its dimensions or variables both look like {target}: drop or rename one")
            wanted[dim] = target
    dataset = dataset.rename(wanted)
    for name, variable in dataset.variables.items():
        if _by_attributes(dataset, str(name), own=False) in ("latitude", "longitude") and variable.ndim == 2:
            raise UserError(f"the grid is curvilinear ('{name}' has two dimensions): regrid it to latitudes and longitudes, or to y and x")
    return dataset


def _by_attributes(dataset: xr.Dataset, name: str, own: bool = True) -> str | None:
    if name not in dataset.variables:
        return None
    attrs = dataset[name].attrs
    for target, units in DEGREES.items():
        if attrs.get("standard_name") == target or attrs.get("units") in units or (not own and name in NAMES[target]):
            return target
    kinds = {"projection_y_coordinate": "y", "projection_x_coordinate": "x", "time": "time", "realization": "number"}
    kind = kinds.get(attrs.get("standard_name", ""))
    return kind or {"Y": "y", "X": "x", "T": "time", "E": "number"}.get(attrs.get("axis", ""))


def _grid_dims(dataset: xr.Dataset) -> tuple[str, ...]:
    for dims in (("latitude", "longitude"), ("y", "x"), ("x",)):
        if set(dims) <= set(dataset.dims):
            absent = [d for d in dims if d not in dataset.coords]
            if absent:
                raise UserError(f"dimension '{absent[0]}' has no coordinate values: add them, in degrees or metres")
            return dims
    found = ", ".join(map(str, dataset.dims))
    raise UserError(f"no grid is recognised among the dimensions {found}: name them latitude and longitude, y and x, or x")


def _select(dataset: xr.Dataset, variables: Sequence[str] | None, dims: tuple[str, ...]) -> list[str]:
    gridded = [str(n) for n, v in dataset.data_vars.items() if set(dims) <= set(v.dims) and v.dtype.kind in "fiu" and "time" in v.dims]
    names = gridded if variables is None else list(variables)
    absent = [n for n in names if n not in dataset.data_vars]
    if absent or not names:
        raise UserError(f"variables {absent or 'on the grid and in time'} are missing: it has {', '.join(map(str, dataset.data_vars))}")
    for name in names:
        odd = set(dataset[name].dims) - {*dims, "time", *LEADING}
        if odd or not set(dims) <= set(dataset[name].dims):
            advice = "keep one of them with the option level" if odd else f"expected {', '.join(dims)}"
            raise UserError(f"variable '{name}' has the dimensions {', '.join(map(str, dataset[name].dims))}: {advice}")
        if dataset[name].dtype.kind not in "fiu":
            raise UserError(f"variable '{name}' is of type {dataset[name].dtype}, expected numbers")
    return names


def _level(dataset: xr.Dataset, dims: tuple[str, ...], options: Mapping[str, Any]) -> xr.Dataset:
    """One level: the only one, or that of the option."""
    for dim in [d for d in dataset.dims if d not in (*dims, "time", *LEADING)]:
        if dataset.sizes[dim] == 1:
            dataset = dataset.isel({dim: 0})
        elif "level" in options and dim in dataset.coords and dataset[dim].dtype.kind in "fiu":
            if not np.any(dataset[dim].values == options["level"]):
                raise UserError(f"level={options['level']} is not among its '{dim}': {dataset[dim].values.tolist()}")
            dataset = dataset.sel({dim: options["level"]})
    return dataset


# Axes


def _ascending(dataset: xr.Dataset, dims: tuple[str, ...]) -> xr.Dataset:
    for dim in dims:
        values = dataset[dim].values
        if values.dtype.kind not in "fiu" or not np.all(np.isfinite(values)):
            raise UserError(f"coordinate '{dim}' holds values that are not numbers")
        if len(values) > 1 and np.all(np.diff(values) < 0):
            dataset = dataset.isel({dim: slice(None, None, -1)})
        elif dim != "longitude" and np.any(np.diff(values) <= 0):
            raise UserError(f"coordinate '{dim}' neither ascends nor descends")
    return dataset


def _longitudes(dataset: xr.Dataset, dims: tuple[str, ...]) -> xr.Dataset:
    """Longitudes in [-180, 180), or in [0, 360) for a region across the date line."""
    if "longitude" not in dims:
        return dataset
    given = dataset["longitude"].values.astype(np.float64)
    for start in (-180.0, 0.0):
        values = (given - start) % 360.0 + start
        order = np.argsort(values, kind="stable")
        gaps = np.diff(values[order])
        if len(gaps) and gaps.min() <= 1e-6 * max(gaps.max(), 1e-6):
            raise UserError("two columns have the same longitude: drop the one that repeats (perhaps both 0 and 360)")
        if not len(gaps) or gaps.max() < 1.5 * np.median(gaps):
            if np.any(order != np.arange(len(order))):
                dataset = dataset.isel(longitude=order)
            return dataset.assign_coords(longitude=("longitude", values[order], dataset["longitude"].attrs))
    raise UserError("the longitudes have gaps: expected columns at equal distances")


def _grid(dataset: xr.Dataset, dims: tuple[str, ...], options: Mapping[str, Any]) -> Grid:
    axes = {d: dataset[d].values.astype(np.float64) for d in dims}
    for dim, values in axes.items():
        gaps = np.diff(values)
        if len(gaps) > 1 and gaps.max() - gaps.min() > (0.1 if dim == "latitude" else 0.01) * gaps.mean():
            raise UserError(f"coordinate '{dim}' has unequal spacings, from {gaps.min():g} to {gaps.max():g}: regrid it to equal ones")
    x = axes[dims[-1]]
    periodic = tuple(bool(p) for p in options.get("periodic", (False, False)))
    if dims[-1] == "longitude":
        periodic = (False, bool(len(x) > 1 and abs(len(x) * (x[-1] - x[0]) / (len(x) - 1) - 360.0) < 0.36))
        if abs(axes["latitude"]).max() > 90.0 + 1e-6:
            raise UserError("latitudes beyond 90 degrees: are the axes of the grid named the wrong way round?")
    return Grid(dims, tuple(axes[dims[0]].tolist()) if len(dims) == 2 else (0.0,), tuple(x.tolist()), periodic)


# Time


def _time(dataset: xr.Dataset, options: Mapping[str, Any]) -> xr.Dataset:
    if "time" not in dataset.dims and "time" in dataset.coords:
        dataset = dataset.expand_dims("time")
    if "time" not in dataset.dims or "time" not in dataset.coords:
        raise UserError("it has no time coordinate: add one named 'time', with CF units such as 'hours since 2000-01-01'")
    values = dataset["time"].values
    if values.dtype == object and len(values) and hasattr(values[0], "calendar"):
        dataset = dataset.assign_coords(time=("time", _standard(values), dataset["time"].attrs))
    elif values.dtype.kind != "M":
        raise UserError(f"its times are of type {values.dtype}: give them CF units such as 'hours since 2000-01-01'")
    dataset = _period(dataset, options)
    if np.isnat(dataset["time"].values).any():
        raise UserError("some of its times are missing")
    return dataset


def _standard(values: np.ndarray) -> np.ndarray:
    """Dates of another calendar, if every one of them exists in the standard one; gaps show later as irregular steps."""
    dates = [v.isoformat() for v in values]
    try:
        return np.array(dates, dtype="datetime64[ns]")
    except ValueError as error:
        bad = next(d for d in dates if not _is_date(d))
        calendar = values[0].calendar
        raise UserError(f"its calendar is {calendar}, and {bad[:10]} is no date of the standard calendar: convert it first") from error


def _is_date(text: str) -> bool:
    try:
        np.datetime64(text)
    except ValueError:
        return False
    return True


def _period(dataset: xr.Dataset, options: Mapping[str, Any]) -> xr.Dataset:
    """The frames from ``start`` to ``end``, both included."""
    if options.get("start") is None and options.get("end") is None:
        return dataset
    times = dataset["time"].values
    first, last = (parse_date(options[key], key) if options.get(key) is not None else None for key in ("start", "end"))
    keep = np.ones(len(times), bool) if first is None else times >= first
    keep = keep if last is None else keep & (times <= last)
    if not keep.any():
        asked, found = (options.get("start"), options.get("end")), (str(times[0])[:16], str(times[-1])[:16])
        raise UserError(f"no frame from {asked[0]} to {asked[1]}: it covers {found[0]} to {found[1]}")
    return dataset.isel(time=np.flatnonzero(keep))


def parse_date(value: Any, key: str) -> np.datetime64:
    """The date of a configuration key, UTC, datetime64[ns]; the last moment of the day for an ``end`` without an hour.

    Raises:
        UserError: not a date.
    """
    try:
        date = pd.Timestamp(str(value))
    except ValueError as error:
        raise UserError(f"{key}={value} is not a date: expected such as 2017-01-25 or 2017-01-25T06:00") from error
    if date.tzinfo is not None:
        date = date.tz_convert("UTC").tz_localize(None)
    if key == "end" and len(str(value)) <= 10:
        date += pd.Timedelta(days=1) - pd.Timedelta(1, "ns")
    return date.as_unit("ns").to_datetime64()


def _step(dataset: xr.Dataset, options: Mapping[str, Any]) -> float:
    times = dataset["time"].values.astype("datetime64[ns]")
    if len(times) < 2:
        if options.get("step"):
            return float(options["step"])
        raise UserError("it has a single time: give the seconds between frames with the option step")
    gaps = np.diff(times).astype(np.int64) / 1e9
    step = float(np.median(gaps))
    wrong = np.flatnonzero(np.abs(gaps - step) > max(1e-6 * step, 1e-3))
    if step <= 0 or len(wrong):
        at = int(wrong[0]) if len(wrong) else 0
        where = f"{str(times[at])[:19]} to {str(times[at + 1])[:19]}"
        raise UserError(f"its time steps are irregular: mostly {step:g} s, {gaps[at]:g} s from {where}; select a regular part or resample")
    return step


# Missing values


def _missing(dataset: xr.Dataset, dims: tuple[str, ...], options: Mapping[str, Any]) -> tuple[xr.Dataset, np.ndarray]:
    """The mask of cells that exist (H, W): those that no variable lacks at all times."""
    mask = np.ones(tuple(dataset.sizes[d] for d in dims), bool)
    gaps = {}
    for name, array in dataset.data_vars.items():
        if array.dtype.kind != "f":
            continue
        absent = sum(np.isnan(part).astype(np.int64).sum(axis=tuple(range(part.ndim - len(dims)))) for part in _parts(array))
        total = array.size // mask.size
        mask &= absent < total
        gaps[name] = absent
    sometimes = {name: int(absent[mask].sum()) for name, absent in gaps.items() if absent[mask].any()}
    if sometimes:
        found = ", ".join(f"{name}: {count}" for name, count in sometimes.items())
        if options.get("fill") != "interpolate":
            raise UserError(f"values are missing at some times in cells that exist ({found}): choose fill=interpolate, or repair it")
        filled = dataset[list(sometimes)].load().interpolate_na("time").ffill("time").bfill("time")
        dataset = dataset.assign({name: filled[name] for name in sometimes}).assign_attrs(filled_values=json.dumps(sometimes))
    if not mask.any():
        raise UserError("no cell has values of all variables")
    return dataset, mask if len(dims) == 2 else mask[None]


def _parts(array: xr.DataArray, values: int = 2**24) -> list[np.ndarray]:
    length = max(1, values * array.sizes["time"] // max(array.size, 1))
    return (array.isel(time=slice(i, i + length)).values for i in range(0, array.sizes["time"], length))
