"""Members of a reanalysis or forecast in which an event happens: the conditioned diffusion, guided towards it besides."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_seconds
from appa_lite.core.random import derive
from appa_lite.diffusion.sampler_law import gains
from appa_lite.forecasters.base import Progress, silent
from appa_lite.forecasters.event_scores import event_scores
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.forecasters.posterior import Period, Prior
from appa_lite.guidance.event import ObservedEvent
from appa_lite.observations.base import Observation
from appa_lite.observations.event import Event

DRAWS = 8  #: of a member, until it is in the event


class GivenEvent(LatentDiffusion):
    """p(z | y, S(x) > s), by guidance with what the noise and the observations leave open of S (``guidance.event``).

    Guidance says nothing of p(S > s | y), and may miss the event: a member that does is drawn anew, at most ``DRAWS``
    times in all, so that every member is in the event. ``redrawn`` counts such draws. The first draw of a member has the
    noise of the same member without the event.

    A forecast is one period here, not rolled on by windows: an event late in it bends it from the start.

    Args:
        model: what forecasts or assimilates without the event; event: of the frames asked for; a forecast's begin with
            the last known one.

    Raises:
        UserError: a deterministic sampler.
    """

    def __init__(self, model: LatentDiffusion, event: Event):
        super().__init__(model.checkpoint, model.guidance, model.sampler, model.overlap, model.batch, model.known_error)
        if len(gains(model.sampler, torch.ones(1, dtype=torch.float64))) < 2:
            raise UserError("event=... needs a sampler that draws noise at every step, such as sampler=sde_2m: others narrow the event")
        self.event, self.redrawn = event, 0

    def assimilate(
        self, observation: Observation | None, times: np.ndarray, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        if observation is None:
            raise UserError("event=... without an observation that is used: `appa-lite extremes` samples events of a free run")
        prior = self._problem(observation, times)[0]

        def draw(rows: list[int], stream: int) -> Tensor:
            self._towards(prior, lambda fields: prior.period.cut(fields))
            return super(GivenEvent, self).assimilate(observation, times, [members[i] for i in rows], stream, progress)

        return self._inside(draw, len(members), seed)

    def forecast(
        self, initial: Tensor, times: np.ndarray, frames: int, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        window = self.checkpoint.denoiser.config.frames
        known = max(1, min(initial.shape[1] // self.stride, window // 2))
        latent = max(window, known - (-frames // self.stride))
        latent += self.checkpoint.denoiser.covariance.seam(latent)
        start = float(to_seconds(times)[-1]) - (known * self.stride - 1) * self.checkpoint.spec.step
        prior = Prior(
            self.checkpoint,
            Period(start, self.checkpoint.spec.step, latent, self.stride, known * self.stride, frames),
            self.overlap,
            self.batch,
        )
        history = initial[[i % len(initial) for i in range(len(members))], -known * self.stride :]

        def draw(rows: list[int], stream: int) -> Tensor:
            parts = []
            for begin in range(0, len(rows), self.batch):
                some = rows[begin : begin + self.batch]
                past = history[some]
                self._towards(prior, lambda fields, last=past[:, -1:]: torch.cat([last, prior.period.cut(fields)], dim=1))
                denoiser, observed, _ = self.given(prior, past, None, known)
                numbers = [members[i] for i in some]
                sample = self._sample(prior, denoiser, observed, numbers, stream, "forecast 0", progress, begin, len(rows))
                parts.append(torch.cat([prior.period.cut(prior.decode(z[None])) for z in sample]))
            return torch.cat(parts)

        return self._inside(draw, len(members), seed, history[:, -1:])

    def _towards(self, prior: Prior, asked: Callable[[Tensor], Tensor]) -> None:
        """Guide the next samples of ``prior``; ``asked``: all its fields to those that the event is of."""
        functional, threshold = event_scores(self.event, self.event.threshold, self.checkpoint, prior.period.times, asked)
        method = self.guidance.method if isinstance(self.guidance, ObservedEvent) else self.guidance
        self.guidance = ObservedEvent(method, functional, threshold)

    def _inside(self, draw: Callable[[list[int], int], Tensor], count: int, seed: int, before: Tensor | None = None) -> Tensor:
        """Fields (count, T, C, H, W) in the event; ``before``: known frames that it looks at as well."""
        fields, missing = draw(list(range(count)), seed), []
        for attempt in range(1, DRAWS + 1):
            seen = fields if before is None else torch.cat([before.to(fields), fields], dim=1)
            missing = torch.nonzero(self.event.functional(seen) <= self.event.threshold).flatten().tolist()
            if not missing or attempt == DRAWS:
                break
            self.redrawn += len(missing)
            fields[missing] = draw(missing, derive(seed, "event", attempt))
        if missing:
            raise UserError(
                f"event='{self.event.text}': {len(missing)} of {count} members missed it in {DRAWS} draws: it may be out of reach of what "
                "is known; `appa-lite extremes` tells how likely it is"
            )
        return fields
