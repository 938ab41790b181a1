"""Members given an event beside observations or an initial state: the guided denoiser against closed forms, the commands."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from appa_lite import cli
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.core.random import generator
from appa_lite.diffusion.samplers import DPMSolverPP2M, ExponentialAdamsBashforth
from appa_lite.forecasters.event_scores import event_scores
from appa_lite.forecasters.given_event import GivenEvent
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.forecasters.posterior import ModeCovariance, Period, Prior
from appa_lite.guidance.base import SolverReport
from appa_lite.guidance.dps import DPS
from appa_lite.guidance.event import ObservedEvent, ObservedEventDenoiser
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer
from appa_lite.observations import build_observation
from appa_lite.observations.event import Event

# With an untrained network a model is the Gaussian of its climatology

CELLS, WINDOW, MEMORY, HOUR = 8, 5, 0.9, 3600.0
TIMES = to_datetime(HOUR * np.arange(7))
NORMAL = torch.distributions.Normal(0.0, 1.0)


def gaussian(normalizer: Normalizer | None = None, name: str = "u") -> Checkpoint:
    spec = FieldSpec((Variable(name, "m"),), Grid(("x",), (0.0,), tuple(map(float, range(CELLS))), (False, True)), HOUR)
    denoiser = LatentDenoiser(spec.shape, WINDOW, width=8, depth=1, heads=1, modes=CELLS, lags=40)
    denoiser.covariance.basis.copy_(torch.eye(CELLS))
    denoiser.covariance.autocovariance.copy_((MEMORY ** torch.arange(40.0)).expand(CELLS, 40))
    denoiser.covariance.remainder.zero_()
    frozen = denoiser.eval().requires_grad_(False)
    return Checkpoint(spec, normalizer or Normalizer(spec.shape), IdentityAutoencoder(spec.shape), frozen, {})


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return gaussian()


def model(checkpoint: Checkpoint, jacobian: bool = False, steps: int = 40) -> LatentDiffusion:
    return LatentDiffusion(checkpoint, MomentMatching(jacobian, tolerance=1e-5), DPMSolverPP2M(steps, 40.0, 0.01, 1.0), 2, 256)


def gauge(checkpoint: Checkpoint, value: float, variable: str = "u"):
    table = pd.DataFrame({"time": TIMES[[1]], "x": [1.0], "observation": [value], "variable": variable, "error_std": 0.5})
    return build_observation(table, checkpoint.spec, TIMES)[0]


def truncated(mean: float, std: float, s: float) -> tuple[float, float]:
    """E[S | S > s] and the standard deviation of S given it."""
    b = torch.tensor((s - mean) / std, dtype=torch.float64)
    hazard = float((NORMAL.log_prob(b) - torch.special.log_ndtr(-b)).exp())
    return mean + std * hazard, std * math.sqrt(1 + float(b) * hazard - hazard**2)


@pytest.mark.parametrize("jacobian", [False, True])
@pytest.mark.parametrize("sigma", [0.3, 3.0])
def test_the_denoiser_given_an_observation_and_an_event_is_exact(checkpoint, jacobian, sigma):
    """Against dense Gaussian conditioning on x_t and y, then a truncated normal along S."""
    prior = Prior(checkpoint, Period(0.0, HOUR, WINDOW, 1, 0, WINDOW), 2, 64)
    latent, frames, s = prior.observe(gauge(checkpoint, 2.0)), WINDOW, 1.5
    event = Event("last(area_mean(u, box(0, 2))) > 1.5", checkpoint.spec)
    functional, level = event_scores(event, s, checkpoint, prior.period.times)
    sigma = torch.tensor(sigma)
    x = (1 + sigma) * torch.randn(3, frames, 1, 1, CELLS, generator=generator(0, "observed event"))
    report = SolverReport()
    guided = ObservedEvent(MomentMatching(jacobian, tolerance=1e-6), functional, level)
    told = guided(prior.denoiser(), latent, ModeCovariance(prior), report)
    assert isinstance(told, ObservedEventDenoiser)
    told = told.twist(x, sigma)
    lag = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    c = torch.kron(MEMORY ** lag.double(), torch.eye(CELLS, dtype=torch.float64))
    h = torch.zeros(len(c) + 1, len(c), dtype=torch.float64)
    h[:-1], h[-1, CELLS + 1] = torch.eye(len(c)), 1.0
    noise = torch.diag(torch.tensor([float(sigma) ** 2] * len(c) + [0.25], dtype=torch.float64))
    gain = torch.linalg.solve(h @ c @ h.T + noise, h @ c).T
    mean = torch.cat([x.flatten(1).double(), torch.full((3, 1), 2.0, dtype=torch.float64)], 1) @ gain.T
    left = c - gain @ h @ c
    a = torch.zeros(frames, CELLS, dtype=torch.float64)
    a[-1, :3] = 1 / 3
    a = a.flatten()
    d = (a @ left @ a).sqrt()
    place = (mean @ a - s) / d
    hazard = (NORMAL.log_prob(place) - torch.special.log_ndtr(place)).exp()
    exact = mean + hazard[:, None] * (left @ a) / d
    torch.testing.assert_close(told.prior.flatten(1).double(), mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(told.log_likelihood, torch.special.log_ndtr(place), rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(told.posterior.flatten(1).double(), exact, rtol=3e-3, atol=3e-3)


def test_members_of_a_reanalysis_given_an_event_have_its_law(checkpoint):
    event = Event("last(at(u, 1)) > 2.6", checkpoint.spec)
    given = GivenEvent(model(checkpoint), event)
    fields = given.assimilate(gauge(checkpoint, 2.0), TIMES, range(96), 0)
    values, gain = event.functional(fields), MEMORY**5 / 1.25
    mean, std = truncated(2 * gain, math.sqrt(1 - gain * MEMORY**5), 2.6)
    assert float(values.min()) > 2.6 and given.redrawn < 16
    assert float(values.mean()) - 2.6 == pytest.approx(mean - 2.6, rel=0.3)
    assert 0.7 < float(values.std()) / std < 1.25
    shift = (float(values.mean()) - 2 * gain) / (1 - gain * MEMORY**5)  # E[x | y, S > s] - E[x | y] = cov(x, S | y) shift
    middle = MEMORY**3 - (MEMORY**2 / 1.25) * MEMORY**5
    assert float(fields[:, 3, 0, 0, 1].mean()) == pytest.approx(2 * MEMORY**2 / 1.25 + middle * shift, abs=0.25)
    few = GivenEvent(model(checkpoint), event).assimilate(gauge(checkpoint, 2.0), TIMES, [5, 3], 0)
    torch.testing.assert_close(few, fields[[5, 3]], rtol=1e-3, atol=1e-3)


def test_members_of_a_forecast_given_an_event_have_its_law(checkpoint):
    """Six frames ahead, where the model's window is five: one period, not rolled on."""
    initial, times, p = torch.full((1, 2, 1, 1, CELLS), 1.5), TIMES[:2], 1e-3
    mean, std = 1.5 * MEMORY**6, math.sqrt(1 - MEMORY**12)
    s = mean - std * float(NORMAL.icdf(torch.tensor(p)))
    event = Event(f"last(at(u, 3)) > {s}", checkpoint.spec)
    given = GivenEvent(model(checkpoint, True), event)
    ahead = given.forecast(initial, times, 6, range(64), 0)
    values = ahead[:, -1, 0, 0, 3]
    exact, spread = truncated(mean, std, s)
    assert ahead.shape == (64, 6, 1, 1, CELLS) and float(values.min()) > s
    assert float(values.mean()) - s == pytest.approx(exact - s, rel=0.35) and 0.65 < float(values.std()) / spread < 1.3
    assert float(ahead[:, 2, 0, 0, 6].mean()) == pytest.approx(1.5 * MEMORY**3, abs=4 * math.sqrt(1 - MEMORY**6) / math.sqrt(64))


