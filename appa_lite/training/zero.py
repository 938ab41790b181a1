"""The optimiser's state, gradients and weights sharded by DeepSpeed (ZeRO; Rajbhandari et al. 2020, arXiv:1910.02054)."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from appa_lite.core.errors import UserError
from appa_lite.training.checkpoints import Piece
from appa_lite.training.muon import Range
from appa_lite.training.processes import Processes, prepare_deepspeed
from appa_lite.training.schedule import TrainingConfig
from appa_lite.training.strategy import Skeleton, Strategy, optimizer


class Zero(Strategy):
    """ZeRO: stage 1 shards the optimiser's state and the master weights, 2 also the gradients, 3 also the weights.

    The master weights of a group of parameters (a subgroup, under stage 3) are one flat tensor on each process, of which
    every parameter has a contiguous part.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, processes: Processes):
        wide = [name for name, p in module.named_parameters() if p.dtype != torch.float32]
        if wide:
            raise UserError(f"ZeRO trains float32 parameters, {wide[0]} is {module.get_parameter(wide[0]).dtype}: launch multi_gpu.yaml")
        deepspeed = prepare_deepspeed(processes.device.type == "cpu")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.module, self.config, self.processes = module, config, processes
        self.skeleton = Skeleton(module)
        settings = _settings(config, processes.world)
        self.stage = settings["zero_optimization"]["stage"]
        self.name = f"zero{self.stage}"
        made = optimizer(module, config, self._ranges, processes.device)
        self.model, *_ = deepspeed.initialize(model=module, optimizer=made, config=settings, dist_init_required=False)
        self.sharded = self.model.optimizer
        self.torch = self.sharded.optimizer
        self.names = {id(p): name for name, p in module.named_parameters()}

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.backward(loss)  # divides by the parts itself
        if not last:
            self.model.step()  # only counts the part

    def update(self, rate: float) -> float | None:
        for group in self.torch.param_groups:
            group["lr"] = rate
        self.model.step()
        return self.model.get_global_grad_norm() if self.config.clip is not None else None

    def _parts(self) -> Iterator[tuple[str, nn.Parameter, Tensor, int, int, int]]:
        """Of every trained parameter: name, parameter, the flat tensor, where its part starts there, its length, and where it
        starts in the parameter."""
        for i, group in enumerate(self.sharded.bit16_groups if self.stage < 3 else ()):
            for p in group:
                found = p._hp_mapping
                place = (found.hp_fragment_address.start, found.hp_fragment_address.numel) if found else (0, 0)
                start = found.lp_fragment_address.start if found else 0
                yield self.names[id(p)], p, self.sharded.single_partition_of_fp32_groups[i], *place, start
        for name, p in self.module.named_parameters() if self.stage == 3 else ():
            if p.requires_grad:
                i, offset, _ = self.sharded.grad_position[self.sharded.get_param_id(p)]
                start, count = self._range(p)
                yield name, p, self.sharded.fp32_partitioned_groups_flat[i], offset, count, start

    def _range(self, p: nn.Parameter) -> tuple[int, int]:
        """Start and length of this process's part of a parameter, without the padding at the end (stage 3)."""
        start = min(p.ds_numel, self.processes.rank * p.ds_tensor.ds_numel)
        return start, min(p.ds_tensor.ds_numel, p.ds_numel - start)

    def _ranges(self, tensor: Tensor) -> list[Range]:
        return [Range(_shape(p), start, offset, count) for _, p, flat, offset, count, start in self._parts() if flat is tensor]

    def weights(self) -> dict[str, Piece]:
        pieces = {}
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                continue
            if self.stage == 3:
                start, count = self._range(p)
                pieces[name] = Piece(p.ds_tensor.detach()[:count], tuple(p.ds_shape), start)
            else:
                pieces[name] = Piece.whole(p.detach())
        for name, p, flat, offset, count, start in self._parts():
            pieces[name] = Piece(flat.detach()[offset : offset + count], _shape(p), start)
        return pieces

    def moments(self) -> dict[str, Piece]:
        pieces = {}
        for name, p, flat, offset, count, start in self._parts():
            for key, value in self.torch.state.get(flat, {}).items():
                if not isinstance(value, Tensor):
                    continue
                whole = value.ndim == 0
                pieces[f"{name}/{key}"] = Piece.whole(value) if whole else Piece(value[offset : offset + count], _shape(p), start)
        return pieces

    def make_moments(self, names: set[str]) -> None:
        fused = any(group.get("fused") for group in self.torch.param_groups)
        for name, _, flat, *_ in self._parts():
            keys = {other.rsplit("/", 1)[1] for other in names if other.rsplit("/", 1)[0] == name}
            scalar = torch.zeros((), device=flat.device if fused else "cpu")
            self.torch.state[flat] = {key: scalar if key == "step" else torch.zeros_like(flat.detach()) for key in sorted(keys)}

    @torch.no_grad()
    def install(self, weights: dict[str, Tensor]) -> None:
        if self.stage == 3:
            self.sharded.checkpoint_event_prologue()  # frees what is still gathered with the values of before
        for name, p, _, _, count, start in self._parts():
            if name not in weights:
                continue
            if self.stage == 3:
                p.ds_tensor[:count].copy_(weights[name])
            else:
                p.data.copy_(self.gather(Piece(weights[name], tuple(p.shape), start)))
        if self.stage == 3:
            self.sharded.checkpoint_event_epilogue()  # gathers again the small ones that DeepSpeed keeps

    def plain(self, weights: dict[str, Tensor]) -> nn.Module | None:
        return self.skeleton.filled(self, weights)

    def close(self) -> None:
        self.model.destroy()


def _shape(p: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))


def _settings(config: TrainingConfig, world: int) -> dict:
    """The launcher's file, with what the training decides: batch, accumulation, clipping."""
    path = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""))
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the DeepSpeed settings '{path}' ({error}): launch from where that path leads to a file") from error
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(f"ZeRO stage {stage} of '{path}' shards nothing: say 1, 2 or 3, or launch multi_gpu.yaml")
    if any(settings.get(name, {}).get("enabled", False) not in (False, "auto") for name in ("fp16", "bf16", "torch_autocast", "amp")):
        raise UserError(f"'{path}' chooses a precision: leave that to training.precision")
    ours = {
        "train_micro_batch_size_per_gpu": config.batch // (world * config.accumulate),
        "gradient_accumulation_steps": config.accumulate,
        "train_batch_size": config.batch,
        "gradient_clipping": config.clip or 0.0,
    }
    for key, value in ours.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise UserError(f"{key}={settings[key]} in '{path}' contradicts the training's {value}: say \"auto\" there")
    chosen = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    for name in ("fp16", "bf16", "torch_autocast", "amp"):
        settings.pop(name, None)
    return settings | ours | chosen
