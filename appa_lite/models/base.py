"""What autoencoders and next-state models promise."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Autoencoder(ABC):
    """Windows of normalised fields (B, T, C, H, W) to latents (B, T / stride[0], Z, h, w) and back."""

    stride: tuple[int, int, int]  #: cells per latent cell along (time, y, x)
    latent_shape: tuple[int, int, int]  #: (Z, h, w)
    reach: int  #: latent frames on either side that one latent frame touches through decode_linear

    @abstractmethod
    def encode(self, fields: Tensor) -> Tensor:
        """Latents of normalised fields; T must be a multiple of stride[0]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised fields of latents."""

    @abstractmethod
    def decode_linear(self, latents: Tensor) -> Tensor:
        """The linear part L of decode(z) = L z + constant + (small nonlinear correction); for identity, z itself.

        Posterior solves use it as the decoder's Jacobian: the same for all members and noise levels, so that one
        solve serves a whole batch. What a member is compared with is always ``decode`` itself.
        """


class Emulator(ABC):
    """The law of the next latent state given the last ones, p(z_{t+1} | z_t, z_{t-1}); a forecaster rolls it out.

    Increments are predicted in units of ``scale``, their standard deviation per channel; cells outside ``mask`` stay zero.
    """

    forecaster: str  #: the option of configs/forecaster that rolls it out
    history: int  #: states that it is given
    scale: Tensor  #: (Z, 1, 1)
    mask: Tensor  #: (h, w), one where a cell exists

    def start(self, shape: tuple[int, int, int], history: int) -> None:
        """Part of the constructor: the history and the buffers, for states (Z, h, w)."""
        if history < 1:
            raise ValueError(f"history={history} must be at least 1")
        self.history = history
        self.register_buffer("scale", torch.ones(shape[0], 1, 1))
        self.register_buffer("mask", torch.ones(*shape[1:]))

    def roll(self, known: Tensor, steps: int, increment: Callable[[Tensor, int], Tensor], through_time: bool = True) -> Tensor:
        """The next states (B, steps, Z, h, w) of known ones (B, history, Z, h, w): x + scale * increment(known, step).

        Gradients flow from step to step, unless ``through_time`` is False: then each step takes what it is given as fixed.
        """
        states = []
        for step in range(steps):
            states.append(known[:, -1] + self.mask * self.scale * increment(known, step))
            known = torch.cat([known[:, 1:], states[-1][:, None]], dim=1)
            known = known if through_time else known.detach()
        return torch.stack(states, dim=1)
