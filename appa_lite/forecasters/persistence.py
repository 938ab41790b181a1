"""Persistence: nothing changes."""

from collections.abc import Sequence
from typing import final

import numpy as np
from torch import Tensor

from appa_lite.forecasters.base import Forecaster, Progress, silent


@final
class Persistence(Forecaster):
    """x_{t+k} = x_t, member by member: the forecast that everything must beat at short leads."""

    def __init__(self):
        pass

    def forecast(
        self, initial: Tensor, times: np.ndarray, frames: int, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        return initial[[i % len(initial) for i in range(len(members))], -1:].expand(-1, frames, -1, -1, -1).clone()
