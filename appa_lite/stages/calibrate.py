"""``calibrate``: station corrections and representativeness errors, learned over a period whose gridded truth is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import xarray as xr
from omegaconf import DictConfig, OmegaConf

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.core.store import provenance
from appa_lite.data.open import open_fields, parse_date
from appa_lite.observations.build import build_observation
from appa_lite.observations.correction import Correction, apply_corrections, fit_corrections, station_names
from appa_lite.observations.options import TableOptions
from appa_lite.observations.table import read_table, write_table


def run(cfg: DictConfig) -> None:
    """Learn from ``cfg.observations`` and ``cfg.truth`` over ``cfg.period``; write all rows, corrected, to ``cfg.out``."""
    options = TableOptions.parse(None if cfg.network is None else OmegaConf.to_container(cfg.network))
    if not cfg.memory > 0 or any(not value > 0 for value in cfg.inflation.values()):
        raise UserError("memory and every factor of inflation must be positive")
    span = dict(zip(("start", "end"), cfg.period, strict=True)) if cfg.period else {}
    names = None if cfg.variables is None else list(cfg.variables)
    dataset, spec = open_fields(cfg.truth, names, OmegaConf.to_container(cfg.dataset) | span)
    if {"trajectory", "number"} & set(dataset.dims):
        raise UserError(f"'{cfg.truth}' holds several trajectories or members: give one gridded analysis")
    table = read_table(cfg.observations, options).assign(error_std=1.0).drop(columns="bias", errors="ignore")  # learned below
    known = set(station_names(table))
    unknown = [s for s in map(str, cfg.withhold_stations) if s not in known]
    if unknown:
        raise UserError(f"withhold_stations: {', '.join(unknown)} not in the file; it has {', '.join(sorted(known)[:30])}")
    rows = _rows(table, spec, options)
    past, residual = _residuals(rows, dataset, spec, options, cfg.period)
    corrections = fit_corrections(past, residual, list(cfg.withhold_stations), cfg.memory, list(cfg.periods))
    out = apply_corrections(rows, corrections, list(cfg.withhold_stations), dict(cfg.inflation))
    out = out[out["variable"].isin(list(corrections))].reset_index(drop=True)
    out.attrs = provenance(cfg, cfg.seed, [cfg.observations, cfg.truth])
    write_table(cfg.out, out)
    print(describe(corrections))
    first, last = out["time"].min(), out["time"].max()
    print(f"{cfg.out}: {len(out)} rows from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M}, learned from {len(past)}")


def _rows(table: pd.DataFrame, spec: FieldSpec, options: TableOptions) -> pd.DataFrame:
    """The usable rows of the whole table, in the names and units of the truth."""
    if not table["time"].notna().any():
        raise UserError("the observation file has no time")
    if options.specific_humidity is not None:
        name = options.specific_humidity.name
        options = replace(options, variables={**options.variables, name: replace(options.renaming(name), error_std=1.0)})
    ends = np.array([table["time"].min(), table["time"].max()], dtype="datetime64[ns]")
    return build_observation(table, spec, np.unique(ends), options)[0].provenance


def _residuals(
    rows: pd.DataFrame, dataset: xr.Dataset, spec: FieldSpec, options: TableOptions, period: list | None
) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows of the period and y - A(truth) of each."""
    times = dataset["time"].values.astype("datetime64[ns]")
    low, high = (parse_date(p, k) for p, k in zip(period, ("start", "end"), strict=True)) if period else (times[0], times[-1])
    inside = rows[(rows["time"] >= max(low, times[0])) & (rows["time"] <= min(high, times[-1]))]
    if inside.empty:
        raise UserError(f"no observation from {str(times[0])[:16]} to {str(times[-1])[:16]}, the period to learn from")
    already = replace(options, variables={}, columns={}, specific_humidity=None)  # names and units are the truth's by now
    observation, _ = build_observation(inside, spec, times, already, torch.float64)
    return observation.provenance, observation.residual(spec.to_tensor(dataset, torch.float64)).numpy()


def describe(corrections: dict[str, Correction]) -> str:
    """A line for each variable."""
    lines = [f"{'variable':10}{'stations':>9}{'mean bias':>12}{'per 100 m':>12}{'between':>12}{'error_std':>12}{'memory':>8}"]
    for name, c in corrections.items():
        numbers = (c.intercept + c.slope * c.elevation, 100 * c.slope, c.between, c.within)
        lines.append(f"{name:10}{len(c.stations):9d}" + "".join(f"{v:12.4g}" for v in numbers) + f"{c.memory:8.2f}")
    return "\n".join(lines)
