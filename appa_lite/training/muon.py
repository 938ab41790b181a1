"""Muon where every process holds a part of each matrix: the parts of a matrix meet on one process, which orthogonalises it.

Muon follows the momentum's nearest orthogonal matrix, found by Newton-Schulz iterations (Jordan et al. 2024; scaled to the size
of AdamW's steps as in Liu et al. 2025, arXiv:2502.16982). Momentum and weights stay where they are. One exchange brings the
parts of matrix k to its process, another takes the parts of its step back (the distributed Muon of Liu et al., section 2.3, with
the matrices dealt out by their cost), so that no process holds more than its share of the matrices, nor computes more. The steps
are those of one process, to the last bit of the same gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from timm.optim import Muon
from timm.optim.muon import _COEFFICIENTS, get_lr_scale, resolve_ns_coefficients, zeropower_via_newtonschulz
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Range:
    """Elements [offset, offset + count) of a tensor that is optimised are [start, start + count) of a matrix of this shape."""

    shape: tuple[int, ...]
    start: int
    offset: int
    count: int


class ShardedMuon(Muon):
    """timm's Muon for tensors of which the groups with ``use_muon`` hold parts of matrices.

    Args:
        groups: as of a torch optimiser, with ``use_muon`` in each; options: of timm's Muon.
        ranges: what such a tensor holds, the same matrices in the same order on all processes, which step together.
        device: where matrices are exchanged and orthogonalised.
    """

    def __init__(self, groups: Iterable[dict], options: dict, ranges: Callable[[Tensor], Sequence[Range]], device: torch.device):
        super().__init__(groups, **options)
        self.ranges, self.device = ranges, device
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self._deals: dict[tuple[int, ...], _Deal] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        for group in groups:
            if group["use_muon"]:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group["use_muon"]]
        super().step()
        self.param_groups = groups

    def _step_matrices(self, group: dict) -> None:
        tensors = [p for p in group["params"] if p.grad is not None]
        if not tensors:
            return
        key = tuple(id(p) for p in tensors)
        if key not in self._deals:
            self._deals[key] = _Deal([r for p in tensors for r in self.ranges(p)], self.world, self.device)
        updates, values = [], []
        for p in tensors:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            own, momentum, gradient = (_flat(t) for t in (p, state["momentum_buffer"], p.grad))
            own.mul_(1 - group["lr"] * group["weight_decay"])
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            for part in self.ranges(p):
                updates.append(update[part.offset : part.offset + part.count])
                values.append(own[part.offset : part.offset + part.count])
        steps = self._deals[key].apply(lambda matrix: _orthogonalised(matrix, group), updates)
        for k, (value, step) in enumerate(zip(values, steps, strict=True)):
            value.add_(step.to(value.device), alpha=-group["lr"] * self._deals[key].scale(k, group))


class _Deal:
    """Which process each matrix goes to, and how its parts travel.

    Args:
        parts: what this process holds of each matrix; world: processes; device: that of the exchange.
    """

    def __init__(self, parts: Sequence[Range], world: int, device: torch.device):
        self.shapes, self.device, self.world = [part.shape for part in parts], device, world
        own = torch.tensor([[part.start, part.count] for part in parts], device=device).reshape(-1, 2)
        places = [own]
        if world > 1:
            places = [torch.empty_like(own) for _ in range(world)]
            dist.all_gather(places, own)
        self.places = [place.tolist() for place in places]  # of every process: start and count of its part of every matrix
        self.rank = dist.get_rank() if world > 1 else 0
        self.owners = self._dealt()

    def _dealt(self) -> list[int]:
        """The owner of each matrix: the dearest first, to the process with the least work."""
        cost = [min(m, n) ** 2 * max(m, n) for m, n in (_matrix(shape) for shape in self.shapes)]
        load, owners = [0] * self.world, [0] * len(cost)
        for k in sorted(range(len(cost)), key=lambda k: -cost[k]):
            owners[k] = load.index(min(load))
            load[owners[k]] += cost[k]
        return owners

    def scale(self, k: int, group: dict) -> float:
        """The factor of the learning rate that makes steps as large as AdamW's, by the shape of the matrix."""
        return get_lr_scale(torch.Size(_matrix(self.shapes[k])), group["adjust_lr_fn"])

    def apply(self, function: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of function(matrix) for every matrix, from its parts of the matrices."""
        order = sorted(range(len(parts)), key=lambda k: self.owners[k])  # as they are sent, and come back
        mine = [k for k in order if self.owners[k] == self.rank]
        sent = [sum(self.places[self.rank][k][1] for k in order if self.owners[k] == r) for r in range(self.world)]
        come = [sum(self.places[r][k][1] for k in mine) for r in range(self.world)]
        arrived = self._exchange(torch.cat([parts[k].to(self.device) for k in order]), come, sent)
        pieces = iter(arrived.split([self.places[r][k][1] for r in range(self.world) for k in mine]))
        whole = {k: arrived.new_zeros(torch.Size(self.shapes[k]).numel()) for k in mine}
        for r in range(self.world):
            for k in mine:
                start, count = self.places[r][k]
                whole[k][start : start + count] = next(pieces)
        done = {k: function(whole.pop(k).reshape(_matrix(self.shapes[k]))).reshape(-1) for k in mine}
        answers = [done[k][self.places[r][k][0] :][: self.places[r][k][1]] for r in range(self.world) for k in mine]
        answer = torch.cat(answers) if answers else torch.zeros(0, dtype=torch.bfloat16, device=self.device)
        back = self._exchange(answer, sent, come).split([self.places[self.rank][k][1] for k in order])
        return [step for _, step in sorted(zip(order, back, strict=True), key=lambda pair: pair[0])]

    def _exchange(self, values: Tensor, received: list[int], sent: list[int]) -> Tensor:
        """What all processes have for this one, one after the other."""
        if self.world == 1:
            return values
        out = values.new_empty(sum(received))
        dist.all_to_all_single(out, values, received, sent)
        return out


def _orthogonalised(matrix: Tensor, group: dict) -> Tensor:
    """The nearest orthogonal matrix, nearly, in bfloat16."""
    coefficients = resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS)
    return zeropower_via_newtonschulz(matrix, group["ns_steps"], coefficients, group["eps"], group["safety_factor"])


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a kernel: outputs, and all that each of them sums over."""
    return shape[0], torch.Size(shape[1:]).numel()


def _flat(tensor: Tensor) -> Tensor:
    """This process's elements, as one row."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().view(-1)
