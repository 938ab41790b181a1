"""Pseudo-inverse guidance."""

from torch import Tensor

from appa_lite.guidance.base import Correction, Local, check_on_failure
from appa_lite.guidance.gaussian import solve_known


class PiGDM(Correction):
    """Pseudo-inverse guidance: what the denoiser leaves unknown is taken for white noise.

        E[z | z_t, y] = D(z_t) + sigma^2 J^T A^T (R + r^2 A A^T)^{-1} (y - A(D(z_t))),    r^2 = s^2 sigma^2 / (s^2 + sigma^2)

    Song et al. 2023, 'Pseudoinverse-guided diffusion models for inverse problems', eq. 7 and appendix A.3 (there for
    data of variance s^2 = 1). One vector-Jacobian product a step; biased wherever the prior is correlated.

    Args:
        variance: s^2, of the latents.
        tolerance: relative residual of the solver, in the R-whitened norm; max_iterations: of conjugate gradients.
        on_failure: ``warn`` or ``error`` where the tolerance is not reached.
    """

    def __init__(self, variance: float = 1.0, tolerance: float = 0.001, max_iterations: int = 300, on_failure: str = "warn"):
        self.variance, self.tolerance, self.max_iterations = variance, tolerance, max_iterations
        self.on_failure = check_on_failure(on_failure)

    def correct(self, here: Local, twist: bool) -> tuple[Tensor, Tensor | None]:
        left = self.variance * here.sigma**2 / (self.variance + here.sigma**2)
        solution, v, logarithm = solve_known(here, lambda a: left.to(a) * a, self.tolerance, self.max_iterations, None, twist)
        correction = here.pull(v, last=True)
        here.solved(solution, self.tolerance, self.on_failure)
        return correction, logarithm
