"""Scores of threshold exceedances, x > t: no case is left out because of what was observed.

Scoring only the cases with an extreme observation rewards a forecast that always cries wolf (the forecaster's dilemma,
Lerch et al. 2017, https://doi.org/10.1214/16-STS588); weighting the outcome space instead is proper. All scores of
ensembles here are fair: their expectation does not depend on the number of members.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy.special import ndtr

from appa_lite.verification.base import CASE_DIMS, Metric, PointStatistic, Statistic, Sums, center, observable
from appa_lite.verification.bootstrap import block_length
from appa_lite.verification.grid import MOMENT, NUMBER, area_weights
from appa_lite.verification.statistics import crps_fair

PROBABILITIES = 50  #: steps to which the probabilities of a Gaussian forecast are rounded in a contingency table
FEWEST = 10  #: independent events below which no interval is given
COST_LOSS = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


@dataclass(frozen=True)
class Threshold:
    """A quantile of the training climatology: ``label`` (``q99``) and value, a number or one per cell, in the variable's units."""

    label: str
    value: xr.DataArray


# scores of one pair, in numpy


def twcrps_fair(ensemble: np.ndarray, truth: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    """Fair threshold-weighted CRPS of ensembles (..., n) and truths (...): the fair CRPS of v(x) = max(x, t).

    The weight is 1{z > t} in the integral of (F(z) - 1{o <= z})^2 (Gneiting and Ranjan 2011,
    https://doi.org/10.1198/jbes.2010.08110; by chaining: Allen et al. 2023, https://doi.org/10.1137/22M1532184).
    """
    threshold = np.broadcast_to(threshold, truth.shape)
    out = np.zeros(truth.shape)
    above = ~((ensemble.max(-1) <= threshold) & (truth <= threshold))  # elsewhere the score is zero; NaN stays
    limit = threshold[above]
    out[above] = crps_fair(np.maximum(ensemble[above], limit[:, None]), np.maximum(truth[above], limit))
    return out


def twcrps_gaussian(mean: np.ndarray, std: np.ndarray, truth: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    """The same for normal distributions: s (G(y) - G(t) + G(-y)), y = max(o, t), standardised; G(z) = int_{-inf}^z Phi^2.

    G(z) = z Phi(z)^2 + 2 phi(z) Phi(z) - Phi(sqrt(2) z) / sqrt(pi).
    """

    def integral(z):
        density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
        return z * ndtr(z) ** 2 + 2 * density * ndtr(z) - ndtr(np.sqrt(2) * z) / np.sqrt(np.pi)

    upper = np.maximum(truth, threshold)
    with np.errstate(divide="ignore", invalid="ignore"):
        y, t = (upper - mean) / std, (threshold - mean) / std
        score = std * (integral(y) - integral(t) + integral(-y))
    return np.where(std > 0, score, np.abs(np.maximum(mean, threshold) - upper))


def brier_fair(hits: np.ndarray, members: int, event: np.ndarray) -> np.ndarray:
    """Fair Brier score of ``hits`` of n members: (i/n - o)^2 - i (n - i) / (n^2 (n - 1)).

    Ferro 2014, https://doi.org/10.1002/qj.2270. Of a single member it is (i - o)^2.
    """
    correction = hits * (members - hits) / (members**2 * (members - 1)) if members > 1 else 0.0
    return (hits / members - event) ** 2 - correction


def economic_value(joint: np.ndarray, cost_loss: np.ndarray) -> np.ndarray:
    """Relative economic value (..., A) of acting when at least k of n members exceed, for the best k, never acting included.

        V = (min(a, s) - F a (1 - s) + H s (1 - a) - s) / (min(a, s) - s a)

    of a user who pays a per unit of loss to be protected; s is the base rate, H the hit rate and F the false-alarm rate.
    One is a perfect forecast, zero the better of always and never acting. Richardson 2000,
    https://doi.org/10.1002/qj.49712656313. As the best k is chosen on the cases at hand, a few events flatter.

    Args:
        joint: frequencies (..., 2, n + 1) of the event (no, yes) and of k = 0..n members that exceed.
        cost_loss: ratios a (A,).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        joint = joint / joint.sum((-2, -1), keepdims=True)
        base = joint[..., 1, :].sum(-1)[..., None, None]
        acted = np.cumsum(joint[..., ::-1], -1)[..., ::-1]  # at least k
        acted = np.concatenate([acted, np.zeros_like(acted[..., :1])], -1)  # never
        expense = acted.sum(-2)[..., None, :] * cost_loss[:, None] + base - acted[..., 1, None, :]  # in units of the loss
        climate = np.minimum(cost_loss[:, None], base)
        value = (climate - expense) / (climate - base * cost_loss[:, None])
    return np.maximum(value.max(-1), 0.0)  # always acting is the first of the k, never acting the last


def independent_events(events: np.ndarray, block: int | None = None) -> int:
    """How many independent events stand behind exceedances per successive case (N,): at most one per case and per block.

    The cells of a field are not independent, so a case counts once. In time, exceeding cases less than ``block`` cases apart
    form one cluster (runs declustering), and a cluster of length l counts for ceil(l / block); ``block`` is the block length of
    the bootstrap, from the autocorrelation.
    """
    where = np.flatnonzero(np.asarray(events) > 0)
    if not where.size:
        return 0
    block = block or block_length(events)
    starts = np.flatnonzero(np.diff(where, prepend=-block - 1) >= block)
    ends = np.append(starts[1:], where.size) - 1
    return int(np.ceil((where[ends] - where[starts] + 1) / block).sum())


# statistics


class _Exceedance:
    """What the statistics of a threshold share: its name and its value."""

    kind: str

    def __init__(self, threshold: Threshold, seed: int = 0):
        self.threshold, self.seed, self.name = threshold, seed, f"{self.kind}_{threshold.label}"


class ThresholdCRPS(_Exceedance, PointStatistic):
    """The fair threshold-weighted CRPS of an ensemble, in closed form for a Gaussian, |max(x, t) - max(o, t)| for a single state."""

    kind = "twcrps"

    def pointwise(self, forecast, truth):
        forecast, plain, t = observable(forecast, truth, self.seed), truth.reset_coords(drop=True), self.threshold.value
        if MOMENT in forecast.dims:
            mean, std = (forecast.sel({MOMENT: m}, drop=True) for m in ("mean", "std"))
            return xr.apply_ufunc(twcrps_gaussian, mean, std, plain, t)
        if forecast.sizes.get(NUMBER, 1) == 1:
            return np.abs(np.maximum(center(forecast), t) - np.maximum(plain, t))
        return xr.apply_ufunc(twcrps_fair, forecast, plain, t, input_core_dims=[[NUMBER], [], []])


class Brier(_Exceedance, PointStatistic):
    """The fair Brier score of x > t; of a Gaussian (1 - Phi((t - m) / s) - o)^2."""

    kind = "brier"

    def pointwise(self, forecast, truth):
        forecast, plain, t = observable(forecast, truth, self.seed), truth.reset_coords(drop=True), self.threshold.value
        event = (plain > t).where(np.isfinite(plain))
        if MOMENT in forecast.dims:
            return (_gaussian_probability(forecast, t) - event) ** 2
        n = forecast.sizes.get(NUMBER, 1)
        return brier_fair(_hits(forecast, t), n, event)


class Contingency(_Exceedance, Statistic):
    """How often (weighted) k = 0..n members exceed while the truth does not, then while it does: 2 (n + 1) bins.

    Reliability diagrams and economic value follow from it. The probabilities of a Gaussian are rounded to fiftieths.
    """

    kind = "contingency"

    def compute(self, forecast, truth):
        forecast, t = observable(forecast, truth, self.seed), self.threshold.value
        gaussian = MOMENT in forecast.dims
        n = PROBABILITIES if gaussian else forecast.sizes.get(NUMBER, 1)
        hits = np.round(n * _gaussian_probability(forecast, t)) if gaussian else _hits(forecast, t)
        cases = [d for d in truth.dims if d in CASE_DIMS]
        cells = [d for d in truth.dims if d not in CASE_DIMS]
        plain = truth.reset_coords(drop=True)
        weights = area_weights(truth).broadcast_like(plain)
        hits, event, weights, known = (
            a.broadcast_like(plain).transpose(*cases, *cells).values.reshape(int(np.prod([truth.sizes[d] for d in cases])), -1)
            for a in (hits, plain > t, weights, np.isfinite(plain) & np.isfinite(hits))
        )
        bins = 2 * (n + 1)
        index = np.where(known, hits, 0).astype(np.int64) + (n + 1) * event + bins * np.arange(len(hits))[:, None]
        total = np.bincount(index[known], weights[known], minlength=bins * len(hits)).reshape(*(truth.sizes[d] for d in cases), bins)
        coords = {name: c for name, c in truth.coords.items() if set(c.dims) <= set(cases)}
        total = xr.DataArray(total, dims=(*cases, "bin"), coords=coords)
        return Sums(total, total.sum("bin"))


class Events(_Exceedance, Statistic):
    """How many of the compared values of the truth exceed, unweighted."""

    kind = "events"

    def compute(self, forecast, truth):
        known = np.isfinite(truth) & np.isfinite(center(forecast))
        cells = [d for d in truth.dims if d not in CASE_DIMS]
        above = (truth.reset_coords(drop=True) > self.threshold.value) & known
        return Sums(above.sum(cells).astype(np.float64), known.sum(cells).astype(np.float64))


def _hits(forecast: xr.DataArray, t: xr.DataArray) -> xr.DataArray:
    """How many members exceed; NaN where one is missing."""
    if NUMBER not in forecast.dims:
        return (forecast > t).where(np.isfinite(forecast)).astype(np.float64)
    return (forecast > t).sum(NUMBER).where(np.isfinite(forecast).all(NUMBER))


def _gaussian_probability(forecast: xr.DataArray, t: xr.DataArray) -> xr.DataArray:
    mean, std = (forecast.sel({MOMENT: m}, drop=True) for m in ("mean", "std"))
    return xr.apply_ufunc(ndtr, (mean - t) / std)


# metrics


class ThresholdScore(Metric):
    """The mean of a statistic that is a score itself: ``twcrps_<q>`` or ``brier_<q>``."""

    def __init__(self, statistic: ThresholdCRPS | Brier):
        self.statistics, self.name = (statistic,), statistic.name

    def value(self, means: Mapping[str, np.ndarray]) -> np.ndarray:
        return means[self.name]


class EconomicValue(Metric):
    """``rev_<q>``: the relative economic value at the cost-loss ratio where it is largest, the base rate: max_k (H_k - F_k)."""

    def __init__(self, statistic: Contingency):
        self.statistics, self.source, self.name = (statistic,), statistic.name, f"rev_{statistic.threshold.label}"

    def value(self, means: Mapping[str, np.ndarray]) -> np.ndarray:
        joint = split(means[self.source])
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = joint / joint.sum(-1, keepdims=True)  # of no-events and of events
        acted = np.cumsum(rates[..., ::-1], -1)
        value = (acted[..., 1, :] - acted[..., 0, :]).max(-1)
        return np.where(value < 1e-12, 0.0, value)  # always acting is worth nothing, but for rounding


def split(bins: np.ndarray) -> np.ndarray:
    """The bins of a ``Contingency`` (..., 2 (n + 1)) as (..., 2, n + 1)."""
    return bins.reshape(*bins.shape[:-1], 2, -1)


def extreme_metrics(thresholds: tuple[Threshold, ...], seed: int = 0) -> tuple[Metric, ...]:
    """Threshold-weighted CRPS, Brier score and economic value at every threshold."""
    found: list[Metric] = []
    for t in thresholds:
        found += [ThresholdScore(ThresholdCRPS(t, seed)), ThresholdScore(Brier(t, seed)), EconomicValue(Contingency(t, seed))]
    return tuple(found)
