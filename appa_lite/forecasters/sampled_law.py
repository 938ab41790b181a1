"""The laws whose rare events are estimated: fields as a function of white noise, for a trained model or a Gaussian process."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.diffusion.base import Denoiser, NoiseSource, Sampler
from appa_lite.diffusion.rare_events.base import Response
from appa_lite.diffusion.sampler_law import NORMAL, Tail, draws_of, evaluations, gains, start, tail
from appa_lite.forecasters.event_scores import event_scores
from appa_lite.forecasters.laboratory import Climatology, prior_of
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.forecasters.posterior import ModeCovariance, Prior
from appa_lite.guidance.base import Guidance, LatentObservation
from appa_lite.guidance.event import LatentEvent
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.observations.base import Observation
from appa_lite.observations.event import Event
from appa_lite.simulators.gaussian_process import GaussianProcess


class SampledLaw(ABC):
    """What a sampler draws from, as a map x = T(z) from white noise (B, d) to fields (B, T, C, H, W) in physical units.

    Attributes:
        spec: of the fields; dimension: d; dtype: of the noise; evaluations: of the denoiser for one sample;
        differentiable: T can be differentiated.
    """

    spec: FieldSpec
    dimension: int
    dtype: torch.dtype
    evaluations: int
    differentiable: bool

    @abstractmethod
    def fields(self, noise: Tensor) -> Tensor:
        """T(z)."""

    @abstractmethod
    def tail(self, event: Event) -> Tail:
        """What the sampler does to the spread of a functional, on the Gaussian that the denoiser is closest to."""

    def exact(self, event: Event) -> "GaussianEvent | None":
        """The event's own law, where it is known."""
        return None

    @abstractmethod
    def latent(self, event: Event, threshold: float) -> LatentEvent:
        """The event for methods that guide.

        Raises:
            UserError: of a law that is itself guided.
        """

    @abstractmethod
    def decoded(self, latents: Tensor) -> Tensor:
        """Fields (B, T, C, H, W) of the latents that such a method samples."""

    def response(self, event: Event, batch: int) -> Response:
        """S(T(z)), for the methods that estimate rare events."""
        return Response(lambda z: event.functional(self.fields(z)), self.dimension, batch, self.dtype, self.differentiable)


# A Gaussian process


@dataclass(frozen=True)
class GaussianEvent:
    """S ~ N(mean, std^2), with std of the law and of the sampler, and E[x | S > s] - E[x] for a unit of E[S | S > s] - E[S]."""

    mean: float
    std: float
    sampler_std: float
    response: Tensor  #: of the sampler's law, (T, C, H, W)

    def probability(self, threshold: float, sampler: bool = False) -> float:
        """P(S > s), of the law or of what the sampler draws."""
        quantile = (threshold - self.mean) / (self.sampler_std if sampler else self.std)
        return float(NORMAL.cdf(torch.tensor(-quantile, dtype=torch.float64)))

    def threshold(self, probability: float) -> float:
        """s with P(S > s) = p of the sampler's law."""
        return self.mean + self.sampler_std * float(-NORMAL.icdf(torch.tensor(probability, dtype=torch.float64)))

    def given(self, threshold: float) -> tuple[float, float]:
        """E[S | S > s] and the standard deviation of S given S > s, of the sampler's law: Mills' ratio."""
        b = (threshold - self.mean) / self.sampler_std
        ratio = math.exp(-(b**2) / 2) / math.sqrt(2 * math.pi) / self.probability(threshold, sampler=True)
        return self.mean + self.sampler_std * ratio, self.sampler_std * math.sqrt(1 + b * ratio - ratio**2)

    def density(self, values: Tensor, threshold: float) -> Tensor:
        """p(S | S > s) of the sampler's law at values (n,)."""
        inside = NORMAL.log_prob((values - self.mean) / self.sampler_std).exp() / self.sampler_std
        return inside / self.probability(threshold, sampler=True) * (values >= threshold)


