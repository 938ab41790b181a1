"""Prior + observation -> posterior. A guided denoiser is a denoiser."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from appa_lite.diffusion.base import Denoiser


class PosteriorCovariance(Protocol):
    """The covariance of z - D(z_t) at each noise level, in space-time modes: coordinates are (B, T, K)."""

    def apply(self, components: Tensor, sigma: Tensor) -> Tensor:
        """C(sigma) a, for components a (B, T, K) of the modes."""

    def local(self, frames: int, sigma: Tensor) -> Tensor:
        """C(sigma) of ``frames`` neighbouring frames in the middle of the period, mode by mode: (K, frames, frames)."""

    def expand(self, components: Tensor) -> Tensor:
        """Components (B, T, K) to latents (B, T, Z, h, w)."""

    def project(self, latents: Tensor) -> Tensor:
        """The adjoint of ``expand``."""


class LatentOperator(ABC):
    """The observation operator seen from latent space: y = A(z), and its linearisation in the modes."""

    @abstractmethod
    def predict(self, latents: Tensor) -> Tensor:
        """What would be observed of latents (B, T, Z, h, w): (B, M)."""

    @abstractmethod
    def linearise(self, latents: Tensor) -> "LinearModes":
        """The derivative at latents, acting on components of the modes."""


class LinearModes(ABC):
    """A linear map from components (B, T, K) to (B, M), and its adjoint."""

    @abstractmethod
    def forward(self, components: Tensor) -> Tensor: ...

    @abstractmethod
    def adjoint(self, values: Tensor) -> Tensor: ...

    def preconditioner(self, covariance: PosteriorCovariance, sigma: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor] | None:
        """An approximate inverse of I + R^{-1/2} A C A^T R^{-1/2} for values (B, M), that costs no network call; or None."""
        return None


@dataclass(frozen=True)
class LatentObservation:
    """y = A(z) + e, e ~ N(0, diag(variance)): values (M,) or (B, M), variance (M,)."""

    operator: LatentOperator
    values: Tensor
    variance: Tensor


@dataclass
class SolverReport:
    """What the linear solver did at each noise level: iterations, and the largest relative residual of any member."""

    sigma: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    residual: list[float] = field(default_factory=list)

    def add(self, sigma: float, iterations: int, residual: float) -> None:
        self.sigma.append(sigma)
        self.iterations.append(iterations)
        self.residual.append(residual)

    def merge(self, other: "SolverReport") -> None:
        """Append the steps of another batch of members."""
        self.sigma += other.sigma
        self.iterations += other.iterations
        self.residual += other.residual

    def summary(self) -> dict[str, float]:
        """Mean iterations a step and worst residual; zeros when nothing was solved."""
        if not self.iterations:
            return {"solver_iterations_mean": 0.0, "solver_residual_max": 0.0}
        return {"solver_iterations_mean": sum(self.iterations) / len(self.iterations), "solver_residual_max": max(self.residual)}


class Guidance(ABC):
    """(prior denoiser, observation, covariance) -> posterior denoiser."""

    @abstractmethod
    def __call__(
        self, denoiser: Denoiser, observation: LatentObservation, covariance: PosteriorCovariance, report: SolverReport
    ) -> Denoiser:
        """The denoiser of the posterior; ``report`` collects what its solver does."""


def no_gradient(denoiser: Denoiser) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser without a graph."""

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.no_grad():
            return denoiser(x, sigma)

    return call
