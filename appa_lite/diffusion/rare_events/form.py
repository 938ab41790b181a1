"""The first-order reliability method: importance sampling around the likeliest noise that makes the event, the instanton."""

import math

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.diffusion.rare_events.base import Estimate, Progress, RareEventMethod, Response, lognormal, quiet
from appa_lite.diffusion.rare_events.crank_nicolson import StepSize, ensemble
from appa_lite.diffusion.rare_events.subset import SubsetSimulation


class InstantonImportanceSampling(RareEventMethod):
    """Samples z ~ N(z*, I) around the instanton z* = argmin |z|^2 subject to S(T(z)) = s, weighted.

        p = E[ 1{S(T(z)) > s} exp(|z*|^2 / 2 - z* . z) ]

    z* is found by the iteration of Hasofer, Lind, Rackwitz and Fiessler,

        z <- g [g . z + s - S(T(z))] / |g|^2,   g = grad S(T(z)),

    whose steps are limited and halved until they lessen |z|^2 / 2 + c |S - s| (Zhang & Der Kiureghian 1995), from the
    direction of the highest of a few random samples, as the gradient may vanish at zero. Exact direction for a linear S,
    where the relative error hardly depends on p. Schuëller & Stix 1987; Ebener, Margazoglou, Friedrich, Biferale &
    Grauer 2019 call it instanton-based.

    One instanton stands for all ways to the event: where there are several, as for a maximum over many cells, the
    estimate is several times too small, and its apparent error small as well. Hence it is never given alone: subset
    simulation is run beside it, and the two must agree within three standard errors of their ratio.

    Args:
        samples: N; pilot: random samples that the search may start from; iterations: of the search; step: its largest;
            check: N of subset simulation; moves: of the ensemble's members within the event, after they are drawn.
    """

    def __init__(self, samples: int = 1000, pilot: int = 100, iterations: int = 50, step: float = 1.0, check: int = 2000, moves: int = 10):
        if not (min(samples, pilot, iterations) >= 1 and step > 0 and moves >= 0):
            raise UserError(
                f"method.samples, pilot and iterations are at least 1 and step positive, found {samples}, {pilot}, {iterations}, {step}"
            )
        self.samples, self.pilot, self.iterations, self.step, self.moves = samples, pilot, iterations, step, moves
        self.check = SubsetSimulation(check, moves=0)

    def estimate(
        self, response: Response, threshold: float, members: int, generator: torch.Generator, progress: Progress | None = None
    ) -> Estimate:
        before = response.calls
        alone = self.unchecked(response, threshold, members, generator, progress)
        found = self.check.estimate(response, threshold, 1, generator, progress)
        apart = math.log(found.probability / alone.probability)
        joint = math.sqrt(math.log1p(alone.error**2) + math.log1p(found.error**2))
        if abs(apart) > 3 * joint:
            raise UserError(
                f"importance sampling around one instanton says {alone.probability:.2g}, subset simulation {found.probability:.2g} "
                f"({abs(apart) / joint:.1f} standard errors apart): it has more than one way to come about; use method=subset"
            )
        facts = alone.facts | {"subset_probability": found.probability, "disagreement": abs(apart) / joint}
        return Estimate(alone.probability, alone.low, alone.high, alone.error, response.calls - before, alone.noise, alone.values, facts)

    def unchecked(
        self, response: Response, threshold: float, members: int, generator: torch.Generator, progress: Progress | None = None
    ) -> Estimate:
        """The estimate alone, with the error that it believes in."""
        progress, before = progress or quiet, response.calls
        instanton = self.instanton(response, threshold, generator, progress)
        z = instanton + response.noise(self.samples, generator)
        values = response(z)
        weights = torch.exp((instanton.square().sum() / 2 - z @ instanton).double()) * (values > threshold)
        probability = float(weights.mean())
        if not probability:
            raise UserError("no sample around the instanton is in the event: use method=subset")
        error, calls = float(weights.std()) / probability / math.sqrt(self.samples), response.calls
        told, found = ensemble(response, z, values, weights, threshold, members, StepSize().beta(probability), self.moves, generator)
        distance = float(instanton.norm())
        effective = float(weights.sum() ** 2 / weights.square().sum())
        facts = {"distance": distance, "effective_samples": effective}
        return Estimate(probability, *lognormal(probability, error), error, calls - before, told, found, facts)

    def instanton(self, response: Response, threshold: float, generator: torch.Generator, progress: Progress) -> Tensor:
        """z* (d,).

        Raises:
            UserError: the search does not come to an end.
        """
        response.check_gradient()
        pilot = response.noise(self.pilot, generator)
        values = response(pilot)
        z, spread = pilot[values.argmax()], float(values.std())
        size = max(spread, 1e-12 * (1 + abs(threshold)))
        value, gradient = response.gradient(z)
        for number in range(self.iterations):
            norm = float(gradient.norm())
            if not norm:
                raise UserError(
                    "the event's functional has no slope along the model where the search for the instanton got: use method=subset"
                )
            change = gradient * (float(gradient @ z) + threshold - value) / norm**2 - z
            if abs(value - threshold) < 1e-3 * size and float(change.norm()) < 0.03 * (1 + float(z.norm())):
                return z
            change = change * min(1.0, self.step / max(float(change.norm()), 1e-12))
            z, value, gradient = self._descend(response, z, value, change, threshold, 2 * float(z.norm()) / norm + 0.1 / size)
            progress(f"instanton: S = {value:.4g}, |z| = {float(z.norm()):.3g}", number + 1, self.iterations)
        if abs(value - threshold) < 0.1 * size:  # any centre near the event gives an unbiased estimate; the check judges it
            return z
        raise UserError(
            f"no instanton was found in {self.iterations} steps (S = {value:.4g}): raise method.iterations, or use method=subset"
        )

    def _descend(
        self, response: Response, z: Tensor, value: float, change: Tensor, threshold: float, penalty: float
    ) -> tuple[Tensor, float, Tensor]:
        """The next point of the search, its value and gradient: the step, halved until it lessens the merit."""

        def merit(at: Tensor, here: float) -> float:
            return float(at.square().sum()) / 2 + penalty * abs(here - threshold)

        start = merit(z, value)
        for halvings in range(6):  # noqa: B007
            ahead = z + change
            found, gradient = response.gradient(ahead)
            if merit(ahead, found) < start:
                break
            change = change / 2
        return ahead, found, gradient
