"""Errors that are correlated or heavy-tailed: exact where the posterior is known, and worth it where they were ignored."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from test_filter import BEGIN, CELLS, LINEAR, OFFSET, PHI, SCALE, gaussian, spatial, twin

import appa_lite
from appa_lite.cli import main
from appa_lite.core.blocks import Blocks
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.core.student import matched_variance, mixture
from appa_lite.diffusion.samplers import DPMSolverPP2M
from appa_lite.forecasters.ensemble import FrameObservations, whitened
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.forecasters.optimal_interpolation import OptimalInterpolation
from appa_lite.forecasters.posterior import ModeCovariance, Prior, later
from appa_lite.guidance.mmps import MMPS
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer
from appa_lite.observations import TableOptions, build_observation
from appa_lite.observations.correlation import ErrorCorrelation, correlate
from appa_lite.observations.full_state import FullState
from appa_lite.observations.observe import observe

FRAMES, ERROR = 10, 1.0
ALONG = {"error_correlation": {"u": {"length": 4.0, "share": 0.95}}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    here = tmp_path_factory.mktemp("laws")
    gaussian(here / "model")
    return here


@pytest.fixture(scope="module")
def checkpoint(directory):
    return Checkpoint.load(directory / "model")


def passes(seed: int = 0, per_frame: int = 7) -> tuple[np.ndarray, pd.DataFrame, np.ndarray]:
    """A truth, a table whose errors are correlated along the ring at each frame, and their covariance."""
    x, table = twin(FRAMES, per_frame, seed, ERROR)
    spec = FieldSpec((Variable("u"),), Grid(("x",), (0.0,), tuple(map(float, range(CELLS))), (False, True)), 3600.0)
    options = TableOptions.parse(ALONG)
    correlation = np.eye(len(table))
    for rows, matrix in zip(*vars(correlate(table, spec, options.error_correlation)).values(), strict=True):
        correlation[np.ix_(rows, rows)] = matrix
    hour = ((table["time"].to_numpy() - BEGIN) // np.timedelta64(3600, "s")).astype(int)
    noise = np.linalg.cholesky(correlation) @ np.random.default_rng(seed + 100).standard_normal(len(table))
    table["observation"] = x[hour, table["x"].astype(int)] + ERROR * noise
    return x, table, ERROR**2 * correlation


def dense(table: pd.DataFrame, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (T, X) of the posterior, from dense matrices."""
    lags = np.abs(np.arange(FRAMES)[:, None] - np.arange(FRAMES)[None])
    prior = SCALE**2 * np.kron(PHI**lags, spatial())
    hour = ((table["time"].to_numpy() - BEGIN) // np.timedelta64(3600, "s")).astype(int)
    rows = hour * CELLS + table["x"].to_numpy().astype(int)
    gain = np.linalg.solve(prior[np.ix_(rows, rows)] + errors, prior[rows]).T
    mean, std = OFFSET + gain @ (table["observation"].to_numpy() - OFFSET), np.sqrt(np.diag(prior - gain @ prior[rows]))
    return mean.reshape(FRAMES, CELLS), std.reshape(FRAMES, CELLS)


def compare(sample: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[float, float]:
    error = (((sample.mean(0) - mean) / std) ** 2).mean() - 1 / len(sample)
    return float(np.sqrt(max(error, 0.0))), float(np.sqrt((sample.var(0, ddof=1) / std**2).mean()))


# Blocks


def test_blocks_are_matrices():
    torch.manual_seed(0)
    a = torch.randn(3, 3, dtype=torch.float64)
    blocks = Blocks((torch.tensor([4, 0, 2]),), (a @ a.T + torch.eye(3),))
    matrix = blocks(torch.eye(6, dtype=torch.float64)).T
    v = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(blocks(v), v @ matrix.T)
    factor = blocks.cholesky()
    torch.testing.assert_close(factor.mT(factor.inverse().mT(v)), v)
    torch.testing.assert_close(factor(factor.mT(v)), v @ matrix.T)
    keep = torch.tensor([True, True, True, False, False, True])
    torch.testing.assert_close(blocks.select(keep)(torch.eye(4, dtype=torch.float64)), matrix[keep][:, keep])
    rows = torch.tensor([2, 3, 4])
    torch.testing.assert_close(blocks.submatrix(rows), matrix[rows][:, rows])
    both = Blocks.concatenate([None, blocks], [2, 6])
    torch.testing.assert_close(both(torch.eye(8, dtype=torch.float64))[2:, 2:], matrix)


def test_recombined_rows_have_independent_errors(checkpoint):
    _, table, covariance = passes()
    table["error_std"] = np.random.default_rng(0).uniform(0.3, 2.0, len(table))
    covariance *= np.outer(table["error_std"], table["error_std"])
    observation, _ = build_observation(table, checkpoint.spec, np.unique(table["time"]), ALONG, torch.float64)
    order = np.lexsort((table["x"], table["time"]))
    mixed = observation.mixing()(torch.eye(len(observation), dtype=torch.float64)).T.numpy()
    np.testing.assert_allclose(mixed @ covariance[np.ix_(order, order)] @ mixed.T, np.diag(observation.variance), atol=1e-10)
    weight = torch.from_numpy(np.random.default_rng(1).uniform(0.01, 1, len(observation)))
    more = observation.inflated(weight)
    scale = more.variance.sqrt()
    whole = scale[:, None] * more.correlation(torch.eye(len(observation), dtype=torch.float64)) * scale
    np.testing.assert_allclose(whole, covariance[np.ix_(order, order)] + np.diag(observation.variance * (1 / weight - 1)), atol=1e-10)


@pytest.mark.parametrize("kernel", ["exponential", "soar", "gaussian"])
def test_correlations_are_positive_definite_anywhere(kernel):
    rng = np.random.default_rng(0)
    grid = Grid(("latitude", "longitude"), tuple(np.linspace(-80, 80, 9)), tuple(np.arange(0.0, 360, 20)), (False, True))
    spec = FieldSpec((Variable("u"),), grid, 3600.0)
    time = np.datetime64("2020-01-01", "ns") + rng.integers(0, 7200, 200) * np.timedelta64(1, "s")
    table = pd.DataFrame(
        {"time": time, "latitude": rng.uniform(-80, 80, 200), "longitude": rng.uniform(0, 360, 200), "variable": "u", "type": "sonde"}
    )
    found = correlate(table, spec, {"sonde": ErrorCorrelation(8e6, 3600.0, kernel, 0.99)})
    assert sum(map(len, found.rows)) == 200 and torch.linalg.eigvalsh(found.matrices[0])[0] > 0.009
    alone = correlate(table, spec, {"u": ErrorCorrelation(time=30.0, kernel=kernel)})  # places differ: nothing hangs together
    assert alone is None and correlate(table, spec, {"other": ErrorCorrelation(1.0)}) is None
    for wrong in ({"kernel": "box", "length": 1.0}, {}, {"length": -1.0}, {"length": 1.0, "share": 1.0}):
        with pytest.raises(appa_lite.UserError, match="error_correlation"):
            ErrorCorrelation(**wrong)


# Posteriors


@pytest.mark.parametrize("method", ["moment_matching", "jacobian_free", "mmps", "optimal_interpolation"])
def test_the_posterior_with_correlated_errors_is_exact(checkpoint, method):
    _, table, covariance = passes(3)
    times = np.unique(table["time"].to_numpy())
    observation, _ = build_observation(table, checkpoint.spec, times, ALONG)
    sampler = DPMSolverPP2M(24, 100.0, 0.005, eta=0.0)
    guidance = {"moment_matching": MomentMatching(True, 1e-4), "jacobian_free": MomentMatching(False, 1e-4), "mmps": MMPS(tolerance=1e-3)}
    if method == "optimal_interpolation":
        model = OptimalInterpolation(checkpoint, tolerance=1e-6)
    else:
        model = LatentDiffusion(checkpoint, guidance[method], sampler, 2, 256)
    sample = model.assimilate(observation, times, range(128), seed=0)[:, :, 0, 0].double().numpy()
    error, spread = compare(sample, *dense(table, covariance))
    assert error < 0.05 and abs(spread - 1) < 0.04


def test_the_kalman_analysis_with_correlated_errors_is_exact(checkpoint):
    """G = S S^T and S d of whitened rows are those of the full R^{-1}."""
    _, table, covariance = passes(4)
    table = table[:7]
    observation, _ = build_observation(table, checkpoint.spec, np.unique(table["time"]), ALONG, torch.float64)
    fields = torch.randn(9, 1, 1, 1, CELLS, dtype=torch.float64)
    order = np.argsort(table["x"].to_numpy())
    inverse = np.linalg.inv(covariance[:7, :7][np.ix_(order, order)])
    predicted = observation.operator(fields).numpy()
    anomalies = (predicted - predicted.mean(0)) / np.sqrt(8)
    s, d = whitened(FrameObservations(observation, 1).parts[0], fields)
    np.testing.assert_allclose(s @ s.T, anomalies @ inverse @ anomalies.T, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(s @ d, anomalies @ inverse @ (observation.values.numpy() - predicted.mean(0)), rtol=1e-6, atol=1e-9)
    _, table, _ = passes(5)
    options = {"error_correlation": {"u": {"time": 7200.0, "length": 4.0}}}
    across, _ = build_observation(table, checkpoint.spec, np.unique(table["time"]), options)
    with pytest.raises(appa_lite.UserError, match="frame by frame"):
        FrameObservations(across, FRAMES)


def test_ignoring_correlations_costs():
    """In closed form: the analysis that takes them for independent is worse, and claims to be far better than it is."""
    _, table, covariance = passes(0, CELLS)
    prior = SCALE**2 * np.kron(PHI ** np.abs(np.arange(FRAMES)[:, None] - np.arange(FRAMES)[None]), spatial())
    hour = ((table["time"].to_numpy() - BEGIN) // np.timedelta64(3600, "s")).astype(int)
    rows = hour * CELLS + table["x"].to_numpy().astype(int)
    between, claimed, made = prior[np.ix_(rows, rows)], {}, {}
    for name, errors in (("known", covariance), ("ignored", np.diag(np.diag(covariance)))):
        gain = np.linalg.solve(between + errors, prior[rows]).T
        claimed[name] = np.trace(prior - gain @ prior[rows])
        made[name] = np.trace(prior - 2 * gain @ prior[rows] + gain @ (between + covariance) @ gain.T)
    assert np.isclose(claimed["known"], made["known"])
    assert made["ignored"] > 1.2 * made["known"] and claimed["ignored"] < 0.65 * made["ignored"]


# Student-t errors


@pytest.mark.parametrize("degrees", [2.0, 4.0, 10.0])
def test_the_mixture_is_the_student_distribution(degrees):
    x = torch.linspace(-30, 30, 61, dtype=torch.float64)
    weight, scales = mixture(degrees, x)
    density = (weight.exp() * torch.exp(-(x[:, None] ** 2) / (2 * scales)) / (2 * np.pi * scales).sqrt()).sum(-1)
    np.testing.assert_allclose(density, stats.t(degrees).pdf(x.numpy()), rtol=1e-3)


def test_matched_variances():
    d = torch.tensor([0.0, 1.0, 3.0, 10.0, 100.0], dtype=torch.float64)
    r = matched_variance(d, torch.full_like(d, 1e-9), torch.ones_like(d), 4.0)
    np.testing.assert_allclose(r, (4 + d**2) / 5, rtol=2e-3)  # the weight of iteratively reweighted least squares
    wide = matched_variance(d[:3], torch.full_like(d[:3], 1e6), torch.ones_like(d[:3]), 4.0)
    np.testing.assert_allclose(wide, 2.0, rtol=0.02)  # nothing is known: the variance of the law


def white(frames: int) -> Checkpoint:
    """A prior of independent cells and frames."""
    spec = FieldSpec((Variable("u"),), Grid(("x",), (0.0,), tuple(map(float, range(CELLS))), (False, True)), 3600.0)
    denoiser = LatentDenoiser(spec.shape, frames, width=8, depth=1, heads=1, modes=CELLS, lags=1)
    denoiser.covariance.basis.copy_(torch.eye(CELLS))
    denoiser.covariance.autocovariance.copy_(torch.ones(CELLS, 1))
    denoiser.covariance.remainder.zero_()
    return Checkpoint(spec, Normalizer(spec.shape), IdentityAutoencoder(spec.shape), denoiser.eval().requires_grad_(False), {"phase": 0.0})


def test_the_posterior_of_independent_unknowns_is_exact():
    """p(x | y) ~ N(x; 0, 1) t(y - x), integrated numerically, mode by mode: from doubtless values to gross errors."""
    checkpoint, degrees, scale = white(4), 3.0, 0.5
    times = to_datetime(3600.0 * np.arange(4))
    y = torch.linspace(0, 6, CELLS)
    columns = {"time": times[1], "x": np.arange(CELLS, dtype=float), "variable": "u", "observation": y.numpy(), "error_std": scale}
    observation, _ = build_observation(pd.DataFrame(columns), checkpoint.spec, times, {"student_t": degrees})
    model = LatentDiffusion(checkpoint, MomentMatching(True, 1e-5), DPMSolverPP2M(32, 100.0, 0.01, eta=0.0), 2, 512)
    sample = model.assimilate(observation, times, range(512), seed=0)[:, 1, 0, 0].double().numpy()
    grid = np.linspace(-6, 9, 4001)
    density = stats.norm.pdf(grid) * stats.t.pdf((y.numpy()[:, None] - grid) / scale, degrees)
    density /= density.sum(1, keepdims=True)
    mean = density @ grid
    std = np.sqrt(density @ grid**2 - mean**2)
    assert np.abs((sample.mean(0) - mean) / std).max() < 0.15 and np.abs(sample.std(0) / std - 1).max() < 0.1


@pytest.mark.slow
def test_heavy_tails_withstand_gross_errors(directory):
    """5 % of the values are wrong by ten standard deviations: what was lost by normal errors is mostly won back."""
    model = appa_lite.load(directory / "model")
    x, table = twin(20, 8, seed=6)
    rng = np.random.default_rng(7)
    gross = rng.random(len(table)) < 0.05
    spoiled = table.assign(observation=table["observation"] + 10 * 0.4 * gross * rng.choice([-1, 1], len(table)))
    tails = "+network.student_t=4"
    runs = {"thrown out": (table[~gross], ()), "normal": (spoiled, ()), "student": (spoiled, (tails,))}
    fast = ("sampler.steps=12", "sampler.eta=0.0", "sampler.sigma_max=100", "batch=24")
    found = {k: model.reanalysis(rows, *fast, *extra, members=24) for k, (rows, extra) in runs.items()}
    rmse = {k: float(np.sqrt(((a["u"].mean("number").values - x) ** 2).mean())) for k, a in found.items()}
    assert rmse["normal"] > 1.3 * rmse["thrown out"], rmse
    assert rmse["student"] < 1.12 * rmse["thrown out"], rmse


def test_members_do_not_depend_on_the_batch(checkpoint):
    _, table = twin(6, 5)
    times = np.unique(table["time"].to_numpy())
    observation, _ = build_observation(table, checkpoint.spec, times, {"student_t": 4})
    model = [LatentDiffusion(checkpoint, MomentMatching(tolerance=1e-5), DPMSolverPP2M(8, 100.0, 0.01), 2, batch=b) for b in (2, 4)]
    a, b = (m.assimilate(observation, times, range(4), seed=1) for m in model)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


# From the command line


def test_observe_draws_the_law_it_is_told():
    spec = FieldSpec((Variable("u"),), Grid(("x",), (0.0,), tuple(map(float, range(30))), (False, True)), 3600.0)
    times, fields = to_datetime(3600.0 * np.arange(400)), torch.zeros(400, 1, 1, 30)
    correlation = {"error_correlation": {"u": {"length": 3.0, "share": 0.999}}}
    errors = observe(fields, spec, times, [FullState(2.0, frames=None)], 0, TableOptions.parse(correlation))
    errors = errors["observation"].to_numpy().reshape(400, 30)
    assert abs(errors.std() - 2) < 0.15
    assert abs((errors[:, 1:] * errors[:, :-1]).mean() / (errors**2).mean() - np.exp(-1 / 3)) < 0.05
    assert abs((errors[1:] * errors[:-1]).mean()) < 0.3
    tails = observe(fields, spec, times, [FullState(2.0, frames=None)], 0, TableOptions(student_t=5.0))["observation"].to_numpy() / 2
    assert stats.kstest(tails, stats.t(5).cdf).pvalue > 0.01
    with pytest.raises(appa_lite.UserError, match="either correlated or Student-t"):
        TableOptions.parse(correlation | {"student_t": 3})


@pytest.mark.parametrize("command", ["reanalysis", "filter"])
def test_evidence_knows_the_law(directory, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, table, _ = passes(8)
    table.to_csv("obs.csv", index=False)
    line = [command, "experiment=lorenz96", "size=debug", f"checkpoint={directory / 'model'}", "observations=obs.csv", LINEAR]
    line += ["members=60", "batch=60", "withhold=10%", "network.error_correlation={u: {length: 4.0, share: 0.95}}"]
    assert main([*line, "out=right.nc"]) == 0
    assert main([*line, "out=doubted.nc", "gross_error_probability=0.01"]) == 0
    capsys.readouterr()
    with appa_lite.open_dataset("right.nc") as right:
        (found,) = json.loads(right.attrs["evidence"])
    assert abs(found["chi_square"] - 1) < 0.45
    assert main([*line, "out=wrong.nc", "network.student_t=4"]) == 2
    assert "either correlated" in capsys.readouterr().err


# Nonlinear operators


@pytest.mark.parametrize("function", ["abs", "square"])
def test_functions_of_variables_are_observed_and_linearised(checkpoint, function):
    times = to_datetime(3600.0 * np.arange(3))
    fields = torch.randn(3, 1, 1, CELLS, dtype=torch.float64) + 1
    table = observe(fields, checkpoint.spec, times, [FullState(1e-6, function=function)], 0)
    assert set(table["variable"]) == {f"{function}(u)"}
    expected = {"abs": torch.abs, "square": torch.square}[function](fields[:, 0, 0])
    np.testing.assert_allclose(table["observation"].to_numpy().reshape(3, CELLS), expected, atol=1e-5)
    observation, _ = build_observation(table, checkpoint.spec, times)
    assert not observation.operator.linear
    prior = Prior(checkpoint, LatentDiffusion(checkpoint, MomentMatching(), DPMSolverPP2M(4)).period(times), 2, 4)
    latent = prior.observe(later(observation, prior.period.before))
    z = torch.randn(2, *prior.shape, generator=torch.Generator().manual_seed(0))
    linear, covariance = latent.operator.linearise(z), ModeCovariance(prior)
    a = 1e-3 * torch.randn(2, prior.shape[0], CELLS, generator=torch.Generator().manual_seed(1))
    derivative = latent.operator.predict(z + covariance.expand(a)) - latent.operator.predict(z)
    assert (linear.forward(a) - derivative).norm() < 0.02 * derivative.norm()
    with pytest.raises(appa_lite.UserError, match="expected abs"):
        FullState(1.0, function="sign")


# Economies


def test_decoding_less_often_changes_nothing_where_the_decoder_is_linear(checkpoint):
    _, table = twin(6, 5)
    times = np.unique(table["time"].to_numpy())
    observation, _ = build_observation(table, checkpoint.spec, times)
    sampler = DPMSolverPP2M(8, 100.0, 0.01)
    samples = [
        LatentDiffusion(checkpoint, MomentMatching(tolerance=1e-5, decode_factor=f), sampler, 2, 4).assimilate(
            observation, times, range(2), seed=1
        )
        for f in (1.0, 10.0)
    ]
    torch.testing.assert_close(*samples, atol=1e-2, rtol=0)
