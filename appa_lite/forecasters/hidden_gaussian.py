"""Exact posteriors of simulators whose state is a Gaussian process, whatever is observed of their fields."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.blocks import Blocks
from appa_lite.core.errors import UserError
from appa_lite.core.random import Streams, derive
from appa_lite.forecasters.base import Assimilator, Progress, silent
from appa_lite.observations.base import Observation
from appa_lite.simulators.base import Simulator, states

TRIALS = 40  # of a move, after which the bracket of angles is 2^-40 wide or so


class HiddenGaussian(Assimilator):
    """The exact posterior of a simulator whose state is a Gaussian process: what any assimilation of its fields aims at.

    Each member is a Markov chain of its own (``hidden_posterior``), of which the last state is kept.

    Args:
        simulator: whose states are ``gaussian``.
        steps: of the chain; it is long enough when more of them change nothing.
        burn_in: steps before those, during which the errors of the observations shrink from ten times their size.

    Raises:
        UserError: the simulator's states are no Gaussian process, or there are no steps.
    """

    def __init__(self, simulator: Simulator, steps: int = 2000, burn_in: int = 500):
        if not simulator.gaussian:
            raise UserError(
                f"hidden_gaussian needs a simulator whose state is a Gaussian process, such as advected_rain or gaussian_process: "
                f"{type(simulator).__name__} has no posterior in closed form"
            )
        if steps < 1 or burn_in < 0:
            raise UserError(f"hidden_gaussian needs steps >= 1 and burn_in >= 0, got {steps} and {burn_in}")
        self.simulator, self.steps, self.burn_in = simulator, steps, burn_in

    def assimilate(
        self, observation: Observation | None, times: np.ndarray, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        name = f"{len(members)} chains"
        fields = hidden_posterior(
            self.simulator, observation, len(times), members, seed, self.steps, self.burn_in, lambda *done: progress(name, *done)
        )
        return fields.float()


@torch.no_grad()
def hidden_posterior(
    simulator: Simulator, observation: Observation | None, frames: int, members: Sequence[int], seed: int, steps: int = 2000,
    burn_in: int = 500, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:  # fmt: skip
    """Fields (members, T, C, H, W) given observations of the first ``frames`` frames of a stationary run.

    The states of ``simulator`` must be a Gaussian process of mean zero (``AdvectedRain``, ``GaussianProcess``); its fields
    may be any function of them. Elliptical slice sampling (Murray, Adams and MacKay 2010): with a draw v of the prior,

        x' = x cos(a) + v sin(a),    a from a bracket that shrinks until log p(y | x') > log p(y | x) + log u

    leaves p(x | y) as it is, needs no gradient and no step size, and takes dry cells for what they are: all hidden values
    below the threshold are equally likely. Errors may be correlated, or Student's. Each member is a chain of its own, of which
    the last state is kept; during the ``burn_in`` the errors shrink from ten times their size. The chains have converged when
    more steps change nothing.

    Frames that nothing ties together, of a process without memory and observed one by one, have angles of their own.
    """
    members, fields = list(members), simulator.fields

    def prior(number: int) -> Tensor:
        return torch.stack(list(states(simulator, derive(seed, "prior", number), members, frames, 0)), dim=1)

    x = prior(-1)
    if observation is None:
        return fields(x.flatten(0, 1)).unflatten(0, (len(members), frames))
    lone = torch.equal(observation.operator.first, observation.operator.last) and observation.correlation is None
    apart = lone and getattr(simulator, "memory", None) == 0
    blocks = observation.operator.frame.cpu() if apart else torch.zeros(len(observation), dtype=torch.long)
    count, state = frames if apart else 1, x.shape[2:]
    variance, mixing = observation.variance.double(), observation.mixing() or Blocks((), ())
    chance, degrees = Streams(seed, members, "slices"), observation.degrees
    x = x.reshape(len(members) * count, frames // count, *state)
    seen = fields(x.flatten(0, 1)).unflatten(0, x.shape[:2]).clone()  # of the proposals, those of settled chains out of date

    def likelihood(rows: Tensor, x: Tensor) -> Tensor:
        """(R,) of the states (R, T, ...) of some chains, up to a constant, with the errors of the step at hand."""
        seen[rows] = fields(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        residual = mixing(observation.residual(seen.reshape(len(members), frames, *seen.shape[2:])))
        square = residual**2 / (inflation**2 * variance)
        terms = -square / 2 if degrees is None else -(degrees + 1) / 2 * torch.log1p(square / degrees)
        return terms.new_zeros(len(members), count).index_add(1, blocks, terms).flatten()[rows]

    for step in range(burn_in + steps):
        inflation = 10 ** max(0.0, 1 - 2 * step / max(burn_in, 1))
        uniform = torch.special.ndtr(chance.normal((count, TRIALS), torch.float64)).flatten(0, 1)
        x = slice_step(x, prior(step).reshape(x.shape), likelihood, uniform)
        progress(step + 1, burn_in + steps)
    return fields(x.flatten(0, 1)).unflatten(0, (len(members), frames))


def slice_step(x: Tensor, v: Tensor, likelihood: Callable[[Tensor, Tensor], Tensor], uniform: Tensor) -> Tensor:
    """One move of every chain (B, ...), given a draw v of the prior, (chains (R,), their states) -> log likelihood (R,), and
    uniform numbers (B, n).

    A chain whose bracket has not met the slice after n - 1 trials, where it is 2^(1 - n) wide or so, stays where it is.
    """
    rows, shape = torch.arange(len(x)), (-1, *[1] * (x.ndim - 1))
    level = likelihood(rows, x) + torch.log(uniform[:, 0])
    angle = 2 * math.pi * uniform[:, 1]
    low, high, out = angle - 2 * math.pi, angle.clone(), x.clone()
    for trial in range(2, uniform.shape[1]):
        a = angle[rows].reshape(shape).to(x)
        proposal = x[rows] * torch.cos(a) + v[rows] * torch.sin(a)
        accepted = likelihood(rows, proposal) > level[rows]
        out[rows[accepted]] = proposal[accepted]
        rows = rows[~accepted]
        if not len(rows):
            break
        below = angle[rows] < 0
        low[rows], high[rows] = torch.where(below, angle[rows], low[rows]), torch.where(below, high[rows], angle[rows])
        angle[rows] = low[rows] + (high[rows] - low[rows]) * uniform[rows, trial]
    return out
