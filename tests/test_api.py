"""The library in a few lines: tables and datasets in, xarray datasets out, the same as the commands."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import appa_lite
from appa_lite.cli import main
from appa_lite.core.fields import FieldSpec, Grid, Variable
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer

FAST = ("sampler.steps=4",)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Gaussian prior on disk, and a table of observations beside it."""
    directory = tmp_path_factory.mktemp("api")
    spec = FieldSpec((Variable("u"),), Grid(("x",), (0.0,), tuple(map(float, range(8))), (False, True)), 3600.0)
    denoiser = LatentDenoiser(spec.shape, 4, width=8, depth=1, heads=1, modes=8, lags=8)
    denoiser.covariance.basis.copy_(torch.eye(8))
    denoiser.covariance.autocovariance.copy_((0.9 ** torch.arange(8.0)).expand(8, 8))
    Checkpoint(spec, Normalizer(spec.shape), IdentityAutoencoder(spec.shape), denoiser, {"phase": 0.0}).save(directory / "model")
    times = np.datetime64("2020-01-01", "ns") + np.arange(6) * np.timedelta64(1, "h")
    table = pd.DataFrame({"time": times, "x": np.arange(6.0), "variable": "u", "observation": 1.0, "error_std": 0.1})
    table.to_parquet(directory / "obs.parquet")
    return directory


def test_reanalysis_and_forecast_return_datasets(model):
    prior = appa_lite.load(model / "model")
    analysis = prior.reanalysis(model / "obs.parquet", *FAST, members=3, seed=1)
    assert isinstance(analysis, xr.Dataset) and dict(analysis.sizes) == {"time": 6, "number": 3, "x": 8}
    again = prior.reanalysis(pd.read_parquet(model / "obs.parquet"), *FAST, members=3, seed=1)
    assert np.allclose(analysis["u"], again["u"])
    forecast = prior.forecast(analysis, *FAST, lead="3h", seed=1)
    assert forecast["u"].dims == ("time", "prediction_timedelta", "number", "x") and forecast.sizes["number"] == 3
    assert np.allclose(forecast["u"].isel(time=0, prediction_timedelta=0), analysis["u"].isel(time=-1))


def test_the_command_writes_what_the_library_returns(model, tmp_path):
    arguments = ["reanalysis", f"checkpoint={model / 'model'}", f"observations={model / 'obs.parquet'}", f"out={tmp_path / 'a.nc'}"]
    assert main([*arguments, "members=2", "seed=4", *FAST]) == 0
    written = appa_lite.open_dataset(tmp_path / "a.nc")
    returned = appa_lite.load(model / "model").reanalysis(model / "obs.parquet", *FAST, members=2, seed=4)
    assert np.allclose(written["u"], returned["u"], atol=1e-6)


def test_a_missing_model_is_one_line():
    with pytest.raises(appa_lite.UserError, match="no model at"):
        appa_lite.load("nowhere")
