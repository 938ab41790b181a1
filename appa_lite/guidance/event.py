"""Sampling an event by guidance: the denoiser given S(z) > s, whose width is the spread of S that the noise leaves open.

    p(S > s | z_t) ~ Phi((S(D(z_t)) - s) / sqrt(v)),   v = a^T C_sigma a,   a = grad S at D(z_t)
    E[z | z_t, S > s] = D(z_t) + sigma^2 grad_{z_t} log Phi(...)

with C_sigma the covariance of z - D(z_t). Exact where the prior is Gaussian and S linear. A width that does not follow
sigma is wrong on both sides (the narrow overshoots though every member satisfies the event, the wide misses it), so
that there is none to set. Beside observations y, D and C are those given z_t and y (``ObservedEventDenoiser``).
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
from appa_lite.guidance.base import Conditioned, Correction, Guidance, LatentObservation, Local, PosteriorCovariance, SolverReport


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
        value, slope = sloped(event.functional, mean)
        components = event.covariance.project(slope)
        log_likelihood, hazard = beyond(value - event.threshold, components, event.covariance.apply(components, sigma))
        shift = sigma**2 * torch.autograd.grad(mean, x, slope * hazard.reshape(-1, *[1] * (slope.ndim - 1)))[0]
        return Twist(mean.detach(), (mean + shift).detach(), log_likelihood)


def sloped(functional: Callable[[Tensor], Tensor], latents: Tensor) -> tuple[Tensor, Tensor]:
    """S (B,), float64, and its gradient at latents.

    Raises:
        UserError: it is flat.
    """
    with torch.enable_grad():
        point = latents.detach().requires_grad_()
        value = functional(point)
        slope = torch.autograd.grad(value.sum(), point)[0] if value.requires_grad else None
    if slope is None or not bool(slope.any()):
        raise UserError("the event's functional has no slope that could guide (a fraction or duration): use extremes with method=subset")
    return value.detach().to(latents.device).double(), slope


def beyond(excess: Tensor, slope: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """log Phi(k) and phi(k) / (d Phi(k)), k = (S - s) / d, d^2 = a . C a: both (B,), the first float64.

    Args:
        excess: S - s (B,); slope: a, covariance: C a, components (B, T, K).
    """
    spread = (slope * covariance).flatten(1).sum(1).double().clamp(min=1e-24).sqrt()
    place = excess / spread
    log_likelihood = torch.special.log_ndtr(place)
    hazard = torch.exp(-(place**2) / 2 - math.log(2 * math.pi) / 2 - log_likelihood) / spread
    return log_likelihood, hazard.to(slope)


class ObservedEvent(Guidance):
    """A guidance by observations, and an event besides: the observation goes in first, the event with what it leaves open.

    Args:
        method: how observations enter, moment matching; functional: S of latents (B, T, Z, h, w) -> (B,); threshold: s.
    """

    def __init__(self, method: Guidance, functional: Callable[[Tensor], Tensor], threshold: float):
        self.method, self.functional, self.threshold = method, functional, threshold

    def __call__(
        self, denoiser: Denoiser, observation: LatentObservation, covariance: PosteriorCovariance, report: SolverReport
    ) -> Denoiser:
        if not isinstance(self.method, Correction):
            raise UserError("an event beside observations needs guidance=moment_matching or jacobian_free")
        return ObservedEventDenoiser(self.method, denoiser, observation, covariance, report, self.functional, self.threshold)


class ObservedEventDenoiser(Conditioned):
    """E[z | z_t, y, S(z) > s].

        D_y = E[z | z_t, y],   a = grad S at D_y,   C_y a = C (a - A^T (R + A C A^T)^{-1} A C a)
        E[z | z_t, y, S > s] = D_y + C_y a phi(k) / (d Phi(k)),   k = (S(D_y) - s) / d,   d^2 = a^T C_y a

    Exact where the prior is Gaussian and A and S are linear. With the denoiser's Jacobian J, the last C is sigma^2 J^T.
    """

    again = True

    def __init__(
        self,
        method: Correction,
        denoiser: Denoiser,
        observation: LatentObservation,
        covariance: PosteriorCovariance,
        report: SolverReport,
        functional: Callable[[Tensor], Tensor],
        threshold: float,
    ):
        super().__init__(method, denoiser, observation, covariance, report)
        self.functional, self.threshold = functional, threshold

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.twist(x, sigma).posterior

    def twist(self, x: Tensor, sigma: Tensor) -> Twist:
        """Beside D_y, and log p(S > s | z_t, y)."""
        here = Local(self, x, sigma)
        with torch.no_grad():
            mean = here.mean + self.method.correct(here, False)[0]
        value, slope = sloped(self.functional, mean)
        with torch.no_grad():
            components = self.covariance.project(slope)
            left, spread = self.method.left(here, components)
            log_likelihood, hazard = beyond(value - self.threshold, components, spread)
            hazard = hazard.reshape(-1, 1, 1)
            if not self.method.jacobian:
                return Twist(mean, mean + self.covariance.expand(spread * hazard), log_likelihood)
            return Twist(mean, mean + here.back(self.covariance.expand(left * hazard)), log_likelihood)


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
