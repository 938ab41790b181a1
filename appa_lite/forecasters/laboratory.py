"""The laboratory: problems whose posterior is known exactly, in the words of the guidance methods."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.covariance import SpaceTimeCovariance
from appa_lite.core.errors import UserError
from appa_lite.core.random import Streams
from appa_lite.core.temporal import TemporalModes
from appa_lite.diffusion.base import Sampler
from appa_lite.diffusion.oracles import GaussianOracle, MixtureOracle, Oracle
from appa_lite.forecasters.designs import cells, errors, projection
from appa_lite.guidance.base import Guidance, LatentObservation, LatentOperator, LinearModes, PosteriorCovariance, SolverReport
from appa_lite.simulators.base import Simulator
from appa_lite.simulators.gaussian_mixture import GaussianMixture
from appa_lite.simulators.gaussian_process import GaussianProcess
from appa_lite.verification.posterior_scores import score, total_variation


class Climatology:
    """The covariance C_sigma = sigma^2 C (C + sigma^2)^{-1} of z - D(z_t) if z is N(0, C), in all modes of C.

    Args:
        covariance: C, with as many modes as numbers in a frame; latent_shape: (Z, h, w); frames: T.
    """

    def __init__(self, covariance: SpaceTimeCovariance, latent_shape: tuple[int, ...], frames: int):
        self.covariance, self.latent_shape, self.frames = covariance, latent_shape, frames

    def _eigen(self, sigma: Tensor) -> tuple[TemporalModes, Tensor]:
        modes = self.covariance.temporal(self.frames)
        noise = sigma.to(modes.values) ** 2
        return modes, modes.values * noise / (modes.values + noise)

    def apply(self, components: Tensor, sigma: Tensor) -> Tensor:
        modes, values = self._eigen(sigma)
        return modes.inverse(modes.forward(components) * values)

    def local(self, frames: int, sigma: Tensor) -> Tensor:
        modes, values = self._eigen(sigma)
        count = min(frames, self.frames)
        block = modes.block(values, (self.frames - count) // 2, count)
        return torch.nn.functional.pad(block, (0, frames - count, 0, frames - count))

    def expand(self, components: Tensor) -> Tensor:
        return (components @ self.covariance.basis.T).unflatten(-1, self.latent_shape)

    def project(self, latents: Tensor) -> Tensor:
        return latents.flatten(2) @ self.covariance.basis


class LinearObservations(LatentOperator, LinearModes):
    """y = A z for a matrix A.

    Args:
        matrix: A (M, T * D); basis: (D, D) the modes of the covariance that the guidance is given; frames: T.
    """

    def __init__(self, matrix: Tensor, basis: Tensor, frames: int):
        self.matrix, self.frames = matrix, frames
        self.modes = (matrix.unflatten(1, (frames, -1)) @ basis).flatten(1)

    def predict(self, latents: Tensor) -> Tensor:
        return latents.flatten(1) @ self.matrix.T

    def linearise(self, latents: Tensor) -> LinearModes:
        return self

    def forward(self, components: Tensor) -> Tensor:
        return components.flatten(1) @ self.modes.T

    def adjoint(self, values: Tensor) -> Tensor:
        return (values @ self.modes).unflatten(1, (self.frames, -1))

    def preconditioner(self, covariance: PosteriorCovariance, sigma: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
        """(I + R^{-1/2} A C A^T R^{-1/2})^{-1}, formed and factorised once for all members."""
        whiten = torch.diag(variance.rsqrt())
        matrix = self.forward(covariance.apply(self.adjoint(whiten), sigma)) @ whiten
        factor = torch.linalg.cholesky(matrix + torch.eye(len(variance), dtype=matrix.dtype))
        return lambda residual: torch.cholesky_solve(residual.T, factor).T


@dataclass(frozen=True)
class Problem:
    """A prior, an observation of a draw of it, what a guidance method is told, and the exact posterior."""

    prior: Oracle
    posterior: Oracle
    matrix: Tensor  #: A (M, n)
    observation: LatentObservation
    covariance: Climatology
    unit: float  #: of Wasserstein distances: the posterior's standard deviation, or that of a mixture's components

    @property
    def shape(self) -> tuple[int, ...]:
        return self.prior.shape


@dataclass
class Calls:
    """Passes through a denoiser, counted by member: forwards and vector-Jacobian products."""

    forwards: int = 0
    vjps: int = 0

    def of(self, denoiser: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoiser, each of whose calls is counted; a backward pass through it counts as one product."""

        def backward(gradient: Tensor) -> None:
            self.vjps += len(gradient)

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            self.forwards += len(x)
            mean = denoiser(x, sigma)
            if mean.requires_grad:
                mean.register_hook(backward)
            return mean

        return counted


