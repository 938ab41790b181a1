"""Training of the GenCast-style diffusion model of the next state."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.next_state_diffusion import NextStateDenoiser
from appa_lite.training.base import SampleNoise
from appa_lite.training.emulator import EmulatorRecipe, EmulatorTraining, States


@dataclass
class NextStateTraining(EmulatorTraining):
    """Denoising score matching of scaled increments r = (x_{t+1} - x_t) / s (Price et al. 2023, section on training).

        loss = E (1 + sigma^2) / sigma^2 |D(r + sigma n, sigma) - r|^2,   sigma^(1/7) uniform between low^(1/7) and high^(1/7)

    Args:
        low, high: noise levels of the training; GenCast has 0.02 and 88. Spread below ``low`` is not resolved: where a step
            is nearly certain (its errors a hundredth of its increments), ``low`` and the sampler's ``sigma_min`` must be lower.
    """

    low: float = 0.02
    high: float = 88.0

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        known, target, forcing = self.split(batch, 1)
        r = (target[:, 0] - known[:, -1]) / self.model.scale
        sigma = torch.lerp(*(torch.tensor(v ** (1 / 7), device=r.device) for v in (self.high, self.low)), noise.stratified()) ** 7
        level = sigma[:, None, None, None]
        estimate = model(r + level * noise.normal(r.shape[1:]), sigma, known, None if forcing is None else forcing[:, 0])
        return {"loss": self.mean((estimate - r).square() * (1 + level**2) / level**2)}

    def validate(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        """The loss; one is what knows nothing but the size of increments."""
        return self.mean_loss(batches)


@dataclass(frozen=True)
class NextStateRecipe(EmulatorRecipe):
    """The diffusion model of the next state.

    Args: those of ``EmulatorRecipe``, and
        low, high: noise levels of the training, in standard deviations of increments.
    """

    low: float = 0.02
    high: float = 88.0

    def network(self, states: States) -> NextStateDenoiser:
        return NextStateDenoiser(states.shape, self.history, states.periodic, states.forcings, self.backbone)

    def training(self, model: NextStateDenoiser, space: Checkpoint, settings: dict) -> NextStateTraining:
        return NextStateTraining(model, space, settings, self.half, self.low, self.high)
