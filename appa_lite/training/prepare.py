"""What is done to a model while it is trained, and undone afterwards: mixed precision, recomputed activations, compilation."""

from functools import partial

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of the classes that the model declares in ``_repeated_blocks`` (a word of diffusers): units of sharding, of
    compilation and of recomputation. Empty for a model that declares none."""
    names = getattr(model, "_repeated_blocks", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def autocast(model: nn.Module, device: torch.device, cached: bool) -> None:
    """Forward passes compute in bfloat16 what gains from it, on float32 weights, and return float32.

    ``cached``: the bfloat16 weights are kept through the pass; a strategy that frees its weights must not.
    """
    forward = model.forward

    def lower(*args: object, **keywords: object) -> object:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=cached):
            return forward(*args, **keywords)

    model.forward = convert_outputs_to_fp32(lower)


def recompute(blocks: list[nn.Module], every: int) -> None:
    """Every n-th block keeps no activations but its inputs, and computes them again in the backward pass (Chen et al. 2016)."""
    for block in blocks[::every]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def restore(model: nn.Module) -> None:
    """The plain model again."""
    for module in model.modules():
        vars(module).pop("forward", None)
        module._compiled_call_impl = None
