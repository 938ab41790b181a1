"""The generalised Pareto law of exceedances: P(X > x) = (1 + shape x / scale)^(-1 / shape)."""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

LOWEST, HIGHEST = -0.5, 2.0  # shapes within which the fit looks: below, likelihoods have no regular maximum


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


def fit_pareto(excess: Tensor) -> Pareto:
    """Maximum likelihood for exceedances (n,), all positive.

    In the ratio theta = shape / scale the shape that maximises the likelihood is mean(log(1 + theta x)), which leaves one
    number to search for (Grimshaw 1993):  log L / n = -log(shape / theta) - shape - 1.

    Raises:
        ValueError: fewer than ten exceedances, or one that is not positive.
    """
    x = excess.detach().double().flatten()
    if len(x) < 10 or not bool((x > 0).all()):
        raise ValueError(f"a tail is fitted to at least ten positive exceedances, found {int((x > 0).sum())}")
    mean, largest = float(x.mean()), float(x.max())
    x = x / mean  # so that numbers are of order one whatever the units

    def shape_of(theta: float) -> float:
        return float(torch.log1p(theta * x).mean())

    def cost(theta: float) -> float:
        if abs(theta) < 1e-8:  # the exponential law, with scale one
            return 1.0
        shape = shape_of(theta)
        return math.log(shape / theta) + shape + 1 if LOWEST < shape < HIGHEST else 1e6

    edge = -mean / largest  # 1 + theta x must stay positive
    # in u = log(theta - edge) the cost has one minimum for the sizes of samples that tails are fitted to; a grid finds it
    grid = [edge + math.exp(u) for u in torch.linspace(math.log(-edge * 1e-6), math.log(10 - edge), 60).tolist()]
    best = min(range(len(grid)), key=lambda i: cost(grid[i]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    theta = float(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
    shape = shape_of(theta)
    scale = 1.0 if abs(theta) < 1e-8 else shape / theta
    return Pareto(shape, scale * mean, len(x))
