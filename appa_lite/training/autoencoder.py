"""Training of the spatiotemporal autoencoder, and what its card says."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xarray as xr
from torch import Tensor, nn
from torch.utils.data import Dataset

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.data.windows import WindowDataset
from appa_lite.models.autoencoder import SpatiotemporalAutoencoder
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer
from appa_lite.training.base import Recipe, SampleNoise, Trainable, fitting
from appa_lite.training.data import Sample, TrainingData, climatology


@dataclass
class AutoencoderTraining(Trainable):
    """Weighted squared error of reconstructed windows, in units of each variable's climatological standard deviation.

        loss = sum_c w_c mean((x_c - decode(encode(x))_c)^2) / sum_c w_c       over the cells that exist

    Args:
        model: the autoencoder; normalizer: fitted, frozen; spec: of the data; weights: w_c by variable name (default 1);
        train, test: fields for the latents' scale and for the card; settings: stored with the model;
        alone: windows hold one latent frame, which never saw another.
    """

    model: nn.Module
    normalizer: Normalizer
    spec: FieldSpec
    weights: dict[str, float]
    train: Sample
    test: Sample
    settings: dict = field(default_factory=dict)
    climatology: xr.Dataset | None = None
    alone: bool = False

    def __post_init__(self):
        self.normalizer.requires_grad_(False)
        values = torch.tensor([float(self.weights.get(name, 1.0)) for name in self.spec.names])
        self.weight = values / values.sum()
        self.mask = self.spec.mask_tensor()

    def to(self, device: torch.device | str) -> None:
        self.model.to(device)
        self.normalizer.to(device)
        self.weight, self.mask = self.weight.to(device), self.mask.to(device)

    def errors(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean squared error and mean square of normalised anomalies, per variable: (C,), (C,)."""
        x = self.normalizer(batch["fields"], batch["time"])
        return self._mean_square(model(x) - x), self._mean_square(x)

    def _mean_square(self, x: Tensor) -> Tensor:
        return (x.square() * self.mask).sum((0, 1, 3, 4)) / (self.mask.sum() * x.shape[0] * x.shape[1])

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        error, _ = self.errors(model, batch)
        return {"loss": (self.weight * error).sum()}

    def validate(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        """Root-mean-square error per variable, in per cent of its standard deviation."""
        totals = [torch.stack(self.errors(self.model, batch)).double().cpu() for batch, _ in batches]
        error, power = torch.stack(totals).mean(0)
        return {f"error_{name}_percent": float(100 * (e / p).sqrt()) for name, e, p in zip(self.spec.names, error, power, strict=True)}

    def export(self, directory: Path) -> None:
        """Standardise the latents, measure the reconstruction beside empirical orthogonal functions, and save."""
        model, normalizer = self.model.cpu(), self.normalizer.cpu()
        if isinstance(model, SpatiotemporalAutoencoder):
            if self.alone:
                model.forget_neighbours()
            model.standardise(normalizer(self.train.fields, self.train.times))
        card = reconstruction_card(model, normalizer, self.spec, self.train, self.test)
        Checkpoint(self.spec, normalizer, model, None, self.settings | {"autoencoder": card}, self.climatology).save(directory)


def _training(data: TrainingData, model: nn.Module, weights: Mapping[str, float]) -> AutoencoderTraining:
    """With the climatology of all training fields, and some of them for what is done once."""
    train = data.train.in_memory()
    some = train.part(max(1, 3000 // train.fields.shape[1]), slice(None))
    test = data.held.part(4, slice(400)).in_memory()
    statistics = climatology(data.spec, train.fields)
    return AutoencoderTraining(model, data.fit_normalizer(), data.spec, dict(weights), some, test, data.settings, statistics)


@dataclass(frozen=True)
class AutoencoderRecipe(Recipe):
    """The spatiotemporal autoencoder, from principal components of patches.

    Args:
        stride, channels, width, depth, lap, kernel: of ``SpatiotemporalAutoencoder``;
        window, window_stride: frames; weights: of the variables in the loss (default 1).
    """

    stride: Sequence[int] = (2, 4, 4)
    channels: int = 8
    width: int = 96
    depth: int = 2
    lap: int = 5
    kernel: int = 3
    window: int = 8
    window_stride: int = 1
    weights: Mapping[str, float] = field(default_factory=dict)

    def prepare(self, data: TrainingData) -> tuple[AutoencoderTraining, Dataset, Dataset]:
        spec, counts = data.spec, [s.fields.shape[1] for s in (data.train, data.held)]
        if min(counts) < self.window:
            found = f"{counts[0]} and {counts[1]} frames to train and validate on"
            raise UserError(f"window={self.window} frames is longer than the data: {found}")
        with fitting():
            model = SpatiotemporalAutoencoder(
                spec.shape, self.stride, self.channels, self.width, self.depth, self.lap, self.kernel, spec.grid.periodic
            )
        model.mask.copy_(spec.mask_tensor())
        training = _training(data, model, self.weights)
        training.alone = self.window == self.stride[0]
        weights = torch.tensor([float(self.weights.get(n, 1.0)) for n in spec.names])
        model.start_from_components(training.normalizer(training.train.fields, training.train.times), weights)
        pairs = ((data.train, self.window_stride), (data.held, self.window))
        return training, *(WindowDataset(s.fields, s.times, self.window, stride) for s, stride in pairs)


@dataclass(frozen=True)
class IdentityRecipe(Recipe):
    """No compression: the normaliser is fitted, and there is nothing to train."""

    def prepare(self, data: TrainingData) -> tuple[AutoencoderTraining, Dataset, Dataset]:
        windows = (WindowDataset(s.fields, s.times, 1) for s in (data.train, data.held))
        return _training(data, IdentityAutoencoder(data.spec.shape), {}), *windows


@torch.no_grad()
def reconstruction_card(model: nn.Module, normalizer: Normalizer, spec: FieldSpec, train: Sample, test: Sample) -> dict:
    """Reconstruction error per quantity on ``test``, beside as many empirical orthogonal functions fitted on ``train``.

    ``percent`` is of the standard deviation of the quantity's anomalies; ``spectrum_ratio`` is the mean power of the
    reconstruction over the truth's, by thirds of the wavenumbers from large to small scales.
    """
    kept = model.latent_shape[0] * model.latent_shape[1] * model.latent_shape[2] / model.stride[0]
    window = 8 * model.stride[0]
    frames = test.fields.shape[1] // window * window or test.fields.shape[1] // model.stride[0] * model.stride[0]
    times = test.times[:frames]
    truth = test.fields[:, :frames]
    normal = normalizer(truth, times)
    pieces = [torch.cat([model.decode(model.encode(part[None])) for part in trajectory.split(window)], dim=1)[0] for trajectory in normal]
    ours = normalizer.inverse(torch.stack(pieces), times)
    linear = normalizer.inverse(empirical_reconstruction(normalizer(train.fields, train.times), normal, round(kept)), times)
    climatology = normalizer.untransform(normalizer.climatology(times)).expand_as(truth)
    mask, rows = spec.mask_tensor(), []
    for quantity in (*spec.variables, *spec.derived):
        t, m, e, c = (spec.evaluate(f, quantity.name)[..., mask] for f in (truth, ours, linear, climatology))
        deviation = (t - c).square().mean().sqrt()
        errors = [(a - t).square().mean().sqrt() for a in (m, e)]
        rows.append(
            {"variable": quantity.name, "units": quantity.units, "error": float(errors[0]), "percent": float(100 * errors[0] / deviation)}
            | {"percent_empirical_orthogonal_functions": float(100 * errors[1] / deviation)}
            | {
                "spectrum_ratio": spectrum_ratio(
                    spec.evaluate(ours - climatology, quantity.name), spec.evaluate(truth - climatology, quantity.name)
                )
            }
        )
    cells = int(mask.sum()) * spec.channels
    return {"numbers_per_frame": kept, "compression": cells / kept, "test_frames": frames * len(truth), "reconstruction": rows}


def empirical_reconstruction(train: Tensor, test: Tensor, count: int, most: int = 3000) -> Tensor:
    """``test`` (N, T, C, H, W) projected on the ``count`` leading empirical orthogonal functions of the frames of ``train``."""
    frames = train.flatten(0, 1).flatten(1)
    frames = frames[torch.linspace(0, len(frames) - 1, min(most, len(frames))).long()]
    values, vectors = torch.linalg.eigh((frames @ frames.T).double())
    keep = min(count, int((values > 1e-9 * values[-1]).sum()))
    basis = (vectors[:, -keep:] / values[-keep:].sqrt()).float().T @ frames
    flat = test.flatten(2)
    return ((flat @ basis.T) @ basis).reshape(test.shape)


def spectrum_ratio(fields: Tensor, truth: Tensor) -> list[float]:
    """Power of fields over that of the truth (..., H, W) in three bands of wavenumber, after a Hann window on each axis."""
    h, w = truth.shape[-2:]
    taper = (torch.hann_window(h, periodic=False) if h > 1 else torch.ones(1))[:, None] * torch.hann_window(w, periodic=False)
    power = [torch.fft.rfft2(torch.nan_to_num(f) * taper).abs().square().flatten(0, -3).mean(0) for f in (fields, truth)]
    ky, kx = torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)
    k = (ky**2 + kx**2).sqrt()
    bands = [(k > a) & (k <= b) for a, b in ((0, 1 / 6), (1 / 6, 1 / 3), (1 / 3, 1 / 2))]
    return [float(power[0][b].sum() / power[1][b].sum()) for b in bands]
