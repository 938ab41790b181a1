"""Moves that leave white noise above a level: the preconditioned Crank-Nicolson kernel, and how far it should go.

    z' = sqrt(1 - beta^2) z + beta n,  accepted where S(T(z')) > level

leaves N(0, I) given {S(T(z)) > level} invariant for any beta, in any dimension, without a density to evaluate.
Cotter, Roberts, Stuart & White 2013, section 4; in subset simulation, Papaioannou, Betz, Zwirglmaier & Straub 2015.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from appa_lite.diffusion.rare_events.base import Response, resample

TARGET = 0.35  #: acceptance for which chains forget fastest, or nearly
STEPS = torch.logspace(-2.5, 0, 160, dtype=torch.float64)


def move(
    response: Response, z: Tensor, values: Tensor, level: float, beta: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every chain: z (N, d), its values (N,), and which were accepted (N,)."""
    proposal = math.sqrt(1 - beta**2) * z + beta * response.noise(len(z), generator).to(z)
    found = response(proposal)
    accepted = found > level
    return torch.where(accepted[:, None], proposal, z), torch.where(accepted, found, values), accepted


def acceptance(beta: Tensor, quantile: float) -> Tensor:
    """Of the kernel on a linear response exceeded with probability Phi(-quantile), for steps (n,): (n,).

    E[Phi((sqrt(1 - beta^2) u - b) / beta)] over u ~ N(0, 1) given u > b, on the quantiles of u.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    ranks = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    u = -normal.icdf(ranks * float(normal.cdf(torch.tensor(-quantile, dtype=torch.float64))))
    return normal.cdf(((1 - beta[:, None] ** 2).sqrt() * u - quantile) / beta[:, None]).mean(1)


@dataclass
class StepSize:
    """beta of the next level: what a linear response would accept ``TARGET`` of, corrected by what the last level accepted.

    It is chosen before a level's first move and kept through it, so that the chains of a level are Markov chains.
    """

    factor: float = 1.0

    def beta(self, probability: float) -> float:
        """For a level exceeded with ``probability``."""
        quantile = float(-torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(min(max(probability, 1e-12), 0.5), dtype=torch.float64)))
        best = STEPS[int((acceptance(STEPS, quantile) - TARGET).abs().argmin())]
        return float(min(1.0, max(1e-3, best * self.factor)))

    def learn(self, accepted: float) -> None:
        """From the share of a level's moves that were accepted."""
        self.factor *= math.exp(2 * (accepted - TARGET))


def ensemble(
    response: Response,
    z: Tensor,
    values: Tensor,
    weights: Tensor,
    threshold: float,
    members: int,
    beta: float,
    moves: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """``members`` draws given the event from weighted ones: resampled, then moved within the event, after which few are copies."""
    chosen = resample(weights, members, generator)
    z, values = z[chosen], values[chosen]
    for _ in range(moves):
        z, values, _ = move(response, z, values, threshold, beta, generator)
    return z, values
