"""The latent video diffusion model, conditioned: reanalyses, forecasts and free runs from the one trained prior."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_seconds
from appa_lite.core.random import Streams
from appa_lite.diffusion.base import Denoiser, NoiseSource, Sampler
from appa_lite.forecasters.base import Assimilator, Forecaster, Progress, silent
from appa_lite.forecasters.initial import KnownFrames, KnownState, pinned
from appa_lite.forecasters.posterior import ModeCovariance, Period, Prior, later
from appa_lite.guidance.base import Guidance, LatentObservation, SolverReport, no_gradient
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.observations.base import Observation


class LatentDiffusion(Assimilator, Forecaster):
    """p(z | y) by a guided sampler over latents, decoded.

    Args:
        checkpoint: with a denoiser; guidance: how observations enter; sampler: the numerics;
        overlap: latent frames that neighbouring windows share; batch: members (and windows) computed at once;
        known_error: standard deviation, in units of the latents, of a forecast's known frames.
    """

    def __init__(
        self, checkpoint: Checkpoint, guidance: Guidance, sampler: Sampler, overlap: int = 6, batch: int = 8, known_error: float = 0.03
    ):
        if not isinstance(checkpoint, Checkpoint) or checkpoint.denoiser is None:
            raise UserError("latent diffusion needs one model directory with a trained denoiser (trainable=denoiser)")
        if "noise_law" in checkpoint.settings:
            raise UserError(
                "this model was trained with heavy-tailed noise, which only `appa-lite tails` samples: train trainable=denoiser"
            )
        self.checkpoint, self.guidance, self.sampler = checkpoint, guidance, sampler
        self.overlap, self.batch, self.known_error = overlap, batch, known_error
        self.report = SolverReport()
        self._kept: tuple | None = None
        self.state_operator: KnownState | None = None  # its derivative takes a while, and is the same for all periods

    @property
    def stride(self) -> int:
        return self.checkpoint.autoencoder.stride[0]

    def period(self, times: np.ndarray) -> Period:
        """The stretch that is sampled for frames at ``times``."""
        return Period.around(times, self.checkpoint)

    def assimilate(
        self, observation: Observation | None, times: np.ndarray, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        prior, latent = self._problem(observation, times)
        parts = []
        for begin in range(0, len(members), self.batch):
            batch = list(members[begin : begin + self.batch])
            latents = self._sample(prior, prior.denoiser(), latent, batch, seed, "reanalysis", progress, begin, len(members))
            parts.append(torch.cat([prior.period.cut(prior.decode(z[None])) for z in latents]))
        return torch.cat(parts)

    def _problem(self, observation: Observation | None, times: np.ndarray) -> tuple[Prior, LatentObservation | None]:
        """The prior over a period and the observation in its latents; kept, for other members of the same analysis."""
        if self._kept is None or self._kept[0] is not observation or not np.array_equal(self._kept[1], times):
            prior = Prior(self.checkpoint, self.period(times), self.overlap, self.batch)
            latent = None if observation is None else prior.observe(later(observation, prior.period.before))
            self._kept = observation, times, prior, latent
        return self._kept[2:]

    def forecast(
        self, initial: Tensor, times: np.ndarray, frames: int, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        """Rolled on by windows: the last known latent frames are observed, the rest is free.

        Fewer frames than an autoencoder's stride count as one state, without a past.
        """
        window = self.checkpoint.denoiser.config.frames
        known = max(1, min(initial.shape[1] // self.stride, window // 2))
        history = initial[:, -known * self.stride :]
        end = float(to_seconds(times)[-1])
        parts = []
        for begin in range(0, len(members), self.batch):
            batch = list(members[begin : begin + self.batch])
            rows, clock, done = history[[i % len(history) for i in range(begin, begin + len(batch))]], end, []
            latents, roll = None, 0
            while sum(p.shape[1] for p in done) < frames:
                start = clock - (known * self.stride - 1) * self.checkpoint.spec.step
                period = Period(start, self.checkpoint.spec.step, window, self.stride, 0, window * self.stride)
                prior = Prior(self.checkpoint, period, 0, self.batch)
                denoiser, observed, latents = self.given(prior, rows, latents, known)
                sample = self._sample(prior, denoiser, observed, batch, seed, f"forecast {roll}", progress, begin, len(members))
                new = torch.cat([prior.decode(z[None])[:, known * self.stride :] for z in sample])
                done.append(new)
                latents, clock, roll = sample[:, -known:], clock + new.shape[1] * self.checkpoint.spec.step, roll + 1
            parts.append(torch.cat(done, dim=1)[:, :frames])
        return torch.cat(parts)

    def given(self, prior: Prior, rows: Tensor, latents: Tensor | None, known: int) -> tuple[Denoiser, LatentObservation, Tensor | None]:
        """What stands for known first frames, physical ``rows`` or their latents: a denoiser, an observation, those latents."""
        if latents is None and rows.shape[1] < self.stride:
            return prior.denoiser(), self._know_state(prior, rows[:, -1]), None
        latents = self._known_latents(rows, prior.period, known) if latents is None else latents
        return pinned(prior.denoiser(), prior.model.covariance, latents), self._know(prior, latents, known), latents

    def _known_latents(self, rows: Tensor, period: Period, known: int) -> Tensor:
        normal = self.checkpoint.normalizer(rows, period.times[: known * self.stride])
        with torch.no_grad():
            return self.checkpoint.autoencoder.encode(normal)

    def _know(self, prior: Prior, latents: Tensor, known: int) -> LatentObservation:
        operator = KnownFrames(prior, list(range(known)))
        values = ((latents.flatten(2) - prior.model.mean) @ prior.model.covariance.basis).flatten(1)
        return LatentObservation(operator, values, torch.full((values.shape[1],), self.known_error**2))

    def _know_state(self, prior: Prior, state: Tensor) -> LatentObservation:
        with torch.no_grad():
            if self.state_operator is None:
                self.state_operator = KnownState(prior)
            operator = self.state_operator.over(prior)
            values = operator.values(state)
        return LatentObservation(operator, values, torch.full((values.shape[1],), self.known_error**2))

    def _sample(
        self,
        prior: Prior,
        denoiser: Denoiser,
        latent: LatentObservation | None,
        members: list[int],
        seed: int,
        name: str,
        progress: Progress,
        begin: int,
        total: int,
    ) -> Tensor:
        if latent is not None:
            if latent.values.ndim == 1:
                latent = LatentObservation(latent.operator, latent.values.expand(len(members), -1), latent.variance)
            report = SolverReport()
            denoiser = self.guidance(denoiser, latent, ModeCovariance(prior), report)
        else:
            denoiser = no_gradient(denoiser)

        noise = self.noise(prior, seed, members, name)
        latents = self.sampler(
            denoiser, noise, lambda step, steps: progress(f"members {begin + 1}-{begin + len(members)} of {total}", step, steps)
        )
        if latent is not None:
            self.report.merge(report)
        return latents.detach()

    def noise(self, prior: Prior, seed: int, members: list[int], name: str) -> NoiseSource:
        """Where the sampler's noise comes from."""
        streams = Streams(seed, members, name)
        return lambda step: streams.normal(prior.shape)
