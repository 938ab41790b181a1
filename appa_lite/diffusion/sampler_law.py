"""The law that a sampler draws from, which is not quite the one its denoiser describes: in closed form on Gaussians.

The tail of a law magnifies the error of its spread: a standard deviation that is 1 % short makes an event of one in ten
thousand 14 % rarer. What a sampler does to a Gaussian is therefore looked at before any rare event is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.diffusion.base import NoiseSource, Sampler

NORMAL = torch.distributions.Normal(0.0, 1.0)


def start(sampler: Sampler, root: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor], mean: Tensor | float, noise: Tensor) -> Tensor:
    """The first draw of a sampler, such that it starts from the noised law N(m, sigma_max^2 + C) rather than from N(0, sigma_max^2).

        n' = (1 + C / sigma_max^2)^{1/2} n + m / sigma_max

    Args:
        root: (n, f) -> f(C) n; mean: m; noise: n (B, ...), white.
    """
    largest = float(sampler.levels[0])
    return root(noise, lambda v: (1 + v / largest**2).sqrt()) + mean / largest


def gains(sampler: Sampler, variance: Tensor) -> Tensor:
    """How much of each of its K draws of noise a sampler leaves in a mode of a Gaussian: x = sum_k t_k n_k, (K, n).

    With the exact denoiser of N(0, diag(variance)) every sampler is linear in its noise and diagonal in the modes, so
    that its law there, N(0, diag(sum_k t_k^2)), takes no Monte Carlo: member k is given draw k as ones and no other.
    Deterministic samplers have K = 1. The start is ``start``'s.

    Args:
        variance: of the modes (n,), float64.
    """
    used = 0

    def noise_of(rows: int) -> NoiseSource:
        def noise(number: int) -> Tensor:
            nonlocal used
            used = max(used, number + 1)
            draw = torch.zeros(rows, len(variance), dtype=torch.float64)
            if number < rows:
                draw[number] = 1.0
            return start(sampler, lambda n, f: f(variance) * n, 0.0, draw) if number == 0 else draw

        return noise

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x * (variance / (variance + sigma.to(x) ** 2))

    sampler(denoiser, noise_of(1))
    return sampler(denoiser, noise_of(used))


def evaluations(sampler: Sampler) -> int:
    """How often a sampler evaluates the denoiser for one sample."""
    count = 0

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return 0 * x

    sampler(denoiser, lambda number: torch.zeros(1, 1, dtype=torch.float64))
    return count


@dataclass(frozen=True)
class Tail:
    """What a sampler does to a functional that is Gaussian: its standard deviation, over the true one."""

    ratio: float

    def probability_ratio(self, probability: float) -> float:
        """p of the sampler over p of the law, for a threshold that the law exceeds with ``probability``."""
        quantile = NORMAL.icdf(torch.tensor(1 - probability, dtype=torch.float64))
        return float(NORMAL.cdf(-quantile / self.ratio)) / probability

    def warning(self, probability: float = 1e-4, tolerance: float = 0.1) -> str | None:
        """One line, where the sampler's own error of such an event is above the tolerance."""
        ratio = self.probability_ratio(probability)
        if abs(ratio - 1) <= tolerance:
            return None
        factor = f"understates it {1 / ratio:.2g} times" if ratio < 1 else f"overstates it {ratio:.2g} times"
        return (
            f"this sampler gives a Gaussian functional {self.ratio:.4f} of its standard deviation: "
            f"of an event of probability {probability:g} it {factor}"
        )


def tail(sampler: Sampler, variance: Tensor, weights: Tensor) -> Tail:
    """Of the functional sum_j g_j x_j of modes with variances (n,); ``weights`` are the g_j^2 (n,)."""
    truth, law = (weights * variance).sum(), (weights * gains(sampler, variance).square().sum(0)).sum()
    return Tail(float((law / truth).sqrt()))


def draws_of(noise: Tensor, first: Callable[[Tensor], Tensor]) -> NoiseSource:
    """Draws (B, ...) one after the other out of one tensor (B, K, ...)."""

    def source(number: int) -> Tensor:
        if number >= noise.shape[1]:
            raise UserError(f"this sampler draws noise {number + 1} times or more, {noise.shape[1]} are given: choose an ODE sampler")
        draw = noise[:, number]
        return first(draw) if number == 0 else draw

    return source
