"""Statistics become mergeable sums, sums become means, means become metrics.

    Statistic.compute(forecast, truth) -> Sums        per case, area-weighted
    Sums + Sums, Sums.concat                           chunks, processes
    Metric.value(means of statistics)                  one number

The decomposition is that of WeatherBench-X (Rasp et al. 2024, https://doi.org/10.1029/2023MS004019, and its successor's
code): a score computed in chunks, per process or all at once agrees to rounding.

A forecast is an ensemble (dimension ``number``), a Gaussian (dimension ``moment`` with labels ``mean`` and ``std``) or a
single state (neither). A truth with a coordinate ``error_std`` is an observation, and is compared with what the forecast
says of *observations*: see ``observable``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from appa_lite.verification.grid import MOMENT, NUMBER, area_weights

CASE_DIMS = ("case", "time", "prediction_timedelta")  # kept by every statistic; all others are summed over


@dataclass(frozen=True)
class Sums:
    """sum_i w_i s_i and sum_i w_i per case: what a mean needs, and what can be merged."""

    total: xr.DataArray
    weight: xr.DataArray

    def __add__(self, other: "Sums") -> "Sums":
        """The sums over both, of parts that share their cases (two halves of a domain, say)."""
        return Sums(self.total + other.total, self.weight + other.weight)

    @staticmethod
    def concat(parts: Sequence["Sums"], dim: str = "case") -> "Sums":
        """The sums of parts that hold different cases."""
        if len(parts) == 1:
            return parts[0]
        return Sums(xr.concat([p.total for p in parts], dim), xr.concat([p.weight for p in parts], dim))

    def pooled(self) -> "Sums":
        """Summed over all cases."""
        dims = [d for d in self.weight.dims if d in CASE_DIMS]
        return Sums(self.total.sum(dims), self.weight.sum(dims))

    def mean(self) -> xr.DataArray:
        """The weighted mean over all cases."""
        pooled = self.pooled()
        return pooled.total / pooled.weight.where(pooled.weight > 0)


class Statistic(ABC):
    """A quantity whose weighted sum over cells and cases is all a metric needs."""

    name: str

    @abstractmethod
    def compute(self, forecast: xr.DataArray, truth: xr.DataArray) -> Sums:
        """Sums per case of a forecast (case, [number | moment], cells...) and a truth (case, cells...)."""


class PointStatistic(Statistic):
    """A statistic that has a value in every cell: sum_k w_k s(f_k, o_k) over the cells where it is defined."""

    @abstractmethod
    def pointwise(self, forecast: xr.DataArray, truth: xr.DataArray) -> xr.DataArray:
        """s(f, o), (case, cells...); NaN where it is not defined."""

    def compute(self, forecast: xr.DataArray, truth: xr.DataArray) -> Sums:
        values = self.pointwise(forecast, truth).astype(np.float64)
        cells = [d for d in values.dims if d not in CASE_DIMS]
        weights = xr.where(np.isfinite(values), area_weights(values), 0.0)
        return Sums((values.fillna(0.0) * weights).sum(cells), weights.sum(cells))


class Metric(ABC):
    """A function of the means of statistics; of arrays of means too, which is how the bootstrap evaluates it."""

    name: str
    statistics: tuple[Statistic, ...]

    @abstractmethod
    def value(self, means: Mapping[str, np.ndarray]) -> np.ndarray:
        """The score, from the mean of each statistic by its name (a trailing bin dimension is kept)."""

    def __call__(self, forecast: xr.DataArray, truth: xr.DataArray) -> float:
        """The score of one forecast at once."""
        return float(self.value({s.name: s.compute(forecast, truth).mean().values for s in self.statistics}))


# the three kinds of forecast


def center(forecast: xr.DataArray) -> xr.DataArray:
    """The mean of the ensemble or Gaussian, or the state itself."""
    if NUMBER in forecast.dims:
        return forecast.mean(NUMBER, skipna=False, dtype=np.float64)
    return forecast.sel({MOMENT: "mean"}, drop=True) if MOMENT in forecast.dims else forecast


def variance(forecast: xr.DataArray) -> xr.DataArray:
    """The unbiased ensemble variance or the Gaussian's; NaN for a single state or one member."""
    if forecast.sizes.get(NUMBER, 0) > 1:
        return forecast.astype(np.float64).var(NUMBER, ddof=1, skipna=False)
    if MOMENT in forecast.dims:
        return forecast.sel({MOMENT: "std"}, drop=True) ** 2
    return xr.full_like(center(forecast), np.nan, dtype=np.float64)


def ensemble_valid(forecast: xr.DataArray) -> xr.DataArray:
    """Where every member, or moment, has a value."""
    return np.isfinite(forecast).all([d for d in (NUMBER, MOMENT) if d in forecast.dims])


def members(forecast: xr.DataArray) -> float:
    """The ensemble's size; infinite for a Gaussian, one for a single state."""
    return float("inf") if MOMENT in forecast.dims else forecast.sizes.get(NUMBER, 1)


def generators(array: xr.DataArray, seed: int) -> list[np.random.Generator]:
    """One random stream per case, a function of the seed and of the case's time and lead alone, whatever the chunk."""
    kept = array.isel({d: 0 for d in array.dims if d not in CASE_DIMS})
    names = [n for n in ("time", "prediction_timedelta") if n in kept.coords]
    keys = [np.broadcast_to(kept[n].broadcast_like(kept).transpose(*kept.dims).values, kept.shape).ravel() for n in names]
    keys = [k.astype("int64").astype("uint64") for k in keys] or [np.arange(kept.size)]
    return [np.random.default_rng([seed, *map(int, key)]) for key in zip(*keys, strict=True)]


def observable(forecast: xr.DataArray, truth: xr.DataArray, seed: int) -> xr.DataArray:
    """What the forecast says of an observation y = x + e, e ~ N(0, R): members x_i + e_i, or a Gaussian of variance s^2 + R.

    Without it a perfect ensemble looks under-dispersed (Saetra et al. 2004, https://doi.org/10.1175/1520-0493(2004)132<1487:EOOEOT>2.0.CO;2).
    A single state is left alone. Does nothing when the truth carries no ``error_std``.
    """
    if "error_std" not in truth.coords:
        return forecast
    error = truth["error_std"].astype(np.float64).reset_coords(drop=True)
    if MOMENT in forecast.dims:
        std = np.sqrt(forecast.sel({MOMENT: "std"}, drop=True) ** 2 + error**2)
        return xr.concat([forecast.sel({MOMENT: "mean"}, drop=True), std], forecast[MOMENT])
    if NUMBER not in forecast.dims or forecast.sizes[NUMBER] == 1:
        return forecast
    cases = [d for d in truth.dims if d in CASE_DIMS]
    cells = [d for d in truth.dims if d not in CASE_DIMS]
    shape = (forecast.sizes[NUMBER], *(truth.sizes[d] for d in cells))
    noise = np.stack([g.standard_normal(shape) for g in generators(truth, seed)])
    noise = xr.DataArray(noise.reshape(*(truth.sizes[d] for d in cases), *shape), dims=(*cases, NUMBER, *cells))
    return forecast + noise * error
