"""Homogeneous Gaussian fields on a doubly periodic square, drawn by Fourier transforms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from appa_lite.core.errors import UserError


class PeriodicField:
    """Zero mean, unit variance, amplitude exp(-|k|^2 length^2 / 4) at wavenumber k (radians a cell).

    Its covariance at distance r is exp(-r^2 / (2 length^2)), wrapped around the square.

    Args:
        n: cells along each side.
        length: correlation length, in cells.

    Raises:
        UserError: no cells, or no length.
    """

    def __init__(self, n: int, length: float):
        if n < 2 or not length > 0:
            raise UserError(f"a random field needs n >= 2 cells along each side and a positive length, got {n} and {length}")
        k = 2 * torch.pi * torch.fft.fftfreq(n, dtype=torch.float64)
        amplitude = torch.exp(-(k[:, None] ** 2 + k**2) * length**2 / 4)
        self.n = n
        self.amplitude = amplitude / amplitude.square().mean().sqrt()

    @property
    def correlation(self) -> Tensor:
        """Between a cell and the one (i, j) cells away: (n, n)."""
        return torch.fft.ifft2(self.amplitude**2).real

    def colour(self, noise: Tensor) -> Tensor:
        """Fields (..., n, n) from white noise of that shape, float64."""
        return torch.fft.ifft2(torch.fft.fft2(noise) * self.amplitude).real


def roll(field: Tensor, cells: Sequence[int]) -> Tensor:
    """A field (..., n, n) moved by whole (rows, columns)."""
    return torch.roll(field, tuple(cells), (-2, -1))
