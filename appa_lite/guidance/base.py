"""Prior + observation -> posterior. A guided denoiser is a denoiser."""

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.linalg import Solution, Stop
from appa_lite.diffusion.base import Denoiser, GuidedDenoiser, Twist


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

    linear = False  #: the derivative is the same everywhere

    @abstractmethod
    def predict(self, latents: Tensor) -> Tensor:
        """What would be observed of latents (B, T, Z, h, w): (B, M)."""

    @abstractmethod
    def linearise(self, latents: Tensor) -> "LinearModes":
        """The derivative at latents, acting on components of the modes."""

    def sites(
        self, predicted: Tensor, linear: "LinearModes", covariance: PosteriorCovariance, sigma: Tensor, values: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Innovations (B, M) and error variances (M,) or (B, M) of the Gaussian likelihoods that stand for those of the values."""
        return values - predicted, variance


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
    """What the linear solver did at each noise level.

    Args:
        sigma: the noise levels, in the order they were visited, one entry a step and batch of members.
        iterations: of the slowest member; residual: the largest of any member, relative, in the R-whitened norm.
        products: vector-Jacobian products of the denoiser for each member, with those outside the solver.
        status: ``converged``, or what stopped conjugate gradients: ``stalled``, ``negative curvature``, ``exhausted``.
        missed: whether a member was left above the tolerance.
    """

    sigma: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    residual: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    missed: list[bool] = field(default_factory=list)

    def add(
        self, sigma: float, iterations: int, residual: float, products: int = 0, status: str = "converged", missed: bool = False
    ) -> None:
        self.sigma.append(sigma)
        self.iterations.append(iterations)
        self.residual.append(residual)
        self.products.append(products)
        self.status.append(status)
        self.missed.append(missed)

    def merge(self, other: "SolverReport") -> None:
        """Append the steps of another batch of members."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)

    def summary(self) -> dict[str, float]:
        """Mean iterations and products a step, worst residual, share of the steps that missed; zeros when nothing was solved."""
        steps = max(len(self.sigma), 1)
        return {
            "solver_iterations_mean": sum(self.iterations) / steps,
            "solver_residual_max": max(self.residual, default=0.0),
            "solver_products_mean": sum(self.products) / steps,
            "solver_missed": sum(self.missed) / steps,
        }

    def attributes(self) -> dict[str, float | str]:
        """The summary, and ``solver_steps``: lists by noise level as JSON, the worst of all batches of members."""
        rows = {s: [i for i, sigma in enumerate(self.sigma) if sigma == s] for s in dict.fromkeys(self.sigma)}
        steps = {
            "sigma": [_short(s) for s in rows],
            "iterations": [max(self.iterations[i] for i in row) for row in rows.values()],
            "residual": [_short(max(self.residual[i] for i in row)) for row in rows.values()],
            "products": [max(self.products[i] for i in row) for row in rows.values()],
            "status": [max((self.status[i] for i in row), key=list(STATUS.values()).index) for row in rows.values()],
        }
        return self.summary() | {"solver_steps": json.dumps(steps, separators=(",", ":"))}

    def warning(self) -> str | None:
        """One line for the log, where the solver did not converge."""
        if not any(self.missed):
            return None
        worst = max(range(len(self.sigma)), key=lambda i: self.residual[i])
        causes = Counter(status for status, missed in zip(self.status, self.missed, strict=True) if missed)
        return (
            f"the linear solver did not converge at {sum(self.missed)} of {len(self.missed)} steps "
            f"({', '.join(f'{cause}: {n}' for cause, n in causes.items())}; largest relative residual {self.residual[worst]:.2g} "
            f"at sigma {self.sigma[worst]:.2g}): raise guidance.max_iterations or guidance.tolerance"
        )


STATUS = {stop: stop.name.lower().replace("_", " ") for stop in Stop}


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


class Guidance(ABC):
    """(prior denoiser, observation, covariance) -> posterior denoiser."""

    @abstractmethod
    def __call__(
        self, denoiser: Denoiser, observation: LatentObservation, covariance: PosteriorCovariance, report: SolverReport
    ) -> Denoiser:
        """The denoiser of the posterior; ``report`` collects what its solver does."""


class Local:
    """The prior's estimate at x_t, the observation seen from there, and products with the denoiser's Jacobian J.

    Attributes:
        mean: D(x_t) (B, T, Z, h, w), without a graph; sigma: ();
        innovation: y - A(D(x_t)), (B, M); variance: of the observation errors, (M,) or (B, M);
        linear: the derivative of A at D(x_t); covariance: of z - D(z_t), in modes;
        memory: what a method keeps from one noise level to the next; products: made so far.
    """

    def __init__(self, parent: "Conditioned", x: Tensor, sigma: Tensor):
        observation, self.covariance, self.memory = parent.observation, parent.covariance, parent.memory
        self.operator, self.report = observation.operator, parent.report
        self.sigma, self.products, self._again = sigma, 0, parent.again
        with torch.set_grad_enabled(parent.method.jacobian):
            self._x = x.detach().requires_grad_(parent.method.jacobian)
            self._mean = parent.denoiser(self._x, sigma)
        self.mean = self._mean.detach()
        with torch.no_grad():
            self.linear = self.operator.linearise(self.mean)
            predicted = self._predict(parent.method.decode_factor)
            self.innovation, self.variance = self.operator.sites(
                predicted, self.linear, self.covariance, sigma, observation.values, observation.variance
            )

    def _predict(self, factor: float) -> Tensor:
        """A(D(x_t)); through the derivative from where it was last computed, as long as sigma has fallen by less than ``factor``."""
        if factor <= 1 or not self.operator.linear:
            return self.operator.predict(self.mean)
        sigma, known = float(self.sigma), self.memory.get("predicted")
        if known is not None and sigma <= known[2] < factor * sigma and len(known[0]) == len(self.mean):
            return known[1] + self.observe(self.mean - known[0])
        predicted = self.operator.predict(self.mean)
        self.memory["predicted"] = self.mean, predicted, sigma
        return predicted

    def pull(self, values: Tensor, last: bool = False) -> Tensor:
        """sigma^2 J^T A^T v for values (B, M): one vector-Jacobian product. ``last`` frees the graph."""
        return self.back(self.covariance.expand(self.linear.adjoint(values.to(self.mean))), last and not self._again)

    def back(self, push: Tensor, last: bool = True) -> Tensor:
        """sigma^2 J^T p for latents p."""
        self.products += 1
        return self.sigma**2 * torch.autograd.grad(self._mean, self._x, push, retain_graph=not last)[0]

    def observe(self, latents: Tensor) -> Tensor:
        """A v for latents v: (B, M)."""
        return self.linear.forward(self.covariance.project(latents))

    def solved(self, solution: Solution | None, tolerance: float, on_failure: str) -> None:
        """Report a solution, its residual in the R-whitened norm; None: nothing had to be iterated."""
        if solution is None:
            return self.direct()
        missed = not bool((solution.residual <= tolerance).all())
        status = STATUS[Stop(int(solution.stop.max()))]
        self.report.add(float(self.sigma), solution.iterations, float(solution.residual.max()), self.products, status, missed)
        if missed and on_failure == "error":
            raise UserError(f"{self.report.warning()}, or on_failure=warn")

    def direct(self) -> None:
        """Report that nothing had to be iterated."""
        self.report.add(float(self.sigma), 0, 0.0, self.products)


class Correction(Guidance):
    """A guidance that adds to D(x_t) what the observation tells at x_t."""

    jacobian = True  #: needs products with the denoiser's Jacobian
    decode_factor = 1.0  #: fall of sigma between two passes through the decoder; between them its linear part speaks for it
    exact = False  #: the posterior's own denoiser where the prior is Gaussian, up to the solver's tolerance

    def __call__(
        self, denoiser: Denoiser, observation: LatentObservation, covariance: PosteriorCovariance, report: SolverReport
    ) -> GuidedDenoiser:
        return Conditioned(self, denoiser, observation, covariance, report)

    @abstractmethod
    def correct(self, here: Local, twist: bool) -> tuple[Tensor, Tensor | None]:
        """E[z | z_t, y] - D(z_t), and, if ``twist``, log p~(y | z_t) (B,) up to a constant; None where the method has none."""

    def left(self, here: Local, components: Tensor) -> tuple[Tensor, Tensor]:
        """What the observation leaves open of a slope a, components (B, T, K): b = a - A^T (R + A C A^T)^{-1} A C a, and C b.

        C b is the covariance of z with a . z given z_t and y.

        Raises:
            UserError: a method that does not have it.
        """
        raise UserError("an event beside observations needs guidance=moment_matching or jacobian_free")


def check_on_failure(value: str) -> str:
    """``warn`` or ``error``, or a ``UserError``."""
    if value not in ("warn", "error"):
        raise UserError(f"guidance.on_failure={value}: expected warn or error")
    return value


class Conditioned(GuidedDenoiser):
    """The denoiser D(x_t) + correction of one observation."""

    again = False  #: products with the Jacobian are made after the correction

    def __init__(
        self,
        method: Correction,
        denoiser: Denoiser,
        observation: LatentObservation,
        covariance: PosteriorCovariance,
        report: SolverReport,
    ):
        self.method, self.denoiser, self.observation, self.covariance, self.report = method, denoiser, observation, covariance, report
        self.memory: dict[str, Any] = {}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        here = Local(self, x, sigma)
        with torch.no_grad():
            return here.mean + self.method.correct(here, False)[0]

    def twist(self, x: Tensor, sigma: Tensor) -> Twist:
        here = Local(self, x, sigma)
        with torch.no_grad():
            correction, log_likelihood = self.method.correct(here, True)
        return super().twist(x, sigma) if log_likelihood is None else Twist(here.mean, here.mean + correction, log_likelihood)


def no_gradient(denoiser: Denoiser) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser without a graph."""

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.no_grad():
            return denoiser(x, sigma)

    return call
