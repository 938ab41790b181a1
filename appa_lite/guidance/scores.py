"""Observations of a Gaussianised variable, seen in its scores: one-dimensional likelihoods, matched by Gaussians."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from appa_lite.guidance.base import LatentOperator, LinearModes, PosteriorCovariance
from appa_lite.guidance.modes import CellModes, DecodedCells

TERMS = 8  # cells of a row that interpolates to a point in space and time; sums over more are no points
NODES = 41  # of each part of a grid
FLAT = 1e-6  # least precision of a site, over that of the prior


class Margin(Protocol):
    """A map of scores z to values x, with a point mass at the lower end perhaps (``models.margins``)."""

    def inverse(self, z: Tensor) -> Tensor: ...

    def slope(self, z: Tensor) -> Tensor: ...

    def score(self, x: Tensor) -> Tensor: ...

    def slope_continued(self, z: Tensor) -> Tensor: ...


class ScoredCells(LatentOperator):
    """Point values y = x(h) + e, e ~ N(0, R), of a variable whose score h is nearly Gaussian.

    x(h) is far from linear: flat where it is dry, and in the tail a change of h that is small beside its uncertainty
    multiplies x. Linearised at D(x_t), which is dry nearly everywhere as long as the noise is large, a gauge with heavy
    rain would tell nothing. So h is what is taken for observed. At each noise level the likelihood of each value,

        L(h) = N(y; x(h), R),        constant where h is below the edge of the dry cells

    meets the Gaussian N(m, v) that the denoiser and its measured covariance predict for h; the mean and variance of their
    product are integrated numerically, and the Gaussian likelihood with the same effect takes the place of L (assumed
    density filtering, Minka 2001; for L a step it is the Tobit filter of censored values). A dry gauge so says 'below
    the edge', with the error of its measurement, and a wet one its score. Values near zero or negative, which honest
    errors make of dry ones, are neither thrown away nor taken for rain.

    A row that interpolates has h = z(sum_j w_j x~(h_j)), with x~ the continuation of x below the dry edge that has an
    inverse. Rows of more than ``TERMS`` cells, such as area means, and norms are linearised as they are.

    Args:
        plain: the rows on decoded fields; continued: the same on fields that go on below zero;
        margins: by channel; shape: (rows, columns) of the grid.
    """

    linear = False

    def __init__(self, plain: DecodedCells, continued: DecodedCells, margins: Mapping[int, Margin], shape: tuple[int, int]):
        self.plain, self.continued, self.margins = plain, continued, margins
        operator = plain.operator
        channel = (operator.index % operator.frame_size) // (shape[0] * shape[1])
        terms = torch.zeros(len(operator), dtype=torch.long).index_add(0, operator.row, torch.ones_like(operator.row))
        first = torch.zeros(len(operator), dtype=torch.long).index_copy(0, operator.row, channel[:, 0])
        point = (terms == 1) & (operator.norm == 0) & (operator.weight.shape[1] <= TERMS) & (operator.offset == 0)
        self.rows = {c: torch.nonzero(point & (first == c))[:, 0] for c in margins}

    def predict(self, latents: Tensor) -> Tensor:
        """Scores of point values; the others as they are."""
        values, continued = self.plain.predict(latents), self.continued.predict(latents)
        for channel, rows in self.rows.items():
            values[:, rows] = self.margins[channel].score(continued[:, rows])
        return values

    def linearise(self, latents: Tensor) -> CellModes:
        gains, continued = (torch.cat([part.gains(z[None]) for z in latents]) for part in (self.plain, self.continued))
        scores, row = self.predict(latents), self.plain.operator.row
        place = torch.full((len(self.plain.operator),), -1).index_copy(0, row, torch.arange(len(row)))
        for channel, rows in self.rows.items():
            slope = self.margins[channel].slope_continued(scores[:, rows])
            gains[:, place[rows]] = continued[:, place[rows]] / slope
        return CellModes(self.plain, gains)

    def sites(
        self, predicted: Tensor, linear: LinearModes, covariance: PosteriorCovariance, sigma: Tensor, values: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        spread = linear.spread(covariance.local(self.plain.responses.offsets, sigma)).expand_as(predicted)
        innovation, errors = values - predicted, variance.expand_as(predicted).clone()
        for channel, rows in self.rows.items():
            y = values.expand_as(predicted)[:, rows]
            found = match(self.margins[channel], predicted[:, rows], spread[:, rows], y, errors[:, rows])
            innovation[:, rows], errors[:, rows] = (part.to(predicted) for part in found)
        return innovation, errors


def match(margin: Margin, mean: Tensor, variance: Tensor, y: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Innovation and error variance of the Gaussian likelihood of h with the effect of N(y; x(h), error) on N(mean, variance).

    All of one shape; float64 inside. Where a likelihood would widen the prior, which one that is no logarithmically
    concave function may, it moves the mean alone.
    """
    mean, variance, y, error = (t.double() for t in (mean, variance.clamp(min=1e-12), y, error))
    steps = torch.linspace(-6, 6, NODES, dtype=torch.float64, device=mean.device)

    def log_product(h: Tensor) -> Tensor:
        return -((h - mean[..., None]) ** 2) / (2 * variance[..., None]) - (margin.inverse(h) - y[..., None]) ** 2 / (2 * error[..., None])

    around = mean[..., None] + steps * variance.sqrt()[..., None]
    likely = margin.score(y[..., None] + steps * error.sqrt()[..., None])
    between = torch.lerp(mean[..., None], margin.score(y)[..., None], torch.linspace(0, 1, NODES, dtype=torch.float64, device=mean.device))
    nodes = torch.cat([around, likely, between], dim=-1)
    peak = nodes.gather(-1, log_product(nodes).argmax(-1, keepdim=True))
    width = (1 / variance[..., None] + margin.slope(peak) ** 2 / error[..., None]).rsqrt()
    nodes = torch.cat([nodes, peak + 1.5 * steps * width], dim=-1).sort(-1)[0]
    logarithm = log_product(nodes)
    density = torch.exp(logarithm - logarithm.amax(-1, keepdim=True))
    weight = torch.nn.functional.pad(nodes.diff(dim=-1), (1, 1))
    weight = density * (weight[..., 1:] + weight[..., :-1])  # the trapezoidal rule
    weight = weight / weight.sum(-1, keepdim=True)
    moved = (weight * nodes).sum(-1)
    left = (weight * (nodes - moved[..., None]) ** 2).sum(-1)
    site = 1 / (1 / left.clamp(min=1e-14) - 1 / variance).clamp(min=FLAT / variance)
    return (moved - mean) * (variance + site) / variance, site
