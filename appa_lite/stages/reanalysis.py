"""``reanalysis``: observation file in, posterior ensemble out."""

import json
import logging

import numpy as np
import pandas as pd
import xarray as xr
from omegaconf import DictConfig, OmegaConf

from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_datetime, to_seconds
from appa_lite.core.store import check_target, provenance, write_dataset
from appa_lite.data.open import parse_date
from appa_lite.forecasters.base import Assimilator
from appa_lite.observations import build_observation, read_table
from appa_lite.observations.options import TableOptions
from appa_lite.stages.prior import Bar, competitor

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Write the posterior ensemble (time, number, grid) of ``cfg.observations`` to ``cfg.out``."""
    check_target(cfg.out)
    dataset, facts = analyse(cfg, read_table(cfg.observations, table_options(cfg)), [cfg.observations])
    write_dataset(dataset, cfg.out, dataset.attrs)
    counts = ", ".join(f"{n} {reason}" for reason, n in json.loads(dataset.attrs["observation_counts"]).items())
    print(f"{cfg.observations}: {counts}\n{cfg.out}: {dataset.sizes['time']} frames, {cfg.members} members; {facts}")


def table_options(cfg: DictConfig) -> TableOptions:
    """How observation files are to be read."""
    return TableOptions.parse(None if cfg.network is None else OmegaConf.to_container(cfg.network))


def analyse(cfg: DictConfig, table: pd.DataFrame, inputs: list[str]) -> tuple[xr.Dataset, str]:
    """The posterior ensemble given a table of observations, and one line about the solver; ``inputs`` are the files behind it."""
    if cfg.members < 1:
        raise UserError(f"members={cfg.members} must be at least 1")
    assimilator, checkpoint = competitor(cfg, Assimilator)
    options = table_options(cfg)
    table = _withhold(table, list(cfg.withhold_stations))
    times = frame_times(table["time"], cfg.start, cfg.end, checkpoint.spec.step, checkpoint.settings.get("phase", 0.0))
    observation, counts = build_observation(table, checkpoint.spec, times, options)
    bar = Bar()
    try:
        fields = assimilator.assimilate(observation, times, range(cfg.members), cfg.seed, bar)
    finally:
        bar.close()
    summary = assimilator.report.summary()
    limit = cfg.guidance.get("tolerance", 0.01)
    if summary["solver_residual_max"] > 10 * limit:
        log.warning(
            "the linear solver stopped at a relative residual of %.2g: raise guidance.max_iterations", summary["solver_residual_max"]
        )
    residual = (observation.residual(fields.mean(0)) ** 2 / observation.variance).mean()
    dataset = checkpoint.spec.to_dataset(fields.transpose(0, 1), {"time": times, "number": np.arange(cfg.members)})
    dataset.attrs = provenance(cfg, cfg.seed, inputs) | summary | {"observation_counts": json.dumps(counts)}
    dataset.attrs |= {"field_spec": json.dumps(checkpoint.spec.to_dict()), "chi_square_of_the_mean": float(residual)}
    facts = f"misfit of the mean {residual:.2f} observation variances; solver {summary['solver_iterations_mean']:.0f} iterations a step"
    return dataset, facts + f", residual at most {summary['solver_residual_max']:.1g}"


def _withhold(table: pd.DataFrame, stations: list) -> pd.DataFrame:
    if not stations:
        return table
    if "station" not in table:
        raise UserError("withhold_stations needs a column 'station' in the observation file")
    known = set(table["station"].astype(str))
    missing = [s for s in map(str, stations) if s not in known]
    if missing:
        raise UserError(f"withhold_stations: {', '.join(missing)} not in the file; it has {', '.join(sorted(known)[:30])}")
    return table[~table["station"].astype(str).isin(set(map(str, stations)))]


def frame_times(when: pd.Series, start: object, end: object, step: float, phase: float) -> np.ndarray:
    """The model's frames from ``start`` to ``end`` (dates, or None: those of the observations), on the training's phase."""
    if not len(when.dropna()):
        raise UserError("the observation file has no time")
    first = to_seconds(np.array([parse_date(start, "start") if start else when.min()], dtype="datetime64[ns]"))[0]
    last = to_seconds(np.array([parse_date(end, "end") if end else when.max()], dtype="datetime64[ns]"))[0]
    if last < first:
        raise UserError(f"end={end} is before start={start}")
    low, high = np.floor((first - phase) / step + 1e-9), np.ceil((last - phase) / step - 1e-9)
    return to_datetime(phase + step * np.arange(low, max(high, low + 1) + 1))
