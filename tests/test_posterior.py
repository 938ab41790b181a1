"""The posterior against the closed form, where the prior is a Gaussian process."""

import numpy as np
import pytest
import torch

from appa_lite.core.covariance import estimate_covariance
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.diffusion.samplers import DPMSolverPP2M
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.forecasters.optimal_interpolation import OptimalInterpolation
from appa_lite.forecasters.posterior import ModeCovariance, Prior
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer
from appa_lite.observations.base import Observation
from appa_lite.observations.points import PointOperator

CELLS, WINDOW, STEP, PHI, SCALE, OFFSET = 16, 8, 3600.0, 0.9, 2.0, 5.0


@pytest.fixture(scope="module")
def gaussian() -> tuple[Checkpoint, torch.Tensor]:
    """A prior whose law is known: AR(1) in time, a ring in space, normalised by hand; and its spatial covariance."""
    grid = Grid(("x",), (0.0,), tuple(float(i) for i in range(CELLS)), (False, True))
    spec = FieldSpec((Variable("u"),), grid, STEP)
    distance = torch.arange(CELLS)[:, None] - torch.arange(CELLS)[None]
    distance = torch.minimum(distance % CELLS, -distance % CELLS).double()
    spatial = torch.exp(-((distance / 2.5) ** 2)) + 1e-3 * torch.eye(CELLS, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(spatial)
    normalizer = Normalizer(spec.shape)
    normalizer.scale.fill_(SCALE)
    normalizer.coefficients.fill_(OFFSET)
    denoiser = LatentDenoiser(spec.shape, WINDOW, width=8, depth=1, heads=1, modes=CELLS, lags=200)
    denoiser.covariance.basis.copy_(vectors)
    denoiser.covariance.autocovariance.copy_(values[:, None] * PHI ** torch.arange(200.0, dtype=torch.float64))
    denoiser.covariance.remainder.zero_()
    return Checkpoint(spec, normalizer, IdentityAutoencoder(spec.shape), denoiser.eval().requires_grad_(False), {"phase": 0.0}), spatial


def _case(spec: FieldSpec, frames: int, rows: int, error: float) -> tuple[Observation, np.ndarray]:
    import pandas as pd

    rng = np.random.default_rng(3)
    times = to_datetime(STEP * np.arange(frames))
    table = pd.DataFrame({"time": times[rng.integers(0, frames, rows)], "x": rng.uniform(0, CELLS - 1, rows), "variable": "u"})
    operator, _ = PointOperator.locate(spec, times, table)
    values = torch.from_numpy(OFFSET + SCALE * rng.standard_normal(rows)).float()
    return Observation(values, torch.full((rows,), error**2), operator), times


def _exact(spatial: torch.Tensor, observation: Observation, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (T, X) of the posterior, from the dense matrices."""
    lag = (torch.arange(frames)[:, None] - torch.arange(frames)[None]).abs().double()
    prior = SCALE**2 * torch.kron(PHI**lag, spatial)
    size = frames * CELLS
    eye = torch.eye(size, dtype=torch.float64).reshape(size, frames, 1, 1, CELLS)
    a = observation.operator(eye).T
    gain = prior @ a.T @ torch.linalg.inv(a @ prior @ a.T + torch.diag(observation.variance.double()))
    mean = OFFSET + gain @ (observation.values.double() - OFFSET)
    std = (prior - gain @ a @ prior).diagonal().sqrt()
    return mean.reshape(frames, CELLS), std.reshape(frames, CELLS)


@pytest.mark.parametrize("jacobian", [True, False])
@pytest.mark.parametrize("frames", [6, 30])
def test_posterior_of_a_gaussian_process(gaussian, frames, jacobian):
    checkpoint, spatial = gaussian
    observation, times = _case(checkpoint.spec, frames, 4 * frames, 0.3)
    model = LatentDiffusion(checkpoint, MomentMatching(jacobian, tolerance=1e-4), DPMSolverPP2M(32, 100.0, 0.005, eta=0.0), 2, 256)
    sample = model.assimilate(observation, times, range(256), seed=0)[:, :, 0, 0].double()
    mean, std = _exact(spatial, observation, frames)
    error = (((sample.mean(0) - mean) / std).square().mean() - 1 / 256).clamp(min=0).sqrt()
    spread = (sample.var(0) / std**2).mean().sqrt()
    assert error < 0.03
    assert abs(spread - 1) < 0.03
    assert model.report.summary()["solver_residual_max"] < 1e-3


def test_optimal_interpolation_is_the_same_posterior(gaussian):
    checkpoint, spatial = gaussian
    observation, times = _case(checkpoint.spec, 12, 30, 0.3)
    sample = OptimalInterpolation(checkpoint, tolerance=1e-6).assimilate(observation, times, range(512), seed=1)[:, :, 0, 0].double()
    mean, std = _exact(spatial, observation, 12)
    assert (((sample.mean(0) - mean) / std).square().mean() - 1 / 512).clamp(min=0).sqrt() < 0.03
    assert abs((sample.var(0) / std**2).mean().sqrt() - 1) < 0.03


def test_no_observation_means_the_prior(gaussian):
    checkpoint, spatial = gaussian
    model = LatentDiffusion(checkpoint, MomentMatching(), DPMSolverPP2M(32, 100.0, 0.005, eta=0.0), 2, 256)
    sample = (model.assimilate(None, to_datetime(STEP * np.arange(24)), range(256), seed=0)[:, :, 0, 0] - OFFSET) / SCALE
    assert abs(sample.std() - spatial[0, 0].sqrt()) < 0.03
    lag = (sample[:, 8:] * sample[:, :-8]).mean() / sample.square().mean()
    assert abs(lag - PHI**8) < 0.05


def test_forecast_of_a_gaussian_process(gaussian):
    """Given the last frames, an AR(1) process decays as phi^lead and its variance grows as 1 - phi^(2 lead)."""
    checkpoint, spatial = gaussian
    model = LatentDiffusion(checkpoint, MomentMatching(tolerance=1e-3), DPMSolverPP2M(32, 100.0, 0.003, eta=0.0), 2, 256, known_error=0.01)
    state = torch.from_numpy(np.random.default_rng(0).multivariate_normal(np.zeros(CELLS), spatial.numpy()))
    known = (OFFSET + SCALE * state).float().reshape(1, 1, 1, 1, CELLS).expand(1, 2, 1, 1, CELLS)
    sample = model.forecast(known, to_datetime(STEP * np.arange(2)), 10, range(256), seed=0)
    anomaly = (sample[:, :, 0, 0].double() - OFFSET) / SCALE
    lead = torch.arange(1, 11).double()[:, None]
    std = (spatial[0, 0] * (1 - PHI ** (2 * lead))).sqrt()
    assert ((anomaly.mean(0) - PHI**lead * state) / std).square().mean().sqrt() < 0.12
    assert abs(((anomaly - PHI**lead * state).square().mean((0, 2)) / std[:, 0] ** 2).mean().sqrt() - 1) < 0.06


def test_members_do_not_depend_on_the_ensemble(gaussian):
    checkpoint, _ = gaussian
    observation, times = _case(checkpoint.spec, 6, 12, 0.5)
    sampler = DPMSolverPP2M(8, 100.0, 0.01)
    three = LatentDiffusion(checkpoint, MomentMatching(), sampler, 2, batch=2).assimilate(observation, times, range(3), seed=5)
    one = LatentDiffusion(checkpoint, MomentMatching(), sampler, 2, batch=8).assimilate(observation, times, [2], seed=5)
    assert torch.allclose(three[2], one[0], atol=1e-3)


def test_linearised_operator_is_the_derivative_of_the_prediction(gaussian):
    """phi and its adjoint agree with autograd through decode and H, in the modes."""
    checkpoint, _ = gaussian
    observation, times = _case(checkpoint.spec, 6, 20, 0.5)
    model = LatentDiffusion(checkpoint, MomentMatching(), DPMSolverPP2M(4), 2, 4)
    prior = Prior(checkpoint, model.period(times), 2, 4)
    latent = prior.observe(Observation(observation.values, observation.variance, observation.operator.rebase(-prior.period.before)))
    covariance = ModeCovariance(prior)
    z = torch.randn(2, *prior.shape)
    linear = latent.operator.linearise(z)
    a = torch.randn(2, prior.shape[0], CELLS)
    derivative = latent.operator.predict(z + covariance.expand(a)) - latent.operator.predict(z)
    assert torch.allclose(linear.forward(a), derivative, atol=1e-3)
    w = torch.randn(2, len(observation))
    assert torch.allclose((linear.forward(a) * w).sum(), (a * linear.adjoint(w)).sum(), rtol=1e-4)


def test_estimated_covariance_of_a_known_process():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x = torch.zeros(400, 50, 6, dtype=torch.float64)
    x[:, 0] = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    for t in range(1, 50):
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * torch.randn(400, 6, generator=generator, dtype=torch.float64)
    covariance = estimate_covariance(x @ mixing.T, modes=6, lags=10)
    spatial = mixing @ mixing.T
    eye = torch.eye(6).reshape(6, 1, 6)
    assert torch.allclose(covariance.function(eye, lambda v: v)[:, 0].double(), spatial, atol=0.1 * float(spatial.diagonal().max()))
    ratio = covariance.autocovariance[:, 1] / covariance.autocovariance[:, 0]
    assert torch.allclose(ratio, torch.full((6,), 0.8), atol=0.05)


def test_a_state_is_known_through_an_autoencoder_that_compresses_time():
    """The derivative is that of the prediction, its adjoint the transpose, and the preconditioner the exact inverse."""
    from appa_lite.forecasters.initial import KnownState
    from appa_lite.forecasters.posterior import Period
    from appa_lite.models.autoencoder import SpatiotemporalAutoencoder

    torch.manual_seed(0)
    spec = FieldSpec((Variable("u"),), Grid(("x",), (0.0,), tuple(map(float, range(CELLS))), (False, True)), STEP)
    autoencoder = SpatiotemporalAutoencoder(spec.shape, (2, 1, 2), channels=2, width=8, depth=1, lap=3, periodic=(False, True))
    denoiser = LatentDenoiser(autoencoder.latent_shape, 4, width=8, depth=1, heads=1, modes=CELLS, lags=8)
    denoiser.covariance.basis.copy_(torch.linalg.qr(torch.randn(CELLS, CELLS))[0])
    denoiser.covariance.autocovariance.copy_(0.8 ** torch.arange(8.0))
    denoiser.covariance.remainder.zero_()
    parts = (spec, Normalizer(spec.shape), autoencoder.double().eval(), denoiser.double().eval())
    prior = Prior(
        Checkpoint(*(p if isinstance(p, FieldSpec) else p.requires_grad_(False).double() for p in parts), {}),
        Period(0.0, STEP, 4, 2, 0, 8),
        0,
        4,
    )
    known, covariance = KnownState(prior), ModeCovariance(prior)
    z, a, w = (torch.randn(2, *shape, dtype=torch.float64) for shape in (prior.shape, (4, CELLS), (CELLS,)))
    derivative = known.predict(z + covariance.expand(a)) - known.predict(z)
    torch.testing.assert_close(known.forward(a), derivative, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((known.forward(a) * w).sum(), (a * known.adjoint(w)).sum())
    sigma, variance = torch.tensor(0.7, dtype=torch.float64), torch.rand(CELLS, dtype=torch.float64) + 0.1
    scaled = w * variance.rsqrt()
    applied = w + known.forward(covariance.apply(known.adjoint(scaled), sigma)) * variance.rsqrt()
    torch.testing.assert_close(known.preconditioner(covariance, sigma, variance)(applied), w, rtol=1e-4, atol=1e-5)
    state = torch.randn(2, 1, 1, CELLS, dtype=torch.float64)
    assert known.values(state).shape == (2, CELLS)


def test_what_the_modes_leave_out_of_known_frames_is_pinned():
    """Within the modes the denoiser speaks, outside them the known frames do, and later frames are as they were."""
    from appa_lite.core.covariance import SpaceTimeCovariance
    from appa_lite.forecasters.initial import pinned

    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(CELLS, 5, dtype=torch.float64))[0]
    covariance = SpaceTimeCovariance(basis, torch.ones(5, 3, dtype=torch.float64), torch.ones((), dtype=torch.float64))
    mean, known = torch.randn(2, 6, 1, 1, CELLS, dtype=torch.float64), torch.randn(2, 3, 1, 1, CELLS, dtype=torch.float64)
    out = pinned(lambda x, sigma: mean, covariance, known)(mean, torch.ones(()))
    assert torch.equal(out[:, 3:], mean[:, 3:])
    torch.testing.assert_close(out[:, :3] @ basis, mean[:, :3] @ basis)
    outside = torch.eye(CELLS, dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(out[:, :3] @ outside, known @ outside)
