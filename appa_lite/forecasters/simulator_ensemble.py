"""The true simulator as an ensemble: the oracle, and the floor of every score."""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.random import derive
from appa_lite.forecasters.base import Forecaster, Progress, silent
from appa_lite.simulators.base import Simulator, load_states


@final
class SimulatorEnsemble(Forecaster):
    """The simulator run from each initial state: the law of the future given that the initial states are draws of p(x_t | what is known).

    Where fields are the whole state (one-scale Lorenz-96, the ocean) the initial fields serve, by ``Simulator.from_fields``. Where the
    state holds more than the fields (the fast variables of two-scale Lorenz-96), fields do not decide the future: give full states,
    drawn from their law given what is known, as ``states`` or to ``forecast_states``. Fast variables that ``from_fields`` makes up
    are not such draws: the first frames then are not the oracle's. Random forcing is the members' own, never that of a truth.

    Args:
        simulator: the system; states: full states (B, *state_shape) at the initial time, or their file (safetensors); None: from the
            fields; device: where it runs.

    Raises:
        UserError: no full states for a simulator that cannot be started from fields.
    """

    def __init__(self, simulator: Simulator, states: Tensor | str | Path | None = None, device: torch.device | str = "cpu"):
        self.simulator, self.device = simulator, device
        self.states = states if states is None or isinstance(states, Tensor) else load_states(states)

    def forecast(
        self, initial: Tensor, times: np.ndarray, frames: int, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        states = self.states
        if states is None:
            from_fields = getattr(self.simulator, "from_fields", None)
            if from_fields is None:
                name = type(self.simulator).__name__
                raise UserError(f"{name} does not start from fields: give full states, forecaster.states=FILE.safetensors")
            states = from_fields(initial[:, -1])
        return self.forecast_states(states, frames, members, seed, progress)

    @torch.no_grad()
    def forecast_states(self, states: Tensor, frames: int, members: Sequence[int], seed: int, progress: Progress = silent) -> Tensor:
        """Fields (B, frames, C, H, W) after full states (B, *state_shape), taken in turn by the members."""
        members, seed = list(members), derive(seed, "simulator_ensemble")
        state = states[[i % len(states) for i in range(len(members))]].to(self.device)
        out = torch.empty(len(members), frames, *self.simulator.spec.shape)
        for frame in range(frames):
            state = self.simulator.advance(state, frame, seed, members)
            out[:, frame] = self.simulator.fields(state).to(out)
            progress("frames", frame + 1, frames)
        return out
