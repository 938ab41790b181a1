"""Score-based data assimilation."""

from torch import Tensor

from appa_lite.guidance.base import Correction, Local
from appa_lite.guidance.gaussian import diagonal


class SDA(Correction):
    """Score-based data assimilation: what the denoiser leaves unknown of y is taken for independent, of variance Gamma sigma^2.

        E[z | z_t, y] = D(z_t) + sigma^2 J^T A^T (R + Gamma sigma^2)^{-1} (y - A(D(z_t)))

    Rozet and Louppe 2023, 'Score-based data assimilation', eq. 15. One vector-Jacobian product a step, no system to solve.
    Gamma must be tuned: small values diverge with few steps, large ones leave the observations unused.

    Args:
        gamma: Gamma, in squared units of the observations over those of the latents.
    """

    def __init__(self, gamma: float = 0.1):
        self.gamma = gamma

    def correct(self, here: Local, twist: bool) -> tuple[Tensor, Tensor | None]:
        variance = here.variance + self.gamma * here.sigma**2
        correction = here.pull(here.innovation / variance, last=True)
        here.direct()
        return correction, diagonal(here.innovation, variance)
