"""Subset simulation: a rare event as the last of a series of events none of which is rare."""

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.diffusion.rare_events.base import Estimate, Progress, RareEventMethod, Response, family_error, lognormal, quiet
from appa_lite.diffusion.rare_events.crank_nicolson import StepSize, ensemble, move


class SubsetSimulation(RareEventMethod):
    """P(S > s) = P(S > b_1) P(S > b_2 | S > b_1) ... P(S > s | S > b_l), each of them near ``share``.

    The levels are quantiles of the samples; those above one are the seeds of Markov chains that stay above it, all of
    whose states are the samples of the next level. Au & Beck 2001, with the preconditioned Crank-Nicolson kernel of
    Papaioannou et al. 2015. It has a small positive bias, as levels are quantiles of the samples that they are estimated
    from. Its error is that of the sizes of families (see ``family_error``).

    Args:
        samples: N of a level; share: p_0; max_levels: after which the event is out of reach; moves: of the ensemble's
            members within the event, after they are drawn from the last level's samples.
    """

    def __init__(self, samples: int = 2000, share: float = 0.1, max_levels: int = 16, moves: int = 10):
        if not (samples >= 20 and 0 < share <= 0.5 and samples * share >= 5 and max_levels >= 1 and moves >= 0):
            raise UserError(f"subset simulation needs 0 < share <= 0.5 and samples * share >= 5, found {share} and {samples}")
        self.chains, self.length = round(samples * share), round(1 / share)
        self.samples, self.share, self.max_levels, self.moves = samples, share, max_levels, moves

    def estimate(
        self, response: Response, threshold: float, members: int, generator: torch.Generator, progress: Progress | None = None
    ) -> Estimate:
        progress, step, probability, before = progress or quiet, StepSize(), 1.0, response.calls
        z, family = response.noise(self.samples, generator), torch.arange(self.samples)
        values = response(z)
        for number in range(1, self.max_levels + 2):
            hits = (values > threshold).double()
            if float(hits.mean()) >= self.share:
                break
            level, seeds = cut(values, self.share)
            if number > self.max_levels:
                raise UserError(
                    f"the event S > {threshold:.4g} is out of reach: level {number} is S > {level:.4g}, of probability "
                    f"{probability * self.share:.1g}; check its units, or raise method.max_levels"
                )
            probability *= len(seeds) / len(values)
            seeds = seeds[torch.arange(self.chains) % len(seeds)]
            what = f"level {number}: S > {level:.4g}, probability {probability:.2g}"
            tell = lambda done, what=what: progress(what, done, self.length - 1)  # noqa: E731
            beta = step.beta(probability)
            z, values, accepted = self._chains(response, z[seeds], values[seeds], level, beta, generator, tell)
            family = family[seeds].repeat_interleave(self.length)
            step.learn(accepted)
        probability *= float(hits.mean())
        error, calls = family_error(family, hits, self.samples), response.calls
        told, found = ensemble(response, z, values, hits, threshold, members, step.beta(probability), self.moves, generator)
        return Estimate(probability, *lognormal(probability, error), error, calls - before, told, found, {"levels": float(number)})

    def _chains(self, response: Response, z: Tensor, values: Tensor, level: float, beta: float, generator: torch.Generator, tell):
        """All states of the chains that begin at the seeds z, chain by chain, and the share of moves that were accepted."""
        states, taken = [(z, values)], []
        for done in range(1, self.length):
            z, values, accepted = move(response, z, values, level, beta, generator)
            states.append((z, values))
            taken.append(accepted.double().mean())
            tell(done)
        noise, found = (torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*states, strict=True))
        return noise, found, float(torch.stack(taken).mean())


def cut(values: Tensor, share: float) -> tuple[float, Tensor]:
    """The level that ``share`` of the values (N,) is above, fewer where values are tied, and the indices of those above.

    Raises:
        UserError: so many values are equal to the largest that no level divides them.
    """
    level = float(values.sort(descending=True).values[round(share * len(values))])
    above = torch.nonzero(values > level).flatten()
    if not len(above):
        raise UserError(
            f"more than {share:.0%} of the samples have the same largest S = {level:.4g}, so that no level leads on to the event: "
            "choose a functional that grows towards it, such as area_mean or max in place of fraction"
        )
    return level, above
