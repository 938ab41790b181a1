"""The words of diffusion: a denoiser estimates the clean trajectory; a sampler turns noise into a trajectory.

A guided denoiser is a denoiser, and windows composed into a long trajectory are a denoiser.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

#: (x_t (B, T, ...), sigma ()) -> E[x | x_t], the same shape, for x_t = x + sigma n
Denoiser = Callable[[Tensor, Tensor], Tensor]
#: (number of the step) -> white noise (B, T, ...) of the members, the same for any ensemble size
NoiseSource = Callable[[int], Tensor]


class Sampler(ABC):
    """Numerics only: integrates the reverse process of a denoiser from sigma_max to zero."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, noise: NoiseSource, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """A sample x_0, of the shape of ``noise(0)``. ``progress(step, steps)`` is called after each step."""
