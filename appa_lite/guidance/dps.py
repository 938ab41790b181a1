"""Diffusion posterior sampling."""

import torch
from torch import Tensor

from appa_lite.guidance.base import Correction, Local


class DPS(Correction):
    """Diffusion posterior sampling: a step of fixed length down the misfit, whatever the errors of the observations.

        E[z | z_t, y] = D(z_t) - zeta grad |y - A(D(z_t))| = D(z_t) + zeta J^T A^T d / |d|,    d = y - A(D(z_t))

    Chung et al. 2023, 'Diffusion posterior sampling for general noisy inverse problems', algorithm 1, which moves the
    next state by zeta' grad |d|. An ancestral step from sigma to sigma' moves it by 1 - (sigma'/sigma)^2 times the change
    of D, so that zeta = zeta' / (1 - (sigma'/sigma)^2), the same at all log-uniform levels. The norm is that of each
    member, not of the batch. It has no likelihood, hence no particles; its spread means nothing.

    Args:
        zeta: length of the step, in units of the latents' squared over the observations'; 3.3 is zeta' = 1 with 64
        levels from 300 to 0.003.
    """

    def __init__(self, zeta: float = 3.3):
        self.zeta = zeta

    def correct(self, here: Local, twist: bool) -> tuple[Tensor, Tensor | None]:
        size = here.innovation.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(here.innovation.dtype).tiny)
        correction = here.pull(here.innovation / size, last=True) * (self.zeta / here.sigma**2)
        here.direct()
        return correction, None
