"""The identity autoencoder: diffusion in state space, so that state-space and latent-space runs can be compared."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from appa_lite.models.base import Autoencoder


class IdentityAutoencoder(Autoencoder, ModelMixin, ConfigMixin):
    """z = x. Args: ``shape``: (C, H, W) of a frame."""

    @register_to_config
    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.register_buffer("unit", torch.ones(1))  # a file of weights needs at least one tensor
        self.stride = (1, 1, 1)
        self.latent_shape = tuple(shape)
        self.reach = 0

    def encode(self, fields: Tensor) -> Tensor:
        return fields

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def decode_linear(self, latents: Tensor) -> Tensor:
        return latents
