"""Guidance on small Gaussians with an exact posterior: cost, calibration, broken Jacobians, reports."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.linalg import Stop, conjugate_gradients
from appa_lite.core.random import generator
from appa_lite.diffusion.samplers import DPMSolverPP2M
from appa_lite.diffusion.windows import WindowLayout, compose_windows
from appa_lite.guidance.base import Guidance, LatentObservation, LatentOperator, LinearModes, SolverReport
from appa_lite.guidance.dps import DPS
from appa_lite.guidance.gaussian import LARGEST
from appa_lite.guidance.mmps import MMPS
from appa_lite.guidance.modes import DecodedCells, ModeResponses
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.guidance.pigdm import PiGDM
from appa_lite.guidance.sda import SDA
from appa_lite.guidance.tmpd import TMPD
from appa_lite.observations.base import WeightedCells

SIZE = 64


class Rows(LatentOperator, LinearModes):
    """y = A z for latents (B, 1, SIZE, 1, 1) that are their own modes; ``low_rank`` is all that its preconditioner knows of C."""

    linear = True

    def __init__(self, a: torch.Tensor, low_rank: "Prior | None" = None):
        self.a, self.low_rank = a, low_rank

    def predict(self, latents):
        return latents.flatten(1) @ self.a.T

    def linearise(self, latents):
        return self

    def forward(self, components):
        return components.flatten(1) @ self.a.T

    def adjoint(self, values):
        return (values @ self.a)[:, None]

    def preconditioner(self, covariance, sigma, variance):
        if self.low_rank is None:
            return None
        whiten, eye = variance.rsqrt(), torch.eye(len(variance), dtype=torch.float64)
        spread = self.forward(self.low_rank.apply(self.adjoint(eye * whiten), sigma)) * whiten
        factor = torch.linalg.cholesky(eye + spread)
        return lambda residual: torch.cholesky_solve(residual.T, factor).T


@dataclass
class Prior:
    """N(0, U diag(values) U^T) on SIZE numbers, its denoiser, and the covariance of what that leaves; ``twist`` spoils the Jacobian."""

    vectors: torch.Tensor
    values: torch.Tensor
    crooked: torch.Tensor | None = None

    def __call__(self, x, sigma):
        shrunk = (x.flatten(1) @ self.vectors) * (self.values / (self.values + sigma**2))
        clean = shrunk @ self.vectors.T
        return (clean if self.crooked is None else clean + x.flatten(1) @ self.crooked).reshape(x.shape)

    def apply(self, components, sigma):
        gain = self.values * sigma**2 / (self.values + sigma**2)
        return (((components.flatten(1) @ self.vectors) * gain) @ self.vectors.T)[:, None]

    def expand(self, components):
        return components[..., None, None]

    def project(self, latents):
        return latents[..., 0, 0]

    def leading(self, rank: int) -> "Prior":
        rest = self.values[rank:].mean().expand(SIZE - rank)
        return Prior(self.vectors, torch.cat([self.values[:rank], rest]))


def normal(*shape: int, name: object = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0, "test guidance", name), dtype=torch.float64)


@pytest.fixture(scope="module")
def prior() -> Prior:
    """A field on a ring with a red spectrum: variances over three decades, one at every point."""
    wave = torch.fft.fftfreq(SIZE, 1 / SIZE, dtype=torch.float64).abs()
    spectrum = (1 + (wave / 4) ** 2) ** -2
    x = torch.arange(SIZE, dtype=torch.float64)
    lag = (spectrum * torch.cos(2 * torch.pi * (x[:, None, None] - x[:, None]) * torch.fft.fftfreq(SIZE, dtype=torch.float64))).sum(-1)
    values, vectors = torch.linalg.eigh(lag / lag[0, 0])
    return Prior(vectors.flip(-1), values.flip(-1).clamp(min=1e-9))


@dataclass
class Problem:
    prior: Prior
    a: torch.Tensor
    variance: torch.Tensor
    values: torch.Tensor

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (SIZE,) and covariance of the posterior."""
        c = (self.prior.vectors * self.prior.values) @ self.prior.vectors.T
        gain = torch.linalg.solve(self.a @ c @ self.a.T + torch.diag(self.variance), self.a @ c).T
        return gain @ self.values, c - gain @ self.a @ c

    def observation(self, members: int, low_rank: Prior | None = None) -> LatentObservation:
        return LatentObservation(Rows(self.a, low_rank), self.values.expand(members, -1), self.variance)

    def guided(self, guidance: Guidance, members: int, low_rank: Prior | None = None):
        report = SolverReport()
        return guidance(self.prior, self.observation(members, low_rank), self.prior, report), report


