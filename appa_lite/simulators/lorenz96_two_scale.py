"""The two-scale Lorenz-96 system: slow variables that are observed, fast ones that are not."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.random import Streams
from appa_lite.simulators.base import Simulator
from appa_lite.simulators.rings import TIME_UNIT, check_finite, ring_spec
from appa_lite.simulators.stepping import rk4

FAST_TIMES = 10.0  #: relaxation times 1 / c of the fast variables, after which they have forgotten where they started


class Lorenz96TwoScale(Simulator):
    """K slow variables X_k, each coupled to J fast ones Y_{j,k} (Lorenz, 1996; Wilks, 2005), by RK4.

    .. code-block:: text

        dX_k/dt     = X_{k-1} (X_{k+1} - X_{k-2}) - X_k + F - (h c / b) sum_j Y_{j,k}
        dY_{j,k}/dt = c b Y_{j+1,k} (Y_{j-1,k} - Y_{j+2,k}) - c Y_{j,k} + (h c / b) X_k

    The fast variables form one ring of length J K. Fields are the slow variables only. One time unit is five days.
    A state is (B, K + J K): X, then Y with j running fastest; all dimensionless.

    Arguments:
        K: slow variables on the ring.
        J: fast variables to each slow one.
        F: constant forcing of the slow variables.
        h: strength of the coupling.
        b: ratio of the amplitudes of slow and fast variables.
        c: ratio of their time scales.
        dt: time step, time units.
        steps_per_frame: time steps between frames.
        spinup: frames to discard.

    Raises:
        UserError: fewer than four slow variables or no fast one, or (from ``advance``) a member that is not finite.
    """

    def __init__(
        self,
        K: int = 8,
        J: int = 32,
        F: float = 20.0,
        h: float = 1.0,
        b: float = 10.0,
        c: float = 10.0,
        dt: float = 0.005,
        steps_per_frame: int = 10,
        spinup: int = 400,
    ):
        if K < 4 or J < 1:
            raise UserError(f"two-scale Lorenz-96 needs K of at least 4 and J of at least 1, got {K} and {J}")
        self.K, self.J, self.F, self.h, self.b, self.c = K, J, F, h, b, c
        self.dt, self.steps_per_frame, self.spinup = dt, steps_per_frame, spinup
        self.spec = ring_spec(K, dt * steps_per_frame * TIME_UNIT)

    @property
    def spinup_frames(self) -> int:
        return self.spinup

    def initial(self, seed: int, members: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Noise of standard deviation F / 4 in the slow variables and 0.1 in the fast ones."""
        streams = Streams(seed, members, "lorenz96_two_scale", "initial")
        slow = 0.25 * self.F * streams.normal((self.K,), torch.float64)
        return torch.cat([slow, 0.1 * streams.normal((self.J * self.K,), torch.float64)], dim=1).float().to(device)

    def from_fields(self, fields: Tensor) -> Tensor:
        """States from slow fields (B, 1, 1, K); the fast variables start from tiny waves and need some frames to grow."""
        slow = fields[:, 0, 0]
        fast = 0.01 * torch.sin(torch.arange(self.J * self.K, dtype=slow.dtype, device=slow.device) ** 2)
        return torch.cat([slow, fast.expand(len(slow), -1)], dim=1)

    def analyses(self, state: Tensor, error: float, seed: int, members: Sequence[int]) -> Tensor:
        """Draws (B, ...) given analyses of the slow variables: N(X, error^2), and fast variables that are not known.

        These are drawn from the invariant measure of the fast equations under the drawn slow variables, held fixed (the law of
        averaging theory: Fatkullin and Vanden-Eijnden 2004, https://doi.org/10.1016/j.jcp.2004.04.013): noise of standard deviation
        0.1 after ``FAST_TIMES`` / c time units. What the analysis says of its fast variables is not used.
        """
        streams = Streams(seed, members, "lorenz96_two_scale", "analysis")
        slow = state[:, : self.K] + error * streams.normal((self.K,), torch.float64).to(state)
        fast = 0.1 * streams.normal((self.J * self.K,)).to(state)

        def relax(y: Tensor) -> Tensor:
            return self.tendency(torch.cat([slow, y], dim=1))[:, self.K :]

        for _ in range(math.ceil(FAST_TIMES / (self.c * self.dt))):
            fast = rk4(relax, fast, self.dt)
        return check_finite(torch.cat([slow, fast], dim=1), members, "two-scale Lorenz-96", self.dt)

    def advance(self, state: Tensor, frame: int, seed: int, members: Sequence[int]) -> Tensor:
        for _ in range(self.steps_per_frame):
            state = rk4(self.tendency, state, self.dt)
        return check_finite(state, members, "two-scale Lorenz-96", self.dt)

    def tendency(self, state: Tensor) -> Tensor:
        """dX/dt and dY/dt of states (..., K + J K)."""
        x, y = state[..., : self.K], state[..., self.K :]
        slow = torch.cat([x[..., -2:], x, x[..., :1]], dim=-1)
        fast = torch.cat([y[..., -1:], y, y[..., :2]], dim=-1)
        coupling = self.h * self.c / self.b
        dx = (slow[..., 3:] - slow[..., :-3]) * slow[..., 1:-2] - x + self.F - coupling * y.unflatten(-1, (self.K, self.J)).sum(-1)
        dy = (self.c * self.b) * fast[..., 2:-1] * (fast[..., :-3] - fast[..., 3:]) - self.c * y
        return torch.cat([dx, dy + coupling * x.repeat_interleave(self.J, dim=-1)], dim=-1)

    def fields(self, state: Tensor) -> Tensor:
        return state[:, None, None, : self.K]

    def budgets(self, state: Tensor) -> dict[str, Tensor]:
        """``mean`` of X, and ``energy_slow`` and ``energy_fast`` (sums of X^2 / 2 and of Y^2 / 2) of each member."""
        x, y = state[:, : self.K], state[:, self.K :]
        return {"mean": x.mean(1), "energy_slow": 0.5 * x.square().sum(1), "energy_fast": 0.5 * y.square().sum(1)}
