"""Bricks of space-time networks: tokens (B, T, h, w, d) in, tokens out."""

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn


def pad(x: Tensor, amount: tuple[int, int], periodic: tuple[bool, bool]) -> Tensor:
    """Pad images (N, C, H, W): a periodic axis wraps, a walled one repeats its edge."""
    for axis, (n, wraps) in enumerate(zip(amount, periodic, strict=True)):
        if n:
            sides = (0, 0, n, n) if axis == 0 else (n, n, 0, 0)
            x = F.pad(x, sides, mode="circular" if wraps else "replicate")
    return x


def shift(x: Tensor, frames: int) -> Tensor:
    """x[t + frames], of tokens (B, T, ...), the first and last frames repeated."""
    n = min(abs(frames), x.shape[1])
    if n == 0:
        return x
    edge = x[:, -1:] if frames > 0 else x[:, :1]
    edge = edge.expand(-1, n, *[-1] * (x.ndim - 2))
    return torch.cat([x[:, n:], edge] if frames > 0 else [edge, x[:, :-n]], dim=1)


class SpatialConv(nn.Module):
    """A convolution of each frame that knows its boundaries; an axis of length one has a kernel of length one."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], periodic: tuple[bool, bool]):
        super().__init__()
        self.amount = (kernel[0] // 2, kernel[1] // 2)
        self.periodic = periodic
        self.conv = nn.Conv2d(inputs, outputs, kernel)

    def forward(self, x: Tensor) -> Tensor:
        b, t, h, w, d = x.shape
        images = x.reshape(b * t, h, w, d).permute(0, 3, 1, 2)
        out = self.conv(pad(images, self.amount, self.periodic))
        return out.permute(0, 2, 3, 1).reshape(b, t, h, w, -1)


class TemporalConv(nn.Module):
    """A convolution in time at every place; the ends of a window repeat."""

    def __init__(self, width: int, kernel: int = 3):
        super().__init__()
        self.half = kernel // 2
        self.taps = nn.Linear(kernel * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.taps(torch.cat([shift(x, s) for s in range(-self.half, self.half + 1)], dim=-1))


class Attention(nn.Module):
    """Multi-head self-attention over the last-but-one axis, with a learned bias by distance where ``distances`` > 0.

    softmax(q k^T / sqrt(d) + b(i - j)) v; Vaswani et al. 2017, relative bias as in T5 (Raffel et al. 2020).
    """

    def __init__(self, width: int, heads: int, distances: int = 0):
        super().__init__()
        if width % heads:
            raise ValueError(f"the width {width} must be a multiple of the heads {heads}")
        self.heads, self.distances = heads, distances
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * distances + 1)) if distances else None

    def forward(self, x: Tensor) -> Tensor:
        *lead, n, d = x.shape
        q, k, v = self.qkv(x).reshape(-1, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        bias = None
        if self.bias is not None:
            index = torch.arange(n, device=x.device)
            offset = (index[:, None] - index[None, :]).clamp(-self.distances, self.distances) + self.distances
            bias = self.bias[:, offset].to(q.dtype).unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(*lead, n, d))


class SpaceTimeBlock(nn.Module):
    """Convolution in space and time, attention over time (and over space where asked), and a two-layer perceptron.

    Each is residual, behind an adaptive layer norm whose scale, shift and gate come from the conditioning
    (adaLN-zero, Peebles and Xie 2023): the block starts as the identity.
    """

    def __init__(self, width: int, heads: int, kernel: tuple[int, int], periodic: tuple[bool, bool], frames: int, spatial_attention: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 9 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.space = SpatialConv(width, width, kernel, periodic)
        self.time = TemporalConv(width)
        self.temporal = Attention(width, heads, distances=frames - 1)
        self.spatial = Attention(width, heads) if spatial_attention else None
        self.mlp = Mlp(width, 2 * width, act_layer=nn.SiLU)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, T, h, w, d), conditioning (B, T, d) or (B, 1, d)."""
        parts = self.modulation(F.silu(condition))[:, :, None, None].chunk(9, dim=-1)
        for i, branch in enumerate((self._convolve, self._attend, self.mlp)):
            scale, shift, gate = parts[3 * i : 3 * i + 3]
            x = x + gate * branch(self.norm(x) * (1 + scale) + shift)
        return x

    def _convolve(self, x: Tensor) -> Tensor:
        return self.time(F.silu(self.space(x)))

    def _attend(self, x: Tensor) -> Tensor:
        b, t, h, w, d = x.shape
        out = self.temporal(x.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)
        if self.spatial is not None:
            out = out + self.spatial(x.reshape(b, t, h * w, d)).reshape(b, t, h, w, d)
        return out


class SpaceTimeConv(nn.Module):
    """A joint convolution in time and space, (B, C, T, h, w) to (B, outputs, T, h, w); the ends of a window repeat."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], periodic: tuple[bool, bool]):
        super().__init__()
        self.amount, self.periodic = tuple(k // 2 for k in kernel), (False, *periodic)
        self.conv = nn.Conv3d(inputs, outputs, kernel)

    def forward(self, x: Tensor) -> Tensor:
        for wraps, mode in ((False, "replicate"), (True, "circular")):
            amount = [n if w == wraps else 0 for n, w in zip(self.amount, self.periodic, strict=True)]
            if any(amount):
                x = F.pad(x, [n for n in reversed(amount) for _ in range(2)], mode=mode)
        return self.conv(x)


class ConvolutionBlock(nn.Module):
    """Two joint convolutions in space and time with a product between them, residual, behind an adaptive layer norm.

        x += g W2 * ((W1 * y) (V1 * y)),    y = adaLN(x)

    The product of two linear maps (a bilinear unit: Dauphin et al. 2017, Shazeer 2020) is what advection and other quadratic
    dynamics are made of. The gate g is zero at first (adaLN-zero, Peebles and Xie 2023): the block starts as the identity.
    """

    def __init__(self, width: int, kernel: tuple[int, int], periodic: tuple[bool, bool]):
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.first = SpaceTimeConv(width, 4 * width, (3, *kernel), periodic)
        self.second = SpaceTimeConv(2 * width, width, (3, *kernel), periodic)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, T, h, w, d), conditioning (B, T, d) or (B, 1, d)."""
        scale, shift, gate = self.modulation(F.silu(condition))[:, :, None, None].chunk(3, dim=-1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        a, b = self.first(y.movedim(-1, 1)).chunk(2, dim=1)
        return x + gate * self.second(a * b).movedim(1, -1)