def problem(prior: Prior, std: torch.Tensor, name: str) -> Problem:
    """As many points as errors, of a draw of the prior; a quarter of the points when they are many."""
    points = torch.randperm(SIZE, generator=generator(0, "points", name))[: len(std)]
    truth = prior.vectors @ (prior.values.sqrt() * normal(SIZE, name=name))
    a = torch.eye(SIZE, dtype=torch.float64)[points]
    return Problem(prior, a, std**2, a @ truth + std * normal(len(std), name=name + " errors"))


@pytest.fixture(scope="module")
def plain(prior) -> Problem:
    return problem(prior, torch.full((12,), 0.1, dtype=torch.float64), "plain")


@pytest.fixture(scope="module")
def mixed(prior) -> Problem:
    """Errors over two decades, accurate points beside coarse ones."""
    return problem(prior, torch.logspace(-2, 0, 24, dtype=torch.float64), "mixed")


def noise(members: int):
    stream = generator(0, "noise")
    return lambda step: torch.randn(members, 1, SIZE, 1, 1, generator=stream, dtype=torch.float64)


def scores(case: Problem, sample: torch.Tensor) -> dict[str, float]:
    """Error of the mean and spread over the posterior's, spread at the observed points, and the chi-square ratio of y - A x."""
    mean, covariance = case.exact()
    std = covariance.diagonal().sqrt()
    x = sample.flatten(1)
    error = (((x.mean(0) - mean) / std) ** 2).mean() - 1 / len(x)
    spread = x.var(0) / std**2
    seen = case.a.argmax(1)
    left = ((case.values - x @ case.a.T) ** 2 / case.variance).sum(1).mean()
    expected = ((case.values - case.a @ mean) ** 2 / case.variance).sum() + (
        (case.a @ covariance @ case.a.T).diagonal() / case.variance
    ).sum()
    return {
        "mean": float(error.clamp(min=0).sqrt()),
        "spread": float(spread.mean().sqrt()),
        "seen": float(spread[seen].mean().sqrt()),
        "chi2": float(left / expected),
    }


METHODS = {
    "moment_matching": MomentMatching(),
    "moment_matching without products": MomentMatching(jacobian=False),
    "mmps": MMPS(),
    "mmps without covariance": MMPS(precondition=False, tolerance=0.01, max_iterations=50),
}


@pytest.mark.parametrize("method", METHODS)
def test_errors_over_two_decades(mixed, method):
    """The accurate points keep their spread: what unwhitened, truncated solvers lose without a word."""
    guided, report = mixed.guided(METHODS[method], 1024, mixed.prior.leading(12))
    got = scores(mixed, DPMSolverPP2M(32, 1000.0, 0.001, eta=0.0)(guided, noise(1024)))
    assert got["mean"] < 0.03 and abs(got["spread"] - 1) < 0.03 and abs(got["seen"] - 1) < 0.05 and abs(got["chi2"] - 1) < 0.1, got
    assert report.summary()["solver_missed"] == 0


def test_one_iteration_is_biased_whatever_the_steps(mixed):
    azula = MMPS("gmres", 0.0, 1, warm=False, whiten=False, precondition=False)
    for steps in (32, 128):
        got = scores(mixed, DPMSolverPP2M(steps, 1000.0, 0.001, eta=0.0)(mixed.guided(azula, 256)[0], noise(256)))
        assert got["mean"] > 0.3 and got["seen"] > 1.5, got


