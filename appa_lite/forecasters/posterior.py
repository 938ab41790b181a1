"""The pieces of a posterior over a period: frames, prior, covariance and observations in the modes of the latents."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_seconds
from appa_lite.core.temporal import TemporalModes
from appa_lite.diffusion.base import Denoiser
from appa_lite.diffusion.windows import WindowLayout, compose_windows
from appa_lite.guidance.base import LatentObservation
from appa_lite.guidance.error_laws import HeavyTails, MixedRows
from appa_lite.guidance.modes import DecodedCells, ModeResponses
from appa_lite.guidance.scores import ScoredCells
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.observations.base import Observation, Stacked


@dataclass(frozen=True)
class Period:
    """The frames asked for, inside the longer stretch that is sampled.

    The stretch has a margin of one latent frame on each side (the ends of a window are known less well, and a lapped
    decoder reaches across), is a whole number of latent frames and at least as long as a training window. A long one goes
    on by as many frames as the climatological covariance has lags, where its time axis closes on itself.
    """

    first: float  #: time of the first sampled frame, seconds since 1970
    step: float  #: seconds between frames
    latent_frames: int
    stride: int
    before: int  #: frames sampled before the first one asked for
    frames: int  #: frames asked for

    @classmethod
    def around(cls, times: np.ndarray, checkpoint: Checkpoint) -> "Period":
        stride, step, model = checkpoint.autoencoder.stride[0], checkpoint.spec.step, checkpoint.denoiser
        alone = len(times) == model.config.frames == stride == 1  # a snapshot, as in training: its decoder never saw neighbours
        margin = 0 if alone else 1
        before = margin * stride
        latent = max(-(-(len(times) + before) // stride) + margin, model.config.frames)
        latent += model.covariance.seam(latent)
        return cls(float(to_seconds(times)[0]) - before * step, step, latent, stride, before, len(times))

    @property
    def times(self) -> Tensor:
        """Seconds since 1970 of all sampled frames, float64."""
        return self.first + self.step * torch.arange(self.latent_frames * self.stride, dtype=torch.float64)

    def cut(self, fields: Tensor) -> Tensor:
        """The frames asked for, of fields (B, all frames, ...)."""
        return fields[:, self.before : self.before + self.frames]


class Prior:
    """The trained law of trajectories over a period.

    Args:
        checkpoint: with a denoiser; period: the frames; overlap: latent frames shared by neighbouring windows;
        batch: windows computed at once.
    """

    def __init__(self, checkpoint: Checkpoint, period: Period, overlap: int, batch: int):
        self.checkpoint, self.period, self.model = checkpoint, period, checkpoint.denoiser
        window = self.model.config.frames
        self.layout = WindowLayout(period.latent_frames, window, min(overlap, window - 1))
        self.forcing = checkpoint.forcing(period.times[:: period.stride])
        self.batch = batch

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.period.latent_frames, *self.checkpoint.autoencoder.latent_shape)

    def denoiser(self) -> Denoiser:
        """D over the whole period."""
        window = self.layout.window

        def correction(x: Tensor, sigma: Tensor, first: list[int]) -> Tensor:
            forcing = None if self.forcing is None else torch.stack([self.forcing[f : f + window] for f in first]).to(x)
            return self.model.correction(x, sigma, forcing)

        return compose_windows(correction, self.model.gaussian, self.layout, self.batch)

    def decode(self, latents: Tensor) -> Tensor:
        """Physical fields (B, all frames, C, H, W) of latents."""
        return self.checkpoint.normalizer.inverse(self.checkpoint.autoencoder.decode(latents), self.period.times)

    def observe(self, observation: Observation) -> LatentObservation:
        """An observation of the sampled frames, moved through the decoder."""
        normalizer, autoencoder = self.checkpoint.normalizer, self.checkpoint.autoencoder
        cells = observation.operator.merged() if isinstance(observation.operator, Stacked) else observation.operator
        scale = normalizer.scale[:, None, None]
        responses = ModeResponses(
            cells,
            lambda z: autoencoder.decode_linear(z) * scale,
            self.model.covariance.basis,
            autoencoder.latent_shape,
            autoencoder.stride[0],
            autoencoder.reach,
        )
        slope = (lambda z: normalizer.derivative(autoencoder.decode(z), self.period.times) / scale) if normalizer.nonlinear else None
        operator = DecodedCells(cells, self.period.latent_frames, self.decode, responses, slope)
        if normalizer.margins:
            margins = {int(i): margin for i, margin in normalizer.margins.items()}
            continued = DecodedCells(
                cells,
                self.period.latent_frames,
                lambda z: normalizer.inverse(autoencoder.decode(z), self.period.times, continued=True),
                responses,
                lambda z: normalizer.derivative(autoencoder.decode(z), self.period.times, continued=True) / scale,
            )
            if observation.correlation is not None or observation.degrees is not None:
                raise UserError("values of this model's Gaussianised variables need independent normal errors")
            operator = ScoredCells(operator, continued, margins, self.checkpoint.spec.grid.shape)
        if observation.degrees is not None:
            operator = HeavyTails(operator, observation.degrees)
        mixing, values = observation.mixing(), observation.values
        if mixing is not None:
            operator, values = MixedRows(operator, mixing, observation.correlation), mixing(values)
        return LatentObservation(operator, values, observation.variance)

    def observe_once(self, observation: Observation) -> LatentObservation:
        """``observe`` for methods that linearise: likelihoods that are not Gaussian are matched at the climatology, once."""
        latent = self.observe(observation)
        if not isinstance(latent.operator, ScoredCells | HeavyTails):
            return latent
        mean = self.model.mean.reshape(1, 1, *self.shape[1:]).expand(1, *self.shape)
        predicted, covariance = latent.operator.predict(mean), ModeCovariance(self, prior_only=True)
        linear, sigma = latent.operator.linearise(mean), torch.ones(())
        innovation, variance = latent.operator.sites(predicted, linear, covariance, sigma, latent.values, latent.variance)
        return LatentObservation(latent.operator, (predicted + innovation)[0], variance[0])


class ModeCovariance:
    """The measured covariance of z - D(z_t) in the modes; ``prior_only`` gives the climatological one at any sigma."""

    def __init__(self, prior: Prior, prior_only: bool = False):
        self.model, self.frames, self.latent_shape = prior.model, prior.period.latent_frames, prior.checkpoint.autoencoder.latent_shape
        self.prior_only = prior_only

    def local(self, frames: int, sigma: Tensor) -> Tensor:
        modes, values = self._eigen(sigma)
        count = min(frames, self.frames)
        block = modes.block(values, (self.frames - count) // 2, count)
        return torch.nn.functional.pad(block, (0, frames - count, 0, frames - count))

    def first(self, frames: int, sigma: Tensor) -> Tensor:
        """C(sigma) of the first ``frames`` frames of the period, mode by mode: (K, frames, frames)."""
        modes, values = self._eigen(sigma)
        return modes.block(values, 0, frames)

    def _eigen(self, sigma: Tensor) -> tuple[TemporalModes, Tensor]:
        modes = self.model.covariance.temporal(self.frames)
        return modes, modes.values if self.prior_only else self.model.posterior_variance(sigma, self.frames)[0]

    def apply(self, components: Tensor, sigma: Tensor) -> Tensor:
        modes, values = self._eigen(sigma)
        return modes.inverse(modes.forward(components) * values)

    def expand(self, components: Tensor) -> Tensor:
        return (components @ self.model.covariance.basis.T).unflatten(-1, self.latent_shape)

    def project(self, latents: Tensor) -> Tensor:
        return latents.flatten(2) @ self.model.covariance.basis


def later(observation: Observation, frames: int) -> Observation:
    """The observation, seen from fields that begin ``frames`` earlier."""
    return replace(observation, operator=observation.operator.rebase(-frames))
