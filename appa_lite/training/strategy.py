"""How a model, its gradients and its optimiser's state are spread over the processes; and the strategy that replicates them."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist

from appa_lite.core.errors import UserError
from appa_lite.training.checkpoints import Piece
from appa_lite.training.muon import Range, ShardedMuon
from appa_lite.training.processes import Processes
from appa_lite.training.schedule import TrainingConfig


class Strategy(ABC):
    """A model prepared for training; one step is ``backward`` for each part of the batch, then ``update``.

    ``model`` is what the loss calls; the module that was given computes with the same weights, when all processes call it.
    The master weights and the optimiser's state that this process holds are `Piece`s, named as in the module.
    """

    name: str
    model: nn.Module
    module: nn.Module
    processes: Processes
    replicated = False

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of one part of the batch; ``last``: of its last part."""

    @abstractmethod
    def update(self, rate: float) -> Tensor | float | None:
        """Clips the gradients and takes a step with this learning rate; returns the norm of the gradients, if it was computed."""

    @abstractmethod
    def weights(self) -> dict[str, Piece]:
        """The master weights, trained or not."""

    @abstractmethod
    def moments(self) -> dict[str, Piece]:
        """The optimiser's state, named 'parameter/quantity'; empty before the first step."""

    @abstractmethod
    def make_moments(self, names: set[str]) -> None:
        """Makes what `moments` returns, for these names or all that go with them, to be filled from a checkpoint."""

    @abstractmethod
    def install(self, weights: dict[str, Tensor]) -> None:
        """Makes the forward pass compute with these values of the pieces of `weights`; the master weights need not change."""

    @abstractmethod
    def plain(self, weights: dict[str, Tensor]) -> nn.Module | None:
        """The module with these weights, as if it had been trained on one process; None but on the main process."""

    def reducing(self, last: bool) -> object:
        """A context for the passes of one part of a batch, which may leave the reduction of gradients to the last part."""
        return nullcontext()

    def close(self) -> None:  # noqa: B027
        """Frees what the module's own end would not."""

    def check(self) -> None:
        """
        Raises:
            RuntimeError: the pieces of all processes are not the whole, once (or on each): nothing is sharded as was asked.
        """
        pieces = [piece for piece in self.weights().values() if not piece.replicated]
        held = torch.tensor(float(sum(piece.values.numel() for piece in pieces)))
        whole = sum(torch.Size(piece.shape).numel() for piece in pieces)
        together = round(float(self.processes.mean(held)) * self.processes.world)
        if together != whole or (not pieces) != self.replicated:
            raise RuntimeError(f"{self.name}: the processes hold {together} weights of a model of {whole}")

    def buffers(self) -> dict[str, Piece]:
        """What the module saves that is no parameter; every process has it."""
        kept = self.module.state_dict().keys()
        return {name: Piece.whole(value) for name, value in self.module.named_buffers() if name in kept}

    @contextmanager
    def holding(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Within the context the forward pass computes with these values of the trained weights."""
        kept = {name: piece.values.detach().clone() for name, piece in self.weights().items() if name in weights}
        self.install(weights)
        try:
            yield
        finally:
            self.install(kept)

    def gather(self, piece: Piece) -> Tensor:
        """The whole of a tensor, from the pieces of all processes, which call this together."""
        if piece.replicated:
            return piece.values.detach()
        whole = torch.zeros(torch.Size(piece.shape).numel(), dtype=piece.values.dtype, device=self.processes.device)
        whole[piece.start : piece.start + piece.values.numel()] = piece.values.detach().reshape(-1).to(whole.device)
        if self.processes.world > 1:
            dist.all_reduce(whole)  # the pieces are disjoint: nothing is rounded
        return whole.reshape(piece.shape)


class Replicated(Strategy):
    """Every process holds everything, and gradients are averaged (PyTorch's DistributedDataParallel)."""

    replicated = True

    def __init__(self, module: nn.Module, config: TrainingConfig, processes: Processes):
        self.module, self.config, self.processes = module, config, processes
        self.name = "ddp" if processes.world > 1 else "one process"
        self.optimizer = optimizer(module, config)
        self.model = module
        if processes.world > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def reducing(self, last: bool) -> object:
        return nullcontext() if last or self.processes.world == 1 else self.model.no_sync()

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.config.accumulate).backward()

    def update(self, rate: float) -> Tensor | None:
        return torch_update(self.module, self.optimizer, rate, self.config.clip)

    def weights(self) -> dict[str, Piece]:
        return {name: Piece.whole(p.detach()) for name, p in self.module.named_parameters()}

    def moments(self) -> dict[str, Piece]:
        named = {f"{name}/{key}": value for name, p in self.module.named_parameters() for key, value in self.optimizer.state[p].items()}
        return {name: Piece.whole(value) for name, value in named.items() if isinstance(value, Tensor)}

    def make_moments(self, names: set[str]) -> None:
        make_torch_moments(self.module, self.optimizer, names)

    @torch.no_grad()
    def install(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.module.named_parameters():
            if name in weights:
                p.copy_(weights[name])

    def plain(self, weights: dict[str, Tensor]) -> nn.Module:
        self.install(weights)
        return self.module


class Skeleton:
    """A copy of a module without its parameters, to be filled with the gathered ones: what sharding does to a module cannot
    be undone, and a second copy of the weights would cost the memory that sharding saves."""

    def __init__(self, module: nn.Module):
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
        self.module = copy.deepcopy(module, empty)

    def filled(self, strategy: Strategy, weights: dict[str, Tensor]) -> nn.Module | None:
        """The module on the CPU with ``weights``, and else with the weights and buffers of the strategy; None but on the main process."""
        tensors = {}
        for name, piece in strategy.weights().items():
            piece = Piece(weights.get(name, piece.values), piece.shape, piece.start, piece.replicated)
            whole = strategy.gather(piece)
            if strategy.processes.main:
                tensors[name] = whole.to("cpu", copy=True)
        if not strategy.processes.main:
            return None
        tensors |= {name: piece.values.to("cpu", copy=True) for name, piece in strategy.buffers().items()}
        self.module.load_state_dict(tensors, assign=True)
        return self.module.cpu()


def optimizer(
    module: nn.Module, config: TrainingConfig, ranges: Callable[[Tensor], Sequence[Range]] | None = None, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """AdamW or Muon, with weight decay on matrices and kernels only; Muon leaves to AdamW what is no layer's weight.

    ``ranges``: which elements of matrices a tensor holds, where they are sharded, to be brought together on ``device``.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise UserError("the model has no parameters to train")
    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "betas": tuple(config.betas)}
    vectors = {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0}
    if config.optimizer == "muon":
        from timm.optim import Muon

        layers = {"params": [p for name, p in named if p.ndim >= 2 and name.endswith("weight")], "use_muon": True}
        others = {"params": [p for name, p in named if p.ndim >= 2 and not name.endswith("weight")], "use_muon": False}
        muon_groups = [g for g in (layers, others, vectors | {"use_muon": False}) if g["params"]]
        options = common | {"nesterov": True}
        return Muon(muon_groups, **options) if ranges is None else ShardedMuon(muon_groups, options, ranges, device)
    groups = [g for g in ({"params": [p for _, p in named if p.ndim >= 2]}, vectors) if g["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for _, p in named)
    return torch.optim.AdamW(groups, fused=fused, **common)


def torch_update(module: nn.Module, optimizer: torch.optim.Optimizer, rate: float, clip: float | None) -> Tensor | None:
    """A step of a torch optimiser, after clipping."""
    norm = None
    if clip is not None:
        norm = nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def make_torch_moments(module: nn.Module, optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Fresh state of a torch optimiser for the quantities 'parameter/quantity' in ``names``, of the kind it would make itself."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    place = {id(p): i for i, p in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, p in module.named_parameters():
        keys = [n.removeprefix(f"{name}/") for n in names if n.startswith(f"{name}/")]
        if keys and id(p) in place:
            state[place[id(p)]] = {key: torch.tensor(0.0) if key == "step" else torch.zeros_like(p) for key in keys}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
