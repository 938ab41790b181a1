"""The laboratory: its laws, their denoisers and posteriors against dense formulas and quadrature; scores of exact ensembles."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from appa_lite import cli
from appa_lite.config import build, compose
from appa_lite.core.errors import UserError
from appa_lite.diffusion.oracles import GaussianOracle, MixtureOracle
from appa_lite.diffusion.samplers import DPMSolverPP2M
from appa_lite.diffusion.windows import WindowLayout, compose_windows
from appa_lite.forecasters.designs import DESIGNS, cells, errors, projection
from appa_lite.forecasters.laboratory import Calls, climatology, guided_sample, make_problem, prior_of, scores
from appa_lite.guidance.base import Guidance
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.simulators.base import trajectories
from appa_lite.simulators.gaussian_mixture import GaussianMixture
from appa_lite.simulators.gaussian_process import GaussianProcess
from appa_lite.verification import posterior_scores
from appa_lite.verification.cost import SCORES

ROUND = {"rtol": 1e-9, "atol": 1e-9}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The laws


def test_the_kernel_is_a_covariance_of_mean_variance_one():
    process = GaussianProcess(n=24)
    k = process.covariance
    assert torch.allclose(k, k.T, rtol=1e-14) and float(torch.linalg.eigvalsh(k)[0]) > 1e-5
    assert float(k.diagonal().mean()) == pytest.approx(1, abs=1e-12)
    std = k.diagonal().sqrt()
    assert 0.45 < std.min() < 0.55 and 1.4 < std.max() < 1.55
    correlation = (k / std / std[:, None]).unflatten(0, (24, 24)).unflatten(2, (24, 24))
    in_x, in_y = ([float(correlation[12, x, 12 + 4 * dy, x + 4 * dx]) for x in (12, 19)] for dx, dy in ((1, 0), (0, 1)))
    assert in_x[0] > in_y[0] + 0.2 and in_y[1] > in_x[1] + 0.2  # the long axis turns


def test_with_one_length_the_kernel_is_that_of_matern():
    k = GaussianProcess(n=6, shortest=0.2, longest=0.2, low=1.0, high=1.0).covariance
    place = torch.cartesian_prod(*[(torch.arange(6, dtype=torch.float64) + 0.5) / 6] * 2)
    r = math.sqrt(3) * torch.cdist(place, place) / 0.2
    torch.testing.assert_close(k, (1 + r) * torch.exp(-r), rtol=1e-6, atol=1e-7)


def test_trajectories_have_the_stated_covariance_in_space_and_time():
    process = GaussianProcess(n=4, memory=0.8)
    x = trajectories(process, 0, 3000, 3).double().flatten(2)
    assert (x[:, 2].T @ x[:, 2] / 3000 - process.covariance).abs().max() < 0.12
    assert (x[:, 2].T @ x[:, 0] / 3000 - 0.64 * process.covariance).abs().max() < 0.12


def test_a_mixture_visits_all_its_components():
    mixture = GaussianMixture(size=4)
    x = trajectories(mixture, 0, 2000, 1).double().flatten(1)
    nearest = torch.cdist(x, mixture.means).argmin(1)
    assert torch.bincount(nearest, minlength=25).min() > 40 and len(mixture.means) == 25
    assert (x - mixture.means[nearest]).var() == pytest.approx(1, abs=0.05)


def test_laws_that_cannot_be():
    for make in (lambda: GaussianProcess(memory=1.0), lambda: GaussianProcess(shortest=2.0), lambda: GaussianMixture(size=3)):
        with pytest.raises(UserError, match="needs"):
            make()


# Exact denoisers and posteriors


class Dense:
    """The space-time process with dense matrices."""

    def __init__(self, frames: int = 3, rows: int = 7):
        self.process = GaussianProcess(n=4, memory=0.7)
        self.prior, _ = prior_of(self.process, frames)
        lag = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
        self.c = torch.kron(self.process.memory ** lag.double(), self.process.covariance)
        self.a, self.y, self.r = normal(rows, len(self.c)), normal(rows, seed=1), 0.1 + normal(rows, seed=2) ** 2
        self.gain = self.c @ self.a.T @ torch.linalg.inv(self.a @ self.c @ self.a.T + torch.diag(self.r))
        self.posterior = self.prior.given(self.a, self.y, self.r)
        self.x = 2 * normal(5, *self.prior.shape, seed=3)


@pytest.fixture(scope="module")
def dense() -> Dense:
    return Dense()


@pytest.mark.parametrize("sigma", [0.01, 1.0, 100.0])
def test_the_gaussian_denoiser_is_the_dense_one(dense, sigma):
    level = torch.tensor(sigma, dtype=torch.float64)
    expected = dense.x.flatten(1) @ torch.linalg.inv(dense.c + sigma**2 * torch.eye(len(dense.c))) @ dense.c
    torch.testing.assert_close(dense.prior(dense.x, level).flatten(1), expected, **ROUND)
    precision = torch.linalg.inv(dense.c) + torch.eye(len(dense.c)) / sigma**2 + dense.a.T @ (dense.a / dense.r[:, None])
    right = dense.x.flatten(1) / sigma**2 + (dense.y / dense.r) @ dense.a
    torch.testing.assert_close(dense.posterior(dense.x, level).flatten(1), torch.linalg.solve(precision, right.T).T, rtol=1e-6, atol=1e-7)


def test_the_gaussian_posterior_is_the_dense_one(dense):
    covariance = dense.c - dense.gain @ dense.a @ dense.c
    torch.testing.assert_close(dense.prior.variance, dense.c.diagonal(), **ROUND)
    torch.testing.assert_close(dense.posterior.mean, dense.gain @ dense.y, **ROUND)
    torch.testing.assert_close(dense.posterior.variance, covariance.diagonal(), **ROUND)
    mean, variance = dense.posterior.seen(dense.a[:3])
    torch.testing.assert_close(mean, dense.a[:3] @ dense.gain @ dense.y, **ROUND)
    torch.testing.assert_close(variance, (dense.a[:3] @ covariance @ dense.a[:3].T).diagonal(), **ROUND)
    one_by_one = dense.prior.given(dense.a[:4], dense.y[:4], dense.r[:4]).given(dense.a[4:], dense.y[4:], dense.r[4:])
    torch.testing.assert_close(one_by_one.mean, dense.posterior.mean, **ROUND)
    sample = dense.posterior.sample(0, range(4000)).flatten(1)
    assert (sample.mean(0) - dense.posterior.mean).abs().max() < 0.08
    assert (torch.cov(sample.T) - covariance).abs().max() < 0.12
    torch.testing.assert_close(dense.posterior.sample(0, [7]).flatten(1)[0], sample[7], **ROUND)


def test_denoisers_are_differentiable(dense):
    """The Jacobian of the exact denoiser is the conditional covariance over sigma^2: symmetric."""
    level, size = torch.tensor(0.7, dtype=torch.float64), len(dense.c)
    mixture = MixtureOracle(torch.ones(3, dtype=torch.float64), normal(3, 4), torch.eye(4, dtype=torch.float64), (1, 1, 1, 4))
    jacobian = torch.autograd.functional.jacobian(lambda v: dense.prior(v.reshape(1, *dense.prior.shape), level).flatten(), normal(size))
    torch.testing.assert_close(jacobian, dense.c @ torch.linalg.inv(dense.c + 0.49 * torch.eye(size, dtype=torch.float64)), **ROUND)
    jacobian = torch.autograd.functional.jacobian(lambda v: mixture(v.reshape(1, 1, 1, 1, 4), level).flatten(), normal(4))
    torch.testing.assert_close(jacobian, jacobian.T, **ROUND)


@pytest.fixture(scope="module")
def lattice() -> tuple[MixtureOracle, torch.Tensor, torch.Tensor]:
    """A mixture in the plane, and its density (unnormalised) on a grid of points."""
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    oracle = MixtureOracle(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 3 * normal(3, 2), covariance, (1, 1, 1, 2))
    points = torch.cartesian_prod(*[torch.linspace(-14, 14, 561, dtype=torch.float64)] * 2)
    gaussian = torch.distributions.MultivariateNormal
    density = sum(w * gaussian(m, covariance).log_prob(points).exp() for w, m in zip(oracle.weights, oracle.means, strict=True))
    return oracle, points, density


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_the_mixture_denoiser_and_posterior_are_those_of_quadrature(lattice, sigma):
    oracle, points, density = lattice
    x, level = 3 * normal(4, 1, 1, 1, 2, seed=5), torch.tensor(sigma, dtype=torch.float64)
    a, y, r = normal(1, 2, seed=6), torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    likelihood = torch.exp(-((y - points @ a.T) ** 2 / r).sum(1) / 2)
    for law, weight in ((oracle, density), (oracle.given(a, y, r), density * likelihood)):
        mean = weight @ points / weight.sum()
        torch.testing.assert_close(law.mean, mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(law.variance, weight @ (points - mean) ** 2 / weight.sum(), rtol=1e-6, atol=1e-6)
        near = torch.exp(-(torch.cdist(x.flatten(1), points) ** 2) / (2 * sigma**2)) * weight
        torch.testing.assert_close(law(x, level).flatten(1), near @ points / near.sum(1, keepdim=True), rtol=1e-6, atol=1e-6)
        sample = law.sample(1, range(4000)).flatten(1)
        assert ((sample.mean(0) - law.mean) / law.variance.sqrt()).abs().max() < 0.08
        assert (law.responsibilities(sample).mean(0) - law.weights).abs().max() < 0.03


def test_the_mixture_denoiser_is_that_of_quadrature_on_a_line():
    one = torch.ones(1, 1, dtype=torch.float64)
    oracle = MixtureOracle(torch.tensor([0.2, 0.8], dtype=torch.float64), torch.tensor([[-2.0], [1.0]]).double(), 0.3 * one, (1, 1, 1, 1))
    grid = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    density = sum(w * torch.exp(-((grid - m) ** 2) / 0.6) for w, m in ((0.2, -2.0), (0.8, 1.0)))
    for x in (-3.0, -0.5, 2.0):
        near = density * torch.exp(-((x - grid) ** 2) / (2 * 0.8**2))
        found = oracle(x * one.reshape(1, 1, 1, 1, 1), torch.tensor(0.8, dtype=torch.float64))
        assert float(found) == pytest.approx(float((near * grid).sum() / near.sum()), abs=1e-8)


# What is observed


@pytest.mark.parametrize("design", DESIGNS)
def test_designs_observe_the_stated_share_of_cells_anew_in_each_frame(design):
    matrix = cells(design, (2, 1, 20, 20), None, 0.1, seed=0)
    assert matrix.shape == (80, 800) and torch.equal(matrix.sum(1), torch.ones(80).double())
    seen = matrix.sum(0).reshape(2, 400)
    assert torch.equal(seen.sum(1), torch.full((2,), 40.0).double()) and seen.max() == 1
    assert not torch.equal(seen[0], seen[1]) or design == "all"
    assert torch.equal(cells(design, (2, 1, 20, 20), None, 0.1, seed=0), matrix)
    assert len(cells(design, (1, 1, 8, 8), 5, 0.9, seed=0)) == 5


def test_dense_observations_and_impossible_ones():
    assert torch.equal(cells("points", (1, 1, 5, 5), None, 1.0, 0), torch.eye(25).double())
    for design, rows, fraction in (("nothing", None, 0.1), ("points", 26, 0.1), ("points", None, 0.0)):
        with pytest.raises(UserError, match="design="):
            cells(design, (1, 1, 5, 5), rows, fraction, 0)
    with pytest.raises(UserError, match="rows"):
        projection(8, 9, 0)
    with pytest.raises(UserError, match="error=0"):
        errors(4, 0.0, None, 1.0, 0)


def test_errors_and_the_random_projection():
    wide = errors(4000, 0.01, 1.0, 1.0, 0).log10()
    assert wide.min() >= -2 and wide.max() <= 0 and abs(float(wide.mean()) + 1) < 0.05
    assert torch.equal(errors(3, 0.2, None, 1.0, 0), torch.full((3,), 0.2, dtype=torch.float64))
    shared = errors(3, None, None, 0.7, 1)
    assert float(shared.std()) == 0 and 0 < float(shared[0]) < 0.7
    singular = torch.linalg.svdvals(projection(40, 3, 0))
    assert singular.shape == (3,) and singular.max() < 1


# The words of guidance


def test_observations_and_modes_are_adjoint_and_complete():
    problem = make_problem(GaussianProcess(n=5, memory=0.6), frames=3, fraction=0.3, rank=4, draws=30)
    operator, covariance = problem.observation.operator, problem.covariance
    z, v = normal(2, *problem.shape), normal(2, len(problem.matrix), seed=1)
    a = covariance.project(z)
    torch.testing.assert_close(covariance.expand(a), z, **ROUND)
    torch.testing.assert_close(operator.forward(a), operator.predict(z), **ROUND)
    torch.testing.assert_close((operator.forward(a) * v).sum(), (a * operator.adjoint(v)).sum(), **ROUND)
    torch.testing.assert_close(covariance.expand(operator.adjoint(v)).flatten(1), v @ problem.matrix, **ROUND)
    level, r = torch.tensor(0.8).double(), problem.observation.variance
    v1 = v * r.rsqrt()
    whitened = v + operator.forward(covariance.apply(operator.adjoint(v1), level)) * r.rsqrt()
    torch.testing.assert_close(operator.preconditioner(covariance, level, r)(whitened), v, **ROUND)
    middle = covariance.local(1, level)
    assert middle.shape == (25, 1, 1) and (middle > 0).all()


def test_the_climatology_of_many_draws_is_the_covariance():
    prior, exact = prior_of(GaussianProcess(n=4, memory=0.6), 3)
    found = climatology(prior, 16, 4000, 0)
    eye = torch.eye(48, dtype=torch.float64).reshape(48, 3, 16)
    assert (found.function(eye, lambda v: v) - exact.function(eye, lambda v: v)).abs().max() < 0.15
    low = climatology(prior, 3, 200, 0)
    values = low.autocovariance[:, 0]
    assert torch.equal(values[3:], values[3].expand(13)) and values[2] > values[3]
    assert float(values.sum()) == pytest.approx(16, rel=0.1)
    with pytest.raises(UserError, match="rank=20"):
        climatology(prior, 20, 200, 0)


def test_passes_through_the_denoiser_are_counted():
    calls = Calls()
    counted = calls.of(lambda x, sigma: x**2 / sigma)
    x = normal(4, 3).requires_grad_(True)
    mean = counted(x, torch.tensor(2.0))
    for _ in range(3):
        torch.autograd.grad(mean, x, torch.ones_like(mean), retain_graph=True)
    torch.autograd.grad(mean.square().sum() + mean.sum(), x)  # one pass, however many ways lead to it
    with torch.no_grad():
        counted(x, torch.tensor(2.0))
    assert (calls.forwards, calls.vjps) == (8, 16)


def test_members_do_not_depend_on_batch_or_ensemble():
    problem = make_problem(GaussianProcess(n=5), rank=None)
    sampler = DPMSolverPP2M(6, 100.0, 0.01, eta=1.0)
    whole, calls, _ = guided_sample(problem, MomentMatching(), sampler, 6, 6)
    parts, same, _ = guided_sample(problem, MomentMatching(), sampler, 5, 2)
    torch.testing.assert_close(parts, whole[:5], **ROUND)
    assert calls.forwards / 6 == same.forwards / 5 == calls.vjps / 6 == same.vjps / 5 == 6


# Scores


def test_scores_of_shifted_and_stretched_ensembles():
    x, std = normal(4000, 30).numpy(), np.full(30, 2.0)
    moved = 2.0 * (0.3 + 1.1 * x)
    assert posterior_scores.mean_error(moved, np.zeros(30), std) == pytest.approx(0.3, abs=0.02)
    assert posterior_scores.mean_error(2.0 * x, np.zeros(30), std) < 0.01
    assert posterior_scores.spread_ratio(moved, std) == pytest.approx(1.1, abs=0.01)
    shift = posterior_scores.sliced_wasserstein(x, x + 0.5)
    assert shift == pytest.approx(0.5, abs=0.05)  # the mean square of a unit vector's entries is 1 / n
    assert posterior_scores.sliced_wasserstein(x, x) == 0
    y, r = np.zeros(30), np.full(30, 0.5)
    assert posterior_scores.chi_square(x, y, r) / posterior_scores.exact_chi_square(y, np.ones(30), y, r) == pytest.approx(1, abs=0.01)
    assert posterior_scores.total_variation(np.array([0.5, 0.5, 0]), np.array([0.25, 0.5, 0.25])) == 0.25
    with pytest.raises(ValueError, match="equal size"):
        posterior_scores.sliced_wasserstein(x, x[:5])


def test_the_wasserstein_distance_of_gaussians():
    root = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    a, b = (root * s**2 @ root.T for s in (np.array([1.0, 2, 3, 4]), np.array([2.0, 2, 1, 0])))
    found = posterior_scores.gaussian_wasserstein(np.zeros(4), a, np.full(4, 0.5), b)
    assert found == pytest.approx(math.sqrt(1 + 0 + 4 + 16 + 1), abs=1e-7)


@pytest.mark.parametrize("law", ["process", "mixture"])
def test_an_exact_ensemble_sits_at_its_floors(law):
    if law == "process":
        problem = make_problem(GaussianProcess(n=16), fraction=0.1, rank=None)
    else:
        problem = make_problem(GaussianMixture(), design="projection", rows=2, error=None, rank=None, seed=1)
    found = scores(problem, problem.posterior.sample(5, range(512), "another"))
    assert found["mean_error"] < 0.03
    assert found["sliced_wasserstein"] < (1.06 if law == "process" else 1.6) * found["sliced_wasserstein_floor"]
    for key in ("spread_ratio", "spread_ratio_observed", "chi2_ratio"):
        assert found[key] == pytest.approx(1, abs=0.015 if law == "process" and "spread" in key else 0.08), key
    assert found.get("mode_weight_error", 0.0) < 0.05


def test_samples_beyond_all_bounds_have_diverged():
    problem = make_problem(GaussianProcess(n=4), rank=None)
    with pytest.raises(FloatingPointError, match="too large"), np.errstate(all="ignore"):
        scores(problem, torch.full((3, *problem.shape), 1e200, dtype=torch.float64))


# Long windows: the law of a composed sampler, exactly (a linear sampler, so that one member per noise tells all)

PERIOD, SIDE = 24, 2


class Law:
    """The covariance of what a deterministic sampler draws with a linear denoiser, beside the exact process."""

    def __init__(self, memory: float):
        self.oracle, self.covariance = prior_of(GaussianProcess(n=SIDE, memory=memory, shortest=0.2, longest=0.6), PERIOD)
        self.memory, self.size = memory, PERIOD * SIDE**2
        self.exact = self.oracle.spread(torch.eye(self.size, dtype=torch.float64))

    def of(self, denoiser) -> torch.Tensor:
        eye = torch.eye(self.size, dtype=torch.float64).reshape(self.size, *self.oracle.shape)
        sample = DPMSolverPP2M(48, 300.0, 0.003, eta=0.0)(denoiser, lambda step: eye).flatten(1)
        return sample.T @ sample

    def distance(self, covariance: torch.Tensor) -> float:
        """Wasserstein, relative to the root of the total variance."""
        zero = np.zeros(self.size)
        return posterior_scores.gaussian_wasserstein(zero, covariance.numpy(), zero, self.exact.numpy()) / float(self.exact.trace()) ** 0.5

    def in_time(self, covariance: torch.Tensor) -> torch.Tensor:
        """(T, T), summed over cells."""
        return torch.einsum("tisi->ts", covariance.reshape(PERIOD, SIDE**2, PERIOD, SIDE**2))

    def lag(self, covariance: torch.Tensor, k: int) -> float:
        c = self.in_time(covariance)
        return float(c.diagonal(k).sum() / (c.diagonal()[k:].sum() * c.diagonal()[:-k].sum()).sqrt())

    def innovations(self, covariance: torch.Tensor) -> torch.Tensor:
        """Variance of x_t - memory x_{t-1} over the exact one, for t = 1 .. T-1: seams show in it."""
        c = self.in_time(covariance)
        found = c.diagonal()[1:] - 2 * self.memory * c.diagonal(1) + self.memory**2 * c.diagonal()[:-1]
        return found / ((1 - self.memory**2) * SIDE**2)


@pytest.fixture(scope="module", params=[0.9, 0.98])
def law(request) -> Law:
    return Law(request.param)


def composed(law: Law, far: GaussianOracle | None, layout: WindowLayout):
    """Exact windows, composed around a linear denoiser of the whole period, or averaged where they overlap."""
    if far is None:
        return compose_windows(lambda x, sigma, first: law.oracle(x, sigma), lambda x, sigma: torch.zeros_like(x), layout, 10**6)
    return compose_windows(lambda x, sigma, first: law.oracle(x, sigma) - far(x, sigma), far, layout, 10**6)


def test_the_whole_period_has_the_law_of_the_process(law):
    found = law.of(law.oracle)
    assert law.distance(found) < 0.005
    assert law.lag(law.exact, 8) == pytest.approx(law.memory**8, rel=1e-6)
    assert law.lag(found, 8) == pytest.approx(law.memory**8, rel=0.005)


@pytest.mark.parametrize("overlap", [2, 4])
def test_windows_averaged_lose_the_long_correlations(law, overlap):
    """Plain window averaging, as in SDA: the noised field is not Markov, so that exact windows do not make an exact whole."""
    found = law.of(composed(law, None, WindowLayout(PERIOD, 5, overlap)))
    assert law.distance(found) > 0.25
    assert law.lag(found, 8) < 0.3 * law.memory**8
    assert law.innovations(found).max() > 1.2


@pytest.mark.parametrize("draws", [None, 64])
def test_windows_composed_around_a_linear_denoiser_keep_them(law, draws):
    """Also where that linear denoiser is poor, from a covariance estimated on 64 trajectories, and only the windows are exact."""
    far = law.oracle if draws is None else GaussianOracle(climatology(law.oracle, SIDE**2, draws, 0), law.oracle.shape)
    found = law.of(composed(law, far, WindowLayout(PERIOD, 5, 2)))
    assert law.distance(found) < (0.005 if draws is None else 0.05)
    assert law.lag(found, 8) == pytest.approx(law.memory**8, rel=0.005 if draws is None else 0.05)
    assert (law.innovations(found) - 1).abs().max() < 0.05
    if draws is not None:
        assert law.distance(law.of(far)) > 0.1  # the windows matter


LONG = """
import resource, sys, time
import numpy as np, pandas as pd, torch
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.diffusion.samplers import DPMSolverPP2M
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer
from appa_lite.observations import build_observation

