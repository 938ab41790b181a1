"""Training of the FGN-style network, by the continuous ranked probability score of small ensembles."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.fgn import FGNModel
from appa_lite.training.base import SampleNoise
from appa_lite.training.emulator import EmulatorRecipe, EmulatorTraining, Rollouts, States


def almost_fair_crps(members: Tensor, truth: Tensor, alpha: float = 1.0) -> Tensor:
    """The almost fair CRPS of members (B, M, ...) for a truth (B, ...); (B, ...).

        mean_m |x_m - y| - (1 - (1 - alpha) / M) / (2 M (M - 1)) sum_{m,n} |x_m - x_n|

    alpha = 1: fair, its expectation that of an infinite ensemble; 0: the score of the ensemble as it is, which rewards too
    little spread (Ferro 2014; Lang et al. 2024, arXiv:2412.15832, eq. 4).
    """
    m = members.shape[1]
    pairs = sum((members[:, i] - members[:, j]).abs() for i in range(m) for j in range(i))
    return (members - truth[:, None]).abs().mean(1) - (1 - (1 - alpha) / m) / (m * (m - 1)) * pairs


@dataclass
class FGNTraining(EmulatorTraining):
    """The almost fair CRPS of ``members`` forecasts, in units of the standard deviation of increments, averaged over
    cells and the steps of the rollout; each member goes on from its own states.

    Args:
        alpha: 1 fair (Alet et al. 2025), 0.95 almost fair (Lang et al. 2024);
        through_time: gradients flow through all the steps of a rollout; False: only through each by itself.
    """

    members: int = 2
    alpha: float = 1.0
    rollouts: Rollouts = field(default_factory=Rollouts)
    through_time: bool = True

    def forecast(
        self, model: torch.nn.Module, batch: dict[str, Tensor], noise: SampleNoise, members: int, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Forecasts (B, members, steps, Z, h, w) and truths (B, steps, Z, h, w), scaled."""
        known, target, forcing = self.split(batch, steps)
        draws = noise.normal((members, steps, *self.model.noise_shape)).flatten(0, 1)
        known, forcing = (None if v is None else v.repeat_interleave(members, dim=0) for v in (known, forcing))
        out = model(known, draws, forcing, self.through_time).unflatten(0, (-1, members))
        return out / self.model.scale, target / self.model.scale

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        out, target = self.forecast(model, batch, noise, self.members, self.rollouts.at(self.progress))
        return {"loss": self.mean(almost_fair_crps(out, target, self.alpha))}

    def validate(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        """Fair CRPS and spread over skill of eight members at the first and the last step of the longest rollout."""
        rows, weights = [], []
        for batch, noise in batches:
            out, target = self.forecast(self.model, batch, noise, 8, self.rollouts.longest)
            parts = (almost_fair_crps(out, target), out.var(1), (out.mean(1) - target).square())
            rows.append(torch.stack([torch.stack([self.mean(p[:, k]) for k in range(p.shape[1])]) for p in parts]).double().cpu())
            weights.append(len(noise))
        crps, variance, error = sum(r * n for r, n in zip(rows, weights, strict=True)) / sum(weights)
        ratio = (variance / error * (1 + 1 / 8)).sqrt()
        steps = sorted({0, len(crps) - 1})
        return {f"crps_{k + 1}": float(crps[k]) for k in steps} | {f"spread_skill_{k + 1}": float(ratio[k]) for k in steps}


@dataclass(frozen=True)
class FGNRecipe(EmulatorRecipe):
    """The FGN-style network.

    Args: those of ``EmulatorRecipe``, and
        noise, noise_size: of ``FGNModel``; members, alpha, through_time: of ``FGNTraining``;
        rollouts, shares: steps rolled out, and the share of the training for each.
    """

    noise: str = "global"
    noise_size: int = 32
    members: int = 2
    alpha: float = 1.0
    rollouts: Sequence[int] = (1, 2, 4)
    shares: Sequence[float] = (0.8, 0.1, 0.1)
    through_time: bool = True

    @property
    def horizon(self) -> int:
        return max(self.rollouts)

    def network(self, states: States) -> FGNModel:
        return FGNModel(states.shape, self.history, states.periodic, states.forcings, self.noise, self.noise_size, self.backbone)

    def training(self, model: FGNModel, space: Checkpoint, settings: dict) -> FGNTraining:
        if self.members < 2 or not 0 <= self.alpha <= 1:
            raise UserError(f"members={self.members} must be at least 2 and alpha={self.alpha} between 0 and 1: the score compares members")
        rollouts = Rollouts(tuple(self.rollouts), tuple(self.shares))
        return FGNTraining(model, space, settings, self.half, self.members, self.alpha, rollouts, self.through_time)
