"""The functional of an event in units in which guidance is nearly right: the scores of a Gaussianised variable."""

from collections.abc import Callable

import torch
from torch import Tensor

from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.margins import Margin
from appa_lite.observations.event import Event

LEAK = 0.05  # slope of what lies below a point mass, over that of the margin's continuation


def event_scores(
    event: Event, threshold: float, checkpoint: Checkpoint, times: Tensor, asked: Callable[[Tensor], Tensor] = lambda fields: fields
) -> tuple[Callable[[Tensor], Tensor], float]:
    """S' of latents (B, T, Z, h, w) -> (B,), and s', such that S' > s' is the event.

    Guidance takes S for linear over the spread that the noise leaves. Of a Gaussianised variable x = F^{-1}(Phi(h)) it is
    far from that: flat where it is dry, steep in the tail. There S' is the score z(S) of S, which is h itself for the
    value at a cell or a maximum; and dry cells go on below zero with a small slope, z with the inverse of it, so that
    dry fields have a slope towards rain. An event is the same in any increasing function of S, but for that slope.

    Args:
        threshold: s, with the sign of ``event.functional``; times: seconds of all fields (T,);
        asked: those fields to the ones that the event is of.
    """
    normalizer, autoencoder = checkpoint.normalizer, checkpoint.autoencoder
    names, sign = list(checkpoint.spec.names), 1 if event.above else -1
    lowest = {int(i): margin.values[0] for i, margin in normalizer.margins.items() if float(margin.mass)}

    def fields(latents: Tensor) -> Tensor:
        decoded = normalizer.inverse(autoencoder.decode(latents), times, continued=True)
        channels = list(decoded.unbind(-3))
        for i, least in lowest.items():
            channels[i] = torch.where(channels[i] > least, channels[i], least + LEAK * (channels[i] - least))
        return asked(torch.stack(channels, dim=-3))

    margin = normalizer.margins[str(names.index(event.variable))] if _scored(event, checkpoint) else None
    if margin is None:
        return lambda z: event.functional(fields(z)), threshold
    score = lambda values: sign * _score(margin, sign * values)  # noqa: E731
    return lambda z: score(event.functional(fields(z))), float(score(torch.tensor(threshold, dtype=torch.float64)))


def _scored(event: Event, checkpoint: Checkpoint) -> bool:
    names = list(checkpoint.spec.names)
    return event.variable in names and str(names.index(event.variable)) in checkpoint.normalizer.margins


def _score(margin: Margin, values: Tensor) -> Tensor:
    """z of values, differentiable; below a point mass the inverse of the leak."""
    x = values.detach()
    inner = torch.ones_like(x)
    if float(margin.mass):
        least = margin.values[0].to(x)
        inner = torch.where(x > least, inner, 1 / LEAK)
        x = least + inner * (x - least)
    z = margin.score(x)
    return z + (values - values.detach()) * inner / margin.slope_continued(z)
