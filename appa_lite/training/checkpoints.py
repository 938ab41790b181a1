"""Checkpoints: one format for every strategy and any number of processes, complete or absent.

Whatever the strategy, a process holds of every tensor a contiguous range of its flattening (a `Piece`). Each writes its
pieces to a safetensors file of its own while the training goes on; a JSON file with the size and digest of each file
makes the checkpoint complete. Any other number of processes, under any other strategy, reads the ranges it holds.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.training.processes import ALONE, Processes

logger = logging.getLogger(__name__)
STATE = "state.json"


@dataclass(frozen=True)
class Piece:
    """The elements [start, start + values.numel()) of the row-major flattening of a tensor of some shape.

    ``values`` is the living tensor; ``replicated`` says that every process holds the whole, so that each writes a share.
    """

    values: Tensor
    shape: tuple[int, ...]
    start: int = 0
    replicated: bool = False

    @classmethod
    def whole(cls, values: Tensor) -> "Piece":
        return cls(values, tuple(values.shape), 0, True)

    def share(self, rank: int, world: int) -> tuple[int, Tensor]:
        """What this process writes: where it starts, and its elements."""
        flat = self.values.detach().reshape(-1)
        if not self.replicated:
            return self.start, flat
        low, high = (flat.numel() * r // world for r in (rank, rank + 1))
        return low, flat[low:high]


class Writer:
    """Writes checkpoints in the background, one at a time: ``directory/step_XXXXXXX``, of which the last ``keep`` stay."""

    def __init__(self, directory: Path, keep: int = 3, processes: Processes = ALONE):
        self.directory, self.keep, self.processes = directory, keep, processes
        self.rank, self.world = processes.rank, processes.world
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.cancelled = threading.Event()

    def start(self, step: int, pieces: dict[str, Piece], state: dict) -> None:
        """Copies the pieces to the memory of the CPU, and leaves the rest to a thread."""
        copies = {}
        for key, piece in pieces.items():
            start, values = piece.share(self.rank, self.world)
            if values.numel():
                copies[f"{key}@{start}"] = values.to("cpu", copy=True)
        shapes = {key: list(piece.shape) for key, piece in pieces.items()}
        self.thread = threading.Thread(target=self._run, args=(step, copies, {**state, "step": step, "shapes": shapes}))
        self.thread.start()

    def settle(self) -> None:
        """All processes together, until the checkpoint is complete.

        Raises:
            UserError: a file could not be written (a full disk).
        """
        if self.rank:
            self._join()
        failed = self.processes.largest([float(self.error is not None)])[0]
        self.cancel() if failed else self._join()
        self.check(self.processes.largest([float(self.error is not None)])[0])

    def check(self, failed: float) -> None:
        """Raises the error of this process's file, or speaks of another's that ``failed``."""
        if not failed:
            return
        where = f"cannot write a checkpoint in {self.directory} ({self.error or 'another process failed'})"
        raise UserError(f"{where}: make room, then run the same command to go on") from self.error

    def cancel(self) -> None:
        """Without the others: ends this process's part, and gives up on a checkpoint that the others do not complete."""
        if self.world > 1:
            self.cancelled.set()
        self._join()

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _run(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        partial = self.directory / f".step_{step:07d}.partial"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            path = partial / f"part_{self.rank:05d}.safetensors"
            save_file(tensors, path)
            note = path.with_suffix(".json.partial")
            note.write_text(json.dumps({"bytes": path.stat().st_size, "sha256": _digest(path)}))
            os.replace(note, path.with_suffix(".json"))
            if self.rank == 0:
                self._complete(partial, state)
        except (OSError, SafetensorError) as error:
            self.error = error
            shutil.rmtree(partial, ignore_errors=True)

    def _complete(self, partial: Path, state: dict) -> None:
        """When all files are there, their sizes and digests go into the state, and the directory gets its name."""
        notes = [partial / f"part_{rank:05d}.json" for rank in range(self.world)]
        while not all(note.exists() for note in notes):
            if self.cancelled.wait(0.02):
                return
        parts = {note.with_suffix(".safetensors").name: json.loads(note.read_text()) for note in notes}
        (partial / STATE).write_text(json.dumps({**state, "parts": parts}))
        for note in notes:
            note.unlink()
        final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in sorted(self.directory.glob("step_*"))[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)


class Saved:
    """A checkpoint that was found whole; `state` is what was saved with it."""

    def __init__(self, path: Path):
        self.path = path
        self.state = json.loads((path / STATE).read_text())
        self.shapes = {key: tuple(shape) for key, shape in self.state["shapes"].items()}
        self.places: dict[str, list[tuple[int, str, object]]] = {}

    def verify(self, rank: int = 0, world: int = 1) -> None:
        """
        Raises:
            ValueError, OSError: a file is missing, or not as it was written. Each process looks at its share of the files.
        """
        for name, expected in self.state["parts"].items():
            if (self.path / name).stat().st_size != expected["bytes"]:
                raise ValueError(f"{name} has another size than was written")
        for name, expected in list(self.state["parts"].items())[rank::world]:
            if _digest(self.path / name) != expected["sha256"]:
                raise ValueError(f"{name} is damaged")

    def read(self, key: str, start: int = 0, count: int | None = None) -> Tensor:
        """The elements [start, start + count) of a tensor's flattening."""
        stop = math.prod(self.shapes[key]) if count is None else start + count
        parts, reached = [], start
        for low, name, file in self._places()[key]:
            piece = file.get_slice(name)
            high = low + piece.get_shape()[0]
            if low <= reached < min(high, stop):
                parts.append(piece[reached - low : min(high, stop) - low])
                reached = min(high, stop)
        if reached < stop:
            raise KeyError(f"{key} lacks its elements {reached} to {stop}")
        return torch.cat(parts) if parts else torch.zeros(0)

    @torch.no_grad()
    def fill(self, pieces: dict[str, Piece]) -> None:
        """Reads what the pieces hold, in place.

        Raises:
            KeyError: a tensor is not there; ValueError: it has another shape.
        """
        for key, piece in pieces.items():
            if self.shapes[key] != piece.shape:
                raise ValueError(f"{key} has shape {piece.shape}, saved was {self.shapes[key]}")
            if piece.values.numel():
                piece.values.copy_(self.read(key, piece.start, piece.values.numel()).reshape(piece.values.shape))

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Whole tensors by name, of one kind: 'weights', 'average', 'optimizer' or 'buffers'."""
        keys = [key for key in self.shapes if key.startswith(f"{kind}/")]
        return {key.split("/", 1)[1]: self.read(key).reshape(self.shapes[key]) for key in keys}

    def _places(self) -> dict[str, list[tuple[int, str, object]]]:
        if not self.places:
            for part in self.state["parts"]:
                file = safe_open(self.path / part, framework="pt")
                for name in file.keys():  # noqa: SIM118
                    key, start = name.rsplit("@", 1)
                    self.places.setdefault(key, []).append((int(start), name, file))
            for places in self.places.values():
                places.sort(key=lambda place: place[0])
        return self.places


def find_last(directory: Path, processes: Processes = ALONE) -> Saved | None:
    """The last whole checkpoint of a run, for all processes together; what is torn or damaged is skipped with a warning."""
    names = [path.name for path in sorted(directory.glob("step_*"), reverse=True)]
    for path in (directory / name for name in processes.share(names)):
        problem, saved = None, None
        try:
            saved = Saved(path)
            saved.verify(processes.rank, processes.world)
        except (OSError, ValueError, KeyError) as error:
            problem = error
            logger.warning("checkpoint %s is incomplete (%s): it is skipped", path, error)
        if not processes.largest([float(problem is not None)])[0]:
            return saved
    return None


def clean(directory: Path) -> None:
    """Removes what killed writers left."""
    for path in directory.glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
