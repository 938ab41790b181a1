"""Peaks over a threshold: generalised Pareto fits, return levels with honest intervals, declustering.

    P(X > u + y | X > u) = (1 + xi y / sigma)^(-1 / xi)

xi > 0 is a heavy tail, xi = 0 an exponential one, xi < 0 has an end point. Coles 2001, https://doi.org/10.1007/978-1-4471-3675-0.
A fit never comes without the standard error of xi and the number of exceedances behind it.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import chi2, norm

from appa_lite.core.errors import UserError
from appa_lite.core.pareto import HIGHEST_SHAPE, IMPOSSIBLE, LOWEST_SHAPE, maximum_likelihood

FEWEST_EXCEEDANCES = 30  #: below which no tail is fitted
BLOCKS = 60  #: of time, between which events are taken for independent
WIDE = 2.0  #: an interval wider than so many times its level says that nothing is known


@dataclass(frozen=True)
class Level:
    """A return level with its interval; ``note`` says what the reader must know, and is empty where nothing is wrong."""

    value: float
    low: float
    high: float
    note: str = ""

    @classmethod
    def checked(cls, value: float, low: float, high: float) -> "Level":
        wide = high - low > WIDE * abs(value)
        return cls(float(value), float(low), float(high), f"the interval is wider than {WIDE:g} times the level" if wide else "")


@dataclass(frozen=True)
class ParetoTail:
    """A generalised Pareto tail above ``threshold`` and how well it is known.

    ``rate`` is the number of exceedances per value of the series (of clusters, if it was declustered), of ``size`` values;
    ``covariance`` (3, 3) is that of (rate, scale, shape).
    """

    threshold: float
    scale: float
    shape: float
    covariance: np.ndarray
    rate: float
    size: int
    method: str
    excesses: np.ndarray = field(repr=False)

    @property
    def exceedances(self) -> int:
        return len(self.excesses)

    @property
    def shape_se(self) -> float:
        return float(np.sqrt(self.covariance[2, 2]))

    def __str__(self) -> str:
        return f"xi = {self.shape:.3f} +- {self.shape_se:.3f} from {self.exceedances} exceedances of {self.threshold:.4g}"

    def level(self, probability: float) -> float:
        """The value exceeded with a probability per value of the series: u + sigma / xi ((rate / p)^xi - 1)."""
        if not 0 < probability <= self.rate:
            raise UserError(f"a tail that begins at probability {self.rate:.3g} says nothing of {probability:.3g}: expected one in between")
        return self.threshold + self.scale * _growth(self.shape, self.rate / probability)

    def log_error(self, probability: float, covariance: np.ndarray | None = None) -> float:
        """The standard error of log(x - u), by propagation of the errors of rate, scale and shape."""
        ratio = self.rate / probability
        growth = _growth(self.shape, ratio)
        slope = np.array([ratio**self.shape / (growth * self.rate), 1 / self.scale, _growth_slope(self.shape, ratio) / growth])
        return float(np.sqrt(slope @ (self.covariance if covariance is None else covariance) @ slope))

    def delta(self, probability: float, confidence: float = 0.95) -> Level:
        """The level with its log-delta interval: normal in log(x - u)."""
        value = self.level(probability)
        factor = np.exp(norm.ppf(0.5 + confidence / 2) * self.log_error(probability))
        return Level.checked(value, self.threshold + (value - self.threshold) / factor, self.threshold + (value - self.threshold) * factor)

    def profile(self, probability: float, confidence: float = 0.95) -> Level:
        """The level with its profile-likelihood interval: {x: 2 (l_max - max_xi l(x, xi)) <= c chi2_1}, ends by root finding.

        The maximum likelihood level, whatever the fit's method. c is the variance of log(x - u) over that of as many independent
        exceedances (Chandler and Bate 2007, https://doi.org/10.1093/biomet/asm015), one unless they depend on each other; the
        error of the rate is added in quadrature.
        """
        best = fit_pareto(self.excesses, "ml", self.threshold, self.rate, self.size) if self.method != "ml" else self
        value, ratio = best.level(probability), best.rate / probability
        top, alone = _likelihood(best.excesses, best.scale, best.shape), _independent(best)
        inflation = (best.log_error(probability) / best.log_error(probability, alone)) ** 2
        drop = 0.5 * chi2.ppf(confidence, 1) * inflation

        def excess_deviance(log_excess: float) -> float:
            def loss(shape: float) -> float:
                return min(-_likelihood(best.excesses, np.exp(log_excess) / _growth(shape, ratio), shape), IMPOSSIBLE)

            width = 4 * best.shape_se + 0.05
            bounds = max(best.shape - width, LOWEST_SHAPE), min(best.shape + width, HIGHEST_SHAPE)
            return top + minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).fun - drop

        center, ends = np.log(value - best.threshold), []
        for sign in (-1, 1):
            step = 0.05
            while excess_deviance(center + sign * step) < 0 and step < 50:
                step *= 1.6
            ends.append(brentq(excess_deviance, center, center + sign * step, xtol=1e-6) if step < 50 else center + sign * np.inf)
        alone[1:, 1:] = 0
        rate = norm.ppf(0.5 + confidence / 2) * best.log_error(probability, alone) * np.sqrt(inflation)
        low, high = (best.threshold + np.exp(center + s * np.hypot(e - center, rate)) for s, e in zip((-1, 1), ends, strict=True))
        return Level.checked(value, low, high)


def _growth(shape: float, ratio: float) -> float:
    """(r^xi - 1) / xi, log r at zero."""
    power = shape * np.log(ratio)
    return np.log(ratio) * (np.expm1(power) / power if abs(power) > 1e-9 else 1.0)


def _growth_slope(shape: float, ratio: float) -> float:
    log = np.log(ratio)
    if abs(shape * log) < 1e-4:
        return 0.5 * log**2 + shape * log**3 / 3
    return (ratio**shape * (shape * log - 1) + 1) / shape**2


def _likelihood(excesses: np.ndarray, scale: float, shape: float) -> float:
    """The log-likelihood of a generalised Pareto law, -inf outside its support."""
    if abs(shape) < 1e-9:
        return -len(excesses) * np.log(scale) - excesses.sum() / scale
    inside = 1 + shape * excesses / scale
    if scale <= 0 or inside.min() <= 0:
        return -np.inf
    return -len(excesses) * np.log(scale) - (1 + 1 / shape) * np.log(inside).sum()


def fit_tail(values: np.ndarray, threshold: float | None = None, quantile: float = 0.95, method: str = "ml") -> ParetoTail:
    """The tail of independent values above a threshold, by default their 95 % quantile.

    Args:
        values: independent; of a series in time give cluster maxima: ``fit_series``.
        method: ``ml`` (maximum likelihood) or ``pwm`` (probability-weighted moments, better for few exceedances).

    Raises:
        UserError: fewer than 30 exceedances.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    threshold = float(np.quantile(values, quantile)) if threshold is None and values.size else float(threshold or 0.0)
    excesses = values[values > threshold] - threshold
    return fit_pareto(excesses, method, threshold, len(excesses) / max(values.size, 1), values.size)


def fit_pareto(excesses: np.ndarray, method: str, threshold: float, rate: float, size: int) -> ParetoTail:
    """The generalised Pareto law of excesses over a threshold."""
    if method not in ("ml", "pwm"):
        raise ValueError(f"method is ml or pwm, not {method!r}")
    if len(excesses) < FEWEST_EXCEEDANCES:
        raise UserError(
            f"{len(excesses)} exceedances of {threshold:.4g} say too little of a tail: expected {FEWEST_EXCEEDANCES} or more, "
            "so lower the threshold or give a longer series"
        )
    scale, shape = (maximum_likelihood if method == "ml" else _fit_pwm)(excesses)
    tail = ParetoTail(threshold, float(scale), float(shape), np.zeros((3, 3)), rate, size, method, excesses)
    return replace(tail, covariance=_independent(tail))


def _independent(tail: ParetoTail) -> np.ndarray:
    """The covariance of (rate, scale, shape) if the exceedances are independent."""
    one = (_covariance_ml if tail.method == "ml" else _covariance_pwm)(tail.scale, tail.shape)
    out = np.zeros((3, 3))
    out[0, 0], out[1:, 1:] = tail.rate * (1 - tail.rate) / tail.size, one / tail.exceedances
    return out


def _fit_pwm(excesses: np.ndarray) -> tuple[float, float]:
    """Probability-weighted moments: xi = 2 - l1 / l2, sigma = l1 (1 - xi), of the first two L-moments (Hosking and Wallis 1987)."""
    l1, l2 = l_moments(excesses)[:2]
    shape = 2 - l1 / l2
    return l1 * (1 - shape), shape


def _covariance_ml(scale: float, shape: float) -> np.ndarray:
    """Of (scale, shape) for one exceedance: the inverse of Fisher's information (Smith 1987)."""
    return (1 + shape) * np.array([[2 * scale**2, -scale], [-scale, 1 + shape]])


def _covariance_pwm(scale: float, shape: float) -> np.ndarray:
    """Of (scale, shape) for one exceedance (Hosking and Wallis 1987, https://doi.org/10.2307/1269343); infinite from xi = 1/2 on."""
    k = -shape
    if shape >= 0.5:
        return np.full((2, 2), np.inf)
    aa = scale**2 * (7 + 18 * k + 11 * k**2 + 2 * k**3)
    ak = scale * (2 + k) * (2 + 6 * k + 7 * k**2 + 2 * k**3)
    kk = (1 + k) * (2 + k) ** 2 * (1 + k + 2 * k**2)
    return np.array([[aa, -ak], [-ak, kk]]) / ((1 + 2 * k) * (3 + 2 * k))


def l_moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first two L-moments and L-skewness of samples (..., n), unbiased (Hosking 1990)."""
    x = np.sort(np.asarray(values, dtype=np.float64), -1)
    n = x.shape[-1]
    j = np.arange(n)
    b0, b1, b2 = x.mean(-1), x @ (j / (n - 1)) / n, x @ (j * (j - 1) / ((n - 1) * (n - 2))) / n
    l2 = 2 * b1 - b0
    return b0, l2, (6 * b2 - 6 * b1 + b0) / l2


# series in time


@dataclass(frozen=True)
class Clusters:
    """Runs of exceedances: indices of their maxima, the maxima, and the extremal index, clusters per exceedance."""

    where: np.ndarray
    peaks: np.ndarray
    extremal_index: float


def decluster(series: np.ndarray, threshold: float, run: int | None = None) -> Clusters:
    """Runs declustering: exceedances with fewer than ``run`` values below the threshold between them are one event.

    Args:
        series: successive values (time,); missing ones count as below.
        run: by default the gap that the extremal index of the intervals estimator implies (Ferro and Segers 2003).
    """
    series = np.nan_to_num(np.asarray(series, dtype=np.float64), nan=-np.inf)
    above = np.flatnonzero(series > threshold)
    if not above.size:
        return Clusters(above, series[above], 1.0)
    gaps = np.diff(above)
    if run is None:
        clusters = max(int(np.ceil(extremal_index(series, threshold) * above.size)), 1)
        run = int(np.sort(gaps)[::-1][clusters - 1]) if clusters <= gaps.size else 0
    first = np.append(True, gaps > run)
    order = np.lexsort((-series[above], np.cumsum(first)))  # by cluster, the largest first
    where = above[order[first]]
    return Clusters(where, series[where], len(where) / len(above))


def extremal_index(series: np.ndarray, threshold: float) -> float:
    """The intervals estimator, of the times T between exceedances: min(1, 2 (sum (T - 1))^2 / (N sum (T - 1) (T - 2))).

    Ferro and Segers 2003, https://doi.org/10.1111/1467-9868.00401; with T in place of T - 1 and T - 2 where no T exceeds two.
    """
    times = np.diff(np.flatnonzero(np.asarray(series) > threshold)).astype(np.float64)
    if not times.size:
        return 1.0
    if times.max() <= 2:
        return float(min(1.0, 2 * times.sum() ** 2 / (times.size * (times**2).sum())))
    return float(min(1.0, 2 * (times - 1).sum() ** 2 / (times.size * ((times - 1) * (times - 2)).sum())))


def fit_series(series: np.ndarray, quantile: float = 0.95, run: int | None = None) -> ParetoTail:
    """The tail of cluster maxima of series (time), (run, time) or (run, cell, time), by maximum likelihood.

    Its ``rate`` counts clusters, so that ``level(1 / N)`` is exceeded by one event in N values of a cell on average. The
    cells of a run, and events near in time, may depend on each other: the covariance is that of sums over some sixty blocks of
    time (all cells of a run together), which do not: sum_b I_b I_b^T, I the influences of the block's events (Smith 1990).
    """
    series = np.asarray(series, dtype=np.float64)
    series = series.reshape(*((1,) * (2 - series.ndim)), *series.shape) if series.ndim < 3 else series
    series = series[:, None] if series.ndim == 2 else series
    runs, cells, times = series.shape
    threshold, size = float(np.nanquantile(series, quantile)), int(np.isfinite(series).sum())
    per_run = min(max(round(BLOCKS / runs), 1), times)
    peaks, blocks = [], []
    for r in range(runs):
        for c in range(cells):
            found = decluster(series[r, c], threshold, run)
            peaks.append(found.peaks)
            blocks.append(r * per_run + found.where * per_run // times)
    peaks, blocks = np.concatenate(peaks), np.concatenate(blocks)
    tail = fit_pareto(peaks - threshold, "ml", threshold, len(peaks) / size, size)
    if runs * per_run < 2:
        return tail
    scores = _scores(tail) @ tail.covariance[1:, 1:]
    counts = np.bincount(blocks, minlength=runs * per_run)
    influence = np.stack([(counts - counts.mean()) / size, *(np.bincount(blocks, s, minlength=runs * per_run) for s in scores.T)], 1)
    return replace(tail, covariance=influence.T @ influence * len(counts) / (len(counts) - 1))


def _scores(tail: ParetoTail) -> np.ndarray:
    """The derivatives (n, 2) of the log-likelihood of every exceedance by scale and shape."""
    y, xi = tail.excesses / tail.scale, tail.shape
    inside = 1 + xi * y
    by_scale = ((1 + xi) * y / inside - 1) / tail.scale
    by_shape = np.log(inside) / xi**2 - (1 + 1 / xi) * y / inside if abs(xi) > 1e-5 else y**2 / 2 - y
    return np.stack([by_scale, by_shape], 1)
