"""Conditioning on rain: the exact posterior of the hidden field, and likelihoods in the scores of a Gaussianised variable."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from appa_lite.core.covariance import SpaceTimeCovariance
from appa_lite.core.fields import to_datetime
from appa_lite.diffusion.samplers import DPMSolverPP2M
from appa_lite.forecasters.hidden_gaussian import hidden_posterior
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.forecasters.tail_laboratory import snapshots
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.guidance.scores import match
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.margins import Margin
from appa_lite.models.normalizer import Normalizer
from appa_lite.observations import build_observation
from appa_lite.simulators.advected_rain import AdvectedRain
from appa_lite.simulators.gaussian_process import GaussianProcess

DOUBLE = torch.float64
TIMES = to_datetime(np.zeros(1))


def observe(spec, rows: list[tuple[float, float, float]], error: float):
    """(y, x, value) at the one frame."""
    table = pd.DataFrame(rows, columns=["y", "x", "observation"]).assign(time=TIMES[0], variable=spec.names[0], error_std=error)
    return build_observation(table, spec, TIMES)[0]


# The exact posterior


def test_slices_agree_with_kriging_where_the_field_itself_is_observed():
    simulator = GaussianProcess(n=6)
    observation = observe(simulator.spec, [(1, 1, 1.0), (4, 2, -0.5), (3, 5, 0.8)], 0.3)
    a = torch.zeros(3, 36, dtype=DOUBLE)
    a[[0, 1, 2], [7, 26, 23]] = 1
    k = simulator.covariance
    gain = k @ a.T @ torch.linalg.inv(a @ k @ a.T + 0.09 * torch.eye(3, dtype=DOUBLE))
    draws = hidden_posterior(simulator, observation, 1, range(500), 0, steps=40, burn_in=20).flatten(1)
    mean, variance = gain @ torch.tensor([1.0, -0.5, 0.8], dtype=DOUBLE), (k - gain @ a @ k).diagonal()
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / 500).sqrt()).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.3, atol=0.01)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_slices_know_what_a_dry_gauge_says(value):
    """At the gauge itself and at a neighbour, beside the joint normal law integrated on a grid."""
    simulator = AdvectedRain(n=8, length=1.5)
    draws = hidden_posterior(simulator, observe(simulator.spec, [(2, 2, value)], 0.2), 1, range(800), 1, steps=40, burn_in=20)[:, 0, 0]
    z = torch.linspace(-5, 5, 4001, dtype=DOUBLE)
    q = torch.special.ndtr(-z)
    rain = torch.where(q < 0.2, 4 * ((q / 0.2) ** -0.25 - 1), 0.0)
    weight = torch.exp(-(z**2) / 2 - (rain - value) ** 2 / (2 * 0.04))
    weight /= weight.sum()
    assert float((draws[:, 2, 2] > 0).double().mean()) == pytest.approx(float(weight[rain > 0].sum()), abs=0.05)
    rho = float(simulator.field.correlation[0, 1])
    edge = stats.norm.isf(0.2)
    wet_beside = (weight * torch.special.ndtr((rho * z - edge) / (1 - rho**2) ** 0.5)).sum()
    assert float((draws[:, 2, 3] > 0).double().mean()) == pytest.approx(float(wet_beside), abs=0.06)


# Likelihoods in the scores


@pytest.fixture(scope="module")
def margin() -> Margin:
    return Margin((True, True)).fit(snapshots(AdvectedRain(), 0, 500)[:, 0], torch.ones(32, 32))


@pytest.mark.parametrize("y", [-0.1, 0.0, 0.15, 1.0, 30.0])
@pytest.mark.parametrize("error", [0.02, 0.1, 1.0])
def test_a_matched_likelihood_has_the_moments_of_the_product(margin, y, error):
    h = torch.linspace(-12, 12, 400_001, dtype=DOUBLE)
    x = margin.inverse(h)
    for mean, std in ((0.0, 1.0), (1.5, 0.5), (-1.0, 0.3), (2.0, 0.02)):
        logarithm = -((h - mean) ** 2) / (2 * std**2) - (x - y) ** 2 / (2 * error**2)
        weight = torch.softmax(logarithm, 0)
        wanted = (weight * h).sum()
        spread = (weight * (h - wanted) ** 2).sum()
        numbers = [torch.tensor([[v]], dtype=DOUBLE) for v in (mean, std**2, y, error**2)]
        innovation, site = match(margin, *numbers)
        gain = std**2 / (std**2 + float(site))
        assert mean + gain * float(innovation) == pytest.approx(float(wanted), abs=2e-2 * std + 1e-3)
        left = min(float(spread), std**2)
        assert std**2 * (1 - gain) == pytest.approx(left, rel=0.08, abs=1e-5)


def test_a_dry_gauge_tells_nothing_new_where_it_is_dry_anyway(margin):
    numbers = [torch.tensor([v], dtype=DOUBLE) for v in (-2.0, 0.01, 0.0, 0.01)]
    innovation, site = match(margin, *numbers)
    assert abs(float(innovation)) * 0.01 / float(site) < 1e-3


# The posterior through the normaliser


@pytest.fixture(scope="module")
def known() -> tuple[AdvectedRain, LatentDiffusion]:
    """A model whose prior is right: the scores are the hidden Gaussian field itself, and their denoiser is exact (F = 0)."""
    simulator = AdvectedRain(n=8, length=1.5)
    fields = snapshots(simulator, 0, 4000)[:, None]
    normalizer = Normalizer(simulator.spec.shape, transforms=["gaussianize"], periodic=(True, True))
    normalizer.margins["0"].fit(fields[:, 0, 0], torch.ones(8, 8))
    corner = simulator.field.correlation
    k = torch.stack([corner.roll((i, j), (0, 1)).flatten() for i in range(8) for j in range(8)])
    values, vectors = torch.linalg.eigh(k)
    denoiser = LatentDenoiser(simulator.spec.shape, 1, width=8, depth=1, heads=1, homogeneous=True, modes=64, lags=1)
    denoiser.set_climatology(
        torch.zeros(64), SpaceTimeCovariance(vectors.float(), values.clamp(min=1e-6)[:, None].float(), torch.zeros(()))
    )
    checkpoint = Checkpoint(
        simulator.spec, normalizer, IdentityAutoencoder(simulator.spec.shape), denoiser.eval().requires_grad_(False), {}
    )
    return simulator, LatentDiffusion(checkpoint, MomentMatching(), DPMSolverPP2M(24, 60.0, 0.02, 1.0), batch=120)


@pytest.mark.slow
def test_gauges_through_the_normaliser_give_the_posterior_of_the_hidden_field(known):
    simulator, model = known
    rows = [(1, 1, 0.05), (1, 4, 1.8), (3, 6, -0.3), (5, 2, 0.0), (6, 6, 3.5), (4, 4, 0.3)]
    observation = observe(simulator.spec, rows, 0.3)
    ours = model.assimilate(observation, TIMES, range(120), seed=0)[:, 0, 0].double()
    exact = hidden_posterior(simulator, observation, 1, range(150), 0, steps=200, burn_in=200)[:, 0, 0]
    wet = [(x > 0).double().mean(0) for x in (ours, exact)]
    assert float((wet[0] - wet[1]).square().mean().sqrt()) < 0.08 and float((wet[0] - wet[1]).mean().abs()) < 0.04
    scores = [model.checkpoint.normalizer.margins["0"].score(x.float()).double() for x in (ours, exact)]
    spread = scores[1].std(0).clamp(min=0.1)
    assert float(((scores[0].mean(0) - scores[1].mean(0)) / spread).square().mean().sqrt()) < 0.2
    for y, x, value in rows:
        if value > 1:  # where the error of the gauge is nearly all the spread there is
            assert float(ours[:, y, x].mean()) == pytest.approx(float(exact[:, y, x].mean()), abs=0.15)
            assert float(ours[:, y, x].std()) == pytest.approx(float(exact[:, y, x].std()), rel=0.35)
    assert float(ours.min()) == 0.0
