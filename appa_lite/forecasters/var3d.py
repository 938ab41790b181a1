"""3D-Var: each analysis with one climatological covariance, cycled with the model."""

import math
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.random import Streams, derive
from appa_lite.forecasters.base import Assimilator, Progress, silent
from appa_lite.forecasters.ensemble import Ensemble, FrameObservations, check_period, error_variance, independent
from appa_lite.forecasters.localisation import Taper, placed_states
from appa_lite.guidance.base import SolverReport
from appa_lite.observations.base import Observation
from appa_lite.simulators.base import Simulator


@final
class ThreeDVar(Assimilator):
    """x_a = x_f + B A^T (A B A^T + R)^{-1} (y - A(x_f)) at every frame, with B = scale (taper o climatological covariance).

    The covariance is that of ``samples`` draws from the climate (also through a nonlinear A, by regression); the taper
    is Gaspari and Cohn's (1999), in model space. Rows interpolated in time meet the model's own past (first guess at
    the appropriate time). Each member is a cycle of its own, from its own start, with observations perturbed by their
    errors: an ensemble of data assimilations (Houtekamer et al. 1996; Lorenc 1986 for 3D-Var).

    Args:
        simulator: the model.
        scale: of the climatological covariance; forecasts from analyses are better than the climate.
        radius: where the taper reaches zero, in cells; None: no taper.
        samples: draws of the climate behind the covariance.
        perturb: add draws of the observation errors to each member's observations; without them members grow alike.
        states, spinup: where members and samples come from, see ``Ensemble``; device: where they are advanced.
    """

    def __init__(
        self,
        simulator: Simulator,
        scale: float = 0.02,
        radius: float | None = None,
        samples: int = 256,
        perturb: bool = True,
        states: str | None = None,
        spinup: int | None = None,
        device: torch.device | str = "cpu",
    ):
        if scale <= 0 or samples < 2:
            raise UserError(f"expected scale > 0 and samples >= 2, found {scale:g} and {samples}")
        self.simulator, self.scale, self.samples, self.perturb = simulator, scale, samples, perturb
        self.states, self.spinup, self.device = states, spinup, device
        self.cells = math.prod(simulator.spec.grid.shape)
        self.taper = None if radius is None else Taper(simulator.spec.grid, radius)
        if radius is not None:
            placed_states(simulator)
        self.report = SolverReport()

    @torch.no_grad()
    def assimilate(
        self, observation: Observation | None, times: np.ndarray, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        check_period(self.simulator, times)
        ensemble = Ensemble(self.simulator, seed, members, self.states, self.spinup, self.device)
        observed = FrameObservations(observation, len(times), self.device)
        climate = None
        if observed.parts:
            draws = Ensemble(self.simulator, derive(seed, "climate"), range(self.samples), self.states, self.spinup, self.device)
            climate = draws.initial()
        state = ensemble.initial()
        fields = state.new_empty(len(members), len(times), *self.simulator.spec.shape)
        for frame in range(len(times)):
            state = ensemble.advance(state, frame - 1) if frame else state
            fields[:, frame] = self.simulator.fields(state)
            if frame in observed.parts:
                part = observed.parts[frame]
                values, predicted = independent(part, part.operator(observed.recent(fields, frame)).double())
                innovation = values - predicted
                if self.perturb:
                    errors = Streams(seed, members, "perturbed", frame).normal((len(part),), torch.float64)
                    innovation = innovation + errors.to(innovation) * part.variance.double().sqrt()
                increment = innovation @ self._gain(climate, part, observed.span, innovation.mean(0)).T
                state = state + increment.to(state).view_as(state)
                fields[:, frame] = self.simulator.fields(state)
            progress("analyses", frame + 1, len(times))
        return fields.cpu()

    def _gain(self, climate: Tensor, part: Observation, span: int, innovation: Tensor) -> Tensor:
        """B A^T (A B A^T + R)^{-1}, shape (n, M), float64."""
        factor = math.sqrt(self.scale / (len(climate) - 1))
        x = climate.flatten(1).double()
        _, y = independent(part, part.operator(self.simulator.fields(climate)[:, None].expand(-1, span, -1, -1, -1)).double())
        x, y = (x - x.mean(0)) * factor, (y - y.mean(0)) * factor
        cross, between = x.T @ y, y.T @ y
        if self.taper is not None:
            places = self.taper.cells(part.operator)
            between = between * self.taper.pairs(part.operator, places).to(cross)
            rows = torch.arange(len(cross), device=cross.device)
            placed = len(cross) // self.cells * self.cells
            cross = cross * places.to(cross)[torch.where(rows < placed, rows % self.cells, self.cells)]
        variance = error_variance(part, innovation, between.diagonal())
        return torch.linalg.solve(between + torch.diag(variance), cross.T).T
