"""The words of rare events: how likely a response to white noise is to exceed a threshold, and noise for which it does.

A deterministic sampler is a map x = T(z) from white noise to trajectories, so that P(S(x) > s) is the probability of a
region of a standard normal, whatever the model: the methods of structural reliability apply as they are.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from appa_lite.core.errors import UserError

Progress = Callable[[str, int, int], None]  #: (what, done, all)
WIDE = 1.96  #: half the width of an interval, in standard errors: 95 %


class Response:
    """S(T(z)) of white noise z (N, d): (N,). Counts its calls, one a row.

    Args:
        function: z (B, d) -> (B,), in the precision of z; dimension: d; batch: rows computed at once;
        dtype: of the noise; differentiable: the function can be differentiated.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        dimension: int,
        batch: int = 1024,
        dtype: torch.dtype = torch.float64,
        differentiable: bool = True,
    ):
        self.function, self.dimension, self.batch, self.dtype = function, dimension, batch, dtype
        self.differentiable, self.calls, self.gradients = differentiable, 0, 0

    def noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """White noise (rows, d)."""
        return torch.randn(rows, self.dimension, generator=generator, dtype=self.dtype)

    def __call__(self, noise: Tensor) -> Tensor:
        self.calls += len(noise)
        with torch.no_grad():
            values = torch.cat([self.function(part).double() for part in noise.split(self.batch)])
        if not torch.isfinite(values).all():
            raise FloatingPointError("the event's functional is not finite on samples of this model")
        return values

    def check_gradient(self) -> None:
        """Raise UserError if there is no derivative."""
        if not self.differentiable:
            raise UserError("this method needs the derivative of the event along the sampler, which is not to be had here: method=subset")

    def gradient(self, noise: Tensor) -> tuple[float, Tensor]:
        """The value and its gradient (d,) at one z (d,)."""
        self.calls += 1
        self.gradients += 1
        with torch.enable_grad():
            z = noise.detach()[None].requires_grad_()
            value = self.function(z)[0]
            if not value.requires_grad:
                return float(value), torch.zeros_like(noise)
            return float(value.detach()), torch.autograd.grad(value, z)[0][0]


@dataclass(frozen=True)
class Estimate:
    """A probability with its error, and an ensemble given the event.

    Attributes:
        probability: P(S > s); None from a method that does not tell. low, high: 95 % interval;
        error: standard error of the probability, relative to it;
        calls: of the response; noise: z of members given the event (M, d); values: S of them (M,); facts: of the method.
    """

    probability: float | None
    low: float | None
    high: float | None
    error: float
    calls: int
    noise: Tensor
    values: Tensor
    facts: dict[str, float] = field(default_factory=dict)


def lognormal(probability: float, error: float) -> tuple[float, float]:
    """The 95 % interval of a positive estimate with relative standard error ``error``: its logarithm is taken for normal."""
    width = WIDE * math.sqrt(math.log1p(error**2))
    return probability * math.exp(-width), min(1.0, probability * math.exp(width))


def family_error(family: Tensor, weights: Tensor, ancestors: int) -> float:
    """Relative standard error of a probability that the descendants of independent samples have estimated.

        sum_i (f_i - 1 / N)^2,   f_i = share of those in the event that descend from sample i

    It needs no independence of levels or chains, only of families. Chan & Lai 2013.

    Args:
        family: the ancestor of each (M,); weights: 1 in the event, 0 outside (M,); ancestors: N.
    """
    shares = torch.zeros(ancestors, dtype=torch.float64).index_add(0, family, weights / weights.sum())
    return math.sqrt(max(float(shares.square().sum()) - 1 / ancestors, 0.0))


@dataclass(frozen=True)
class Level:
    """The s that S exceeds with a given probability, its 95 % interval, and the calls of the response."""

    threshold: float
    low: float
    high: float
    calls: int


def exceeded(curve: Sequence[tuple[float, Tensor]], probability: float) -> float:
    """The s with P(S > s) = p on a curve of samples (P_l, values given that they are in a part of probability P_l), P_l falling."""
    inside, values = next((part for part in reversed(curve) if part[0] >= probability), curve[0])
    ordered = values.sort().values
    place = min(max((1 - probability / inside) * len(ordered) - 0.5, 0.0), len(ordered) - 1.0)
    below = math.floor(place)
    return float(torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below))


def level_of(curve: Sequence[tuple[float, Tensor]], probability: float, error: float, calls: int) -> Level:
    """The level with the interval of those that P exceeds by its own interval, given its relative ``error`` there."""
    low, high = lognormal(probability, error)
    return Level(exceeded(curve, probability), exceeded(curve, high), exceeded(curve, low), calls)


class Method:
    """Any way to a rare event."""


@dataclass(frozen=True)
class GuidedSample:
    """Latents given the event (M, T, Z, h, w), the passes through the network, and the probability if the method tells it."""

    latents: Tensor
    passes: int
    probability: float | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None


class GuidedMethod(Method, ABC):
    """Samples the event through the denoiser, with derivatives, rather than in the noise of a sampler."""

    @abstractmethod
    def sample(self, event: Any, members: int, batch: int, generator: torch.Generator, progress: Progress | None = None) -> GuidedSample:
        """``event`` is a ``guidance.event.LatentEvent``."""


class RareEventMethod(Method, ABC):
    """Estimates P(S(T(z)) > s) for z ~ N(0, I)."""

    @abstractmethod
    def estimate(
        self, response: Response, threshold: float, members: int, generator: torch.Generator, progress: Progress | None = None
    ) -> Estimate:
        """The probability, and ``members`` draws given the event.

        Raises:
            UserError: the event does not occur, or is beyond the method.
        """

    def level(self, response: Response, probability: float, generator: torch.Generator, progress: Progress | None = None) -> Level:
        """The s with P(S > s) = p.

        Raises:
            UserError: a method that needs a threshold, or a probability beyond it.
        """
        raise UserError("probability=... and return_period=... need method=subset, or brute_force: other methods need a threshold")


def quiet(what: str, done: int, total: int) -> None:
    """No progress shown."""


def resample(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` rows drawn with probabilities proportional to ``weights`` (N,), as evenly as can be: systematic, then shuffled."""
    uniform = (torch.arange(count, dtype=torch.float64) + torch.rand((), generator=generator, dtype=torch.float64)) / count
    picks = torch.searchsorted((weights.double() / weights.double().sum()).cumsum(0), uniform).clamp(max=len(weights) - 1)
    return picks[torch.randperm(count, generator=generator)]
