"""The iterative ensemble Kalman smoother: 4DEnVar that runs the model again after every Gauss-Newton step."""

import logging
import math
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.forecasters.base import Assimilator, Progress, silent
from appa_lite.forecasters.ensemble import Ensemble, FrameObservations, check_members, check_period, hyperprior, rotation, whitened
from appa_lite.guidance.base import SolverReport
from appa_lite.observations.base import Observation
from appa_lite.simulators.base import Simulator

log = logging.getLogger(__name__)


@final
class IEnKS(Assimilator):
    """The most likely trajectory in the space of the members at the beginning of a window that slides frame by frame.

        J(w) = (N - 1)/2 |w|^2 + 1/2 |R^{-1/2} (y_t - A M_{t<-s}(x + sum_j w_j a_j))|^2,     s = t - lag

    by Gauss-Newton steps; sensitivities come from the members themselves, transformed to the covariance that the last
    step left (Bocquet and Sakov 2014: single assimilation, shift of one frame, transform variant). One iteration is
    the linear 4DEnVar. A strong constraint: the simulator must be deterministic.

    Args:
        simulator: the model.
        lag: frames of the window; 0 is the maximum likelihood ensemble filter.
        iterations: at most; tolerance: length of a step, in standard deviations of the prior, that counts as converged.
        inflation: factor on the anomalies after each analysis; finite_size: strength of the hyperprior in place of
            |w|^2 (N - 1)/2 that inflates where steps are long (Bocquet and Sakov 2012), None for none.
        rotate: mix the members at random.
        states, spinup: where members come from, see ``Ensemble``; device: where they are advanced.
    """

    coupled = True

    def __init__(
        self,
        simulator: Simulator,
        lag: int = 20,
        iterations: int = 10,
        tolerance: float = 0.05,
        inflation: float = 1.0,
        finite_size: float | None = 2.0,
        rotate: bool = True,
        states: str | None = None,
        spinup: int | None = None,
        device: torch.device | str = "cpu",
    ):
        if lag < 0 or iterations < 1 or inflation <= 0 or (finite_size is not None and finite_size <= 0):
            found = f"{lag}, {iterations}, {inflation:g}, {finite_size}"
            raise UserError(f"expected lag >= 0, iterations >= 1, inflation > 0, finite_size > 0 or null; found {found}")
        self.simulator, self.lag, self.iterations, self.tolerance = simulator, lag, iterations, tolerance
        self.inflation, self.finite_size, self.rotate = inflation, finite_size, rotate
        self.states, self.spinup, self.device = states, spinup, device
        self.report = SolverReport()

    @torch.no_grad()
    def assimilate(
        self, observation: Observation | None, times: np.ndarray, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        check_period(self.simulator, times)
        check_members(members)
        ensemble = Ensemble(self.simulator, seed, members, self.states, self.spinup, self.device)
        observed = FrameObservations(observation, len(times), self.device)
        if observed.span > self.lag + 1:
            raise UserError(
                f"observations depend on {observed.span} frames: the lag must be at least {observed.span - 1}, found {self.lag}"
            )
        state, start = ensemble.initial(), 0  # the members at the beginning of the window
        self._check_deterministic(ensemble, state)
        self._unconverged = 0
        fields = state.new_empty(len(members), len(times), *self.simulator.spec.shape)
        for frame in range(len(times) + self.lag):
            if frame in observed.parts:
                state = self._update(ensemble, state, start, frame, observed, seed)
            if frame >= self.lag:
                fields[:, start] = self.simulator.fields(state)
                start += 1
                state = ensemble.advance(state, start - 1) if start < len(times) else state
            progress("analyses", frame + 1, len(times) + self.lag)
        if self._unconverged:
            log.warning("iEnKS: %d of %d analyses did not converge in %d steps", self._unconverged, len(observed.parts), self.iterations)
        return fields.cpu()

    def _check_deterministic(self, ensemble: Ensemble, state: Tensor) -> None:
        twins = ensemble.advance(state[:1].expand_as(state).clone(), 0)
        if not torch.allclose(twins, twins[:1].expand_as(twins), rtol=1e-5, atol=1e-6 * float(twins.abs().max())):
            raise UserError("the iEnKS is a strong constraint and this simulator has a random forcing: take forecaster=enks or letkf")

    def _update(self, ensemble: Ensemble, state: Tensor, start: int, frame: int, observed: FrameObservations, seed: int) -> Tensor:
        """The members at ``start``, given the rows of ``frame`` as well."""
        size = len(state)
        mean = state.mean(0)
        anomalies = (state - mean).flatten(1)
        w = torch.zeros(size, dtype=torch.float64, device=state.device)
        transform = torch.eye(size, dtype=torch.float64, device=state.device)
        inverse, iterations, length = transform, 0, math.inf
        while iterations < self.iterations and length > self.tolerance:
            now = (w[:, None] + transform).to(anomalies)
            s, d = whitened(
                observed.parts[frame], self._run(ensemble, (mean.flatten() + now.T @ anomalies).view_as(state), start, frame, observed)
            )
            s = inverse @ s  # sensitivities to the anomalies of the prior
            values, vectors = torch.linalg.eigh(s @ s.T)
            values = values.clamp(min=0)
            prior = self._prior(values, w)
            step = vectors @ ((vectors.T @ (s @ d / math.sqrt(size - 1) - prior * w)) / (values + prior))
            transform, inverse = ((vectors * (values + prior) ** power) @ vectors.T for power in (-0.5, 0.5))
            w = w + step
            iterations, length = iterations + 1, math.sqrt(size - 1) * float(step.norm())
        self.report.add(float("inf"), iterations, 0.0)
        self._unconverged += length > self.tolerance
        if self.rotate:
            transform = transform @ rotation(size, seed, frame).to(transform)
        now = (w[:, None] + self.inflation * transform).to(anomalies)
        return (mean.flatten() + now.T @ anomalies).view_as(state)

    def _prior(self, values: Tensor, w: Tensor) -> Tensor | float:
        """The curvature of the prior of the weights over N - 1: 1, or c / (e + |w|^2)."""
        if self.finite_size is None:
            return 1.0
        e, c = hyperprior(values, self.finite_size)
        return c / (e + w @ w)

    def _run(self, ensemble: Ensemble, state: Tensor, start: int, frame: int, observed: FrameObservations) -> Tensor:
        """The last ``span`` frames (N, span, C, H, W) of a run from ``start`` to ``frame``."""
        kept = [self.simulator.fields(state)] * observed.span
        for at in range(start, frame):
            state = ensemble.advance(state, at)
            kept = [*kept[1:], self.simulator.fields(state)]
        return torch.stack(kept, dim=1)
