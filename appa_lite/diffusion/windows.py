"""Composition of windows: a denoiser of a long trajectory from one of short windows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from appa_lite.diffusion.base import Denoiser


@dataclass(frozen=True)
class WindowLayout:
    """Windows of ``window`` frames that cover ``frames`` frames, neighbours sharing at least ``overlap``.

    The blend weights rise and fall linearly inside each window and sum to one at every frame.
    """

    frames: int
    window: int
    overlap: int

    def __post_init__(self):
        if self.frames < self.window:
            raise ValueError(f"a trajectory of {self.frames} frames is shorter than the window of {self.window}: lengthen it")
        if not 0 <= self.overlap < self.window:
            raise ValueError(f"the overlap must be in [0, {self.window}), got {self.overlap}")

    def starts(self) -> list[int]:
        """First frame of each window, evenly spread."""
        stride, last = self.window - self.overlap, self.frames - self.window
        count = -(-last // stride) + 1
        return [round(i * last / max(count - 1, 1)) for i in range(count)]

    def weights(self) -> Tensor:
        """(windows, window): how much each window counts at each of its frames."""
        ramp = torch.minimum(torch.arange(1, self.window + 1), torch.arange(self.window, 0, -1)).double()
        total = torch.zeros(self.frames, dtype=torch.float64)
        for start in self.starts():
            total[start : start + self.window] += ramp
        return torch.stack([ramp / total[start : start + self.window] for start in self.starts()])


def compose_windows(
    correction: Callable[[Tensor, Tensor, list[int]], Tensor], far: Denoiser, layout: WindowLayout, batch: int = 16
) -> Denoiser:
    """A denoiser of the whole trajectory, from a linear one of all frames and a learned correction of windows.

        D(x) = G(x) + sum_w b_w [D_w(x_w) - G_w(x_w)]

    G sees the whole period, so that the long correlations which windows cut (the noised field is not Markov) are kept
    at every noise level; the windows add what is not linear. With one window this is the plain denoiser. Windows and
    members are computed ``batch`` at a time; under autograd each batch is computed again in the backward pass, so
    that memory does not grow with the number of windows.

    Args:
        correction: (x_w (n, window, ...), sigma (), first frames of the n windows) -> D_w - G_w.
        far: G, the linear denoiser of trajectories (B, frames, ...).
        layout: the windows.
        batch: windows computed at once.
    """
    starts, weights = layout.starts(), layout.weights()

    def composed(x: Tensor, sigma: Tensor) -> Tensor:
        members = x.shape[0]
        pairs = [(m, w) for w in range(len(starts)) for m in range(members)]
        mean = far(x, sigma)
        for begin in range(0, len(pairs), batch):
            chunk = pairs[begin : begin + batch]
            first = [starts[w] for _, w in chunk]
            windows = torch.stack([x[m, s : s + layout.window] for (m, _), s in zip(chunk, first, strict=True)])
            if torch.is_grad_enabled() and len(pairs) > batch:
                parts = checkpoint(correction, windows, sigma, first, use_reentrant=False)
            else:
                parts = correction(windows, sigma, first)
            mean = _add(mean, parts, chunk, first, weights, layout.window)
        return mean

    return composed


def _add(mean: Tensor, parts: Tensor, chunk: list[tuple[int, int]], first: list[int], weights: Tensor, window: int) -> Tensor:
    """mean + the weighted windows at their places, as one differentiable scatter."""
    members = torch.tensor([m for m, _ in chunk], device=mean.device)
    frames = torch.tensor(first, device=mean.device)[:, None] + torch.arange(window, device=mean.device)
    scale = weights[[w for _, w in chunk]].to(mean).reshape(len(chunk), window, *[1] * (mean.ndim - 2))
    flat = (members[:, None] * mean.shape[1] + frames).flatten()
    return mean.flatten(0, 1).index_add(0, flat, (scale * parts).flatten(0, 1)).reshape(mean.shape)
