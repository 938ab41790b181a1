"""Heavy tails: simulators whose laws are known."""

import math

import pytest
import torch
from scipy import stats

from appa_lite.core.errors import UserError
from appa_lite.simulators.advected_rain import AdvectedRain
from appa_lite.simulators.base import states, trajectories
from appa_lite.simulators.cam_field import CamField
from appa_lite.simulators.random_fields import PeriodicField

DOUBLE = torch.float64


def probabilities(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


# Advected rain


def test_the_hidden_field_has_a_gaussian_covariance_and_unit_variance():
    field = PeriodicField(32, 3.0)
    r = torch.arange(6, dtype=DOUBLE)
    torch.testing.assert_close(field.correlation[0, :6], torch.exp(-(r**2) / 18), atol=1e-6, rtol=0)
    draws = field.colour(torch.randn(4000, 32, 32, generator=torch.Generator().manual_seed(0), dtype=DOUBLE))
    lagged = torch.stack([(draws * draws.roll(k, -1)).mean() for k in range(6)])
    torch.testing.assert_close(lagged, torch.exp(-(r**2) / 18), atol=0.02, rtol=0)


def test_successive_frames_of_rain_follow_an_autoregression_along_the_drift():
    simulator = AdvectedRain(memory=0.9, drift=(0, 1))
    first, second = (s[:, :1024].unflatten(1, (32, 32)) for s in states(simulator, 0, range(600), 2))
    assert float((first.roll(1, -1) * second).mean()) == pytest.approx(0.9, abs=0.02)
    assert float(second.square().mean()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("degrees", [0, 4])
def test_rain_has_the_law_it_says(degrees):
    simulator = AdvectedRain(length=0.4, degrees=degrees, n=16, memory=0.5)  # nearly independent cells
    rain = trajectories(simulator, 1, 4000, 2)[:, 1].flatten().double()
    r = simulator.quantile(probabilities(0.1, 1e-2, 1e-3))
    wanted = 0.2 * (1 + 0.25 * r) ** -4
    torch.testing.assert_close(wanted, probabilities(0.1, 1e-2, 1e-3))
    found = (rain[:, None] > r).double().mean(0)
    spread = 1.0 if not degrees else 6.0  # a field shares its divisor: fewer independent draws
    assert float((rain > 0).double().mean()) == pytest.approx(0.2, abs=0.002 * spread)
    assert ((found - wanted).abs() < 5 * spread * (wanted / len(rain)).sqrt()).all()
    shape, _, _ = stats.genpareto.fit(rain[rain > r[1]].numpy() - float(r[1]), floc=0)
    assert shape == pytest.approx(0.25, abs=0.05)


def test_a_student_copula_ties_extremes_together():
    def together(degrees: int) -> float:
        simulator = AdvectedRain(degrees=degrees)
        rain = trajectories(simulator, 2, 1500, 1)[:, 0, 0].double()
        level = simulator.quantile(probabilities(0.01))
        return float(((rain > level) & (rain.roll(3, -1) > level)).double().mean() / 0.01)

    assert together(0) == pytest.approx(0.20, abs=0.05) and together(4) == pytest.approx(0.36, abs=0.07)


@pytest.mark.parametrize("keys", [{"memory": 1.0}, {"wet": 0.0}, {"shape": 0.0}, {"degrees": -1}])
def test_rain_that_cannot_be(keys):
    with pytest.raises(UserError, match="advected rain needs"):
        AdvectedRain(**keys)


# Correlated additive and multiplicative noise


@pytest.mark.parametrize("degrees", [2.5, 4.0])
def test_cam_noise_is_stationary_under_student(degrees):
    simulator = CamField(n=64, length=0.3, degrees=degrees)
    x = simulator.initial(0, range(50))
    for frame in range(10):
        x = simulator.advance(x, frame, 0, range(50))
    level = simulator.quantile(probabilities(5e-2, 5e-3, 5e-4))
    found = torch.quantile(x.abs().flatten()[: 2**24 // 100 * 100], 1 - 2 * probabilities(5e-2, 5e-3, 5e-4))
    torch.testing.assert_close(found / level, torch.ones(3, dtype=DOUBLE), atol=0.08, rtol=0)
    torch.testing.assert_close(level, torch.from_numpy(stats.t.isf([5e-2, 5e-3, 5e-4], degrees)) / math.sqrt(degrees))
    tail = x.abs().flatten()
    beyond = tail[tail > level[1]].numpy()
    assert stats.genpareto.fit(beyond - float(level[1]), floc=0)[0] == pytest.approx(1 / degrees, abs=0.06)


def test_cam_noise_forgets_where_it_started():
    """The law comes from the equation, not from the first state: from zero, in ten relaxation times."""
    simulator = CamField(n=48, length=0.3, degrees=4.0, steps_per_frame=10)
    x = torch.zeros(20, 48, 48, dtype=DOUBLE)
    for frame in range(10):
        x = simulator.advance(x, frame, 3, range(20))
    p = probabilities(0.05, 0.005)
    found = torch.quantile(x.abs().flatten(), 1 - 2 * p)
    torch.testing.assert_close(found / simulator.quantile(p), torch.ones(2, dtype=DOUBLE), atol=0.06, rtol=0)
    assert torch.isfinite(simulator.budgets(x)["log_energy"]).all()


def test_cam_noise_that_cannot_be():
    with pytest.raises(UserError, match="degrees > 1"):
        CamField(degrees=1.0)
