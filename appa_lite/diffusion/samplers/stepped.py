"""What the samplers share: levels, the start, the last denoising, progress, and the check of what comes out."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator

from torch import Tensor

from appa_lite.diffusion.base import Denoiser, NoiseSource, Sampler, check_sample
from appa_lite.diffusion.schedule import noise_levels

#: white noise of the shape of the sample, new at every call
Draw = Callable[[], Tensor]


class SteppedSampler(Sampler):
    """From sigma_max n, one step from each level to the next, then the denoised mean at the last level.

    A sampler of this kind is its ``walk``. Levels are float64 scalars, so that coefficients are computed in double
    precision whatever the precision of the sample.

    Args:
        steps: number of noise levels, sigma_max and sigma_min included.
        sigma_max, sigma_min: first and last noise level, in units of the latents.
        schedule: how they are spaced, 'log_uniform' or 'edm'.

    Raises:
        UserError: of levels that cannot be.
        FloatingPointError: when called, if the sample is not finite or far larger than the noise that it began as.
    """

    def __init__(self, steps: int, sigma_max: float, sigma_min: float, schedule: str):
        self.levels = noise_levels(schedule, steps, sigma_max, sigma_min)
        self.steps = steps

    @abstractmethod
    def walk(self, x: Tensor, denoiser: Denoiser, draw: Draw) -> Iterator[Tensor]:
        """The states at the second level, the third, ..., the last, from the state x at the first."""

    def transitions(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(sigma, the next sigma) of each of the ``steps - 1`` steps."""
        return itertools.pairwise(self.levels[:-1])

    def __call__(self, denoiser: Denoiser, noise: NoiseSource, progress: Callable[[int, int], None] | None = None) -> Tensor:
        draws = itertools.count()

        def draw() -> Tensor:
            return noise(next(draws))

        def evaluate(x: Tensor, sigma: Tensor) -> Tensor:
            return denoiser(x, sigma.to(x))

        x = draw()
        x = x * self.levels[0].to(x)
        for done, state in enumerate(self.walk(x, evaluate, draw), start=1):
            x = state
            if progress is not None:
                progress(done, self.steps)
        x = evaluate(x, self.levels[-2])
        if progress is not None:
            progress(self.steps, self.steps)
        check_sample(x, float(self.levels[0]))
        return x
