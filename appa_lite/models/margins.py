"""The Gaussianising transform of one variable: any continuous margin, with or without a point mass, to a standard normal one."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from appa_lite.core.pareto import fit_pareto

KNOTS = 257  # of the empirical body
TAIL = 0.05  # probability of each tail
MASS = 0.005  # share of the values on the smallest one from which it is a point mass
DEEP = 16.0  # depth -log P(beyond | in the tail) from which a bounded tail goes on linearly
BLOCKS = 10  # of frames, for the jackknife
LOWEST_SCORE = -4.0
MOST = 4_000_000  # values that are sorted


class Margin(nn.Module):
    """x -> z = Phi^{-1}(F(x)) and back, with F empirical in the body and generalised Pareto in the tails.

    .. code-block:: text

        body         piecewise linear between KNOTS quantiles, the same both ways
        upper tail   1 - F(x) = p (1 + shape (x - u) / scale)^(-1 / shape),   u the quantile of 1 - p, p = 5 %
        lower tail   its mirror image

    Strictly increasing on the whole line: the tails are nobody's maximum, and a bounded one (shape < 0) goes on
    linearly from P = exp(-DEEP) p, so that values the fit has ruled out stay finite and invertible.

    **A point mass at the smallest value** (dry cells): F jumps there from 0 to ``mass``. The value is the image of every
    z below ``edge`` = Phi^{-1}(mass). Going up, a dry cell needs a z below the edge, and noise would fill dry areas with
    something that has to be learned and compressed. It takes the z that its rank *among dry cells by closeness to wet
    ones* deserves: with

        s_i = log sum_j kappa(|i - j|) [x_j is above the mass],     kappa(r) = (1 + r^2)^(-2)

    and G the distribution of s over the dry cells of the training data, z = Phi^{-1}(mass G(s)). The margin is standard
    normal, the field continuous across the edge of the wet area, and the map a function of the field alone. Frames
    without any wet cell share one z, the middle of their probability.

    Args:
        periodic: (rows, columns) wrap around, for the distances.
    """

    def __init__(self, periodic: Sequence[bool] = (False, False)):
        super().__init__()
        self.periodic = tuple(periodic)
        knots = torch.linspace(-2, 2, KNOTS)
        self.register_buffer("values", knots.clone())  # x of the body's knots
        self.register_buffer("scores", knots.clone())  # their z
        for name in ("lower", "upper"):
            self.register_buffer(name, torch.tensor([0.0, 1.0]))  # shape, scale
        self.register_buffer("shape_error", torch.zeros(2))  # of lower and upper, by the jackknife
        self.register_buffer("mass", torch.zeros(()))  # probability of the smallest value; 0: a continuous margin
        self.register_buffer("slope_below", torch.ones(()))  # dx/dz of the continuation below a point mass
        self.register_buffer("closeness", knots.clone())  # s of the dry knots
        self.register_buffer("dry_scores", knots.clone())  # their z

    @property
    def edge(self) -> Tensor:
        """The z at which the value leaves the point mass; -inf without one."""
        return self.scores[0].double() if float(self.mass) else torch.full_like(self.scores[0], -math.inf, dtype=torch.float64)

    # x to z

    def forward(self, x: Tensor) -> Tensor:
        """z of fields (..., H, W)."""
        z = self.score(x)
        if not float(self.mass):
            return z
        wet = x > self.values[0]
        dry = _interpolate(self._closeness(wet), self.closeness.double(), self.dry_scores.double())
        return torch.where(wet, z, dry.to(z))

    def score(self, x: Tensor) -> Tensor:
        """z of values of any shape, one by one, strictly increasing: a point mass counts as its upper end, and what is
        below it goes on linearly."""
        y = x.double()
        z = _interpolate(y, self.values.double(), self.scores.double())
        z = torch.where(y > self.values[-1], self._tail_score(y - self.values[-1], self.upper, self.scores[-1]), z)
        below = self.values[0] - y
        lower = self.scores[0] - below / self.slope_below if float(self.mass) else -self._tail_score(below, self.lower, -self.scores[0])
        return torch.where(below > 0, lower, z).to(x)

    def _tail_score(self, excess: Tensor, tail: Tensor, start: Tensor) -> Tensor:
        """The z of an excess over the quantile at z = ``start``."""
        shape, scale = tail.double()
        excess = excess.clamp(min=0)
        if abs(float(shape)) < 1e-6:
            depth = excess / scale
        elif float(shape) > 0:
            depth = torch.log1p(shape * excess / scale) / shape
        else:
            reach, speed = scale * torch.expm1(shape * DEEP) / shape, scale * torch.exp(shape * DEEP)
            inside = torch.log1p((shape * excess / scale).clamp(min=math.expm1(float(shape) * DEEP))) / shape
            depth = torch.where(excess > reach, DEEP + (excess - reach) / speed, inside)
        return -_ndtri_exp(torch.special.log_ndtr(-start.double()) - depth)

    def _closeness(self, wet: Tensor) -> Tensor:
        h, w = wet.shape[-2:]
        size = [n if wraps else 2 * n for n, wraps in zip((h, w), self.periodic, strict=True)]
        squares = [torch.minimum(i := torch.arange(n, device=wet.device).double(), n - i) ** 2 for n in size]
        kernel = (1 + squares[0][:, None] + squares[1]) ** -2.0
        spread = torch.fft.irfft2(torch.fft.rfft2(wet.double(), s=size) * torch.fft.rfft2(kernel), s=size)
        return torch.log(spread[..., :h, :w].clamp(min=1e-9))

    # z to x

    def inverse(self, z: Tensor) -> Tensor:
        """x of z, of any shape."""
        x = self.continued(z)
        return x.clamp(min=self.values[0].to(x)) if float(self.mass) else x

    def continued(self, z: Tensor) -> Tensor:
        """The inverse of ``score``: ``inverse``, but strictly increasing below a point mass too."""
        return self._both(z)[0]

    def slope(self, z: Tensor) -> Tensor:
        """d inverse / dz: zero below a point mass."""
        slope = self.slope_continued(z)
        return torch.where(z > self.edge, slope, 0.0) if float(self.mass) else slope

    def slope_continued(self, z: Tensor) -> Tensor:
        """d continued / dz, positive."""
        return self._both(z)[1]

    def _both(self, z: Tensor) -> tuple[Tensor, Tensor]:
        s = z.double()
        x, slope = _interpolate_with_slope(s, self.scores.double(), self.values.double())
        above, below = s > self.scores[-1], s < self.scores[0]
        excess, steep = self._tail_value(s, self.upper, self.scores[-1])
        x, slope = torch.where(above, self.values[-1] + excess, x), torch.where(above, steep, slope)
        if float(self.mass):
            low, steep = self.values[0] + (s - self.scores[0]) * self.slope_below, self.slope_below.double().expand_as(s)
        else:
            excess, steep = self._tail_value(-s, self.lower, -self.scores[0])
            low = self.values[0] - excess
        return torch.where(below, low, x).to(z), torch.where(below, steep, slope).to(z)

    def _tail_value(self, s: Tensor, tail: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The excess at z = s over the quantile at z = ``start``, and its derivative; zero where s is not in the tail."""
        (shape, scale), start = tail.double(), start.double()
        s = torch.maximum(s, start)
        survival = torch.special.log_ndtr(-s)
        hazard = torch.exp(-(s**2) / 2 - 0.5 * math.log(2 * math.pi) - survival)
        depth = (torch.special.log_ndtr(-start) - survival).clamp(min=0)
        if abs(float(shape)) < 1e-6:
            return scale * depth, scale * hazard
        inner = depth.clamp(max=DEEP) if float(shape) < 0 else depth
        speed = scale * torch.exp(shape * inner)
        return scale * torch.expm1(shape * inner) / shape + (depth - inner) * speed, speed * hazard

    # Fitting

    @torch.no_grad()
    def fit(self, fields: Tensor, mask: Tensor) -> "Margin":
        """Fit to frames (N, H, W); tails by maximum likelihood, their errors by leaving out each of BLOCKS blocks of frames."""
        mask = mask.bool()
        some = fields[:, mask]
        some = some[torch.linspace(0, len(some) - 1, min(len(some), max(BLOCKS, MOST // max(some.shape[1], 1)))).long()].double()
        x = np.sort(some.flatten().numpy())
        floor, share = x[0], float((x == x[0]).mean())
        mass = share if share > MASS and len(x) > x.searchsorted(floor, "right") + 50 else 0.0
        above = x[x.searchsorted(floor, "right") :] if mass else x
        tail = min(TAIL, 0.25 * (1 - mass))
        low = mass if mass else TAIL
        levels = torch.special.ndtr(torch.linspace(*torch.special.ndtri(torch.tensor([low, 1 - tail]).double()), KNOTS).double()).numpy()
        values = np.quantile(above, np.clip((levels - mass) / (1 - mass), 0, 1))
        if mass:
            values[0] = floor
        scores = torch.special.ndtri(torch.from_numpy(levels)).numpy()
        self.mass.fill_(mass)
        self._set(("values", "scores"), *_strict(values, scores))
        self._fit_tails(some, bool(mass))
        if mass:
            middle = KNOTS // 2
            self.slope_below.copy_((self.values[middle] - self.values[0]) / (self.scores[middle] - self.scores[0]))
            self._fit_dry(fields, mask, floor, mass)
        return self

    def _fit_tails(self, some: Tensor, mass: bool) -> None:
        """``some``: frames (N, cells)."""
        for index, (name, sign) in enumerate((("lower", -1.0), ("upper", 1.0))):
            if mass and name == "lower":
                continue
            start = sign * float(self.values[-1 if sign > 0 else 0])
            blocks = [(b[b > 0]) for b in ((sign * part - start).flatten() for part in some.chunk(BLOCKS))]
            whole = fit_pareto(torch.cat(blocks))
            left_out = [fit_pareto(torch.cat(blocks[:i] + blocks[i + 1 :])).shape for i in range(len(blocks))] if len(blocks) > 2 else []
            error = _jackknife(left_out) if left_out else whole.shape_error
            getattr(self, name).copy_(torch.tensor([whole.shape, whole.scale]))
            self.shape_error[index] = max(error, whole.shape_error)

    def _fit_dry(self, fields: Tensor, mask: Tensor, floor: float, mass: float) -> None:
        chosen = fields[torch.linspace(0, len(fields) - 1, min(len(fields), 4000)).long()]
        wet = (chosen > floor) & mask
        closeness = self._closeness(wet)[(~wet) & mask].numpy()
        top = float(self.scores[0])
        scores = np.linspace(min(LOWEST_SCORE, top - 1), top, KNOTS)
        levels = np.clip(torch.special.ndtr(torch.from_numpy(scores)).numpy() / mass, 0, 1)
        self._set(("closeness", "dry_scores"), *_strict(np.quantile(closeness, levels), scores))

    def _set(self, names: Sequence[str], *arrays: np.ndarray) -> None:
        for name, array in zip(names, arrays, strict=True):
            getattr(self, name).copy_(torch.from_numpy(array))


def _jackknife(estimates: list[float]) -> float:
    values, n = np.array(estimates), len(estimates)
    return float(np.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum()))


def _strict(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KNOTS knots with both strictly increasing in single precision: ties of x take the mean of their y."""
    single, inverse = np.unique(x.astype(np.float32), return_inverse=True)
    if len(single) < 2:
        raise ValueError("a margin needs more than one value")
    y = np.bincount(inverse, y) / np.bincount(inverse)
    place, at = np.arange(len(single)), np.linspace(0, len(single) - 1, KNOTS)
    x, y = np.interp(at, place, single), np.interp(at, place, y)
    for _ in range(64):  # knots closer than single precision can tell
        flat = np.diff(x.astype(np.float32)) <= 0
        if not flat.any():
            break
        x[1:][flat] = np.nextafter(x[:-1][flat].astype(np.float32), np.float32(np.inf))
    return x, y


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    return _interpolate_with_slope(x, knots, values)[0].clamp(values[0], values[-1])


def _interpolate_with_slope(x: Tensor, knots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Piecewise linear interpolation and its slope; beyond the ends the last pieces go on."""
    upper = torch.searchsorted(knots, x.detach().contiguous()).clamp(1, len(knots) - 1)
    low, high = knots[upper - 1], knots[upper]
    slope = (values[upper] - values[upper - 1]) / (high - low)
    return values[upper - 1] + (x - low) * slope, slope


def _ndtri_exp(logarithm: Tensor) -> Tensor:
    """Phi^{-1}(exp(l)) for l < 0, also where exp(l) underflows: Newton steps on log Phi."""
    start = torch.special.ndtri(torch.exp(logarithm.clamp(min=-700.0)))
    deep = logarithm < -600.0
    if not bool(deep.any()):
        return start
    z = torch.where(deep, -torch.sqrt(-2 * logarithm.clamp(max=-1.0)), start)
    for _ in range(4):
        value = torch.special.log_ndtr(z)
        z = torch.where(deep, z - (value - logarithm) / torch.exp(-(z**2) / 2 - 0.5 * math.log(2 * math.pi) - value), z)
    return z
