"""How a forecast knows its initial frames: as observations of the latents."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from appa_lite.core.covariance import SpaceTimeCovariance
from appa_lite.diffusion.base import Denoiser
from appa_lite.forecasters.posterior import ModeCovariance, Prior
from appa_lite.guidance.base import LatentOperator, LinearModes


class KnownFrames(LatentOperator, LinearModes):
    """Components of some latent frames, observed directly: how a forecast knows its initial frames.

    Args:
        prior: over the period; frames: indices of the known latent frames.
    """

    linear = True

    def __init__(self, prior: Prior, frames: list[int]):
        self.model, self.frames, self.total = prior.model, frames, prior.period.latent_frames

    def predict(self, latents: Tensor) -> Tensor:
        anomalies = latents[:, self.frames].flatten(2) - self.model.mean
        return (anomalies @ self.model.covariance.basis).flatten(1)

    def linearise(self, latents: Tensor) -> LinearModes:
        return self

    def forward(self, components: Tensor) -> Tensor:
        return components[:, self.frames].flatten(1)

    def adjoint(self, values: Tensor) -> Tensor:
        out = values.new_zeros(values.shape[0], self.total, self.model.covariance.modes)
        out[:, self.frames] = values.unflatten(1, (len(self.frames), -1))
        return out

    def preconditioner(self, covariance: ModeCovariance, sigma: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
        """The exact inverse: modes are independent, so each has a small system over its known frames."""
        count = len(self.frames)
        block = covariance.first(count, sigma) / variance.reshape(count, -1).T[:, :, None]
        factor = torch.linalg.cholesky(block.double() + torch.eye(count, dtype=torch.float64, device=block.device))

        def apply(residual: Tensor) -> Tensor:
            parts = residual.unflatten(1, (count, -1)).permute(2, 1, 0).double()
            return torch.cholesky_solve(parts, factor).permute(2, 1, 0).flatten(1).to(residual)

        return apply


def pinned(denoiser: Denoiser, covariance: SpaceTimeCovariance, latents: Tensor) -> Denoiser:
    """The denoiser given what the modes leave out of known first frames: there it is those frames' own.

    Outside the modes the prior is white noise, independent of the rest, so that this conditions exactly.

    Args:
        latents: (B, known, Z, h, w), the known frames.
    """
    known = latents.shape[1]

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        mean = denoiser(x, sigma)
        missing = (latents - mean[:, :known]).flatten(2)
        missing = missing - (missing @ covariance.basis) @ covariance.basis.T
        return torch.cat([mean[:, :known] + missing.reshape(latents.shape), mean[:, known:]], dim=1)

    return call


class KnownState(LatentOperator, LinearModes):
    """One frame, the last that the first latent frame holds, where the autoencoder compresses several into one.

        y = P E([x, ..., x]) = P E([D(z)_last, ..., D(z)_last]) + e

    A state is encoded as if it had stood still: these are K numbers which the state alone decides. What they leave
    open, how it moved, the prior fills in. The derivative is taken once, by differences of ``step`` standard
    deviations of each mode around the mean: seconds to a minute.

    Args:
        prior: over the period; the state is at its frame ``stride - 1``.
    """

    NEAR = 2  #: latent frames that a lapped decoder sees of its first one

    def __init__(self, prior: Prior, step: float = 0.3, chunk: int = 64):
        self.prior, self.model, self.total = prior, prior.model, prior.period.latent_frames
        covariance = self.model.covariance
        width = step * covariance.autocovariance[:, 0].clamp(min=1e-8).sqrt()
        frames = []
        for frame in range(self.NEAR):
            columns = []
            for modes in torch.arange(covariance.modes).split(chunk):
                moved = self.model.mean.repeat(len(modes), self.NEAR, 1)
                change = (covariance.basis[:, modes] * width[modes]).T
                ends = [moved.index_add(1, torch.tensor([frame]), sign * change[:, None]) for sign in (1.0, -1.0)]
                high, low = (self._still(self._decode(z.unflatten(-1, prior.shape[1:]))) for z in ends)
                columns.append((high - low) / (2 * width[modes, None]))
            frames.append(torch.cat(columns).T)
        self.matrix = torch.stack(frames)  #: dy / d component of each near latent frame, (NEAR, K, K)

    def over(self, prior: Prior) -> "KnownState":
        """The same operator over another period: only the clock of the normaliser differs."""
        other = copy.copy(self)
        other.prior, other.total = prior, prior.period.latent_frames
        return other

    def values(self, state: Tensor) -> Tensor:
        """y of known states (B, C, H, W) in physical units."""
        return self._still(self._normal(state))

    def _normal(self, state: Tensor) -> Tensor:
        """Normalised (B, 1, C, H, W)."""
        stride = self.prior.checkpoint.autoencoder.stride[0]
        return self.prior.checkpoint.normalizer(state[:, None], self.prior.period.times[stride - 1 : stride])

    def _decode(self, latents: Tensor) -> Tensor:
        """The normalised frame at which the state is known, (B, 1, C, H, W), of latents (B, T', Z, h, w)."""
        autoencoder = self.prior.checkpoint.autoencoder
        return autoencoder.decode(latents)[:, autoencoder.stride[0] - 1 : autoencoder.stride[0]]

    def _still(self, normal: Tensor) -> Tensor:
        autoencoder = self.prior.checkpoint.autoencoder
        latents = autoencoder.encode(normal.expand(-1, autoencoder.stride[0], -1, -1, -1))
        return (latents.flatten(2)[:, 0] - self.model.mean) @ self.model.covariance.basis

    def predict(self, latents: Tensor) -> Tensor:
        return torch.cat([self._still(self._decode(z[None, : self.NEAR])) for z in latents])

    def linearise(self, latents: Tensor) -> LinearModes:
        return self

    def forward(self, components: Tensor) -> Tensor:
        return torch.einsum("smk,bsk->bm", self.matrix, components[:, : self.NEAR])

    def adjoint(self, values: Tensor) -> Tensor:
        near = torch.einsum("smk,bm->bsk", self.matrix, values)
        return torch.nn.functional.pad(near, (0, 0, 0, self.total - self.NEAR))

    def preconditioner(self, covariance: ModeCovariance, sigma: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
        """The exact inverse, a dense system of K numbers."""
        scaled = (self.matrix * variance.rsqrt()[:, None]).double()
        block = torch.einsum("smk,kst,tnk->mn", scaled, covariance.first(self.NEAR, sigma).double(), scaled)
        factor = torch.linalg.cholesky(block + torch.eye(len(block), dtype=torch.float64, device=block.device))
        return lambda residual: torch.cholesky_solve(residual.T.double(), factor).T.to(residual)
