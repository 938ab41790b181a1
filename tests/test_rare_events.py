"""Rare events: kernels that leave a law alone, estimates against closed forms, events as text, the command."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from appa_lite import cli
from appa_lite.config import build, compose, options
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.core.random import generator
from appa_lite.diffusion.base import Sampler
from appa_lite.diffusion.rare_events.base import Response, exceeded, family_error, level_of, lognormal, resample
from appa_lite.diffusion.rare_events.brute_force import BruteForce
from appa_lite.diffusion.rare_events.crank_nicolson import StepSize, acceptance, move
from appa_lite.diffusion.rare_events.form import InstantonImportanceSampling
from appa_lite.diffusion.rare_events.splitting import AdaptiveMultilevelSplitting
from appa_lite.diffusion.rare_events.subset import SubsetSimulation
from appa_lite.diffusion.sampler_law import NORMAL, evaluations, gains, tail
from appa_lite.diffusion.samplers import DDIM, DPMSolverPP2M, ExponentialAdamsBashforth, Heun
from appa_lite.forecasters.sampled_law import GaussianEvent, GaussianLaw, ModelLaw, NoiseDriven
from appa_lite.guidance.event import EventDenoiser, EventGuidance, TwistedParticles
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer
from appa_lite.observations import build_observation
from appa_lite.observations.event import Event, longest
from appa_lite.simulators.gaussian_process import GaussianProcess

D = 20
SLOPE = torch.linspace(0.2, 1.0, D, dtype=torch.float64)
SLOPE = SLOPE / SLOPE.norm()


def linear() -> Response:
    return Response(lambda z: z @ SLOPE, D)


def quantile(p: float) -> float:
    return float(-NORMAL.icdf(torch.tensor(p, dtype=torch.float64)))


# Kernels and helpers


@pytest.mark.parametrize("beta", [0.2, 0.8])
def test_moves_leave_white_noise_given_a_level_as_it_is(beta):
    stream, response, level = generator(0, "moves"), linear(), 0.8
    z = response.noise(60000, stream)
    z = z[z @ SLOPE > level]
    values, before = z @ SLOPE, z.clone()
    for _ in range(8):
        z, values, _ = move(response, z, values, level, beta, stream)
    assert not torch.equal(z, before) and float(values.min()) > level
    torch.testing.assert_close(values, z @ SLOPE)
    exact = math.exp(-(level**2) / 2) / math.sqrt(2 * math.pi) / float(NORMAL.cdf(torch.tensor(-level)))
    assert float(values.mean()) == pytest.approx(exact, abs=5 * 0.45 / math.sqrt(len(z)))
    across = z - values[:, None] * SLOPE
    assert float(across.var()) == pytest.approx((D - 1) / D, abs=0.02)


def test_the_step_is_chosen_for_the_acceptance_it_gets():
    stream, response = generator(1, "step"), linear()
    for p in (0.1, 1e-3):
        level, beta = quantile(p), StepSize().beta(p)
        u = -NORMAL.icdf(torch.rand(20000, generator=stream, dtype=torch.float64) * p)
        noise = response.noise(20000, stream)
        z = noise + (u - noise @ SLOPE)[:, None] * SLOPE
        accepted = move(response, z, u, level, beta, stream)[2].double().mean()
        assert float(accepted) == pytest.approx(0.35, abs=0.03)
    assert acceptance(torch.tensor([1.0], dtype=torch.float64), quantile(0.1)) == pytest.approx(0.1, abs=1e-3)


def test_resampling_is_by_weight():
    picks = resample(torch.tensor([0.0, 1.0, 3.0]), 400, generator(0, "resample"))
    assert torch.bincount(picks, minlength=3).tolist() == [0, 100, 300]


def test_the_error_of_families_is_binomial_where_samples_are_independent():
    hits = (torch.rand(5000, generator=generator(0, "families"), dtype=torch.float64) < 0.1).double()
    p = float(hits.mean())
    assert family_error(torch.arange(5000), hits, 5000) == pytest.approx(math.sqrt((1 - p) / p / 5000), rel=1e-6)
    low, high = lognormal(1e-3, 0.3)
    assert low * high == pytest.approx(1e-6) and low < 1e-3 * 0.6


# Estimates


@pytest.mark.parametrize("p", [1e-2, 1e-3])
@pytest.mark.parametrize(
    "method",
    [SubsetSimulation(500), AdaptiveMultilevelSplitting(200), InstantonImportanceSampling(300, check=500), BruteForce(20000)],
    ids=lambda m: type(m).__name__,
)
def test_estimates_agree_with_the_closed_form(method, p):
    ratios, covered, errors = [], 0, []
    for seed in range(20):
        found = method.estimate(linear(), quantile(p), 50, generator(seed, "estimate"))
        assert float(found.values.min()) > quantile(p) and found.calls > 0
        ratios.append(found.probability / p)
        errors.append(found.error)
        covered += found.low <= p <= found.high
    ratios = torch.tensor(ratios)
    bias = 0.12 if isinstance(method, SubsetSimulation) else 0.0  # its levels are quantiles of the samples they are estimated from
    assert abs(float(ratios.mean()) - 1) < bias + 3.5 * float(ratios.std()) / math.sqrt(20)
    assert covered >= 16
    assert 0.5 < sum(errors) / 20 / float(ratios.std()) < 2.2


@pytest.mark.parametrize(("method", "p"), [(SubsetSimulation(500), 1e-5), (SubsetSimulation(500), 3e-3), (BruteForce(3000), 1e-2)])
def test_levels_agree_with_the_closed_form(method, p):
    levels = [method.level(linear(), p, generator(seed, "level")) for seed in range(20)]
    found = torch.tensor([level.threshold for level in levels])
    assert abs(float(found.mean()) - quantile(p)) < 0.02 + 3.5 * float(found.std()) / math.sqrt(20)
    assert sum(level.low <= quantile(p) <= level.high for level in levels) >= 16
    assert all(level.low < level.threshold < level.high for level in levels)


def test_a_level_is_the_quantile_of_its_curve():
    ranks = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    curve = [(1.0, ranks), (0.1, 0.9 + 0.1 * ranks), (0.01, 0.99 + 0.01 * ranks)]  # uniform, given that it is beyond 0.9 and 0.99
    for p in (0.5, 0.1, 0.05, 2e-3):
        assert exceeded(curve, p) == pytest.approx(1 - p, abs=1e-4)
    low, high = lognormal(2e-3, 0.2)
    told = level_of(curve, 2e-3, 0.2, 7)
    assert (told.low, told.high, told.calls) == (pytest.approx(1 - high), pytest.approx(1 - low), 7)


def test_members_given_the_event_have_its_law():
    p, values = 1e-3, []
    for seed in range(6):
        found = SubsetSimulation(1000).estimate(linear(), quantile(p), 300, generator(seed, "members"))
        assert len(found.noise.unique(dim=0)) >= 290
        values.append(found.values)
    values, b = torch.cat(values), quantile(p)
    ratio = math.exp(-(b**2) / 2) / math.sqrt(2 * math.pi) / p
    assert float(values.mean()) == pytest.approx(ratio, rel=0.01)
    assert float(values.std()) == pytest.approx(math.sqrt(1 + b * ratio - ratio**2), rel=0.1)


def test_the_instanton_of_a_linear_response_is_exact():
    method, p = InstantonImportanceSampling(4000), 1e-6
    found = method.instanton(linear(), quantile(p), generator(0, "instanton"), lambda *_: None)
    assert float((found - quantile(p) * SLOPE).norm()) < 0.1
    alone = method.unchecked(linear(), quantile(p), 10, generator(0, "instanton"))
    assert alone.probability == pytest.approx(p, rel=4 * alone.error) and alone.error < 0.06


def test_one_instanton_is_not_enough_for_a_maximum_and_says_so():
    response = Response(lambda z: z.amax(1), D)
    p = 1 - float(NORMAL.cdf(torch.tensor(3.5, dtype=torch.float64))) ** D
    method = InstantonImportanceSampling(500)
    with pytest.raises(UserError, match="more than one way to come about"):
        method.estimate(response, 3.5, 10, generator(0, "maximum"))
    assert SubsetSimulation().estimate(response, 3.5, 10, generator(0, "maximum")).probability == pytest.approx(p, rel=0.6)


def test_events_out_of_reach_and_functionals_without_a_slope():
    with pytest.raises(UserError, match="out of reach"):
        SubsetSimulation(200, max_levels=3).estimate(linear(), 30.0, 4, generator(0, "far"))
    with pytest.raises(UserError, match="out of reach"):
        AdaptiveMultilevelSplitting(100, max_levels=5).estimate(linear(), 30.0, 4, generator(0, "far"))
    step = Response(lambda z: (z[:, 0] > 1).double(), D)
    for method in (SubsetSimulation(200), AdaptiveMultilevelSplitting(200)):
        with pytest.raises(UserError, match="same largest"):
            method.estimate(step, 2.0, 4, generator(0, "flat"))
    with pytest.raises(UserError, match="derivative"):
        InstantonImportanceSampling().estimate(Response(lambda z: z[:, 0], D, differentiable=False), 2.0, 4, generator(0, "flat"))
    assert BruteForce(100).estimate(linear(), 30.0, 4, generator(0, "none")).high == pytest.approx(0.037, abs=1e-3)


# The sampler's own law


VARIANCE = torch.tensor([4.0, 1.0, 0.25, 0.01], dtype=torch.float64)


@pytest.mark.parametrize("sampler", [DDIM(12, 50.0, 0.01, 1.0), DPMSolverPP2M(12, 50.0, 0.01, 1.0), Heun(12, 50.0, 0.01)])
def test_the_law_of_a_sampler_in_closed_form_is_that_of_its_samples(sampler):
    stream, n = generator(0, "law"), 40000

    def noise(number: int) -> torch.Tensor:
        draw = torch.randn(n, 4, generator=stream, dtype=torch.float64)
        return draw * (1 + VARIANCE / 50.0**2).sqrt() if number == 0 else draw

    x = sampler(lambda x, sigma: x * VARIANCE / (VARIANCE + sigma**2), noise)
    std = gains(sampler, VARIANCE).square().sum(0).sqrt()
    torch.testing.assert_close(x.std(0) / std, torch.ones(4, dtype=torch.float64), rtol=0, atol=4 / math.sqrt(2 * n))


def test_what_samplers_do_to_tails():
    """The table of the reference: a perfect denoiser, twenty steps."""
    weights = torch.ones(4, dtype=torch.float64)
    worst = tail(DDIM(20, 80.0, 0.01), VARIANCE, weights)
    assert worst.probability_ratio(1e-6) < 0.1 and "understates it" in worst.warning()
    assert tail(DDIM(20, 80.0, 0.01, 1.0), VARIANCE, weights).probability_ratio(1e-4) < 0.05
    ours = build(compose("extremes", ["experiment=gaussian_process"], partial=True).sampler, Sampler)
    good = tail(ours, VARIANCE, weights)
    assert abs(good.ratio - 1) < 0.005 and 0.9 < good.probability_ratio(1e-4) < 1.1 and good.warning() is None
    assert (evaluations(ours), evaluations(Heun(5, 10.0, 0.1)), len(gains(ours, VARIANCE))) == (24, 9, 1)


def test_the_map_of_a_gaussian_process_is_what_its_sampler_gives():
    process, sampler = GaussianProcess(n=4, memory=0.5), ExponentialAdamsBashforth(10, 40.0, 0.01)
    law = GaussianLaw(process, sampler, 3)
    z = torch.randn(5, law.dimension, generator=generator(0, "map"), dtype=torch.float64)
    first = law.covariance.expand(z.reshape(5, 16, 3) * (1 + law.variance / 40.0**2).sqrt()).reshape(5, *law.oracle.shape)
    torch.testing.assert_close(law.fields(z), sampler(law.oracle, lambda number: first))
    event = Event("time_mean(area_mean(u, box(0, 1, 0, 3))) > 1", law.spec)
    exact = law.exact(event)
    cells = torch.zeros(3, 4, 4, dtype=torch.float64)
    cells[:, :2] = 1 / 24
    dense = torch.kron(0.5 ** (torch.arange(3)[:, None] - torch.arange(3)).abs().double(), process.covariance)
    assert exact.std**2 == pytest.approx(float(cells.flatten() @ dense @ cells.flatten()), rel=1e-6)
    assert exact.sampler_std / exact.std == pytest.approx(law.tail(event).ratio)
    assert law.exact(Event("max(u) > 1", law.spec)) is None


# Events


SPEC = FieldSpec(
    (Variable("rain", "mm"), Variable("t2m", "K")), Grid(("y", "x"), (0.0, 1.0, 2.0), (0.0, 10.0, 20.0, 30.0), (False, True)), 7200.0
)
FIELDS = torch.randn(4, 5, 2, 3, 4, generator=generator(0, "fields"), dtype=torch.float64)
RAIN, T2M = FIELDS[:, :, 0], FIELDS[:, :, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("time_mean(area_mean(rain)) > 1", RAIN.mean((1, 2, 3))),
        ("area_mean(rain, box(0, 1, 10, 20)) > 1", RAIN[:, :, :2, 1:3].mean((2, 3)).amax(1)),
        ("area_mean(rain, box(0, 1, 10, 20)) < 1", -RAIN[:, :, :2, 1:3].mean((2, 3)).amin(1)),
        ("max(rain, wet) > 1", RAIN[:, :, 1:, [0, 3]].amax((1, 2, 3))),
        ("last(min(t2m)) > 1", T2M[:, -1].amin((1, 2))),
        ("first(at(t2m, 1.2, 21)) > 1", T2M[:, 0, 1, 2]),
        ("fraction(rain > 0.5) >= 0.2", (RAIN > 0.5).double().mean((2, 3)).amax(1)),
        ("duration(at(rain, 0, 0) > 0) > 4", 2 * (RAIN[:, :, 0, 0] > 0).sum(1).double()),
        ("spell(area_mean(rain) < 0) > 4", 2 * longest((RAIN.mean((2, 3)) < 0).double())),
        ("last(area_mean(rain)) - first(area_mean(rain)) > -1.5", RAIN.mean((2, 3))[:, -1] - RAIN.mean((2, 3))[:, 0]),
        ("time_sum(max(hypot(rain, t2m))) / 2 > 0", torch.hypot(RAIN, T2M).amax((2, 3)).sum(1) / 2),
        ("2 * time_max(area_mean(-rain + 1)) > 0", 2 * (1 - RAIN.mean((2, 3))).amax(1)),
    ],
)
def test_events(text, expected):
    event = Event(text, SPEC, {"wet": [1, 2, 30, 0]})
    torch.testing.assert_close(event.functional(FIELDS), expected)
    assert event.above == ("<" not in text.split(")")[-1])


def test_an_event_looks_at_its_frames_alone():
    event = Event("area_mean(rain) > 1", SPEC, frames=slice(2, 4))
    torch.testing.assert_close(event.functional(FIELDS), RAIN[:, 2:4].mean((2, 3)).amax(1))


def test_the_scene_of_an_event_is_its_worst_frame_or_its_mean():
    rows = torch.arange(4)
    worst = Event("area_mean(rain) > 1", SPEC)
    torch.testing.assert_close(worst.scene(FIELDS), RAIN[rows, RAIN.mean((2, 3)).argmax(1)])
    lowest = Event("min(t2m) - max(rain) < 0", SPEC, frames=slice(1, 4))
    series = T2M.amin((2, 3)) - RAIN.amax((2, 3))
    torch.testing.assert_close(lowest.scene(FIELDS), T2M[rows, 1 + series[:, 1:4].argmin(1)])
    torch.testing.assert_close(Event("time_mean(max(rain)) > 1", SPEC, frames=slice(2, 5)).scene(FIELDS), RAIN[:, 2:5].mean(1))
    assert (worst.variable, lowest.variable) == ("rain", "t2m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("area_mean(rian) > 1", "did you mean 'rain'"),
        ("area_maen(rain) > 1", "did you mean 'area_mean'"),
        ("area_mean(rain, north) > 1", r"boxes\.north=\[y0,y1,x0,x1\]"),
        ("area_mean(rain, box(0, 1)) > 1", "found 2 numbers"),
        ("area_mean(rain, box(5, 6, 0, 30)) > 1", "holds no cell of the grid, y 0 to 2, x 0 to 30"),
        ("area_mean(rain, box(2, 1, 0, 30)) > 1", "the smaller limit comes first"),
        ("rain > 1", "compares a whole field"),
        ("area_mean(rain) > rain", "the threshold is a number"),
        ("area_mean(rain) == 1", "expected one comparison"),
        ("0 < area_mean(rain) < 1", "expected one comparison"),
        ("fraction(rain) > 1", "a condition such as rain > 3"),
        ("area_mean(rain > 1) > 1", "is a condition"),
        ("duration(rain > 1) > 1", "'duration' is of a series"),
        ("area_mean(rain) + rain > 1", "combines a field and a series"),
        ("at(rain, 9, 0) > 1", "outside the grid"),
        ("area_mean(rain", "is not an expression"),
        ("__import__('os').system('true') > 1", "is not understood"),
        ("rain.shape > 1", "is not understood"),
        ("max() > 1", "takes 1 to 2 arguments"),
    ],
)
def test_mistakes_in_events(text, message):
    with pytest.raises(UserError, match=message) as caught:
        Event(text, SPEC)
    assert "\n" not in str(caught.value)


# The command

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_density_given_an_event_is_the_exact_one():
    exact = GaussianEvent(0.3, 1.2, 1.5, torch.zeros(1))
    s = torch.linspace(2.0, 15.0, 20001, dtype=torch.float64)
    density, (mean, std) = exact.density(s, 2.0), exact.given(2.0)
    assert float(torch.trapezoid(density, s)) == pytest.approx(1, abs=1e-6) and float(exact.density(s[:1] - 0.1, 2.0)) == 0
    assert float(torch.trapezoid(density * s, s)) == pytest.approx(mean, abs=1e-6)
    assert float(torch.trapezoid(density * (s - mean) ** 2, s).sqrt()) == pytest.approx(std, abs=1e-5)


def test_the_command_on_a_gaussian_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = [
        "extremes",
        "experiment=gaussian_process",
        "size=debug",
        "event=area_mean(u, box(2, 4, 2, 4))",
        "probability=1e-3",
        "members=30",
    ]
    assert cli.main([*common, "out=e.nc", "picture=e.png", "method.samples=500", "replicates=3", "batch=500"]) == 0
    assert (tmp_path / "e.png").read_bytes().startswith(PNG)
    told = capsys.readouterr().out
    assert "of this model's law" in told and "exact: " in told
    with xr.open_dataset(tmp_path / "e.nc", engine="h5netcdf") as found:
        assert found.sizes == {"time": 1, "number": 30, "y": 8, "x": 8} and found.attrs["members_in_event"] == 30
        low, high = found.attrs["probability_low"], found.attrs["probability_high"]
        assert low < found.attrs["probability"] < high and found.attrs["method"] == "SubsetSimulation"
        assert 0.3e-3 < found.attrs["probability"] < 3e-3 and found.attrs["network_calls"] == 24 * found.attrs["model_calls"]
        assert float(found["event_functional"].min()) > 0
    assert cli.main(["report", "run=.", "out=r.html"]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "Rare events" in page and "of this model&#x27;s law" in page and "data:image/png;base64," in page
    assert cli.main([*common, "out=f.nc", "sampler=ddim", "sampler.steps=20"]) == 2
    refused = capsys.readouterr().err
    assert "understates it" in refused and "accept_sampler" in refused and not (tmp_path / "f.nc").exists()


# A trained model: with an untrained network it is the Gaussian of its climatology, so that all of this has a closed form

CELLS, WINDOW, MEMORY, HOUR = 8, 5, 0.9, 3600.0
TIMES = to_datetime(HOUR * np.arange(4))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    spec = FieldSpec((Variable("u", "m"),), Grid(("x",), (0.0,), tuple(map(float, range(CELLS))), (False, True)), HOUR)
    denoiser = LatentDenoiser(spec.shape, WINDOW, width=8, depth=1, heads=1, modes=CELLS, lags=40)
    denoiser.covariance.basis.copy_(torch.eye(CELLS))
    denoiser.covariance.autocovariance.copy_((MEMORY ** torch.arange(40.0)).expand(CELLS, 40))
    denoiser.covariance.remainder.zero_()
    return Checkpoint(spec, Normalizer(spec.shape), IdentityAutoencoder(spec.shape), denoiser.eval().requires_grad_(False), {})


def model(checkpoint) -> NoiseDriven:
    return NoiseDriven(checkpoint, MomentMatching(), ExponentialAdamsBashforth(12, 30.0, 0.03, schedule="edm"), overlap=2, batch=512)


def law_of(checkpoint, case: str) -> tuple[ModelLaw, str, float, float]:
    """A law, a functional of it, and the functional's mean and standard deviation."""
    if case == "free":
        return ModelLaw(model(checkpoint), TIMES), "last(area_mean(u, box(0, 3)))", 0.0, 0.5
    if case == "observed":
        table = pd.DataFrame({"time": TIMES[[1]], "x": [1.0], "observation": [2.0], "variable": "u", "error_std": 0.5})
        observation = build_observation(table, checkpoint.spec, TIMES)[0]
        gain = MEMORY**2 / 1.25
        return ModelLaw(model(checkpoint), TIMES, observation), "last(at(u, 1))", 2 * gain, math.sqrt(1 - gain * MEMORY**2)
    initial = torch.full((1, 1, 1, 1, CELLS), 1.5) * torch.tensor([1.0, 1.0]).reshape(2, 1, 1, 1, 1)
    return ModelLaw(model(checkpoint), TIMES, initial=initial), "last(at(u, 0, 3))", 1.5 * MEMORY**3, math.sqrt(1 - MEMORY**6)


