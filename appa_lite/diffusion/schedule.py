"""Noise levels of the variance-exploding process x_t = x + sigma n."""

import torch
from torch import Tensor


def log_uniform_levels(steps: int, sigma_max: float, sigma_min: float) -> Tensor:
    """``steps`` levels from sigma_max to sigma_min at equal ratios, then zero: (steps + 1,), float64."""
    if not (sigma_max > sigma_min > 0 and steps >= 2):
        raise ValueError(f"need sigma_max > sigma_min > 0 and at least two steps, got {sigma_max}, {sigma_min}, {steps}")
    levels = torch.logspace(torch.tensor(sigma_max).log10(), torch.tensor(sigma_min).log10(), steps, dtype=torch.float64)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def karras_levels(steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> Tensor:
    """The EDM levels, sigma^(1/rho) equally spaced (Karras et al. 2022, eq. 5), then zero."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
