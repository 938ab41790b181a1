"""Windows of trajectories, and the one order in which they are visited."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_seconds
from appa_lite.core.random import generator

MIXED = 8  #: blocks whose windows are shuffled together, where windows are visited block by block


class ArrayLike(Protocol):
    """What trajectories (N, T, C, H, W) must offer: a shape, and ``fields[n, a:b]`` of shape (b - a, C, H, W)."""

    shape: Sequence[int]

    def __getitem__(self, key: tuple[int, slice]) -> object: ...


BLOCK = 2**26  #: bytes, as decoded, that are read from a store at once, if its chunks are not larger


class LazyFields:
    """Trajectories of an xarray dataset behind array syntax: ``lazy[n, a:b]`` is read when asked for, ``lazy[n:m, a:b]`` is lazy.

    Whole chunks or shards are read at once, ``block`` frames of a trajectory, and the last ``kept`` blocks stay in memory,
    for windows that are visited block by block (see `GlobalSampler`).
    """

    def __init__(self, dataset: xr.Dataset, spec: FieldSpec, kept: int = 2 * MIXED):
        self.spec, self.kept = spec, kept
        self.dataset = dataset[list(spec.names)]
        if "trajectory" not in self.dataset.dims:
            self.dataset = self.dataset.expand_dims("trajectory")
        self.shape = (self.dataset.sizes["trajectory"], self.dataset.sizes["time"], *spec.shape)
        self.block = _frames_per_block(dataset[spec.names[0]], 4 * int(np.prod(spec.shape)))
        self._blocks: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def __getitem__(self, key: tuple[int | slice, slice]) -> "Tensor | LazyFields":
        if isinstance(key[0], slice):
            return LazyFields(self.dataset.isel(trajectory=key[0], time=key[1]), self.spec, self.kept)
        start, stop, _ = key[1].indices(self.shape[1])
        blocks = range(start // self.block, max(stop - 1, start) // self.block + 1)
        parts = [self._read(key[0], i)[max(0, start - i * self.block) : stop - i * self.block] for i in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def nbytes(self) -> int:
        """As decoded."""
        return 4 * int(np.prod(self.shape))

    def sample(self, limit: float) -> tuple[Tensor, Tensor]:
        """As many whole blocks of all trajectories as ``limit`` bytes hold, evenly spread in time, and the places of their frames."""
        count = -(-self.shape[1] // self.block)
        most = max(1, int(limit * count / self.nbytes))
        chosen = range(count) if most >= count else [i * count // most for i in range(most)]
        slices = [slice(i * self.block, min(self.shape[1], (i + 1) * self.block)) for i in chosen]
        fields = [torch.cat([self[n, piece] for piece in slices]) for n in range(self.shape[0])]
        return torch.stack(fields), torch.cat([torch.arange(piece.start, piece.stop) for piece in slices])

    def _read(self, trajectory: int, block: int) -> Tensor:
        key = (int(trajectory), block)
        if key not in self._blocks:
            part = self.dataset.isel(trajectory=key[0], time=slice(block * self.block, (block + 1) * self.block))
            self._blocks[key] = self.spec.to_tensor(part)
            if len(self._blocks) > self.kept:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_blocks": OrderedDict()}


def _frames_per_block(array: xr.DataArray, frame: int) -> int:
    """Frames of a shard, or of a chunk where shards are larger than a block (or there are none)."""
    place = array.dims.index("time") if "time" in array.dims else 0
    sizes = [array.encoding.get(name) for name in ("shards", "chunks", "chunksizes")]
    lengths = [int(size[place]) for size in sizes if size and len(size) > place]
    fitting = [length for length in lengths if length * frame <= BLOCK]
    return max(1, fitting[0] if fitting else min(lengths, default=1))


class WindowDataset(Dataset):
    """All windows of ``frames`` consecutive frames of a set of trajectories.

    Items are ``{'fields': (frames, C, H, W) float32, 'time': (frames,) float64, 'index': int}``. Windows that would
    straddle a gap of the time axis are left out.

    Args:
        fields: trajectories (N, T, C, H, W): a tensor, a numpy array or memory map, or anything with that syntax.
        times: seconds since 1970-01-01 or datetime64, (T,) for all trajectories or (N, T).
        frames: frames per window.
        stride: frames between the starts of neighbouring windows.

    Raises:
        UserError: no window fits.
    """

    def __init__(self, fields: Tensor | np.ndarray | ArrayLike, times: np.ndarray | Tensor, frames: int, stride: int = 1):
        if len(fields.shape) != 5:
            raise ValueError(f"trajectories have shape (N, T, C, H, W), got {tuple(fields.shape)}")
        count, length = fields.shape[:2]
        seconds = np.asarray(times)
        seconds = to_seconds(seconds) if np.issubdtype(seconds.dtype, np.datetime64) else seconds.astype(np.float64)
        self.fields, self.frames, self.stride = fields, frames, stride
        self.times = torch.from_numpy(np.broadcast_to(seconds, (count, length)).copy())
        self.windows = _starts(self.times, frames, stride)  # (windows, 2): trajectory, first frame
        if not len(self.windows):
            raise UserError(f"no window of {frames} frames fits in trajectories of {length} frames: use longer trajectories")

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset, spec: FieldSpec, frames: int, stride: int = 1, memory_limit: float = 4e9) -> "WindowDataset":
        """Windows of a dataset ``([trajectory], time, <grid dims>)``, loaded at once when smaller than ``memory_limit`` bytes."""
        missing = [n for n in spec.names if n not in dataset]
        if missing:
            raise UserError(f"variables {missing} are missing: the dataset has {list(dataset.data_vars)}")
        fields = LazyFields(dataset, spec)
        if fields.nbytes <= memory_limit:
            fields = spec.to_tensor(fields.dataset)
        return cls(fields, dataset["time"].values, frames, stride)

    @property
    def block(self) -> int:
        """Windows that are best visited together, for they are read together; 1 where that does not matter."""
        return max(1, getattr(self.fields, "block", 1) // self.stride)

    def to(self, device: torch.device | str) -> "WindowDataset":
        """The same windows with the fields on ``device``, for fields that are a tensor or an array."""
        if not isinstance(self.fields, Tensor | np.ndarray):
            return self
        moved = object.__new__(WindowDataset)
        moved.__dict__ |= self.__dict__ | {"fields": torch.as_tensor(self.fields).to(device)}
        return moved

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict:
        trajectory, start = self.windows[index].tolist()
        window = slice(start, start + self.frames)
        values = self.fields[trajectory, window]
        if isinstance(values, np.ndarray):
            values = torch.from_numpy(np.array(values, dtype=np.float32))
        return {"fields": values.to(torch.float32), "time": self.times[trajectory, window], "index": int(index)}

    def __getitems__(self, indices: Sequence[int]) -> dict | list[dict]:
        """A whole batch by one gather where the fields are in memory; otherwise a list of items. See `collate`."""
        if not isinstance(self.fields, Tensor):
            return [self[i] for i in indices]
        indices = torch.as_tensor(indices)
        trajectory, start = self.windows[indices].unbind(1)
        rows, columns = trajectory[:, None], start[:, None] + torch.arange(self.frames)
        device = self.fields.device
        fields = self.fields[rows.to(device), columns.to(device)].to(torch.float32)
        return {"fields": fields, "time": self.times[rows, columns], "index": indices}


def collate(items: dict | list) -> dict[str, Tensor]:
    """A batch, as `torch.utils.data.default_collate`, from items or from a batch that the dataset made itself."""
    return items if isinstance(items, dict) else default_collate(items)


def _starts(times: Tensor, frames: int, stride: int) -> Tensor:
    """Trajectory and first frame of every window without a gap, (windows, 2)."""
    count, length = times.shape
    if length < frames:
        return torch.zeros(0, 2, dtype=torch.long)
    starts = torch.arange(0, length - frames + 1, stride)
    complete = torch.ones(count, len(starts), dtype=torch.bool)
    if frames > 1:
        steps = times.diff(dim=1)
        regular = (steps - steps.median()).abs() <= 1e-3 * steps.median().abs()
        complete = regular.unfold(1, frames - 1, 1).all(-1)[:, starts]
    trajectory, place = torch.nonzero(complete, as_tuple=True)
    return torch.stack([trajectory, starts[place]], 1)


class GlobalSampler:
    """The one order of the samples, whatever the number of processes: an endless batch sampler.

    Position p of the training (the number of samples consumed before it) is sample ``permutation(seed, epoch)[place]``
    with ``epoch, place = divmod(p, length)``. A global batch is ``batch`` consecutive positions, of which process
    ``rank`` takes its contiguous share, in ``parts`` pieces for gradient accumulation.

    With ``block`` > 1 the permutation is one that a store can follow: blocks of so many neighbouring samples in random
    order, and the samples of 8 blocks at a time shuffled together, so that each block is read about once in an epoch.

    Args:
        length: samples in the dataset.
        batch: samples of the global batch; a multiple of ``world * parts``.
        seed: of the permutations.
        start: position of the first sample: the state of a stopped training is this one integer.
        block: neighbouring samples that are best visited together.
    """

    def __init__(
        self, length: int, batch: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1, parts: int = 1, block: int = 1
    ):
        if batch % (world * parts):
            raise UserError(f"batch={batch} is not a multiple of {world} processes x {parts} accumulation steps: choose another batch")
        self.length, self.batch, self.seed, self.start = length, batch, seed, start
        self.rank, self.world, self.parts, self.block = rank, world, parts, block
        self._orders: dict[int, Tensor] = {}

    def index(self, position: int) -> int:
        """The sample at a position."""
        epoch, place = divmod(position, self.length)
        if epoch not in self._orders:
            if len(self._orders) > 2:
                self._orders.clear()
            self._orders[epoch] = self._order(epoch)
        return int(self._orders[epoch][place])

    def _order(self, epoch: int) -> Tensor:
        draw = generator(self.seed, "order", epoch)
        if self.block == 1:
            return torch.randperm(self.length, generator=draw)
        blocks = torch.arange(self.length).split(self.block)
        shuffled = [blocks[i] for i in torch.randperm(len(blocks), generator=draw)]
        mixtures = [torch.cat(shuffled[i : i + MIXED]) for i in range(0, len(shuffled), MIXED)]
        return torch.cat([mixture[torch.randperm(len(mixture), generator=draw)] for mixture in mixtures])

    def positions(self) -> Iterator[range]:
        """The positions of this process's pieces, one after the other, for ever."""
        share = self.batch // self.world
        piece = share // self.parts
        start = self.start + self.rank * share
        while True:
            for part in range(self.parts):
                yield range(start + part * piece, start + (part + 1) * piece)
            start += self.batch

    def __iter__(self) -> Iterator[list[int]]:
        for positions in self.positions():
            yield [self.index(p) for p in positions]
