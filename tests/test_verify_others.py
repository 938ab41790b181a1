"""Forecasts that somebody else made, in the WeatherBench-X layout: against the library scores, in chunks, by the command line."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from appa_lite.cli import main
from appa_lite.data.open import open_fields
from appa_lite.training.data import climatology
from appa_lite.verification import cases
from appa_lite.verification.thresholds import climatological_quantiles
from appa_lite.verification.verify import Verification

T = 274.5
NAMES = {
    "ours": {},
    "weatherbench_x": {"time": "init_time", "prediction_timedelta": "lead_time"},
    "weatherbench_2": {"number": "number", "latitude": "lat", "longitude": "lon"},
    "ecmwf": {"time": "forecast_reference_time", "prediction_timedelta": "step", "number": "realization"},
}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(4)
    lat, lon = np.linspace(-60, 60, 7), np.arange(0, 360, 30.0)
    when = pd.date_range("2020-01-01", periods=20, freq="12h").to_numpy().astype("datetime64[ns]")
    lead = pd.to_timedelta([6, 12, 24], unit="h").to_numpy()
    axis = pd.date_range("2020-01-01", periods=60, freq="6h").to_numpy().astype("datetime64[ns]")
    truth = xr.Dataset(
        {"t2m": (("time", "latitude", "longitude"), 270 + 3 * rng.standard_normal((60, 7, 12)))},
        {"time": axis, "latitude": lat, "longitude": lon},
    )
    center = truth["t2m"].sel(time=xr.DataArray(when[:, None] + lead, dims=("time", "prediction_timedelta"))).values
    members = center[:, :, None] + 2 * rng.standard_normal((20, 3, 1, 7, 12)) + 2 * rng.standard_normal((20, 3, 6, 7, 12))
    forecast = xr.Dataset(
        {"t2m": (("time", "prediction_timedelta", "number", "latitude", "longitude"), members)},
        {"time": when, "prediction_timedelta": lead, "number": np.arange(6), "latitude": lat, "longitude": lon},
    )
    return forecast, truth


def write(dataset, path):
    dataset.to_zarr(path) if path.suffix == ".zarr" else dataset.to_netcdf(path, engine="h5netcdf")


def test_thresholds_are_stored_with_a_model_by_its_training(data, tmp_path, monkeypatch):
    """Those of the training data, pooled over cells, whatever was derived from them."""
    monkeypatch.chdir(tmp_path)
    forecast, truth = data
    training = truth.isel(time=slice(0, 30))
    dataset, spec = open_fields(training)
    stored = climatology(spec, spec.to_tensor(dataset)[None])
    expected = climatological_quantiles(training, per_cell=False)["t2m"]
    np.testing.assert_allclose(stored["t2m_quantile"].values, expected.values, rtol=1e-6)
    (tmp_path / "model").mkdir()
    write(stored, tmp_path / "model" / "climatology.nc")
    write(stored.drop_vars("t2m_quantile"), tmp_path / "old.nc")
    write(forecast, tmp_path / "forecast.nc")
    write(truth, tmp_path / "truth.nc")
    line = ["verify", "forecast=forecast.nc", "truth=truth.nc", "checkpoint=model", "out=s.csv", "verification=quick"]
    assert main([*line, "thresholds=model"]) == 0
    table = pd.read_csv("s.csv")
    events = table[(table["metric"] == "events_q95") & (table["lead_time"] == 21600) & (table["system"] == "forecast")]["value"].item()
    valid = forecast["time"] + forecast["prediction_timedelta"].isel(prediction_timedelta=0)
    assert events == int((truth["t2m"].sel(time=valid) > float(expected[0])).sum())
    (tmp_path / "model" / "climatology.nc").unlink()
    (tmp_path / "old.nc").rename(tmp_path / "model" / "climatology.nc")
    assert main([*line, "thresholds=model"]) == 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize(("names", "ending"), [("ours", ".nc"), ("weatherbench_x", ".zarr"), ("weatherbench_2", ".nc"), ("ecmwf", ".nc")])
def test_verify_agrees_with_scores_to_rounding(data, tmp_path, monkeypatch, names, ending):
    library = pytest.importorskip("scores")
    monkeypatch.chdir(tmp_path)
    forecast, truth = data
    theirs = forecast.isel(latitude=slice(None, None, -1)).rename(NAMES[names])
    write(theirs, tmp_path / f"forecast{ending}")
    write(truth, tmp_path / "truth.zarr")
    write(truth.isel(time=slice(0, 30)), tmp_path / "train.nc")
    (tmp_path / "thresholds.json").write_text(json.dumps({"t2m": {"0.95": T}}))
    files = [f"forecast=forecast{ending}", "truth=truth.zarr", "thresholds=thresholds.json", "out=scores.csv"]
    assert main(["verify", *files, "verification=quick", "name=theirs"]) == 0
    table = pd.read_csv(tmp_path / "scores.csv")
    table = table[table["system"] == "theirs"].set_index(["metric", "lead_time"])["value"]

    files[2:] = ["thresholds=train.nc", "out=again.csv"]
    assert main(["verify", *files, "verification=quick"]) == 0
    assert "brier_q95" in set(pd.read_csv(tmp_path / "again.csv")["metric"])

    valid = forecast["time"] + forecast["prediction_timedelta"]
    observed = truth["t2m"].sel(time=valid)  # (time, prediction_timedelta, latitude, longitude)
    weights, kept = np.cos(np.deg2rad(truth["latitude"])), {"preserve_dims": "prediction_timedelta", "weights": None}
    kept["weights"] = weights / weights.mean()
    ensemble, probability = forecast["t2m"], library.probability
    expected = {
        "rmse": np.sqrt(library.continuous.mse(ensemble.mean("number"), observed, **kept)),
        "mae": library.continuous.mae(ensemble.mean("number"), observed, **kept),
        "crps_fair": probability.crps_for_ensemble(ensemble, observed, "number", method="fair", **kept),
        "brier_q95": probability.brier_score_for_ensemble(ensemble, observed, "number", T, fair_correction=True, **kept).squeeze(),
        "twcrps_q95": probability.tail_tw_crps_for_ensemble(ensemble, observed, "number", threshold=T, method="fair", **kept),
    }
    for metric, values in expected.items():
        assert np.allclose(table[metric].to_numpy(), values.values, rtol=1e-10), metric
    assert table["events_q95", 21600.0] == int((observed.isel(prediction_timedelta=0) > T).sum())


def test_a_forecast_larger_than_memory_is_read_in_chunks_and_scored_the_same(data, tmp_path, monkeypatch):
    forecast, truth = data
    write(forecast, tmp_path / "forecast.zarr")
    scorer = Verification(replicates=50, views=["mean2", "energy", "gradient"])
    thresholds = xr.Dataset({"t2m": ("quantile", [T])}, {"quantile": [0.95]})
    whole = scorer.evaluate({"f": forecast}, truth, thresholds=thresholds)
    monkeypatch.setattr(cases, "CHUNK_VALUES", 3000)
    largest, original = [], cases.gather
    monkeypatch.setattr("appa_lite.verification.pairs.gather", lambda a, c: largest.append((r := original(a, c)).size) or r)
    lazily = xr.open_dataset(tmp_path / "forecast.zarr", engine="zarr", decode_timedelta=True)
    parts = scorer.evaluate({"f": lazily}, truth, thresholds=thresholds)
    assert max(largest) <= 3000 < forecast["t2m"].size and len(largest) > 10
    assert not lazily["t2m"]._in_memory
    for a, b in zip(whole.records, parts.records, strict=True):
        assert (a["metric"], a["variable"], a["count"]) == (b["metric"], b["variable"], b["count"])
        for key in ("value", "low", "high"):
            assert (a[key] is None and b[key] is None) or a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-12)
    assert whole.details["reliability"] == parts.details["reliability"]


def test_longitudes_of_either_convention_are_the_same_places(data):
    forecast, truth = data
    turned = forecast.assign_coords(longitude=(forecast.longitude + 180) % 360 - 180).sortby("longitude")
    scorer = Verification(replicates=20)
    assert scorer.evaluate({"f": turned}, truth).records == scorer.evaluate({"f": forecast}, truth).records


def test_deterministic_forecasts_and_truths_with_leads(data):
    forecast, truth = data
    single = forecast.isel(number=0, drop=True)
    when = xr.DataArray(forecast.time.values[:, None] + forecast.prediction_timedelta.values, dims=("time", "prediction_timedelta"))
    paired = truth.sel(time=when).assign_coords(time=forecast.time.values, prediction_timedelta=forecast.prediction_timedelta.values)
    scorer = Verification(replicates=20, spectra=False)
    a, b = (scorer.evaluate({"f": single}, t).records for t in (truth, paired))
    b = [r for r in b if r["system"] == "f"]
    assert [r for r in a if r["system"] == "f" and "_minus_" not in r["metric"]] == [r for r in b if "_minus_" not in r["metric"]]
    assert not any(r["metric"].startswith("rank") for r in a)
