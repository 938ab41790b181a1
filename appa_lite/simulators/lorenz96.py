"""The Lorenz-96 ring: forty variables, chaotic, with an optional random forcing that has memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.random import Streams
from appa_lite.simulators.base import Simulator, forcing_noise
from appa_lite.simulators.rings import TIME_UNIT, check_finite, ring_spec
from appa_lite.simulators.stepping import rk4


class Lorenz96(Simulator):
    """dx_k/dt = (x_{k+1} - x_{k-2}) x_{k-1} - x_k + F + e_k(t) on a ring (Lorenz, 1996), by RK4.

    e_k are independent Ornstein-Uhlenbeck processes (standard deviation ``forcing_std``), held during a time step; they
    are not part of the fields. One time unit is five days. With F = 8 small errors double in about 2.1 days.

    A state is (B, K), or (B, 2 K) with random forcing: x, then e; both dimensionless.

    Arguments:
        K: variables on the ring.
        F: constant forcing, dimensionless.
        dt: time step, time units.
        steps_per_frame: time steps between frames.
        forcing_std: standard deviation of the random forcing, dimensionless; 0 is a deterministic model.
        forcing_memory: its decorrelation time, time units.
        spinup: frames to discard.

    Raises:
        UserError: fewer than four variables, or (from ``advance``) a member that is not finite.
    """

    def __init__(
        self,
        K: int = 40,
        F: float = 8.0,
        dt: float = 0.05,
        steps_per_frame: int = 1,
        forcing_std: float = 0.0,
        forcing_memory: float = 0.4,
        spinup: int = 400,
    ):
        if K < 4:
            raise UserError(f"Lorenz-96 needs K of at least 4, got {K}")
        if forcing_std < 0 or forcing_memory <= 0:
            raise UserError(f"forcing_std must not be negative and forcing_memory positive, got {forcing_std} and {forcing_memory}")
        self.K, self.F, self.dt, self.steps_per_frame, self.spinup = K, F, dt, steps_per_frame, spinup
        self.forcing_std, self.forcing_memory = forcing_std, forcing_memory
        self.spec = ring_spec(K, dt * steps_per_frame * TIME_UNIT)

    @property
    def spinup_frames(self) -> int:
        return self.spinup

    def initial(self, seed: int, members: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """F plus noise of standard deviation 0.1."""
        streams = Streams(seed, members, "lorenz96", "initial")
        x = self.F + 0.1 * streams.normal((self.K,), torch.float64)
        if self.forcing_std:
            x = torch.cat([x, self.forcing_std * streams.normal((self.K,), torch.float64)], dim=1)
        return x.float().to(device)

    def from_fields(self, fields: Tensor) -> Tensor:
        """States from fields (B, 1, 1, K); a random forcing starts from zero."""
        x = fields[:, 0, 0]
        return torch.cat([x, torch.zeros_like(x)], dim=1) if self.forcing_std else x.clone()

    def analyses(self, state: Tensor, error: float, seed: int, members: Sequence[int]) -> Tensor:
        """Draws (B, ...) given analyses x (B, ...): N(x, error^2) at every site, and a random forcing that is not known at all."""
        streams = Streams(seed, members, "lorenz96", "analysis")
        x = state[:, : self.K] + error * streams.normal((self.K,), torch.float64).to(state)
        return torch.cat([x, self.forcing_std * streams.normal((self.K,)).to(x)], dim=1) if self.forcing_std else x

    def advance(self, state: Tensor, frame: int, seed: int, members: Sequence[int]) -> Tensor:
        if not self.forcing_std:
            for _ in range(self.steps_per_frame):
                state = rk4(self.tendency, state, self.dt)
            return check_finite(state, members, "Lorenz-96", self.dt)
        noise = forcing_noise((self.steps_per_frame, self.K), seed, members, frame, "lorenz96", "forcing").to(state)
        keep = math.exp(-self.dt / self.forcing_memory)
        x, forcing = state.split(self.K, dim=1)
        for step in range(self.steps_per_frame):
            forcing = keep * forcing + (self.forcing_std * math.sqrt(1 - keep**2)) * noise[:, step]
            x = rk4(lambda y, e=forcing: self.tendency(y) + e, x, self.dt)
        return check_finite(torch.cat([x, forcing], dim=1), members, "Lorenz-96", self.dt)

    def advection(self, x: Tensor) -> Tensor:
        """The quadratic term (x_{k+1} - x_{k-2}) x_{k-1} of x (..., K); it conserves sum x^2."""
        ring = torch.cat([x[..., -2:], x, x[..., :1]], dim=-1)
        return (ring[..., 3:] - ring[..., :-3]) * ring[..., 1:-2]

    def tendency(self, x: Tensor) -> Tensor:
        """dx/dt of x (..., K), without the random forcing."""
        return self.advection(x) - x + self.F

    def fields(self, state: Tensor) -> Tensor:
        return state[:, None, None, : self.K]

    def budgets(self, state: Tensor) -> dict[str, Tensor]:
        """``mean`` and ``energy`` (mean of x^2 / 2) of each member."""
        x = state[:, : self.K]
        return {"mean": x.mean(1), "energy": 0.5 * x.square().mean(1)}
