"""Physical units to normalised anomalies and back."""

from collections.abc import Callable, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from appa_lite.models.margins import Margin

TRANSFORMS = ("identity", "log1p", "gaussianize")


class Normalizer(ModelMixin, ConfigMixin):
    """Anomalies from a climatology, in units of one standard deviation per variable.

        z = (g(x) - m(t)) / s,    m(t) = a_0 + sum_p a_p cos(2 pi t / P_p) + b_p sin(2 pi t / P_p)

    with a climatology per cell, one scale s per variable, and g one of

    - ``identity``;
    - ``log1p``: log(1 + x / x_0), for amounts that are positive and skewed;
    - ``gaussianize``: Phi^{-1}(F(x)), F fitted to the values of all cells and times, with generalised Pareto tails and
      dry cells (see ``Margin``). The tail is then the transform's, and the law that a model has to learn has none.

    Cells outside the mask are zero.

    Args:
        shape: (C, H, W).
        periods: seconds; harmonics of the climatology, such as a day and a year; empty for a constant mean.
        transforms: one of ``identity``, ``log1p``, ``gaussianize`` per variable.
        offsets: x_0 per variable, in its units (used by log1p).
        periodic: (rows, columns) wrap around (used by gaussianize).
    """

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        periods: Sequence[float] = (),
        transforms: Sequence[str] = (),
        offsets: Sequence[float] = (),
        periodic: Sequence[bool] = (False, False),
    ):
        super().__init__()
        c, h, w = shape
        self.transforms = tuple(transforms) or ("identity",) * c
        if len(self.transforms) != c or any(t not in TRANSFORMS for t in self.transforms):
            raise ValueError(f"transforms must be {c} of {TRANSFORMS}, got {self.transforms}")
        self.register_buffer("coefficients", torch.zeros(1 + 2 * len(periods), c, h, w))
        self.register_buffer("scale", torch.ones(c))
        self.register_buffer("mask", torch.ones(h, w))
        self.offsets = torch.tensor(list(offsets) or [1.0] * c)
        self.margins = nn.ModuleDict({str(i): Margin(periodic) for i, t in enumerate(self.transforms) if t == "gaussianize"})

    @property
    def nonlinear(self) -> bool:
        """Whether some variable is transformed."""
        return any(t != "identity" for t in self.transforms)

    def _by_channel(self, x: Tensor, functions: dict[str, Callable[[int, Tensor], Tensor]]) -> Tensor:
        """``functions[transform](i, channel i)`` of (..., C, H, W), the identity where there is none."""
        if not self.nonlinear:
            return x
        channels = zip(self.transforms, x.unbind(-3), strict=True)
        return torch.stack([functions.get(t, lambda _, c: c)(i, channel) for i, (t, channel) in enumerate(channels)], dim=-3)

    def transform(self, x: Tensor) -> Tensor:
        """g(x), (..., C, H, W)."""
        log = lambda i, c: torch.log1p(c.clamp(min=0) / self.offsets[i])  # noqa: E731
        return self._by_channel(x, {"log1p": log, "gaussianize": lambda i, c: self.margins[str(i)](c)})

    def untransform(self, g: Tensor, continued: bool = False) -> Tensor:
        """The inverse of ``transform``; ``continued``: strictly increasing below a point mass, as ``Margin.continued``."""
        exp = lambda i, c: torch.expm1(c.clamp(min=0)) * self.offsets[i]  # noqa: E731
        value = lambda i, c: self.margins[str(i)].continued(c) if continued else self.margins[str(i)].inverse(c)  # noqa: E731
        return self._by_channel(g, {"log1p": exp, "gaussianize": value})

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

    def inverse(self, anomalies: Tensor, time: Tensor, continued: bool = False) -> Tensor:
        """Fields in physical units; ``continued``: see ``untransform``."""
        return self.untransform(anomalies * self.scale[:, None, None] + self.climatology(time), continued)

    def derivative(self, anomalies: Tensor, time: Tensor, continued: bool = False) -> Tensor:
        """d inverse / d anomalies, cell by cell, of the shape of ``anomalies``."""
        g = anomalies * self.scale[:, None, None] + self.climatology(time)
        functions = {
            "identity": lambda i, c: torch.ones_like(c),
            "log1p": lambda i, c: torch.exp(c.clamp(min=0)) * self.offsets[i],
            "gaussianize": lambda i, c: self.margins[str(i)].slope_continued(c) if continued else self.margins[str(i)].slope(c),
        }
        slope = self.scale[:, None, None].expand_as(anomalies)
        return slope * self._by_channel(g, functions) if self.nonlinear else slope

    @torch.no_grad()
    def fit(self, fields: Tensor, time: Tensor, mask: Tensor, homogeneous: bool = False) -> "Normalizer":
        """Margins, least squares of the climatology and pooled standard deviations, from fields (N, T, C, H, W) and times (T,).

        ``homogeneous``: one climatology for all cells. Where every place is alike, differences between cells are sampling errors,
        which a network that takes all places alike can never undo.
        """
        self.mask.copy_(mask)
        for i, margin in self.margins.items():
            margin.fit(fields[:, :, int(i)].flatten(0, 1), mask)
        features = self.features(time)
        moment = torch.zeros(features.shape[1], *fields.shape[2:], dtype=torch.float64)
        for trajectory in fields:
            moment += torch.einsum("tp,tchw->pchw", features, self.transform(trajectory).double())
        gram = features.T @ features * fields.shape[0]
        coefficients = torch.linalg.solve(gram, moment.flatten(1)).reshape(moment.shape)
        if homogeneous:
            coefficients = ((coefficients * mask).sum((-2, -1), keepdim=True) / mask.sum()).expand_as(coefficients)
        self.coefficients.copy_(coefficients.to(self.coefficients))
        variance = torch.zeros(fields.shape[2], dtype=torch.float64)
        for trajectory in fields:
            anomaly = (self.transform(trajectory) - self.climatology(time)) * self.mask
            variance += anomaly.double().square().sum((0, 2, 3))
        count = fields.shape[0] * fields.shape[1] * mask.double().sum()
        self.scale.copy_((variance / count).sqrt().clamp(min=1e-12).to(self.scale))
        return self
