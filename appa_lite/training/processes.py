"""The processes of a training as the launcher made them, checked: a wrong launch otherwise trains unrelated models in silence."""

import atexit
import contextlib
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from appa_lite.core.errors import UserError

FLAGS = {"ACCELERATE_USE_DEEPSPEED": "zero", "ACCELERATE_USE_FSDP": "fsdp2", "ACCELERATE_USE_MEGATRON_LM": "megatron"}
HELP = "use a file of launch/accelerate"


@dataclass(frozen=True)
class Processes:
    """This process among ``world`` that train together on one device each.

    ``strategy`` is what the launcher was asked for: 'replicated', 'zero' or 'fsdp2'. Decisions that all must share go
    through a group of their own on the CPU, ``control``.
    """

    rank: int
    world: int
    device: torch.device
    strategy: str
    control: object = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def largest(self, values: list[float]) -> list[float]:
        """Element by element, the largest over the processes."""
        if self.control is None:
            return values
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return shared.tolist()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the processes, in float64 on the CPU."""
        if self.control is None:
            return values
        shared = values.detach().to("cpu", torch.float64, copy=True)
        dist.all_reduce(shared, group=self.control)
        return shared / self.world

    def share(self, value: Any) -> Any:
        """The main process's value, of plain types."""
        if self.control is None:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, src=0, group=self.control)
        return shared[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.control is not None:
            dist.barrier(group=self.control)


ALONE = Processes(0, 1, torch.device("cpu"), "replicated")


def join(device: str = "auto") -> Processes:
    """Joins the processes that the launcher started.

    Raises:
        UserError: fewer processes came together than the launcher was asked for, or more than there are GPUs, or the
            launcher was asked for a strategy that is not offered.
    """
    strategy = _strategy()
    cpu = device == "cpu" or not torch.cuda.is_available()
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and warns that it found none
    asked = int(os.environ.get("WORLD_SIZE", "0")) or _asked_of_the_parent()
    if "RANK" not in os.environ:
        _together(asked, 1)
        if strategy != "replicated":
            raise UserError(f"{strategy} was asked for, but no launcher started this process: {HELP}")
        return Processes(0, 1, torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device()), strategy)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and local > torch.cuda.device_count():
        raise UserError(f"{local} processes were launched for {torch.cuda.device_count()} GPUs: launch fewer, or say device=cpu")
    if strategy == "zero":
        prepare_deepspeed(cpu)
    from accelerate import PartialState

    first = not dist.is_initialized()
    state = PartialState(cpu=cpu)
    if first and dist.is_initialized():
        atexit.register(_leave)
    _together(asked, state.num_processes)
    control = dist.new_group(backend="gloo") if state.num_processes > 1 else None
    return Processes(state.process_index, state.num_processes, state.device, strategy, control)


def prepare_deepspeed(cpu: bool) -> object:
    """The module deepspeed, told on a CPU not to compile its shared-memory collectives (they need g++ and minutes; gloo serves)."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import deepspeed
    except ImportError as error:
        raise UserError(
            f"ZeRO needs DeepSpeed ({error}): pip install 'appa-lite[deepspeed]', or use launch/accelerate/fsdp2.yaml"
        ) from error
    if cpu:
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    return deepspeed


def _strategy() -> str:
    """What the launcher announced in the environment."""
    found = [name for flag, name in FLAGS.items() if os.environ.get(flag, "false").lower() in ("1", "true")]
    if len(found) > 1 or "megatron" in found:
        raise UserError(f"the launcher asks for {' and '.join(found)}, offered are DDP, ZeRO and FSDP2: {HELP}")
    if found == ["fsdp2"] and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launcher asks for FSDP version 1: say fsdp_version: 2, as launch/accelerate/fsdp2.yaml does")
    return found[0] if found else "replicated"


def _asked_of_the_parent() -> int:
    """How many processes `accelerate launch` was asked for when it started this one alone: it forks several CPU processes
    only through mpirun, and says nothing."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return 1
    import psutil
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        words = psutil.Process().parent().cmdline()
        place = next(
            i for i, word in enumerate(words) if word == "launch" or word.endswith("commands.launch") or "accelerate-launch" in word
        )
        arguments = launch_command_parser().parse_args(words[place + 1 :])
    except (psutil.Error, StopIteration, AttributeError):
        return 1
    if arguments.num_processes is None and arguments.config_file is not None:
        return load_config_from_file(arguments.config_file).num_processes
    return arguments.num_processes or 1


def _together(asked: int, found: int) -> None:
    if asked != found:
        raise UserError(f"{asked} processes were launched but {found} train together: {HELP}, such as cpu2.yaml or multi_gpu.yaml")


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
