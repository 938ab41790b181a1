"""Exact posteriors of simulators whose state is a Gaussian process, whatever is observed of their fields."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from appa_lite.core.random import Streams, derive
from appa_lite.observations.base import Observation
from appa_lite.simulators.base import Simulator, states


@torch.no_grad()
def hidden_posterior(
    simulator: Simulator, observation: Observation, frames: int, members: Sequence[int], seed: int, steps: int = 2000, burn_in: int = 500
) -> Tensor:
    """Fields (members, T, C, H, W) given observations of the first ``frames`` frames of a stationary run.

    The states of ``simulator`` must be a Gaussian process of mean zero (``AdvectedRain``, ``GaussianProcess``); its fields
    may be any function of them. Elliptical slice sampling (Murray, Adams and MacKay 2010): with a draw v of the prior,

        x' = x cos(a) + v sin(a),    a from a bracket that shrinks until log p(y | x') > log p(y | x) + log u

    leaves p(x | y) as it is, needs no gradient and no step size, and takes dry cells for what they are: all hidden values
    below the threshold are equally likely. Each member is a chain of its own, of which the last state is kept; during the
    ``burn_in`` the errors shrink from ten times their size. The chains have converged when more steps change nothing.
    """
    members = list(members)
    variance = observation.variance.double()

    def prior(number: int) -> Tensor:
        return torch.stack(list(states(simulator, derive(seed, "prior", number), members, frames, 0)), dim=1)

    def likelihood(x: Tensor, inflation: float) -> Tensor:
        fields = torch.stack([simulator.fields(s) for s in x.unbind(1)], dim=1)
        return -(observation.residual(fields) ** 2 / (2 * inflation**2 * variance)).sum(-1)

    x, chance = prior(-1), Streams(seed, members, "slices")
    for step in range(burn_in + steps):
        inflation = 10 ** max(0.0, 1 - 2 * step / max(burn_in, 1))
        x = slice_step(x, prior(step), lambda x, by=inflation: likelihood(x, by), torch.special.ndtr(chance.normal((40,), torch.float64)))
    return torch.stack([simulator.fields(s) for s in x.unbind(1)], dim=1)


def slice_step(x: Tensor, v: Tensor, likelihood: Callable[[Tensor], Tensor], uniform: Tensor) -> Tensor:
    """One move of every chain (B, ...), given a draw v of the prior, the log likelihood (B,) and uniform numbers (B, n).

    A chain whose bracket has not met the slice after n - 1 trials, where it is 2^(1 - n) wide or so, stays where it is.
    """
    shape = (-1, *[1] * (x.ndim - 1))
    level = likelihood(x) + torch.log(uniform[:, 0])
    angle = 2 * math.pi * uniform[:, 1]
    low, high = angle - 2 * math.pi, angle
    out, waiting = x.clone(), torch.ones(len(x), dtype=torch.bool)
    for trial in range(2, uniform.shape[1]):
        proposal = x * torch.cos(angle).reshape(shape) + v * torch.sin(angle).reshape(shape)
        accepted = waiting & (likelihood(proposal) > level)
        out[accepted] = proposal[accepted]
        waiting &= ~accepted
        if not waiting.any():
            break
        low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)
        angle = torch.where(waiting, low + (high - low) * uniform[:, trial], angle)
    return out
