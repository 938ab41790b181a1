"""The deterministic next-state network as a forecaster; its spread is that of the initial states."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.random import Streams
from appa_lite.forecasters.rollout import Rollout
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.deterministic import DeterministicModel


@final
class Deterministic(Rollout):
    """One forecast from each initial state (GraphCast, Lam et al. 2023): an ensemble of analyses makes a perturbed ensemble.

    Where only one initial state is known, members start from x + a s n, n ~ N(0, I): all known states of a member are displaced alike,
    so that the increment between them stays, and s is the standard deviation of a step's increments, channel by channel (random
    perturbations, as in the perturbed GraphCast that GenCast is compared with, Price et al. 2023, arXiv:2312.15796).

    Args: those of ``Rollout``, and
        perturbation: a, the amplitude of the displacement; 0 is none.
    """

    kind = DeterministicModel

    def __init__(self, checkpoint: Checkpoint | Sequence[Checkpoint], perturbation: float = 0.0, batch: int = 64):
        super().__init__(checkpoint, batch)
        if perturbation < 0:
            raise UserError(f"perturbation={perturbation} must not be negative")
        self.perturbation = perturbation

    def start(self, model: DeterministicModel, known: Tensor, streams: Streams) -> Tensor:
        if not self.perturbation:
            return known
        noise = streams.normal(known.shape[2:], device=known.device)
        return known + (self.perturbation * model.mask * model.scale * noise)[:, None]

    def advance(self, model: DeterministicModel, known: Tensor, forcing: Tensor | None, streams: Streams) -> Tensor:
        return model(known, 1, None if forcing is None else forcing.expand(len(known), 1, -1))[:, 0]
