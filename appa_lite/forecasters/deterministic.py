"""The deterministic next-state network as a forecaster; its spread is that of the initial states."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from appa_lite.core.random import Streams
from appa_lite.forecasters.rollout import Rollout
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.deterministic import DeterministicModel


@final
class Deterministic(Rollout):
    """One forecast from each initial state (GraphCast, Lam et al. 2023): an ensemble of analyses makes a perturbed ensemble.

    Args: those of ``Rollout``.
    """

    kind = DeterministicModel

    def __init__(self, checkpoint: Checkpoint | Sequence[Checkpoint], batch: int = 64):
        super().__init__(checkpoint, batch)

    def advance(self, model: DeterministicModel, known: Tensor, forcing: Tensor | None, streams: Streams) -> Tensor:
        return model(known, 1, None if forcing is None else forcing.expand(len(known), 1, -1))[:, 0]
