"""The main job from files to files, through the command line in this process, at size=debug; and how it refuses bad input."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from appa_lite import __version__, cli
from appa_lite.core.store import digest, open_dataset

RING = ("experiment=lorenz96", "size=debug")
OCEAN = ("experiment=ocean", "size=debug")


def run(directory: Path, *arguments: str) -> int:
    with contextlib.chdir(directory):
        return cli.main(list(arguments))


def command(directory: Path, *arguments: str) -> None:
    assert run(directory, *arguments) == 0, arguments


def load(path: Path) -> xr.Dataset:
    with open_dataset(path) as dataset:
        return dataset.load()


@pytest.fixture(scope="module")
def ring(tmp_path_factory) -> Path:
    """Lorenz-96, from nothing to a report."""
    here = tmp_path_factory.mktemp("ring")
    command(here, "simulate", *RING, "frames=60", "spinup=20", "out=train.zarr")
    command(here, "simulate", *RING, "trajectories=1", "frames=20", "spinup=20", "seed=7", "start=2010-01-01", "out=truth.zarr")
    command(here, "train", *RING, "trainable=identity", "data=train.zarr", "run=autoencoder")
    command(here, "train", *RING, "trainable=denoiser", "autoencoder=autoencoder/model", "data=train.zarr", "run=prior")
    command(here, "observe", *RING, "truth=truth.zarr", "end=2010-01-03", "out=observations.parquet")
    reanalysis = ("reanalysis", *RING, "checkpoint=prior/model", "observations=observations.parquet")
    command(here, *reanalysis, "sampler.steps=4", "out=reanalysis.zarr")
    command(here, *reanalysis, "forecaster=optimal_interpolation", "out=optimal_interpolation.nc")
    command(here, *FORECAST, "lead=2d", "out=forecast.nc")
    verify = ("verify", "checkpoint=prior/model", "verification=quick")
    baseline = "baselines={optimal_interpolation: optimal_interpolation.nc}"
    command(here, *verify, "forecast=reanalysis.zarr", "truth=truth.zarr", baseline, "out=scores_reanalysis.json")
    command(here, *verify, "forecast=reanalysis.zarr", "observations=observations.parquet", "out=scores_observations.csv")
    command(here, *verify, "forecast=forecast.nc", "truth=truth.zarr", "out=scores_forecast.json")
    command(here, "report", "run=.", "out=report.html")
    return here


FORECAST = ("forecast", *RING, "checkpoint=prior/model", "initial=reanalysis.zarr", "sampler.steps=4")
REANALYSIS = ("reanalysis", *RING, "checkpoint=prior/model", "observations=observations.parquet", "sampler.steps=4")


@pytest.fixture(scope="module")
def ocean(tmp_path_factory) -> Path:
    """The ocean, from rest: nothing is learned, everything runs."""
    here = tmp_path_factory.mktemp("ocean")
    simulate = ("simulate", *OCEAN, "trajectories=1", "spinup=0", "simulator.compiled=false", "simulator.frame_step=21600")
    command(here, *simulate, "frames=20", "out=truth.zarr")
    data = ("data=truth.zarr", "validation=truth.zarr")
    command(here, "train", *OCEAN, "trainable=autoencoder", *data, "window=2", "run=autoencoder")
    command(here, "train", *OCEAN, "trainable=denoiser", "autoencoder=autoencoder/model", *data, "run=prior")
    command(here, "observe", *OCEAN, "network=nadir_moorings", "truth=truth.zarr", "out=observations.nc")
    common = (*OCEAN, "checkpoint=prior/model", "sampler.steps=3")
    command(here, "reanalysis", *common, "observations=observations.nc", "out=reanalysis.nc")
    command(here, "forecast", *common, "initial=reanalysis.nc", "lead=36h", "out=forecast.zarr")
    return here


# Layouts


def check_layout(dataset: xr.Dataset, dims: tuple[str, ...], seed: int, command: str, inputs: dict[str, Path]) -> None:
    for name, variable in dataset.data_vars.items():
        assert variable.dims == dims, name
        assert variable.attrs["units"]
        assert np.isfinite(variable.values[..., 2:-2]).any()
    assert dataset["number"].attrs["standard_name"] == "realization"
    assert dataset["time"].attrs["standard_name"] == "time" and dataset["time"].dtype.kind == "M"
    assert dataset.attrs["seed"] == seed and dataset.attrs["appa_lite_version"] == __version__
    assert json.loads(dataset.attrs["configuration"])["command"] == command
    assert json.loads(dataset.attrs["inputs"]) == {name: digest(path) for name, path in inputs.items()}
    assert dataset.attrs["Conventions"].startswith("CF-")


def test_layout_of_a_ring(ring):
    analysis = load(ring / "reanalysis.zarr")
    check_layout(analysis, ("time", "number", "x"), 0, "reanalysis", {"observations.parquet": ring / "observations.parquet"})
    assert analysis.sizes == {"time": 12, "number": 2, "x": 40} and str(analysis.time.values[0])[:13] == "2010-01-01T00"
    linear = load(ring / "optimal_interpolation.nc")
    check_layout(linear, ("time", "number", "x"), 0, "reanalysis", {"observations.parquet": ring / "observations.parquet"})
    assert linear.indexes["time"].equals(analysis.indexes["time"])
    forecast = load(ring / "forecast.nc")
    check_layout(forecast, ("time", "prediction_timedelta", "number", "x"), 0, "forecast", {"reanalysis.zarr": ring / "reanalysis.zarr"})
    assert forecast.sizes == {"time": 1, "prediction_timedelta": 9, "number": 2, "x": 40}
    assert forecast.time.values[0] == analysis.time.values[-1]
    np.testing.assert_array_equal(forecast.prediction_timedelta.values / np.timedelta64(6, "h"), np.arange(9))
    np.testing.assert_allclose(forecast.u.values[0, 0], analysis.u.values[-1], rtol=1e-6)


def test_layout_of_the_ocean(ocean):
    analysis, forecast = load(ocean / "reanalysis.nc"), load(ocean / "forecast.zarr")
    check_layout(analysis, ("time", "number", "y", "x"), 0, "reanalysis", {"observations.nc": ocean / "observations.nc"})
    check_layout(forecast, ("time", "prediction_timedelta", "number", "y", "x"), 0, "forecast", {"reanalysis.nc": ocean / "reanalysis.nc"})
    assert {"eta1", "u1", "v1", "eta2", "u2", "v2", "ssh"} <= set(analysis.data_vars)
    assert forecast.sizes == {"time": 1, "prediction_timedelta": 7, "number": 2, "y": 64, "x": 64}
    truth = load(ocean / "truth.zarr")
    assert abs(analysis.eta1 - truth.eta1.isel(trajectory=0)).mean() < abs(analysis.eta1 - 100).mean()


def test_what_else_is_written(ring):
    scores = pd.DataFrame(json.loads((ring / "scores_reanalysis.json").read_text()))
    assert {"reanalysis", "optimal_interpolation", "climatology"} <= set(scores["system"])
    assert np.isfinite(scores["value"].astype(float)).any()
    assert {"system", "variable", "metric", "lead_time", "value", "low", "high", "count"} <= set(scores)
    assert "rmse" in set(pd.read_csv(ring / "scores_observations.csv")["metric"])
    forecast = pd.DataFrame(json.loads((ring / "scores_forecast.json").read_text()))
    assert forecast["lead_time"].nunique() == 9 and "persistence" in set(forecast["system"])
    assert (ring / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    for name in ("autoencoder", "prior"):
        assert {p.suffix for p in (ring / name / "model").rglob("*") if p.is_file()} <= {".json", ".safetensors", ".nc", ".md"}
        assert (ring / name / "model" / "climatology.nc").is_file()
    assert not list(ring.rglob(".*partial*"))


# Determinism


def test_the_same_seed_gives_the_same_files(ring, tmp_path):
    for words, name in ((REANALYSIS, "reanalysis.zarr"), ((*FORECAST, "lead=2d"), "forecast.nc")):
        command(ring, *words, f"out={tmp_path / name}")
        again, first = load(tmp_path / name), load(ring / name)
        xr.testing.assert_equal(again, first)
        again.attrs.pop("configuration"), first.attrs.pop("configuration")  # they hold the name of the output
        assert again.attrs == first.attrs
    command(ring, *REANALYSIS, "seed=1", f"out={tmp_path / 'other.nc'}")
    assert abs(load(tmp_path / "other.nc").u - load(ring / "reanalysis.zarr").u).max() > 0.01


def test_the_first_members_are_those_of_a_smaller_ensemble(ring, tmp_path):
    command(ring, *REANALYSIS, "members=5", "batch=3", f"out={tmp_path / 'reanalysis.nc'}")
    large, small = load(tmp_path / "reanalysis.nc").u, load(ring / "reanalysis.zarr").u
    np.testing.assert_allclose(large.values[:, :2], small.values, atol=1e-3 * float(small.std()))
    assert abs(large.values[:, 2] - large.values[:, 0]).max() > 0.01
    command(ring, *FORECAST, "lead=2d", "members=5", "batch=2", f"out={tmp_path / 'forecast.nc'}")
    large, small = load(tmp_path / "forecast.nc").u, load(ring / "forecast.nc").u
    np.testing.assert_allclose(large.values[:, :, :2], small.values, atol=1e-3 * float(small.std()))


def test_a_training_goes_on_where_it_stopped(ring, capsys):
    before = digest(ring / "prior" / "model" / "denoiser" / "diffusion_pytorch_model.safetensors")
    command(ring, "train", *RING, "trainable=denoiser", "autoencoder=autoencoder/model", "data=train.zarr", "run=prior")
    assert digest(ring / "prior" / "model" / "denoiser" / "diffusion_pytorch_model.safetensors") == before
    capsys.readouterr()
    refused(ring, capsys, ("train", *RING, "trainable=identity", "data=train.zarr", "run=prior", "resume=false"), "holds a training")


# Other conventions


def test_a_forecast_from_a_state_of_somebody_elses(ocean, tmp_path):
    """Axes the other way round and no attributes of ours: recognised, not misread."""
    own = load(ocean / "reanalysis.nc")
    other = own.drop_attrs(deep=False).isel(y=slice(None, None, -1)).transpose("number", "x", "y", "time")
    other.to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    words = ("forecast", *OCEAN, "checkpoint=prior/model", "sampler.steps=3", "lead=12h")
    command(ocean, *words, f"initial={tmp_path / 'other.nc'}", f"out={tmp_path / 'forecast.nc'}")
    np.testing.assert_allclose(load(tmp_path / "forecast.nc").u1, load(ocean / "forecast.zarr").u1[:, :3], atol=1e-5)


# Bad input


def refused(directory: Path, capsys, words: tuple[str, ...], *expected: str, out: str | None = None) -> None:
    """Exit status 2, one line that says ``expected``, and nothing new in the directory."""
    capsys.readouterr()
    before = {str(p) for p in directory.rglob("*")}
    words = (*words, f"out={out}") if out else words
    assert run(directory, *words) == 2, words
    _, error = capsys.readouterr()
    assert error.startswith("appa-lite: error: ") and error.count("\n") == 1, error
    for text in expected:
        assert text in error, error
    assert {str(p) for p in directory.rglob("*")} == before


@pytest.fixture
def bad(ring, tmp_path):
    """Writes a changed copy of the observations or the reanalysis, and returns its path."""

    def make(change, kind: str = "parquet") -> Path:
        path = tmp_path / f"bad.{kind}"
        if kind == "parquet":
            change(pd.read_parquet(ring / "observations.parquet")).to_parquet(path)
        else:
            change(load(ring / "reanalysis.zarr")).to_netcdf(path, engine="h5netcdf")
        return path

    return make


def test_mistakes_in_the_command(ring, capsys):
    refused(ring, capsys, ("simulate", "experiment=lorenz69", "size=debug"), "unknown experiment", "did you mean 'lorenz96'?", out="n.zarr")
    refused(ring, capsys, (*REANALYSIS, "memebrs=3"), "did you mean 'members'?", out="n.nc")
    refused(ring, capsys, (*REANALYSIS, "sampler.stpes=3"), "did you mean 'steps'?", out="n.nc")
    refused(ring, capsys, (*REANALYSIS, "members=0"), "at least 1", out="n.nc")
    refused(ring, capsys, (*REANALYSIS, "start=yesteryear"), "is not a date", out="n.nc")
    refused(ring, capsys, (*REANALYSIS, "start=2010-01-03", "end=2010-01-01"), "before start", out="n.nc")
    refused(ring, capsys, REANALYSIS, "ends in .zarr or .nc", out="n.txt")
    refused(ring, capsys, REANALYSIS, "needs out=")
    refused(ring, capsys, (*FORECAST, "lead=2d", "members=0"), "at least 1", out="n.nc")
    refused(ring, capsys, ("train", *RING, "trainable=denoiser", "data=train.zarr", "run=n"), "needs autoencoder=DIR")


@pytest.mark.parametrize("lead", ["soon", "-3d", "0h", "1min", "1e9d"])
def test_an_impossible_lead(ring, capsys, lead):
    refused(ring, capsys, (*FORECAST, f"lead={lead}"), f"lead={lead}", out="n.nc")


def test_an_impossible_initial_time(ring, capsys):
    refused(ring, capsys, (*FORECAST, "lead=1d", "initial_time=2011-01-01"), "is not a time of the initial file", out="n.nc")


def test_files_that_are_not_there(ring, capsys):
    refused(ring, capsys, (*REANALYSIS, "observations=nowhere.parquet"), "nowhere.parquet: no such file", out="n.nc")
    refused(ring, capsys, (*FORECAST, "lead=1d", "initial=nowhere.nc"), "there is no file nowhere.nc", out="n.nc")
    refused(ring, capsys, (*REANALYSIS, "checkpoint=nowhere"), "no model at 'nowhere'", out="n.nc")
    refused(ring, capsys, (*REANALYSIS, "checkpoint=autoencoder/model"), "train a model", out="n.nc")
    refused(ring, capsys, ("train", *RING, "trainable=identity", "data=nowhere.zarr", "run=n"), "there is no file nowhere.zarr")
    refused(ring, capsys, ("verify", "forecast=forecast.nc", "truth=nowhere.nc"), "there is no file nowhere.nc", out="n.json")
    refused(ring, capsys, ("observe", *RING, "truth=nowhere.zarr"), "there is no file nowhere.zarr", out="n.csv")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file(ring, capsys, tmp_path, share):
    whole = (ring / "forecast.nc").read_bytes()
    cut = tmp_path / "cut.nc"
    cut.write_bytes(whole[: int(share * len(whole))])
    refused(ring, capsys, (*FORECAST, "lead=1d", f"initial={cut}"), "make or copy it again", out="n.nc")
    refused(ring, capsys, ("train", *RING, "trainable=identity", f"data={cut}", "run=n"), "make or copy it again")
    refused(ring, capsys, ("verify", f"forecast={cut}", "truth=truth.zarr"), "make or copy it again", out="n.json")
    table = tmp_path / "cut.parquet"
    table.write_bytes((ring / "observations.parquet").read_bytes()[: int(share * 5000)])
    refused(ring, capsys, (*REANALYSIS, f"observations={table}"), "cannot be read", out="n.nc")


def test_wrong_units(ring, capsys, bad):
    table = bad(lambda t: t.assign(units="K"))
    refused(ring, capsys, (*REANALYSIS, f"observations={table}"), "wrong units", "'K'", "'1'", out="n.nc")

    def in_metres(dataset: xr.Dataset) -> xr.Dataset:
        dataset.u.attrs["units"] = "m"
        return dataset.drop_attrs(deep=False)

    refused(ring, capsys, (*FORECAST, "lead=1d", f"initial={bad(in_metres, 'nc')}"), "wrong units", "'m'", out="n.nc")


def test_observations_that_cannot_be_used(ring, capsys, bad):
    rows = len(pd.read_parquet(ring / "observations.parquet"))
    for change, reason in {
        "qc": (lambda t: t.assign(qc="9"), "flagged"),
        "time": (lambda t: t, "outside the period"),
        "x": (lambda t: t.assign(x=np.nan), "missing position or time"),
        "variable": (lambda t: t.assign(variable="temperature"), "unknown variable"),
        "error": (lambda t: t.assign(error_std=-1.0), "non-positive or missing error"),
        "value": (lambda t: t.assign(observation=np.nan), "missing value"),
    }.values():
        period = ("start=2012-01-01", "end=2012-01-05") if reason == "outside the period" else ()
        refused(ring, capsys, (*REANALYSIS, *period, f"observations={bad(change)}"), f"{rows} {reason}", out="n.nc")
    refused(ring, capsys, (*REANALYSIS, f"observations={bad(lambda t: t.iloc[:0])}"), "no time", out="n.nc")
    refused(ring, capsys, (*REANALYSIS, f"observations={bad(lambda t: t.drop(columns='x'))}"), "no column", out="n.nc")


def test_observations_outside_the_domain(ocean, capsys, tmp_path):
    words = ("reanalysis", *OCEAN, "checkpoint=prior/model", f"observations={tmp_path / 'far.csv'}")
    times = pd.date_range("2000-01-01", periods=4, freq="6h")
    table = pd.DataFrame({"time": times, "y": 1e8, "x": 1e5, "variable": "ssh", "value": 0.1, "error_std": 0.1})
    table.to_csv(tmp_path / "far.csv", index=False)
    refused(ocean, capsys, words, "4 outside the domain", out="n.nc")


def test_some_bad_rows_are_counted(ring, tmp_path, bad, capsys):
    table = bad(lambda t: t.assign(qc=["9"] * 3 + ["0"] * (len(t) - 3)))
    command(ring, *REANALYSIS, f"observations={table}", f"out={tmp_path / 'some.nc'}")
    assert "3 flagged" in capsys.readouterr().out
    assert json.loads(load(tmp_path / "some.nc").attrs["observation_counts"])["flagged"] == 3


def test_a_checkpoint_for_another_grid(ring, ocean, capsys, tmp_path):
    refused(ring, capsys, (*FORECAST, "lead=1d", f"initial={ocean / 'reanalysis.nc'}"), "unknown variable 'u'", out="n.nc")
    refused(ring, capsys, (*REANALYSIS, f"checkpoint={ocean / 'prior' / 'model'}"), "expected columns y, x", out="n.nc")
    short = load(ring / "reanalysis.zarr").isel(x=slice(0, 30))
    short.to_netcdf(tmp_path / "short.nc", engine="h5netcdf")
    refused(ring, capsys, (*FORECAST, "lead=1d", f"initial={tmp_path / 'short.nc'}"), "another grid", out="n.nc")
    moved = load(ring / "reanalysis.zarr").drop_attrs(deep=False)
    moved.assign_coords(x=moved.x + 3.0).to_netcdf(tmp_path / "moved.nc", engine="h5netcdf")
    refused(ring, capsys, (*FORECAST, "lead=1d", f"initial={tmp_path / 'moved.nc'}"), "elsewhere than the model's grid", out="n.nc")
    train = ("train", *RING, "trainable=denoiser", "autoencoder=autoencoder/model", "data=truth.zarr", "run=n")
    refused(ring, capsys, (*train, f"data={tmp_path / 'short.nc'}"), "another grid")


def test_missing_values_in_an_initial_state(ring, capsys, bad):
    def spoil(dataset: xr.Dataset) -> xr.Dataset:
        dataset.u[-1, 0, 5] = np.nan
        return dataset

    refused(ring, capsys, (*FORECAST, "lead=1d", f"initial={bad(spoil, 'nc')}"), "missing values (NaN)", out="n.nc")
    other = bad(lambda d: spoil(d).drop_attrs(deep=False), "nc")
    refused(ring, capsys, (*FORECAST, "lead=1d", f"initial={other}"), "values are missing", out="n.nc")


def test_models_that_do_not_fit_their_data(ring, capsys):
    train = ("train", *RING, "data=train.zarr", "run=n")
    refused(ring, capsys, (*train, "trainable=autoencoder", "trainable.stride=[2,1,7]"), "must be a multiple of the stride")
    refused(ring, capsys, (*train, "trainable=autoencoder", "window=90"), "longer than the data")
    prior = (*train, "trainable=denoiser", "autoencoder=autoencoder/model")
    refused(ring, capsys, (*prior, "window=7"), "window=7 is longer than the data")  # the last tenth is held out
    refused(ring, capsys, (*prior, "trainable.patch=[1,3]"), "not a multiple of the patch")


def test_an_interrupt_leaves_nothing_under_the_final_name(ring, capsys, monkeypatch):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    before = {p.name for p in ring.iterdir()}
    monkeypatch.setattr("appa_lite.stages.parallel.Bar.__enter__", interrupt)
    for words in (REANALYSIS, (*FORECAST, "lead=1d"), ("simulate", *RING)):
        assert run(ring, *words, "out=n.zarr") == 130
    left = {p.name for p in ring.iterdir()} - before
    assert all(name.startswith(".n.zarr.partial-") for name in left)  # pieces, for the same command to go on from
    for name in left:
        shutil.rmtree(ring / name)
