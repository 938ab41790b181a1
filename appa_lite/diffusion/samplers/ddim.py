"""DDIM, and DDPM (ancestral sampling) as its stochastic form: the clean estimate, noised again to the next level."""

from collections.abc import Iterator

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.diffusion.base import Denoiser
from appa_lite.diffusion.samplers.stepped import Draw, SteppedSampler


class DDIM(SteppedSampler):
    """First-order sampler: Euler's step of the probability flow (eta = 0), DDPM or ancestral sampling (eta = 1).

        x_{i+1} = D + sqrt(s_{i+1}^2 - v) (x_i - D) / s_i + sqrt(v) n,  v = eta^2 s_{i+1}^2 (1 - s_{i+1}^2 / s_i^2)

    with D = D(x_i, s_i). Song, Meng & Ermon 2021 (eq. 12 and 16); Ho et al. 2020. On a Gaussian the spread falls
    short by h/4 (DDIM) or h/2 (DDPM), h = ln(sigma_max / sigma_min) / steps: it takes hundreds of steps to be calibrated.

    Args:
        steps: noise levels; the denoiser is evaluated ``steps`` times.
        sigma_max, sigma_min: first and last noise level, in units of the latents.
        eta: 0 deterministic, 1 DDPM.
        schedule: 'log_uniform' or 'edm'.
    """

    def __init__(
        self, steps: int = 256, sigma_max: float = 1000.0, sigma_min: float = 0.01, eta: float = 0.0, schedule: str = "log_uniform"
    ):
        super().__init__(steps, sigma_max, sigma_min, schedule)
        if not 0 <= eta <= 1:
            raise UserError(f"DDIM has eta within [0, 1], 0 deterministic and 1 DDPM, found {eta}")
        self.eta = eta

    def walk(self, x: Tensor, denoiser: Denoiser, draw: Draw) -> Iterator[Tensor]:
        for sigma, after in self.transitions():
            mean = denoiser(x, sigma)
            variance = self.eta**2 * after**2 * (1 - after**2 / sigma**2)
            x = mean + torch.sqrt(after**2 - variance) / sigma * (x - mean)
            if self.eta > 0:
                x = x + torch.sqrt(variance) * draw()
            yield x
