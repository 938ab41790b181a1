"""What a laboratory observes: which cells, or which combinations of them, and with what errors."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.random import generator

Score = Callable[[Tensor, Tensor, float, torch.Generator], Tensor]


def points(u: Tensor, v: Tensor, fraction: float, draw: torch.Generator) -> Tensor:
    """Cells at random."""
    return torch.rand(u.shape, generator=draw, dtype=u.dtype)


def clouds(u: Tensor, v: Tensor, fraction: float, draw: torch.Generator) -> Tensor:
    """A smooth random field: cells are seen where there are no clouds."""
    waves = torch.randint(-4, 5, (2, 24), generator=draw).to(u)
    phase = 2 * math.pi * torch.rand(24, generator=draw, dtype=u.dtype)
    weight = torch.randn(24, generator=draw, dtype=u.dtype) / (1 + waves.square().sum(0))
    return (weight * torch.cos(math.pi * (u[..., None] * waves[0] + v[..., None] * waves[1]) + phase)).sum(-1)


def tracks(u: Tensor, v: Tensor, fraction: float, draw: torch.Generator) -> Tensor:
    """Distance to the nearest of parallel slanting lines, as many as are one cell wide."""
    spacing = 1 / max(1.0, round(fraction * u.shape[-1]))
    across = u * math.cos(0.3) + v * math.sin(0.3) + torch.rand((), generator=draw, dtype=u.dtype)
    return (torch.remainder(across, spacing) - spacing / 2).abs()


def swath(u: Tensor, v: Tensor, fraction: float, draw: torch.Generator) -> Tensor:
    """Distance to a diagonal."""
    return (u - v + 0.2 * torch.rand((), generator=draw, dtype=u.dtype) - 0.1).abs()


DESIGNS: dict[str, Score] = {f.__name__: f for f in (points, clouds, tracks, swath)}


def cells(design: str, shape: tuple[int, ...], rows: int | None, fraction: float, seed: int) -> Tensor:
    """H (M, n): picks the cells of lowest score in each frame of trajectories (T, Z, h, w), ``rows`` in all or a fraction."""
    if design not in DESIGNS:
        raise UserError(f"design={design} is not known: expected {', '.join(DESIGNS)} or projection")
    frames, per_frame = shape[0], math.prod(shape[1:])
    count = rows / frames if rows is not None else fraction * per_frame
    if not 0 < count <= per_frame:
        raise UserError(f"design={design} observes more than nothing and at most {per_frame} cells of a frame, found {count:g}")
    count, share = max(1, round(count)), count / per_frame
    v, u = torch.meshgrid(*((torch.arange(k, dtype=torch.float64) + 0.5) / k for k in shape[-2:]), indexing="ij")
    chosen = []
    for frame in range(frames):
        score = DESIGNS[design](u, v, share, generator(seed, "laboratory", design, frame)).flatten()
        chosen.append(frame * per_frame + torch.argsort(score, stable=True)[:count].sort().values)
    matrix = torch.zeros(frames * count, frames * per_frame, dtype=torch.float64)
    matrix[torch.arange(frames * count), torch.cat(chosen)] = 1
    return matrix


def projection(size: int, rows: int, seed: int) -> Tensor:
    """A (M, n) with random directions and singular values U(0, 1): the operator of Cardoso et al. (2024, MCGDiff)."""
    if not 1 <= rows <= size:
        raise UserError(f"design=projection needs rows between 1 and {size}, found {rows}")
    draw = generator(seed, "laboratory", "projection")
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=draw, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(size, rows, generator=draw, dtype=torch.float64))
    return left @ torch.diag(torch.rand(rows, generator=draw, dtype=torch.float64)) @ right.T


def errors(rows: int, low: float | None, high: float | None, largest: float, seed: int) -> Tensor:
    """Standard deviations (M,): ``low``, log-uniform between ``low`` and ``high``, or one U(0, ``largest``) for all."""
    draw = generator(seed, "laboratory", "errors")
    if low is None:
        return torch.full((rows,), largest, dtype=torch.float64) * torch.rand((), generator=draw, dtype=torch.float64)
    if not 0 < low <= (low if high is None else high):
        raise UserError(f"error={low} must be positive and at most error_max={high}")
    ratio = 1.0 if high is None else high / low
    return low * ratio ** torch.rand(rows, generator=draw, dtype=torch.float64)
