"""``filter``: analyses in time order, each from the observations up to its own time (or a fixed lag after it)."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from omegaconf import DictConfig, OmegaConf

from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_seconds
from appa_lite.core.random import derive
from appa_lite.core.store import check_target, digest, open_dataset, provenance, write_dataset
from appa_lite.forecasters.base import Progress
from appa_lite.observations.base import Observation
from appa_lite.observations.rows import digest as digest_of_rows
from appa_lite.observations.rows import hashes
from appa_lite.stages import assimilation as shared
from appa_lite.stages.parallel import Part, Work, stacked
from appa_lite.stages.prior import duration

log = logging.getLogger(__name__)

#: what must be the same for earlier analyses to be taken over
SETTINGS = ("members", "seed", "lag", "every", "window", "withhold", "withhold_stations", "gross_error_probability")
SETTINGS += ("forecaster", "guidance", "sampler", "network")


def run(cfg: DictConfig) -> None:
    """Write the analyses (time, number, grid) of ``cfg.observations`` to ``cfg.out``, going on from ``cfg.previous`` if there is one."""
    check_target(cfg.out)
    paths = shared.files(cfg.observations)
    previous = None if cfg.previous is None else open_dataset(cfg.previous)
    inputs = paths + ([] if previous is None else [cfg.previous])
    table = shared.read_files(paths, shared.table_options(cfg))
    with Work.of(cfg, inputs) as work:
        made = analyse(cfg, table, inputs, work, previous)
        if made is None:
            return
        dataset, facts = made
        write_dataset(dataset, cfg.out, dataset.attrs)
    print(f"{', '.join(paths)}: {shared.counted(json.loads(dataset.attrs['observation_counts']))}")
    print(f"{cfg.out}: {dataset.sizes['time']} analyses, {cfg.members} members; {facts}")


def analyse(
    cfg: DictConfig, table: pd.DataFrame, inputs: list[str], work: Work, previous: xr.Dataset | None = None
) -> tuple[xr.Dataset, str] | None:
    """The analyses given a table of observations, and what to say about them; ``inputs`` are the files behind it.

    An analysis is a function of the model, the settings, the seed, its time and the rows in its window, and of nothing
    else. So those of ``previous`` whose rows are still the same are taken over, and the others are made (again): a batch
    of members of one analysis is a piece of the work. None for processes that leave the merging to another.
    """
    model = shared.engine(cfg)
    plan = Plan.of(cfg, model, shared.canonical_table(table, cfg), previous)
    known = {} if previous is None else _known(cfg, plan, previous)
    frames, members = [k for k in map(int, plan.frames) if k not in known], shared.pieces(cfg, model)
    todo = [(k, some) for k in frames for some in members]
    parts = work.map(len(todo), lambda i, progress: _piece(cfg, model, plan, *todo[i], progress))
    if parts is None:
        return None
    of = {k: parts[i * len(members) : (i + 1) * len(members)] for i, k in enumerate(frames)}
    made = [known[k] if k in known else _analysis(cfg, model, plan, k, of[k], work) for k in map(int, plan.frames)]
    dataset = xr.concat(made, "time", data_vars="all", coords="minimal", compat="override", join="override", combine_attrs="override")
    attrs, facts = shared.solver(parts)
    dataset.attrs = provenance(cfg, cfg.seed, inputs) | attrs | {"field_spec": json.dumps(model.spec.to_dict())}
    dataset.attrs |= {"model": plan.model, "kinds": json.dumps(plan.names)}
    gross = int(dataset["gross_errors"].sum())
    counts = plan.rows.counts | ({"gross error": gross} if gross else {})
    lines = shared.testify(dataset, dataset["innovation_sums"].sum("time").values, plan.names, counts)
    return dataset, f"{len(frames)} made, {len(known)} of an earlier run; {facts}\n{lines}"


@dataclass(frozen=True)
class Plan:
    """Which analyses there are, and what each sees.

    ``frames`` are counted from the first one that any window holds, whose time is ``origin`` frames after the phase;
    a window ends ``after`` frames past its analysis and holds ``length`` frames in all.
    """

    rows: shared.Rows
    hashes: np.ndarray
    frames: np.ndarray
    origin: int
    length: int
    after: int
    lag: float
    every: int
    step: float
    phase: float
    model: str
    names: list[str]

    @classmethod
    def of(cls, cfg: DictConfig, model: shared.Engine, table: pd.DataFrame, previous: xr.Dataset | None) -> "Plan":
        step, phase = model.spec.step, model.phase
        lag = 0.0 if re.fullmatch(r"0+(\.0*)? *[a-zA-Z]*", str(cfg.lag)) else duration(cfg.lag, "lag")
        every = 1 if cfg.every is None else round(duration(cfg.every, "every") / step)
        if every < 1 or (cfg.every is not None and abs(every * step - duration(cfg.every, "every")) > 1e-6 * step):
            raise UserError(f"every={cfg.every} is not a whole number of this model's frames, {step / 3600:g} hours")
        after = int(np.ceil(lag / step - 1e-9))
        before = _window(cfg, model, after)
        start = cfg.start if cfg.start or previous is None else str(previous["time"].values[0])
        first, last = shared.ends(table["time"], start, cfg.end)
        low, high = int(np.ceil((first - phase) / step - 1e-9)), int(np.floor((last - phase) / step + 1e-9))
        if high < low:
            raise UserError(f"no frame of this model, {step / 3600:g} hours apart, falls between the first and the last date")
        origin, frames = low - before + 1, np.arange(low, high + 1, every)
        times = shared.frames_between(origin, int(frames[-1]) + after, step, phase)
        rows = shared.prepare(cfg, table, model.spec, times)
        names = sorted(set(rows.names) | set(json.loads(previous.attrs.get("kinds", "[]")) if previous is not None else ()))
        numbers, made_by = hashes(rows.observation.provenance), _digest(cfg)
        return cls(rows, numbers, frames - origin, origin, before + after, after, lag, every, step, phase, made_by, names)

    def time(self, frame: int) -> np.datetime64:
        return shared.frames_between(self.origin + frame, self.origin + frame, self.step, self.phase)[0]

    def window(self, frame: int) -> tuple[int, int]:
        """First frame of the window of an analysis, and the frame after its last."""
        return frame + self.after + 1 - self.length, frame + self.after + 1

    def seen(self, frame: int) -> np.ndarray:
        """Bool (M,): rows in the window of the analysis, none later than its time and the lag."""
        latest = self.time(frame) + np.timedelta64(round(self.lag * 1e9), "ns")
        return self.rows.observation.operator.within(*self.window(frame)).numpy() & (self.rows.time <= latest)

    def new(self, frame: int) -> np.ndarray:
        """Bool (M,): rows after the analysis before, and not after this one: those the evidence is gathered from."""
        return (self.rows.time > self.time(frame - self.every)) & (self.rows.time <= self.time(frame))


def _window(cfg: DictConfig, model: shared.Engine, after: int) -> int:
    """Frames of a window up to and with its analysis."""
    stride = 1 if model.checkpoint is None else model.checkpoint.autoencoder.stride[0]
    if cfg.window is None:
        if model.checkpoint is None:
            raise UserError("window=N is needed: this model was not trained on windows of its own")
        frames = (model.checkpoint.denoiser.config.frames - 2) * stride  # a latent frame on either side is margin
        return max(frames - after, frames // 2, stride)
    if cfg.window < 1:
        raise UserError(f"window={cfg.window} must be at least 1")
    return int(cfg.window) * stride


def _recent(plan: Plan, frame: int, given: Observation) -> Observation:
    """What is new of the observation that an analysis is given."""
    return given.select(torch.from_numpy(plan.new(frame)[plan.seen(frame) & ~plan.rows.withheld]))


def _given(plan: Plan, frame: int) -> Observation:
    """The observation in the window of an analysis, but for what is withheld."""
    return plan.rows.part(plan.seen(frame) & ~plan.rows.withheld).window(*plan.window(frame))


def _seed(cfg: DictConfig, plan: Plan, frame: int) -> int:
    return derive(cfg.seed, "filter", int(to_seconds(np.array([plan.time(frame)]))[0]))


def _piece(cfg: DictConfig, model: shared.Engine, plan: Plan, frame: int, members: range, progress: Progress) -> Part:
    """Some members of one analysis, what they have where values are new, and what was thought of these values."""
    start, stop = plan.window(frame)
    times = shared.frames_between(plan.origin + start, plan.origin + stop - 1, plan.step, plan.phase)
    used, gross = shared.judged(cfg, model, _given(plan, frame), times)
    fields, solver = shared.assimilated(model, used, times, members, _seed(cfg, plan, frame), progress)
    recent = _recent(plan, frame, used)
    at = shared.seen(plan.rows, recent, plan.new(frame) & plan.seen(frame), fields, start)
    fresh = torch.from_numpy(gross[plan.new(frame)[plan.seen(frame) & ~plan.rows.withheld]])
    return {"fields": fields[:, frame - start : frame - start + 1], "solver": solver, "gross": fresh, "variance": recent.variance} | at


def _analysis(cfg: DictConfig, model: shared.Engine, plan: Plan, frame: int, parts: list[Part], work: Work) -> xr.Dataset:
    """One analysis, with the sums of the innovations since the one before."""
    seen = plan.seen(frame)
    stated = _recent(plan, frame, _given(plan, frame))
    recent = stated.inflated(stated.variance / parts[0]["variance"])
    sums = shared.sums_of(plan.rows, recent, plan.new(frame) & seen, parts, plan.names, _seed(cfg, plan, frame))
    fields = stacked([part["fields"] for part in parts]).swapaxes(0, 1)
    dataset = work.dataset(model.spec, fields, {"time": [plan.time(frame)], "number": np.arange(cfg.members)})
    return dataset.assign_coords(_records(seen.sum(), digest_of_rows(plan.hashes[seen]), parts[0]["gross"].sum(), sums))


def _records(count: int, number: int, gross: int, sums: np.ndarray) -> Mapping[str, tuple]:
    """What an analysis remembers of its observations."""
    return {
        "observation_count": ("time", [int(count)], {"long_name": "rows in the window of the analysis, withheld ones too"}),
        "observation_digest": ("time", [number], {"long_name": "digest of these rows"}),
        "gross_errors": ("time", [int(gross)], {"long_name": "new rows that are probably gross errors"}),
        "innovation_sums": (("time", "kind", "sum"), sums[None], {"long_name": "sums behind the attribute 'evidence'"}),
    }


# What is known already


def _digest(cfg: DictConfig) -> str:
    """Of every file of the model, and of the simulator's parameters."""
    files = [] if cfg.checkpoint is None else sorted(p for p in Path(cfg.checkpoint).rglob("*") if p.is_file())
    system = "" if cfg.simulator is None else json.dumps(OmegaConf.to_container(cfg.simulator), sort_keys=True)
    return f"{derive(0, system, *(f'{p.relative_to(cfg.checkpoint)} {digest(p)}' for p in files)):016x}"


