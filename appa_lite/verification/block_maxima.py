"""Block maxima: generalised extreme value fits and return levels.

    P(M <= x) = exp(-(1 + xi (x - mu) / sigma)^(-1 / xi))

Under 50 maxima by L-moments, whose errors are smaller there (Hosking et al. 1985, https://doi.org/10.1080/00401706.1985.10488049).
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import gamma
from scipy.stats import chi2, genextreme, norm

from appa_lite.core.errors import UserError
from appa_lite.verification.extreme_values import Level, l_moments

FEWEST_MAXIMA = 15  #: below which no law is fitted
FEW_MAXIMA = 50  #: below which L-moments are used
REPLICATES = 500  #: of the parametric bootstrap behind the errors of L-moment fits


@dataclass(frozen=True)
class ExtremeValueFit:
    """A generalised extreme value law: location, scale, shape, and their covariance (3, 3)."""

    location: float
    scale: float
    shape: float
    covariance: np.ndarray
    method: str
    maxima: np.ndarray = field(repr=False)

    @property
    def shape_se(self) -> float:
        return float(np.sqrt(self.covariance[2, 2]))

    def __str__(self) -> str:
        return f"xi = {self.shape:.3f} +- {self.shape_se:.3f} from {len(self.maxima)} maxima ({self.method})"

    def level(self, period: float) -> float:
        """The level exceeded by one block in ``period``: mu + sigma / xi (y^-xi - 1), y = -log(1 - 1 / period)."""
        return _level(self.location, self.scale, self.shape, period)

    def delta(self, period: float, confidence: float = 0.95) -> Level:
        """The level with its log-delta interval: normal in log(x - mu)."""
        value, theta = self.level(period), np.array([self.location, self.scale, self.shape])
        steps = 1e-5 * np.array([self.scale, self.scale, 1.0])
        slope = np.array([(_level(*(theta + s), period) - _level(*(theta - s), period)) / (2 * s.sum()) for s in np.diag(steps)])
        excess = value - self.location
        factor = np.exp(norm.ppf(0.5 + confidence / 2) * np.sqrt(slope @ self.covariance @ slope) / excess)
        return Level.checked(value, self.location + excess / factor, self.location + excess * factor)

    def profile(self, period: float, confidence: float = 0.95) -> Level:
        """The maximum likelihood level with its profile-likelihood interval, its ends by root finding."""
        best = self if self.method == "ml" else fit_maxima(self.maxima, "ml")
        value, drop = best.level(period), 0.5 * chi2.ppf(confidence, 1)
        top = _loss(np.array([best.location, np.log(best.scale), best.shape]), best.maxima)

        def excess_deviance(level: float) -> float:
            def loss(theta: np.ndarray) -> float:  # the location follows from the level
                location = level - _level(0.0, np.exp(theta[0]), theta[1], period)
                return _loss(np.array([location, *theta]), best.maxima)

            start = np.array([np.log(best.scale), best.shape])
            return minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-8}).fun - top - drop

        ends = []
        for sign in (-1, 1):
            step = 0.1 * best.scale
            while excess_deviance(value + sign * step) < 0 and step < 1e4 * best.scale:
                step *= 1.6
            ends.append(brentq(excess_deviance, value, value + sign * step, xtol=1e-5 * best.scale))
        return Level.checked(value, *ends)


def fit_maxima(maxima: np.ndarray, method: str | None = None) -> ExtremeValueFit:
    """The law of independent block maxima (n,): ``ml`` or ``l_moments``; by default L-moments under 50 maxima.

    Raises:
        UserError: fewer than 15 maxima.
    """
    maxima = np.asarray(maxima, dtype=np.float64).ravel()
    maxima = maxima[np.isfinite(maxima)]
    if len(maxima) < FEWEST_MAXIMA:
        raise UserError(f"{len(maxima)} block maxima say too little of extremes: expected {FEWEST_MAXIMA} or more, so take shorter blocks")
    method = method or ("l_moments" if len(maxima) < FEW_MAXIMA else "ml")
    theta = np.array([float(v) for v in _fit_l_moments(maxima)])
    if method == "l_moments":
        law = genextreme(-theta[2], theta[0], theta[1])
        drawn = law.rvs((REPLICATES, len(maxima)), np.random.default_rng(len(maxima)))
        return ExtremeValueFit(*theta.tolist(), np.cov(np.stack(_fit_l_moments(drawn))), method, maxima)
    if method != "ml":
        raise ValueError(f"method is ml or l_moments, not {method!r}")
    start = np.array([theta[0], np.log(theta[1]), np.clip(theta[2], -0.4, 0.6)])
    if not np.isfinite(_loss(start, maxima)):
        start[2] = 0.1
    options = {"xatol": 1e-8, "fatol": 1e-10, "maxiter": 5000, "maxfev": 5000}
    found = minimize(_loss, start, (maxima,), method="Nelder-Mead", options=options).x
    scale = np.exp(found[1])
    jacobian = np.diag([1.0, scale, 1.0])
    covariance = jacobian @ np.linalg.inv(_hessian(found, maxima)) @ jacobian
    return ExtremeValueFit(float(found[0]), float(scale), float(found[2]), covariance, method, maxima)


def block_maxima(series: np.ndarray, block: int) -> np.ndarray:
    """Maxima of successive blocks of series (..., time), flat; an incomplete last block is left out."""
    series = np.asarray(series, dtype=np.float64)
    blocks = series.shape[-1] // block
    return np.nanmax(series[..., : blocks * block].reshape(*series.shape[:-1], blocks, block), -1).ravel()


def _level(location: float, scale: float, shape: float, period: float) -> float:
    y = -np.log(-np.log1p(-1 / period))
    return location + scale * (np.expm1(shape * y) / shape if abs(shape) > 1e-9 else y)


def _loss(theta: np.ndarray, maxima: np.ndarray) -> float:
    """The negative log-likelihood of (location, log scale, shape); infinite outside the support and below xi = -1/2."""
    location, log_scale, shape = theta
    z = (maxima - location) * np.exp(-log_scale)
    if abs(shape) < 1e-7:
        return float(len(z) * log_scale + (z + np.exp(-z)).sum())
    inside = 1 + shape * z
    if shape < -0.5 or inside.min() <= 0:
        return np.inf
    logs = np.log(inside)
    return float(len(z) * log_scale + (1 + 1 / shape) * logs.sum() + np.exp(-logs / shape).sum())


def _hessian(theta: np.ndarray, maxima: np.ndarray) -> np.ndarray:
    steps = np.diag(1e-4 * np.array([np.exp(theta[1]), 1.0, 1.0]))
    out = np.empty((3, 3))
    for i, a in enumerate(steps):
        for j, b in enumerate(steps):
            corners = [_loss(theta + s * a + t * b, maxima) * s * t for s in (1, -1) for t in (1, -1)]
            out[i, j] = sum(corners) / (4 * a.sum() * b.sum())
    return out


def _fit_l_moments(maxima: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Location, scale and shape of samples (..., n), with k = -xi from 2 (1 - 3^-k) / (1 - 2^-k) = 3 + t3, by Newton's method."""
    l1, l2, t3 = l_moments(maxima)
    c = 2 / (3 + t3) - np.log(2) / np.log(3)
    k = 7.8590 * c + 2.9554 * c**2  # Hosking's approximation
    for _ in range(8):
        k = np.where(np.abs(k) < 1e-6, 1e-6, k)
        a, b = 1 - 3.0**-k, 1 - 2.0**-k
        slope = 2 * (np.log(3) * 3.0**-k * b - np.log(2) * 2.0**-k * a) / b**2
        k = np.clip(k - (2 * a / b - 3 - t3) / slope, -0.99, 5.0)
    k = np.where(np.abs(k) < 1e-6, 1e-6, k)
    scale = l2 * k / ((1 - 2.0**-k) * gamma(1 + k))
    return l1 - scale * (1 - gamma(1 + k)) / k, scale, -k
