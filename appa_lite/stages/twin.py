"""Twin experiments of forecasts: truths with initial times, and the law that a perfect model would say of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_datetime
from appa_lite.core.random import derive
from appa_lite.forecasters.simulator_ensemble import SimulatorEnsemble
from appa_lite.simulators.base import Simulator, states

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Design:
    """Which forecasts are asked for.

    Args:
        trajectories: independent truths; starts: initial times of each; spacing: frames between them;
        history: frames known up to the initial time; lead: frames ahead; members: of an ensemble;
        begin: seconds since 1970 of the first frame. The truths follow one another on the time axis, without overlap.
    """

    trajectories: int
    starts: int
    spacing: int
    history: int
    lead: int
    members: int
    begin: float

    def __post_init__(self):
        if min(self.trajectories, self.starts, self.spacing, self.history, self.lead) < 1 or self.members < 2:
            raise UserError("test: trajectories, starts, spacing, history and lead are at least 1, members at least 2")

    @property
    def frames(self) -> int:
        """Of one truth."""
        return self.history + (self.starts - 1) * self.spacing + self.lead

    @property
    def initial_frames(self) -> list[int]:
        return [self.history - 1 + i * self.spacing for i in range(self.starts)]

    def times(self, trajectory: int, step: float) -> np.ndarray:
        """(frames,) datetime64 of one truth."""
        return to_datetime(self.begin + step * (trajectory * self.frames + np.arange(self.frames)))


@torch.no_grad()
def truths(simulator: Simulator, design: Design, seed: int, start: str | Path | None, progress: Progress) -> tuple[Tensor, Tensor]:
    """Fields (N, T, C, H, W) of the truths, and full states (N, starts, ...) at the initial times, hidden parts included.

    ``start``: spun-up states to branch from, as for ``trajectories``.
    """
    members, wanted = range(design.trajectories), set(design.initial_frames)
    fields, kept = [], []
    for frame, state in enumerate(states(simulator, seed, members, design.frames, start=start, progress=progress)):
        fields.append(simulator.fields(state).cpu())
        if frame in wanted:
            kept.append(state)
    return torch.stack(fields, 1), torch.stack(kept, 1)


def oracle(simulator: Simulator, known: Tensor, design: Design, seed: int, progress: Progress) -> Tensor:
    """The simulator's own ensemble (N, starts, lead, members, C, H, W) from the true states, under forcing of its own.

    Where the only thing not known is the random forcing to come, this is the law that every forecast is asked for: the floor
    of every proper score.
    """
    states = known.flatten(0, 1).repeat_interleave(design.members, 0)
    ensemble = SimulatorEnsemble(simulator)
    fields = ensemble.forecast_states(states, design.lead, range(len(states)), seed, lambda _, done, total: progress(done, total))
    return fields.unflatten(0, (design.trajectories, design.starts, design.members)).transpose(2, 3)


@torch.no_grad()
def analysed(simulator: Simulator, design: Design, error: float, seed: int, start: str | Path | None, progress: Progress) -> Tensor:
    """Fields (N, starts, 1 + members, history + lead, C, H, W) of states that are known with an error.

    A state of the climate is the analysis at the first known frame of every start; the truth, at place 0, and the members go on
    from draws of the one law that it stands for, ``Simulator.analyses``, each under random forcing of its own. Truth and members are
    exchangeable given the analysis by construction, also where states hold more than the fields show: the members after the
    initial time are the oracle, exactly, and their known frames are what a forecaster is given of them.

    Args:
        error: standard deviation of the fields' errors, in their units.

    Raises:
        UserError: a simulator without such a law, starts whose known frames overlap, or starts too far apart for the runs to meet.
    """
    if not hasattr(simulator, "analyses"):
        raise UserError(f"{type(simulator).__name__} has no law of states known with an error: test.analysis_error=null")
    if not design.history <= design.spacing <= design.history + design.lead:
        raise UserError(f"test.spacing={design.spacing} must lie between history and history + lead of the test with test.analysis_error")
    kept, wanted = [], {f - design.history + 1 for f in design.initial_frames}
    for frame, state in enumerate(states(simulator, seed, range(design.trajectories), max(wanted) + 1, start=start)):
        if frame in wanted:
            kept.append(state)
    analyses = torch.stack(kept, 1).flatten(0, 1).repeat_interleave(1 + design.members, 0)
    draws, seed = list(range(len(analyses))), derive(seed, "analyses")
    state, fields = simulator.analyses(analyses, error, seed, draws), []
    for frame in range(design.history + design.lead):
        state = state if frame == 0 else simulator.advance(state, frame, seed, draws)
        fields.append(simulator.fields(state).cpu())
        progress(frame + 1, design.history + design.lead)
    return torch.stack(fields, 1).unflatten(0, (design.trajectories, design.starts, 1 + design.members))


def forecast_dataset(simulator: Simulator, design: Design, fields: Tensor, initial: Tensor) -> xr.Dataset:
    """A forecast (time, prediction_timedelta, number, grid) of fields (N, starts, lead, members, ...).

    ``initial``: of lead zero, (N, starts, ...), the same for all members, or (N, starts, members, ...).
    """
    step = simulator.spec.step
    first = (initial if initial.ndim == 6 else initial[:, :, None])[:, :, None].expand(-1, -1, 1, fields.shape[3], -1, -1, -1)
    dates = np.concatenate([design.times(n, step)[design.initial_frames] for n in range(design.trajectories)])
    leads = (np.arange(design.lead + 1) * step * 1e9).astype("timedelta64[ns]")
    coords = {"time": dates, "prediction_timedelta": leads, "number": np.arange(fields.shape[3])}
    return simulator.spec.to_dataset(torch.cat([first, fields], 2).flatten(0, 1), coords)
