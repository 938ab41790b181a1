"""Averages of the weights along the training."""

import numpy as np
import torch
from torch import Tensor


def power_exponent(std: float) -> float:
    """The exponent gamma of a power-function average whose profile t^gamma has relative standard deviation ``std``.

    std = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))) (Karras et al. 2024, EDM2, arXiv:2312.02696, equation 123).
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"the relative standard deviation of a power-function average lies in (0, 0.288), got {std}")
    t = std**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


class WeightAverage:
    """An exponential moving average of the weights that this process holds, whole or in part: it is taken element by element.

    With ``decay`` None the average is EDM2's power function: decay (1 - 1/step)^(gamma + 1) at step 1, 2, ...; its
    memory is a fixed fraction of the steps done, so it needs no horizon and no warm-up.

    Args:
        weights: the tensors to average, by name, as they are before the first step.
    """

    def __init__(self, weights: dict[str, Tensor], std: float = 0.05, decay: float | None = None):
        self.decay = decay
        self.gamma = power_exponent(std)
        self.average = {name: value.detach().clone() for name, value in weights.items()}

    def beta(self, step: int) -> float:
        """The weight of the past at ``step`` (the first update is step 1)."""
        if self.decay is not None:
            return min(self.decay, step / (step + 9))
        return (1 - 1 / step) ** (self.gamma + 1)

    @torch.no_grad()
    def update(self, step: int, weights: dict[str, Tensor]) -> None:
        """Moves the average towards the weights that ``step`` optimiser steps have reached."""
        torch._foreach_lerp_(list(self.average.values()), [weights[name] for name in self.average], 1 - self.beta(step))
