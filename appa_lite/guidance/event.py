"""Sampling an event by guidance: the denoiser given S(z) > s, whose width is the spread of S that the noise leaves open.

    p(S > s | z_t) ~ Phi((S(D(z_t)) - s) / sqrt(v)),   v = a^T C_sigma a,   a = grad S at D(z_t)
    E[z | z_t, S > s] = D(z_t) + sigma^2 grad_{z_t} log Phi(...)

with C_sigma the covariance of z - D(z_t). Exact where the prior is Gaussian and S linear. A width that does not follow
sigma is wrong on both sides (the narrow overshoots though every member satisfies the event, the wide misses it), so
that there is none to set.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.diffusion.base import Denoiser, GuidedDenoiser, Twist
from appa_lite.diffusion.particles import TwistedSMC
from appa_lite.diffusion.rare_events.base import GuidedMethod, GuidedSample, Progress, lognormal, quiet
from appa_lite.diffusion.samplers import DPMSolverPP2M
from appa_lite.guidance.base import PosteriorCovariance


@dataclass(frozen=True)
class LatentEvent:
    """An event of a prior: its denoiser, S of latents (B, T, Z, h, w) -> (B,), s, and the covariance of z - D(z_t)."""

    denoiser: Denoiser
    functional: Callable[[Tensor], Tensor]
    threshold: float
    covariance: PosteriorCovariance
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device | str = "cpu"


class EventDenoiser(GuidedDenoiser):
    """E[z | z_t, S(z) > s]. Counts the passes through the prior's denoiser, by member, one more for each derivative."""

    def __init__(self, event: LatentEvent):
        self.event, self.passes = event, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.twist(x, sigma).posterior

    def twist(self, x: Tensor, sigma: Tensor) -> Twist:
        """Also log p(S > s | z_t) (B,), with its constant: particles that start with it estimate p(S > s)."""
        event, self.passes = self.event, self.passes + 2 * len(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            mean = event.denoiser(x, sigma)
            point = mean.detach().requires_grad_()
            value = event.functional(point)
            slope = torch.autograd.grad(value.sum(), point)[0] if value.requires_grad else None
        if slope is None or not bool(slope.any()):
            raise UserError("the event's functional has no slope that could guide (a fraction or duration): use method=subset")
        value = value.detach().to(x.device).double()
        components = event.covariance.project(slope)
        spread = (components * event.covariance.apply(components, sigma)).flatten(1).sum(1).double().clamp(min=1e-24).sqrt()
        place = (value - event.threshold) / spread
        log_likelihood = torch.special.log_ndtr(place)
        hazard = torch.exp(-(place**2) / 2 - math.log(2 * math.pi) / 2 - log_likelihood) / spread
        push = slope * hazard.to(slope).reshape(-1, *[1] * (slope.ndim - 1))
        shift = sigma**2 * torch.autograd.grad(mean, x, push)[0]
        return Twist(mean.detach(), (mean + shift).detach(), log_likelihood)


class EventGuidance(GuidedMethod):
    """An ensemble given the event by SDE-DPM-Solver++(2M) with ``EventDenoiser``: no probability, by design.

    Args:
        steps: evaluations of the guided denoiser; sigma_max, sigma_min: first and last noise level; width: None, or an error.

    Raises:
        UserError: a fixed width.
    """

    def __init__(self, steps: int = 64, sigma_max: float = 80.0, sigma_min: float = 0.01, width: float | None = None):
        if width is not None:
            raise UserError(
                f"method.width={width}: a fixed width is wrong at all noise levels but one; leave it null, the spread of S given z_t"
            )
        self.sampler = DPMSolverPP2M(steps, sigma_max, sigma_min, 1.0)

    def sample(
        self, event: LatentEvent, members: int, batch: int, generator: torch.Generator, progress: Progress | None = None
    ) -> GuidedSample:
        denoiser, parts = EventDenoiser(event), []
        for begin in range(0, members, batch):
            rows = min(batch, members - begin)
            tell = lambda done, steps, b=begin: (progress or quiet)(f"members from {b + 1}", done, steps)  # noqa: E731
            parts.append(self.sampler(denoiser, lambda number, n=rows: draw(event, n, generator), tell))
        return GuidedSample(torch.cat(parts), denoiser.passes)


class TwistedParticles(GuidedMethod):
    """Twisted sequential Monte Carlo towards the event: particles with the guided denoiser, weighed; and their evidence.

    p(S > s) is the product of the mean weights, an unbiased estimate for the law of the stochastic sampler without the
    event. Its error is that between islands. See ``diffusion.particles``; Wu et al. 2023.

    Args:
        particles: of an island; islands: at least 2, for the error; steps, sigma_max, sigma_min: of the sampler.
    """

    def __init__(self, particles: int = 256, islands: int = 4, steps: int = 64, sigma_max: float = 80.0, sigma_min: float = 0.01):
        if islands < 2:
            raise UserError(f"method.islands={islands} must be at least 2: the error is that between them")
        self.sampler, self.rows = _Weighed(steps, sigma_max, sigma_min, particles), particles * islands

    def sample(
        self, event: LatentEvent, members: int, batch: int, generator: torch.Generator, progress: Progress | None = None
    ) -> GuidedSample:
        denoiser, tell = EventDenoiser(event), lambda done, steps: (progress or quiet)("particles", done, steps)
        self.sampler.start()
        latents = self.sampler(denoiser, lambda number: draw(event, self.rows, generator), tell)
        p = self.sampler.log_evidence.exp()
        mean, error = float(p.mean()), float(p.std() / p.mean() / math.sqrt(len(p)))
        picks = torch.randperm(len(latents), generator=generator)[:members]
        return GuidedSample(latents[picks], denoiser.passes, mean, *lognormal(mean, error), error)


class _Weighed(TwistedSMC):
    """The same, with the logarithm of the mean weight of each island added up."""

    def __init__(self, steps: int, sigma_max: float, sigma_min: float, island: int):
        super().__init__(steps, sigma_max, sigma_min, island)

    def start(self) -> None:
        self.log_evidence, self._before = torch.zeros(()), math.log(self.island)

    def _select(self, weight: Tensor, draw: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        chosen, after = super()._select(weight, draw, last)
        self.log_evidence = self.log_evidence + self._sum(weight) - self._before
        self._before = self._sum(after)
        return chosen, after

    def _sum(self, weight: Tensor) -> Tensor:
        return torch.logsumexp(weight.reshape(-1, self.island), dim=1)


def draw(event: LatentEvent, rows: int, generator: torch.Generator) -> Tensor:
    """White noise of so many members."""
    return torch.randn(rows, *event.shape, generator=generator, dtype=event.dtype).to(event.device)
