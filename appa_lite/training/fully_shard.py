"""Weights, gradients and the optimiser's state sharded by PyTorch's own fully_shard (FSDP2; Zhao et al. 2023, arXiv:2304.11277)."""

import os

import torch
from torch import Tensor, nn
from torch import distributed as dist

from appa_lite.core.errors import UserError
from appa_lite.training.checkpoints import Piece
from appa_lite.training.muon import Range
from appa_lite.training.processes import Processes
from appa_lite.training.schedule import TrainingConfig
from appa_lite.training.strategy import Skeleton, Strategy, make_torch_moments, optimizer, torch_update


class FullyShard(Strategy):
    """Every process holds some rows of every parameter; the rest is gathered one block at a time, and freed.

    Blocks are the modules of the classes that the model declares in ``_repeated_blocks`` (a word of diffusers), and the model itself.
    """

    name = "fsdp2"

    def __init__(self, module: nn.Module, config: TrainingConfig, processes: Processes, blocks: list[nn.Module]):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        scalars = [name for name, p in module.named_parameters() if p.ndim == 0]
        if scalars:
            raise UserError(f"FSDP2 cannot shard the scalar parameters {', '.join(scalars)}: launch multi_gpu.yaml or zero2.yaml")
        self.module, self.config, self.processes = module, config, processes
        self.skeleton = Skeleton(module)
        for tensor in (*module.parameters(), *module.buffers()):
            if processes.world > 1:
                dist.broadcast(tensor.detach(), src=0)
        offload = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true" and processes.device.type == "cuda"
        options = {
            "mesh": init_device_mesh(processes.device.type, (processes.world,)),
            "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
            "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        }
        for block in blocks:
            fully_shard(block, **options)
        self.model = fully_shard(module, **options)
        self.parameters = dict(module.named_parameters())
        self.optimizer = optimizer(module, config, _ranges, processes.device)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.config.accumulate).backward()

    def update(self, rate: float) -> Tensor | None:
        norm = torch_update(self.module, self.optimizer, rate, self.config.clip)
        return None if norm is None else norm.full_tensor()

    def weights(self) -> dict[str, Piece]:
        return {name: _piece(p, p) for name, p in self.parameters.items()}

    def moments(self) -> dict[str, Piece]:
        states = {name: (p, self.optimizer.state[p]) for name, p in self.parameters.items() if p in self.optimizer.state}
        return {
            f"{name}/{key}": Piece.whole(value) if value.ndim == 0 else _piece(p, value)
            for name, (p, state) in states.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def make_moments(self, names: set[str]) -> None:
        make_torch_moments(self.module, self.optimizer, names)

    @torch.no_grad()
    def install(self, weights: dict[str, Tensor]) -> None:
        for name, values in weights.items():
            self.parameters[name].to_local().copy_(values)

    def plain(self, weights: dict[str, Tensor]) -> nn.Module | None:
        return self.skeleton.filled(self, weights)


def _piece(parameter: Tensor, values: Tensor) -> Piece:
    """The rows that this process holds: torch.chunk of the first dimension."""
    rows, row = parameter.shape[0], parameter.shape[1:].numel()
    world, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    first = min(rows, rank * -(-rows // world))
    return Piece(values.detach().to_local(), tuple(parameter.shape), first * row)


def _ranges(parameter: Tensor) -> list[Range]:
    """The same, for an optimiser that needs whole matrices."""
    piece = _piece(parameter, parameter)
    return [Range(piece.shape, piece.start, 0, piece.values.numel())]