def test_rain_is_guided_in_its_scores():
    """S' > s' is the event, and its slope does not vanish where everything is dry."""
    x = torch.randn(4000, 1, 1, CELLS, generator=generator(0, "rain"))
    rain = torch.where(x > 0.8, 5 * (x - 0.8).clamp(min=0) ** 2, torch.zeros(()))[:, None]
    normalizer = Normalizer((1, 1, CELLS), transforms=("gaussianize",)).fit(rain, torch.zeros(1, dtype=torch.float64), torch.ones(1, CELLS))
    one = gaussian(normalizer, "rain")
    for text, sign in (("max(rain) > 12", 1), ("last(area_mean(rain, box(0, 3))) > 6", 1), ("max(rain) < 0.5", -1)):
        event = Event(text, one.spec)
        functional, level = event_scores(event, sign * event.threshold * sign, one, torch.arange(WINDOW) * HOUR)
        z = torch.randn(400, WINDOW, 1, 1, CELLS, generator=generator(1, "rain"))
        true = event.functional(torch.cat([normalizer.inverse(v[None], torch.arange(WINDOW) * HOUR) for v in z])) > event.threshold
        agree = (functional(z) > level) == true
        assert 0 < int(true.sum()) < 400 and float(agree.double().mean()) > 0.97
        dry = torch.full((1, WINDOW, 1, 1, CELLS), -1.0, requires_grad=True)
        slope = torch.autograd.grad(functional(dry).sum(), dry)[0]
        assert float(slope.sum().abs()) == pytest.approx(float(normalizer.scale), rel=0.05)
    given = GivenEvent(model(one), Event("last(at(rain, 1)) > 14", one.spec))
    wet = given.assimilate(gauge(one, 0.0, "rain"), TIMES, range(16), 0)[:, -1, 0, 0, 1]
    assert float(wet.min()) > 14 and float(wet.median()) < 30


