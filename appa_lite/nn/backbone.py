"""The network that all next-state models share: states and conditioning in, an increment out."""

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from appa_lite.nn.blocks import Attention, SpatialConv

CONDITION = 32  #: numbers that reach the conditional layer norms, whatever they come from


class ConditionalNorm(nn.Module):
    """Layer norms whose scale, shift and gate depend on a condition: ``parts`` chunks of b + W c.

    W starts at 1e-8, as in FGN (Alet et al. 2025): at first the condition does next to nothing. Without a condition (size 0)
    these are plain layer norms with a learned gate (Peebles and Xie 2023, adaLN-zero: a block starts as the identity).
    """

    def __init__(self, width: int, parts: int, condition: int):
        super().__init__()
        self.width, self.parts = width, parts
        self.bias = nn.Parameter(torch.zeros(parts * width))
        self.linear = nn.Linear(condition, parts * width, bias=False) if condition else None
        if self.linear is not None:
            nn.init.normal_(self.linear.weight, std=1e-8)

    def forward(self, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Chunks (..., width) for a condition (B, h or 1, w or 1, c)."""
        values = self.bias if self.linear is None else self.bias + self.linear(condition)
        return values.chunk(self.parts, dim=-1)


class SpatialBlock(nn.Module):
    """Convolution in space, attention over space where asked, and a two-layer perceptron; each residual, behind a
    conditional layer norm. `SpaceTimeBlock` without time."""

    def __init__(
        self, width: int, hidden: int, heads: int, kernel: tuple[int, int], periodic: tuple[bool, bool], attention: bool, condition: int
    ):
        super().__init__()
        self.space = SpatialConv(width, width, kernel, periodic)
        self.attention = Attention(width, heads) if attention else None
        self.mlp = Mlp(width, hidden, act_layer=nn.SiLU)
        self.modulation = ConditionalNorm(width, 9 if attention else 6, condition)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Tokens (B, h, w, d), conditioning (B, h or 1, w or 1, c) or None."""
        parts = self.modulation(condition)
        branches = (self._convolve, self.mlp) if self.attention is None else (self._convolve, self._attend, self.mlp)
        for i, branch in enumerate(branches):
            scale, shift, gate = parts[3 * i : 3 * i + 3]
            x = x + gate * branch(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        return x

    def _convolve(self, x: Tensor) -> Tensor:
        return self.space(x[:, None])[:, 0]

    def _attend(self, x: Tensor) -> Tensor:
        return self.attention(x.flatten(1, 2)).reshape(x.shape)


class Backbone(nn.Module):
    """Fields (B, inputs, H, W) and a condition to fields (B, outputs, H, W); the output starts at zero.

    Args:
        inputs, outputs: channels; grid: (H, W); periodic: (rows, columns) wrap around; condition: its size, 0 for none;
        width, depth: of the tokens, and how many blocks; hidden: of the perceptrons, None: 2 width;
        kernel: of the convolutions, in tokens (one row has a kernel of one); patch: rows and columns in a token;
        attention: over space, in every second block, with ``heads``; homogeneous: True where every place is alike (a ring),
        else the network knows where it is.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        grid: tuple[int, int],
        periodic: tuple[bool, bool],
        condition: int = 0,
        width: int = 64,
        depth: int = 4,
        hidden: int | None = None,
        kernel: int = 3,
        patch: tuple[int, int] = (1, 1),
        attention: bool = False,
        heads: int = 4,
        homogeneous: bool = False,
    ):
        super().__init__()
        q, r = self.patch = tuple(patch)
        if grid[0] % q or grid[1] % r:
            raise ValueError(f"states of {grid[0]} x {grid[1]} cells are not a multiple of the patch {q} x {r}")
        if kernel % 2 == 0:
            raise ValueError(f"the kernel {kernel} must be odd")
        self.tokens = (grid[0] // q, grid[1] // r)
        kernels = tuple(1 if n == 1 else kernel for n in self.tokens)
        self.inputs = nn.Linear(inputs * q * r, width)
        self.place = None if homogeneous else nn.Parameter(torch.zeros(*self.tokens, width))
        hidden = 2 * width if hidden is None else hidden
        self.blocks = nn.ModuleList(
            [SpatialBlock(width, hidden, heads, kernels, tuple(periodic), attention and i % 2 == 1, condition) for i in range(depth)]
        )
        self.modulation = ConditionalNorm(width, 2, condition)
        self.outputs = nn.Linear(width, outputs * q * r)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Condition (B, h or 1, w or 1, c) over the tokens."""
        (h, w), (q, r) = self.tokens, self.patch
        tokens = x.unflatten(-1, (w, r)).unflatten(-3, (h, q)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        tokens = self.inputs(tokens)
        if self.place is not None:
            tokens = tokens + self.place
        for block in self.blocks:
            tokens = block(tokens, condition)
        scale, shift = self.modulation(condition)
        tokens = self.outputs(F.layer_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift)
        return tokens.unflatten(-1, (-1, q, r)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Level(nn.Module):
    """A condition from a noise level or a time: a perceptron of Fourier features, (B,) to (B, 1, 1, CONDITION).

    Frequencies are at equal ratios, so that values from about 0.01 to 10 are told apart.
    """

    def __init__(self, frequencies: int = 16):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, 1, frequencies), persistent=False)
        self.first = nn.Linear(2 * frequencies, CONDITION)
        self.second = nn.Linear(CONDITION, CONDITION)

    def forward(self, value: Tensor) -> Tensor:
        angle = value[:, None] * self.frequencies * torch.pi
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.second(F.silu(self.first(features)))[:, None, None]


def parameters(module: nn.Module) -> int:
    """The number of parameters of a network, trained or frozen."""
    return sum(p.numel() for p in module.parameters())
