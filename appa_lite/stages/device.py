"""The device that a command computes on."""

import torch

from appa_lite.core.errors import UserError


def device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} is not there: expected auto, cpu or cuda") from error
