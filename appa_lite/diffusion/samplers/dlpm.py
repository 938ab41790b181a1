"""Denoising Levy probabilistic models: the reverse of a chain of stable noises."""

from collections.abc import Iterator

import torch
from torch import Tensor

from appa_lite.diffusion.base import Denoiser
from appa_lite.diffusion.noise_laws import Stable
from appa_lite.diffusion.samplers.stepped import Draw, SteppedSampler


class DLPM(SteppedSampler):
    """Ancestral sampling given the scales of all steps (Shariatian, Simsekli and Durmus 2025, algorithm 2).

    The forward chain x_t = x_{t-1} + s_t e_t has isotropic stable noises of index alpha, s_t^alpha = sigma_t^alpha -
    sigma_{t-1}^alpha, and e_t = sqrt(A_t) g_t is Gaussian given its A_t. The A_t are drawn first, for the whole chain.
    Given them the variance of what was added up to t is V_t = sum_{s <= t} s_s^2 A_s, and the step back is Gaussian:

        x_{t-1} = x_t - G_t (x_t - D(x_t, sigma_t)) + sqrt(G_t V_{t-1}) n,     G_t = 1 - V_{t-1} / V_t

    (their eq. 17 for the variance-exploding chain, gamma_t = 1, with sigma_t times their estimate of the noise written
    x - D.) With A_t = 1 this is ancestral sampling, DDPM.

    D is not told the A_t. Where one of them is large, the step back replaces z by its mean, and however many steps there
    are, the spread of z given x is lost: on stable data with the exact denoiser quantiles are 7 to 13 % short in the body
    and 20 to 30 % in the tail (``tests/test_heavy_tails.py``).

    Args:
        steps: noise levels; the denoiser is evaluated ``steps`` times.
        sigma_max, sigma_min: first and last noise level, in units of the latents.
        alpha: index of the stable law, in (0, 2).
        schedule: 'log_uniform' or 'edm'.
    """

    def __init__(
        self, steps: int = 64, sigma_max: float = 100.0, sigma_min: float = 0.01, alpha: float = 1.8, schedule: str = "log_uniform"
    ):
        super().__init__(steps, sigma_max, sigma_min, schedule)
        self.law = Stable(alpha)

    def variances(self, uniform: Tensor) -> Tensor:
        """V_t of every level but zero, in the order of ``levels``, (B, steps), from uniform numbers (B, steps, 2)."""
        powers = self.levels[:-1] ** self.law.alpha
        step = (powers - torch.cat([powers[1:], powers.new_zeros(1)])) ** (2 / self.law.alpha)
        return (step * self.law.square(uniform.double())).flip(-1).cumsum(-1).flip(-1)

    def walk(self, x: Tensor, denoiser: Denoiser, draw: Draw) -> Iterator[Tensor]:
        # two normal numbers of each of the first draws make the scales of one step: a sampler has no other randomness
        scales = torch.stack([draw().flatten(1)[:, :2] for _ in range(self.steps)], dim=1)
        v = self.variances(torch.special.ndtr(scales.double())).reshape(len(x), self.steps, *[1] * (x.ndim - 1))
        x = x / self.levels[0].to(x) * v[:, 0].sqrt().to(x)
        for number, (sigma, _) in enumerate(self.transitions()):
            gain, left = 1 - v[:, number + 1] / v[:, number], v[:, number + 1]
            x = x - gain.to(x) * (x - denoiser(x, sigma)) + (gain * left).sqrt().to(x) * draw()
            yield x
