"""Streaming, mergeable statistics of trajectories: a climatology with harmonics, anomalies, extremes, quantiles."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.random import generator

DAY, YEAR = 86400.0, 365.2425 * 86400.0


def harmonics(time: Tensor, periods: Sequence[float]) -> Tensor:
    """The regressors 1, cos(2 pi t / P_1), sin(2 pi t / P_1), cos(2 pi t / P_2), ... of times (T,) in seconds: (1 + 2P, T), float64."""
    time = torch.as_tensor(time, dtype=torch.float64)
    rows = [torch.ones_like(time)]
    for period in periods:
        phase = 2 * torch.pi * torch.remainder(time / period, 1.0)
        rows += [phase.cos(), phase.sin()]
    return torch.stack(rows)


@dataclass(frozen=True)
class Climatology:
    """What `Statistics` found.

    Args:
        coefficients: (1 + 2P, C, H, W), of `harmonics`, in the units of the variables; zero where a cell has no value.
        periods: P periods in seconds.
        std: (C,) standard deviation of the anomalies (values minus climatology) over all cells and times.
        cell_std: (C, H, W) the same cell by cell.
        minimum, maximum: (C,) of the values.
        quantiles: (C, Q) of the values at ``levels`` (Q,), from a bounded random sample.
        count: (C,) values seen.
    """

    coefficients: Tensor
    periods: tuple[float, ...]
    std: Tensor
    cell_std: Tensor
    minimum: Tensor
    maximum: Tensor
    quantiles: Tensor
    levels: Tensor
    count: Tensor

    @property
    def constant(self) -> Tensor:
        """The part that does not depend on time, (C, H, W)."""
        return self.coefficients[0]

    def mean(self, time: Tensor) -> Tensor:
        """The climatology at times (T,) in seconds: (T, C, H, W)."""
        return torch.einsum("pt,pchw->tchw", harmonics(time, self.periods).to(self.coefficients), self.coefficients)

    def to_dict(self) -> dict:
        """JSON-able summary per variable, without the maps."""
        names = ("std", "minimum", "maximum", "quantiles", "levels", "count")
        return {"periods": list(self.periods), **{name: getattr(self, name).tolist() for name in names}}


class Statistics:
    """Accumulates chunks of trajectories; accumulators of different chunks merge to that of all of them.

    Per cell, with regressors phi(t) and values x relative to a shift s: sum phi phi^T, sum phi (x - s), sum (x - s)^2, in
    float64. The least-squares climatology and its residual follow from these alone; merging moves one accumulator to the shift
    of the other, which for the mean and variance is the pairwise formula of Chan, Golub and LeVeque (1983). Missing values (NaN)
    and cells outside the mask do not count.

    Args:
        shape: (C, H, W) of a frame.
        periods: of the harmonics in seconds, such as ``[DAY, YEAR]``; none for a plain mean.
        mask: bool (H, W), True where a cell exists.
        sample: values per variable kept for the quantiles.
        seed: of that sample.
    """

    def __init__(
        self, shape: Sequence[int], periods: Sequence[float] = (), mask: Tensor | None = None, sample: int = 100_000, seed: int = 0
    ):
        self.shape, self.periods = tuple(shape), tuple(float(p) for p in periods)
        self.mask = torch.ones(self.shape[1:], dtype=torch.bool) if mask is None else mask.bool().cpu()
        self.sample, self.seed, self.updates = sample, seed, 0
        size = 1 + 2 * len(self.periods)
        zeros = torch.zeros(self.shape, dtype=torch.float64)
        self.shift: Tensor | None = None
        self.gram = zeros.expand(size, size, *self.shape).clone()
        self.moment = zeros.expand(size, *self.shape).clone()
        self.square = zeros.clone()
        self.minimum, self.maximum = torch.full_like(zeros, torch.inf), torch.full_like(zeros, -torch.inf)
        self.keys = [torch.zeros(0, dtype=torch.float64) for _ in range(self.shape[0])]
        self.values = [torch.zeros(0, dtype=torch.float64) for _ in range(self.shape[0])]

    @property
    def count(self) -> Tensor:
        """Values seen per cell, (C, H, W)."""
        return self.gram[0, 0]

    def update(self, fields: Tensor | np.ndarray, time: Tensor | np.ndarray) -> "Statistics":
        """Adds frames (..., T, C, H, W) at times (T,), or (..., T), in seconds."""
        fields = torch.as_tensor(np.asarray(fields) if not isinstance(fields, Tensor) else fields).cpu()
        time = torch.as_tensor(time, dtype=torch.float64).expand(fields.shape[:-3]).reshape(-1)
        fields = fields.reshape(-1, *self.shape).to(torch.float64)
        valid = torch.isfinite(fields) & self.mask
        if self.shift is None:
            counts = valid.sum(0).clamp(min=1)
            self.shift = torch.where(valid, fields, 0.0).sum(0) / counts
        regressors = harmonics(time, self.periods)
        anomaly = torch.where(valid, fields - self.shift, 0.0)
        self.gram += torch.einsum("pt,qt,tchw->pqchw", regressors, regressors, valid.to(torch.float64))
        self.moment += torch.einsum("pt,tchw->pchw", regressors, anomaly)
        self.square += anomaly.square().sum(0)
        self.minimum = torch.minimum(self.minimum, torch.where(valid, fields, torch.inf).amin(0))
        self.maximum = torch.maximum(self.maximum, torch.where(valid, fields, -torch.inf).amax(0))
        for c in range(self.shape[0]):
            draw = generator(self.seed, "quantiles", self.updates, c)
            self._keep(c, fields[:, c][valid[:, c]], draw)
        self.updates += 1
        return self

    def _keep(self, channel: int, values: Tensor, draw: torch.Generator) -> None:
        """The values with the smallest random keys are a uniform sample without replacement."""
        keys = torch.cat([self.keys[channel], torch.rand(len(values), generator=draw, dtype=torch.float64)])
        values = torch.cat([self.values[channel], values])
        kept = keys.topk(min(self.sample, len(keys)), largest=False).indices
        self.keys[channel], self.values[channel] = keys[kept], values[kept]

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of both sets of frames; give accumulators different seeds, so that their samples are independent."""
        if (self.shape, self.periods) != (other.shape, other.periods):
            raise ValueError(f"statistics of {self.shape} with periods {self.periods} do not merge with {other.shape}, {other.periods}")
        out = Statistics(self.shape, self.periods, self.mask, self.sample, self.seed)
        out.updates = max(self.updates, other.updates)
        out.shift = self.shift if self.shift is not None else other.shift
        for part in (self, other):
            if part.shift is None:
                continue
            move = part.shift - out.shift
            out.gram += part.gram
            out.moment += part.moment + move * part.gram[0]
            out.square += part.square + move * (2 * part.moment[0] + move * part.count)
            out.minimum = torch.minimum(out.minimum, part.minimum)
            out.maximum = torch.maximum(out.maximum, part.maximum)
        for c in range(self.shape[0]):
            keys, values = torch.cat([self.keys[c], other.keys[c]]), torch.cat([self.values[c], other.values[c]])
            kept = keys.topk(min(self.sample, len(keys)), largest=False).indices
            out.keys[c], out.values[c] = keys[kept], values[kept]
        return out

    def result(self, levels: Sequence[float] = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)) -> Climatology:
        """The climatology so far; where harmonics are not determined (too short a record), the smallest coefficients."""
        if self.shift is None or not bool((self.count > 0).any()):
            raise ValueError("no value was seen")
        gram, moment = self.gram.movedim((0, 1), (-2, -1)), self.moment.movedim(0, -1)
        solution = (torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ moment[..., None])[..., 0]
        residual = (self.square - (solution * moment).sum(-1)).clamp(min=0)
        coefficients = solution.movedim(-1, 0).clone()
        coefficients[0] += torch.where(self.count > 0, self.shift, 0.0)
        total = self.count.sum((-2, -1))
        quantile_levels = torch.tensor(levels, dtype=torch.float64)
        quantiles = [np.quantile(v.numpy(), levels) if len(v) else np.full(len(levels), np.nan) for v in self.values]
        return Climatology(
            coefficients=coefficients,
            periods=self.periods,
            std=(residual.sum((-2, -1)) / total).sqrt(),
            cell_std=torch.where(self.count > 0, (residual / self.count.clamp(min=1)).sqrt(), 0.0),
            minimum=self.minimum.amin((-2, -1)),
            maximum=self.maximum.amax((-2, -1)),
            quantiles=torch.from_numpy(np.stack(quantiles)),
            levels=quantile_levels,
            count=total,
        )


def statistics(chunks: Iterable[tuple[Tensor, Tensor]], shape: Sequence[int], **options: object) -> Climatology:
    """The climatology of chunks ``(fields (..., T, C, H, W), time (T,))``; the options are those of `Statistics`."""
    accumulator = Statistics(shape, **options)
    for fields, time in chunks:
        accumulator.update(fields, time)
    return accumulator.result()


def chunks(fields: object, times: Tensor | np.ndarray, frames: int = 64) -> Iterable[tuple[Tensor, Tensor]]:
    """Pieces of ``frames`` frames of trajectories (N, T, C, H, W) read as ``fields[n, a:b]``, with their times (T,) or (N, T)."""
    count, length = fields.shape[:2]
    seconds = torch.as_tensor(times, dtype=torch.float64).expand(count, length)
    for n in range(count):
        for start in range(0, length, frames):
            piece = slice(start, start + frames)
            yield torch.as_tensor(fields[n, piece]), seconds[n, piece]
