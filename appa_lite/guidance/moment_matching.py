"""Moment-matching posterior sampling with the covariance of the denoiser's own errors."""

import torch
from torch import Tensor

from appa_lite.core.linalg import conjugate_gradients
from appa_lite.diffusion.base import Denoiser
from appa_lite.guidance.base import Guidance, LatentObservation, PosteriorCovariance, SolverReport, no_gradient


class MomentMatching(Guidance):
    """The posterior mean of a Gaussian with the denoiser's mean and covariance at each noise level.

        v = (R + A C A^T)^{-1} (y - A(D(z_t))),    E[z | z_t, y] = D(z_t) + C A^T v        (jacobian=False)
                                                   E[z | z_t, y] = D(z_t) + sigma^2 J^T A^T v   (jacobian=True)

    MMPS (Rozet et al. 2024) takes C = sigma^2 J from the denoiser's Jacobian J. A learned J is neither symmetric nor
    positive, and conjugate gradients on it diverge; here C is the covariance of z - D(z_t) measured on windows never
    trained on, so that the system is symmetric positive definite, costs no network call, and its solution is
    followed by one vector-Jacobian product or none. Exact where the prior is Gaussian, both ways.

    Args:
        jacobian: correct through the denoiser's Jacobian (one vector-Jacobian product a step).
        tolerance: relative residual, in the R-whitened norm.
        max_iterations: of conjugate gradients, per noise level.
        inflation: factor on C.
    """

    def __init__(self, jacobian: bool = True, tolerance: float = 0.01, max_iterations: int = 300, inflation: float = 1.0):
        self.jacobian, self.tolerance, self.max_iterations, self.inflation = jacobian, tolerance, max_iterations, inflation

    def __call__(
        self, denoiser: Denoiser, observation: LatentObservation, covariance: PosteriorCovariance, report: SolverReport
    ) -> Denoiser:
        whiten = observation.variance.rsqrt()
        state: dict[str, Tensor] = {}

        def correction(mean: Tensor, sigma: Tensor) -> Tensor:
            """Components (B, T, K) of A^T v, the solve warm-started from the last noise level."""
            innovation = (observation.values - observation.operator.predict(mean)) * whiten
            linear = observation.operator.linearise(mean)

            def matvec(v: Tensor) -> Tensor:
                spread = covariance.apply(linear.adjoint(v * whiten), sigma) * self.inflation
                return v + linear.forward(spread) * whiten

            precondition = linear.preconditioner(covariance, sigma, observation.variance / self.inflation)
            solution = conjugate_gradients(matvec, innovation, state.get("v"), self.tolerance, self.max_iterations, precondition)
            state["v"] = solution.x
            report.add(float(sigma), solution.iterations, float(solution.residual.max()))
            return linear.adjoint(solution.x * whiten)

        def with_jacobian(x: Tensor, sigma: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                mean = denoiser(x, sigma)
            with torch.no_grad():
                push = covariance.expand(correction(mean.detach(), sigma))
            (product,) = torch.autograd.grad(mean, x, push)
            return mean.detach() + sigma**2 * product

        @torch.no_grad()
        def without_jacobian(x: Tensor, sigma: Tensor) -> Tensor:
            mean = no_gradient(denoiser)(x, sigma)
            return mean + covariance.expand(covariance.apply(correction(mean, sigma), sigma) * self.inflation)

        return with_jacobian if self.jacobian else without_jacobian
