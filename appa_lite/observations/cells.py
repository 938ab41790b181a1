"""Where positions and times fall on a grid: fractional indices, the four corners of bilinear interpolation, frames."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, to_seconds

USED, OUTSIDE_PERIOD, OUTSIDE_DOMAIN, MISSING_CELL = range(4)
REASONS = {OUTSIDE_PERIOD: "outside the period", OUTSIDE_DOMAIN: "outside the domain", MISSING_CELL: "over a missing cell"}
EDGE = 1e-6  # cells: tolerance at the edges of the domain and of the period, and of what counts as on a frame
POWERS = {"linear": 0, "norm": 1, "square": 2}  # of the norm of the terms of a derived quantity
_DY, _DX = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])


def fractional(coordinates: Sequence[float], positions: np.ndarray, periodic: bool = False) -> np.ndarray:
    """Positions counted in cells: i at the i-th coordinate, linear between coordinates and beyond the ends."""
    c, n = np.asarray(coordinates, dtype=np.float64), len(coordinates)
    if n == 1:
        return positions - c[0]
    if periodic:
        positions = c[0] + np.mod(positions - c[0], (c[-1] - c[0]) / (n - 1) * n)
    cell = np.clip(np.searchsorted(c, positions, side="right") - 1, 0, n - 2)
    return cell + (positions - c[cell]) / (c[cell + 1] - c[cell])


def coordinate(coordinates: Sequence[float], cells: np.ndarray) -> np.ndarray:
    """The inverse of `fractional`: coordinates of fractional cells."""
    c = np.asarray(coordinates, dtype=np.float64)
    if len(c) == 1:
        return c[0] + cells
    cell = np.clip(np.floor(cells).astype(np.int64), 0, len(c) - 2)
    return c[cell] + (cells - cell) * (c[cell + 1] - c[cell])


def table_positions(grid: Grid, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (y, x), each (N,), of the rows of a table; longitudes in whichever convention the grid uses.

    Raises:
        UserError: the table lacks a coordinate of the grid.
    """
    missing = [d for d in grid.dims if d not in table]
    if missing:
        raise UserError(f"the observations have no {' and '.join(missing)}: expected columns {', '.join(grid.dims)}")
    x = table[grid.dims[-1]].to_numpy(np.float64)
    y = table[grid.dims[0]].to_numpy(np.float64) if len(grid.dims) == 2 else np.full(len(x), grid.y[0])
    if grid.dims[-1] == "longitude":
        west = (grid.x[0] + grid.x[-1]) / 2 - 180
        x = west + np.mod(x - west, 360)
    return y, x


