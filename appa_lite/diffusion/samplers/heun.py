"""Heun's method on the probability flow: the deterministic sampler of EDM."""

from collections.abc import Iterator

from torch import Tensor

from appa_lite.diffusion.base import Denoiser
from appa_lite.diffusion.samplers.stepped import Draw, SteppedSampler


class Heun(SteppedSampler):
    """Second-order Runge-Kutta (trapezoidal) step of dx/dsigma = (x - D(x, sigma)) / sigma.

        z = (x_i - D(x_i, s_i)) / s_i,  x' = x_i + (s_{i+1} - s_i) z,  z' = (x' - D(x', s_{i+1})) / s_{i+1}
        x_{i+1} = x_i + (s_{i+1} - s_i) (z + z') / 2

    Karras et al. 2022, algorithm 1. Where levels fall by more than a factor of two or so, the step overshoots.

    Args:
        steps: noise levels; the denoiser is evaluated ``2 steps - 1`` times.
        sigma_max, sigma_min: first and last noise level, in units of the latents.
        schedule: 'log_uniform' or 'edm'.
    """

    def __init__(self, steps: int = 64, sigma_max: float = 1000.0, sigma_min: float = 0.01, schedule: str = "log_uniform"):
        super().__init__(steps, sigma_max, sigma_min, schedule)

    def walk(self, x: Tensor, denoiser: Denoiser, draw: Draw) -> Iterator[Tensor]:
        for sigma, after in self.transitions():
            slope = (x - denoiser(x, sigma)) / sigma
            ahead = x + (after - sigma) * slope
            x = x + (after - sigma) / 2 * (slope + (ahead - denoiser(ahead, after)) / after)
            yield x
