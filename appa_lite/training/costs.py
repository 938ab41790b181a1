"""What a training step costs before it is made: arithmetic, memory, traffic and time, from a step on tensors without content.

PyTorch's fake tensors go through the real loss, backward pass, optimiser and average; every operation tells its
floating-point operations, and every storage when it comes and when it goes. Nothing is allocated, so that a model of any
size is counted on any machine.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from appa_lite.core.errors import UserError
from appa_lite.training.base import SampleNoise, Trainable
from appa_lite.training.ema import WeightAverage
from appa_lite.training.prepare import autocast, recompute, repeated_blocks
from appa_lite.training.schedule import TrainingConfig
from appa_lite.training.strategy import optimizer, torch_update

Made = tuple[Trainable, dict[str, Tensor]]  #: what is trained, and a batch for one process

#: peak of dense bf16 and of fp32 arithmetic (floating-point operations per second, TF32 where it is the default of cuDNN is not
#: counted), bytes of memory, bytes per second between the GPUs of a node and between nodes, per GPU and direction (data sheets)
DEVICES = {
    "a100": {"bf16": 312e12, "fp32": 19.5e12, "memory": 80e9, "node": 300e9, "network": 25e9},
    "h100": {"bf16": 989e12, "fp32": 67e12, "memory": 80e9, "node": 450e9, "network": 50e9},
    "h200": {"bf16": 989e12, "fp32": 67e12, "memory": 141e9, "node": 450e9, "network": 50e9},
}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "zero2_offload", "zero3_offload")


@dataclass(frozen=True)
class StepCost:
    """One optimiser step of one process that holds everything, on ``samples`` samples.

    Args:
        parameters: their number; largest_block: that of the largest repeated part of the model (what FSDP gathers at once);
        weights, buffers, gradients, optimizer, average: bytes that stay; working: bytes at the peak beside weights, buffers,
        optimiser and average: activations, gradients and what operations need in passing; activations: at the end of the
        forward pass; forward, backward: floating-point operations.
    """

    samples: int
    parameters: int
    largest_block: int
    weights: int
    buffers: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    working: int
    forward: int
    backward: int

    @property
    def memory(self) -> int:
        """Bytes at the peak of a step on one process."""
        return self.weights + self.buffers + self.optimizer + self.average + self.working

    @property
    def operations(self) -> float:
        """Floating-point operations of the training on one sample."""
        return (self.forward + self.backward) / self.samples


def _attention(query: tuple, key: tuple, value: tuple, *rest: Any, out_shape: tuple | None = None, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: tuple, query: tuple, key: tuple, value: tuple, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def operations(work: Callable[[], Any]) -> int:
    """Floating-point operations of what ``work`` does: twice the multiply-adds of products, convolutions and attention."""
    aten = torch.ops.aten
    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        work()
    return counter.get_total_flops()


class Storages(TorchDispatchMode):
    """The bytes of the storages alive: now, and at the most since ``reset``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # an optimiser reads its count of steps: any number serves
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def reset(self) -> None:
        self.peak = self.now


