"""Moment-matching posterior sampling with the covariance of the denoiser's own errors."""

from torch import Tensor

from appa_lite.guidance.base import Correction, Local, check_on_failure
from appa_lite.guidance.gaussian import PRECISE, solve_known


class MomentMatching(Correction):
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
        decode_factor: fall of sigma between two passes through the decoder; 1 decodes at every step.
        on_failure: ``warn`` or ``error`` where the tolerance is not reached.
    """

    exact = True

    def __init__(
        self,
        jacobian: bool = True,
        tolerance: float = 0.01,
        max_iterations: int = 300,
        inflation: float = 1.0,
        decode_factor: float = 1.0,
        on_failure: str = "warn",
    ):
        self.jacobian, self.tolerance, self.max_iterations, self.inflation = jacobian, tolerance, max_iterations, inflation
        self.decode_factor = decode_factor
        self.on_failure = check_on_failure(on_failure)

    def correct(self, here: Local, twist: bool) -> tuple[Tensor, Tensor | None]:
        solution, v, logarithm = self._solve(here, self.tolerance, twist)
        correction = here.pull(v, last=True) if self.jacobian else here.covariance.expand(self._spread(here, here.linear.adjoint(v)))
        here.solved(solution, self.tolerance, self.on_failure)
        return correction, logarithm

    def left(self, here: Local, components: Tensor) -> tuple[Tensor, Tensor]:
        tolerance = min(self.tolerance, PRECISE)  # of a difference
        seen = here.linear.forward(self._spread(here, components))
        solution, w, _ = self._solve(here, tolerance, False, seen)
        here.solved(solution, tolerance, self.on_failure)
        left = components - here.linear.adjoint(w)
        return left, self._spread(here, left)

    def _spread(self, here: Local, components: Tensor) -> Tensor:
        return here.covariance.apply(components, here.sigma) * self.inflation

    def _solve(self, here: Local, tolerance: float, twist: bool, values: Tensor | None = None):
        precondition = here.linear.preconditioner(here.covariance, here.sigma, here.variance / self.inflation)
        return solve_known(here, lambda c: self._spread(here, c), tolerance, self.max_iterations, precondition, twist, values)
