"""The generalised Pareto law of exceedances: P(X > x) = (1 + shape x / scale)^(-1 / shape)."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

LOWEST_SHAPE, HIGHEST_SHAPE = -0.5, 2.0  #: maximum likelihood is irregular below; above, nothing physical
IMPOSSIBLE = 1e15  #: minus the log-likelihood where it has no maximum: finite, for minimisers


@dataclass(frozen=True)
class Pareto:
    """A fit: ``shape`` (the tail index xi), ``scale`` (in the units of the data), and the standard error of the shape
    for independent exceedances, (1 + shape) / sqrt(count) (Smith 1987; 1 / sqrt(count) at least)."""

    shape: float
    scale: float
    count: int

    @property
    def shape_error(self) -> float:
        return max(1 + self.shape, 1.0) / math.sqrt(self.count)


def fit_pareto(excess: ArrayLike) -> Pareto:
    """Maximum likelihood for exceedances (n,), all positive.

    Raises:
        ValueError: fewer than ten exceedances, or one that is not positive.
    """
    x = np.asarray(excess, dtype=np.float64).ravel()
    if len(x) < 10 or not (x > 0).all():
        raise ValueError(f"a tail is fitted to at least ten positive exceedances, found {int((x > 0).sum())}")
    scale, shape = maximum_likelihood(x)
    return Pareto(shape, scale, len(x))


def maximum_likelihood(excesses: np.ndarray) -> tuple[float, float]:
    """(scale, shape), by the profile in theta = shape / scale: shape = mean log(1 + theta y) (Grimshaw 1993).

        log L / n = -log(shape / theta) - shape - 1

    theta = (e^s - 1) / max(y) is searched over s, where the support is respected; the best of a grid is refined.
    """
    largest, mean = float(excesses.max()), float(excesses.mean())

    def loss(s: float) -> float:
        theta = np.expm1(s) / largest
        if abs(theta * mean) < 1e-7:  # the exponential law
            return np.log(mean) + 1
        shape = np.log1p(theta * excesses).mean()
        return np.log(shape / theta) + shape + 1 if LOWEST_SHAPE <= shape <= HIGHEST_SHAPE else IMPOSSIBLE

    grid = np.linspace(-6.0, np.log1p(20 * largest / mean), 64)
    losses = [loss(s) for s in grid]
    k = int(np.argmin(losses))
    s = minimize_scalar(loss, bounds=(grid[max(k - 1, 0)], grid[min(k + 1, 63)]), method="bounded", options={"xatol": 1e-9}).x
    theta = np.expm1(s) / largest
    if abs(theta * mean) < 1e-7:
        return mean, 0.0
    shape = float(np.log1p(theta * excesses).mean())
    return shape / float(theta), shape
