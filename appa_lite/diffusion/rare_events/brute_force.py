"""Brute force: samples of the model, counted. The check of every other method, where it can be afforded."""

import math

import torch

from appa_lite.core.errors import UserError
from appa_lite.diffusion.rare_events.base import WIDE, Estimate, Level, Progress, RareEventMethod, Response, level_of, quiet

FEWEST = 10  # samples beyond a level


class BruteForce(RareEventMethod):
    """p = k / N, the share of independent samples that are in the event, with Wilson's interval.

        [p + w^2 / 2N -+ w sqrt(p (1 - p) / N + w^2 / 4N^2)] / (1 + w^2 / N),  w = 1.96

    Its relative error is 1 / sqrt(N p): an event of one in ten thousand takes a million samples for 10 %. The ensemble
    are the samples in the event, at most as many as there are. Wilson 1927.

    Args:
        samples: N.
    """

    def __init__(self, samples: int = 10000):
        if samples < 1:
            raise UserError(f"method.samples={samples} must be at least 1")
        self.samples = samples

    def estimate(
        self, response: Response, threshold: float, members: int, generator: torch.Generator, progress: Progress | None = None
    ) -> Estimate:
        progress, n, before, noise, values, hits = progress or quiet, self.samples, response.calls, [], [], 0
        for begin in range(0, n, response.batch):
            z = response.noise(min(response.batch, n - begin), generator)
            found = response(z)
            keep = found > threshold
            hits += int(keep.sum())
            noise.append(z[keep])
            values.append(found[keep])
            progress(f"{hits} in the event", min(begin + response.batch, n), n)
        p = hits / n
        middle, half = p + WIDE**2 / (2 * n), WIDE * math.sqrt(p * (1 - p) / n + WIDE**2 / (4 * n**2))
        low, high = (max(0.0, (middle + sign * half) / (1 + WIDE**2 / n)) for sign in (-1, 1))
        error = math.sqrt((1 - p) / (p * n)) if hits else math.inf
        return Estimate(p, low, high, error, response.calls - before, torch.cat(noise)[:members], torch.cat(values)[:members])

    def level(self, response: Response, probability: float, generator: torch.Generator, progress: Progress | None = None) -> Level:
        n, parts = self.samples, []
        if n * probability < FEWEST:
            raise UserError(
                f"{n} samples do not tell what one in {1 / probability:.3g} exceeds: method=subset, or {FEWEST / probability:.2g}"
            )
        for begin in range(0, n, response.batch):
            parts.append(response(response.noise(min(response.batch, n - begin), generator)))
            (progress or quiet)("samples", min(begin + response.batch, n), n)
        return level_of([(1.0, torch.cat(parts))], probability, math.sqrt((1 - probability) / (probability * n)), n)
