"""Pieces of work shared by processes through a directory: claimed in turn, kept when finished, merged at the end.

    with Work.of(cfg, inputs) as work:
        parts = work.map(count, compute)
        if parts is not None:                       # this process merges
            write_dataset(work.dataset(spec, ...), cfg.out)

Processes need nothing of each other but a file system with locks: those that one launcher started, several launchers, or
one process after another. A piece is a function of the configuration alone, never of who computes it, so that the
output is the same to the last bit for any number of processes and however often they were stopped.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import torch
import xarray as xr
from filelock import FileLock, Timeout
from omegaconf import DictConfig, ListConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from appa_lite import __version__
from appa_lite.core.fields import FieldSpec
from appa_lite.core.store import digest
from appa_lite.forecasters.base import Progress

log = logging.getLogger(__name__)

Part = dict[str, Tensor]  #: what a finished piece leaves, named arrays
Compute = Callable[[int, Progress], Part]  #: (number of the piece, progress) -> part
BLOCK = 2**24  #: bytes of a piece's fields that are read at once


def rank() -> int:
    """Number of this process among those that a launcher started; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def batches(members: int, size: int) -> list[range]:
    """Members in pieces of ``size``: the numbers that are computed together."""
    return [range(begin, min(begin + size, members)) for begin in range(0, members, size)]


def packed(value: Any) -> Tensor:
    """Something JSON-able as an array, for a `Part`."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def unpacked(array: Tensor) -> Any:
    """The inverse of `packed`."""
    return json.loads(bytes(array.tolist()).decode())


class Work:
    """Pieces of work behind one output, in a directory beside it, or in memory without one.

    The directory is ``.NAME.partial-DIGEST`` next to the output; the digest is that of the settings and of all inputs, so
    that pieces made with others are never mixed in. It holds a safetensors file for each finished piece, and locks that
    the system opens when a process dies, however it dies.

    Args:
        out: the output; None: everything stays in this process.
        key: digest of what the pieces depend on.
    """

    def __init__(self, out: str | os.PathLike | None = None, key: str = ""):
        self.directory = None if out is None else Path(out).with_name(f".{Path(out).name}.partial-{key}")
        self._merge: FileLock | None = None

    @classmethod
    def of(cls, cfg: DictConfig, inputs: Iterable[str | os.PathLike] = ()) -> "Work":
        """The work behind ``cfg.out``: its settings, the content of the input files and of the model."""
        plain = {key: value for key, value in OmegaConf.to_container(cfg, resolve=True).items() if key != "out"}
        found = hashlib.sha256(json.dumps([__version__, plain], sort_keys=True, default=str).encode())
        given = cfg.get("checkpoint") or []
        models = [Path(path) for path in (given if isinstance(given, ListConfig) else [given] if given else [])]
        weights = [file for model in models for file in sorted(model.rglob("*")) if file.is_file()]
        for item in (*inputs, *weights):
            found.update(digest(item).encode())
        return cls(cfg.out, found.hexdigest()[:12])

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """When all went well, the last process to leave removes the directory."""
        if self._merge is not None:
            if kind is None:
                (self.directory / "merged").touch()
                for path in self.directory.glob("*.safetensors"):
                    path.unlink()
            self._merge.release()
        if kind is None and self.directory is not None:
            self._leave()

    # Computing

    def map(self, count: int, compute: Compute) -> list[Part] | None:
        """All parts, in order, for the one process that merges them; None for the others.

        A process takes the first piece that is neither finished nor claimed. When there is none left, rank 0 waits for the
        others, takes over what a lost process has dropped, and merges; the other ranks leave.
        """
        with Bar(count, self._count) as bar:
            if self.directory is None:
                return [bar.show(i, compute) for i in range(count)]
            self._enter(count)
            pending = self._unfinished(count)
            while pending:
                pending = [i for i in pending if not self._finish(i, compute, bar)]
                if pending and rank() != 0:
                    return None
                if pending:
                    bar.refresh()
                    time.sleep(0.2)
        return self._collect(count) if rank() == 0 else None

    def _enter(self, count: int) -> None:
        if rank() == 0:
            if (self.directory / "merged").exists():  # left by an earlier run, one of whose processes never came
                shutil.rmtree(self.directory)
            for path in self.directory.glob("left-*"):
                path.unlink(missing_ok=True)
            if count < world():
                log.warning("%d pieces of work for %d processes: a smaller batch makes more of them", count, world())
            others = set(self.directory.parent.glob(self.directory.name.rpartition("-")[0] + "-*")) - {self.directory}
            if others:
                log.warning("%s holds finished pieces of other settings or inputs: run those again, or delete it", min(others))
        self.directory.mkdir(parents=True, exist_ok=True)

    def _leave(self) -> None:
        """Sign out: a process that comes late must still find that all was merged."""
        if not self.directory.exists():
            return
        (self.directory / f"left-{rank()}").touch()
        if (self.directory / "merged").exists() and len(list(self.directory.glob("left-*"))) >= world():
            shutil.rmtree(self.directory, ignore_errors=True)

    def _unfinished(self, count: int) -> list[int]:
        """The pieces to make; of an earlier run, those that are whole are kept."""
        kept = [i for i in range(count) if self._whole(i)]
        if kept and rank() == 0:
            log.warning("%d of %d pieces are finished already: going on with the rest", len(kept), count)
        return sorted(set(range(count)) - set(kept))

    def _whole(self, i: int) -> bool:
        try:
            with safe_open(self._path(i), "pt"):
                return True
        except FileNotFoundError:
            return False
        except SafetensorError as error:
            log.warning("%s is damaged (%s): made again", self._path(i), error)
            self._path(i).unlink(missing_ok=True)
            return False

    def _finish(self, i: int, compute: Compute, bar: "Bar") -> bool:
        """Whether piece ``i`` needs no more thought: made now, or made before; False while another process is at it."""
        if self._made(i):
            return True
        lock = FileLock(self.directory / f"{i:06d}.lock", timeout=0)
        try:
            with lock:
                if not self._made(i):
                    self._write(i, bar.show(i, compute))
        except Timeout:
            return False
        return True

    def _made(self, i: int) -> bool:
        return self._path(i).exists() or (self.directory / "merged").exists() or not self.directory.exists()

    def _write(self, i: int, part: Part) -> None:
        path = self._path(i)
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file({name: value.detach().cpu().contiguous() for name, value in part.items()}, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)

    def _path(self, i: int) -> Path:
        return self.directory / f"{i:06d}.safetensors"

    def _count(self) -> int:
        """Pieces that all processes have finished."""
        return 0 if self.directory is None else sum(1 for _ in self.directory.glob("*.safetensors"))

    # Merging

    def _collect(self, count: int) -> list[Part] | None:
        """The parts, mapped into memory; None if rank 0 of another launcher has merged them."""
        if self.directory.exists():
            self._merge = FileLock(self.directory / "merge.lock")
            self._merge.acquire()
            if all(self._path(i).exists() for i in range(count)):
                return [_load(self._path(i)) for i in range(count)]
            self._merge.release()
            self._merge = None
        return None

    def dataset(self, spec: FieldSpec, fields: da.Array, coords: Mapping[str, Sequence | np.ndarray]) -> xr.Dataset:
        """What ``spec.to_dataset`` makes of fields (..., C, H, W): read as it is written, or in memory where the parts are."""
        one = spec.to_dataset(torch.zeros(*(1 for _ in coords), *spec.shape), {k: np.asarray(v)[:1] for k, v in coords.items()})
        lead, flat = len(coords), len(spec.grid.dims) == 1
        arrays = {}
        for name, variable in one.data_vars.items():
            read, empty = partial(_values, spec, name), np.empty((0,) * variable.ndim, fields.dtype)
            values = fields.map_blocks(read, drop_axis=[lead, lead + 1] if flat else [lead], meta=empty)
            arrays[name] = (variable.dims, values, variable.attrs)
        found = {k: (k, np.asarray(v), one[k].attrs) if k in coords else v for k, v in (dict(one.coords) | dict(coords)).items()}
        result = xr.Dataset(arrays, found)
        return result.load() if self.directory is None else result


def stacked(parts: Sequence[Tensor]) -> da.Array:
    """Fields (n, T, C, H, W) of several parts, one after the other, none of them read yet."""
    arrays = []
    for part in parts:
        frames = max(1, BLOCK // (part[0, 0].numel() * part.element_size()))
        chunks = (1, min(frames, part.shape[1]), *part.shape[2:])
        if frames >= part.shape[1]:
            chunks = (min(len(part), frames // part.shape[1]), *part.shape[1:])
        arrays.append(da.from_array(_Lazy(part), chunks=chunks, name=f"part-{uuid.uuid4().hex}"))
    return da.concatenate(arrays)


class _Lazy:
    """A tensor, perhaps a mapped file, as what dask reads slices of."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.ndim = tensor, tuple(tensor.shape), tensor.ndim
        self.dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))

    def __getitem__(self, index: tuple) -> np.ndarray:
        return self.tensor[index].numpy()


