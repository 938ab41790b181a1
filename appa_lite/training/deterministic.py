"""Training of the deterministic next-state network."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.deterministic import DeterministicModel
from appa_lite.training.base import SampleNoise
from appa_lite.training.emulator import EmulatorRecipe, EmulatorTraining, Rollouts, States


@dataclass
class DeterministicTraining(EmulatorTraining):
    """Mean squared error of the next states, in units of the standard deviation of increments (GraphCast, Lam et al. 2023).

    loss = mean_k |x_{t+k} - f^k(x_t)|^2 / s^2,    k = 1 ... steps of the rollout
    """

    rollouts: Rollouts = field(default_factory=Rollouts)

    def errors(self, model: torch.nn.Module, batch: dict[str, Tensor], steps: int) -> Tensor:
        """Mean squared errors (steps,)."""
        known, target, forcing = self.split(batch, steps)
        squares = ((model(known, steps, forcing) - target) / self.model.scale).square()
        return torch.stack([self.mean(squares[:, k]) for k in range(steps)])

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        return {"loss": self.errors(model, batch, self.rollouts.at(self.progress)).mean()}

    def validate(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        """Root mean squared errors of the first and the last step of the longest rollout."""
        pairs = [(self.errors(self.model, batch, self.rollouts.longest), len(noise)) for batch, noise in batches]
        mean = sum(e.double() * n for e, n in pairs) / sum(n for _, n in pairs)
        return {f"rmse_{k + 1}": float(mean[k].sqrt()) for k in sorted({0, len(mean) - 1})}


@dataclass(frozen=True)
class DeterministicRecipe(EmulatorRecipe):
    """The deterministic network.

    Args: those of ``EmulatorRecipe``, and
        rollouts, shares: steps rolled out, and the share of the training for each.
    """

    rollouts: Sequence[int] = (1,)
    shares: Sequence[float] = (1.0,)

    @property
    def horizon(self) -> int:
        return max(self.rollouts)

    def network(self, states: States) -> DeterministicModel:
        return DeterministicModel(states.shape, self.history, states.periodic, states.forcings, self.backbone)

    def training(self, model: DeterministicModel, space: Checkpoint, settings: dict) -> DeterministicTraining:
        return DeterministicTraining(model, space, settings, self.half, Rollouts(tuple(self.rollouts), tuple(self.shares)))
