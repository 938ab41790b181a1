"""A table of observations to an Observation of the fields, and nothing dropped in silence."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FUNCTION, FieldSpec, Variable
from appa_lite.observations import cells
from appa_lite.observations.area_mean import AreaMeanOperator
from appa_lite.observations.base import Observation, ObservationOperator, Stacked
from appa_lite.observations.correlation import correlate
from appa_lite.observations.humidity import add_specific_humidity
from appa_lite.observations.options import TableOptions, flag
from appa_lite.observations.points import PointOperator
from appa_lite.observations.table import canonical, sort
from appa_lite.observations.units import conversion

log = logging.getLogger(__name__)


def build_observation(
    table: pd.DataFrame, spec: FieldSpec, times: np.ndarray, options: TableOptions | Mapping | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Observation, dict[str, int]]:  # fmt: skip
    """The observation of the fields at ``times`` that a table holds, and what became of its rows.

        y = A(x) + bias - lapse_rate (elev - grid elevation) + e,   e ~ N(0, error_std^2), or as the options say

    Rows with a ``half_width`` or ``radius`` are means over that footprint, others are values at points. The order of
    the rows of the table does not matter.

    Args:
        table: as `read_table` returns it.
        times: (T,) datetime64 of the frames.
        options: see `TableOptions`.
        dtype: of the values, variances and weights.

    Returns:
        The observation, with the rows used as its provenance, and counts: ``used`` and each reason for a bad row
        (``unknown variable, outside the levels, missing value, flagged, non-positive or missing error,
        missing position or time, outside the period, outside the domain, over a missing cell``).

    Raises:
        UserError: wrong units, a missing coordinate, a wrong option, or no good row.
    """
    options = TableOptions.parse(options)
    table = canonical(table, options)
    if options.specific_humidity is not None:
        table = add_specific_humidity(table, options.specific_humidity, options.good_qc)
    table = sort(table)
    table, reason = _to_spec(table, spec, options)
    _judge(table, reason, spec, options)
    good = np.flatnonzero(reason == "")
    operator, rows, status = place(table.iloc[good], spec, times, options)
    for code, text in cells.REASONS.items():
        reason[good[status == code]] = text
    counts = {"used": len(rows), **{k: int(n) for k, n in pd.Series(reason[reason != ""]).value_counts().items()}}
    if not len(rows):
        said = ", ".join(f"{n} {k}" for k, n in counts.items() if k != "used") or "the table is empty"
        raise UserError(f"none of the {len(table)} observations can be used: {said}")
    if len(counts) > 1:
        log.warning("observations: %s", ", ".join(f"{n} {k}" for k, n in counts.items()))
    kept = table.iloc[good[rows]].reset_index(drop=True)
    values, error_std = (torch.from_numpy(kept[c].to_numpy(np.float64, copy=True)) for c in ("observation", "error_std"))
    correlation = correlate(kept, spec, options.error_correlation)
    return Observation(values, error_std.square(), operator, kept, correlation, options.student_t).to("cpu", dtype), counts


def place(
    table: pd.DataFrame, spec: FieldSpec, times: np.ndarray, options: TableOptions
) -> tuple[ObservationOperator, np.ndarray, np.ndarray]:
    """The operator of the rows that can be observed, which rows of the table its own are, and the status of them all."""
    areas = np.zeros(len(table), dtype=bool)
    for name in ("half_width", "radius"):
        if name in table:
            areas |= table[name].notna().to_numpy()
    status, parts, rows = np.zeros(len(table), dtype=np.int64), [], []
    for chosen, footprint in ((np.flatnonzero(~areas), False), (np.flatnonzero(areas), True)):
        if not len(chosen) and (footprint or areas.any()):
            continue
        part = table.iloc[chosen]
        if footprint:
            operator, status[chosen] = AreaMeanOperator.locate(spec, times, part, time_interpolation=options.time_interpolation)
        else:
            operator, status[chosen] = PointOperator.locate(
                spec, times, part, time_interpolation=options.time_interpolation, reach=options.reach
            )
        kept = chosen[status[chosen] == cells.USED]
        parts.append(operator.shifted(torch.from_numpy(_offset(table.iloc[kept], spec, options))))
        rows.append(kept)
    return parts[0] if len(parts) == 1 else Stacked(tuple(parts)), np.concatenate(rows), status


def _to_spec(table: pd.DataFrame, spec: FieldSpec, options: TableOptions) -> tuple[pd.DataFrame, np.ndarray]:
    """Names, units and default errors of the spec; and why a row is bad so far ('' where it is not)."""
    table, reason = table.copy(), np.full(len(table), "", dtype=object)
    known = {entry.name: entry.units for entry in (*spec.variables, *spec.derived)}
    functions = {options.renaming(name).name for name in table["variable"].dropna().unique()}
    known |= {name: spec.quantity(name).units for name in functions if FUNCTION.fullmatch(str(name))}
    table["variable"] = table["variable"].astype(object)
    for name, rows in table.groupby("variable").indices.items():
        entry = options.renaming(name)
        if entry.name not in known:
            if name in options.variables:
                spec.quantity(entry.name)  # a name given on purpose: refused, not counted
            reason[rows] = "unknown variable"
            continue
        if "level" in table and entry.level is not None:
            level = table["level"].to_numpy()[rows]
            reason[rows[~((level >= entry.level[0]) & (level <= entry.level[1]))]] = "outside the levels"
        column = {c: table.columns.get_loc(c) for c in ("variable", "observation", "error_std")}
        for part, scale, offset in _conversions(table, rows, name, entry, known[entry.name]):
            table.iloc[part, column["observation"]] = table["observation"].to_numpy()[part] * scale + offset
            table.iloc[part, column["error_std"]] = table["error_std"].to_numpy()[part] * abs(scale)
        if entry.error_std is not None:
            error_std = table["error_std"].to_numpy()[rows]
            table.iloc[rows, column["error_std"]] = np.where(np.isnan(error_std), entry.error_std, error_std)
        table.iloc[rows, column["variable"]] = entry.name
        if "units" in table:
            table.iloc[rows, table.columns.get_loc("units")] = known[entry.name]
    return table, reason


def _conversions(table: pd.DataFrame, rows: np.ndarray, name: str, entry: object, expected: str) -> list[tuple[np.ndarray, float, float]]:
    """(rows, scale, offset) to the units of the spec, for each unit that the rows come in."""
    if entry.scale is not None or entry.offset is not None:
        return [(rows, 1.0 if entry.scale is None else float(entry.scale), float(entry.offset or 0.0))]
    found = []
    for units, part in table.iloc[rows].groupby("units").indices.items() if "units" in table else ():
        change = conversion(units, expected) if units else (1.0, 0.0)
        if change is None:
            raise UserError(f"wrong units: '{name}' is in '{units}', expected '{expected}' for '{entry.name}'; give its scale and offset")
        if change != (1.0, 0.0):
            found.append((rows[part], *change))
    return found


def _judge(table: pd.DataFrame, reason: np.ndarray, spec: FieldSpec, options: TableOptions) -> None:
    """Writes the reason of each bad row that has none yet."""
    y, x = cells.table_positions(spec.grid, table)
    error_std = table["error_std"].to_numpy()
    qc = table["qc"].map(flag) if "qc" in table else pd.Series("", index=table.index)
    tests = {
        "missing value": ~np.isfinite(table["observation"].to_numpy()),
        "flagged": ~qc.isin(["", *options.good_qc]).to_numpy(),
        "non-positive or missing error": ~(np.isfinite(error_std) & (error_std > 0)),
        "missing position or time": ~(np.isfinite(y) & np.isfinite(x) & table["time"].notna().to_numpy()),
    }
    for text, bad in tests.items():
        reason[bad & (reason == "")] = text


def _offset(table: pd.DataFrame, spec: FieldSpec, options: TableOptions) -> np.ndarray:
    """What is added to A(x): biases, and the lapse rate times how far a station lies above the model's ground."""
    offset = table["bias"].fillna(0.0).to_numpy(np.float64, copy=True) if "bias" in table else np.zeros(len(table))
    rule = options.elevation
    if rule is None:
        return offset
    spec.quantity(rule.variable)
    if "elev" not in table:
        raise UserError("elevation: the observations have no column 'elev' to correct for: set elevation=null")
    concerned = (table["variable"] == rule.variable).to_numpy() & table["elev"].notna().to_numpy()
    part = table[concerned]
    if rule.grid_elevation is not None and len(part):
        above = part["elev"].to_numpy() - _grid_elevation(rule.grid_elevation, spec, part, options.reach)
    else:
        above = part["elev"].to_numpy()
    offset[concerned] -= rule.lapse_rate * above
    return offset


def _grid_elevation(path: str, spec: FieldSpec, table: pd.DataFrame, reach: float) -> np.ndarray:
    """Elevation (m) of the model's ground at the rows of a table; 0 where it is missing."""
    engine = "zarr" if Path(path).suffix == ".zarr" else "netcdf4"
    if not Path(path).exists():
        raise UserError(f"elevation: no such file {path}")
    with xr.open_dataset(path, engine=engine) as dataset:
        names = [n for n, v in dataset.data_vars.items() if set(spec.grid.dims) <= set(v.dims) and v.size == np.prod(spec.grid.shape)]
        if len(names) != 1:
            raise UserError(f"elevation: {path} must hold one variable on ({', '.join(spec.grid.dims)}), found {names}")
        ground = FieldSpec((Variable(names[0], "m"),), spec.grid, spec.step, spec.mask)
        heights = ground.to_tensor(dataset[names].squeeze(drop=True), torch.float64)[-1:]
    now = np.array(["1970-01-01"], dtype="datetime64[ns]")
    operator, _ = PointOperator.locate(ground, now, table.assign(time=now[0], variable=names[0]), reach=reach)
    return operator(heights.nan_to_num()).numpy()
