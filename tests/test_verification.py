"""Verification: scores against brute force and other libraries, theorems about perfect ensembles, and the table's schema."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification.base import MOMENT, Sums
from appa_lite.verification.bootstrap import bootstrap_mean
from appa_lite.verification.cases import Cases
from appa_lite.verification.grid import interpolate, standardise
from appa_lite.verification.kriging import Variogram, fit_variogram, krige
from appa_lite.verification.metrics import RMSE, FairCRPS, RankShape, SpreadSkill, standard
from appa_lite.verification.spectra import Spectrum, power_spectrum
from appa_lite.verification.statistics import Ranks, crps_fair, crps_gaussian
from appa_lite.verification.tables import COLUMNS, dumps, format_table
from appa_lite.verification.verify import Verification, score

QUICK = Verification(replicates=100)


def times(n, hours=24):
    return pd.date_range("2001-01-01", periods=n, freq=f"{hours}h").to_numpy().astype("datetime64[ns]")


def field(rng, n=12, members=None, ny=10, nx=12, name="t"):
    shape = (n, ny, nx) if members is None else (n, members, ny, nx)
    dims = ("time", "latitude", "longitude") if members is None else ("time", "number", "latitude", "longitude")
    coords = {"time": times(n), "latitude": np.linspace(30, 57, ny), "longitude": np.linspace(-20, 2, nx)}
    return xr.Dataset({name: (dims, rng.standard_normal(shape))}, coords=coords)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def select(records, system, metric, **where):
    (found,) = [r for r in records if r["system"] == system and r["metric"] == metric and all(r[k] == v for k, v in where.items())]
    return found


# CRPS


def test_crps_is_brute_force_and_other_libraries(rng):
    x, y = rng.standard_normal((40, 7)), rng.standard_normal(40)
    pairs = np.abs(x[:, :, None] - x[:, None, :]).sum((1, 2)) / (2 * 7 * 6)
    assert np.allclose(crps_fair(x, y), np.abs(x - y[:, None]).mean(1) - pairs, atol=1e-13)
    scoringrules = pytest.importorskip("scoringrules")
    assert np.allclose(crps_fair(x, y), scoringrules.crps_ensemble(y, x, estimator="fair"), atol=1e-13)
    assert np.allclose(crps_gaussian(x[:, 0], np.abs(x[:, 1]), y), scoringrules.crps_normal(y, x[:, 0], np.abs(x[:, 1])), atol=1e-13)
    scores = pytest.importorskip("scores")
    theirs = scores.probability.crps_for_ensemble(
        xr.DataArray(x, dims=("case", "number")), xr.DataArray(y, dims="case"), "number", method="fair", preserve_dims="case"
    )
    assert np.allclose(crps_fair(x, y), theirs, atol=1e-13)


def test_gaussian_crps_is_that_of_a_large_ensemble(rng):
    members = 1.5 + 0.7 * rng.standard_normal(200_000)
    assert np.isclose(crps_gaussian(np.array(1.5), np.array(0.7), np.array(0.4)), crps_fair(members, np.array(0.4)), rtol=5e-3)
    assert crps_gaussian(np.array(1.0), np.array(0.0), np.array(3.0)) == 2.0


def test_fair_crps_does_not_depend_on_ensemble_size(rng):
    y = rng.standard_normal(40_000)
    values = [crps_fair(rng.standard_normal((y.size, n)), y).mean() for n in (2, 5, 30)]
    assert np.allclose(values, 1 / np.sqrt(np.pi), rtol=0.02)


# reliable ensembles


@pytest.mark.parametrize("members", [3, 16])
def test_perfect_ensemble_is_flat_and_spread_is_skill(rng, members):
    ensemble, truth = field(rng, 100, members), field(rng, 100)
    center = rng.standard_normal((100, 1, 10, 12)) * 5
    ensemble, truth = ensemble["t"] + xr.DataArray(center, dims=ensemble["t"].dims)[:, 0], truth["t"] + center[:, 0]
    assert SpreadSkill()(ensemble, truth) == pytest.approx(1, abs=0.02)
    ranks = Ranks().compute(ensemble, truth).mean().values
    assert np.allclose(ranks * (members + 1), 1, atol=0.12)
    assert abs(RankShape(1)(ensemble, truth)) < 0.05
    assert abs(RankShape(2)(ensemble, truth)) < 0.05


def test_rank_shape_has_the_promised_signs(rng):
    truth = field(rng, 50)["t"]
    ensemble = field(rng, 50, 9)["t"]
    assert RankShape(1)(ensemble - 1, truth) > 0.5  # a forecast that is too low
    assert RankShape(2)(0.3 * ensemble, truth) > 0.5  # overconfident: a U
    assert RankShape(2)(3 * ensemble, truth) < -0.5


def test_ties_are_broken_at_random():
    dry = xr.DataArray(np.zeros((60, 9, 100)), dims=("case", "number", "x"))
    ranks = Ranks().compute(dry, dry[:, 0]).mean().values
    assert np.allclose(ranks, 0.1, atol=0.02)


def test_observation_error_is_accounted_for(rng):
    state = rng.standard_normal((400, 1, 50)) * 3
    ensemble = xr.DataArray(state + rng.standard_normal((400, 8, 50)), dims=("case", "number", "place"))
    error = xr.DataArray(np.full((400, 50), 1.5), dims=("case", "place"))
    observed = (state[:, 0] + rng.standard_normal((400, 50))) + 1.5 * rng.standard_normal((400, 50))
    observation = xr.DataArray(observed, dims=("case", "place"), coords={"error_std": error})
    assert SpreadSkill()(ensemble, observation) == pytest.approx(1, abs=0.02)
    assert abs(RankShape(2)(ensemble, observation)) < 0.05
    assert RankShape(2)(ensemble, observation.drop_vars("error_std")) > 0.3
    assert FairCRPS()(ensemble, observation) == pytest.approx(np.sqrt((1 + 1.5**2) / np.pi), rel=0.02)


# sums


def test_chunked_equals_whole(rng):
    ensemble, truth = field(rng, 20, 5)["t"], field(rng, 20)["t"]
    truth = truth.where(rng.random(truth.shape) > 0.2)
    for metric in standard(periodic=(False, False)):
        for statistic in metric.statistics:
            whole = statistic.compute(ensemble, truth)
            parts = [statistic.compute(ensemble.isel(time=s), truth.isel(time=s)) for s in (slice(0, 7), slice(7, 8), slice(8, 20))]
            merged = Sums.concat(parts, "time")
            assert np.allclose(merged.total, whole.total, rtol=1e-12) and np.allclose(merged.weight, whole.weight, rtol=1e-12)
            pooled = parts[0].pooled() + parts[1].pooled() + parts[2].pooled()
            assert np.allclose(pooled.mean(), whole.mean(), rtol=1e-12, equal_nan=True)


def test_a_small_chunk_size_changes_nothing(rng, monkeypatch):
    ensemble, truth = field(rng, 20, 5), field(rng, 20)
    whole = QUICK.evaluate({"forecast": ensemble}, truth).records
    monkeypatch.setattr("appa_lite.verification.cases.CHUNK_VALUES", 2000)
    for a, b in zip(whole, QUICK.evaluate({"forecast": ensemble}, truth).records, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-10) and a["low"] == pytest.approx(b["low"], rel=1e-10)


def test_rmse_is_area_weighted_and_masked(rng):
    truth = field(rng)["t"]
    forecast = truth + 2 * (truth.latitude > 45)
    w = np.cos(np.deg2rad(truth.latitude))
    assert RMSE()(forecast, truth) == pytest.approx(float(np.sqrt((4 * w * (truth.latitude > 45)).sum() / w.sum())))
    assert RMSE()(forecast, truth.where(truth.latitude > 45)) == pytest.approx(2)


# bootstrap


def test_bootstrap_covers_the_mean_of_correlated_series(rng):
    n, phi, hits, trials = 200, 0.7, 0, 200
    for trial in range(trials):
        noise = rng.standard_normal(n + 50)
        series = np.zeros(n + 50)
        for t in range(1, n + 50):
            series[t] = phi * series[t - 1] + noise[t]
        low, high = bootstrap_mean(series[50:], replicates=300, seed=trial)
        hits += low <= 0 <= high
    assert 0.78 <= hits / trials <= 0.97  # nominal 0.9
    low, high = bootstrap_mean(series[50:], block=1)
    assert high - low < 0.7 * np.subtract(*bootstrap_mean(series[50:])[::-1])  # ignoring correlation is overconfident


# spectra


def test_spectrum_of_a_sine_and_parseval(rng):
    x = np.arange(64) * 2.0
    k, power = power_spectrum(3 * np.sin(2 * np.pi * 8 * x / 128), (2.0,), (True,))
    assert k[power.argmax()] == pytest.approx(8 / 128) and power.max() == pytest.approx(4.5)
    plane = 2 * np.cos(2 * np.pi * (3 * x[:, None] + 4 * x) / 128)
    k, power = power_spectrum(plane, (2.0, 2.0), (True, True))
    assert k[power.argmax()] == pytest.approx(5 / 128) and power.sum() == pytest.approx(2)
    k, power = power_spectrum(plane + 0.1 * x, (2.0, 2.0), (False, False))  # a trend is removed, a window keeps the variance
    assert k[power.argmax()] == pytest.approx(5 / 128) and power.sum() == pytest.approx(2, rel=0.15)


def test_spectra_leave_out_cases_with_missing_cells(rng):
    truth = field(rng)["t"].copy()
    truth[0, 0, 0] = np.nan
    weight = Spectrum("truth", (False, False)).compute(truth, truth).weight
    assert weight[0] == 0 and (weight[1:] == 1).all()


# observations


def linear(lat, lon, t):
    return 3 + 0.5 * lat - 0.25 * lon + 0.1 * t


def linear_forecast(leads=None):
    lat, lon = np.arange(40.0, 50.0), np.arange(0.0, 12.0)
    n = 5 if leads is None else 2
    steps = xr.DataArray(np.arange(n) * 24.0, dims="time")
    dims, coords = ("time",), {"time": times(n), "latitude": lat, "longitude": lon, "number": [0, 1, 2]}
    if leads is not None:
        steps = steps + xr.DataArray(np.asarray(leads, dtype=float), dims="prediction_timedelta")
        dims, coords = (*dims, "prediction_timedelta"), coords | {"prediction_timedelta": pd.to_timedelta(leads, unit="h").to_numpy()}
    values = linear(xr.DataArray(lat, dims="latitude"), xr.DataArray(lon, dims="longitude"), steps)
    members = values + xr.DataArray([-1.0, 0.0, 1.0], dims="number")
    return xr.Dataset({"t": members.transpose(*dims, "number", "latitude", "longitude")}, coords=coords)


def linear_table(rng, n=200, hours=96):
    lat, lon, t = rng.uniform(40, 49, n), rng.uniform(0, 11, n), np.sort(rng.uniform(0, hours, n))
    time = times(1)[0] + (t * 3600e9).astype("timedelta64[ns]")
    return pd.DataFrame(
        {"time": time, "lat": lat, "lon": lon, "variable": "t", "value": linear(lat, lon, t), "error_std": 0.1, "station": "a"}
    )


@pytest.mark.parametrize("leads", [None, [0, 12, 24, 48]])
def test_observations_of_a_linear_field_are_predicted_exactly(rng, leads):
    table = linear_table(rng)
    records = QUICK.evaluate({"forecast": linear_forecast(leads)}, observations=table).records
    assert all(r["value"] < 1e-6 for r in records if r["metric"] == "rmse" and r["system"] == "forecast")
    biased = QUICK.evaluate({"forecast": linear_forecast(leads)}, observations=table.assign(bias=2.0)).records
    assert all(r["value"] == pytest.approx(2) for r in biased if r["metric"] == "bias" and r["system"] == "forecast")
    if leads is None:
        assert select(records, "forecast", "rmse")["count"] == len(table)
        assert select(records, "forecast", "spread_skill")["value"] > 1
    else:
        assert {r["lead_time"] for r in records} == {0.0, 43200.0, 86400.0, 172800.0}
        assert select(records, "persistence", "rmse", lead_time=86400.0)["value"] > 1


def test_interpolation_knows_staggering_missing_cells_and_the_date_line():
    x = np.arange(8.0)
    u = xr.DataArray(np.tile(x - 0.5, (1, 6, 1)), dims=("time", "y", "x"), coords={"time": times(1), "y": np.arange(6.0), "x": x})
    u.attrs["grid_shift"] = [0.0, -0.5]
    where = {"y": np.array([2.2, 3.0]), "x": np.array([3.3, 4.25])}
    assert np.allclose(interpolate(u, where, times(1).repeat(2), (False, False)), where["x"])
    u.attrs.pop("grid_shift")
    holed = u.where(u.x != 4)
    assert np.allclose(interpolate(holed, where, times(1).repeat(2), (False, False)), [2.5, 4.5])
    assert np.isnan(interpolate(u, {"y": np.array([2.0]), "x": np.array([9.0])}, times(1), (False, False))).all()
    ring = xr.DataArray(np.zeros((1, 3, 36)), dims=("time", "latitude", "longitude"))
    ring = ring.assign_coords(time=times(1), latitude=[-10.0, 0, 10], longitude=np.arange(0, 360, 10.0)).copy()
    ring[..., -1] = 4.0
    there = {"latitude": np.array([0.0, 0.0]), "longitude": np.array([-5.0, 357.5])}
    assert np.allclose(interpolate(ring, there, times(1).repeat(2), (False, True)), [2.0, 1.0])


# baselines


def test_climatology_and_persistence_stand_in_the_table(rng):
    truth = field(rng, 40)
    truth["t"] = 5 + 2 * truth["t"]
    climatology = xr.Dataset({"t": xr.full_like(truth["t"][0], 5.0, dtype=float), "t_std": xr.full_like(truth["t"][0], 2.0, dtype=float)})
    lead = pd.to_timedelta([0, 1, 2], unit="D").to_numpy()
    states = np.stack([truth["t"].values[k : k + 3] for k in range(0, 30, 3)])[:, :, None]
    members = states + rng.standard_normal((10, 3, 5, 10, 12))
    forecast = xr.Dataset(
        {"t": (("time", "prediction_timedelta", "number", "latitude", "longitude"), members)},
        coords={"time": truth.time.values[:30:3], "prediction_timedelta": lead} | {d: truth[d] for d in ("latitude", "longitude")},
    )
    records = QUICK.evaluate({"forecast": forecast}, truth, climatology=climatology).records
    day = {"lead_time": 86400.0}
    assert select(records, "climatology", "rmse", **day)["value"] == pytest.approx(2, rel=0.1)
    assert select(records, "climatology", "crps_fair", **day)["value"] == pytest.approx(2 / np.sqrt(np.pi), rel=0.1)
    assert select(records, "climatology", "spread_skill", **day)["value"] == pytest.approx(1, abs=0.1)
    assert select(records, "persistence", "rmse", lead_time=0.0)["value"] == 0
    assert select(records, "persistence", "rmse", **day)["value"] == pytest.approx(2 * np.sqrt(2), rel=0.1)
    kept = np.abs(truth["t"].values[1:30:3] - truth["t"].values[:30:3])
    weights = np.cos(np.deg2rad(truth.latitude.values))[:, None] * np.ones(12)
    mae = np.average(kept.mean(0), weights=weights)
    assert select(records, "persistence", "crps_fair", **day)["value"] == pytest.approx(mae)
    difference = select(records, "forecast", "rmse_minus_climatology", **day)
    assert difference["high"] < 0 and difference["low"] < difference["value"] < difference["high"]


def test_kriging_reproduces_reports_and_knows_its_error(rng):
    where = rng.uniform(0, 100, (30, 2))
    model = Variogram(4.0, 40.0, 0.0)
    apart = np.linalg.norm(where[:, None] - where, axis=-1)
    z = 10 + np.linalg.cholesky(4 * np.exp(-apart / 40) + 1e-12 * np.eye(30)) @ rng.standard_normal((30, 400))
    mean, var = krige(model, where, z[:, 0], where, earth=False)
    assert np.allclose(mean, z[:, 0], atol=1e-8) and np.allclose(var, 0, atol=1e-8)
    errors, predicted = [], []
    for t in range(400):
        mean, var = krige(model, where[:25], z[:25, t], where[25:], earth=False)
        errors.append(mean - z[25:, t])
        predicted.append(var)
    assert abs(np.mean(errors)) < 0.1 and np.mean(np.square(errors)) == pytest.approx(np.mean(predicted), rel=0.1)
    noisy = z.T + 0.5 * rng.standard_normal((400, 30))
    noisy[::3, 4] = np.nan
    fitted = fit_variogram(where, noisy, earth=False)
    assert fitted.sill == pytest.approx(4, rel=0.3) and fitted.length == pytest.approx(40, rel=0.35)
    assert fitted.nugget == pytest.approx(0.25, rel=0.3)


def test_kriging_of_stations_uses_the_lapse_rate_and_never_the_withheld(rng):
    lat, lon, elev = rng.uniform(40, 49, 12), rng.uniform(0, 11, 12), rng.uniform(0, 800, 12)
    rows = []
    for time in times(4):
        level = 280 + 0.4 * (lat - 45) + rng.standard_normal()
        reports = zip(lat, lon, elev, level - 0.0065 * elev, strict=True)
        rows += [(time, a, b, e, f"s{k}", "t2m", v) for k, (a, b, e, v) in enumerate(reports)]
    table = pd.DataFrame(rows, columns=["time", "lat", "lon", "elev", "station", "variable", "observation"]).assign(error_std=0.1)
    withheld = table[table["station"].isin(["s0", "s1"])]
    analysis = linear_forecast().rename(t="t2m").isel(time=slice(0, 4)) * 0 + 280
    records = QUICK.evaluate({"reanalysis": analysis}, observations=withheld, kriging=table).records
    assert 0 < select(records, "kriging", "rmse")["value"] < 1
    assert select(records, "reanalysis", "rmse")["value"] > select(records, "kriging", "rmse")["value"]
    assert select(records, "kriging", "crps_fair")["count"] == 8


# the table


def test_records_have_the_schema(rng, tmp_path):
    truth = xr.concat([field(rng), field(rng)], "trajectory")
    forecast = field(rng, members=4)
    records = score({"reanalysis": forecast, "optimal_interpolation": field(rng, members=3)}, truth, trajectory=1)
    assert all(tuple(r) == COLUMNS for r in records)
    assert {r["system"] for r in records} == {"reanalysis", "optimal_interpolation"}
    assert {r["lead_time"] for r in records} == {None}
    assert {"rmse", "bias", "mae", "crps_fair", "spread", "spread_skill", "rank_slope", "rank_u"} <= {r["metric"] for r in records}
    rmse = select(records, "reanalysis", "rmse")
    assert rmse["low"] < rmse["value"] < rmse["high"] and rmse["count"] == truth["t"][0].size
    assert json.loads(dumps(records, ".json")) == records
    (tmp_path / "scores.csv").write_text(dumps(records, ".csv"))
    assert list(pd.read_csv(tmp_path / "scores.csv").columns) == list(COLUMNS)
    assert "reanalysis" in format_table(records)


def test_details_are_json(rng):
    scores = QUICK.evaluate({"reanalysis": field(rng, members=4)}, field(rng))
    details = json.loads(json.dumps(scores.details, allow_nan=False))
    assert len(details["series"][0]["rmse"]) == 12 and len(details["ranks"][0]["frequencies"]) == 5
    assert len(details["spectra"][0]["truth"]) == len(details["spectra"][0]["wavenumber"])
    stations = QUICK.evaluate({"reanalysis": linear_forecast()}, observations=linear_table(rng)).details["stations"]
    assert stations[0]["station"] == "a" and len(stations[0]["mean"]) == 200


def test_names_of_other_tools_are_understood(rng):
    ours = field(rng, members=3)
    theirs = ours.rename(latitude="lat", longitude="lon", number="member").isel(lat=slice(None, None, -1))
    assert score({"f": theirs}, field(np.random.default_rng(1))) == score({"f": ours}, field(np.random.default_rng(1)))
    leads = standardise(linear_forecast([0, 6]).assign_coords(prediction_timedelta=("prediction_timedelta", [0, 6], {"units": "hours"})))
    assert Cases.of(leads).seconds.tolist() == [0, 21600, 0, 21600]
    levels = standardise(xr.concat([ours, ours], pd.Index([500, 850], name="level")))
    assert set(levels.data_vars) == {"t_500", "t_850"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d.assign_coords(time=d.time + np.timedelta64(9999, "D")), "no time in common"),
        (lambda d: d.isel(latitude=slice(0, 5)), "latitude"),
        (lambda d: d.rename(t="q"), "variable"),
        (lambda d: d.rename(latitude="y", longitude="x"), "grid"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(rng, change, word):
    with pytest.raises(UserError, match=word) as error:
        score({"forecast": change(field(rng, members=3))}, field(rng))
    assert "\n" not in str(error.value)


def test_missing_forecast_values_do_not_pass_silently(rng):
    forecast = field(rng, members=3)
    forecast["t"][2, 1, 3, 4] = np.nan
    with pytest.warns(UserWarning, match="missing values"):
        score({"forecast": forecast}, field(rng))


def test_gaussian_systems_are_a_mean_and_a_standard_deviation(rng):
    truth = field(rng, 60)
    gaussian = xr.concat([truth["t"] * 0, truth["t"] * 0 + 1], pd.Index(["mean", "std"], name=MOMENT)).to_dataset(name="t")
    records = score({"gaussian": gaussian.transpose("time", ...)}, truth)
    assert select(records, "gaussian", "crps_fair")["value"] == pytest.approx(1 / np.sqrt(np.pi), rel=0.03)
    assert not [r for r in records if r["metric"] == "rank_slope"]