def prior_of(simulator: Simulator, frames: int) -> tuple[Oracle, SpaceTimeCovariance]:
    """The law of ``frames`` successive frames of a simulator, and its covariance.

    Raises:
        UserError: a simulator whose law is not known.
    """
    _, h, w = simulator.spec.shape
    if isinstance(simulator, GaussianProcess):
        values, vectors = torch.linalg.eigh(simulator.covariance)
        lags = simulator.memory ** torch.arange(frames, dtype=torch.float64)
        covariance = _modes(vectors.flip(1), values.flip(0)[:, None] * lags)
        return GaussianOracle(covariance, (frames, 1, h, w)), covariance
    if isinstance(simulator, GaussianMixture):
        if frames != 1:
            raise UserError(f"a Gaussian mixture has no time: frames must be 1, found {frames}")
        weights = torch.ones(len(simulator.means), dtype=torch.float64)
        oracle = MixtureOracle(weights, simulator.means, torch.eye(simulator.size, dtype=torch.float64), (1, 1, h, w))
        spread = simulator.means - oracle.mean
        values, vectors = torch.linalg.eigh(oracle.covariance + spread.T @ (oracle.weights[:, None] * spread))
        return oracle, _modes(vectors.flip(1), values.flip(0)[:, None])
    raise UserError(f"the posterior of a {type(simulator).__name__} is not known: choose a gaussian_process or gaussian_mixture")


def climatology(prior: Oracle, rank: int, draws: int, seed: int) -> SpaceTimeCovariance:
    """The covariance a user would have: ``rank`` leading modes of so many draws, one variance for all the others.

    One autocorrelation, that of all modes together, serves them all.
    """
    frames, size = prior.shape[0], math.prod(prior.shape[1:])
    if not 1 <= rank <= min(size, draws - 1):
        raise UserError(f"rank={rank} must be between 1 and {min(size, draws - 1)}, for {draws} draws of {size} numbers")
    x = prior.sample(seed, range(draws), "laboratory", "climatology").flatten(2)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(torch.einsum("nti,ntj->ij", x, x) / ((draws - 1) * frames))
    values, vectors = values.flip(0), vectors.flip(1)
    if rank < size:
        values[rank:] = values[rank:].mean()
    power = x.square().mean()
    lags = torch.stack([(x[:, lag:] * x[:, : frames - lag]).mean() / power for lag in range(frames)])
    return _modes(vectors, values[:, None] * lags)


def _modes(vectors: Tensor, autocovariance: Tensor) -> SpaceTimeCovariance:
    return SpaceTimeCovariance(vectors.contiguous(), autocovariance, torch.zeros((), dtype=torch.float64))


