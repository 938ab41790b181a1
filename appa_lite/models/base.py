"""What every autoencoder promises."""

from abc import ABC, abstractmethod

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
