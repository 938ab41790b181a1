"""Training of the spatiotemporal autoencoder."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from appa_lite.core.fields import FieldSpec
from appa_lite.models.normalizer import Normalizer
from appa_lite.training.base import SampleNoise, Trainable


class AutoencoderTraining(Trainable):
    """Weighted squared error of reconstructed windows, in units of each variable's climatological standard deviation.

        loss = sum_c w_c mean((x_c - decode(encode(x))_c)^2) / sum_c w_c       over the cells that exist

    Args:
        model: the autoencoder; normalizer: fitted, frozen; spec: of the data; weights: w_c by variable name (default 1).
    """

    def __init__(self, model: nn.Module, normalizer: Normalizer, spec: FieldSpec, weights: dict[str, float] | None = None):
        self.model, self.normalizer, self.spec = model, normalizer.requires_grad_(False), spec
        values = torch.tensor([float((weights or {}).get(name, 1.0)) for name in spec.names])
        self.weights = values / values.sum()
        self.mask = spec.mask_tensor()

    def to(self, device: torch.device | str) -> None:
        self.model.to(device)
        self.normalizer.to(device)
        self.weights, self.mask = self.weights.to(device), self.mask.to(device)

    def errors(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean squared error and mean square of normalised anomalies, per variable: (C,), (C,)."""
        x = self.normalizer(batch["fields"], batch["time"])
        return self._mean_square(model(x) - x), self._mean_square(x)

    def _mean_square(self, x: Tensor) -> Tensor:
        return (x.square() * self.mask).sum((0, 1, 3, 4)) / (self.mask.sum() * x.shape[0] * x.shape[1])

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        error, _ = self.errors(model, batch)
        return {"loss": (self.weights * error).sum()}

    def validate(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        """Root-mean-square error per variable, in per cent of its standard deviation."""
        totals = [torch.stack(self.errors(self.model, batch)).double().cpu() for batch, _ in batches]
        error, power = torch.stack(totals).mean(0)
        return {f"error_{name}_percent": float(100 * (e / p).sqrt()) for name, e, p in zip(self.spec.names, error, power, strict=True)}

    def export(self, directory: Path) -> None:
        self.model.save_pretrained(directory)
