"""Predictor-corrector: a step of the probability flow, then Langevin steps that draw the state towards its level's law."""

from collections.abc import Iterator

from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.diffusion.base import Denoiser
from appa_lite.diffusion.samplers.stepped import Draw, SteppedSampler


class PredictorCorrector(SteppedSampler):
    """DDIM's step to the next level, then ``corrections`` Langevin steps of amplitude ``delta`` there.

        predict  x = D + (s_{i+1} / s_i) (x_i - D),              D = D(x_i, s_i)
        correct  x = D + sqrt(1 - delta) (x - D) + sqrt(delta) s n,  D = D(x, s), s = s_{i+1}

    Song et al. 2021 (algorithm 2). A correction replaces the share delta of the estimated noise x - D by new noise: to
    first order it is Langevin's step x + e score + sqrt(2 e) n of size e = delta s^2 / 2. Repeated at one level it ends
    at the law of that level, up to a spread that is short by about delta/8 at most. Where the denoiser is exact,
    corrections gain less than as many steps would.

    Args:
        steps: noise levels; the denoiser is evaluated ``steps + corrections (steps - 1)`` times.
        sigma_max, sigma_min: first and last noise level, in units of the latents.
        corrections: Langevin steps at each level but the first.
        delta: share of the noise that a correction replaces, in [0, 1].
        schedule: 'log_uniform' or 'edm'.
    """

    def __init__(
        self,
        steps: int = 256,
        sigma_max: float = 1000.0,
        sigma_min: float = 0.01,
        corrections: int = 1,
        delta: float = 0.1,
        schedule: str = "log_uniform",
    ):
        super().__init__(steps, sigma_max, sigma_min, schedule)
        if corrections < 0 or not 0 <= delta <= 1:
            raise UserError(f"a corrector has corrections >= 0 and delta within [0, 1], found {corrections} and {delta}")
        self.corrections, self.delta = corrections, delta

    def walk(self, x: Tensor, denoiser: Denoiser, draw: Draw) -> Iterator[Tensor]:
        for sigma, after in self.transitions():
            mean = denoiser(x, sigma)
            x = mean + after / sigma * (x - mean)
            for _ in range(self.corrections):
                mean = denoiser(x, after)
                x = mean + (1 - self.delta) ** 0.5 * (x - mean) + self.delta**0.5 * after * draw()
            yield x
