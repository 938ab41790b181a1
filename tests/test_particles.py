"""The particle-corrected sampler: right on mixtures, where guided denoisers are not; a function of its islands alone."""

import itertools

import pytest
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.random import Streams, generator
from appa_lite.diffusion.base import GuidedDenoiser, Sampler, Twist
from appa_lite.diffusion.oracles import MixtureOracle
from appa_lite.diffusion.particles import TwistedSMC
from appa_lite.diffusion.samplers import DPMSolverPP2M
from appa_lite.guidance.base import Guidance, LatentObservation, LatentOperator, LinearModes, SolverReport
from appa_lite.guidance.dps import DPS
from appa_lite.guidance.mmps import MMPS
from appa_lite.guidance.pigdm import PiGDM

SCALE = 8.0  # distance between the modes of the mixture, whose own standard deviation is 1


class Rows(LatentOperator, LinearModes):
    """y = A z, for latents that are their own modes."""

    linear = True

    def __init__(self, a: torch.Tensor):
        self.a = a

    def predict(self, latents):
        return latents.flatten(1) @ self.a.T

    def linearise(self, latents):
        return self

    def forward(self, components):
        return components.flatten(1) @ self.a.T

    def adjoint(self, values):
        return (values @ self.a)[:, None]


class Numbers:
    """The modes of latents (B, 1, n, 1, 1): themselves; nothing is known of the covariance."""

    def expand(self, components):
        return components[..., None, None]

    def project(self, latents):
        return latents[..., 0, 0]


