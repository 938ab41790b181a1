"""The local ensemble transform Kalman filter and smoother."""

from typing import final

import torch
from torch import Tensor

from appa_lite.forecasters.ensemble import SquareRootFilter
from appa_lite.forecasters.localisation import Taper, local_square_root, placed_states
from appa_lite.observations.base import ObservationOperator
from appa_lite.simulators.base import Simulator


@final
class LETKF(SquareRootFilter):
    """One analysis per cell, from the observations nearby: R^{-1} fades with distance (Hunt, Kostelich and Szunyogh 2007).

    All numbers of a cell share its weights; numbers that have no place (winds of the whole basin) take the observations
    with their mean taper over the cells. With an infinite radius it is the EnKF.

    Args:
        radius: where the taper (Gaspari-Cohn) reaches zero, in cells.
        lag: frames that later observations still change; 0 is the filter, None the whole period.
        others: those of ``SquareRootFilter``.
    """

    def __init__(
        self,
        simulator: Simulator,
        radius: float,
        inflation: float = 1.0,
        finite_size: float | None = 1.0,
        relaxation: float = 0.0,
        rotate: bool = False,
        lag: int | None = 0,
        states: str | None = None,
        spinup: int | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__(simulator, inflation, finite_size, relaxation, rotate, lag, states, spinup, device)
        self.taper = Taper(simulator.spec.grid, radius)
        placed_states(simulator)

    def transform(self, s: Tensor, d: Tensor, operator: ObservationOperator) -> tuple[Tensor, Tensor]:
        return local_square_root(self.taper.cells(operator), s, d, self.finite_size)
