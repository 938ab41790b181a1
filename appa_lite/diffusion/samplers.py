"""Samplers for the variance-exploding process. Each evaluates the denoiser once a step."""

from collections.abc import Callable

import torch
from torch import Tensor

from appa_lite.diffusion.base import Denoiser, NoiseSource, Sampler
from appa_lite.diffusion.schedule import log_uniform_levels


class DPMSolverPP2M(Sampler):
    """Second-order multistep exponential integrator: DPM-Solver++(2M) and its stochastic form SDE-DPM-Solver++(2M).

    With lambda = -ln sigma, h = lambda_{i+1} - lambda_i and D' the denoiser extrapolated from the last two steps,

        x_{i+1} = (s_{i+1}/s_i) e^{-eta h} x_i + (1 - e^{-(1 + eta) h}) D' + s_{i+1} sqrt(1 - e^{-2 eta h}) n

    with eta = 0 (an ordinary differential equation) or 1 (stochastic). Lu et al. 2022, eq. 8 and appendix on SDE solvers.

    Args:
        steps: evaluations of the denoiser.
        sigma_max, sigma_min: first and last noise level, in units of the latents.
        eta: 0 deterministic, 1 stochastic.
    """

    def __init__(self, steps: int = 32, sigma_max: float = 300.0, sigma_min: float = 0.01, eta: float = 1.0):
        self.levels = log_uniform_levels(steps, sigma_max, sigma_min)
        self.steps, self.eta = steps, eta

    def __call__(self, denoiser: Denoiser, noise: NoiseSource, progress: Callable[[int, int], None] | None = None) -> Tensor:
        levels = self.levels
        x = noise(0)
        x = x * levels[0].to(x)
        previous, last_h = None, None
        for i in range(self.steps):
            sigma, after = levels[i], levels[i + 1]
            mean = denoiser(x, sigma.to(x))
            if after == 0:
                x = mean
            else:
                h = torch.log(sigma / after)
                estimate = mean if previous is None else mean + (h / (2 * last_h)).to(x) * (mean - previous)
                decay = after / sigma * torch.exp(-self.eta * h)
                x = decay.to(x) * x + (1 - torch.exp(-(1 + self.eta) * h)).to(x) * estimate
                if self.eta > 0:
                    x = x + (after * torch.sqrt(1 - torch.exp(-2 * self.eta * h))).to(x) * noise(i + 1)
                previous, last_h = mean, h
            if progress is not None:
                progress(i + 1, self.steps)
        if not torch.isfinite(x).all():
            raise FloatingPointError("the sampler diverged: take more steps, or check the observation errors")
        return x