def inside(grid: Grid, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bool: positions, in cells, that no cell edge of the domain leaves out; NaN is outside."""
    within = [
        np.isfinite(p) if wraps else (p >= -0.5 - EDGE) & (p <= n - 0.5 + EDGE)
        for p, n, wraps in zip((y, x), grid.shape, grid.periodic, strict=True)
    ]
    return within[0] & within[1]


def locate_cells(grid: Grid, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in cells (fractional indices), from coordinates."""
    return fractional(grid.y, y, grid.periodic[0]), fractional(grid.x, x, grid.periodic[1])


def corners(
    spec: FieldSpec, y: np.ndarray, x: np.ndarray, shift: tuple[float, float], reach: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells and weights that interpolate a variable bilinearly.

    Weights are renormalised over the corners that exist; where none does, the nearest existing cell within ``reach``
    takes weight one.

    Args:
        y, x: (N,), fractional cells (`locate_cells`).
        shift: position of the variable's values relative to the cell centres, in cells.
        reach: cells.

    Returns:
        index (N, 4) into H*W, weight (N, 4), and bool (N,): False where no cell is near enough.
    """
    y, x = _snap(y - shift[0]), _snap(x - shift[1])
    south, west = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    wy, wx = (y - south)[:, None], (x - west)[:, None]
    exists = spec.mask_tensor().numpy()
    index, there = _cells(spec.grid, exists, south[:, None] + _DY, west[:, None] + _DX)
    weight = np.where(_DY, wy, 1 - wy) * np.where(_DX, wx, 1 - wx) * there
    total = weight.sum(1)
    found = total > EDGE
    for i in np.flatnonzero(~found):
        cell = _nearest(spec.grid, exists, y[i], x[i], reach)
        if cell is not None:
            index[i], weight[i], total[i], found[i] = cell, (1, 0, 0, 0), 1, True
    return index, weight / np.where(found, total, 1)[:, None], found


def _snap(cells: np.ndarray) -> np.ndarray:
    """On a cell exactly where rounding left it beside one."""
    return np.where(np.abs(cells - np.round(cells)) < 1e-9, np.round(cells), cells)


def _cells(grid: Grid, exists: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat index of cells, wrapped or clipped into the grid, and whether they exist."""
    there, wrapped = np.ones(np.broadcast(rows, columns).shape, dtype=bool), []
    for cells, n, wraps in zip((rows, columns), grid.shape, grid.periodic, strict=True):
        there &= (cells >= 0) & (cells < n) | wraps
        wrapped.append(np.mod(cells, n) if wraps else np.clip(cells, 0, n - 1))
    return wrapped[0] * grid.shape[1] + wrapped[1], there & exists[wrapped[0], wrapped[1]]


def _nearest(grid: Grid, exists: np.ndarray, y: float, x: float, reach: float) -> int | None:
    """Flat index of the nearest existing cell within ``reach`` cells, or None."""
    around = np.arange(-int(np.ceil(reach)) - 1, int(np.ceil(reach)) + 2)
    rows, columns = np.meshgrid(int(np.round(y)) + around, int(np.round(x)) + around, indexing="ij")
    index, there = _cells(grid, exists, rows, columns)
    distance = np.where(there, np.hypot(rows - y, columns - x), np.inf)
    best = distance.argmin()
    return int(index.flat[best]) if distance.flat[best] <= reach + EDGE else None


def bracket(spec: FieldSpec, times: np.ndarray, when: np.ndarray, interpolation: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The frames that interpolate in time: y(t) = (1 - fraction) x[lower] + fraction x[lower + 1].

    ``linear`` needs t within [times[0], times[-1]]; ``nearest`` takes every t within half a step of a frame, closed
    on the left, so that consecutive periods share no row.

    Args:
        times: (T,) datetime64, frames. when: (N,) datetime64.

    Returns:
        lower (N,) int, fraction (N,), and bool (N,): inside the period.

    Raises:
        UserError: unknown interpolation.
    """
    if interpolation not in ("linear", "nearest"):
        raise UserError(f"time_interpolation must be linear or nearest, got '{interpolation}'")
    frames, seconds = to_seconds(np.asarray(times)), to_seconds(when)
    t = fractional(frames, seconds) if len(frames) > 1 else (seconds - frames[0]) / spec.step
    last = len(frames) - 1
    if interpolation == "nearest":
        known = ~np.isnat(when) & (t >= -0.5) & (t < last + 0.5)
        return np.clip(np.floor(t + 0.5), 0, last).astype(np.int64), np.zeros(len(t)), known
    known = ~np.isnat(when) & (t >= -EDGE) & (t <= last + EDGE)
    t = np.clip(t, 0, last)
    t = np.where(np.abs(t - np.round(t)) < EDGE, np.round(t), t)
    lower = np.floor(t).astype(np.int64)
    return lower, t - lower, known


def in_time(
    spec: FieldSpec, channel: int, lower: np.ndarray, fraction: np.ndarray, index: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Space weights (N, J) to space-time weights (N, 2 J), indices into T*C*H*W."""
    channels, height, width = spec.shape
    frames = np.stack([lower, lower + (fraction > 0)], axis=1)
    index = ((frames * channels + channel) * (height * width))[:, :, None] + index[:, None, :]
    weight = np.stack([1 - fraction, fraction], axis=1)[:, :, None] * weight[:, None, :]
    return index.reshape(len(lower), -1), weight.reshape(len(lower), -1)


def collate(
    spec: FieldSpec, terms: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], lower: np.ndarray, fraction: np.ndarray,
    norm: np.ndarray,
) -> dict:  # fmt: skip
    """Arguments of `WeightedCells`, from terms (row (n,), index (n, J), weight (n, J)) with J of their own.

    Entries of weight zero are moved last, cut or pointed at a cell that counts, so no missing cell is ever read.
    """
    terms = terms or [(np.zeros(0, np.int64), np.zeros((0, 1), np.int64), np.zeros((0, 1)))]
    packed = []
    for row, index, weight in terms:
        order = np.argsort(weight == 0, axis=1, kind="stable")
        index, weight = np.take_along_axis(index, order, 1), np.take_along_axis(weight, order, 1)
        width = max(1, int((weight != 0).sum(1).max(initial=0)))
        packed.append((row, np.where(weight == 0, index[:, :1], index)[:, :width], weight[:, :width]))
    width = max(weight.shape[1] for _, _, weight in packed)
    row = np.concatenate([row for row, _, _ in packed])
    order = np.argsort(row, kind="stable")
    index = np.concatenate([np.pad(i, ((0, 0), (0, width - i.shape[1])), mode="edge") for _, i, _ in packed])[order]
    weight = np.concatenate([np.pad(w, ((0, 0), (0, width - w.shape[1]))) for _, _, w in packed])[order]
    upper = lower + (fraction > 0)
    arrays = {
        "index": index, "weight": weight, "row": row[order], "norm": norm, "offset": np.zeros(len(lower)),
        "frame": np.where(fraction > 0.5, upper, lower), "first": lower, "last": upper,
    }  # fmt: skip
    return {**{k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}, "frame_size": int(np.prod(spec.shape))}


def inputs(spec: FieldSpec, name: str) -> tuple[list[tuple[int, float]], int]:
    """(channel, coefficient) of what ``name`` is computed from, and the power of their norm: 0 for a sum, 1, or 2 for squares."""
    if name in spec.names:
        return [(spec.index(name), 1.0)], 0
    quantity = spec.quantity(name)
    pairs = zip(quantity.inputs, quantity.coefficients, strict=True)
    return [(spec.index(i), c) for i, c in pairs], POWERS[quantity.kind]
