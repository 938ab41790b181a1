"""Heavy tails: simulators whose laws are known, noises and samplers, and the command that compares priors."""

import math

import pandas as pd
import pytest
import torch
from scipy import stats

from appa_lite.config import compose
from appa_lite.core.errors import UserError
from appa_lite.diffusion.noise_laws import Stable, Student
from appa_lite.diffusion.samplers import DLPM, ExponentialAdamsBashforth
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.forecasters.tail_laboratory import MetaGaussian, Summary, snapshots, tail_scores
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.simulators.advected_rain import AdvectedRain
from appa_lite.simulators.base import states, trajectories
from appa_lite.simulators.cam_field import CamField
from appa_lite.simulators.random_fields import PeriodicField
from appa_lite.stages import tails
from appa_lite.verification.tail_figures import tail_table

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
    assert float(simulator.quantile(level.new_tensor(5e-2))) == pytest.approx(float(level[0]))
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


# Noise laws and their samplers


def uniforms(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def normals(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("degrees", [2.5, 4.0])
def test_student_noise_is_student_with_unit_variance(degrees):
    n = Student(degrees).scale(uniforms(20_000)) * normals(20_000)
    assert stats.kstest((n * math.sqrt(degrees / (degrees - 2))).numpy(), stats.t(degrees).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1.2, 1.8])
def test_stable_scales_have_their_laplace_transform_and_add_up_along_the_chain(alpha):
    argument = torch.tensor([0.1, 0.5, 2.0], dtype=DOUBLE)
    a = Stable(alpha).square(uniforms(40_000))
    torch.testing.assert_close(torch.exp(-argument[:, None] * a).mean(1), torch.exp(-(argument ** (alpha / 2))), atol=6e-3, rtol=0)
    sampler = DLPM(steps=6, sigma_max=3.0, sigma_min=0.1, alpha=alpha)
    v = sampler.variances(torch.rand(20_000, 6, 2, generator=torch.Generator().manual_seed(2), dtype=DOUBLE))
    assert (v.diff(dim=1) < 0).all()
    for column, sigma in enumerate(sampler.levels[:-1]):
        wanted = torch.exp(-(sigma**alpha) * argument ** (alpha / 2))
        torch.testing.assert_close(torch.exp(-argument[:, None] * v[:, column]).mean(1), wanted, atol=1e-2, rtol=0)


def test_dlpm_near_alpha_2_is_ancestral_sampling():
    stream = torch.Generator().manual_seed(0)
    sampler = DLPM(steps=200, sigma_max=30.0, sigma_min=1e-2, alpha=1.9999)
    x = sampler(lambda x, sigma: x / (1 + sigma**2), lambda step: torch.randn(10_000, 2, generator=stream, dtype=DOUBLE))
    assert float(x.std()) == pytest.approx(1.0, abs=0.04)


def test_dlpm_on_stable_data_is_right_in_the_body_and_short_in_the_tail():
    """E[z | z + sigma n] = c^alpha / (c^alpha + sigma^alpha) x, where data of scale c and noise are stable with one index.

    A jump of the noise is undone by the mean of z given x, whatever the number of steps: the spread of z is lost there.
    """
    alpha, scale, members = 1.7, 0.7, 20_000
    sampler = DLPM(steps=100, sigma_max=100.0, sigma_min=1e-3, alpha=alpha)
    stream = torch.Generator().manual_seed(0)
    x = sampler(
        lambda x, sigma: x * scale**alpha / (scale**alpha + sigma**alpha),
        lambda step: torch.randn(members, 2, generator=stream, dtype=DOUBLE),
    )
    exact = scale * Stable(alpha).scale(uniforms(400_000, 5)) * normals(400_000, 6)
    p = probabilities(0.25, 0.1, 0.02, 0.005)
    ratio = torch.quantile(x[:, 0].abs(), 1 - p) / torch.quantile(exact.abs(), 1 - p)
    assert (ratio[:2] > 0.85).all() and (ratio[2:] > 0.65).all() and (ratio < 1.05).all()
    gaussian = stats.norm.isf(p.numpy() / 2) / stats.norm.isf(0.125)
    assert float(x[:, 0].abs().quantile(0.995) / x[:, 0].abs().quantile(0.75)) > 2 * gaussian[3]  # heavy all the same


def test_the_probability_flow_is_the_same_for_student_noise():
    """In one dimension it maps quantiles to quantiles: t-EDM with the exact denoiser draws Student data, tail and all."""
    nu, grid = 4.0, torch.linspace(-60, 60, 2401, dtype=DOUBLE)
    prior = torch.from_numpy(stats.t.pdf(grid.numpy(), nu))
    unit = math.sqrt((nu - 2) / nu)

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        u = (x - grid) / (float(sigma) * unit)
        weight = prior * (1 + u**2 / nu) ** (-(nu + 1) / 2)
        return (weight * grid).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)

    level = probabilities(0.2, 0.05, 0.01, 1e-3)
    start = unit * torch.from_numpy(stats.t.isf(level.numpy(), nu))[:, None]
    x = ExponentialAdamsBashforth(60, 50.0, 0.3, 3)(denoiser, lambda step: start)
    torch.testing.assert_close(x[:, 0], torch.from_numpy(stats.t.isf(level.numpy(), nu)), rtol=0.04, atol=0)


