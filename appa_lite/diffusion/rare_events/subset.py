"""Subset simulation: a rare event as the last of a series of events none of which is rare."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.diffusion.rare_events.base import (
    Estimate,
    Level,
    Progress,
    RareEventMethod,
    Response,
    exceeded,
    family_error,
    level_of,
    lognormal,
    quiet,
)
from appa_lite.diffusion.rare_events.crank_nicolson import StepSize, ensemble, move


@dataclass(frozen=True)
class Rung:
    """The samples of a level: its probability, noise (N, d), values (N,), ancestors (N,), and the values of all levels up to it."""

    probability: float
    noise: Tensor
    values: Tensor
    family: Tensor
    curve: tuple[tuple[float, Tensor], ...]


class SubsetSimulation(RareEventMethod):
    """P(S > s) = P(S > b_1) P(S > b_2 | S > b_1) ... P(S > s | S > b_l), each of them near ``share``.

    The levels are quantiles of the samples; those above one are the seeds of Markov chains that stay above it, all of
    whose states are the samples of the next level. Au & Beck 2001, with the preconditioned Crank-Nicolson kernel of
    Papaioannou et al. 2015. It has a small positive bias, as levels are quantiles of the samples that they are estimated
    from. Its error is that of the sizes of families (see ``family_error``). With a probability in place of the threshold s,
    the levels end where that probability is reached, and s is a quantile of the last samples.

    Args:
        samples: N of a level; share: p_0; max_levels: after which the event is out of reach; moves: of the ensemble's
            members within the event, after they are drawn from the last level's samples.
    """

    def __init__(self, samples: int = 2000, share: float = 0.1, max_levels: int = 16, moves: int = 20):
        if not (samples >= 20 and 0 < share <= 0.5 and samples * share >= 5 and max_levels >= 1 and moves >= 0):
            raise UserError(f"subset simulation needs 0 < share <= 0.5 and samples * share >= 5, found {share} and {samples}")
        self.chains, self.length = round(samples * share), round(1 / share)
        self.samples, self.share, self.max_levels, self.moves = samples, share, max_levels, moves

    def estimate(
        self, response: Response, threshold: float, members: int, generator: torch.Generator, progress: Progress | None = None
    ) -> Estimate:
        before, what = response.calls, f"the event S > {threshold:.4g}"
        enough = lambda values, _: float((values > threshold).double().mean()) >= self.share  # noqa: E731
        last, step = self._climb(response, enough, what, generator, progress or quiet)
        hits = (last.values > threshold).double()
        probability = last.probability * float(hits.mean())
        error, calls = family_error(last.family, hits, self.samples), response.calls
        beta = step.beta(probability)
        told, found = ensemble(response, last.noise, last.values, hits, threshold, members, beta, self.moves, generator)
        facts = {"levels": float(len(last.curve))}
        return Estimate(probability, *lognormal(probability, error), error, calls - before, told, found, facts)

    def level(self, response: Response, probability: float, generator: torch.Generator, progress: Progress | None = None) -> Level:
        before, what = response.calls, f"an event of probability {probability:.1g}"
        enough = lambda _, reached: probability >= self.share * reached * (1 - 1e-9)  # noqa: E731
        last, _ = self._climb(response, enough, what, generator, progress or quiet)
        beyond = (last.values > exceeded(last.curve, probability)).double()
        return level_of(last.curve, probability, family_error(last.family, beyond, self.samples), response.calls - before)

    def _climb(
        self, response: Response, enough: Callable[[Tensor, float], bool], what: str, generator: torch.Generator, progress: Progress
    ) -> tuple["Rung", StepSize]:
        """Level by level, until ``enough`` (values, their probability) says that the last samples tell what is asked."""
        noise = response.noise(self.samples, generator)
        rung, step = Rung(1.0, noise, values := response(noise), torch.arange(self.samples), ((1.0, values),)), StepSize()
        while not enough(rung.values, rung.probability):
            number, (level, seeds) = len(rung.curve), cut(rung.values, self.share)
            if number > self.max_levels:
                raise UserError(
                    f"{what} is out of reach: level {number} is S > {level:.4g}, of probability "
                    f"{rung.probability * self.share:.1g}; check its units, or raise method.max_levels"
                )
            probability = rung.probability * len(seeds) / len(rung.values)
            seeds = seeds[torch.arange(self.chains) % len(seeds)]
            words = f"level {number}: S > {level:.4g}, probability {probability:.2g}"
            tell = lambda done, words=words: progress(words, done, self.length - 1)  # noqa: E731
            beta = step.beta(probability)
            noise, values, accepted = self._chains(response, rung.noise[seeds], rung.values[seeds], level, beta, generator, tell)
            family = rung.family[seeds].repeat_interleave(self.length)
            rung = Rung(probability, noise, values, family, (*rung.curve, (probability, values)))
            step.learn(accepted)
        return rung, step

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
