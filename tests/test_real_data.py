"""The real-data experiments from files to scores at size=debug; skipped where the data are not."""

import json
from pathlib import Path

import pandas as pd
import pytest
import xarray as xr

from appa_lite.cli import main

DATA = Path(__file__).parents[2] / "shared" / "data"
WFDE5 = DATA / "wfde5_hourly_2017-01_british_isles.nc"
STATIONS = DATA / "met_eireann_hourly_2017-01_19stations.parquet"
NCEP = DATA / "ncep_slp_daily_2001-2010_north_atlantic.nc"
FEW = ["sampler.steps=4", "members=3"]


def run(command: str, *arguments: object) -> None:
    assert main([command, *map(str, arguments), "size=debug"]) == 0


def records(path: Path) -> pd.DataFrame:
    return pd.DataFrame(json.loads(path.read_text()))


@pytest.mark.skipif(not (WFDE5.exists() and STATIONS.exists()), reason="the WFDE5 and Met Eireann files of shared/data are not here")
def test_wfde5(tmp_path, capsys):
    train = ["experiment=wfde5", f"data={WFDE5}", "period=[2017-01-18,2017-01-21]", "device=cpu"]
    run("train", *train, "trainable=identity", f"run={tmp_path / 'identity'}")
    run("train", *train, "trainable=denoiser", f"autoencoder={tmp_path / 'identity/model'}", f"run={tmp_path / 'denoiser'}")
    model, table = tmp_path / "denoiser/model", tmp_path / "stations.parquet"
    run("calibrate", "experiment=wfde5", f"observations={STATIONS}", f"truth={WFDE5}", f"out={table}")
    assert "Qair" in capsys.readouterr().out
    corrected = pd.read_parquet(table)
    bias = corrected[corrected["variable"] == "Tair"].groupby("station")["bias"].mean()
    assert bias["FINNER"] > 1.0 > bias["KNOCK AIRPORT"]  # a low coast and the highest of the stations
    assert (corrected["error_std"] > 0).all() and set(corrected["variable"]) == {"Tair", "Qair", "Wind"}
    period = ["start=2017-01-25", "end=2017-01-25T12:00"]
    given = ["experiment=wfde5", f"checkpoint={model}", f"observations={table}", "device=cpu", *period, *FEW]
    for name in ("latent_diffusion", "optimal_interpolation"):
        run("reanalysis", *given, f"forecaster={name}", f"out={tmp_path / name}.nc")
    run(
        "verify", "experiment=wfde5", f"forecast={tmp_path / 'latent_diffusion.nc'}", f"observations={table}", f"kriging={table}",
        f"baselines={{optimal_interpolation: {tmp_path / 'optimal_interpolation.nc'}}}", f"checkpoint={model}",
        "verification=quick", f"out={tmp_path / 'scores.json'}",
    )  # fmt: skip
    scores = records(tmp_path / "scores.json")
    rmse = scores[(scores["metric"] == "rmse") & (scores["variable"] == "Tair")].set_index("system")["value"]
    assert set(rmse.index) == {"latent_diffusion", "optimal_interpolation", "kriging", "climatology"}
    assert rmse["optimal_interpolation"] < rmse["climatology"]
    assert scores["count"].max() <= 5 * 13


@pytest.mark.skipif(not NCEP.exists(), reason="the NCEP file of shared/data is not here")
def test_ncep_slp(tmp_path):
    train = ["experiment=ncep_slp", f"data={NCEP}", "period=[2001-01-01,2002-06-30]", "device=cpu"]
    train.append("validation_period=[2009-01-01,2009-02-28]")
    run("train", *train, "trainable=identity", f"run={tmp_path / 'identity'}")
    run("train", *train, "trainable=denoiser", f"autoencoder={tmp_path / 'identity/model'}", f"run={tmp_path / 'denoiser'}")
    model, table = tmp_path / "denoiser/model", tmp_path / "observations.parquet"
    run("observe", "experiment=ncep_slp", f"truth={NCEP}", "start=2010-01-11", "end=2010-01-20", f"out={table}")
    assert len(pd.read_parquet(table)) == 10 * 11
    run("reanalysis", "experiment=ncep_slp", f"checkpoint={model}", f"observations={table}", "device=cpu", *FEW, f"out={tmp_path / 'a.nc'}")
    run(
        "verify",
        "experiment=ncep_slp",
        f"forecast={tmp_path / 'a.nc'}",
        f"truth={NCEP}",
        "verification=quick",
        f"out={tmp_path / 'a.json'}",
    )
    run(
        "forecast", "experiment=ncep_slp", f"checkpoint={model}", f"initial={NCEP}", "initial_time=[2010-02-01,2010-03-01]", "lead=2d",
        "device=cpu", *FEW, f"out={tmp_path / 'f.nc'}",
    )  # fmt: skip
    with xr.open_dataset(tmp_path / "f.nc", engine="netcdf4") as forecast:
        assert forecast["msl"].dims[:3] == ("time", "prediction_timedelta", "number") and forecast["msl"].shape[:3] == (2, 3, 3)
    run(
        "verify",
        "experiment=ncep_slp",
        f"forecast={tmp_path / 'f.nc'}",
        f"truth={NCEP}",
        "verification=quick",
        f"out={tmp_path / 'f.json'}",
    )
    assert {"f", "persistence"} <= set(records(tmp_path / "f.json")["system"])
