"""Adaptive multilevel splitting: those furthest from the event are replaced by moved copies of the others, again and again."""

import torch

from appa_lite.core.errors import UserError
from appa_lite.diffusion.rare_events.base import Estimate, Progress, RareEventMethod, Response, family_error, lognormal, quiet, resample
from appa_lite.diffusion.rare_events.crank_nicolson import StepSize, ensemble, move


class AdaptiveMultilevelSplitting(RareEventMethod):
    """Particles z ~ N(0, I); at each level the share ``kill`` with the smallest S is replaced by copies of survivors.

        p = (share that survives level 1) x (level 2) x ... x (share of the last particles above s)

    Copies take ``steps`` preconditioned Crank-Nicolson moves above the level, survivors stay. Cérou & Guyader 2007; the
    estimate is unbiased, Bréhier, Gazeau, Goudenège, Lelièvre & Rousset 2016. Its error is that of the sizes of families
    (see ``family_error``).

    Args:
        samples: N particles; kill: share replaced at a level; steps: moves of a copy; max_levels: after which the event
            is out of reach; moves: of the ensemble's members within the event, after they are drawn.
    """

    def __init__(self, samples: int = 500, kill: float = 0.5, steps: int = 5, max_levels: int = 60, moves: int = 10):
        if not (samples >= 10 and 0 < kill < 1 and 1 <= round(kill * samples) < samples and steps >= 1 and max_levels >= 1 and moves >= 0):
            raise UserError(f"splitting needs 0 < kill < 1, steps >= 1 and samples >= 10, found {kill}, {steps} and {samples}")
        self.samples, self.kill, self.steps, self.max_levels, self.moves = samples, kill, steps, max_levels, moves

    def estimate(
        self, response: Response, threshold: float, members: int, generator: torch.Generator, progress: Progress | None = None
    ) -> Estimate:
        progress, step, probability, before = progress or quiet, StepSize(), 1.0, response.calls
        z, family = response.noise(self.samples, generator), torch.arange(self.samples)
        values = response(z)
        for number in range(self.max_levels):
            level = float(values.sort().values[round(self.kill * self.samples) - 1])
            if level >= threshold:
                break
            dead = torch.nonzero(values <= level).flatten()
            alive = torch.nonzero(values > level).flatten()
            if not len(alive):
                raise UserError(
                    f"half of the particles have the same largest S = {level:.4g}, so that no level leads on to the event: "
                    "choose a functional that grows towards it, such as area_mean or max in place of fraction"
                )
            probability *= len(alive) / self.samples
            what, beta = f"level {number + 1}: S > {level:.4g}, probability {probability:.2g}", step.beta(probability)
            parents = alive[resample(torch.ones(len(alive)), len(dead), generator)]
            clones, found, taken = z[parents], values[parents], []
            for done in range(self.steps):
                clones, found, accepted = move(response, clones, found, level, beta, generator)
                taken.append(accepted.double().mean())
                progress(what, done + 1, self.steps)
            z, values, family = (old.index_copy(0, dead, new) for old, new in ((z, clones), (values, found), (family, family[parents])))
            step.learn(float(torch.stack(taken).mean()))
        else:
            raise UserError(
                f"the event S > {threshold:.4g} is out of reach: after {self.max_levels} levels particles are above {level:.4g}, "
                f"which has probability {probability:.1g}; check its units, or raise method.max_levels"
            )
        hits = (values > threshold).double()
        if not hits.any():
            raise UserError(
                f"no particle got beyond S > {threshold:.4g}, of which probability {probability:.1g} is left: raise method.samples"
            )
        probability *= float(hits.mean())
        error, calls = family_error(family, hits, self.samples), response.calls
        told, found = ensemble(response, z, values, hits, threshold, members, step.beta(probability), self.moves, generator)
        facts = {"levels": float(number)}
        return Estimate(probability, *lognormal(probability, error), error, calls - before, told, found, facts)
