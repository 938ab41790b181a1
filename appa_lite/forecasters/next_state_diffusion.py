"""The GenCast-style diffusion model of the next state as a forecaster."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from appa_lite.core.random import Streams
from appa_lite.diffusion.samplers import DPMSolverPP2S
from appa_lite.forecasters.rollout import Rollout
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.next_state_diffusion import NextStateDenoiser


@final
class NextStateDiffusion(Rollout):
    """Each next state is a sample by DPM-Solver++ 2S with churn on the levels of EDM; the defaults are GenCast's (Price et al. 2023).

    Args: those of ``Rollout``, and
        steps, sigma_max, sigma_min, churn, churn_min, churn_max, churn_std: of ``DPMSolverPP2S``, in standard deviations
            of increments; ``2 steps - 1`` evaluations a member and step. ``sigma_min`` should be at most 0.15 times the
            standard deviation of the law of a step (see ``diffusion.schedule``).
    """

    kind = NextStateDenoiser

    def __init__(
        self,
        checkpoint: Checkpoint | Sequence[Checkpoint],
        steps: int = 20,
        sigma_max: float = 80.0,
        sigma_min: float = 0.03,
        churn: float = 2.5,
        churn_min: float = 0.75,
        churn_max: float = 80.0,
        churn_std: float = 1.05,
        batch: int = 64,
    ):
        super().__init__(checkpoint, batch)
        self.sampler = DPMSolverPP2S(steps, sigma_max, sigma_min, churn, churn_min, churn_max, churn_std, "edm")

    def advance(self, model: NextStateDenoiser, known: Tensor, forcing: Tensor | None, streams: Streams) -> Tensor:
        forcing = None if forcing is None else forcing.expand(len(known), -1)

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            return model(x, sigma.expand(len(x)), known, forcing)

        increment = self.sampler(denoiser, lambda step: streams.normal(known.shape[2:], device=known.device))
        return known[:, -1] + model.mask * model.scale * increment
