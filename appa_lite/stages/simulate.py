"""``simulate``: trajectories of a simulator, written as they are made."""

import json

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from appa_lite.config import build
from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_datetime, to_seconds
from appa_lite.core.store import AtomicZarrWriter, provenance
from appa_lite.data.open import parse_date
from appa_lite.simulators.base import Simulator, load_states, trajectories
from appa_lite.stages.device import device


def run(cfg: DictConfig) -> None:
    """Write ``cfg.trajectories`` trajectories of ``cfg.frames`` frames to ``cfg.out``, ``cfg.batch`` of them at a time."""
    if min(cfg.trajectories, cfg.frames, cfg.batch) < 1:
        raise UserError(f"trajectories, frames and batch are at least 1, found {cfg.trajectories}, {cfg.frames} and {cfg.batch}")
    simulator = build(cfg.simulator, Simulator)
    states = None if cfg.states is None else load_states(cfg.states)
    attrs = provenance(cfg, cfg.seed, [] if cfg.states is None else [cfg.states])
    attrs["field_spec"] = json.dumps(simulator.spec.to_dict())
    times = to_datetime(to_seconds(parse_date(cfg.start, "start")) + simulator.spec.step * np.arange(cfg.frames))
    with AtomicZarrWriter(cfg.out, attrs, dim="trajectory") as writer:
        for first in range(0, cfg.trajectories, cfg.batch):
            members = list(range(first, min(first + cfg.batch, cfg.trajectories)))
            with tqdm(desc=f"trajectories {first + 1}-{members[-1] + 1} of {cfg.trajectories}", unit="frame", leave=False) as bar:
                fields = trajectories(simulator, cfg.seed, members, cfg.frames, cfg.spinup, device(cfg.device), states, _show(bar))
            writer.append(simulator.spec.to_dataset(fields, {"trajectory": members, "time": times}))
    print(f"{cfg.out}: {cfg.trajectories} trajectories of {cfg.frames} frames, {simulator.spec.step / 3600:g} hours apart")


def _show(bar: tqdm):
    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return progress