@pytest.mark.parametrize("case", ["free", "observed", "forecast"])
def test_a_model_is_a_map_from_noise_whatever_it_is_given(checkpoint, case):
    law, text, mean, std = law_of(checkpoint, case)
    p = 2e-2
    event = Event(f"{text} > {mean + std * quantile(p)}", law.spec)
    response = law.response(event, 512)
    found = SubsetSimulation(200, moves=2).estimate(response, event.threshold, 20, generator(0, case))
    assert abs(math.log(found.probability / p)) < 3.5 * found.error + 0.1
    fields = law.fields(found.noise)
    assert fields.shape == (20, 4, 1, 1, CELLS) and bool((event.functional(fields) > event.threshold).all())
    torch.testing.assert_close(event.functional(fields).double(), found.values, rtol=1e-4, atol=1e-4)
    z = response.noise(100, generator(1, case))
    values = event.functional(law.fields(z))
    assert float(values.mean()) == pytest.approx(mean, abs=4 * std / 10) and float(values.std()) == pytest.approx(std, rel=0.28)
    assert law.differentiable == (case == "free") and abs(law.tail(event).ratio - 1) < 0.02


def test_a_snapshot_of_a_model_of_snapshots_is_sampled_without_margins(checkpoint):
    denoiser = LatentDenoiser(checkpoint.spec.shape, 1, width=8, depth=1, heads=1, modes=CELLS, lags=1)
    denoiser.covariance.basis.copy_(torch.eye(CELLS))
    denoiser.covariance.autocovariance.fill_(4.0)
    denoiser.covariance.remainder.zero_()
    one = Checkpoint(checkpoint.spec, checkpoint.normalizer, checkpoint.autoencoder, denoiser.eval().requires_grad_(False), {})
    law, longer = ModelLaw(model(one), TIMES[:1]), ModelLaw(model(one), TIMES[:2])
    assert law.dimension == CELLS and longer.dimension >= 4 * CELLS
    z = torch.randn(5, longer.dimension, generator=generator(0, "snapshot"))
    torch.testing.assert_close(longer.fields(z)[:, :1], law.fields(z[:, CELLS : 2 * CELLS]), rtol=1e-4, atol=1e-4)