torch.set_num_threads(1)
frames, cells = int(sys.argv[1]), 16
spec = FieldSpec((Variable("u"),), Grid(("x",), (0.0,), tuple(map(float, range(cells))), (False, True)), 3600.0)
model = LatentDenoiser(spec.shape, 8, width=32, depth=2, heads=1, modes=cells, lags=40)
model.covariance.basis.copy_(torch.eye(cells))
model.covariance.autocovariance.copy_((0.9 ** torch.arange(40.0)).expand(cells, 40))
checkpoint = Checkpoint(spec, Normalizer(spec.shape), IdentityAutoencoder(spec.shape), model.eval().requires_grad_(False), {})
times = to_datetime(3600.0 * np.arange(frames))
rows = {"time": np.repeat(times, 4), "x": np.tile(np.arange(0.0, cells, 4), frames), "observation": 1.0, "error_std": 0.5}
observation = build_observation(pd.DataFrame(rows).assign(variable="u"), spec, times)[0]
forecaster = LatentDiffusion(checkpoint, MomentMatching(), DPMSolverPP2M(4, 50.0, 0.01), overlap=2, batch=4)
began = time.process_time()
forecaster.assimilate(observation, times, range(4), seed=0)
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.fixture(scope="module")
def costs() -> list[tuple[float, float]]:
    """Seconds and peak megabytes of reanalyses of 40 and of 400 frames, each in a process of its own.

    What is freed is given back at once (the threshold of malloc), so that the peak is of what is alive.
    """
    found = []
    for frames in (40, 400):
        command = [sys.executable, "-c", LONG, str(frames)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "32768"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(tuple(map(float, done.stdout.split())))
    return found


@pytest.mark.slow
def test_a_reanalysis_ten_times_longer_takes_ten_times_as_long(costs):
    assert costs[1][0] < 12 * costs[0][0]


@pytest.mark.slow
def test_a_reanalysis_ten_times_longer_needs_no_more_memory(costs):
    assert costs[1][1] - costs[0][1] < 32


# Acceptance, reduced


@pytest.fixture(scope="module")
def small_problem():
    return make_problem(GaussianProcess(n=16), fraction=0.1, error=0.1, rank=None, seed=1)


def accept(found: dict[str, float], spread: float, mean: float) -> None:
    assert found["mean_error"] < mean
    assert found["spread_ratio"] == pytest.approx(1, abs=spread) and found["spread_ratio_observed"] == pytest.approx(1, abs=0.05)
    assert found["sliced_wasserstein"] < 1.1 * found["sliced_wasserstein_floor"]
    assert found["chi2_ratio"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("jacobian", [True, False])
def test_moment_matching_with_the_exact_covariance_is_at_the_floor(small_problem, jacobian):
    sampler = DPMSolverPP2M(32, 300.0, 0.003, eta=0.0)
    x, calls, report = guided_sample(small_problem, MomentMatching(jacobian, tolerance=1e-3), sampler, 512, 512)
    accept(scores(small_problem, x), spread=0.025, mean=0.03)
    assert calls.forwards == 32 * 512 and calls.vjps == (32 * 512 if jacobian else 0)
    assert report.summary()["solver_residual_max"] < 1e-3


def test_the_preconditioned_solver_is_calibrated_at_three_products_a_step_and_one_iteration_of_gmres_is_not():
    """With the climatological covariance a user would have, from draws; the truncated solve's bias is in the mean."""
    problem = make_problem(GaussianProcess(n=16), fraction=0.1, error=0.1, rank=32, draws=128, seed=1)
    sampler, mean_error = DPMSolverPP2M(32, 300.0, 0.003, eta=0.0), {}
    for words in (("guidance=mmps", "guidance.tolerance=0", "guidance.max_iterations=2"), ("guidance=mmps_gmres1",)):
        guidance = build(compose("benchmark", words, partial=True).guidance, Guidance)
        x, calls, _ = guided_sample(problem, guidance, sampler, 512, 512)
        found = scores(problem, x)
        mean_error[words[0]] = found["mean_error"]
        if len(mean_error) == 1:
            accept(found, spread=0.025, mean=0.03)
            assert calls.forwards == 32 * 512 and calls.vjps <= 95 * 512
    assert mean_error["guidance=mmps_gmres1"] > 20 * max(mean_error["guidance=mmps"], 0.01)


def test_without_guidance_the_error_is_the_samplers(small_problem):
    x, calls, _ = guided_sample(small_problem, None, DPMSolverPP2M(32, 300.0, 0.003, eta=0.0), 512, 512)
    accept(scores(small_problem, x), spread=0.025, mean=0.03)
    assert calls.vjps == 0


# The command


def run(capsys, *arguments: str, status: int = 0) -> str:
    assert cli.main(["benchmark", *arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_benchmark_of_the_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = "methods=['guidance=null','guidance=moment_matching guidance.tolerance=0.001','sampler=sde_2m']"
    common = ("experiment=gaussian_process", "size=debug", "rank=null", lines, "steps=[8,12]")
    text = run(capsys, *common, "out=runs/a")
    assert {p.name for p in (tmp_path / "runs/a").iterdir()} == {"benchmark.json", "benchmark.png", "settings.json"}
    assert (tmp_path / "runs/a/benchmark.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_json(tmp_path / "runs/a/benchmark.json")
    assert len(table) == 6 and {"guidance", "sampler", "steps", "forwards", "vjps", *SCORES} <= set(table.columns)
    assert list(table.guidance) == ["exact"] * 2 + ["moment_matching tolerance=0.001"] * 2 + ["moment_matching"] * 2
    assert list(table.sampler) == ["ode_2m"] * 4 + ["sde_2m"] * 2 and list(table.steps) == list(table.forwards) == [8, 12] * 3
    assert list(table.vjps) == [0, 0, 8, 12, 8, 12] and all(name in text for name in table.guidance)
    for key in SCORES:
        assert abs(table[key][0] - table[key][2]) < 0.02, key  # a converged solve with the exact covariance is exact
    assert json.loads((tmp_path / "runs/a/settings.json").read_text())["seed"] == 0


def test_benchmark_of_the_mixture_and_of_space_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = run(capsys, "experiment=gaussian_mixture", "size=debug", "rows=2", "out=a", "guidance.tolerance=0.001")
    table = pd.read_json(tmp_path / "a/benchmark.json")
    assert list(table.problem) == [0, 1] and table.mode_weight_error.between(0, 1).all() and "mode weights" in text
    time = ("simulator=gaussian_process_in_time", "simulator.n=5", "frames=3", "rank=null", "members=16", "sampler.steps=4", "out=b")
    run(capsys, *time, "design=clouds", "error=0.01", "error_max=1")
    assert pd.read_json(tmp_path / "b/benchmark.json").observations[0] == 3 * round(0.1 * 25)


def test_a_method_that_diverges_is_told_and_the_others_are_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def explode(self, denoiser, observation, covariance, report):
        return lambda x, sigma: x * float("inf")

    monkeypatch.setattr(MomentMatching, "__call__", explode)
    text = run(capsys, "experiment=gaussian_process", "size=debug", "out=a", "methods=['guidance=moment_matching','guidance=null']")
    table = json.loads((tmp_path / "a/benchmark.json").read_text())
    assert "diverged" in text and table[0]["remark"].startswith("diverged") and table[0]["mean_error"] is None
    assert table[1]["remark"] is None and table[1]["mean_error"] is not None


def test_mistakes_of_a_benchmark_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for words, expected in {
        ("simulator=lorenz96",): "the posterior of a Lorenz96 is not known",
        ("experiment=gaussian_process", "methods=['members=3']"): "changes neither guidance nor sampler",
        ("experiment=gaussian_process", "methods=['guidance=mmsp']"): "unknown guidance 'mmsp'",
        ("experiment=gaussian_process", "methods=['guidance.zetta=1']"): "unknown keyword",
        ("experiment=gaussian_process", "size=debug", "rank=100"): "rank=100",
        ("experiment=gaussian_process", "size=debug", "design=nothing"): "design=nothing",
        ("experiment=gaussian_mixture", "size=debug", "frames=2"): "has no time",
        ("experiment=gaussian_mixture", "size=debug", "rows=null"): "needs rows",
        ("experiment=gaussian_process", "members=1"): "members are at least 2",
        ("experiment=gaussian_process", "out=file"): "is a file",
    }.items():
        err = run(capsys, *(("out=o",) if "out=file" not in words else ()), *words, status=2)
        assert expected in err and err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"file"}
