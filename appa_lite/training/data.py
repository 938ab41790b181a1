"""What a training learns from: fields, their climatology, and the latents of an autoencoder."""

import math
from dataclasses import dataclass, replace

import torch
import xarray as xr
from torch import Tensor
from torch.utils.data import Dataset

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.data.windows import LazyFields
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer
from appa_lite.training.latents import LatentStore, encode
from appa_lite.verification.thresholds import QUANTILES, pooled_quantiles


@dataclass(frozen=True)
class Sample:
    """Some trajectories: fields (N, T, C, H, W) in physical units, in memory or streamed; times (T,) in seconds since 1970;
    ``source``: a digest of the data they come from."""

    fields: Tensor | LazyFields
    times: Tensor
    source: str = ""

    def part(self, trajectories: int, frames: slice) -> "Sample":
        return Sample(self.fields[:trajectories, frames], self.times[frames], self.source)

    def in_memory(self, limit: float = 2e9) -> "Sample":
        """Itself where it is in memory; of what is streamed, pieces evenly spread in time, ``limit`` bytes of them."""
        if isinstance(self.fields, Tensor):
            return self
        fields, places = self.fields.sample(limit)
        return Sample(fields, self.times[places], self.source)


@dataclass(frozen=True)
class TrainingData:
    """What every recipe is given.

    Args:
        spec: of the fields; train: to learn from; held: never trained on; base: checkpoint of a trained autoencoder, or None.
        normalizer: settings of one to be fitted: ``periods``, ``homogeneous``, and by variable ``transforms`` and ``offsets``.
        settings: stored with the model: experiment, forcing periods, phase of the frames; record: seed and settings of the training.
        store: of latents, made once for all trainings; None: they stay in memory.
    """

    spec: FieldSpec
    train: Sample
    held: Sample
    base: Checkpoint | None
    normalizer: dict
    settings: dict
    record: dict
    store: LatentStore | None = None

    def fit_normalizer(self) -> Normalizer:
        """The normaliser of the settings, with the climatology of the training fields."""
        pick = [
            [self.normalizer[key].get(name, default) for name in self.spec.names]
            for key, default in (("transforms", "identity"), ("offsets", 1.0))
        ]
        fresh = Normalizer(self.spec.shape, list(self.normalizer["periods"]), *pick, self.spec.grid.periodic)
        train = self.train.in_memory()
        return fresh.fit(train.fields, train.times, self.spec.mask_tensor(), self.normalizer["homogeneous"])

    def space(self) -> Checkpoint:
        """The latent space to work in: that of the autoencoder given, else normalised fields as they are."""
        statistics = climatology(self.spec, self.train.in_memory().fields)
        if self.base is not None:
            return replace(self.base, denoiser=None, climatology=statistics)
        return Checkpoint(self.spec, self.fit_normalizer(), IdentityAutoencoder(self.spec.shape), None, self.settings, statistics)

    def latent_windows(
        self, space: Checkpoint, frames: int, strides: tuple[int, int], name: str | None = None
    ) -> tuple["LatentWindows", "LatentWindows"]:
        """Windows of latents to train and to validate on, ``strides`` latent frames between their starts; ``name`` is for errors."""
        stride, samples = space.autoencoder.stride[0], (self.train, self.held)
        counts = [s.fields.shape[1] // stride for s in samples]
        if min(counts) < frames:
            what = f"{name or f'window={frames}'} is longer than the data to train or validate on"
            raise UserError(f"{what}: {min(counts)} latent frames of {stride} frames")
        made = [
            LatentWindows(self._latents(space, s), space.forcing(s.times[: n * stride : stride]), frames, step)
            for s, n, step in zip(samples, counts, strides, strict=True)
        ]
        return made[0], made[1]

    def _latents(self, space: Checkpoint, sample: Sample) -> Tensor | LazyFields:
        """From the store, but for fields in memory that no network encodes."""
        plain = isinstance(sample.fields, Tensor) and isinstance(space.autoencoder, IdentityAutoencoder)
        if self.store is None or plain:
            return torch.stack([encode(space, sample.fields, sample.times, n) for n in range(sample.fields.shape[0])])
        return self.store.latents(space, sample.fields, sample.times, sample.source)


class LatentWindows(Dataset):
    """Windows of latents: items {'latents': (T, Z, h, w), 'forcing': (T, P) if any, 'index'}.

    Args:
        latents: (N, T, Z, h, w) trajectories, in memory or streamed; forcing: (T, P) of every frame, or None;
        frames: of a window; stride: between starts.
    """

    def __init__(self, latents: Tensor | LazyFields, forcing: Tensor | None, frames: int, stride: int = 1):
        if latents.shape[1] < frames:
            raise ValueError(f"trajectories of {latents.shape[1]} latent frames are shorter than a window of {frames}")
        self.latents, self.forcing, self.frames, self.stride = latents, forcing, frames, stride
        self.starts = [(n, t) for n in range(latents.shape[0]) for t in range(0, latents.shape[1] - frames + 1, stride)]

    @property
    def block(self) -> int:
        """Windows that are best visited together, for they are read together; 1 where that does not matter."""
        return max(1, getattr(self.latents, "block", 1) // self.stride)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict:
        n, t = self.starts[index]
        item = {"latents": self.latents[n, t : t + self.frames], "index": index}
        return item if self.forcing is None else item | {"forcing": self.forcing[t : t + self.frames]}

    def series(self, frames: int, limit: float = 2e9) -> Tensor:
        """The trajectories (N, T, Z, h, w) to take statistics from: all where they are in memory, else stretches of ``frames``
        frames evenly spread over all, ``limit`` bytes of them."""
        if isinstance(self.latents, Tensor):
            return self.latents
        count, total, *shape = self.latents.shape
        frames = min(frames, total)
        places = [(n, t) for n in range(count) for t in range(0, total - frames + 1, frames)]
        most = min(len(places), max(1, int(limit / (4 * frames * math.prod(shape)))))
        chosen = [places[i * len(places) // most] for i in range(most)]
        return torch.stack([self.latents[n, t : t + frames] for n, t in chosen])


def climatology(spec: FieldSpec, fields: Tensor) -> xr.Dataset:
    """Mean ``<name>`` and standard deviation ``<name>_std`` of every cell, of fields (N, T, C, H, W) and what is derived from them;
    and quantiles ``<name>_quantile`` (quantile) of all cells together, the thresholds of extremes."""
    parts, mask = [], spec.mask_tensor()
    for quantity in (*spec.variables, *spec.derived):
        values = torch.stack([spec.evaluate(trajectory, quantity.name) for trajectory in fields]).flatten(0, 1)
        parts.append((quantity, values.double().mean(0), values.double().std(0), pooled_quantiles(values[:, mask].numpy())))
    out = xr.Dataset(coords=spec.grid.coords() | {"quantile": list(QUANTILES)})
    for quantity, mean, std, levels in parts:
        out[f"{quantity.name}_quantile"] = ("quantile", levels, {"units": quantity.units})
        for name, array in ((quantity.name, mean), (f"{quantity.name}_std", std)):
            array = torch.where(mask, array, torch.nan).numpy()
            out[name] = (spec.grid.dims, array[0] if len(spec.grid.dims) == 1 else array, {"units": quantity.units})
    return out
