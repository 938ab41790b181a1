"""Leading empirical orthogonal functions of a long series of frames, whatever the size of a frame."""

from collections.abc import Iterator

import torch
from torch import Tensor

from appa_lite.core.random import generator

LARGEST = 8192  #: rows of the largest matrix that is diagonalised whole
BLOCK = 2**26  #: numbers that are taken to float64 at once
ITERATIONS = 6  #: of the subspace: directions as small as 0.7 of the last kept one lose another factor 0.7^12 against it


def leading_modes(series: Tensor, count: int, taper: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` leading eigenvectors (D, K) of C = sum x x^T / (N T), orthonormal; their eigenvalues (K,); the others' sum.

    From C itself where D is at most ``LARGEST``; else, where the frames are so few, from their products with each other (the
    method of snapshots, Sirovich 1987), which is exact too: C X^T u = lambda X^T u if X X^T u / (N T) = lambda u. Else by subspace
    iteration from random directions (Halko, Martinsson and Tropp 2011, alg. 4.4), which passes over the frames a few times and holds
    two matrices (D, 1.1 K). All in float64.

    Args:
        series: trajectories (N, T, D) of anomalies; taper: (D, D), by which C is multiplied entry by entry, and which therefore needs
            the matrix whatever its size.
    """
    frames, size = series.shape[0] * series.shape[1], series.shape[2]
    if size <= LARGEST or taper is not None:
        covariance = torch.zeros(size, size, dtype=torch.float64)
        for _, x in blocks(series):
            covariance += x.T @ x
        covariance /= frames
        values, vectors = torch.linalg.eigh(covariance if taper is None else covariance * taper)
        return values.flip(-1)[:count], vectors.flip(-1)[:, :count].contiguous(), values[: size - count].sum()
    values, vectors = (_snapshots if frames <= LARGEST else _subspace)(series, count)
    trace = sum(x.square().sum() for _, x in blocks(series)) / frames
    return values, vectors, trace - values.sum()


def working_bytes(size: int, count: int, tapered: bool = False) -> float:
    """Bytes that `leading_modes` holds at once, in float64, beside the frames: the matrix and its eigenvectors, or the directions
    before and after a pass."""
    return 2 * 8.0 * size * (size if size <= LARGEST or tapered else count + _spare(count))


def blocks(series: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The frames in float64, some at a time, and their places among all."""
    flat = series.reshape(-1, series.shape[-1])
    step = max(1, BLOCK // flat.shape[1])
    for start in range(0, len(flat), step):
        yield slice(start, start + step), flat[start : start + step].double()


def _snapshots(series: Tensor, count: int) -> tuple[Tensor, Tensor]:
    frames = series.shape[0] * series.shape[1]
    gram = torch.zeros(frames, frames, dtype=torch.float64)
    for rows, x in blocks(series):
        for columns, y in blocks(series):
            if columns.start <= rows.start:
                gram[rows, columns] = x @ y.T  # eigh reads the lower triangle
    values, vectors = torch.linalg.eigh(gram / frames)
    values, vectors = values.flip(-1)[:count].clamp(min=0), vectors.flip(-1)[:, :count]
    modes = sum(x.T @ vectors[rows] for rows, x in blocks(series))
    empty = values <= 1e-13 * values[0]  # directions without variance: any that are orthogonal to the others
    modes[:, empty] = torch.randn(len(modes), int(empty.sum()), dtype=torch.float64, generator=generator(0, "modes"))
    return values, _orthonormal(modes / modes.norm(dim=0))


def _subspace(series: Tensor, count: int) -> tuple[Tensor, Tensor]:
    frames, size = series.shape[0] * series.shape[1], series.shape[2]
    directions = torch.randn(size, min(size, count + _spare(count)), dtype=torch.float64, generator=generator(0, "modes"))
    for _ in range(ITERATIONS):
        directions = _orthonormal(directions)
        directions = sum(x.T @ (x @ directions) for _, x in blocks(series))
    directions = _orthonormal(directions)
    small = sum((y := x @ directions).T @ y for _, x in blocks(series)) / frames
    values, vectors = torch.linalg.eigh(small)
    return values.flip(-1)[:count], directions @ vectors.flip(-1)[:, :count]


def _spare(count: int) -> int:
    """Directions beyond those asked for, whose errors are the largest."""
    return 10 + count // 10


def _orthonormal(columns: Tensor) -> Tensor:
    """The columns made orthonormal from the left, each with its own sign."""
    q, r = torch.linalg.qr(columns)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)