class GaussianLaw(SampledLaw):
    """A Gaussian process whose exact denoiser is sampled: T is linear, diagonal in the eigenvectors of the covariance.

    It is applied in closed form, which is what the sampler gives to rounding (``tests/test_rare_events.py``).
    """

    differentiable, dtype = True, torch.float64

    def __init__(self, process: GaussianProcess, sampler: Sampler, frames: int):
        self.spec, self.sampler = process.spec, sampler
        self.oracle, self.covariance = prior_of(process, frames)
        self.variance = self.covariance.temporal(frames).values  # (K, T)
        self.gains = gains(sampler, self.variance.flatten()).unflatten(1, self.variance.shape)
        self.dimension, self.evaluations = self.gains.numel(), evaluations(sampler)

    def fields(self, noise: Tensor) -> Tensor:
        coordinates = (noise.unflatten(1, self.gains.shape) * self.gains).sum(1)
        return self.covariance.expand(coordinates).reshape(len(noise), *self.oracle.shape)

    def latent(self, event: Event, threshold: float) -> LatentEvent:
        known = Climatology(self.covariance, self.oracle.shape[1:], self.oracle.shape[0])
        return LatentEvent(self.oracle, event.functional, threshold, known, self.oracle.shape, self.dtype)

    def decoded(self, latents: Tensor) -> Tensor:
        return latents

    def _slope(self, event: Event) -> Tensor | None:
        """Components (K, T) of the functional's derivative; None where it is not linear."""
        x = torch.zeros(1, *self.oracle.shape, dtype=torch.float64, requires_grad=True)
        value = event.functional(x)
        slope = torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else torch.zeros_like(x)
        probe = self.oracle.sample(0, range(8), "linear")
        with torch.no_grad():
            linear = torch.allclose(event.functional(probe), float(value) + (probe * slope).flatten(1).sum(1), rtol=1e-9, atol=1e-12)
        return self.covariance.project(slope.flatten(2))[0] if linear and bool(slope.any()) else None

    def tail(self, event: Event) -> Tail:
        slope = self._slope(event)
        weights = torch.ones_like(self.variance) if slope is None else slope.square()
        return tail(self.sampler, self.variance.flatten(), weights.flatten())

    def exact(self, event: Event) -> GaussianEvent | None:
        slope = self._slope(event)
        if slope is None:
            return None
        drawn = self.gains.square().sum(0)
        std, law = (float((slope.square() * v).sum().sqrt()) for v in (self.variance, drawn))
        mean = float(event.functional(torch.zeros(1, *self.oracle.shape, dtype=torch.float64)))
        shift = self.covariance.expand((drawn * slope)[None] / law**2).reshape(self.oracle.shape)
        return GaussianEvent(mean, std, law, shift)


# A trained model


class NoiseDriven(LatentDiffusion):
    """The same, with its noise given rather than drawn; differentiable where nothing is observed.

    ``rows`` (members, d) holds the noise of all samplers in turn, by the names under which they ask for it. The start is
    from the noised climatology (``sampler_law.start``).
    """

    rows: Tensor | None = None  #: None: ones that count what is asked for

    def __init__(self, checkpoint: Checkpoint, guidance: Guidance, sampler: Sampler, overlap: int = 6, batch: int = 64):
        super().__init__(checkpoint, guidance, sampler, overlap, batch)
        self.places: dict[str, tuple[int, tuple[int, ...]]] = {}  #: name -> first number, (K, *shape)
        self.draws = len(gains(sampler, torch.ones(1, dtype=torch.float64)))

    def prior(self, times: np.ndarray) -> Prior:
        """The law of the frames at ``times``."""
        return Prior(self.checkpoint, self.period(times), self.overlap, self.batch)

    @property
    def dimension(self) -> int:
        return sum(math.prod(shape) for _, shape in self.places.values())

    def noise(self, prior: Prior, seed: int, members: list[int], name: str) -> NoiseSource:
        if name not in self.places:
            self.places[name] = (self.dimension, (self.draws, *prior.shape))
        begin, shape = self.places[name]
        if self.rows is None:
            draws = torch.zeros(len(members), *shape)
        else:
            draws = self.rows[members, begin : begin + math.prod(shape)].reshape(-1, *shape)
        model = prior.model

        def first(noise: Tensor) -> Tensor:
            return start(self.sampler, model.covariance.function, model.mean, noise.flatten(2)).reshape(noise.shape)

        return draws_of(draws.to(model.mean), first)

    def _sample(self, prior, denoiser: Denoiser, latent: LatentObservation | None, members, seed, name, progress, begin, total) -> Tensor:
        if latent is None and torch.is_grad_enabled():
            return self.sampler(denoiser, self.noise(prior, seed, members, name))
        return super()._sample(prior, denoiser, latent, members, seed, name, progress, begin, total)


