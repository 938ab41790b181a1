"""Averages of the weights along the training."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


def power_exponent(std: float) -> float:
    """The exponent gamma of a power-function average whose profile t^gamma has relative standard deviation ``std``.

    std = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))) (Karras et al. 2024, EDM2, arXiv:2312.02696, equation 123).
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"the relative standard deviation of a power-function average lies in (0, 0.288), got {std}")
    t = std**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


class WeightAverage:
    """An exponential moving average of the parameters of a model; buffers are copied.

    With ``decay`` None the average is EDM2's power function: decay (1 - 1/step)^(gamma + 1) at step 1, 2, ...; its
    memory is a fixed fraction of the steps done, so it needs no horizon and no warm-up.
    """

    def __init__(self, model: nn.Module, std: float = 0.05, decay: float | None = None):
        self.model = model
        self.decay = decay
        self.gamma = power_exponent(std)
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def beta(self, step: int) -> float:
        """The weight of the past at ``step`` (the first update is step 1)."""
        if self.decay is not None:
            return min(self.decay, step / (step + 9))
        return (1 - 1 / step) ** (self.gamma + 1)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights that ``step`` optimiser steps have reached."""
        averages = [self.average[name] for name in self._trained]
        torch._foreach_lerp_(averages, list(self._trained.values()), 1 - self.beta(step))

    @torch.no_grad()
    def load(self, average: dict[str, Tensor]) -> None:
        """Takes the average from what `state` returned."""
        for name, value in self.average.items():
            value.copy_(average[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the model holds the averaged weights."""
        kept = {name: p.detach().clone() for name, p in self._trained.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self._trained.items():
            p.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """The average, complete with the current buffers and frozen parameters."""
        return {name: self.average[name] if name in self._trained else v.detach() for name, v in self.model.state_dict().items()}
