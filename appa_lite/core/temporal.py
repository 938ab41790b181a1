"""The temporal eigenvectors of stationary series: exact ones for short stretches, waves on a ring for long ones."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class TemporalModes(ABC):
    """An orthonormal U_k (T, T) for each of K series, with C_k = U_k diag(values_k) U_k^T.

    ``values`` (K, T) are the eigenvalues, slow variability first.
    """

    values: Tensor

    @abstractmethod
    def forward(self, components: Tensor) -> Tensor:
        """U^T a: series (B, T, K) to coordinates (B, K, T)."""

    @abstractmethod
    def inverse(self, coordinates: Tensor) -> Tensor:
        """U a: coordinates (B, K, T) to series (B, T, K)."""

    @abstractmethod
    def block(self, values: Tensor, first: int, count: int) -> Tensor:
        """The part (K, count, count) of U diag(values) U^T that begins at frame ``first``; values (K, T)."""


class DenseModes(TemporalModes):
    """The eigenvectors of the Toeplitz matrices themselves.

    Args:
        autocovariance: c_k(tau), (K, T), float64.
    """

    def __init__(self, autocovariance: Tensor, dtype: torch.dtype):
        frames = autocovariance.shape[1]
        index = (torch.arange(frames)[:, None] - torch.arange(frames)[None, :]).abs().to(autocovariance.device)
        values, vectors = torch.linalg.eigh(autocovariance[:, index])
        self.vectors = vectors.flip(-1).to(dtype).contiguous()
        self.values = torch.maximum(values, 1e-6 * autocovariance[:, :1]).flip(-1).to(dtype)

    def forward(self, components: Tensor) -> Tensor:
        return torch.einsum("kts,btk->bks", self.vectors, components)

    def inverse(self, coordinates: Tensor) -> Tensor:
        return torch.einsum("kts,bks->btk", self.vectors, coordinates)

    def block(self, values: Tensor, first: int, count: int) -> Tensor:
        rows = self.vectors[:, first : first + count]
        return torch.einsum("ktj,kj,ksj->kts", rows, values, rows)


class RingModes(TemporalModes):
    """The same for a time axis that closes on itself, where all series share the waves of the Hartley transform.

        U_tj = cas(2 pi f_j t / T) / sqrt(T),    cas = cos + sin,    lambda_k(f) = sum_tau c_k(tau) cos(2 pi f tau / T)

    By the fast Fourier transform, in memory that grows with T and not with its square. Frames further from the seam than
    the longest lag have exactly the covariances c_k: this is the circulant embedding of a stationary series (Dietrich and
    Newsam 1997, https://doi.org/10.1137/S1064827592240555).

    Args:
        autocovariance: c_k(tau), (K, lags), float64; frames: T, more than twice the lags.
    """

    def __init__(self, autocovariance: Tensor, frames: int, dtype: torch.dtype):
        lags = autocovariance.shape[1]
        if frames < 2 * lags:
            raise ValueError(f"a ring of {frames} frames is too short for correlations over {lags}")
        around = torch.zeros(len(autocovariance), frames, dtype=autocovariance.dtype, device=autocovariance.device)
        around[:, :lags] = autocovariance
        around[:, frames - lags + 1 :] = autocovariance[:, 1:].flip(-1)
        frequency = torch.arange(frames, device=autocovariance.device)
        self.order = torch.argsort(torch.minimum(frequency, frames - frequency), stable=True)
        values = torch.fft.fft(around).real[:, self.order]
        self.values = torch.maximum(values, 1e-6 * autocovariance[:, :1]).to(dtype)
        self.place = torch.argsort(self.order)

    def forward(self, components: Tensor) -> Tensor:
        return _hartley(components.transpose(1, 2))[..., self.order]

    def inverse(self, coordinates: Tensor) -> Tensor:
        return _hartley(coordinates[..., self.place]).transpose(1, 2)

    def block(self, values: Tensor, first: int, count: int) -> Tensor:
        frames = len(self.order)
        steps = torch.arange(first, first + count, device=values.device, dtype=torch.float64)
        angle = 2 * torch.pi * torch.remainder(steps[:, None] * self.order, frames) / frames
        rows = ((angle.cos() + angle.sin()) / frames**0.5).to(values)
        return torch.einsum("tj,kj,sj->kts", rows, values, rows)


def _hartley(x: Tensor) -> Tensor:
    """The orthonormal discrete Hartley transform of the last axis, which is its own inverse."""
    waves = torch.fft.fft(x, norm="ortho")
    return waves.real - waves.imag
