"""Training of the latent video diffusion model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from appa_lite.core.covariance import estimate_covariance, localisation
from appa_lite.core.errors import UserError
from appa_lite.core.random import generator
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.training.base import Recipe, SampleNoise, Trainable, fitting
from appa_lite.training.data import LatentWindows, TrainingData


@dataclass
class DenoiserTraining(Trainable):
    """Denoising score matching with log-uniform noise levels (Karras et al. 2022, eq. 2, with our preconditioning).

        loss = E |D(z + sigma n, sigma) - z|^2 / c_out(sigma)^2,    sigma in [low, high] and in the units of the latents

    One is the loss of the Gaussian prior with the climatological covariance (F = 0): what is below one was learned.

    Args:
        model: with its climatology installed; base: the checkpoint of the autoencoder; low, high: noise levels of the training;
        test: windows never trained on, for the covariance of the errors; half: store in half precision.
    """

    model: LatentDenoiser
    base: Checkpoint
    low: float
    high: float
    test: LatentWindows
    settings: dict
    half: bool = False

    def __post_init__(self):
        self.scale_of = self.model.residual_scale

    def _terms(self, model: torch.nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> tuple[Tensor, Tensor]:
        z = batch["latents"]
        sigma = self.low * (self.high / self.low) ** noise.stratified()
        x = z + sigma[:, None, None, None, None] * noise.normal(z.shape[1:])
        error = (model(x, sigma, batch.get("forcing")) - z).square().mean((1, 2, 3, 4))
        return error / self.scale_of(sigma, z.shape[1]) ** 2, sigma

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        terms, _ = self._terms(model, batch, noise)
        return {"loss": terms.mean()}

    def validate(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        """The loss, and its mean over each third of the (logarithmic) range of noise levels."""
        results = [self._terms(self.model, batch, noise) for batch, noise in batches]
        terms, sigma = torch.cat([r[0] for r in results]).double(), torch.cat([r[1] for r in results])
        third = (3 * torch.log(sigma / self.low) / torch.log(torch.tensor(self.high / self.low))).long().clamp(0, 2)
        names = ("low", "middle", "high")
        return {"loss": float(terms.mean())} | {f"loss_{n}_noise": float(terms[third == i].mean()) for i, n in enumerate(names)}

    def export(self, directory: Path) -> None:
        """Measure the covariance of the errors on windows never trained on, and save the model with its autoencoder."""
        model = self.model.cpu()
        measure_residuals(model, self.test)
        replace(self.base, denoiser=model, emulator=None, settings=self.base.settings | self.settings).save(directory, self.half)


@dataclass(frozen=True)
class DenoiserRecipe(Recipe):
    """The latent video diffusion model, on the latents of a trained autoencoder.

    Args:
        block, width, depth, heads, kernel, patch, spatial_attention, homogeneous, modes, lags: of ``LatentDenoiser``;
        window, window_stride: latent frames; noise: ``low`` and ``high`` noise levels, and how many ``levels`` are measured;
        localisation: latent cells, of the climatological covariance; half: store in half precision.
    """

    block: str = "attention"
    width: int = 96
    depth: int = 6
    heads: int = 4
    kernel: int = 3
    patch: Sequence[int] = (1, 1)
    spatial_attention: bool = True
    homogeneous: bool = False
    modes: int = 1024
    lags: int = 64
    window: int = 8
    window_stride: int = 1
    noise: Mapping[str, float] = field(default_factory=lambda: {"low": 0.01, "high": 100.0, "levels": 12})
    localisation: float | None = None
    half: bool = False

    def prepare(self, data: TrainingData) -> tuple[DenoiserTraining, LatentWindows, LatentWindows]:
        if self.block not in ("attention", "convolution"):
            raise UserError(f"trainable.block={self.block}: expected attention or convolution")
        if data.base is None:
            raise UserError("trainable=denoiser needs autoencoder=DIR, the model directory of a trained autoencoder")
        space = data.space()
        with fitting(), torch.device("meta"):
            self._network(space, self.lags, self.modes)  # says what does not fit before the data are encoded
        windows, held = data.latent_windows(space, self.window, (self.window_stride, max(1, self.window // 4)))
        enough = 8.0 * self.modes * math.prod(space.autoencoder.latent_shape)  # bytes of two frames a mode
        model = self._model(space, windows.series(4 * self.lags, max(2e9, enough)).flatten(2))
        record = data.record | {"train_windows": len(windows)}
        settings = {"denoiser": record, "window": self.window}
        return DenoiserTraining(model, space, self.noise["low"], self.noise["high"], held, settings, self.half), windows, held

    def _model(self, space: Checkpoint, latents: Tensor) -> LatentDenoiser:
        """With the climatology of latents (N, T, D) installed."""
        shape, periodic = space.autoencoder.latent_shape, space.spec.grid.periodic
        lags, modes = min(self.lags, latents.shape[1]), min(self.modes, latents.shape[2])
        if self.localisation is None:
            modes = min(modes, latents.shape[0] * latents.shape[1])  # so many frames span no more
        with fitting():
            model = self._network(space, lags, modes)
        mean = latents.mean((0, 1))
        taper = None if self.localisation is None else localisation(shape, periodic, self.localisation)
        model.set_climatology(mean, estimate_covariance(latents - mean, model.covariance.modes, lags, taper))
        return model

    def _network(self, space: Checkpoint, lags: int, modes: int) -> LatentDenoiser:
        shape, periodic = space.autoencoder.latent_shape, space.spec.grid.periodic
        low, high = (torch.tensor(self.noise[key], device="cpu").log10() for key in ("low", "high"))
        return LatentDenoiser(
            shape,
            self.window,
            self.width,
            self.depth,
            self.heads,
            self.kernel,
            self.patch,
            periodic,
            self.spatial_attention,
            self.homogeneous,
            2 * len(space.settings["forcing_periods"]),
            modes,
            lags,
            torch.logspace(low, high, self.noise["levels"], device="cpu").tolist(),
            self.block,
        )


@torch.no_grad()
def measure_residuals(model: LatentDenoiser, windows: LatentWindows, most: int = 192, batch: int = 16) -> None:
    """Set r(sigma), the variance of z - D(z_t) over the Gaussian's, per mode and temporal index, averaged over neighbours.

    Averages over 2 w + 1 neighbouring modes (w one 64th of the modes) tame the sampling noise of ``most`` windows.
    """
    chosen = torch.linspace(0, len(windows) - 1, min(most, len(windows))).long().tolist()
    draw = generator(0, "residuals")
    items = [windows[i] for i in chosen]
    z = torch.stack([item["latents"] for item in items])
    forcing = torch.stack([item["forcing"] for item in items]) if "forcing" in items[0] else None
    covariance, frames = model.covariance, z.shape[1]
    values = covariance.temporal(frames).values
    noise = torch.randn(z.shape, generator=draw)
    for i, level in enumerate(model.config.noise_levels):
        sigma = torch.tensor(level)
        errors = []
        for part in range(0, len(z), batch):
            cut = slice(part, part + batch)
            x = z[cut] + sigma * noise[cut]
            errors.append(z[cut] - model(x, sigma.expand(len(x)), None if forcing is None else forcing[cut]))
        error = torch.cat(errors).flatten(2)
        power = covariance.project(error).square().mean(0)
        ratio = power / (values * sigma**2 / (values + sigma**2))
        model.residual_ratio[i].copy_(_smooth(ratio).clamp(0.02, 10.0))
        if covariance.has_remainder:
            rest = (error.square().sum() - covariance.project(error).square().sum()) / (error.numel() - power.numel() * len(error))
            expected = covariance.remainder * sigma**2 / (covariance.remainder + sigma**2)
            model.residual_ratio_rest[i] = (rest / expected).clamp(0.02, 10.0)


def _smooth(ratio: Tensor) -> Tensor:
    half = ratio.shape[0] // 64 or (1 if ratio.shape[0] > 8 else 0)
    padded = torch.nn.functional.pad(ratio.T[None], (half, half), mode="replicate") if half else ratio.T[None]
    return torch.nn.functional.avg_pool1d(padded, 2 * half + 1, stride=1)[0].T
