"""Tweedie moment projected diffusion."""

import torch
from torch import Tensor

from appa_lite.guidance.base import Correction, Local
from appa_lite.guidance.gaussian import diagonal


class TMPD(Correction):
    """Tweedie moment projected diffusion: the covariance of what is observed is replaced by the diagonal of its row sums.

        E[z | z_t, y] = D(z_t) + sigma^2 J^T A^T (R + diag(sigma^2 A J^T A^T 1))^{-1} (y - A(D(z_t)))

    Boys et al. 2023, 'Tweedie moment projected diffusions for inverse problems', eq. 14 and section 3.3. Two
    vector-Jacobian products a step. Row sums that are negative (observations of anticorrelated places) count as zero.
    """

    def correct(self, here: Local, twist: bool) -> tuple[Tensor, Tensor | None]:
        rows = here.observe(here.pull(torch.ones_like(here.innovation)))
        variance = here.variance + rows.clamp(min=0)
        correction = here.pull(here.innovation / variance, last=True)
        here.direct()
        return correction, diagonal(here.innovation, variance)
