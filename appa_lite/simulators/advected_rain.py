"""Rain that drifts and renews itself: a Gaussian field behind an exactly generalised Pareto margin with dry cells."""

import math
from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable
from appa_lite.core.random import Streams
from appa_lite.simulators.base import Simulator, forcing_noise
from appa_lite.simulators.random_fields import PeriodicField, roll


class AdvectedRain(Simulator):
    """A meta-Gaussian field: Gaussian in space and time, transformed cell by cell.

    .. code-block:: text

        Z_{t+1} = memory shift_u(Z_t) + sqrt(1 - memory^2) e_t,     e_t, Z_0 ~ PeriodicField(n, length)
        R = 0 where q >= wet,  else (scale / shape) ((q / wet)^(-shape) - 1),     q = Phi(-Z)

    so that P(R > r) = wet (1 + shape r / scale)^(-1 / shape) exactly. With ``degrees`` = nu > 0 the copula is Student's
    instead of Gauss's: q = P(T_nu > Z / sqrt(c)), c the mean of nu squared autoregressions that a whole field shares,
    which makes extremes of neighbouring cells dependent at any level (of a Gaussian copula they are not in the limit).

    What is not shown is Gaussian, a state (B, n * n + degrees): Z row by row, then the nu autoregressions. So the law
    of Z given any observations of R can be sampled exactly (``forecasters.hidden_gaussian``).

    Arguments:
        n: cells along each side of a doubly periodic square.
        length: correlation length of Z, in cells.
        memory: correlation of successive frames, along the drift.
        drift: whole (rows, columns) that the field moves in a frame.
        wet: share of the cells where it rains.
        scale: beta of the generalised Pareto law, mm.
        shape: its xi, the tail index.
        degrees: nu of a Student copula; 0: a Gaussian one.
        step: seconds between frames.

    Raises:
        UserError: settings that are no such law.
    """

    gaussian = True

    def __init__(
        self,
        n: int = 32,
        length: float = 3.0,
        memory: float = 0.9,
        drift: Sequence[int] = (0, 1),
        wet: float = 0.2,
        scale: float = 1.0,
        shape: float = 0.25,
        degrees: int = 0,
        step: float = 3600.0,
    ):
        if not 0 <= memory < 1 or not 0 < wet <= 1 or not scale > 0 or not shape > 0 or degrees < 0 or not step > 0:
            raise UserError(
                "advected rain needs 0 <= memory < 1, 0 < wet <= 1, degrees >= 0 and positive scale, shape and step, got "
                f"{memory}, {wet}, {degrees}, {scale}, {shape} and {step}"
            )
        self.field, self.n, self.memory, self.drift = PeriodicField(n, length), n, memory, tuple(drift)
        self.wet, self.scale, self.shape, self.degrees = wet, scale, shape, degrees
        rain = Variable("rain", "mm", "lwe_thickness_of_precipitation_amount", "rain of a frame")
        cells = tuple(float(i) for i in range(n))
        self.spec = FieldSpec((rain,), Grid(("y", "x"), cells, cells, (True, True)), step)

    @property
    def spinup_frames(self) -> int:
        return 0

    @property
    def decorrelation_frames(self) -> int:
        """Frames after which the correlation is below one in a hundred."""
        return math.ceil(math.log(0.01) / math.log(self.memory)) if self.memory else 1

    def initial(self, seed: int, members: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Draws of the climate."""
        return self._colour(Streams(seed, members, "advected_rain", "initial").normal((self.n**2 + self.degrees,), torch.float64)).to(
            device
        )

    def advance(self, state: Tensor, frame: int, seed: int, members: Sequence[int]) -> Tensor:
        noise = self._colour(forcing_noise((self.n**2 + self.degrees,), seed, members, frame, "advected_rain", "forcing"))
        z, rest = self._parts(state)
        moved = torch.cat([roll(z, self.drift).flatten(1), rest], dim=1)
        return self.memory * moved + math.sqrt(1 - self.memory**2) * noise.to(state)

    def _parts(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return state[..., : self.n**2].unflatten(-1, (self.n, self.n)), state[..., self.n**2 :]

    def _colour(self, noise: Tensor) -> Tensor:
        z, rest = self._parts(noise)
        return torch.cat([self.field.colour(z).flatten(1), rest], dim=1)

    def exceedance(self, state: Tensor) -> Tensor:
        """q (B, n, n): the probability of more rain than in that cell, or of more than what stays dry."""
        z, rest = self._parts(state)
        if not self.degrees:
            return torch.special.ndtr(-z)
        ratio = z / rest.square().mean(-1).sqrt()[..., None, None]
        return torch.from_numpy(stats.t.sf(ratio.cpu().numpy(), self.degrees)).to(z)

    def fields(self, state: Tensor) -> Tensor:
        q = self.exceedance(state)[..., None, :, :]
        return torch.where(q < self.wet, self.scale / self.shape * torch.expm1(-self.shape * torch.log(q / self.wet)), 0.0)

    def budgets(self, state: Tensor) -> dict[str, Tensor]:
        """``wet`` (share of the cells) and ``rain`` (mean, mm) of each member."""
        rain = self.fields(state).flatten(1)
        return {"wet": (rain > 0).to(rain).mean(1), "rain": rain.mean(1)}

    def quantile(self, probability: Tensor) -> Tensor:
        """The rain (mm) exceeded with a probability, at any cell."""
        tail = (probability / self.wet).clamp(max=1.0)
        return self.scale / self.shape * torch.expm1(-self.shape * torch.log(tail))