def test_the_instanton_of_a_model(checkpoint):
    law, text, mean, std = law_of(checkpoint, "free")
    event = Event(f"{text} > {mean + std * quantile(1e-5)}", law.spec)
    found = InstantonImportanceSampling(300, pilot=20).unchecked(law.response(event, 512), event.threshold, 10, generator(0, "model"))
    assert found.probability == pytest.approx(1e-5, rel=4 * found.error + 0.03) and found.error < 0.2


def test_the_command_on_a_model(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "model")
    small = ["extremes", "checkpoint=model", "size=debug", "members=6", "method.samples=60", "batch=128", "sampler.steps=12"]
    assert cli.main([*small, "event=max(u, west) > 2.5", "boxes.west=[0,3]", "frames=3", "out=free.zarr", "picture=ring.png"]) == 0
    assert (tmp_path / "ring.png").read_bytes().startswith(PNG)
    assert cli.main([*small, "event=last(at(u, 3)) > 1.5", "initial=free.zarr", "lead=2h", "out=ahead.nc"]) == 0
    assert cli.main([*small, "event=min(u) < -9", "method=brute_force", "frames=2", "out=none.nc"]) == 0
    assert cli.main([*small, "event=min(u) < -9", "method=brute_force", "frames=2", "out=none.nc", "picture=none.png"]) == 2
    said = capsys.readouterr()
    assert "0 of 0 members" in said.out and "there is no picture" in said.err
    with xr.open_dataset("ahead.nc", engine="h5netcdf") as found:
        assert found["u"].dims == ("time", "prediction_timedelta", "number", "x") and found.sizes["prediction_timedelta"] == 3
        assert float(found["u"].isel(prediction_timedelta=-1, x=3).min()) > 1.5
    rows = pd.DataFrame({"time": TIMES[[0, 1]], "x": [1.0, 2.0], "observation": [1.0, 0.5], "variable": "u", "error_std": 0.5})
    rows.to_csv("rows.csv", index=False)
    given = ["observations=rows.csv", f"end={TIMES[3]}", f"event_start={TIMES[2]}"]
    assert cli.main([*small, *given, "event=area_mean(u) > 1", "out=given.nc"]) == 0
    assert cli.main([*small, "event=min(u)", "return_period=50h", "frames=2", "out=level.nc", "method.samples=300"]) == 0
    assert "estimated anew" in capsys.readouterr().out
    with xr.open_dataset("level.nc", engine="h5netcdf") as found:
        told = found.attrs
        assert told["probability_asked"] == pytest.approx(2 / 50) and told["threshold_low"] < told["threshold"] < told["threshold_high"]
        assert 0.4 < told["probability"] / told["probability_asked"] < 2.5 and told["level_calls"] == 570
        assert float(found["event_functional"].min()) > told["threshold"]
    for wrong, message in (
        (["event=max(u)", "return_period=9y", *given[:1]], "of a model's climate"),
        (["event=max(u) > 1", "probability=0.1"], "expected a threshold"),
        (["event=max(u)", "probability=0.1", "method=splitting"], "method=subset"),
        (["event=max(u)", "probability=1e-3", "method=brute_force"], "do not tell"),
        (["event=max(v) > 1"], "unknown variable 'v'"),
        (["event=max(u)"], "expected a threshold"),
        (["event=max(u) > 1", "picture=ring.gif"], "ends in .png"),
        (["event=max(u) > 1", "initial=free.zarr"], "needs lead"),
        (["event=max(u) > 1", *given[:1], "method=instanton"], "derivative"),
        (["event=max(u) > 99", "method.max_levels=1"], "out of reach"),
    ):
        assert cli.main([*small[:5], "out=wrong.nc", *wrong]) == 2
        assert message in capsys.readouterr().err


