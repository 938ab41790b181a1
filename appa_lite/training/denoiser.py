"""Training of the latent video diffusion model."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.training.base import SampleNoise, Trainable


class DenoiserTraining(Trainable):
    """Denoising score matching with log-uniform noise levels (Karras et al. 2022, eq. 2, with our preconditioning).

        loss = E |D(z + sigma n, sigma) - z|^2 / c_out(sigma)^2,    sigma in [low, high] and in the units of the latents

    One is the loss of the Gaussian prior with the climatological covariance (F = 0): what is below one was learned.

    Args:
        model: with its climatology installed; sigma_low, sigma_high: range of training noise levels.
    """

    def __init__(self, model: LatentDenoiser, sigma_low: float, sigma_high: float):
        self.model = model
        self.low, self.ratio = sigma_low, sigma_high / sigma_low
        self.scale_of = model.residual_scale

    def _terms(self, model: nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> tuple[Tensor, Tensor]:
        z = batch["latents"]
        sigma = self.low * self.ratio ** noise.stratified()
        x = z + sigma[:, None, None, None, None] * noise.normal(z.shape[1:])
        error = (model(x, sigma, batch.get("forcing")) - z).square().mean((1, 2, 3, 4))
        return error / self.scale_of(sigma, z.shape[1]) ** 2, sigma

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        terms, _ = self._terms(model, batch, noise)
        return {"loss": terms.mean()}

    def validate(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        """The loss, and its mean over each third of the (logarithmic) range of noise levels."""
        results = [self._terms(self.model, batch, noise) for batch, noise in batches]
        terms, sigma = torch.cat([r[0] for r in results]).double(), torch.cat([r[1] for r in results])
        third = (3 * torch.log(sigma / self.low) / torch.log(torch.tensor(self.ratio))).long().clamp(0, 2)
        names = ("low", "middle", "high")
        return {"loss": float(terms.mean())} | {f"loss_{n}_noise": float(terms[third == i].mean()) for i, n in enumerate(names)}

    def export(self, directory: Path) -> None:
        self.model.save_pretrained(directory)
