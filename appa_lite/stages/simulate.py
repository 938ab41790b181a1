"""``simulate``: trajectories of a simulator, written as they are made."""

import json

import numpy as np
from omegaconf import DictConfig

from appa_lite.config import build
from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_datetime, to_seconds
from appa_lite.core.store import check_target, provenance, write_dataset
from appa_lite.data.open import parse_date
from appa_lite.forecasters.base import Progress
from appa_lite.simulators.base import Simulator, load_states, trajectories
from appa_lite.stages.device import device
from appa_lite.stages.parallel import Part, Work, batches, stacked


def run(cfg: DictConfig) -> None:
    """Write ``cfg.trajectories`` trajectories of ``cfg.frames`` frames to ``cfg.out``, ``cfg.batch`` of them at a time."""
    check_target(cfg.out)
    if min(cfg.trajectories, cfg.frames, cfg.batch) < 1:
        raise UserError(f"trajectories, frames and batch are at least 1, found {cfg.trajectories}, {cfg.frames} and {cfg.batch}")
    simulator = build(cfg.simulator, Simulator)
    states = None if cfg.states is None else load_states(cfg.states)
    inputs = [] if cfg.states is None else [cfg.states]
    times = to_datetime(to_seconds(parse_date(cfg.start, "start")) + simulator.spec.step * np.arange(cfg.frames))
    members, where = batches(cfg.trajectories, cfg.batch), device(cfg.device)

    def piece(i: int, progress: Progress) -> Part:
        def show(done: int, total: int) -> None:
            progress(f"trajectories {members[i][0] + 1}-{members[i][-1] + 1}", done, total)

        return {"fields": trajectories(simulator, cfg.seed, members[i], cfg.frames, cfg.spinup, where, states, show)}

    with Work.of(cfg, inputs) as work:
        parts = work.map(len(members), piece)
        if parts is None:
            return
        coords = {"trajectory": np.arange(cfg.trajectories), "time": times}
        dataset = work.dataset(simulator.spec, stacked([part["fields"] for part in parts]), coords)
        write_dataset(dataset, cfg.out, provenance(cfg, cfg.seed, inputs) | {"field_spec": json.dumps(simulator.spec.to_dict())})
    print(f"{cfg.out}: {cfg.trajectories} trajectories of {cfg.frames} frames, {simulator.spec.step / 3600:g} hours apart")
