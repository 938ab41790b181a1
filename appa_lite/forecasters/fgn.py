"""The FGN-style network as a forecaster."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from appa_lite.core.random import Streams
from appa_lite.forecasters.rollout import Rollout
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.fgn import FGNModel


@final
class FGN(Rollout):
    """One evaluation a member and step, with new noise at each (Alet et al. 2025, whose ensemble is of four models).

    Args: those of ``Rollout``.
    """

    kind = FGNModel

    def __init__(self, checkpoint: Checkpoint | Sequence[Checkpoint], batch: int = 64):
        super().__init__(checkpoint, batch)

    def advance(self, model: FGNModel, known: Tensor, forcing: Tensor | None, streams: Streams) -> Tensor:
        noise = streams.normal((1, *model.noise_shape), device=known.device)
        return model(known, noise, None if forcing is None else forcing.expand(len(known), 1, -1))[:, 0]
