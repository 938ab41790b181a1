"""The ensemble Kalman filter, as the symmetric square-root (ensemble transform) filter."""

from typing import final

import torch
from torch import Tensor

from appa_lite.forecasters.ensemble import SquareRootFilter, square_root
from appa_lite.observations.base import ObservationOperator
from appa_lite.simulators.base import Simulator


@final
class EnKF(SquareRootFilter):
    """Analyses from the observations up to each time, with the covariance of the members (Bishop et al. 2001; Hunt et al. 2007).

    Args: those of ``SquareRootFilter``.
    """

    def __init__(
        self,
        simulator: Simulator,
        inflation: float = 1.0,
        finite_size: float | None = 1.0,
        relaxation: float = 0.0,
        rotate: bool = True,
        states: str | None = None,
        spinup: int | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__(simulator, inflation, finite_size, relaxation, rotate, 0, states, spinup, device)

    def transform(self, s: Tensor, d: Tensor, operator: ObservationOperator) -> tuple[Tensor, Tensor]:
        return square_root((s @ s.T)[None], (s @ d)[None], self.finite_size)
