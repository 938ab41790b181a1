"""``forecast``: an analysis or reanalysis ensemble in, forecast ensemble out."""

import json
from dataclasses import asdict

import dask.array as da
import numpy as np
import torch
import xarray as xr
from omegaconf import DictConfig, ListConfig

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_seconds
from appa_lite.core.store import check_target, provenance, write_dataset
from appa_lite.data.open import open_fields, parse_date
from appa_lite.forecasters.base import Forecaster, Progress
from appa_lite.guidance.base import SolverReport
from appa_lite.stages.event_laws import drawn_anew, event_facts, event_words, given_event
from appa_lite.stages.parallel import Part, Work, batches, packed, stacked, unpacked
from appa_lite.stages.prior import competitor, counted, duration, matching_fields


def run(cfg: DictConfig) -> None:
    """Write the forecast ensemble (time, prediction_timedelta, number, grid) from ``cfg.initial`` to ``cfg.out``."""
    check_target(cfg.out)
    with Work.of(cfg, [cfg.initial]) as work:
        dataset = predict(cfg, cfg.initial, [cfg.initial], work)
        if dataset is None:
            return
        write_dataset(dataset, cfg.out, dataset.attrs)
    sizes = dataset.sizes
    print(f"{cfg.out}: {sizes['time']} initial times, {sizes['prediction_timedelta'] - 1} frames, {sizes['number']} members")
    if "event" in dataset.attrs:
        print(event_words(dataset.attrs))


def predict(cfg: DictConfig, initial: str | xr.Dataset, inputs: list[str], work: Work) -> xr.Dataset | None:
    """The forecast ensemble from an initial file or dataset; ``inputs`` are the files behind it.

    A piece of the work is a batch of members from one initial time; None for processes that leave the merging to another.
    """
    if cfg.members is not None and cfg.members < 1:
        raise UserError(f"members={cfg.members} must be at least 1")
    forecaster, setting = competitor(cfg, Forecaster)
    spec = setting.spec or open_fields(initial)[1]
    frames = round(duration(cfg.lead, "lead") / spec.step)
    if frames < 1:
        raise UserError(f"lead={cfg.lead} is shorter than a frame of this model, {spec.step / 3600:g} hours")
    dataset, fields = _initial(cfg, initial, spec)
    starts = cfg.initial_time if isinstance(cfg.initial_time, ListConfig) else [cfg.initial_time]
    histories = [_history(fields, dataset["time"].values, start, cfg.history, spec.step) for start in starts]
    if cfg.get("event") is not None and len(histories) > 1:
        raise UserError("event=... is of one forecast: give one initial_time")
    ends = histories[0][1][-1] + (np.arange(frames + 1) * spec.step * 1e9).astype("timedelta64[ns]")
    forecaster = given_event(cfg, forecaster, spec, ends)
    members = batches(cfg.members or fields.shape[0], cfg.batch)
    todo = [(known, times, some) for known, times in histories for some in members]

    def piece(i: int, progress: Progress) -> Part:
        known, times, some = todo[i]
        rows, forecaster.report = known[[m % len(known) for m in some]], SolverReport()
        with counted(setting.checkpoint) as calls:
            out = forecaster.forecast(rows, times, frames, some, cfg.seed, progress).cpu()
        part = {"fields": torch.cat([rows[:, -1:], out], dim=1), "calls": torch.tensor(sum(calls))}
        return part | {"solver": packed(asdict(forecaster.report))} | drawn_anew(forecaster)

    parts = work.map(len(todo), piece)
    if parts is None:
        return None
    report = SolverReport()
    for part in parts:
        report.merge(SolverReport(**unpacked(part["solver"])))
    each = len(members)
    ensembles = [stacked([part["fields"] for part in parts[i : i + each]]) for i in range(0, len(parts), each)]
    leads = (np.arange(frames + 1) * spec.step * 1e9).astype("timedelta64[ns]")
    dates = np.array([times[-1] for _, times in histories])
    coords = {"time": dates, "prediction_timedelta": leads, "number": np.arange(cfg.members or fields.shape[0])}
    result = work.dataset(spec, da.stack(ensembles).swapaxes(1, 2), coords)
    calls = {"network_calls": sum(int(part["calls"]) for part in parts) / (len(histories) * coords["number"].size)}
    given = event_facts(forecaster, parts)
    result.attrs = provenance(cfg, cfg.seed, inputs) | report.summary() | calls | given | {"field_spec": json.dumps(spec.to_dict())}
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
