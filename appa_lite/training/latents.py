"""Latents of a dataset, made once and kept as zarr, so that no training waits for the encoder.

    DIRECTORY/KEY.zarr      latents (trajectory, time, channel, y, x) float32, as any dataset: xarray opens it

The key is a digest of the data, of the weights of normaliser and autoencoder, and of the version; the same latents serve
every training on them. Processes take stretches of frames in turn, whole shards each, and whoever finds them all done gives
the store its name. What is finished stays for the next session if all are killed. A store may be deleted: it is made again.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dask.array as da
import numpy as np
import torch
import xarray as xr
import zarr
from filelock import FileLock, Timeout
from torch import Tensor

from appa_lite import __version__
from appa_lite.core.fields import to_datetime
from appa_lite.core.store import chunking, consolidate, open_dataset
from appa_lite.data.windows import LazyFields
from appa_lite.models.checkpoint import Checkpoint

logger = logging.getLogger(__name__)
DIMS = ("trajectory", "time", "channel", "y", "x")
CHUNK = 64  #: latent frames that are encoded at once


@dataclass(frozen=True)
class LatentArray:
    """How stored latents are read: what `LazyFields` asks of the description of fields."""

    shape: tuple[int, int, int]
    names: tuple[str, ...] = ("latents",)

    def to_tensor(self, dataset: xr.Dataset) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(dataset["latents"].values))


@dataclass(frozen=True)
class LatentStore:
    """A directory of latents.

    Args:
        directory: made if needed; memory: bytes of latents that are read into memory, of more windows are streamed;
        device: where they are encoded.
    """

    directory: Path
    memory: float
    device: torch.device

    def latents(self, space: Checkpoint, fields: Tensor | LazyFields, times: Tensor, source: str) -> Tensor | LazyFields:
        """The latents (N, T', Z, h, w) of trajectories (N, T, C, H, W) at times (T,), read if they are there, else made.

        Args:
            source: a digest of the data that the fields come from.
        """
        key = _key(space, tuple(fields.shape), times, source)
        path = self.directory / f"{key}.zarr"
        if path.exists():
            _say("%s: latents of an earlier training are used again", path)
        else:
            _say("%s: the data are encoded once, for every training on these latents", path)
            with _on(space, self.device):
                _Making(path, space, fields, times).run()
        shape = tuple(space.autoencoder.latent_shape)
        lazy = LazyFields(open_dataset(path), LatentArray(shape))
        return lazy if lazy.nbytes > self.memory else lazy.spec.to_tensor(lazy.dataset)


@torch.no_grad()
def encode(
    space: Checkpoint, fields: Tensor | LazyFields, times: Tensor, trajectory: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """Latent frames [start, stop) (T', Z, h, w) of one of the trajectories (N, T, C, H, W) at times (T,).

    In overlapping pieces, so that the ends of a piece do not show.
    """
    encoder, stride = space.autoencoder, space.autoencoder.stride[0]
    reach, total, parts = 2 * encoder.reach, len(times) // stride, []
    stop, device = total if stop is None else stop, _device(space)
    for first in range(start, stop, CHUNK):
        last = min(first + CHUNK, stop)
        low, high = max(0, first - reach), min(total, last + reach)
        piece = slice(low * stride, high * stride)
        normalised = space.normalizer(fields[trajectory, piece].to(device), times[piece].to(device))
        parts.append(encoder.encode(normalised[None])[0, first - low : last - low].cpu())
    return torch.cat(parts)


class _Making:
    """The making of a store, by all processes that come for it, each as far as the others leave it something to do.

    A piece is a stretch of whole shards; its file ``.done`` appears when it is written, and the lock of the one who writes it
    opens when that process dies.
    """

    def __init__(self, path: Path, space: Checkpoint, fields: Tensor | LazyFields, times: Tensor):
        self.path, self.space, self.fields, self.times = path, space, fields, times
        self.work = path.with_name(f".{path.name}.partial")
        self.store = self.work / path.name
        stride = space.autoencoder.stride[0]
        self.shape = (fields.shape[0], fields.shape[1] // stride, *space.autoencoder.latent_shape)
        self.stamps = times[: self.shape[1] * stride : stride]
        # Whole frames, then time, then trajectories: as for a field with levels.
        self.chunks, self.shards = chunking(("trajectory", "time", "level", "y", "x"), self.shape, 4)
        rows, frames = (self.shards or self.chunks)[:2]
        starts = [(n, t) for n in range(0, self.shape[0], rows) for t in range(0, self.shape[1], frames)]
        self.pieces = [(slice(n, min(n + rows, self.shape[0])), slice(t, min(t + frames, self.shape[1]))) for n, t in starts]

    def run(self) -> None:
        while not self.path.exists():
            try:
                self._advance()
            except FileNotFoundError:  # another process has given the store its name, and cleaned up
                if not self.path.exists():
                    raise
        shutil.rmtree(self.work, ignore_errors=True)

    def _advance(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        with FileLock(self.work / "create.lock"):
            if not self.path.exists() and not self.store.exists():
                self._create()
        waiting = [i for i in range(len(self.pieces)) if not self._finish(i)]
        if waiting:
            time.sleep(0.2)  # for the pieces of others, or to take over what a lost process has dropped
            return
        with FileLock(self.work / "finish.lock"):
            if not self.path.exists():
                consolidate(self.store)
                self.store.rename(self.path)

    def _finish(self, i: int) -> bool:
        """Whether piece ``i`` needs no more thought: made now, or before; False while another process is at it."""
        done = self.work / f"{i:06d}.done"
        try:
            with FileLock(self.work / f"{i:06d}.lock", timeout=0):
                if not done.exists() and not self.path.exists():
                    rows, frames = self.pieces[i]
                    numbers = range(rows.start, rows.stop)
                    made = [encode(self.space, self.fields, self.times, n, frames.start, frames.stop) for n in numbers]
                    zarr.open_array(self.store / "latents", mode="r+")[rows, frames] = torch.stack(made).float().numpy()
                    done.touch()
        except Timeout:
            return False
        return True

    def _create(self) -> None:
        """The store without its content, under its name when it is whole."""
        fresh = self.store.with_suffix(".fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        empty = da.zeros(self.shape, chunks=self.shards or self.chunks, dtype=np.float32)
        dataset = xr.Dataset({"latents": (DIMS, empty)}, {"time": to_datetime(self.stamps.numpy())}, {"source": f"appa_lite {__version__}"})
        encoding = {
            "latents": {"chunks": self.chunks} | ({"shards": self.shards} if self.shards else {}),
            "time": {"dtype": "float64", "units": "seconds since 1970-01-01", "_FillValue": None},
        }
        dataset.to_zarr(fresh, mode="w", zarr_format=3, encoding=encoding, consolidated=False, compute=False)
        fresh.rename(self.store)


def _key(space: Checkpoint, shape: tuple[int, ...], times: Tensor, source: str) -> str:
    """What the latents depend on."""
    models = (space.normalizer, space.autoencoder)
    settings = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in models]
    plain = [__version__, source, shape, space.spec.to_dict(), type(space.autoencoder).__name__, settings]
    found = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    found.update(times.double().numpy().tobytes())
    for model in models:
        for name, value in model.state_dict().items():
            found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _say(message: str, path: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message, path)


def _device(space: Checkpoint) -> torch.device:
    tensors = (*space.autoencoder.parameters(), *space.normalizer.parameters(), *space.normalizer.buffers())
    return tensors[0].device


@contextmanager
def _on(space: Checkpoint, device: torch.device) -> Iterator[None]:
    """Within the context its networks are on the device."""
    before = _device(space)
    for model in (space.normalizer, space.autoencoder):
        model.to(device)
    try:
        yield
    finally:
        for model in (space.normalizer, space.autoencoder):
            model.to(before)
