"""Optimal interpolation in space and time with the climatological covariance: the best linear analysis."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.linalg import conjugate_gradients
from appa_lite.core.random import Streams
from appa_lite.forecasters.base import Assimilator, Progress, silent
from appa_lite.forecasters.posterior import ModeCovariance, Period, Prior, later
from appa_lite.guidance.base import LatentObservation, SolverReport
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.observations.base import Observation


class OptimalInterpolation(Assimilator):
    """The posterior of the Gaussian with the climatological mean and space-time covariance, given past and future data.

        z = m + C A^T (A C A^T + R)^{-1} (y - A m)

    in the modes of the latents, all variables together; members by Matheron's rule: a draw of the prior plus the
    analysis of perturbed observations of it (Journel and Huijbregts 1978). ``iterations`` Gauss-Newton steps
    relinearise a nonlinear decoder or operator around the mean.

    Args:
        checkpoint: whose denoiser holds m and C; iterations: of Gauss-Newton; tolerance, max_iterations: of the solver.
    """

    def __init__(self, checkpoint: Checkpoint, iterations: int = 3, tolerance: float = 1e-3, max_iterations: int = 1000):
        self.checkpoint, self.iterations, self.tolerance, self.max_iterations = checkpoint, iterations, tolerance, max_iterations
        self.report = SolverReport()

    @torch.no_grad()
    def assimilate(
        self, observation: Observation | None, times: np.ndarray, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        model = self.checkpoint.denoiser
        period = Period.around(times, self.checkpoint)
        prior = Prior(self.checkpoint, period, 0, 1)
        covariance = ModeCovariance(prior, prior_only=True)
        streams = Streams(seed, members, "optimal_interpolation")
        draws = covariance.project(
            model.covariance.sample(streams.normal((prior.shape[0], int(np.prod(prior.shape[1:]))))).unflatten(-1, prior.shape[1:])
        )
        if observation is None:
            return self._decode(prior, draws, covariance)
        latent = prior.observe_once(later(observation, period.before))
        mean = torch.zeros_like(draws[:1])
        for i in range(self.iterations):
            mean = self._update(latent, covariance, mean, latent.values[None])
            progress("optimal interpolation", i + 1, self.iterations + 1)
        linear = latent.operator.linearise(self._latents(mean, covariance))
        noise = streams.normal((len(latent.variance),)) * latent.variance.sqrt()
        anomalies = draws + self._gain(linear, latent, covariance, -(linear.forward(draws) + noise))
        progress("optimal interpolation", self.iterations + 1, self.iterations + 1)
        return self._decode(prior, mean + anomalies, covariance)

    def _latents(self, components: Tensor, covariance: ModeCovariance) -> Tensor:
        return covariance.expand(components) + self.checkpoint.denoiser.mean.unflatten(0, covariance.latent_shape)

    def _update(self, latent: LatentObservation, covariance: ModeCovariance, around: Tensor, values: Tensor) -> Tensor:
        """One Gauss-Newton step for the mean: the analysis of the problem linearised around a state."""
        state = self._latents(around, covariance)
        linear = latent.operator.linearise(state)
        innovation = values - latent.operator.predict(state) + linear.forward(around)
        return self._gain(linear, latent, covariance, innovation)

    def _gain(self, linear, latent: LatentObservation, covariance: ModeCovariance, innovation: Tensor) -> Tensor:
        """C A^T (A C A^T + R)^{-1} innovation, (B, T, K)."""
        whiten = latent.variance.rsqrt()
        sigma = torch.ones(())

        def matvec(v: Tensor) -> Tensor:
            return v + linear.forward(covariance.apply(linear.adjoint(v * whiten), sigma)) * whiten

        precondition = linear.preconditioner(covariance, sigma, latent.variance)
        solution = conjugate_gradients(matvec, innovation * whiten, None, self.tolerance, self.max_iterations, precondition)
        self.report.add(float("inf"), solution.iterations, float(solution.residual.max()))
        return covariance.apply(linear.adjoint(solution.x * whiten), sigma)

    def _decode(self, prior: Prior, components: Tensor, covariance: ModeCovariance) -> Tensor:
        latents = self._latents(components, covariance)
        return torch.cat([prior.period.cut(prior.decode(z[None])) for z in latents])
