"""Physical units to normalised anomalies and back."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

TRANSFORMS = ("identity", "log1p")


class Normalizer(ModelMixin, ConfigMixin):
    """Anomalies from a climatology, in units of one standard deviation per variable.

        z = (g(x) - m(t)) / s,    m(t) = a_0 + sum_p a_p cos(2 pi t / P_p) + b_p sin(2 pi t / P_p)

    with a climatology per cell, one scale s per variable, and g the identity or log(1 + x / x_0) (for amounts that
    are positive and skewed). Cells outside the mask are zero.

    Args:
        shape: (C, H, W).
        periods: seconds; harmonics of the climatology, such as a day and a year; empty for a constant mean.
        transforms: one of ``identity``, ``log1p`` per variable.
        offsets: x_0 per variable, in its units (used by log1p).
    """

    @register_to_config
    def __init__(self, shape: Sequence[int], periods: Sequence[float] = (), transforms: Sequence[str] = (), offsets: Sequence[float] = ()):
        super().__init__()
        c, h, w = shape
        self.transforms = tuple(transforms) or ("identity",) * c
        if len(self.transforms) != c or any(t not in TRANSFORMS for t in self.transforms):
            raise ValueError(f"transforms must be {c} of {TRANSFORMS}, got {self.transforms}")
        self.register_buffer("coefficients", torch.zeros(1 + 2 * len(periods), c, h, w))
        self.register_buffer("scale", torch.ones(c))
        self.register_buffer("mask", torch.ones(h, w))
        self.offsets = torch.tensor(list(offsets) or [1.0] * c)

    def transform(self, x: Tensor) -> Tensor:
        """g(x), (..., C, H, W)."""
        if all(t == "identity" for t in self.transforms):
            return x
        channels = [
            x[..., i, :, :] if t == "identity" else torch.log1p(x[..., i, :, :].clamp(min=0) / self.offsets[i])
            for i, t in enumerate(self.transforms)
        ]
        return torch.stack(channels, dim=-3)

    def untransform(self, g: Tensor) -> Tensor:
        """The inverse of ``transform``."""
        if all(t == "identity" for t in self.transforms):
            return g
        channels = [
            g[..., i, :, :] if t == "identity" else torch.expm1(g[..., i, :, :].clamp(min=0)) * self.offsets[i]
            for i, t in enumerate(self.transforms)
        ]
        return torch.stack(channels, dim=-3)

    def features(self, time: Tensor) -> Tensor:
        """(..., 1 + 2 P): one, then cosines and sines of the harmonics at ``time`` (seconds since 1970, float64)."""
        columns = [torch.ones_like(time)]
        for period in self.config.periods:
            angle = 2 * torch.pi * torch.remainder(time, period) / period
            columns += [torch.cos(angle), torch.sin(angle)]
        return torch.stack(columns, dim=-1)

    def climatology(self, time: Tensor) -> Tensor:
        """m(t) in transformed units, (..., C, H, W) for times (...)."""
        features = self.features(time).to(self.coefficients)
        return torch.einsum("...p,pchw->...chw", features, self.coefficients)

    def forward(self, fields: Tensor, time: Tensor) -> Tensor:
        """Normalised anomalies of fields (..., T, C, H, W) at times (..., T)."""
        anomalies = (self.transform(fields) - self.climatology(time)) / self.scale[:, None, None]
        return anomalies * self.mask

    def inverse(self, anomalies: Tensor, time: Tensor) -> Tensor:
        """Fields in physical units."""
        return self.untransform(anomalies * self.scale[:, None, None] + self.climatology(time))

    def derivative(self, anomalies: Tensor, time: Tensor) -> Tensor:
        """d inverse / d anomalies, cell by cell, of the shape of ``anomalies``."""
        slope = self.scale[:, None, None].expand_as(anomalies)
        if all(t == "identity" for t in self.transforms):
            return slope
        g = anomalies * self.scale[:, None, None] + self.climatology(time)
        channels = [
            slope[..., i, :, :] if t == "identity" else slope[..., i, :, :] * torch.exp(g[..., i, :, :].clamp(min=0)) * self.offsets[i]
            for i, t in enumerate(self.transforms)
        ]
        return torch.stack(channels, dim=-3)

    @torch.no_grad()
    def fit(self, fields: Tensor, time: Tensor, mask: Tensor) -> "Normalizer":
        """Least squares of the climatology and pooled standard deviations, from fields (N, T, C, H, W) and times (T,)."""
        self.mask.copy_(mask)
        features = self.features(time)
        moment = torch.zeros(features.shape[1], *fields.shape[2:], dtype=torch.float64)
        for trajectory in fields:
            moment += torch.einsum("tp,tchw->pchw", features, self.transform(trajectory).double())
        gram = features.T @ features * fields.shape[0]
        self.coefficients.copy_(torch.linalg.solve(gram, moment.flatten(1)).reshape(moment.shape).to(self.coefficients))
        variance = torch.zeros(fields.shape[2], dtype=torch.float64)
        for trajectory in fields:
            anomaly = (self.transform(trajectory) - self.climatology(time)) * self.mask
            variance += anomaly.double().square().sum((0, 2, 3))
        count = fields.shape[0] * fields.shape[1] * mask.double().sum()
        self.scale.copy_((variance / count).sqrt().clamp(min=1e-12).to(self.scale))
        return self
