"""The device that a command computes on."""

import os

import torch

from appa_lite.core.errors import UserError


def device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the GPU if there is one, for each of a launcher's processes its own."""
    if name == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} is not there: expected auto, cpu or cuda") from error
