"""A Gaussian process whose correlations change in length and direction from place to place, with a memory in time."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable
from appa_lite.core.random import Streams
from appa_lite.simulators.base import Simulator, forcing_noise


class GaussianProcess(Simulator):
    """x_{t+1} = memory x_t + sqrt(1 - memory^2) e_t,  e_t ~ N(0, K): stationary in time, not in space.

    .. code-block:: text

        K(p, q) = s(p) s(q) |S_p|^(1/4) |S_q|^(1/4) |S|^(-1/2) (1 + r) exp(-r),   S = (S_p + S_q) / 2
        r^2     = 3 (p - q)^T S^{-1} (p - q),   S_p = Q diag(a^2, b^2) Q^T,   Q a rotation by pi (u + v)

    at p = (u, v) in the unit square: the Matern kernel of smoothness 3/2 with a metric of its own at every place
    (Paciorek and Schervish 2006), positive definite whatever the metric. The long axis a goes from
    ``shortest^(1/4) longest^(3/4)`` to ``longest`` along u, the short axis b from ``shortest`` to
    ``shortest^(1/4) longest^(3/4)`` along v. The standard deviation s varies between ``low`` and ``high`` before K is
    divided by its mean variance, which makes that one.

    A state is (B, n, n), dimensionless, float64.

    Arguments:
        n: cells along each side.
        shortest, longest: correlation lengths, in units of the domain.
        low, high: standard deviation where the process is quiet and where it is lively, before scaling.
        memory: correlation of successive frames; 0: frames are independent.
        step: seconds between frames.

    Raises:
        UserError: settings that are no process.
    """

    gaussian = True

    def __init__(
        self,
        n: int = 32,
        shortest: float = 0.03,
        longest: float = 0.3,
        low: float = 0.5,
        high: float = 1.5,
        memory: float = 0.0,
        step: float = 86400.0,
    ):
        if n < 2 or not 0 < shortest <= longest or not 0 < low <= high or not 0 <= memory < 1 or not step > 0:
            raise UserError(
                "a Gaussian process needs n >= 2, 0 < shortest <= longest, 0 < low <= high, 0 <= memory < 1 and step > 0, got "
                f"{n}, {shortest}, {longest}, {low}, {high}, {memory} and {step}"
            )
        self.n, self.shortest, self.longest, self.low, self.high, self.memory = n, shortest, longest, low, high, memory
        centres = tuple(float(i) for i in range(n))
        self.spec = FieldSpec((Variable("u", "1", long_name="Gaussian process"),), Grid(("y", "x"), centres, centres), step)

    @cached_property
    def covariance(self) -> Tensor:
        """K between all cells, row by row: (n * n, n * n), float64."""
        centre = (torch.arange(self.n, dtype=torch.float64) + 0.5) / self.n
        v, u = (c.flatten() for c in torch.meshgrid(centre, centre, indexing="ij"))
        k = paciorek_matern(torch.stack([u, v], dim=1), *self._metric(u, v))
        std = self.low + (self.high - self.low) * (0.5 + 0.5 * torch.sin(2 * math.pi * u) * torch.cos(math.pi * v))
        std = std / std.square().mean().sqrt()
        return std[:, None] * k * std

    def _metric(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries uu, uv and vv of S_p."""
        along = 0.5 + 0.5 * torch.cos(math.pi * u), 0.5 + 0.5 * torch.cos(math.pi * v)
        ratio = self.longest / self.shortest
        a, b = self.shortest * ratio ** (0.75 + 0.25 * along[0]), self.shortest * ratio ** (0.75 * along[1])
        c, s = torch.cos(math.pi * (u + v)), torch.sin(math.pi * (u + v))
        return a**2 * c**2 + b**2 * s**2, (a**2 - b**2) * c * s, a**2 * s**2 + b**2 * c**2

    @cached_property
    def _root(self) -> Tensor:
        return torch.linalg.cholesky(self.covariance)

    @property
    def spinup_frames(self) -> int:
        return 0

    @property
    def decorrelation_frames(self) -> int:
        """Frames after which the correlation is below one in a hundred."""
        return math.ceil(math.log(0.01) / math.log(self.memory)) if self.memory else 1

    def initial(self, seed: int, members: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Draws of N(0, K)."""
        return self._colour(Streams(seed, members, "gaussian_process", "initial").normal((self.n**2,), torch.float64)).to(device)

    def advance(self, state: Tensor, frame: int, seed: int, members: Sequence[int]) -> Tensor:
        noise = self._colour(forcing_noise((self.n**2,), seed, members, frame, "gaussian_process", "forcing"))
        return self.memory * state + math.sqrt(1 - self.memory**2) * noise.to(state)

    def _colour(self, noise: Tensor) -> Tensor:
        return (noise @ self._root.T).unflatten(1, (self.n, self.n))

    def fields(self, state: Tensor) -> Tensor:
        return state[:, None]

    def budgets(self, state: Tensor) -> dict[str, Tensor]:
        """``mean`` and ``energy`` (mean of x^2 / 2) of each member."""
        x = state.flatten(1)
        return {"mean": x.mean(1), "energy": 0.5 * x.square().mean(1)}


def paciorek_matern(places: Tensor, uu: Tensor, uv: Tensor, vv: Tensor) -> Tensor:
    """Correlations (N, N) of the non-stationary Matern-3/2 kernel at places (N, 2) with metric entries (N,) each."""
    half = [(e[:, None] + e) / 2 for e in (uu, uv, vv)]
    determinant = half[0] * half[2] - half[1] ** 2
    du, dv = (places[:, None, k] - places[:, k] for k in (0, 1))
    square = (half[2] * du**2 - 2 * half[1] * du * dv + half[0] * dv**2) / determinant
    r = (3 * square.clamp(min=0)).sqrt()
    scale = (uu * vv - uv**2) ** 0.25
    return scale[:, None] * scale / determinant.sqrt() * (1 + r) * torch.exp(-r)