def _values(spec: FieldSpec, name: str, block: np.ndarray) -> np.ndarray:
    return spec.values(torch.from_numpy(block), name)


def _load(path: Path) -> Part:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class Bar:
    """One bar over all pieces, on rank 0: those that any process has finished, and the share done of the one at hand."""

    def __init__(self, count: int, finished: Callable[[], int]):
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self.bar = tqdm(total=count, desc=f"{count} pieces", leave=False, disable=rank() != 0, bar_format=form)
        self.finished, self.own, self.looked, self.known = finished, 0, -math.inf, 0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def show(self, i: int, compute: Compute) -> Part:
        """The part of a piece, computed under the eyes of the user."""
        part = compute(i, self)
        self.own += 1
        return part

    def __call__(self, what: str, done: int, total: int) -> None:
        self.bar.set_description_str(f"{what}, {self.bar.total} pieces" if self.bar.total > 1 else what, refresh=False)
        self.refresh(done / max(total, 1))

    def refresh(self, share: float = 0.0) -> None:
        """Look again what the other processes have finished, at most once a second."""
        if self.bar.disable:
            return
        if time.monotonic() - self.looked > 1:
            self.known, self.looked = self.finished(), time.monotonic()
        self.bar.update(min(max(self.known, self.own) + share, self.bar.total) - self.bar.n)
