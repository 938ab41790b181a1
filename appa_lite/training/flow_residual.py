"""Training of the flow on the residual of a deterministic mean forecast."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.deterministic import DeterministicModel
from appa_lite.models.flow_residual import ResidualFlow
from appa_lite.training.base import SampleNoise
from appa_lite.training.data import LatentWindows
from appa_lite.training.emulator import EmulatorRecipe, EmulatorTraining, States, set_scale


@dataclass
class FlowTraining(EmulatorTraining):
    """Conditional flow matching of scaled residuals r_1 = (x_{t+1} - m) / s (Couairon et al. 2024; Lipman et al. 2023).

    loss = E |v((1 - u) r_0 + u r_1, u) - (r_1 - r_0)|^2,    r_0 ~ N(0, I), u ~ U(0, 1)
    """

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        known, target, forcing = self.split(batch, 1)
        time, begin = noise.stratified(), noise.normal(target.shape[2:])
        return {"loss": self.mean(model(known, target[:, 0], begin, time, None if forcing is None else forcing[:, 0]).square())}

    def validate(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        """The loss; for a residual that is white noise nothing below one can be learned."""
        return self.mean_loss(batches)


@dataclass(frozen=True)
class FlowRecipe(EmulatorRecipe):
    """The flow, on the model directory of a trained ``trainable=deterministic``, which the key ``autoencoder`` names.

    Args: those of ``EmulatorRecipe``.
    """

    def network(self, states: States) -> ResidualFlow:
        mean = states.emulator
        if not isinstance(mean, DeterministicModel):
            raise UserError("trainable=flow_residual needs autoencoder=DIR, the model directory of a trained trainable=deterministic")
        if mean.history > self.history:
            raise UserError(f"history={self.history} is shorter than that of the mean model: give trainable.history={mean.history}")
        config = {name: value for name, value in mean.config.items() if not name.startswith("_")}
        model = ResidualFlow(states.shape, config, self.history, states.periodic, states.forcings, self.backbone)
        model.mean_model.load_state_dict(mean.state_dict())
        return model

    def training(self, model: ResidualFlow, space: Checkpoint, settings: dict) -> FlowTraining:
        return FlowTraining(model, space, settings, self.half)

    def measure(self, model: ResidualFlow, windows: LatentWindows, held: LatentWindows) -> None:
        """The scale of residuals, on windows that the mean was not trained on: elsewhere they are smaller if it overfits."""
        chosen = torch.linspace(0, len(held) - 1, min(1024, len(held))).long().tolist()
        residuals = []
        for part in range(0, len(chosen), 64):
            items = [held[i] for i in chosen[part : part + 64]]
            z = torch.stack([item["latents"] for item in items])
            forcing = torch.stack([item["forcing"] for item in items])[:, self.history - 1] if "forcing" in items[0] else None
            residuals.append(z[:, self.history] - model.forecast_mean(z[:, : self.history], forcing))
        set_scale(model, torch.cat(residuals))