class ModelLaw(SampledLaw):
    """A trained model over a period: free, given observations, or from a known state on.

    Args:
        model: the prior and the sampler; times: of the frames (T,); observation: of those frames, or None;
        initial: known frames (members, n, C, H, W) that end at the first of ``times``, or None. Which member a sample
            starts from is decided by a number of its noise.
    """

    dtype = torch.float32

    def __init__(self, model: NoiseDriven, times: np.ndarray, observation: Observation | None = None, initial: Tensor | None = None):
        self.model, self.times, self.observation, self.initial = model, times, observation, initial
        self.spec, self.differentiable = model.checkpoint.spec, observation is None and initial is None
        self.extra = 1 if initial is not None and len(initial) > 1 else 0
        with torch.no_grad():
            self._draw(torch.zeros(1, self.extra))
        self.dimension = self.extra + model.dimension
        self.evaluations = evaluations(model.sampler) * len(model.places)

    def fields(self, noise: Tensor) -> Tensor:
        self.model.rows = noise[:, self.extra :]
        return self._draw(noise[:, : self.extra]).cpu()

    def _draw(self, choice: Tensor) -> Tensor:
        members = range(len(choice))
        if self.initial is None:
            return self.model.assimilate(self.observation, self.times, members, 0)
        count = len(self.initial)
        picks = (
            (torch.special.ndtr(choice[:, 0].double()) * count).long().clamp(max=count - 1)
            if self.extra
            else torch.zeros(len(choice)).long()
        )
        known = self.initial[picks]
        before = self.times[0] - np.arange(known.shape[1] - 1, -1, -1) * np.timedelta64(round(self.spec.step * 1e9), "ns")
        ahead = self.model.forecast(known, before, len(self.times) - 1, members, 0)
        return torch.cat([known[:, -1:], ahead], dim=1)

    def latent(self, event: Event, threshold: float) -> LatentEvent:
        if not self.differentiable:
            raise UserError("guidance here is for free runs: `reanalysis` and `forecast` take event=..., or use method=subset")
        prior = self.model.prior(self.times)
        functional, level = event_scores(event, threshold, prior.checkpoint, prior.period.times, prior.period.cut)
        return LatentEvent(prior.denoiser(), functional, level, ModeCovariance(prior), prior.shape, self.dtype, prior.model.mean.device)

    def decoded(self, latents: Tensor) -> Tensor:
        prior = self.model.prior(self.times)
        return torch.cat([prior.period.cut(prior.decode(z[None])) for z in latents]).cpu()

    def tail(self, event: Event) -> Tail:
        """Of a functional that weighs all modes of the climatology alike."""
        covariance = self.model.checkpoint.denoiser.covariance
        variance = covariance.temporal(self.model.checkpoint.denoiser.config.frames).values.flatten().double()
        return tail(self.model.sampler, variance, torch.ones_like(variance))