def make_problem(
    simulator: Simulator,
    design: str = "points",
    frames: int = 1,
    rows: int | None = None,
    fraction: float = 0.1,
    error: float | None = 0.1,
    error_max: float | None = None,
    rank: int | None = 64,
    draws: int = 256,
    seed: int = 0,
) -> Problem:
    """A truth drawn from the simulator's law, observed.

    Args:
        simulator: a Gaussian process or mixture.
        design: points, clouds, tracks or swath; or projection, a random matrix.
        frames: T; rows: observations M, or None for a ``fraction`` of the cells.
        error: their standard deviation; with ``error_max`` log-uniform between the two; None: one U(0, |A|) for all.
        rank, draws: of the climatological covariance that methods are given (see ``climatology``); rank None: the exact one.
        seed: of truth, observations and climatology.

    Raises:
        UserError: impossible settings.
    """
    prior, exact = prior_of(simulator, frames)
    if design == "projection":
        if rows is None:
            raise UserError("design=projection needs rows=..., the number of observations")
        matrix = projection(math.prod(prior.shape), rows, seed)
    else:
        matrix = cells(design, prior.shape, rows, fraction, seed)
    std = errors(len(matrix), error, error_max, float(torch.linalg.matrix_norm(matrix, 2)) if error is None else 1.0, seed)
    truth = prior.sample(seed, [0], "laboratory", "truth").flatten(1)
    noise = Streams(seed, [0], "laboratory", "noise").normal((len(std),), torch.float64)
    values, variance = (truth @ matrix.T + noise * std)[0], std**2
    posterior = prior.given(matrix, values, variance)
    covariance = exact if rank is None else climatology(prior, rank, draws, seed)
    return Problem(
        prior,
        posterior,
        matrix,
        LatentObservation(LinearObservations(matrix, covariance.basis, frames), values, variance),
        Climatology(covariance, prior.shape[1:], frames),
        1.0 if isinstance(prior, MixtureOracle) else float(posterior.variance.mean().sqrt()),
    )


def guided_sample(
    problem: Problem,
    guidance: Guidance | None,
    sampler: Sampler,
    members: int,
    batch: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Calls, SolverReport]:
    """Draws (members, T, Z, h, w) of a method, its passes through the denoiser (of all members) and its solver's report.

    Without a guidance, the exact denoiser of the posterior is sampled: what is wrong is the sampler's doing.

    Raises:
        FloatingPointError: the method diverged.
    """
    calls, report, parts = Calls(), SolverReport(), []
    for begin in range(0, members, batch):
        streams = Streams(seed, range(begin, min(begin + batch, members)), "laboratory", "sampler")
        denoiser = calls.of(problem.posterior if guidance is None else problem.prior)
        if guidance is not None:
            told = replace(problem.observation, values=problem.observation.values.expand(len(streams), -1))
            denoiser = guidance(denoiser, told, problem.covariance, report)
        parts.append(sampler(denoiser, lambda step, s=streams: s.normal(problem.shape, torch.float64), progress).detach())
    return torch.cat(parts), calls, report


def scores(problem: Problem, samples: Tensor, seed: int = 0) -> dict[str, float]:
    """What ``posterior_scores.score`` says of samples (N, T, Z, h, w), and the error of the modes' weights if there are modes.

    Raises:
        FloatingPointError: the samples are too large to be scored.
    """
    posterior, observation = problem.posterior, problem.observation

    def exact(number: int) -> np.ndarray:
        return posterior.sample(seed, range(len(samples)), "laboratory", "exact", number).flatten(1).numpy()

    found = score(
        samples.flatten(1).numpy(),
        exact,
        (posterior.mean.numpy(), posterior.variance.numpy()),
        lambda x: x @ problem.matrix.T.numpy(),
        tuple(v.numpy() for v in posterior.seen(problem.matrix)),
        (observation.values.numpy(), observation.variance.numpy()),
        problem.unit,
    )
    if isinstance(posterior, MixtureOracle):
        found["mode_weight_error"] = total_variation(posterior.responsibilities(samples).mean(0).numpy(), posterior.weights.numpy())
    if not np.isfinite(list(found.values())).all():
        raise FloatingPointError("the samples are too large to be scored")
    return found