# Guidance


@pytest.fixture(scope="module")
def process() -> GaussianLaw:
    return GaussianLaw(GaussianProcess(n=6), ExponentialAdamsBashforth(24, 80.0, 0.01, schedule="edm"), 1)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_the_guided_denoiser_of_a_gaussian_is_exact(process, sigma):
    """E[x | x_t, S > s] = D + cov(x, S | x_t) phi / (sd Phi) for jointly Gaussian x and S; likelihood included."""
    event = Event("area_mean(u, box(1, 3, 1, 3)) > 0.8", process.spec)
    x = 2 * torch.randn(3, *process.oracle.shape, generator=generator(0, "guided"), dtype=torch.float64)
    told = EventDenoiser(process.latent(event, 0.8)).twist(x, torch.tensor(sigma, dtype=torch.float64))
    c = process.oracle.spread(torch.eye(36, dtype=torch.float64))
    left = c - c @ torch.linalg.solve(c + sigma**2 * torch.eye(36, dtype=torch.float64), c)
    mean = x.flatten(1) @ torch.linalg.solve(c + sigma**2 * torch.eye(36, dtype=torch.float64), c)
    a = torch.zeros(6, 6, dtype=torch.float64)
    a[1:4, 1:4] = 1 / 9
    a = a.flatten()
    sd = (a @ left @ a).sqrt()
    place = (mean @ a - 0.8) / sd
    hazard = (NORMAL.log_prob(place) - torch.special.log_ndtr(place)).exp()
    torch.testing.assert_close(told.log_likelihood, torch.special.log_ndtr(place), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(told.posterior.flatten(1), mean + hazard[:, None] * (left @ a) / sd, rtol=1e-6, atol=1e-6)


def test_guidance_draws_the_event_and_particles_tell_its_probability(process):
    exact = process.exact(Event("area_mean(u, box(1, 3, 1, 3))", process.spec))
    s = exact.threshold(1e-3)
    event = Event(f"area_mean(u, box(1, 3, 1, 3)) > {s}", process.spec)
    mean, std = exact.given(s)
    for method in (EventGuidance(64), TwistedParticles(128, 4, 64)):
        found = method.sample(process.latent(event, s), 400, 400, generator(0, "guidance"))
        values = event.functional(process.decoded(found.latents))
        assert float((values > s).double().mean()) >= 0.99
        assert float(values.mean()) == pytest.approx(mean, rel=0.015)
        assert 0.8 < float(values.std()) / std < 1.15
    assert found.probability == pytest.approx(1e-3, rel=4 * found.error + 0.06)
    with pytest.raises(UserError, match="fixed width"):
        EventGuidance(width=0.1)
    flat = Event("fraction(u > 1) > 0.5", process.spec)
    with pytest.raises(UserError, match="no slope"):
        EventGuidance().sample(process.latent(flat, 0.5), 2, 2, generator(0, "flat"))


@pytest.mark.parametrize("method", options("method"))
def test_every_method_by_the_command(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    less = {"brute_force": ["method.samples=2000"], "twisted_smc": ["method.particles=32", "method.steps=16"]}.get(method, [])
    event = ["event=area_mean(u, box(2, 4, 2, 4))", "probability=2e-2", "members=20"]
    assert cli.main(["extremes", "experiment=gaussian_process", "size=debug", f"method={method}", *event, *less, "out=e.zarr"]) == 0
    told, found = capsys.readouterr().out, xr.open_zarr(tmp_path / "e.zarr")
    assert found.sizes["number"] == 20 and found.attrs["members_in_event"] >= 19
    assert ("probability" in found.attrs) == (method != "guidance") and ("does not tell" in told) == (method == "guidance")
    if "probability" in found.attrs:
        assert 0.3 < found.attrs["probability"] / 2e-2 < 3


# A network


@pytest.fixture(scope="module")
def bent(checkpoint) -> Checkpoint:
    """The same prior with a network that is not zero: its law has no closed form and is not Gaussian."""
    denoiser = LatentDenoiser(checkpoint.spec.shape, WINDOW, width=8, depth=1, heads=1, modes=CELLS, lags=40)
    denoiser.load_state_dict(checkpoint.denoiser.state_dict())
    stream = generator(3, "bent")
    with torch.no_grad():
        denoiser.outputs.weight.copy_(0.3 * torch.randn(denoiser.outputs.weight.shape, generator=stream))
        denoiser.outputs.bias.fill_(0.1)
    return Checkpoint(checkpoint.spec, checkpoint.normalizer, checkpoint.autoencoder, denoiser.eval().requires_grad_(False), {})


@pytest.mark.slow
def test_methods_agree_with_brute_force_on_a_network(bent):
    law = ModelLaw(model(bent), TIMES)
    event = Event("area_mean(u, box(0, 3)) > 0", law.spec)
    response = law.response(event, 1000)
    values = response(response.noise(30000, generator(0, "brute"))).sort(descending=True).values
    for p in (1e-2, 1e-3):
        level, noise = float(values[int(p * len(values))]), 1 / math.sqrt(p * len(values))
        for method in (SubsetSimulation(1000, moves=0), AdaptiveMultilevelSplitting(300, moves=0)):
            found = method.estimate(law.response(event, 1000), level, 1, generator(1, "network"))
            assert abs(math.log(found.probability / p)) < 3 * math.hypot(found.error, noise), (p, type(method).__name__)