class Case:
    """The 25 modes 8 (i, j), i and j from -2 to 2, tiled to ``size`` numbers, with random weights, seen through a random matrix.

    Cardoso et al. 2023, 'Monte Carlo guided diffusion for Bayesian linear inverse problems', section 4.
    """

    def __init__(self, size: int, rows: int, seed: int = 3):
        draw = generator(seed, "mixture", size, rows)
        normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
        uniform = lambda *shape: torch.rand(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
        places = [[SCALE * i, SCALE * j] * (size // 2) for i, j in itertools.product(range(-2, 3), repeat=2)]
        self.prior = MixtureOracle(
            uniform(25), torch.tensor(places, dtype=torch.float64), torch.eye(size, dtype=torch.float64), (1, size, 1, 1)
        )
        left, _, right = torch.linalg.svd(normal(rows, size), full_matrices=False)
        self.a, std = left @ torch.diag(uniform(rows)) @ right, uniform(1)
        truth = self.prior.sample(seed, [0], "truth").flatten()
        self.values, self.variance = self.a @ truth + std * normal(rows), (std**2).expand(rows)
        self.posterior = self.prior.given(self.a, self.values, self.variance)
        self.exact = [self.posterior.sample(seed, range(1000), i) for i in range(4)]
        self.floor = sum(sliced(a, b) for a, b in itertools.combinations(self.exact, 2)) / 6

    def guided(self, guidance: Guidance, members: int) -> GuidedDenoiser:
        observation = LatentObservation(Rows(self.a), self.values.expand(members, -1), self.variance)
        return guidance(self.prior, observation, Numbers(), SolverReport())

    def sample(self, sampler: Sampler, seed: int = 0) -> torch.Tensor:
        return sampler(self.guided(MMPS(precondition=False, tolerance=1e-4), 1000), crowd(1000, self.prior.shape, seed))

    def variation(self, sample: torch.Tensor) -> float:
        """Half the sum of |weight of a mode - its exact weight|."""
        return float((self.posterior.responsibilities(sample).mean(0) - self.posterior.weights).abs().sum() / 2)

    def distance(self, sample: torch.Tensor) -> float:
        """Sliced Wasserstein distance to exact sets over that of two of them, each a mean over pairs."""
        return sum(sliced(sample, exact) for exact in self.exact) / len(self.exact) / self.floor


def sliced(a: torch.Tensor, b: torch.Tensor) -> float:
    """The root mean square, over 500 directions, of the distance between sorted projections."""
    directions = torch.randn(a[0].numel(), 500, generator=generator(0, "directions"), dtype=torch.float64)
    directions /= directions.norm(dim=0)
    return float(((a.flatten(1) @ directions).sort(0)[0] - (b.flatten(1) @ directions).sort(0)[0]).square().mean().sqrt())


def crowd(members: int, shape: tuple[int, ...], seed: int = 0):
    draw = generator(seed, "crowd")
    return lambda i: torch.randn(members, *shape, generator=draw, dtype=torch.float64)


def source(members: list[int], shape: tuple[int, ...], seed: int = 0):
    streams = Streams(seed, members, "particles")
    return lambda i: streams.normal(shape, torch.float64)


@pytest.fixture(scope="module")
def mixture() -> Case:
    return Case(8, 2)


def test_particles_find_the_weights_of_modes(mixture):
    """The guided denoiser alone does not, with any sampler."""
    sample = mixture.sample(TwistedSMC(128, 300.0, 0.01, island=50))
    assert mixture.variation(sample) < 0.05 and mixture.distance(sample) < 2.2
    assert mixture.variation(mixture.sample(DPMSolverPP2M(64, 300.0, 0.01, eta=1.0))) > 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("island", "most"), [(10, 2.5), (50, 2.2), (1000, 2.2)])  # ten are few: 2.21 with 8 numbers, 2 observed
@pytest.mark.parametrize(("size", "rows"), [(8, 1), (8, 2), (8, 4), (80, 1), (80, 2), (80, 4)])
def test_particles_on_all_mixtures(size, rows, island, most):
    """Means of three runs. The first noise level is well above the prior's largest standard deviation, 72 along a tile of 80."""
    case = Case(size, rows)
    samples = [case.sample(TwistedSMC(128, 1000.0, 0.01, island), seed) for seed in range(3)]
    variation, distance = (sum(map(measure, samples)) / 3 for measure in (case.variation, case.distance))
    print(f"{size} numbers, {rows} observed, islands of {island}: variation {variation:.3f}, distance {distance:.2f} x floor")
    assert variation < 0.05 and distance < most


class Between(GuidedDenoiser):
    """The posterior of N(0, I) given its first number, and the exact p(y | x_t): what every particle method must leave alone."""

    def __init__(self, value: float, variance: float):
        self.value, self.variance = value, variance

    def __call__(self, x, sigma):
        return self.twist(x, sigma).posterior

    def twist(self, x, sigma):
        prior, left = x / (1 + sigma**2), sigma**2 / (1 + sigma**2)
        innovation = self.value - prior[:, 0]
        posterior = prior.clone()
        posterior[:, 0] += left / (left + self.variance) * innovation
        return Twist(prior, posterior, -0.5 * innovation**2 / (left + self.variance))


@pytest.mark.parametrize(("resampling", "threshold"), [("systematic", 0.5), ("systematic", 1.0), ("multinomial", 0.5)])
def test_a_gaussian_is_left_alone(resampling, threshold):
    """Mean 1.6 and variance 0.2 of the first number; the second knows nothing of it."""
    smc = TwistedSMC(96, 100.0, 0.01, 500, threshold, resampling)
    sample = smc(Between(2.0, 0.25), crowd(4000, (2,)))
    assert (sample.mean(0) - torch.tensor([1.6, 0.0])).abs().max() < 0.06
    assert (sample.std(0) / torch.tensor([0.2**0.5, 1.0]) - 1).abs().max() < 0.06


def test_a_wrong_guidance_is_put_right():
    """The proposal knows nothing of the observation; the weights do."""

    class Deaf(Between):
        def twist(self, x, sigma):
            told = super().twist(x, sigma)
            return Twist(told.prior, told.prior, told.log_likelihood)

    sample = TwistedSMC(96, 100.0, 0.01, 1000)(Deaf(2.0, 0.25), crowd(4000, (2,)))
    assert abs(sample[:, 0].mean() - 1.6) < 0.06 and abs(sample[:, 0].std() / 0.2**0.5 - 1) < 0.1


@pytest.mark.parametrize("guidance", [MMPS(precondition=False), PiGDM()])
@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
def test_members_depend_on_their_island_alone(mixture, guidance, resampling):
    smc = TwistedSMC(12, 300.0, 0.05, island=4, resampling=resampling)
    whole = smc(mixture.guided(guidance, 12), source(list(range(12)), mixture.prior.shape))
    parts = [smc(mixture.guided(guidance, 4), source(list(range(i, i + 4)), mixture.prior.shape)) for i in (0, 4, 8)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=1e-6)


def test_without_observations_it_is_the_stochastic_solver(mixture):
    """Of any number of members."""
    plain = DPMSolverPP2M(16, 100.0, 0.01, eta=1.0)(mixture.prior, source([0, 1, 2], mixture.prior.shape))
    same = TwistedSMC(16, 100.0, 0.01)(mixture.prior, source([0, 1, 2], mixture.prior.shape))
    torch.testing.assert_close(same, plain, rtol=1e-9, atol=1e-9)


def test_mistakes_of_a_user(mixture):
    smc = TwistedSMC(4, 300.0, 0.05, island=4)
    with pytest.raises(UserError, match="no Gaussian .* choose guidance="):
        smc(mixture.guided(DPS(), 4), crowd(4, mixture.prior.shape))
    with pytest.raises(UserError, match="6 members computed together are not whole islands of 4"):
        smc(mixture.guided(MMPS(), 6), crowd(6, mixture.prior.shape))
    with pytest.raises(UserError, match="expected one of systematic, multinomial"):
        TwistedSMC(resampling="residual")
    with pytest.raises(UserError, match=r"sampler\.island is at least 2"):
        TwistedSMC(island=1)


def test_divergence_is_an_error(mixture):
    class Broken(Between):
        def twist(self, x, sigma):
            told = super().twist(x, sigma)
            return Twist(told.prior, told.posterior, told.log_likelihood * torch.nan)

    with pytest.raises(FloatingPointError, match="lost all weight"):
        TwistedSMC(4, 300.0, 0.05, island=4)(Broken(1.0, 1.0), crowd(4, (2,)))
