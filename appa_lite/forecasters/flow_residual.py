"""The flow on the residual of a mean forecast as a forecaster."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.random import Streams
from appa_lite.forecasters.rollout import Rollout
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.flow_residual import ResidualFlow

Velocity = Callable[[Tensor, Tensor], Tensor]


def transport(velocity: Velocity, start: Tensor, steps: int, method: str = "heun") -> Tensor:
    """r(1) of dr/du = v(r, u), r(0) = start, in equal steps by Euler's or Heun's method; ``velocity`` takes u as (B,)."""
    x, h = start, 1 / steps
    for k in range(steps):
        u = torch.full((len(x),), k * h, dtype=x.dtype, device=x.device)
        slope = velocity(x, u)
        if method == "heun":
            slope = (slope + velocity(x + h * slope, u + h)) / 2
        x = x + h * slope
    return x


@final
class FlowResidual(Rollout):
    """The mean forecast, and a residual that a flow carries from noise of standard deviation ``noise_scale`` (ArchesWeatherGen, Couairon
    et al. 2024, which starts its members from noise a little larger than in training against too little spread).

    Args: those of ``Rollout``, and
        steps: of the ordinary differential equation; method: 'heun' (two evaluations a step) or 'euler' (one);
        noise_scale: of the noise that the flow starts from; 1 is the law that was learned.
    """

    kind = ResidualFlow

    def __init__(
        self,
        checkpoint: Checkpoint | Sequence[Checkpoint],
        steps: int = 8,
        method: str = "heun",
        noise_scale: float = 1.05,
        batch: int = 64,
    ):
        super().__init__(checkpoint, batch)
        if method not in ("heun", "euler") or steps < 1:
            raise UserError(f"method={method} must be heun or euler, and steps={steps} at least 1")
        self.steps, self.method, self.noise_scale = steps, method, noise_scale

    def advance(self, model: ResidualFlow, known: Tensor, forcing: Tensor | None, streams: Streams) -> Tensor:
        forcing = None if forcing is None else forcing.expand(len(known), -1)
        mean = model.forecast_mean(known, forcing)
        noise = self.noise_scale * streams.normal(known.shape[2:], device=known.device)
        residual = transport(lambda r, u: model.velocity(r, u, known, mean, forcing), noise, self.steps, self.method)
        return mean + model.mask * model.scale * residual
