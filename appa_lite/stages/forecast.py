"""``forecast``: an analysis or reanalysis ensemble in, forecast ensemble out."""

import json

import numpy as np
import torch
import xarray as xr
from omegaconf import DictConfig, ListConfig

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_seconds
from appa_lite.core.store import check_target, provenance, write_dataset
from appa_lite.data.open import parse_date
from appa_lite.forecasters.base import Forecaster
from appa_lite.stages.prior import Bar, competitor, duration, matching_fields


def run(cfg: DictConfig) -> None:
    """Write the forecast ensemble (time, prediction_timedelta, number, grid) from ``cfg.initial`` to ``cfg.out``."""
    check_target(cfg.out)
    dataset = predict(cfg, cfg.initial, [cfg.initial])
    write_dataset(dataset, cfg.out, dataset.attrs)
    sizes = dataset.sizes
    print(f"{cfg.out}: {sizes['time']} initial times, {sizes['prediction_timedelta'] - 1} frames, {sizes['number']} members")


def predict(cfg: DictConfig, initial: str | xr.Dataset, inputs: list[str]) -> xr.Dataset:
    """The forecast ensemble from an initial file or dataset; ``inputs`` are the files behind it."""
    if cfg.members is not None and cfg.members < 1:
        raise UserError(f"members={cfg.members} must be at least 1")
    forecaster, setting = competitor(cfg, Forecaster)
    spec = setting.spec
    frames = round(duration(cfg.lead, "lead") / spec.step)
    if frames < 1:
        raise UserError(f"lead={cfg.lead} is shorter than a frame of this model, {spec.step / 3600:g} hours")
    dataset, fields = _initial(cfg, initial, spec)
    starts = cfg.initial_time if isinstance(cfg.initial_time, ListConfig) else [cfg.initial_time]
    members = cfg.members or fields.shape[0]
    bar, pieces, dates = Bar(), [], []
    for start in starts:
        known, times = _history(fields, dataset["time"].values, start, cfg.history, spec.step)
        out = forecaster.forecast(known, times, frames, range(members), cfg.seed, bar)
        pieces.append(torch.cat([known[[m % len(known) for m in range(members)], -1:], out], dim=1))
        dates.append(times[-1])
    bar.close()
    leads = (np.arange(frames + 1) * spec.step * 1e9).astype("timedelta64[ns]")
    coords = {"time": np.array(dates), "prediction_timedelta": leads, "number": np.arange(members)}
    result = spec.to_dataset(torch.stack(pieces).transpose(1, 2), coords)
    result.attrs = provenance(cfg, cfg.seed, inputs) | forecaster.report.summary() | {"field_spec": json.dumps(spec.to_dict())}
    return result


def _initial(cfg: DictConfig, initial: str | xr.Dataset, spec: FieldSpec) -> tuple[xr.Dataset, torch.Tensor]:
    """The dataset and its fields (members, T, C, H, W)."""
    dataset = matching_fields(initial, spec, {"step": spec.step})
    if "prediction_timedelta" in dataset.dims:
        raise UserError(f"'{cfg.initial}' is a forecast: expected an analysis or reanalysis (time, [number], grid)")
    if "trajectory" in dataset.dims:
        if cfg.trajectory is None and dataset.sizes["trajectory"] > 1:
            raise UserError(f"'{cfg.initial}' holds {dataset.sizes['trajectory']} trajectories: choose one with trajectory=0")
        if not 0 <= (cfg.trajectory or 0) < dataset.sizes["trajectory"]:
            raise UserError(f"trajectory={cfg.trajectory}: '{cfg.initial}' has {dataset.sizes['trajectory']}, numbered from 0")
        dataset = dataset.isel(trajectory=cfg.trajectory or 0)
    fields = spec.to_tensor(dataset)
    fields = fields[None] if fields.ndim == 4 else fields
    if not bool(torch.isfinite(fields).all()):
        raise UserError(f"'{cfg.initial}' has missing values (NaN) where the model's grid has cells: fill them first")
    return dataset, fields


def _history(fields: torch.Tensor, times: np.ndarray, start: object, history: int, step: float) -> tuple[torch.Tensor, np.ndarray]:
    """The frames up to the initial time, at most ``history`` of them and ``step`` seconds apart."""
    seconds = to_seconds(times)
    at = len(times) - 1 if start is None else int(np.abs(seconds - to_seconds(np.array([parse_date(start, "initial_time")]))[0]).argmin())
    if start is not None and abs(seconds[at] - to_seconds(np.array([parse_date(start, "initial_time")]))[0]) > 1:
        raise UserError(f"initial_time={start} is not a time of the initial file: {times[0]} to {times[-1]}")
    first = max(0, at + 1 - history)
    if at > first and not np.allclose(np.diff(seconds[first : at + 1]), step):
        raise UserError(f"the frames before the initial time are not {step:g} s apart, as this model's are")
    return fields[:, first : at + 1], times[first : at + 1]
