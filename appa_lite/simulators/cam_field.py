"""Correlated additive and multiplicative noise: a field that evolves, with exactly Student's margins."""

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


class CamField(Simulator):
    """dx = -rate x dt + E sqrt(1 + x^2) dW (Ito), E^2 = 2 rate / (degrees - 1), in every cell of a drifting field.

    The stationary density is proportional to (1 + x^2)^(-(degrees + 1) / 2): sqrt(degrees) x is exactly Student's t, of
    tail index 1 / degrees (Sardeshmukh and Sura 2009, on the noise of large-scale flows). With y = asinh x the noise is
    additive, and a step is a Strang splitting, whose two halves are exact:

    .. code-block:: text

        x' = exp(-a dt / 2) sinh(asinh(exp(-a dt / 2) x) + E sqrt(dt) e),     a = rate + E^2 / 2

    with e ~ PeriodicField(n, length), then a shift by whole cells. There is no diffusion in space: it would change the
    tail. Explicit steps of x itself do too: Euler-Maruyama with dt = 0.1 is 12 % off at a probability of 1e-4.

    A state is (B, n, n), dimensionless, float64.

    Arguments:
        n: cells along each side of a doubly periodic square.
        length: correlation length of the noise, in cells.
        degrees: of freedom of the stationary law, above 1.
        rate: of the relaxation to zero, per time unit.
        dt: time step, time units.
        steps_per_frame: time steps between frames.
        drift: whole (rows, columns) that the field moves in a time step.
        step: seconds between frames.

    Raises:
        UserError: settings that are no such process.
    """

    def __init__(
        self,
        n: int = 32,
        length: float = 3.0,
        degrees: float = 2.5,
        rate: float = 1.0,
        dt: float = 0.1,
        steps_per_frame: int = 2,
        drift: Sequence[int] = (0, 1),
        step: float = 3600.0,
    ):
        if not degrees > 1 or not rate > 0 or not dt > 0 or steps_per_frame < 1 or not step > 0:
            raise UserError(
                "a field with correlated additive and multiplicative noise needs degrees > 1, steps_per_frame >= 1 and positive rate, "
                f"dt and step, got {degrees}, {steps_per_frame}, {rate}, {dt} and {step}"
            )
        self.field, self.n, self.degrees, self.rate, self.dt = PeriodicField(n, length), n, degrees, rate, dt
        self.steps_per_frame, self.drift = steps_per_frame, tuple(drift)
        self.noise = math.sqrt(2 * rate / (degrees - 1))  # E
        cells = tuple(float(i) for i in range(n))
        self.spec = FieldSpec((Variable("u", "1", long_name="CAM noise"),), Grid(("y", "x"), cells, cells, (True, True)), step)

    @property
    def spinup_frames(self) -> int:
        """Six relaxation times: margins are right from the start, what neighbouring cells share is not."""
        return math.ceil(6 / (self.rate * self.dt * self.steps_per_frame))

    def initial(self, seed: int, members: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Student's margins on a Gaussian field."""
        z = self.field.colour(Streams(seed, members, "cam_field", "initial").normal((self.n, self.n), torch.float64))
        return self.quantile(torch.special.ndtr(-z)).to(device)

    def advance(self, state: Tensor, frame: int, seed: int, members: Sequence[int]) -> Tensor:
        noise = self.field.colour(forcing_noise((self.steps_per_frame, self.n, self.n), seed, members, frame, "cam_field", "forcing"))
        decay = math.exp(-(self.rate + self.noise**2 / 2) * self.dt / 2)
        for e in noise.to(state).unbind(1):
            state = roll(decay * torch.sinh(torch.asinh(decay * state) + self.noise * math.sqrt(self.dt) * e), self.drift)
        return state

    def fields(self, state: Tensor) -> Tensor:
        return state[:, None]

    def budgets(self, state: Tensor) -> dict[str, Tensor]:
        """``mean`` and ``log_energy`` (mean of log(1 + x^2), whose expectation is finite for any tail) of each member."""
        x = state.flatten(1)
        return {"mean": x.mean(1), "log_energy": torch.log1p(x.square()).mean(1)}

    def quantile(self, probability: Tensor) -> Tensor:
        """The value exceeded with a probability, at any cell."""
        return torch.as_tensor(stats.t.isf(probability.cpu().numpy(), self.degrees) / math.sqrt(self.degrees)).to(probability)
