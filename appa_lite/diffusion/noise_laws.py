"""Laws of the noise that a diffusion adds: Gaussians whose scale a whole field shares.

    n = s g,    g ~ N(0, I),  s > 0 one number a field

Every isotropic law of this kind obeys the same probability flow, dx/dsigma = (x - D(x, sigma)) / sigma for
x = z + sigma n and D = E[z | x], so that deterministic samplers serve unchanged once they start from sigma_max n.
"""

import math
from abc import ABC, abstractmethod

import torch
from scipy.special import gammaincinv
from torch import Tensor

from appa_lite.core.errors import UserError


class NoiseLaw(ABC):
    """The law of the shared scale s."""

    @abstractmethod
    def scale(self, uniform: Tensor) -> Tensor:
        """s (...) from two uniform numbers each, (..., 2), float64."""


class Gaussian(NoiseLaw):
    """s = 1."""

    def scale(self, uniform: Tensor) -> Tensor:
        return torch.ones_like(uniform[..., 0])


class Student(NoiseLaw):
    """s^2 = (nu - 2) / chi2_nu: Student's t with nu degrees of freedom and unit variance (t-EDM, Pandey et al. 2025).

    Pandey et al. scale the noise by sqrt(nu / chi2_nu) and correct their preconditioning by nu / (nu - 2); with a noise of
    unit variance sigma is its standard deviation, and the preconditioning is EDM's.

    Args:
        degrees: nu, above 2; the tail index of the data is 1 / nu.

    Raises:
        UserError: no finite variance.
    """

    def __init__(self, degrees: float = 4.0):
        if not degrees > 2:
            raise UserError(f"Student noise needs degrees above 2, where its variance is finite, got {degrees}")
        self.degrees = degrees

    def scale(self, uniform: Tensor) -> Tensor:
        clipped = uniform[..., 0].double().cpu().numpy().clip(1e-12, 1 - 1e-12)
        chi2 = torch.from_numpy(2 * gammaincinv(self.degrees / 2, clipped))
        return ((self.degrees - 2) / chi2).sqrt().to(uniform)


class Stable(NoiseLaw):
    """s^2 = A: an isotropic stable law of index alpha, characteristic function exp(-|u|^alpha / 2^(alpha / 2)).

    A ~ S(alpha / 2, beta = 1, scale cos(pi alpha / 4)^(2 / alpha)) is positive and totally skewed, with Laplace transform
    E exp(-l A) = exp(-l^(alpha / 2)), and drawn by Kanter's formula (1975): with U uniform in (0, pi), W exponential, a = alpha / 2,

        A = sin(a U) / sin(U)^(1 / a) (sin((1 - a) U) / W)^((1 - a) / a)

    The sum of noises with scales c_i is one of scale (sum c_i^alpha)^(1 / alpha). alpha = 2 is Gaussian.

    Args:
        alpha: in (0, 2); the noise has tail index 1 / alpha, and no variance.

    Raises:
        UserError: another alpha.
    """

    def __init__(self, alpha: float = 1.8):
        if not 0 < alpha < 2:
            raise UserError(f"stable noise needs alpha between 0 and 2, got {alpha}")
        self.alpha = alpha

    def scale(self, uniform: Tensor) -> Tensor:
        return self.square(uniform).sqrt()

    def square(self, uniform: Tensor) -> Tensor:
        """A (...) from (..., 2) uniform numbers."""
        a = self.alpha / 2
        u = math.pi * uniform[..., 0].double().clamp(1e-12, 1 - 1e-12)
        w = -torch.log(uniform[..., 1].double().clamp(1e-300, 1 - 1e-16))
        return (torch.sin(a * u) / torch.sin(u) ** (1 / a) * (torch.sin((1 - a) * u) / w) ** ((1 - a) / a)).to(uniform)


def seen_level(x: Tensor, sigma: Tensor, quiet: Tensor) -> Tensor:
    """The noise level (B,) that fields x (B, T, ...) show: sigma, or more where their noise came out far larger.

    Of noises without a variance, one field in a hundred has many times the scale of its level, which all its cells share
    and which can therefore be read off the directions ``quiet`` (D, K) in which the data hardly vary: half the root mean
    square there, where that is more than sigma. Without this a network would meet inputs of any size.
    """
    rms = (x.flatten(2) @ quiet).square().mean((1, 2)).sqrt()
    return torch.maximum(sigma.to(rms).expand(len(x)), rms / 2)
