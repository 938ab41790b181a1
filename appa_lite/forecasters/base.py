"""What every competitor promises: forecasts from an initial state, analyses from observations."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from appa_lite.guidance.base import SolverReport
from appa_lite.observations.base import Observation

Progress = Callable[[str, int, int], None]  #: (what, done, all)


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


class Assimilator(ABC):
    """Trajectories given observations.

    ``coupled`` is True where the members are each other's covariance, as in ensemble Kalman methods: member m then depends
    on the whole list of members, so on the size of the ensemble. Otherwise it depends on (seed, m) alone.
    """

    coupled: bool = False

    @abstractmethod
    def assimilate(
        self, observation: Observation | None, times: np.ndarray, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        """Fields (B, T, C, H, W), in physical units, of the given members at ``times`` (T,) datetime64, equally spaced.

        Member m depends on (seed, m) alone, unless the method is ``coupled``. No observation means the prior.
        """


class Forecaster(ABC):
    """Trajectories that go on from known frames."""

    report: SolverReport | None = None  #: what its solvers did, if it has any

    @abstractmethod
    def forecast(
        self, initial: Tensor, times: np.ndarray, frames: int, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        """Fields (B, frames, C, H, W) after the last of the known frames.

        ``initial`` (B, n, C, H, W) holds the known frames of each member at ``times`` (n,), the last one the initial time.
        """
