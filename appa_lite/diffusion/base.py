"""The words of diffusion: a denoiser estimates the clean trajectory; a sampler turns noise into a trajectory.

A guided denoiser is a denoiser, and windows composed into a long trajectory are a denoiser.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from appa_lite.core.errors import UserError

LARGEST = 100  #: first noise levels, which are far above all that a prior holds

#: (x_t (B, T, ...), sigma ()) -> E[x | x_t], the same shape, for x_t = x + sigma n
Denoiser = Callable[[Tensor, Tensor], Tensor]
#: (number of the step) -> white noise (B, T, ...) of the members, the same for any ensemble size
NoiseSource = Callable[[int], Tensor]


class Sampler(ABC):
    """Numerics only: integrates the reverse process of a denoiser from sigma_max to zero."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, noise: NoiseSource, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """A sample x_0, of the shape of ``noise(0)``. ``progress(step, steps)`` is called after each step."""


@dataclass(frozen=True)
class Twist:
    """A posterior denoiser's opinion of x_t: D(x_t) and E[x | x_t, y], (B, T, ...), and log p~(y | x_t), (B,), up to a
    constant that all members share."""

    prior: Tensor
    posterior: Tensor
    log_likelihood: Tensor


class GuidedDenoiser(ABC):
    """The denoiser of a posterior. Most know the Gaussian N(y; A D(x_t), R + A C A^T) that they take for p(y | x_t)."""

    @abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x | x_t, y]."""

    def twist(self, x: Tensor, sigma: Tensor) -> Twist:
        """The same with what it is a correction of, and the logarithm of the Gaussian at y.

        Raises:
            UserError: this guidance has no such Gaussian, or its determinant is out of reach.
        """
        raise UserError("this guidance has no Gaussian for p(y | x_t) that could weigh particles: choose guidance=moment_matching or mmps")


def check_sample(x: Tensor, sigma_max: float) -> None:
    """Raise FloatingPointError if the reverse process diverged: not finite, or beyond ``LARGEST`` first noise levels."""
    largest = float(x.detach().abs().max())
    if not largest < LARGEST * sigma_max:
        raise FloatingPointError(
            f"the sampler diverged (largest value {largest:.2g}, noise from {sigma_max:.3g}): take more steps, check the "
            "observation errors, or choose another guidance"
        )
