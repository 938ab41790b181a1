"""The Gaussianising normaliser: margins, their tails and their point masses."""

import numpy as np
import pytest
import torch
from scipy import stats

from appa_lite.core.pareto import fit_pareto
from appa_lite.models.margins import Margin
from appa_lite.models.normalizer import Normalizer
from appa_lite.simulators.advected_rain import AdvectedRain
from appa_lite.simulators.base import trajectories

DOUBLE = torch.float64
MASK = torch.ones(10, 100)


def heavy(seed: int, shape: float = 0.25) -> torch.Tensor:
    """20 frames of 10 x 100 generalised Pareto values."""
    return torch.from_numpy(stats.genpareto.rvs(shape, size=20_000, random_state=seed)).float().reshape(20, 10, 100)


@pytest.fixture(scope="module")
def rain() -> torch.Tensor:
    return trajectories(AdvectedRain(), 0, 200, 3)


@pytest.fixture(scope="module")
def dry(rain) -> Margin:
    return Margin((True, True)).fit(rain[:, :, 0].flatten(0, 1), torch.ones(32, 32))


# Exceedances


@pytest.mark.parametrize("shape", [-0.3, -0.1, 0.0, 0.25, 0.6])
def test_pareto_fits_are_maximum_likelihood(shape):
    x = stats.genpareto.rvs(shape, scale=3.0, size=4000, random_state=1)
    fit = fit_pareto(torch.from_numpy(x))
    theirs = stats.genpareto.fit(x, floc=0)
    assert fit.shape == pytest.approx(theirs[0], abs=1e-3) and fit.scale == pytest.approx(theirs[2], rel=1e-3)
    assert abs(fit.shape - shape) < 4 * fit.shape_error and fit.shape_error < 0.03


def test_pareto_refuses_what_is_no_tail():
    with pytest.raises(ValueError, match="ten positive"):
        fit_pareto(torch.ones(5))


# Margins


@pytest.mark.parametrize("seed", range(4))
def test_a_heavy_tail_is_found_and_extrapolated(seed):
    margin = Margin().fit(heavy(seed), MASK)
    p = torch.tensor([1e-3, 1e-4], dtype=DOUBLE)
    ratio = margin.inverse(torch.special.ndtri(1 - p)) / torch.from_numpy(stats.genpareto.isf(p.numpy(), 0.25))
    assert abs(float(margin.upper[0]) - 0.25) <= 0.08 and 0.02 < float(margin.shape_error[1]) < 0.08
    assert abs(float(ratio[0]) - 1) <= 0.10 and abs(float(ratio[1]) - 1) <= 0.25
    level = float(stats.genpareto.isf(0.01, 0.25))
    mass = torch.special.ndtr(-margin.score(torch.tensor(level, dtype=DOUBLE))) / 0.01
    assert 0.9 <= float(mass) <= 1.1


@pytest.mark.parametrize("shape", [-0.2, 0.0, 0.25])
def test_a_margin_is_strictly_increasing_unbounded_and_exactly_invertible(shape):
    x = heavy(0, shape)
    margin = Margin().fit(x, MASK)
    torch.testing.assert_close(margin.inverse(margin(x)), x, rtol=1e-6, atol=1e-6)
    z = torch.linspace(-9, 9, 4001, dtype=DOUBLE)
    back = margin.inverse(z)
    assert torch.isfinite(back).all() and (back.diff() > 0).all()
    torch.testing.assert_close(margin.score(back), z, rtol=0, atol=1e-6)
    assert float(back[-1]) > float(x.max()) and torch.isfinite(margin.score(10 * x.max())).all()
    normal = margin(x).flatten().double()
    assert stats.kstest(normal.numpy(), "norm").statistic < 0.01


@pytest.mark.parametrize("shape", [-0.2, 0.25])
def test_the_derivative_is_that_of_the_inverse(shape, dry):
    z = torch.linspace(-6, 6, 997, dtype=DOUBLE, requires_grad=True)
    for margin in (Margin().fit(heavy(0, shape), MASK), dry):
        for value, slope in ((margin.inverse, margin.slope), (margin.continued, margin.slope_continued)):
            (derivative,) = torch.autograd.grad(value(z).sum(), z)
            torch.testing.assert_close(slope(z.detach()), derivative)


