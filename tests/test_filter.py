"""Analyses in time order: the Kalman filter where the prior is Gaussian, nothing from the future, and a run cut in two is one run."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import appa_lite
from appa_lite.cli import main
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.models.autoencoder import SpatiotemporalAutoencoder
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer

CELLS, WINDOW, STEP, PHI, SCALE, OFFSET, ERROR = 12, 8, 3600.0, 0.9, 2.0, 5.0, 0.4
LINEAR = "forecaster=optimal_interpolation"
HOUR = np.timedelta64(3600, "s")
BEGIN = np.datetime64("2020-01-01", "ns")


def spatial() -> np.ndarray:
    """A homogeneous covariance on the ring, of variance one and a length of two cells."""
    power = np.exp(-((np.fft.fftfreq(CELLS) * CELLS / 2) ** 2)) + 1e-3
    row = np.fft.ifft(power).real / np.fft.ifft(power).real[0]
    return row[(np.arange(CELLS)[:, None] - np.arange(CELLS)[None]) % CELLS]


def gaussian(directory) -> None:
    """A model whose law is known: AR(1) in time, a ring in space, normalised by hand."""
    spec = FieldSpec((Variable("u"),), Grid(("x",), (0.0,), tuple(map(float, range(CELLS))), (False, True)), STEP)
    values, vectors = np.linalg.eigh(spatial())
    normalizer = Normalizer(spec.shape)
    normalizer.scale.fill_(SCALE)
    normalizer.coefficients.fill_(OFFSET)
    denoiser = LatentDenoiser(spec.shape, WINDOW, width=8, depth=1, heads=1, modes=CELLS, lags=200)
    denoiser.covariance.basis.copy_(torch.from_numpy(vectors))
    denoiser.covariance.autocovariance.copy_(torch.from_numpy(values[:, None] * PHI ** np.arange(200.0)))
    denoiser.covariance.remainder.zero_()
    Checkpoint(spec, normalizer, IdentityAutoencoder(spec.shape), denoiser, {"phase": 0.0}).save(directory)


def twin(frames: int, per_frame: int, seed: int = 0, error: float = ERROR, phi: float = PHI) -> tuple[np.ndarray, pd.DataFrame]:
    """A truth (T, X) of that law and a table of observations of it, on frames and cells."""
    rng = np.random.default_rng(seed)
    x, root = np.zeros((frames, CELLS)), np.linalg.cholesky(spatial())
    x[0] = root @ rng.standard_normal(CELLS)
    for t in range(1, frames):
        x[t] = phi * x[t - 1] + np.sqrt(1 - phi**2) * root @ rng.standard_normal(CELLS)
    x = OFFSET + SCALE * x
    where = np.stack([rng.choice(CELLS, per_frame, replace=False) for _ in range(frames)])
    values = np.take_along_axis(x, where, 1) + error * rng.standard_normal(where.shape)
    time = np.repeat(BEGIN + np.arange(frames) * HOUR, per_frame)
    table = pd.DataFrame({"time": time, "x": where.ravel().astype(float), "variable": "u", "observation": values.ravel()})
    return x, table.assign(error_std=error)


def kalman(table: pd.DataFrame, frames: int, lag: int = 0, window: int = 1000, phi: float = PHI) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (T, X) given the rows of the ``window`` frames up to each one and ``lag`` after, from dense matrices."""
    lags = np.abs(np.arange(frames)[:, None] - np.arange(frames)[None])
    prior = SCALE**2 * np.kron(phi**lags, spatial())
    hour = ((table["time"].to_numpy() - BEGIN) // HOUR).astype(int)
    cell, y = hour * CELLS + table["x"].to_numpy().astype(int), table["observation"].to_numpy() - OFFSET
    means, stds = [], []
    for t in range(frames):
        seen, here = (hour <= t + lag) & (hour > t - window), slice(t * CELLS, (t + 1) * CELLS)
        rows = cell[seen]
        gain = np.linalg.solve(prior[np.ix_(rows, rows)] + ERROR**2 * np.eye(len(rows)), prior[rows, here]).T
        means.append(OFFSET + gain @ y[seen])
        stds.append(np.sqrt(np.diag(prior[here, here] - gain @ prior[rows, here])))
    return np.array(means), np.array(stds)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    here = tmp_path_factory.mktemp("filter")
    gaussian(here / "model")
    return here


@pytest.fixture(scope="module")
def model(directory):
    return appa_lite.load(directory / "model")


def compare(analysis: xr.Dataset, mean: np.ndarray, std: np.ndarray) -> tuple[float, float]:
    """Error of the mean in posterior standard deviations, the members' sampling error taken off, and the ratio of spreads."""
    sample = analysis["u"].values.astype(float)
    error = (((sample.mean(1) - mean) / std) ** 2).mean() - 1 / sample.shape[1]
    return float(np.sqrt(max(error, 0.0))), float(np.sqrt((sample.var(1, ddof=1) / std**2).mean()))


# Theorems


def test_a_filter_is_the_kalman_filter(model):
    _, table = twin(20, 3)
    mean, std = (a[::2] for a in kalman(table, 20))
    error, spread = compare(model.filter(table, LINEAR, "window=20", "every=2h", members=200), mean, std)
    assert error < 0.05 and abs(spread - 1) < 0.03
    short = model.filter(table, LINEAR, "window=4", "every=2h", members=200)
    error, spread = compare(short, *(a[::2] for a in kalman(table, 20, window=4)))
    assert error < 0.05 and abs(spread - 1) < 0.03


@pytest.mark.parametrize(
    ("phi", "costs"),
    [(0.9, {4: (0.23, 1.032), 8: (0.06, 1.003), 22: (0.006, 1.0)}), (0.98, {4: (0.61, 1.201), 8: (0.28, 1.035), 22: (0.045, 1.002)})],
)
def test_what_a_window_forgets(phi, costs):
    """The table of docs/posterior.md, in closed form: 3 of 12 cells observed, {frames of the window: (error, spread)}."""
    _, table = twin(60, 3, phi=phi)
    mean, std = kalman(table, 60, phi=phi)
    for window, (error, spread) in costs.items():
        m, s = kalman(table, 60, window=window, phi=phi)
        late = slice(30, None)
        assert np.sqrt((((m - mean) / std)[late] ** 2).mean()) == pytest.approx(error, abs=0.006)
        assert np.sqrt(((s / std)[late] ** 2).mean()) == pytest.approx(spread, abs=0.002)


def test_the_diffusion_model_filters_too(model):
    _, table = twin(12, 3)
    mean, std = kalman(table, 12)
    fast = ("sampler.steps=16", "sampler.eta=0.0", "sampler.sigma_max=100", "guidance.tolerance=1e-3", "batch=100")
    analysis = model.filter(table, *fast, "window=12", "start=2020-01-01T11:00", members=100)
    error, spread = compare(analysis, mean[11:], std[11:])
    assert error < 0.1 and abs(spread - 1) < 0.06


def test_a_lag_smooths(model):
    _, table = twin(12, 3)
    mean, std = (a[::2] for a in kalman(table, 12, lag=3))
    error, spread = compare(model.filter(table, LINEAR, "window=12", "lag=3h", "every=2h", members=200), mean, std)
    assert error < 0.06 and abs(spread - 1) < 0.03


@pytest.mark.parametrize("choices", [(LINEAR,), ("sampler.steps=4",), (LINEAR, "lag=2h"), (LINEAR, "gross_error_probability=0.05")])
def test_the_future_changes_nothing(model, choices):
    _, table = twin(8, 3)
    table.loc[table.index[-3:], "time"] += np.timedelta64(10, "m")  # between frames
    later = table["time"] > BEGIN + 5 * HOUR
    changed = table.assign(observation=table["observation"].where(~later, 99.0))
    lag = 2 if "lag=2h" in choices else 0
    full, without, other = (
        model.filter(t, *choices, "window=4", "end=2020-01-01T07:00", members=3)["u"] for t in (table, table[~later], changed)
    )
    kept = slice(None, 6 - lag)
    np.testing.assert_array_equal(full[kept].values, without[kept].values)
    np.testing.assert_array_equal(full[kept].values, other[kept].values)
    assert (full[7] != other[7]).any()


def test_rows_between_frames_wait_for_the_next(model):
    """With times taken as those of the nearest frame, a row ten minutes late is still not seen by the analysis before it."""
    _, table = twin(6, 3)
    late = table.copy()
    late.loc[late.index[-3:], "time"] += np.timedelta64(10, "m")
    near = (LINEAR, "+network.time_interpolation=nearest", "end=2020-01-01T05:00", "window=6")
    a, b = (model.filter(t, *near, members=3)["u"].values for t in (table[:-3], late))
    np.testing.assert_array_equal(a, b)


# One run or several


def records_equal(a: xr.Dataset, b: xr.Dataset) -> None:
    for ours, theirs in zip(json.loads(a.attrs["evidence"]), json.loads(b.attrs["evidence"]), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value == (pytest.approx(theirs[key], rel=1e-3) if isinstance(value, float) else theirs[key]), key


def check_same(a: xr.Dataset, b: xr.Dataset) -> None:
    assert a.indexes["time"].equals(b.indexes["time"])
    np.testing.assert_allclose(a["u"].values, b["u"].values, atol=1e-4)
    np.testing.assert_array_equal(a["observation_digest"].values, b["observation_digest"].values)
    records_equal(a, b)


CHOICES = ("sampler.steps=4", "window=4", "withhold=20%")


def test_a_run_that_goes_on_is_one_run(model, caplog):
    """Whole hours arrive in two files; then a row comes late, rows come twice, and all of them in another order."""
    _, table = twin(10, 3)
    whole = model.filter(table, *CHOICES, members=3)
    first = model.filter(table[:15], *CHOICES, members=3)
    assert first.sizes["time"] == 5
    check_same(model.filter(table, *CHOICES, members=3, previous=first), whole)
    late = model.filter(table.drop(index=10), *CHOICES, members=3)
    assert abs(late["u"] - whole["u"]).values[3:7].max() > 1e-3
    twice = pd.concat([table, table[4:9]]).sample(frac=1, random_state=0)
    with caplog.at_level("WARNING"):
        again = model.filter(twice, *CHOICES, members=3, previous=late)
    check_same(again, whole)
    assert "are made again" in caplog.text
    assert json.loads(again.attrs["observation_counts"])["duplicate"] == 5
    np.testing.assert_array_equal(again["u"].values[:3], late["u"].values[:3])  # taken over


def test_an_analysis_does_not_depend_on_the_others(model):
    _, table = twin(8, 3)
    every = model.filter(table, *CHOICES, members=4)["u"]
    one = model.filter(table, *CHOICES, "start=2020-01-01T06:00", "end=2020-01-01T06:00", members=2)["u"]
    np.testing.assert_allclose(one.values[0], every.values[6, :2], atol=1e-4)
    thinned = model.filter(table, *CHOICES, "every=3h", members=4)["u"]
    np.testing.assert_allclose(thinned.values, every.values[::3], atol=1e-4)


def test_what_cannot_go_on_is_refused(model, tmp_path):
    _, table = twin(8, 3)
    first = model.filter(table[:15], *CHOICES, members=3)
    refusals = [
        (table[9:], CHOICES, "saw .* rows, these files hold .* earlier rows"),
        (table, ("sampler.steps=5", *CHOICES[1:]), "made with sampler="),
        (table, (*CHOICES[:2], "withhold=10%"), "made with withhold=20%, this run has 10%"),
        (table, (*CHOICES, "lag=1h"), "made with lag=0d, this run has 1h"),
    ]
    for rows, choices, message in refusals:
        with pytest.raises(appa_lite.UserError, match=message):
            model.filter(rows, *choices, members=3, previous=first)
    with pytest.raises(appa_lite.UserError, match="not written by filter"):
        model.filter(table, *CHOICES, members=3, previous=model.reanalysis(table, LINEAR, members=3))
    for choice, message in {
        "every=90min": "whole number",
        "window=0": "at least 1",
        "lag=soon": "lag=soon",
        "withhold=2": "below 100%",
    }.items():
        with pytest.raises(appa_lite.UserError, match=message):
            model.filter(table, LINEAR, choice, members=2)
    gaussian(tmp_path / "other")
    weights = tmp_path / "other" / "normalizer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(appa_lite.UserError, match="another model"):
        appa_lite.load(tmp_path / "other").filter(table, *CHOICES, members=3, previous=first)


def test_a_gap_is_filled_by_the_prior(model):
    _, table = twin(12, 6)
    analysis = model.filter(table[(table["time"] < BEGIN + 2 * HOUR) | (table["time"] > BEGIN + 9 * HOUR)], LINEAR, "window=4", members=200)
    spread = analysis["u"].std("number").mean("x").values
    assert abs(spread[7] / SCALE - 1) < 0.1 and spread[1] < 0.6 * SCALE
    assert analysis["observation_count"].values[7] == 0


def test_an_autoencoder_that_compresses_time(tmp_path):
    """Two frames in one latent frame: analyses fall on either, and neither sees the other's future."""
    spec = FieldSpec((Variable("u"),), Grid(("x",), (0.0,), tuple(map(float, range(CELLS))), (False, True)), STEP)
    autoencoder = SpatiotemporalAutoencoder(spec.shape, (2, 1, 4), channels=4, width=8, depth=1, periodic=(False, True))
    denoiser = LatentDenoiser(autoencoder.latent_shape, 4, width=8, depth=1, heads=1, modes=12, lags=8)
    denoiser.covariance.basis.copy_(torch.eye(12))
    denoiser.covariance.autocovariance.copy_((0.9 ** torch.arange(8.0)).expand(12, 8))
    Checkpoint(spec, Normalizer(spec.shape), autoencoder, denoiser, {"phase": 0.0}).save(tmp_path / "model")
    model = appa_lite.load(tmp_path / "model")
    _, table = twin(7, 4)
    full = model.filter(table, "sampler.steps=3", members=2)
    assert full.sizes["time"] == 7
    for hours in (3, 4):
        part = model.filter(table[: 4 * (hours + 1)], "sampler.steps=3", members=2, previous=None)
        np.testing.assert_array_equal(part["u"].values, full["u"].values[: hours + 1])


# Files


def test_from_files_to_files(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x, table = twin(9, 4)
    table[:24].to_csv("one.csv", index=False)
    table[24:].to_parquet("two.parquet")
    command = [
        "filter",
        "experiment=lorenz96",
        "size=debug",
        f"checkpoint={directory / 'model'}",
        "sampler.steps=4",
        "members=3",
        "window=4",
    ]
    assert main([*command, "observations=one.csv", "out=first.nc", "withhold=20%"]) == 0
    assert "chi-square" in capsys.readouterr().out
    both = "observations=[one.csv,two.parquet]"
    assert main([*command, both, "out=next.zarr", "previous=first.nc", "withhold=20%"]) == 0
    assert "3 made, 6 of an earlier run" in capsys.readouterr().out
    assert main([*command, both, "out=whole.nc", "withhold=20%"]) == 0
    with appa_lite.open_dataset("next.zarr") as ours, appa_lite.open_dataset("whole.nc") as whole:
        check_same(ours.load(), whole.load())
        assert ours["u"].dims == ("time", "number", "x") and ours.attrs["seed"] == 0
        assert set(json.loads(ours.attrs["inputs"])) == {"one.csv", "two.parquet", "first.nc"}
    truth = xr.Dataset({"u": (("time", "x"), x)}, {"time": to_datetime(BEGIN.astype(float) / 1e9 + STEP * np.arange(9)), "x": range(CELLS)})
    truth.to_netcdf("truth.nc", engine="h5netcdf")
    for against in ("truth=truth.nc", "observations=one.csv"):
        assert main(["verify", "forecast=next.zarr", against, "out=scores.json", "verification=quick"]) == 0
    forecast = [
        "forecast",
        "experiment=lorenz96",
        "size=debug",
        f"checkpoint={directory / 'model'}",
        "sampler.steps=4",
        "initial=next.zarr",
    ]
    assert main([*forecast, "lead=3h", "history=1", "out=forecast.nc"]) == 0
    before = {p.name for p in tmp_path.iterdir()}
    assert main([*command, "observations=two.parquet", "out=bad.nc", "previous=first.nc", "start=2020-01-01", "withhold=20%"]) == 2
    assert "give the earlier rows too" in capsys.readouterr().err and {p.name for p in tmp_path.iterdir()} == before
