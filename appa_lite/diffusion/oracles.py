"""Laws whose denoisers and posteriors are known exactly: what samplers and guidance are measured against."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from appa_lite.core.covariance import SpaceTimeCovariance
from appa_lite.core.random import Streams


class Oracle(ABC):
    """A law of trajectories (T, Z, h, w) that is its own exact denoiser: x_t (B, T, Z, h, w), sigma () -> E[x | x_t].

    All of it in float64; the denoiser can be differentiated. Flattened trajectories have n = T Z h w numbers.
    """

    shape: tuple[int, ...]  #: (T, Z, h, w)
    mean: Tensor  #: (n,)
    variance: Tensor  #: (n,)

    @abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x | x_t] for x_t = x + sigma n."""

    @abstractmethod
    def sample(self, seed: int, members: Sequence[int], *names: object) -> Tensor:
        """Draws (B, T, Z, h, w); member m depends on (seed, names, m) alone."""

    @abstractmethod
    def given(self, matrix: Tensor, values: Tensor, variance: Tensor) -> "Oracle":
        """The law of x given ``values`` = ``matrix`` x + e, e ~ N(0, diag(variance)): (M,), (M, n), (M,)."""

    @abstractmethod
    def seen(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (M,) of ``matrix`` x."""


class GaussianOracle(Oracle):
    """N(0, C) for a covariance in space and time.

        E[x | x_t] = C (C + sigma^2)^{-1} x_t

    Args:
        covariance: C, with buffers in float64; shape: (T, Z, h, w).
    """

    def __init__(self, covariance: SpaceTimeCovariance, shape: tuple[int, ...]):
        self.covariance, self.shape = covariance, shape
        variance = covariance.basis.square() @ covariance.autocovariance[:, 0]
        if covariance.has_remainder:
            variance = variance + (1 - covariance.basis.square().sum(1)) * covariance.remainder
        self.variance = variance.repeat(shape[0])
        self.mean = torch.zeros_like(self.variance)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """For trajectories of any number of frames: the law of a part of a stationary process is of the same form."""
        noise = sigma.to(x) ** 2
        return self.covariance.function(x.flatten(2), lambda v: v / (v + noise)).reshape(x.shape)

    def sample(self, seed: int, members: Sequence[int], *names: object) -> Tensor:
        noise = Streams(seed, members, *names).normal((self.shape[0], math.prod(self.shape[1:])), torch.float64)
        return self.covariance.sample(noise).reshape(-1, *self.shape)

    def given(self, matrix: Tensor, values: Tensor, variance: Tensor) -> "ConditionedGaussian":
        return ConditionedGaussian(self, matrix, values, variance)

    def spread(self, matrix: Tensor, sigma: Tensor | None = None) -> Tensor:
        """A C (M, n), or with ``sigma`` A C_sigma: the covariance of x given x_t is C_sigma = sigma^2 C (C + sigma^2)^{-1}."""
        noise = None if sigma is None else sigma.to(matrix) ** 2
        rows = matrix.unflatten(1, (self.shape[0], -1))
        return self.covariance.function(rows, lambda v: v if noise is None else v * noise / (v + noise)).flatten(1)

    def seen(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix @ self.mean, (self.spread(matrix) * matrix).sum(1)


class ConditionedGaussian(Oracle):
    """N(0, C) given y = A x + e: the Kalman update, at noise level zero for the law and at sigma for the denoiser.

        m = C A^T (A C A^T + R)^{-1} y,    E[x | x_t, y] = D(x_t) + C_sigma A^T (A C_sigma A^T + R)^{-1} (y - A D(x_t))

    Args:
        prior: N(0, C); matrix: A (M, n); values: y (M,); variance: the diagonal of R (M,).
    """

    def __init__(self, prior: GaussianOracle, matrix: Tensor, values: Tensor, variance: Tensor):
        self.prior, self.matrix, self.values, self.error_variance, self.shape = prior, matrix, values, variance, prior.shape
        self._cross, self._factor = self._system(None)
        self._level: tuple[float, Tensor, Tensor] | None = None
        self.mean = self._gain(self._cross, self._factor, values[None])[0]
        self.variance = prior.variance - torch.linalg.solve_triangular(self._factor, self._cross, upper=False).square().sum(0)

    def _system(self, sigma: Tensor | None) -> tuple[Tensor, Tensor]:
        """A C and the Cholesky factor of A C A^T + R."""
        cross = self.prior.spread(self.matrix, sigma)
        return cross, torch.linalg.cholesky(cross @ self.matrix.T + torch.diag(self.error_variance))

    def _gain(self, cross: Tensor, factor: Tensor, innovation: Tensor) -> Tensor:
        return torch.cholesky_solve(innovation.T, factor).T @ cross

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self._level is None or self._level[0] != float(sigma):
            self._level = (float(sigma), *self._system(sigma))
        mean = self.prior(x, sigma).flatten(1)
        return (mean + self._gain(*self._level[1:], self.values - mean @ self.matrix.T)).reshape(x.shape)

    def sample(self, seed: int, members: Sequence[int], *names: object) -> Tensor:
        """By Matheron's rule: a draw of the prior, corrected by observations of it with errors of their own."""
        x = self.prior.sample(seed, members, *names).flatten(1)
        noise = Streams(seed, members, *names, "errors").normal((len(self.values),), torch.float64) * self.error_variance.sqrt()
        return (x + self._gain(self._cross, self._factor, self.values - x @ self.matrix.T - noise)).reshape(-1, *self.shape)

    def given(self, matrix: Tensor, values: Tensor, variance: Tensor) -> "ConditionedGaussian":
        both = [torch.cat(pair) for pair in ((self.matrix, matrix), (self.values, values), (self.error_variance, variance))]
        return ConditionedGaussian(self.prior, *both)

    def seen(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        known = torch.linalg.solve_triangular(self._factor, self._cross @ matrix.T, upper=False)
        return matrix @ self.mean, (self.prior.spread(matrix) * matrix).sum(1) - known.square().sum(0)


class MixtureOracle(Oracle):
    """sum_j w_j N(m_j, C): Gaussians of one covariance. Its posteriors are of the same kind.

        E[x | x_t] = sum_j r_j [m_j + C (C + sigma^2)^{-1} (x_t - m_j)],    r_j ~ w_j N(x_t; m_j, C + sigma^2)

    Args:
        weights: (J,), positive; means: (J, n); covariance: C (n, n); shape: (T, Z, h, w).
    """

    def __init__(self, weights: Tensor, means: Tensor, covariance: Tensor, shape: tuple[int, ...]):
        self.weights, self.means, self.covariance, self.shape = weights / weights.sum(), means, covariance, shape
        values, self.basis = torch.linalg.eigh(covariance)
        self.values = values.clamp(min=1e-12 * float(values[-1]))
        self.places = means @ self.basis
        self.mean = self.weights @ means
        self.variance = covariance.diagonal() + self.weights @ (means - self.mean) ** 2

    def responsibilities(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """The probability (B, J) of each component given x_t (B, ...). Its mean over draws of the law is ``weights``."""
        return self._responsibilities(x.flatten(1) @ self.basis, self.values + sigma**2)

    def _responsibilities(self, a: Tensor, total: Tensor) -> Tensor:
        scale = total.rsqrt()
        distance = torch.cdist(a * scale, self.places * scale, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.softmax(self.weights.log() - distance**2 / 2, dim=1)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        total = self.values + sigma.to(x) ** 2
        a = x.flatten(1) @ self.basis
        gain = self.values / total
        return ((gain * a + (1 - gain) * (self._responsibilities(a, total) @ self.places)) @ self.basis.T).reshape(x.shape)

    def sample(self, seed: int, members: Sequence[int], *names: object) -> Tensor:
        noise = Streams(seed, members, *names).normal((len(self.mean) + 1,), torch.float64)
        chance = torch.special.ndtr(noise[:, -1])
        picks = torch.searchsorted(self.weights.cumsum(0), chance).clamp(max=len(self.weights) - 1)
        return (self.means[picks] + (noise[:, :-1] * self.values.sqrt()) @ self.basis.T).reshape(-1, *self.shape)

    def given(self, matrix: Tensor, values: Tensor, variance: Tensor) -> "MixtureOracle":
        cross = matrix @ self.covariance
        factor = torch.linalg.cholesky(cross @ matrix.T + torch.diag(variance))
        innovation = values - self.means @ matrix.T
        solved = torch.cholesky_solve(innovation.T, factor).T
        evidence = self.weights.log() - (innovation * solved).sum(1) / 2
        half = torch.linalg.solve_triangular(factor, cross, upper=False)
        covariance = self.covariance - half.T @ half
        return MixtureOracle(torch.softmax(evidence, 0), self.means + solved @ cross, (covariance + covariance.T) / 2, self.shape)

    def seen(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        places = self.means @ matrix.T
        mean = self.weights @ places
        return mean, (matrix @ self.covariance * matrix).sum(1) + self.weights @ (places - mean) ** 2