def test_mistakes(checkpoint):
    event, observed = Event("last(at(u, 1)) > 1", checkpoint.spec), gauge(checkpoint, 2.0)
    with pytest.raises(UserError, match="draws noise at every step"):
        GivenEvent(LatentDiffusion(checkpoint, MomentMatching(), ExponentialAdamsBashforth(12, 30.0, 0.03)), event)
    with pytest.raises(UserError, match="free run"):
        GivenEvent(model(checkpoint), event).assimilate(None, TIMES, [0], 0)
    other = LatentDiffusion(checkpoint, DPS(), DPMSolverPP2M(8, 40.0, 0.01, 1.0), 2)
    with pytest.raises(UserError, match="moment_matching"):
        GivenEvent(other, event).assimilate(observed, TIMES, [0], 0)
    with pytest.raises(UserError, match="2 of 2 members missed it in 8 draws"):
        never = Event("last(0 - at(u, 1) * at(u, 1)) > 1", checkpoint.spec)
        GivenEvent(model(checkpoint, steps=6), never).assimilate(observed, TIMES, [0, 1], 0)
    with pytest.raises(UserError, match="no slope"):
        flat = Event("duration(at(u, 1) > 9) > 1", checkpoint.spec)
        GivenEvent(model(checkpoint, steps=8), flat).assimilate(observed, TIMES, [0], 0)


def test_the_commands(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "model")
    rows = pd.DataFrame({"time": TIMES[[0, 1]], "x": [1.0, 2.0], "observation": [1.0, 0.5], "variable": "u", "error_std": 0.5})
    rows.to_csv("rows.csv", index=False)
    small = ["checkpoint=model", "size=debug", "members=4", "sampler.steps=16"]
    event = ["event=area_mean(u, west) > 1.6", "boxes.west=[0,3]", f"event_start={TIMES[2]}"]
    assert cli.main(["reanalysis", *small, *event, "observations=rows.csv", f"end={TIMES[3]}", "out=a.nc"]) == 0
    assert "drawn anew" in capsys.readouterr().out
    with xr.open_dataset("a.nc", engine="h5netcdf") as found:
        assert float(found["u"].isel(x=slice(0, 4), time=slice(2, None)).mean("x").max("time").min()) > 1.6
        assert "event_redrawn" in found.attrs and "probability" not in found.attrs and found.attrs["event"].startswith("area_mean")
    ahead = ["forecast", *small, "initial=a.nc", "lead=3h"]
    assert cli.main([*ahead, "event=last(at(u, 3)) > 2", "out=b.nc"]) == 0
    assert "appa-lite extremes" in capsys.readouterr().out
    with xr.open_dataset("b.nc", engine="h5netcdf") as found:
        assert float(found["u"].isel(prediction_timedelta=-1, x=3).min()) > 2
    for wrong, message in (
        (["event=last(at(u, 3))"], "expected a threshold"),
        (["event=last(at(u, 3)) > 2", "forecaster=persistence"], "found Persistence"),
        (["event=last(at(u, 3)) > 2", "sampler=eab3_tail"], "draws noise at every step"),
    ):
        assert cli.main([*ahead, *wrong, "out=c.nc"]) == 2
        assert message in capsys.readouterr().err
