"""The statistics: errors, variances, CRPS, ranks."""

import numpy as np
import xarray as xr
from scipy.special import ndtr

from appa_lite.verification.base import CASE_DIMS, PointStatistic, Statistic, Sums, center, generators, members, observable, variance
from appa_lite.verification.grid import MOMENT, NUMBER, area_weights


class Error(PointStatistic):
    """f - o of the mean."""

    name = "error"

    def pointwise(self, forecast, truth):
        return center(forecast) - truth


class Count(Statistic):
    """How many values are compared, of how many that the truth has."""

    name = "count"

    def compute(self, forecast, truth):
        known = np.isfinite(truth)
        found = known & np.isfinite(center(forecast))
        cells = [d for d in truth.dims if d not in CASE_DIMS]
        return Sums(found.sum(cells).astype(np.float64), known.sum(cells).astype(np.float64))


class SquaredError(PointStatistic):
    """(f - o)^2 of the mean."""

    name = "squared_error"

    def pointwise(self, forecast, truth):
        return (center(forecast) - truth).astype(np.float64) ** 2


class AbsoluteError(PointStatistic):
    """|f - o| of the mean."""

    name = "absolute_error"

    def pointwise(self, forecast, truth):
        return np.abs(center(forecast) - truth)


class Variance(PointStatistic):
    """The forecast's own variance, unbiased: sum_i (x_i - mean)^2 / (n - 1), where there is a truth."""

    name = "variance"

    def pointwise(self, forecast, truth):
        return variance(forecast).where(np.isfinite(truth))


class PredictedSquaredError(PointStatistic):
    """The squared error that a perfect ensemble of n members expects of its mean: (n + 1) / n s^2 + R.

    Fortin et al. 2014, https://doi.org/10.1175/JHM-D-14-0008.1; R is zero unless the truth is an observation.
    """

    name = "predicted_squared_error"

    def pointwise(self, forecast, truth):
        n = members(forecast)
        expected = (1 + 1 / n) * variance(forecast)
        if "error_std" in truth.coords:
            expected = expected + truth["error_std"].reset_coords(drop=True) ** 2
        return expected.where(np.isfinite(truth))


class CRPS(PointStatistic):
    """The continuous ranked probability score, the same quantity for the three kinds of forecast.

    Ensemble, fair (unbiased in n; Ferro 2014, https://doi.org/10.1002/qj.2270):
    mean_i |x_i - o| - sum_{i<j} |x_i - x_j| / (n (n - 1)), by sorting, O(n log n).
    Gaussian: s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (o - m) / s (Gneiting et al. 2005). Single state: |x - o|.
    """

    name = "crps"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def pointwise(self, forecast, truth):
        forecast = observable(forecast, truth, self.seed)
        if MOMENT in forecast.dims:
            mean, std = (forecast.sel({MOMENT: m}, drop=True) for m in ("mean", "std"))
            return xr.apply_ufunc(crps_gaussian, mean, std, truth.reset_coords(drop=True))
        if forecast.sizes.get(NUMBER, 1) == 1:
            return np.abs(center(forecast) - truth)
        return xr.apply_ufunc(crps_fair, forecast, truth.reset_coords(drop=True), input_core_dims=[[NUMBER], []])


def crps_fair(ensemble: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Fair CRPS of ensembles (..., n) and truths (...), NaN where either has one."""
    n = ensemble.shape[-1]
    ordered = np.sort(ensemble.astype(np.float64), axis=-1)
    skill = np.abs(ordered - truth[..., None]).mean(-1)
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return skill - ordered @ ranks.astype(np.float64) / (n * (n - 1))


def crps_gaussian(mean: np.ndarray, std: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """CRPS of normal distributions; |mean - truth| where the standard deviation is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (truth - mean) / std
        density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
        score = std * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))
    return np.where(std > 0, score, np.abs(truth - mean))


class Ranks(Statistic):
    """How often (weighted) the truth falls between which neighbours of the sorted ensemble: bins 0..n, ties at random.

    Hamill 2001, https://doi.org/10.1175/1520-0493(2001)129<0550:IORHFV>2.0.CO;2.
    """

    name = "ranks"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def compute(self, forecast, truth):
        forecast = observable(forecast, truth, self.seed)
        cases = [d for d in truth.dims if d in CASE_DIMS]
        cells = [d for d in truth.dims if d not in CASE_DIMS]
        truth = truth.transpose(*cases, *cells)
        weights = area_weights(truth).broadcast_like(truth.reset_coords(drop=True)).transpose(*cases, *cells)
        count, n = int(np.prod([truth.sizes[d] for d in cases])), forecast.sizes[NUMBER]
        x = forecast.transpose(*cases, NUMBER, *cells).values.reshape(count, n, -1)
        y, w = (a.values.reshape(count, -1) for a in (truth, weights))
        rank, ties = (x < y[:, None]).sum(1), (x == y[:, None]).sum(1)
        tied = np.flatnonzero(ties.any(1))
        draw = generators(truth, self.seed + 1) if tied.size else []
        for k in tied:
            rank[k] += np.floor(draw[k].random(ties[k].shape) * (ties[k] + 1)).astype(np.int64)
        valid = np.isfinite(y) & np.isfinite(x).all(1)
        slot = (rank + (n + 1) * np.arange(count)[:, None])[valid]
        total = np.bincount(slot, w[valid], minlength=count * (n + 1)).reshape(count, n + 1)
        weight = np.where(valid, w, 0.0).sum(1)
        coords = {name: c for name, c in truth.coords.items() if set(c.dims) <= set(cases)}
        shape = [truth.sizes[d] for d in cases]
        return Sums(
            xr.DataArray(total.reshape(*shape, n + 1), dims=(*cases, "rank"), coords=coords),
            xr.DataArray(weight.reshape(shape), dims=tuple(cases), coords=coords),
        )