def test_dry_cells_are_the_lower_part_of_a_normal_margin(rain, dry):
    fields = rain[:, :, 0]
    z, share = dry(fields), (fields == 0).double().mean()
    torch.testing.assert_close(dry.inverse(z), fields, rtol=1e-6, atol=1e-6)
    assert float(dry.mass) == pytest.approx(float(share), abs=1e-6)
    assert float(torch.special.ndtr(dry.edge)) == pytest.approx(float(share), abs=1e-3)
    assert (z[fields == 0] <= dry.edge).all() and (z[fields > 0] >= dry.edge).all()
    assert stats.kstest(z.flatten()[::13].double().numpy(), "norm").statistic < 0.02
    assert float(dry.inverse(torch.tensor(-3.0))) == 0 and float(dry.slope(torch.tensor(0.0))) == 0
    below = torch.linspace(-4, float(dry.edge), 50)
    assert (dry.continued(below).diff() > 0).all() and (dry.continued(below[:-1]) < 0).all()
    torch.testing.assert_close(dry.score(dry.continued(below)), below, atol=1e-5, rtol=0)


def test_dry_cells_keep_their_neighbourhood(rain, dry):
    """The z of a dry cell rises towards the wet area: neighbours stay alike, where noise would make them independent."""
    z = dry(rain[:, 0, 0])
    isolated = (rain[:, 0, 0] == 0) & (rain[:, 0, 0].roll(1, -1) == 0)
    pairs = torch.stack([z[isolated], z.roll(1, -1)[isolated]])
    assert float(torch.corrcoef(pairs)[0, 1]) > 0.95
    assert torch.equal(dry(rain[:1, 0, 0]), z[:1])  # a function of the field, not of its batch
    moved = dry(rain[:, 0, 0].roll((3, 5), (-2, -1)))
    torch.testing.assert_close(moved, z.roll((3, 5), (-2, -1)), atol=1e-4, rtol=0)


def test_frames_that_are_all_dry_and_values_with_ties():
    x = torch.zeros(40, 8, 8)
    x[::2, 2:5, 3:6] = (torch.rand(20, 3, 3, generator=torch.Generator().manual_seed(0)) * 50).round() / 10 + 0.1
    margin = Margin().fit(x, torch.ones(8, 8))
    z = margin(x)
    assert torch.isfinite(z).all() and float(z[1].std()) == 0
    torch.testing.assert_close(margin.inverse(z), x, rtol=1e-5, atol=1e-5)


# In the normaliser


def test_the_normaliser_transforms_by_variable_and_survives_a_save(tmp_path, rain):
    times = 3600.0 * torch.arange(3, dtype=DOUBLE)
    fields = torch.cat([rain[:60], 280 + rain[60:120] - rain[120:180]], dim=2)
    normalizer = Normalizer(fields.shape[2:], transforms=["gaussianize", "identity"], periodic=(True, True))
    normalizer.fit(fields, times, torch.ones(32, 32))
    z = normalizer(fields, times)
    torch.testing.assert_close(normalizer.inverse(z, times), fields, rtol=2e-6, atol=1e-5)
    assert z.mean((0, 1, 3, 4)).abs().max() < 0.02 and (z.std((0, 1, 3, 4)) - 1).abs().max() < 0.02
    normalizer.save_pretrained(tmp_path)
    again = Normalizer.from_pretrained(tmp_path)
    assert torch.equal(again(fields, times), z) and torch.equal(again.margins["0"].shape_error, normalizer.margins["0"].shape_error)
    x = z[0].double().requires_grad_()
    (slope,) = torch.autograd.grad(normalizer.double().inverse(x, times).sum(), x)
    torch.testing.assert_close(normalizer.derivative(x.detach(), times), slope)


def test_light_tails_stay_light():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 10, 200))).float()
    margin = Margin().fit(x, torch.ones(10, 200))
    assert (margin.upper[0] < 0) and (margin.lower[0] < 0)
    z = torch.tensor([-4.0, -3.0, 3.0, 4.0])
    torch.testing.assert_close(margin.inverse(z), z, rtol=0.12, atol=0)
