"""Training of the denoiser under noises that are not Gaussian: t-EDM and DLPM."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from appa_lite.diffusion.noise_laws import NoiseLaw, Stable, seen_level
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.training.base import Recipe, SampleNoise, Trainable
from appa_lite.training.data import LatentWindows, TrainingData
from appa_lite.training.denoiser import DenoiserRecipe, DenoiserTraining


@dataclass
class HeavyTailedTraining(Trainable):
    """Denoising score matching with noise s g, its scale s shared by a window.

        Student   E |D(z + sigma s g, sigma) - z|^2 / c_out(sigma)^2         (Pandey et al. 2025: EDM with another noise)
        stable    E sqrt(|D(z + sigma s g, sigma) - z|^2 / c_out(sigma)^2)   (Shariatian et al. 2025, eq. 21: the square has no mean)

    Args:
        inner: the training with Gaussian noise, for all that is the same; law: of s.
    """

    inner: DenoiserTraining
    law: NoiseLaw

    def __post_init__(self):
        self.model: LatentDenoiser = self.inner.model

    def _terms(self, model: nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> Tensor:
        z, inner = batch["latents"], self.inner
        sigma = inner.low * (inner.high / inner.low) ** noise.stratified()
        scale = self.law.scale(noise.uniform((2,), torch.float64)).to(z)
        x = z + (sigma * scale)[:, None, None, None, None] * noise.normal(z.shape[1:])
        level = seen_level(x, sigma, quiet(self.model)) if isinstance(self.law, Stable) else sigma
        error = (model(x, level, batch.get("forcing")) - z).square().mean((1, 2, 3, 4))
        relative = error / inner.scale_of(sigma, z.shape[1]) ** 2
        return relative.sqrt() if isinstance(self.law, Stable) else relative

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        return {"loss": self._terms(model, batch, noise).mean()}

    def validate(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        return self.mean_loss(batches)

    def export(self, directory: Path) -> None:
        self.inner.export(directory)


@dataclass(frozen=True)
class HeavyTailedRecipe(Recipe):
    """The latent diffusion model of ``denoiser``, trained under another law of the noise."""

    denoiser: DenoiserRecipe
    law: NoiseLaw

    def prepare(self, data: TrainingData) -> tuple[HeavyTailedTraining, LatentWindows, LatentWindows]:
        inner, windows, held = self.denoiser.prepare(data)
        inner.settings["noise_law"] = {"class": type(self.law).__name__, **vars(self.law)}
        return HeavyTailedTraining(inner, self.law), windows, held


def quiet(model: LatentDenoiser) -> Tensor:
    """The quarter of the model's modes (D, K) in which its latents vary least."""
    basis = model.covariance.basis
    return basis[:, -max(1, basis.shape[1] // 4) :]


def evaluate(model: LatentDenoiser, law: NoiseLaw, x: Tensor, sigma: Tensor) -> Tensor:
    """D(x, sigma) as it was trained."""
    level = seen_level(x, sigma, quiet(model)) if isinstance(law, Stable) else sigma
    return model(x, torch.as_tensor(level).expand(len(x)))
