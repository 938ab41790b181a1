"""The spatiotemporal autoencoder: a lapped linear transform with a learned nonlinear correction on both sides."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from appa_lite.models.base import Autoencoder
from appa_lite.nn.blocks import SpatialConv, TemporalConv, shift


class Lapped(nn.Module):
    """A space-time convolution of tokens (B, T, h, w, d): each output sees ``kernel`` neighbouring patches, so that
    reconstructions have no blocks."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], periodic: tuple[bool, bool]):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.conv = SpatialConv(3 * inputs, outputs, kernel, periodic)
        self.conv.conv.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([shift(x, s) for s in (-1, 0, 1)], dim=-1))

    @torch.no_grad()
    def set_centre(self, matrix: Tensor) -> None:
        """Make it act on each patch alone, by ``matrix`` (outputs, inputs)."""
        weight = self.conv.conv.weight
        weight.zero_()
        weight[:, self.inputs : 2 * self.inputs, weight.shape[2] // 2, weight.shape[3] // 2] = matrix.to(weight)


class ResidualStack(nn.Module):
    """Tokens to tokens: convolutions in space and time, with a zero last layer."""

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, kernel: tuple[int, int], periodic: tuple[bool, bool]):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.space = nn.ModuleList([SpatialConv(width, width, kernel, periodic) for _ in range(depth)])
        self.time = nn.ModuleList([TemporalConv(width) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(depth)])
        self.last = nn.Linear(width, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, space, time in zip(self.norms, self.space, self.time, strict=True):
            x = x + time(nn.functional.silu(space(norm(x))))
        return self.last(nn.functional.silu(x))


def fold(weight: Tensor, size: int) -> None:
    """Add the weights (outputs, 3 size, ...) of the frames before and after to those of the frame between, in place."""
    before, centre, after = weight.split(size, dim=1)
    total = before + centre + after
    weight.zero_()
    weight[:, size : 2 * size] = total


class SpatiotemporalAutoencoder(Autoencoder, ModelMixin, ConfigMixin):
    """Compresses windows of normalised fields in time and space.

        z = (W x + f(x, mask) - m) / s,      x = V (s z + m) + g(s z + m, mask)

    W and V are lapped linear transforms (they start as the principal components of a patch), f and g are
    convolutional corrections that start at zero, m and s make the latents' channels of mean zero and variance one.

    Args:
        shape: (C, H, W) of a frame; stride: (frames, rows, columns) in a patch; channels: Z, numbers kept per patch;
        width, depth: of the corrections; lap: patches (odd) seen by the linear transforms; kernel: of the corrections;
        periodic: (rows, columns) wrap around.
    """

    _repeated_blocks = ["ResidualStack"]  #: units of sharding, compilation and recomputation

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        stride: Sequence[int] = (2, 4, 4),
        channels: int = 8,
        width: int = 96,
        depth: int = 2,
        lap: int = 5,
        kernel: int = 3,
        periodic: Sequence[bool] = (False, False),
    ):
        super().__init__()
        c, h, w = shape
        p, q, r = stride
        if h % q or w % r:
            raise ValueError(f"the grid {h} x {w} must be a multiple of the stride {q} x {r}")
        self.stride, self.latent_shape = tuple(stride), (channels, h // q, w // r)
        self.reach = 1
        patch, wraps = c * p * q * r, tuple(periodic)
        lapped, small = (min(lap, 2 * (h // q) - 1), lap), (kernel if h // q > 1 else 1, kernel)
        self.analysis = Lapped(patch, channels, lapped, wraps)
        self.synthesis = Lapped(channels, patch, lapped, wraps)
        self.encoder = ResidualStack(patch + q * r, channels, width, depth, small, wraps)
        self.decoder = ResidualStack(channels + q * r, patch, width, depth, small, wraps)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.register_buffer("mask", torch.ones(h, w))

    def patches(self, fields: Tensor) -> Tensor:
        """(B, T, C, H, W) to tokens (B, T/p, h, w, C p q r)."""
        p, q, r = self.stride
        if fields.shape[1] % p:
            raise ValueError(f"a window of {fields.shape[1]} frames is not a multiple of the stride {p}")
        return rearrange(fields, "b (t p) c (h q) (w r) -> b t h w (c p q r)", p=p, q=q, r=r)

    def unpatch(self, tokens: Tensor) -> Tensor:
        p, q, r = self.stride
        return rearrange(tokens, "b t h w (c p q r) -> b (t p) c (h q) (w r)", p=p, q=q, r=r)

    def _with_mask(self, tokens: Tensor) -> Tensor:
        _, q, r = self.stride
        mask = rearrange(self.mask, "(h q) (w r) -> h w (q r)", q=q, r=r)
        return torch.cat([tokens, mask.expand(*tokens.shape[:-1], -1).to(tokens)], dim=-1)

    def encode(self, fields: Tensor) -> Tensor:
        tokens = self.patches(fields * self.mask)
        raw = self.analysis(tokens) + self.encoder(self._with_mask(tokens))
        return ((raw - self.latent_mean) / self.latent_std).movedim(-1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        raw = latents.movedim(2, -1) * self.latent_std + self.latent_mean
        tokens = self.synthesis(raw) + self.decoder(self._with_mask(raw))
        return self.unpatch(tokens) * self.mask

    def decode_linear(self, latents: Tensor) -> Tensor:
        raw = latents.movedim(2, -1) * self.latent_std
        return self.unpatch(self.synthesis(raw)) * self.mask

    def forward(self, fields: Tensor) -> Tensor:
        """The reconstruction, before the latents are standardised (their scale cancels)."""
        return self.decode(self.encode(fields))

    @torch.no_grad()
    def start_from_components(self, fields: Tensor, weights: Tensor) -> None:
        """Set W and V to the leading principal components of patches of fields (N, T, C, H, W), variables weighted."""
        p, q, r = self.stride
        weight = weights.sqrt().repeat_interleave(p * q * r).double()
        tokens = torch.cat([self.patches(f[None] * self.mask).flatten(0, 3) for f in fields]).double() * weight
        _, vectors = torch.linalg.eigh(tokens.T @ tokens)
        leading = vectors[:, -self.config.channels :].flip(-1).T
        self.analysis.set_centre(leading * weight)
        self.synthesis.set_centre((leading / weight).T)

    @torch.no_grad()
    def forget_neighbours(self) -> None:
        """Make every latent frame its own affair, changing nothing for windows of one.

        There the frames before and after are the frame itself repeated, and what their weights learned is a part of its own:
        the three add up. Left alone, they would meet other frames only when the model is used.
        """
        for lapped in (self.analysis, self.synthesis):
            fold(lapped.conv.conv.weight, lapped.inputs)
        for stack in (self.encoder, self.decoder):
            for time in stack.time:
                fold(time.taps.weight, time.taps.out_features)

    @torch.no_grad()
    def standardise(self, fields: Tensor) -> None:
        """Make the latents of fields (N, T, C, H, W) have channels of mean zero and variance one."""
        self.latent_mean.zero_()
        self.latent_std.fill_(1.0)
        latents = torch.cat([self.encode(f[None]) for f in fields])
        self.latent_mean.copy_(latents.mean((0, 1, 3, 4)))
        self.latent_std.copy_(latents.std((0, 1, 3, 4)).clamp(min=1e-6))