@pytest.mark.parametrize("guidance", [SDA(), PiGDM(), TMPD()])
def test_approximations_are_right_for_one_observation(prior, guidance):
    """What each takes for A C A^T is nearly a number when there is one value; the correction has the direction sigma^2 J^T A^T."""
    case = problem(prior, torch.tensor([0.5], dtype=torch.float64), "one")
    x, sigma = normal(2, 1, SIZE, 1, 1, name="x"), torch.tensor(0.4, dtype=torch.float64)
    exact = case.guided(MomentMatching(tolerance=1e-10), 2)[0](x, sigma) - prior(x, sigma)
    got = case.guided(guidance, 2)[0](x, sigma) - prior(x, sigma)
    if isinstance(guidance, TMPD):  # one row sum is the number itself
        torch.testing.assert_close(got, exact)
    cosine = torch.nn.functional.cosine_similarity(got.flatten(1), exact.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_sda_and_pigdm_by_hand(plain):
    x, sigma = normal(2, 1, SIZE, 1, 1, name="x"), torch.tensor(0.4, dtype=torch.float64)
    mean = plain.prior(x, sigma)
    innovation = plain.values - mean.flatten(1) @ plain.a.T
    jacobian = (plain.prior.vectors * (plain.prior.values / (plain.prior.values + sigma**2))) @ plain.prior.vectors.T
    for guidance, spread in ((SDA(0.3), 0.3 * sigma**2), (PiGDM(2.0, tolerance=1e-12), 2 * sigma**2 / (2 + sigma**2))):
        expected = sigma**2 * (innovation / (plain.variance + spread)) @ plain.a @ jacobian
        torch.testing.assert_close((plain.guided(guidance, 2)[0](x, sigma) - mean).flatten(1), expected, rtol=1e-8, atol=1e-10)


def test_dps_takes_a_step_of_the_length_asked_for(plain):
    x, sigma = normal(2, 1, SIZE, 1, 1, name="x").requires_grad_(True), torch.tensor(0.4, dtype=torch.float64)
    mean = plain.prior(x, sigma)
    (slope,) = torch.autograd.grad((plain.values - mean.flatten(1) @ plain.a.T).norm(dim=1).sum(), x)
    guided, _ = plain.guided(DPS(0.7), 2)
    torch.testing.assert_close(guided(x.detach(), sigma), (mean - 0.7 * slope).detach())
    with pytest.raises(UserError, match="no Gaussian"):
        guided.twist(x.detach(), sigma)


# Cost


class Counted:
    """A denoiser that counts its forwards, and the products with its Jacobian by a hook on its graph."""

    def __init__(self, denoiser):
        self.denoiser, self.forwards, self.products = denoiser, 0, 0

    def __call__(self, x, sigma):
        self.forwards += 1
        mean = self.denoiser(x, sigma)
        if mean.requires_grad:
            mean.register_hook(self._count)
        return mean

    def _count(self, gradient):
        self.products += 1


@pytest.mark.parametrize(
    ("guidance", "products"),
    [
        (MMPS(tolerance=0.0, max_iterations=3, warm=False), [3, 3]),
        (MMPS(tolerance=0.0, max_iterations=3), [3, 4]),
        (MMPS("gmres", tolerance=0.0, max_iterations=3), [3, 4]),
        (MMPS("gmres", 0.0, 1, warm=False, whiten=False, precondition=False), [1, 1]),
        (MomentMatching(), [1, 1]),
        (MomentMatching(jacobian=False), [0, 0]),
        (PiGDM(), [1, 1]),
        (SDA(), [1, 1]),
        (TMPD(), [2, 2]),
        (DPS(), [1, 1]),
    ],
)
def test_products_with_the_jacobian(plain, guidance, products):
    """Fused: k products cold, k + 1 warm, none for the correction; and the report counts what was made."""
    counted, report = Counted(plain.prior), SolverReport()
    guided = guidance(counted, plain.observation(2), plain.prior, report)
    made = []
    for sigma in (1.0, 0.5):
        before = counted.products
        guided(normal(2, 1, SIZE, 1, 1, name=sigma), torch.tensor(sigma, dtype=torch.float64))
        made.append(counted.products - before)
    assert counted.forwards == 2 and made == products == report.products


def test_what_is_known_saves_products(mixed):
    """Whitening, warm starts and a climatology of twelve modes, each on top of the other."""
    spent = []
    for settings in ({"whiten": False, "warm": False}, {"warm": False}, {}, {"precondition": True}):
        guidance = MMPS(max_iterations=400, **({"precondition": False} | settings))
        guided, report = mixed.guided(guidance, 4, mixed.prior.leading(12))
        DPMSolverPP2M(24, 100.0, 0.005, eta=0.0)(guided, noise(4))
        spent.append(report.summary()["solver_products_mean"])
    assert spent[0] > spent[1] > spent[2] > spent[3], spent
    assert spent[3] < 6


# Azula


@pytest.mark.parametrize("solver", ["gmres", "cg"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_defaults_of_azula_are_a_setting(mixed, solver, iterations):
    azula = pytest.importorskip("azula.guidance.mmps")
    from azula.denoise import Denoiser, DiracPosterior
    from azula.linalg.covariance import DiagonalCovariance
    from azula.noise import VESchedule

    class Theirs(Denoiser):
        schedule = VESchedule(0.01, 100.0)

        def forward(self, x_t, t, **kwargs):
            return DiracPosterior(mean=mixed.prior(x_t, self.schedule(t)[1]))

    theirs = Theirs()
    guided = azula.MMPSDenoiser(
        theirs, mixed.values, lambda z: z.flatten(1) @ mixed.a.T, DiagonalCovariance(mixed.variance), solver, iterations
    )
    ours, report = mixed.guided(MMPS(solver, 0.0, iterations, warm=False, whiten=False, precondition=False), 2)
    for t in (0.2, 0.5, 0.9):
        t = torch.tensor(t, dtype=torch.float64)
        x = normal(2, 1, SIZE, 1, 1, name=float(t)) * theirs.schedule(t)[1]
        torch.testing.assert_close(ours(x, theirs.schedule(t)[1]), guided(x, t).mean, rtol=1e-10, atol=1e-12)
    assert len(report.residual) == 3 and max(report.residual) > 0.1


# Learned denoisers: a Jacobian that is neither symmetric nor positive


@pytest.fixture(scope="module")
def broken(prior, plain) -> Problem:
    """Sixty per cent asymmetric, and indefinite where it is observed."""
    seen = plain.a.T @ plain.a
    crooked = Prior(prior.vectors, prior.values, 0.3 * normal(SIZE, SIZE, name="crooked") / 8 - 0.5 * seen)
    return Problem(crooked, plain.a, plain.variance, plain.values)


@pytest.mark.parametrize("solver", ["cg", "gmres"])
def test_an_indefinite_jacobian_is_solved_all_the_same(broken, solver):
    guided, report = broken.guided(MMPS(solver, tolerance=1e-8, max_iterations=50, precondition=False), 3)
    x, sigma = 2 * normal(3, 1, SIZE, 1, 1, name="x"), torch.tensor(2.0, dtype=torch.float64)
    got = guided(x, sigma)
    eye = torch.eye(SIZE, dtype=torch.float64).reshape(SIZE, 1, SIZE, 1, 1)
    jacobian = broken.prior(eye, sigma).flatten(1).T
    system = torch.diag(broken.variance) + broken.a @ (sigma**2 * jacobian.T) @ broken.a.T
    assert torch.linalg.eigvalsh(system + system.T)[0] < 0
    mean = broken.prior(x, sigma)
    v = torch.linalg.solve(system, (broken.values - mean.flatten(1) @ broken.a.T).T).T
    expected = mean.flatten(1) + sigma**2 * v @ broken.a @ jacobian
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-5, atol=1e-5)
    assert report.status == (["negative curvature"] if solver == "cg" else ["converged"]) and report.missed == [False]


def test_a_covariance_of_its_own_needs_no_fallback(broken):
    guided, report = broken.guided(MomentMatching(), 8)
    for sigma in (0.1, 1.0, 10.0):
        assert torch.isfinite(guided(sigma * noise(8)(0), torch.tensor(sigma, dtype=torch.float64))).all()
    assert set(report.status) == {"converged"}


# Windows and instruments


def test_products_through_windows_computed_again(plain):
    """A denoiser composed of windows, whose backward pass computes each batch again, once for every product."""
    layout = WindowLayout(9, 4, 2)
    mixing = normal(3, 3, name="mixing") / 3

    def correction(x, sigma, first):
        return 0.3 * torch.tanh(x[:, :, 0, 0] @ mixing)[:, :, None, None] / (1 + sigma)

    class Frames(Rows):
        def adjoint(self, values):
            return (values @ self.a).unflatten(1, (9, 3))

    class Whole(Prior):
        def expand(self, components):
            return components[..., None, None, :]

        def project(self, latents):
            return latents[:, :, 0, 0]

    a = normal(5, 27, name="windows")
    observation = LatentObservation(Frames(a), normal(2, 5, name="values"), torch.full((5,), 0.1, dtype=torch.float64))
    x, sigma = normal(2, 9, 1, 1, 3, name="x"), torch.tensor(0.8, dtype=torch.float64)
    results = []
    for batch in (3, 100):
        composed = compose_windows(correction, lambda x, sigma: x / (1 + sigma**2), layout, batch)
        guided = MMPS(tolerance=1e-9, max_iterations=50, precondition=False)(
            composed, observation, Whole(plain.prior.vectors, plain.prior.values), SolverReport()
        )
        results.append(guided(x, sigma))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.fixture(params=["linear", "speed", "transform"])
def cells(request) -> tuple[DecodedCells, torch.Tensor]:
    """Values of two variables on six cells in four frames, accurate and coarse; speeds; or a variable seen as its exponential."""
    frames, size = 4, 12
    count = 24
    index = torch.randperm(frames * size, generator=generator(0, "cells"))[:count, None]
    row, norm = torch.arange(count), torch.zeros(count, dtype=torch.bool)
    if request.param == "speed":
        row, norm = torch.arange(count) // 2, torch.ones(count // 2, dtype=torch.bool)
    rows = len(norm)
    frame = torch.zeros(rows, dtype=torch.long)
    operator = WeightedCells(
        index=index,
        weight=torch.ones(count, 1, dtype=torch.float64),
        row=row,
        norm=norm,
        offset=torch.zeros(rows, dtype=torch.float64),
        frame=frame,
        first=frame,
        last=frame,
        frame_size=size,
    )
    shape = (2, 1, 6)
    linear = lambda z: z  # noqa: E731
    responses = ModeResponses(operator, linear, torch.eye(size, dtype=torch.float64), shape, 1, 0)
    if request.param == "transform":
        return DecodedCells(operator, frames, lambda z: (0.5 * z).exp(), responses, lambda z: 0.5 * (0.5 * z).exp()), torch.logspace(
            -4, 0, rows
        )
    return DecodedCells(operator, frames, linear, responses), torch.logspace(-4, 0, rows)


class Series:
    """The covariance of twelve modes in time: AR(1) of different variances."""

    variances = torch.logspace(0, -2, 12, dtype=torch.float64)

    def __init__(self, memory: float):
        self.memory = memory

    def local(self, frames, sigma):
        lag = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
        return self.variances[:, None, None] * torch.tensor(self.memory, dtype=torch.float64) ** lag

    def apply(self, components, sigma):
        return torch.einsum("kts,bsk->btk", self.local(components.shape[1], sigma), components)


@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_every_operator_has_a_preconditioner(cells, memory):
    """Symmetric and positive, whether or not the derivative depends on the state; the inverse itself where values are independent."""
    operator, variance = cells[0], cells[1].double()
    linear, covariance, sigma = operator.linearise(normal(2, 4, 2, 1, 6, name="state")), Series(memory), torch.ones(())
    assert operator.linear == (linear.gains is None)
    whiten = variance.rsqrt()

    def matvec(v):
        return v + linear.forward(covariance.apply(linear.adjoint(v * whiten), sigma)) * whiten

    inverse = linear.preconditioner(covariance, sigma, variance)
    u, w = normal(2, len(variance), name="u"), normal(2, len(variance), name="w")
    torch.testing.assert_close((u * inverse(w)).sum(1), (w * inverse(u)).sum(1))
    assert ((u * inverse(u)).sum(1) > 0).all()
    solution = conjugate_gradients(matvec, u, None, 1e-9, 100, inverse)
    assert (solution.stop == Stop.CONVERGED).all() and (memory > 0 or solution.iterations == 1)
    assert inverse(u.float()).isfinite().all()


# Reports


def test_failures_are_told_or_raised(mixed):
    x, sigma = normal(2, 1, SIZE, 1, 1, name="x"), torch.tensor(1.0, dtype=torch.float64)
    guided, report = mixed.guided(MMPS(tolerance=1e-6, max_iterations=2), 2)
    guided(x, sigma)
    assert report.missed == [True] and report.status == ["exhausted"] and "did not converge at 1 of 1 steps" in report.warning()
    with pytest.raises(UserError, match=r"did not converge .* raise guidance\.max_iterations"):
        mixed.guided(MMPS(tolerance=1e-6, max_iterations=2, on_failure="error"), 2)[0](x, sigma)
    with pytest.raises(UserError, match="expected warn or error"):
        MMPS(on_failure="ignore")
    with pytest.raises(UserError, match="expected one of cg, gmres"):
        MMPS(solver="lu")
    done, report = mixed.guided(MomentMatching(), 2)
    done(x, sigma)
    assert report.warning() is None


def test_the_residual_is_that_of_the_accurate_points(mixed):
    """Whatever norm the solver works in, the one reported is whitened by R."""
    x, sigma = normal(1, 1, SIZE, 1, 1, name="x"), torch.tensor(1.0, dtype=torch.float64)
    guided, report = mixed.guided(MMPS("gmres", 0.0, 4, warm=False, whiten=False, precondition=False), 1)
    got = (guided(x, sigma) - mixed.prior(x, sigma)).flatten(1)[0]
    c = (mixed.prior.vectors * (mixed.prior.values * sigma**2 / (mixed.prior.values + sigma**2))) @ mixed.prior.vectors.T
    v = torch.linalg.lstsq(c @ mixed.a.T, got[:, None], driver="gelsd").solution[:, 0]
    innovation = mixed.values - mixed.prior(x, sigma).flatten() @ mixed.a.T
    left = (innovation - mixed.a @ got - mixed.variance * v) / mixed.variance.sqrt()
    assert math.isclose(report.residual[0], float(left.norm() / (innovation / mixed.variance.sqrt()).norm()), rel_tol=1e-4)


def test_reports_are_summed_up():
    one, two, whole = SolverReport(), SolverReport(), SolverReport()
    one.add(10.0, 2, 0.5, 3)
    one.add(1.0, 4, 0.01234567, 5, "negative curvature", True)
    two.add(10.0, 6, 0.1, 7, "exhausted", True)
    two.add(1.0, 1, 0.001, 2)
    for part in (one, two):
        whole.merge(part)
    assert whole.summary() == {
        "solver_iterations_mean": 3.25,
        "solver_residual_max": 0.5,
        "solver_products_mean": 4.25,
        "solver_missed": 0.5,
    }
    attributes = whole.attributes()
    assert {k: v for k, v in attributes.items() if k != "solver_steps"} == whole.summary()
    assert json.loads(attributes["solver_steps"]) == {
        "sigma": [10.0, 1.0],
        "iterations": [6, 4],
        "residual": [0.5, 0.0123],
        "products": [7, 5],
        "status": ["exhausted", "negative curvature"],
    }
    assert "exhausted: 1" in whole.warning() and "negative curvature: 1" in whole.warning()
    empty = SolverReport()
    assert set(empty.summary().values()) == {0.0} and empty.warning() is None and empty.attributes()
    empty.add(math.inf, 3, 0.01)
    assert json.loads(empty.attributes()["solver_steps"])["sigma"] == [None]
    assert max(Stop) == Stop.NEGATIVE_CURVATURE  # what attributes() takes for the worst


def test_too_many_values_for_a_determinant(prior):
    count = LARGEST + 1
    case = Problem(prior, normal(count, SIZE, name="many"), torch.ones(count, dtype=torch.float64), normal(count, name="values"))
    x, sigma = normal(2, 1, SIZE, 1, 1, name="x"), torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(UserError, match="at most 128"):
        case.guided(MMPS(), 2)[0].twist(x, sigma)
    assert torch.isfinite(case.guided(MomentMatching(), 2)[0].twist(x, sigma).log_likelihood).all()
