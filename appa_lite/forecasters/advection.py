"""Advection: what is there drifts on, unchanged (Lagrangian persistence), the baseline of rain nowcasts."""

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.forecasters.base import Forecaster, Progress, silent

ITERATIONS = 20  # of Levenberg and Marquardt, at each scale
RIDGE = 1e-9  # of the normal equations, over their largest diagonal element
Axes = Sequence[bool]


@final
class Advection(Forecaster):
    """x_{t+k}(r) = x_t(r - d_k(r)), d_k the way that a motion v, steady and estimated from the known frames, goes in k frames.

    .. code-block:: text

        motion           min_v  mean_r,t (f_{t+1}(r) - f_t(r - v(r)))^2 / mean |grad f|^2  +  smoothness mean |difference of v|^2
        extrapolation    d_{k+1}(r) = d_k(r) + v(r - d_k(r) - v / 2)

    v is bilinear between control points, of which neighbours are penalised for differing: variational echo tracking (Laroche
    and Zawadzki 1995, https://doi.org/10.1175/1520-0426(1995)012<0721:ROHWFS>2.0.CO;2), from the best uniform shift by cross-
    correlation, with twice as many sectors at each scale. f = asinh(x / s), s the standard deviation of each variable, lets
    weak rain count beside heavy rain; all variables share one motion. The field is interpolated once, however long the lead
    (Germann and Zawadzki 2002, https://doi.org/10.1175/1520-0493(2002)130<2859:SDOTPO>2.0.CO;2). What comes from outside a
    bounded grid is the nearest edge's.

    Args:
        sectors: between control points, along each axis, at the finest scale.
        smoothness: weight of the differences between neighbouring control points.
        periodic: (rows, columns) wrap around.
    """

    def __init__(self, sectors: int = 4, smoothness: float = 0.1, periodic: Axes = (False, False)):
        if sectors < 1 or smoothness < 0:
            raise UserError(f"advection needs sectors >= 1 and smoothness >= 0, found {sectors} and {smoothness}")
        self.sectors, self.smoothness, self.periodic = sectors, smoothness, tuple(periodic)

    def forecast(
        self, initial: Tensor, times: np.ndarray, frames: int, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        if initial.shape[1] < 2:
            raise UserError(
                "advection needs two frames or more up to the initial time to see a motion: give history=2, and a file with them"
            )
        rows = []
        for i in range(min(len(members), len(initial))):
            known = initial[i].double()
            rows.append(extrapolate(known[-1], motion(known, self.sectors, self.smoothness, self.periodic), frames, self.periodic))
            progress("members", i + 1, len(members))
        return torch.stack([rows[i % len(rows)] for i in range(len(members))]).to(initial)


def motion(known: Tensor, sectors: int, smoothness: float, periodic: Axes) -> Tensor:
    """The motion (2, H, W), rows and columns per frame, of frames (n, C, H, W)."""
    scale = known.std((0, 2, 3), keepdim=True)
    f = torch.asinh(known / torch.where(scale > 0, scale, 1.0))
    shape = f.shape[-2:]
    v = _best_shift(f)[:, None, None].expand(2, *shape)
    scales = [1]
    while 2 * scales[-1] <= sectors:
        scales.append(2 * scales[-1])
    for pieces in scales:
        v = v + _increment(f, v, _hats(shape, pieces).to(f), smoothness, periodic)
    return v


def _best_shift(f: Tensor) -> Tensor:
    """The uniform shift (2,) of whole cells with the largest correlation between successive frames, padded with their mean."""
    anomaly = f - f.mean((0, 2, 3), keepdim=True)
    size = [2 * n for n in f.shape[-2:]]
    spectrum = torch.fft.rfft2(anomaly, s=size)
    correlation = torch.fft.irfft2((spectrum[1:] * spectrum[:-1].conj()).sum((0, 1)), s=size)
    best = np.unravel_index(int(correlation.argmax()), size)
    return torch.tensor([float(b if b < n else b - 2 * n) for b, n in zip(best, f.shape[-2:], strict=True)]).to(f)


def _hats(shape: Sequence[int], pieces: int) -> Tensor:
    """Bilinear functions (P, H, W) of control points at the corners of ``pieces`` x ``pieces`` sectors, that sum to one."""
    axes = []
    for n in shape:
        points = min(pieces, n - 1) + 1
        place = torch.linspace(0, points - 1, n, dtype=torch.float64)
        axes.append((1 - (place - torch.arange(points)[:, None]).abs()).clamp(min=0))
    return torch.einsum("ay,bx->abyx", *axes)


def _increment(f: Tensor, start: Tensor, hats: Tensor, smoothness: float, periodic: Axes) -> Tensor:
    """What Levenberg and Marquardt add to a motion (2, H, W), as sums of ``hats`` (a, b, H, W)."""
    a, b = hats.shape[:2]
    basis = hats.flatten(0, 1)
    differences = _differences(a, b).to(f)
    at_points = torch.einsum("dyx,pyx->dp", start, basis) / basis.sum((1, 2))
    power = sum(g.square().mean() for g in _gradient(f, periodic))
    if float(power) == 0:
        return torch.zeros_like(start)
    weight = smoothness / max(len(differences), 1)
    penalty = weight * torch.block_diag(*2 * [differences.T @ differences])

    def cost(c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        v = start + torch.einsum("dp,pyx->dyx", c, basis)
        source = _source(v)
        inside = _inside(source, f.shape[-2:], periodic).to(f)
        share = inside.sum().clamp(min=1) * (len(f) - 1) * power
        residual = (f[1:] - sample(f[:-1], source, periodic)) * inside
        smooth = (differences @ (at_points + c).T).square().sum() * weight
        return residual.square().sum() / share + smooth, residual, source, share

    c, damping = torch.zeros(2, a * b).to(f), 1e-3
    value, residual, source, share = cost(c)
    for _ in range(ITERATIONS):
        slopes = [sample(g[:-1], source, periodic) for g in _gradient(f, periodic)]
        pull = torch.stack([(residual * s).sum((0, 1)) for s in slopes])
        inside = _inside(source, f.shape[-2:], periodic).to(f)
        metric = torch.stack([torch.stack([(s * t).sum((0, 1)) for t in slopes]) for s in slopes]) * inside
        normal = torch.einsum("pyx,deyx,qyx->dpeq", basis, metric, basis).reshape(2 * a * b, -1) / share + penalty
        right = -torch.einsum("dyx,pyx->dp", pull, basis).flatten() / share - penalty @ (at_points + c).flatten()
        diagonal = normal.diagonal()
        step = torch.linalg.solve(normal + torch.diag(damping * diagonal + RIDGE * diagonal.max()), right)
        tried = cost(c + step.reshape(2, -1))
        if tried[0] < value:
            c, damping = c + step.reshape(2, -1), damping / 4
            value, residual, source, share = tried
        else:
            damping *= 8
        if float(step.abs().max()) < 1e-9 or damping > 1e8:
            break
    return torch.einsum("dp,pyx->dyx", c, basis)


def _differences(a: int, b: int) -> Tensor:
    """Between neighbouring points of an a x b grid, (pairs, a b)."""
    place = torch.arange(a * b).reshape(a, b)
    pairs = torch.cat(
        [torch.stack([place[1:].flatten(), place[:-1].flatten()], 1), torch.stack([place[:, 1:].flatten(), place[:, :-1].flatten()], 1)]
    )
    one = torch.eye(a * b, dtype=torch.float64)
    return one[pairs[:, 0]] - one[pairs[:, 1]]


def _gradient(f: Tensor, periodic: Axes) -> list[Tensor]:
    """Centred differences (..., H, W) along rows and columns, one-sided at edges; zero along an axis of one cell."""
    out = []
    for dim, wraps in zip((-2, -1), periodic, strict=True):
        n = f.shape[dim]
        place = torch.arange(n, device=f.device)
        after, before = ((place + 1) % n, (place - 1) % n) if wraps else ((place + 1).clamp(max=n - 1), (place - 1).clamp(min=0))
        width = torch.full((n,), 2.0) if wraps else (after - before).clamp(min=1)
        width = width.to(f).reshape(-1, *(1,) * (-1 - dim))
        out.append((f.index_select(dim, after) - f.index_select(dim, before)) / width)
    return out


def _source(displacement: Tensor) -> Tensor:
    """Where air that arrives at every cell comes from: r - d, (2, H, W) in cells."""
    grid = torch.meshgrid(*(torch.arange(n, device=displacement.device) for n in displacement.shape[1:]), indexing="ij")
    return torch.stack(grid).to(displacement) - displacement


def _inside(source: Tensor, shape: Sequence[int], periodic: Axes) -> Tensor:
    within = [
        torch.ones_like(s, dtype=torch.bool) if p else (s >= 0) & (s <= n - 1) for s, n, p in zip(source, shape, periodic, strict=True)
    ]
    return within[0] & within[1]


def sample(f: Tensor, source: Tensor, periodic: Axes) -> Tensor:
    """Bilinear values (..., H, W) of fields at places (2, H, W) in cells; beyond a bounded axis those of its edge."""
    corners = []
    for place, n, wraps in zip(source, f.shape[-2:], periodic, strict=True):
        place = place if wraps else place.clamp(0, n - 1)
        low = place.floor()
        fraction, low = place - low, low.long()
        ends = [(low + i) % n if wraps else (low + i).clamp(max=n - 1) for i in (0, 1)]
        corners.append([(ends[0], 1 - fraction), (ends[1], fraction)])
    return sum(f[..., y, x] * (wy * wx) for y, wy in corners[0] for x, wx in corners[1])


def extrapolate(state: Tensor, v: Tensor, frames: int, periodic: Axes) -> Tensor:
    """The state (C, H, W) after 1, ..., ``frames`` frames of the motion v (2, H, W): (frames, C, H, W)."""
    displacement, out = torch.zeros_like(v), []
    for _ in range(frames):
        middle = displacement + 0.5 * sample(v, _source(displacement), periodic)
        displacement = displacement + sample(v, _source(middle), periodic)
        out.append(sample(state, _source(displacement), periodic))
    return torch.stack(out)
