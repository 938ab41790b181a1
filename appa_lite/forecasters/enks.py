"""The ensemble Kalman smoother: the filter, whose analyses also change the past."""

from typing import final

import torch
from torch import Tensor

from appa_lite.forecasters.ensemble import SquareRootFilter, square_root
from appa_lite.observations.base import ObservationOperator
from appa_lite.simulators.base import Simulator


@final
class EnKS(SquareRootFilter):
    """Analyses from the observations up to ``lag`` frames later, with the covariance of the members in time.

    Without inflation this is also the linear 4DEnVar of the period: one Gauss-Newton step in the space of the members'
    trajectories, without tangent or adjoint models (Evensen and van Leeuwen 2000; Desroziers et al. 2014).

    Args: those of ``SquareRootFilter``.
    """

    def __init__(
        self,
        simulator: Simulator,
        lag: int | None = 20,
        inflation: float = 1.0,
        finite_size: float | None = 1.0,
        relaxation: float = 0.0,
        rotate: bool = True,
        states: str | None = None,
        spinup: int | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__(simulator, inflation, finite_size, relaxation, rotate, lag, states, spinup, device)

    def transform(self, s: Tensor, d: Tensor, operator: ObservationOperator) -> tuple[Tensor, Tensor]:
        return square_root((s @ s.T)[None], (s @ d)[None], self.finite_size)