def _known(cfg: DictConfig, plan: Plan, previous: xr.Dataset) -> dict[int, xr.Dataset]:
    """Analyses of an earlier run, by frame, whose observations are those of this one.

    Raises:
        UserError: it was made with other settings or another model, or from rows that are no longer there.
    """
    _same_settings(cfg, plan, previous)
    names, frames = json.loads(previous.attrs["kinds"]), set(map(int, plan.frames))
    at = np.rint((to_seconds(previous["time"].values) - plan.phase) / plan.step).astype(np.int64) - plan.origin
    order, found, again = [plan.names.index(name) for name in names], {}, 0
    for i, frame in enumerate(at.tolist()):
        if frame not in frames:
            continue
        seen, piece = plan.seen(frame), previous.isel(time=[i])
        count, before = int(seen.sum()), int(piece["observation_count"].values[0])
        if count < before:
            raise UserError(
                f"previous={cfg.previous}: its analysis of {str(plan.time(frame))[:16]} saw {before} rows, these files hold {count} "
                "of its window: give the earlier rows too, as observations=[earlier,later]"
            )
        number = digest_of_rows(plan.hashes[seen])
        if number != int(piece["observation_digest"].values[0]):
            again += 1
            continue
        sums = np.zeros((len(plan.names), piece.sizes["sum"]))
        sums[order] = piece["innovation_sums"].values[0]
        gross = int(piece["gross_errors"].values[0])
        found[frame] = piece.load().drop_vars("innovation_sums").assign_coords(_records(count, number, gross, sums))
    if again:
        log.warning("%d analyses of %s are made again: rows in their windows are new or were changed", again, cfg.previous)
    return found


def _same_settings(cfg: DictConfig, plan: Plan, previous: xr.Dataset) -> None:
    advice = "give the same, or leave previous out"
    if "innovation_sums" not in previous.coords or "configuration" not in previous.attrs:
        raise UserError(f"previous={cfg.previous} was not written by filter: {advice}")
    if previous.attrs.get("model") != plan.model:
        raise UserError(f"previous={cfg.previous} was made with another model than checkpoint={cfg.checkpoint}: {advice}")
    theirs, ours = json.loads(previous.attrs["configuration"]), OmegaConf.to_container(cfg)
    for key in SETTINGS:
        if theirs.get(key) != ours[key]:
            raise UserError(f"previous={cfg.previous} was made with {key}={theirs.get(key)}, this run has {ours[key]}: {advice}")
