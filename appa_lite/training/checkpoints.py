"""Checkpoints: safetensors and JSON, complete or absent."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from appa_lite.core.errors import UserError

logger = logging.getLogger(__name__)
STATE = "state.json"


def save(directory: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int = 3) -> Path:
    """Writes ``directory/step_XXXXXXX`` with one safetensors file per entry of ``tensors``, then removes all but the last ``keep``.

    The files are written beside their final place, which they take by a rename; ``state`` gains the digest of each.

    Raises:
        UserError: they cannot be written (a full disk).
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step_{step:07d}"
    partial = directory / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    digests = {}
    try:
        for name, entries in tensors.items():
            path = partial / f"{name}.safetensors"
            save_file({k: v.detach().to("cpu").contiguous() for k, v in entries.items()}, path)
            digests[path.name] = _digest(path)
        (partial / STATE).write_text(json.dumps({**state, "step": step, "digests": digests}, indent=1))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {final} ({error}): make room, then run the same command to go on") from error
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in sorted(directory.glob("step_*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_last(directory: Path, device: torch.device | str = "cpu") -> tuple[dict[str, dict[str, Tensor]], dict] | None:
    """The tensors and the state of the last complete checkpoint; None where there is none."""
    for path in sorted(directory.glob("step_*"), reverse=True):
        try:
            state = json.loads((path / STATE).read_text())
            for name, digest in state["digests"].items():
                if _digest(path / name) != digest:
                    raise ValueError(f"{name} is damaged")
            tensors = {Path(name).stem: load_file(path / name, device=str(device)) for name in state["digests"]}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.warning("checkpoint %s is incomplete (%s): it is skipped", path, error)
            continue
        return tensors, state
    return None


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by name, 'parameter.quantity'; flags (Muon's choice of algorithm) follow from its groups."""
    entries = optimizer.state_dict()["state"]
    values = ((f"{i}.{key}", value) for i, quantities in entries.items() for key, value in quantities.items())
    return {name: torch.as_tensor(value) for name, value in values if not isinstance(value, bool)}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `flatten_optimizer`; learning rates and the like stay as configured."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        i, key = name.split(".", 1)
        state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