def step_cost(make: Callable[[], Made], config: TrainingConfig) -> StepCost:
    """The cost of a step of what ``make`` makes, which is called where tensors have no content.

    Raises:
        UserError: the model has nothing to train.
    """
    bf16 = config.precision == "bf16" or (config.precision == "auto" and torch.cuda.is_available())
    with FakeTensorMode(), Storages() as storages:
        trainable, batch = make()
        model = trainable.model
        step = Step(trainable, batch, config, bf16)
        buffers = _bytes(model.buffers()) + _bytes(batch.values())
        weights = _bytes(model.parameters())
        step.whole()  # makes the optimiser's state
        moments = _bytes(v for state in step.optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
        average = _bytes(step.average.average.values()) * len(config.lengths)
        before = storages.now
        forward = operations(step.forward)
        activations = storages.now - before
        backward = operations(step.backward)
        gradients = _bytes(p.grad for p in model.parameters() if p.grad is not None)
        step.update()
        storages.reset()
        before = storages.now
        step.whole()
        working = storages.peak - before
        del step
    samples = len(next(iter(batch.values())))
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    block = max((sum(p.numel() for p in block.parameters()) for block in repeated_blocks(model)), default=sum(trained))
    stays = (weights, buffers, gradients, moments, average)
    return StepCost(samples, sum(trained), block, *stays, activations, working, forward, backward)


class Step:
    """A training step as the loop makes it, in its three parts."""

    def __init__(self, trainable: Trainable, batch: dict[str, Tensor], config: TrainingConfig, bf16: bool):
        self.trainable, self.batch, self.config = trainable, batch, config
        self.optimizer = optimizer(trainable.model, config)
        named = {name: p for name, p in trainable.model.named_parameters() if p.requires_grad}
        self.average = WeightAverage(named, config.lengths[0], config.ema_decay)
        self.device = next(iter(batch.values())).device
        if config.checkpoint_activations:
            recompute(repeated_blocks(trainable.model), config.checkpoint_activations)
        if bf16:
            autocast(trainable.model, self.device, cached=True)
        self.steps, self.loss = 0, None

    def forward(self) -> None:
        count = len(next(iter(self.batch.values())))
        self.loss = self.trainable.loss(self.trainable.model, self.batch, SampleNoise(0, range(count), self.device))["loss"]

    def backward(self) -> None:
        self.loss.backward()
        self.loss = None

    def update(self) -> None:
        torch_update(self.trainable.model, self.optimizer, self.config.learning_rate, self.config.clip)
        self.steps += 1
        named = dict(self.trainable.model.named_parameters())
        self.average.update(self.steps, {name: named[name].detach() for name in self.average.average})

    def whole(self) -> None:
        self.forward()
        self.backward()
        self.update()


def clock(device: torch.device) -> float:
    """Seconds: of a GPU's work when it is done, of a single thread its own time whatever else the machine does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def seconds_per_step(make: Callable[[], Made], config: TrainingConfig, repeats: int = 5) -> float:
    """The median time of a real step here, after two to warm up."""
    step = Step(*make(), config, config.precision == "bf16")
    times = []
    for _ in range(repeats + 2):
        began = clock(step.device)
        step.whole()
        times.append(clock(step.device) - began)
    return median(times[2:])


def peak_here(device: torch.device, bf16: bool, size: int = 1024) -> float:
    """Floating-point operations per second of large matrix products here, the most that a model could reach."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(5):
        began = clock(device)
        a @ a
        best = min(best, clock(device) - began)
    return 2 * size**3 / best


def memory(cost: StepCost, strategy: str, world: int) -> dict[str, float]:
    """Bytes on each of ``world`` processes under a strategy: what stays, what works, their total, and what is on the host.

    Data parallelism keeps everything everywhere, and (of several processes) the gradients once more, in the buckets that are
    reduced. ZeRO shards the optimiser's state, its master weights and the average (1), the gradients (2) and the weights
    that compute (3); FSDP2 as 3, but the master weights are the shards. Where weights are sharded two blocks are gathered at
    a time (Rajbhandari et al. 2020; Zhao et al. 2023).
    """
    if strategy not in STRATEGIES:
        raise UserError(f"unknown strategy '{strategy}': known: {', '.join(STRATEGIES)}")
    zero, share = strategy.startswith("zero"), 1 / world
    stage = int(strategy[4]) if zero else 3 if strategy == "fsdp2" else 0
    gathered = 2 * 4 * cost.largest_block if stage == 3 and world > 1 else 0
    found = {
        "weights": cost.weights * (share if stage == 3 else 1),
        "master_weights": cost.weights * share if zero else 0.0,
        "gradients": cost.gradients * (share if stage >= 2 else 1),
        "optimizer": cost.optimizer * (share if stage else 1),
        "average": cost.average * (share if stage else 1),
        "buffers": float(cost.buffers),
        "activations": float(max(cost.working - cost.gradients, cost.activations)),
        "communication": gathered or (min(cost.gradients, 2e9) if world > 1 else 0.0),
    }
    host = ("master_weights", "optimizer", "average") if "offload" in strategy else ()
    if strategy == "zero3_offload":
        host = (*host, "weights")
    device = {name: value for name, value in found.items() if name not in host}
    return device | {"total": sum(device.values()), "host": sum(found[name] for name in host)}


def traffic(cost: StepCost, strategy: str, world: int, accumulate: int = 1) -> float:
    """Bytes that each process sends per step.

    Gradients are reduced and results gathered, (N - 1)/N of their size each way; where weights are sharded they are gathered
    for each forward and each backward pass, and gradients are scattered for each part of a batch.
    """
    once = cost.gradients * (world - 1) / world
    return 3 * once * accumulate if "3" in strategy or strategy == "fsdp2" else 2 * once


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