@pytest.mark.parametrize(("law", "keys"), [(Student, {"degrees": 2.0}), (Stable, {"alpha": 2.0}), (Stable, {"alpha": 0.0})])
def test_noise_that_cannot_be(law, keys):
    with pytest.raises(UserError, match="noise needs"):
        law(**keys)


# Judging tails


def test_a_sample_of_the_law_itself_scores_well_and_a_light_one_does_not():
    simulator = AdvectedRain()
    truth, other = (Summary.of(snapshots(simulator, seed, 3000)[:, 0], 8) for seed in (0, 1))
    rows = {(r["metric"], r["level"]): r for r in tail_scores(other, truth, simulator.quantile)}
    assert rows["shape", 0.99]["value"] == pytest.approx(0.25, abs=4 * rows["shape", 0.99]["error"])
    for level in (0.99, 0.999):
        assert abs(rows["quantile_ratio", level]["value"] - 1) < 4 * rows["quantile_ratio", level]["error"]
    assert rows["mass_ratio", 0.99]["value"] == pytest.approx(1, abs=0.15)
    assert rows["chi", 0.99]["value"] == pytest.approx(rows["chi", 0.99]["truth"], abs=0.04)
    assert rows["area_mean_ratio", 0.99]["value"] == pytest.approx(1, abs=0.15)
    light = Summary.of(torch.log1p(snapshots(simulator, 1, 3000)[:, 0]), 8)
    rows = {(r["metric"], r["level"]): r for r in tail_scores(light, truth, simulator.quantile)}
    assert rows["quantile_ratio", 0.999]["value"] < 0.5 and rows["shape", 0.99]["value"] < 0.1


def test_the_meta_gaussian_proxy_has_the_tail_without_a_network():
    simulator = AdvectedRain(n=12, length=1.5)
    proxy = MetaGaussian.fit(snapshots(simulator, 0, 4000), (True, True))
    fields = proxy.draw(torch.randn(4000, 1, 12, 12, generator=torch.Generator().manual_seed(0)))
    x, p = fields.flatten().double(), probabilities(0.1, 0.01)
    ratio = torch.stack([x.kthvalue(round(len(x) * (1 - float(q))))[0] for q in p]) / simulator.quantile(p)
    torch.testing.assert_close(ratio, torch.ones(2, dtype=DOUBLE), atol=0.1, rtol=0)


def test_the_table_judges_means_over_seeds_and_says_what_was_missed():
    def rows(prior: str, *values: float) -> list[dict]:
        wanted = [("shape", 0.99, 0.25), ("quantile_ratio", 0.999, 1.0)]
        return [
            {"prior": prior, "seed": seed, "metric": metric, "level": level, "value": value * true, "truth": true}
            for seed, value in enumerate(values)
            for metric, level, true in wanted
        ]

    text = tail_table(rows("good", 0.85, 1.05) + rows("short", 0.8, 0.85), {"shape": 0.08, "q999": 0.1}).splitlines()
    assert "0.95 ± 0.14" in text[2] and "0.83 ± 0.04" in text[3]
    assert text[4:] == ["asked: shape 0.17 to 0.33, q999 0.90 to 1.10", "good          keeps all", "short         misses q999 (0.83)"]
    assert "misses shape (nan)" in tail_table(rows("few", 1.0)[1:], {"shape": 0.08})
    assert "asked" not in tail_table(rows("good", 1.0), {})


# The command


def test_tails_end_to_end_and_goes_on_where_it_stopped(tmp_path, capsys):
    def run(*priors: str) -> str:
        tails.run(compose("tails", ["experiment=advected_rain", "size=debug", f"out={tmp_path}", f"priors=[{','.join(priors)}]"]))
        return capsys.readouterr().out

    run("edm", "stable")
    before = (tmp_path / "edm/seed_0/record.json").stat().st_mtime_ns
    assert "heavy_start" in run("edm", "stable", "gaussianize", "student", "heavy_start")
    assert (tmp_path / "edm/seed_0/record.json").stat().st_mtime_ns == before
    table = pd.read_json(tmp_path / "tails.json")
    assert set(table.prior) == {"training data", "edm", "gaussianize", "student", "stable", "heavy_start"}
    assert {"prior", "seed", "metric", "level", "value", "truth", "error", "seconds_train", "network_calls"} <= set(table)
    assert len(pd.read_csv(tmp_path / "tails.csv")) == len(table) and (tmp_path / "tails.png").stat().st_size > 10_000
    model = Checkpoint.load(tmp_path / "student/seed_0/model")
    with pytest.raises(UserError, match="heavy-tailed noise"):
        LatentDiffusion(model, MomentMatching(), ExponentialAdamsBashforth(4))


def test_tails_refuses_what_is_no_prior_and_no_bound():
    with pytest.raises(UserError, match="bounds=.*expected distances of some of shape"):
        tails.run(compose("tails", ["experiment=advected_rain", "size=debug", "out=out", "+bounds.shapes=0.1"]))
    with pytest.raises(UserError, match="priors="):
        tails.run(compose("tails", ["experiment=advected_rain", "size=debug", "out=out", "priors=[edn]"]))
