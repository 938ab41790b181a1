"""Noise levels of the variance-exploding process x_t = x + sigma n.

How far they should reach, measured on Gaussian laws with exact denoisers (``tests/test_samplers.py``):

- sigma_min at most 0.15 times the smallest standard deviation of the posterior. The last level is denoised to zero,
  which multiplies a standard deviation s by (1 + sigma_min^2/s^2)^(-1/2): 1.1 % at 0.15, half of the spread at 1.7.
- sigma_max of an ordinary differential equation at least 100 |m|, with m the mean of the posterior in units of the
  latents: the sampler starts from N(0, sigma_max^2) instead of N(m, sigma_max^2), and the flow keeps |m| / sigma_max of
  a standard deviation of that error.
- sigma_max of a stochastic sampler 3 to 10 times the largest standard deviation of the prior: the error is squared.

Levels at equal ratios make the error of a step the same for every mode of a law whose variances span decades.
"""

import torch
from torch import Tensor

from appa_lite.core.errors import UserError


def log_uniform_levels(steps: int, sigma_max: float, sigma_min: float) -> Tensor:
    """``steps`` levels from sigma_max to sigma_min at equal ratios, then zero: (steps + 1,), float64."""
    levels = torch.logspace(torch.tensor(sigma_max).log10(), torch.tensor(sigma_min).log10(), steps, dtype=torch.float64)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def karras_levels(steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> Tensor:
    """The EDM levels, sigma^(1/rho) equally spaced (Karras et al. 2022, eq. 5), then zero: (steps + 1,), float64."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


#: what the key ``schedule`` of a sampler may be
SCHEDULES = {"log_uniform": log_uniform_levels, "edm": karras_levels}


def noise_levels(schedule: str, steps: int, sigma_max: float, sigma_min: float) -> Tensor:
    """The ``steps`` levels of a schedule by its name, then zero: (steps + 1,), float64.

    Raises:
        UserError: an unknown schedule, fewer than two steps, or levels that do not fall to a positive one.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule '{schedule}' of noise levels: give one of {', '.join(SCHEDULES)}")
    if not (sigma_max > sigma_min > 0 and steps >= 2):
        raise UserError(f"noise levels need sigma_max > sigma_min > 0 and at least two steps, found {sigma_max}, {sigma_min}, {steps}")
    return SCHEDULES[schedule](steps, sigma_max, sigma_min)
