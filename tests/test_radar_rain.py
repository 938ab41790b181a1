"""Radar rain: the conversion of MeteoNet's sample, and the experiment from files to scores at size=debug.

tests/data/radar_rain.nc holds what launch/radar_rain.py makes of the afternoon of 28 August 2016 (two domains of twelve frames):
Météo-France, MeteoNet, Etalab Open Licence 2.0.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from appa_lite.cli import main

ROOT = Path(__file__).parents[1]
EXTRACT = ROOT / "tests" / "data" / "radar_rain.nc"
DATA = ROOT.parent / "shared" / "data" / "rain"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def convert():
    return script("radar_rain")


@pytest.fixture(scope="module")
def report():
    return script("radar_rain_report")


def records(path: Path) -> pd.DataFrame:
    return pd.DataFrame(json.loads(path.read_text()))


# Conversion


@pytest.mark.skipif(not (DATA / "rainfall_SE_2016_08.3.npz").exists(), reason="the radar files of shared/data/rain are not here")
def test_the_sample_as_zarr(convert, tmp_path):
    made = convert.convert(DATA, tmp_path)
    assert [len(one["time"]) for one in made.values()] == [15, 12, 12, 5, 8]
    assert made["train"]["time"].values[-1] < min(made[name]["time"].values[0] for name in ("validation", "afternoon", "night"))
    written = xr.open_zarr(tmp_path / "afternoon.zarr")
    with xr.open_dataset(EXTRACT) as extract:
        xr.testing.assert_identical(written["rain"].load(), extract["rain"].load())
    assert written["rain"].attrs["units"] == "mm h-1" and "Météo-France" in written.attrs["source"]
    assert all(np.isfinite(one["rain"]).all() for name, one in made.items() if name != "night_truth")
    night, truth = made["night"]["rain"].values, made["night_truth"]["rain"].values
    np.testing.assert_array_equal(truth[:, :5], night)
    raw = np.load(DATA / "rainfall_SE_2016_08.3.npz", allow_pickle=True)["data"][37, ::-1]
    row, column = (int(made["night"][name][0]) for name in ("row", "column"))
    first = raw[2 * row : 2 * row + 128, 3 * column : 3 * column + 192].reshape(64, 2, 64, 3).mean((1, 3)) * 0.12
    np.testing.assert_allclose(night[0, 0], first, rtol=1e-5, atol=1e-6)


def test_runs_end_at_gaps(convert):
    minutes = np.array([0, 5, 10, 20, 25, 60])
    dates = np.datetime64("2016-08-28", "ns") + minutes * np.timedelta64(1, "m")
    assert convert.runs(dates) == [slice(0, 3), slice(3, 5), slice(5, 6)]


def test_domains_are_chosen_by_their_first_frame_and_never_lack_a_cell(convert):
    rain = np.zeros((3, 200, 200), np.float32)
    rain[0, 20:40, 20:40] = 1.0
    rain[1:, 120:180, 20:80] = 50.0  # comes later: not chosen for it
    rain[2, 10, 10] = np.nan
    found = convert.disjoint(rain)
    assert len(found) == 1 and np.isfinite(convert.domains(rain, found)).all()
    ((row, column),) = found
    assert row <= 20 <= 40 <= row + 64 and column <= 20 <= 40 <= column + 64 and max(row, column) > 10
    assert convert.every(rain) and set(convert.every(rain)) <= {(r, c) for r in range(0, 48, 16) for c in range(0, 48, 16)}


def test_orientations_are_the_eight_symmetries_of_a_square(convert):
    field = np.arange(64 * 64, dtype=np.float32).reshape(1, 1, 64, 64)
    turned = convert.orientations(field)
    assert len({one.tobytes() for one in turned}) == 8
    assert all(np.array_equal(np.sort(one.ravel()), field.ravel()) for one in turned)


# From files to scores


def test_nowcasts(report, tmp_path):
    common = ["experiment=radar_rain", "size=debug"]
    train = [*common, f"data={EXTRACT}", f"validation={EXTRACT}", "device=cpu"]
    space, model = tmp_path / "autoencoder" / "model", tmp_path / "denoiser" / "model"
    assert main(["train", *train, "trainable=autoencoder", f"run={space.parent}"]) == 0
    assert main(["train", *train, "trainable=denoiser", f"autoencoder={space}", f"run={model.parent}"]) == 0
    start = [f"initial={EXTRACT}", "trajectory=0", "initial_time=[2016-08-28T13:10,2016-08-28T13:20]", "lead=15min"]
    ours, drifted = tmp_path / "afternoon0.nc", tmp_path / "afternoon0_advection.nc"
    assert main(["forecast", *common, f"checkpoint={model}", *start, "sampler.steps=4", f"out={ours}"]) == 0
    assert main(["forecast", *common, "forecaster=advection", *start, "members=1", f"out={drifted}"]) == 0
    verify = [f"forecast={ours}", "name=latent_diffusion", f"baselines={{advection: {drifted}}}", f"truth={EXTRACT}", "trajectory=0"]
    table = tmp_path / "scores" / "afternoon0.json"
    assert main(["verify", *common, *verify, f"checkpoint={model}", "verification=quick", f"out={table}"]) == 0
    with xr.open_dataset(ours) as forecast:
        assert dict(forecast.sizes)["number"] == 2 and float(forecast["rain"].min()) >= 0
    scores = report.pooled({"afternoon0": records(table)}).set_index(["metric", "system", "lead_time"])["value"]
    assert report.nowcast_picture(xr.open_dataset(EXTRACT)["rain"][0], {"advection": xr.open_dataset(drifted)["rain"][0, :, 0]}).axes
    law = {"afternoon": xr.open_dataset(EXTRACT)["rain"].values, "model": report.drawn(model, 2, "size=debug", "sampler.steps=4")}
    assert law["model"].shape == (2, 8, 64, 64) and len(report.law(law)) == 2 * 9 and len(report.law_picture(law).axes) == 2
    for lead in (300.0, 600.0, 900.0):
        assert scores["rmse", "advection", lead] < 0.8 * scores["rmse", "persistence", lead]  # real rain drifts
        assert scores["crps_fair", "advection", lead] == pytest.approx(scores["mae", "advection", lead])
        assert scores["spread_skill", "latent_diffusion", lead] > 0


def test_pooling_is_the_score_of_all_cases_together(report):
    """Squared errors and variances are averaged as such: two domains of one case each, beside both at once."""
    error, variance = np.array([1.0, 3.0]), np.array([4.0, 2.0])
    rows = [
        {"system": "advection", "variable": "rain", "lead_time": 300.0, "count": 7, "metric": metric, "value": value}
        for e, v in zip(error, variance, strict=True)
        for metric, value in {"rmse": e, "spread": v**0.5, "spread_skill": (v / e**2) ** 0.5, "mae": e}.items()
    ]
    found = report.pooled({"night0": pd.DataFrame(rows[:4]), "night1": pd.DataFrame(rows[4:])}).set_index("metric")
    assert found.loc["rmse", "value"] == pytest.approx(5**0.5) and found.loc["mae", "value"] == 2.0
    assert found.loc["spread_skill", "value"] == pytest.approx((variance.mean() / 5) ** 0.5)
    assert (found["count"] == 14).all() and found.loc["mae", ["low", "high"]].tolist() == [1.0, 3.0]


def test_domains_with_a_maximum_above_a_level_come_with_an_exact_interval(report):
    rain = np.zeros((10, 1, 4, 4))
    rain[:3, 0, 0, 0] = 7.0
    found = report.law({"night": rain}).query("quantity == 'maximum above'").set_index("level")
    assert found.loc[5.0, "value"] == 0.3 and found.loc[20.0, ["value", "low"]].tolist() == [0.0, 0.0]
    assert found.loc[5.0, "low"] == pytest.approx(0.0873, abs=1e-4) and found.loc[5.0, "high"] == pytest.approx(0.6066, abs=1e-4)
    assert found.loc[20.0, "high"] == pytest.approx(1 - 0.05**0.1)


@pytest.mark.skipif(not (DATA / "data_Radar_grid_cell_vals.csv").exists(), reason="the Amsterdam series of shared/data/rain is not here")
def test_return_levels_of_amsterdam_admit_what_two_years_say(report):
    found = report.amsterdam(DATA / "data_Radar_grid_cell_vals.csv")
    levels = found[(found["system"] == "25 months") & (found["quantity"] == "return_level")].set_index("period")
    assert (levels["low"] < levels["value"]).all() and (levels["value"] < levels["high"]).all()
    widths = (levels["high"] - levels["low"]) / levels["value"]
    assert widths.is_monotonic_increasing and 10 < levels.loc[8766, "value"] < 14
    assert (found["system"] == "difference").sum() == 1 + len(report.HOURS)
