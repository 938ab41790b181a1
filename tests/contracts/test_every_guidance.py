"""What every guidance method promises; of the exact ones: where the prior is Gaussian, its denoiser is that of the posterior."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from appa_lite.config import build, compose, options
from appa_lite.core.errors import UserError
from appa_lite.diffusion.base import Denoiser, Twist
from appa_lite.guidance.base import Guidance, LatentObservation, LatentOperator, LinearModes, SolverReport

FRAMES, SIZE, ROWS = 3, 4, 5
SHAPE = (SIZE, 1, 1)


class Matrix(LatentOperator, LinearModes):
    """y = A z for a dense A (M, T Z); the modes are the latents themselves; preconditioned by the diagonal, or not."""

    def __init__(self, a: torch.Tensor, preconditioned: bool = True):
        self.a, self.preconditioned = a, preconditioned

    def predict(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.flatten(1) @ self.a.T

    def linearise(self, latents: torch.Tensor) -> LinearModes:
        return self

    def forward(self, components: torch.Tensor) -> torch.Tensor:
        return components.flatten(1) @ self.a.T

    def adjoint(self, values: torch.Tensor) -> torch.Tensor:
        return (values @ self.a).unflatten(1, (FRAMES, SIZE))

    def preconditioner(self, covariance: "Dense", sigma: torch.Tensor, variance: torch.Tensor) -> Callable | None:
        if not self.preconditioned:
            return None
        whiten = torch.diag(variance.rsqrt())
        matrix = self.forward(covariance.apply(self.adjoint(whiten), sigma)) @ whiten
        return lambda residual: residual / (1 + matrix.diagonal())


class Dense:
    """The covariance of z - D(z_t) for a Gaussian with covariance C: sigma^2 C (C + sigma^2)^-1."""

    def __init__(self, c: torch.Tensor):
        self.c, self.eye = c, torch.eye(len(c), dtype=c.dtype)

    def apply(self, components: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        matrix = sigma**2 * self.c @ torch.linalg.inv(self.c + sigma**2 * self.eye)
        return (components.flatten(1) @ matrix).unflatten(1, (FRAMES, SIZE))

    def expand(self, components: torch.Tensor) -> torch.Tensor:
        return components[..., None, None]

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[..., 0, 0]


class Case(NamedTuple):
    c: torch.Tensor
    a: torch.Tensor
    values: torch.Tensor
    variance: torch.Tensor

    def denoiser(self) -> Denoiser:
        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            gain = self.c @ torch.linalg.inv(self.c + sigma**2 * torch.eye(len(self.c), dtype=self.c.dtype))
            return (x.flatten(1) @ gain.T).reshape(x.shape)

        return denoise

    def posterior(self, x: torch.Tensor, sigma: float, variance: torch.Tensor) -> torch.Tensor:
        """E[z | z + sigma n = x, A z + e = y], from the dense precision matrices."""
        precision = torch.linalg.inv(self.c) + torch.eye(len(self.c)) / sigma**2 + self.a.T @ (self.a / variance[:, None])
        right = x.flatten(1) / sigma**2 + (self.values / variance) @ self.a
        return torch.linalg.solve(precision, right.T).T.reshape(x.shape)


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    root = normal(FRAMES * SIZE, FRAMES * SIZE)
    return Case(root @ root.T / SIZE, normal(ROWS, FRAMES * SIZE), normal(2, ROWS), 0.05 + normal(ROWS) ** 2)


@pytest.fixture(scope="module", params=options("guidance"))
def guidance(request) -> Guidance:
    entry = compose("reanalysis", ["size=debug", f"guidance={request.param}"], partial=True).guidance
    if "tolerance" in entry:
        entry.tolerance, entry.max_iterations = 1e-12, 300
    return build(entry, Guidance)


def twist(guidance: Guidance, case: "Case", operator: "Matrix", x: torch.Tensor, sigma: float) -> Twist:
    """Of two members with the same observation; skips methods that have none."""
    observation = LatentObservation(operator, case.values[:1].expand(2, -1), case.variance)
    try:
        return guidance(case.denoiser(), observation, Dense(case.c), SolverReport()).twist(x, torch.tensor(sigma, dtype=torch.float64))
    except UserError:
        pytest.skip("no Gaussian for p(y | x_t)")


@pytest.fixture
def x() -> torch.Tensor:
    return 3 * torch.randn(2, FRAMES, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("sigma", [0.05, 1.0, 50.0])
def test_the_posterior_of_a_gaussian_is_exact(guidance, case, x, sigma, preconditioned):
    if not guidance.exact:
        pytest.skip("an approximation")
    observation = LatentObservation(Matrix(case.a, preconditioned), case.values, case.variance)
    guided = guidance(case.denoiser(), observation, Dense(case.c), SolverReport())
    result = guided(x, torch.tensor(sigma, dtype=torch.float64))
    torch.testing.assert_close(result, case.posterior(x, sigma, case.variance), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("sigma", [0.05, 1.0, 50.0])
def test_the_twist_of_a_gaussian_is_exact(guidance, case, x, sigma, linear):
    """log N(y; A D, R + A C A^T) up to a constant, whether its determinant is known to be common to the members or not."""
    if not guidance.exact:
        pytest.skip("an approximation")
    operator = Matrix(case.a)
    operator.linear = linear
    told = twist(guidance, case, operator, x, sigma)
    mean = case.denoiser()(x, torch.tensor(sigma, dtype=torch.float64))
    spread = Dense(case.c).apply(operator.adjoint(torch.eye(ROWS, dtype=torch.float64)), torch.tensor(sigma, dtype=torch.float64))
    law = torch.distributions.MultivariateNormal(mean.flatten(1) @ case.a.T, operator.forward(spread) + torch.diag(case.variance))
    expected = law.log_prob(case.values[:1])
    torch.testing.assert_close(told.log_likelihood.diff(), expected.diff(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(told.prior, mean)
    posterior = case._replace(values=case.values[:1]).posterior(x, sigma, case.variance)
    torch.testing.assert_close(told.posterior, posterior, rtol=1e-3 if linear else 1e-6, atol=1e-3 if linear else 1e-8)


def test_a_twist_is_of_the_same_posterior(guidance, case, x):
    told = twist(guidance, case, Matrix(case.a), x, 0.7)
    observation = LatentObservation(Matrix(case.a), case.values[:1].expand(2, -1), case.variance)
    guided = guidance(case.denoiser(), observation, Dense(case.c), SolverReport())
    torch.testing.assert_close(told.posterior, guided(x, torch.tensor(0.7, dtype=torch.float64)), rtol=1e-8, atol=1e-9)
    assert told.log_likelihood.shape == (2,) and torch.isfinite(told.log_likelihood).all()


def test_an_observation_that_says_what_was_known_changes_nothing(guidance, case, x):
    sigma = torch.tensor(1.0, dtype=torch.float64)
    mean = case.denoiser()(x, sigma)
    observation = LatentObservation(Matrix(case.a), mean.flatten(1) @ case.a.T, case.variance)
    guided = guidance(case.denoiser(), observation, Dense(case.c), SolverReport())(x, sigma)
    torch.testing.assert_close(guided, mean, rtol=1e-9, atol=1e-9)


def test_an_observation_draws_the_estimate_towards_it(guidance, case, x):
    sigma = torch.tensor(0.3, dtype=torch.float64)
    one = case.a[:1] / case.a[:1].norm()
    mean = case.denoiser()(x, sigma)
    observation = LatentObservation(Matrix(one), mean.flatten(1) @ one.T + 1, torch.full((1,), 0.01, dtype=torch.float64))
    guided = guidance(case.denoiser(), observation, Dense(case.c), SolverReport())(x, sigma)
    assert ((guided - mean).flatten(1) @ one.T > 0.01).all()


def test_an_observation_without_information_changes_nothing(guidance, case, x):
    twist(guidance, case, Matrix(case.a), x, 1.0)  # a method that has none does not look at the errors
    observation = LatentObservation(Matrix(case.a), case.values, torch.full((ROWS,), 1e14, dtype=torch.float64))
    sigma = torch.tensor(1.0, dtype=torch.float64)
    guided = guidance(case.denoiser(), observation, Dense(case.c), SolverReport())(x, sigma)
    torch.testing.assert_close(guided, case.denoiser()(x, sigma), rtol=1e-9, atol=1e-9)


def test_members_are_guided_one_by_one(guidance, case, x):
    sigma = torch.tensor(0.7, dtype=torch.float64)
    both = LatentObservation(Matrix(case.a), case.values, case.variance)
    together = guidance(case.denoiser(), both, Dense(case.c), SolverReport())(x, sigma)
    for i in range(2):
        one = LatentObservation(Matrix(case.a), case.values[i : i + 1], case.variance)
        alone = guidance(case.denoiser(), one, Dense(case.c), SolverReport())(x[i : i + 1], sigma)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_a_guided_denoiser_is_a_denoiser_without_a_graph(guidance, case, x):
    report = SolverReport()
    guided = guidance(case.denoiser(), LatentObservation(Matrix(case.a), case.values, case.variance), Dense(case.c), report)
    for level in (10.0, 1.0, 0.1):
        result = guided(x, torch.tensor(level, dtype=torch.float64))
        assert result.shape == x.shape and not result.requires_grad and torch.isfinite(result).all()
    assert report.sigma == [10.0, 1.0, 0.1] and len(report.iterations) == len(report.residual) == 3
    assert report.summary()["solver_residual_max"] <= 1e-6 and report.summary()["solver_products_mean"] >= guidance.jacobian
