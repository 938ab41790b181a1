"""Station corrections on synthetic stations whose biases are known; specific humidity against published values."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from appa_lite.core.covariance import estimate_covariance, localisation
from appa_lite.core.errors import UserError
from appa_lite.observations import build_observation
from appa_lite.observations.correction import apply_corrections, fit_corrections
from appa_lite.observations.humidity import add_specific_humidity, saturation_pressure, specific_humidity, station_pressure
from appa_lite.observations.options import Humidity, TableOptions

TIMES = np.datetime64("2017-01-01", "ns") + np.arange(40 * 24) * np.timedelta64(1, "h")


def stations(count=30, between=0.5, within=0.8, seed=0, cycle=0.0):
    """Residuals = 1 - 0.01 elev + u_s + cycle cos(2 pi t / day) + e, and the true bias of each station."""
    rng = np.random.default_rng(seed)
    elevation = rng.uniform(0, 300, count)
    own = rng.normal(0, between, count)
    names = np.array([f"s{i:02}" for i in range(count)])
    table = pd.DataFrame({"time": np.tile(TIMES, count), "station": np.repeat(names, len(TIMES)), "variable": "t2m"})
    table["elev"] = np.repeat(elevation, len(TIMES))
    phase = np.cos(2 * np.pi * (np.arange(len(TIMES)) % 24) / 24)
    noise = within * rng.normal(size=(count, len(TIMES))) + cycle * phase
    bias = dict(zip(names, 1 - 0.01 * elevation + own, strict=True))
    return table, (np.array(list(bias.values()))[:, None] + noise).ravel(), bias


def test_regression_and_biases_are_recovered():
    table, residual, bias = stations(between=0.0)
    found = fit_corrections(table, residual)["t2m"]
    assert found.slope == pytest.approx(-0.01, abs=2e-4) and found.regression(np.array([0.0]))[0] == pytest.approx(1.0, abs=0.03)
    assert found.within == pytest.approx(0.8, rel=0.02) and found.between < 0.05
    assert max(abs(found.stations[s] - b) for s, b in bias.items()) < 0.1


def test_stations_with_biases_of_their_own():
    table, residual, bias = stations(between=0.5)
    found = fit_corrections(table, residual)["t2m"]
    assert found.between == pytest.approx(0.5, rel=0.4)
    assert max(abs(found.stations[s] - b) for s, b in bias.items()) < 0.12


def test_withheld_stations_take_no_part_and_get_the_regression():
    table, residual, _ = stations()
    hidden = ["s00", "s07"]
    spoiled = residual + 100.0 * table["station"].isin(hidden)
    found = fit_corrections(table, spoiled, hidden)
    assert found == fit_corrections(table[~table["station"].isin(hidden)], residual[~table["station"].isin(hidden)])
    out = apply_corrections(table.assign(observation=0.0), found, hidden, {"t2m": 2.0})
    rows = out["station"].isin(hidden)
    expected = found["t2m"].regression(out.loc[rows, "elev"].to_numpy())
    assert np.allclose(out.loc[rows, "bias"], expected)
    assert (out.loc[rows, "error_std"] > found["t2m"].within).all()  # the spread of the regression is added
    assert np.allclose(out.loc[~rows, "error_std"], 2 * found["t2m"].within)


def test_a_noisy_mean_is_shrunk_towards_the_regression():
    table, residual, bias = stations(between=0.3, within=6.0)
    few = table["time"] < TIMES[5 * 24]
    found = fit_corrections(table[few], residual[few])["t2m"]
    means = pd.Series(residual[few]).groupby(table.loc[few, "station"].to_numpy()).mean()
    error = {name: np.mean([(value - bias[s]) ** 2 for s, value in values.items()]) for name, values in
             (("shrunk", found.stations), ("mean", means.to_dict()))}  # fmt: skip
    assert error["shrunk"] <= error["mean"]


def test_a_shared_daily_cycle_is_taken_off():
    table, residual, _ = stations(cycle=1.0)
    plain, cycled = (fit_corrections(table, residual, periods=p)["t2m"] for p in ((), (86400.0,)))
    assert cycled.harmonics == pytest.approx((1.0, 0.0), abs=0.02)
    assert cycled.within == pytest.approx(0.8, rel=0.02) and plain.within > 1.0
    out = apply_corrections(table.assign(observation=0.0), {"t2m": cycled})
    assert (residual - out["bias"]).std() == pytest.approx(0.8, rel=0.02)


def test_without_elevation_or_station_names():
    table, residual, _ = stations()
    place = table.drop(columns=["elev", "station"]).assign(latitude=50 + pd.factorize(table["station"])[0], longitude=0.0)
    found = fit_corrections(place, residual)["t2m"]
    assert found.slope == 0.0 and len(found.stations) == 30
    with pytest.raises(UserError, match="only withheld stations report t2m"):
        fit_corrections(table, residual, sorted(set(table["station"])))


# Humidity


def test_saturation_pressure_against_tables():
    """Over water, hPa: Goff-Gratch values of the Smithsonian tables."""
    for celsius, expected in ((-20, 1.2540), (0, 6.1078), (10, 12.272), (20, 23.373), (30, 42.430)):
        assert saturation_pressure(273.15 + celsius) == pytest.approx(100 * expected, rel=4e-3)


def test_pressure_of_the_standard_atmosphere():
    for height, expected in ((500, 954.61), (1000, 898.74), (2000, 794.95)):
        assert station_pressure(101325.0, 288.15 - 0.0065 * height, height) == pytest.approx(100 * expected, rel=2e-4)


def test_specific_humidity_of_saturated_air():
    assert specific_humidity(1.0, 293.15, 101325.0) == pytest.approx(0.01448, rel=3e-3)
    assert specific_humidity(0.0, 293.15, 101325.0) == 0.0


RULE = Humidity("r2m", "t2m", "msl", "Qair")


def reports(**columns) -> pd.DataFrame:
    rows = [("r2m", 100.0, "%"), ("t2m", 20.0, "degC"), ("msl", 1013.25, "hPa")]
    table = pd.DataFrame(rows, columns=["variable", "observation", "units"])
    return table.assign(time=TIMES[0], latitude=50.0, longitude=0.0, station="a", elev=0.0, error_std=np.nan, **columns)


def test_reports_are_joined_and_units_converted():
    out = add_specific_humidity(reports(), RULE)
    row = out[out["variable"] == "Qair"].iloc[0]
    assert row["observation"] == pytest.approx(0.01448, rel=3e-3) and row["units"] == "kg kg-1"
    assert sorted(out["variable"]) == ["Qair", "msl", "t2m"]
    pd.testing.assert_frame_equal(add_specific_humidity(out, RULE), out)


def test_a_missing_or_flagged_partner_is_a_missing_value():
    for table in (reports().assign(time=TIMES[:3]), reports(qc=["1", "4", "1"])):
        out = add_specific_humidity(table, RULE)
        assert out.loc[out["variable"] == "Qair", "observation"].isna().all()


def test_humidity_says_what_it_lacks():
    table = reports()
    with pytest.raises(UserError, match="no pressure 'msl'; they have r2m, t2m"):
        add_specific_humidity(table[table["variable"] != "msl"], RULE)
    with pytest.raises(UserError, match="needs a column 'elev'"):
        add_specific_humidity(table.drop(columns="elev"), RULE)
    with pytest.raises(UserError, match="is in 'm s-1', expected 'K'"):
        add_specific_humidity(table.assign(units=["%", "m s-1", "hPa"]), RULE)
    with pytest.raises(UserError, match="specific_humidity needs pressure, name"):
        TableOptions.parse({"specific_humidity": {"relative_humidity": "r2m", "temperature": "t2m"}})


def test_humidity_observes_the_field(plane: xr.Dataset):
    from appa_lite.data.open import open_fields

    _, spec = open_fields(plane.rename(msl="Qair").assign(Qair=plane["msl"].assign_attrs(units="kg kg-1")))
    options = {"specific_humidity": vars(RULE), "variables": {"Qair": {"error_std": 1e-4}}}
    observation, counts = build_observation(reports(), spec, plane["time"].values, {**options, "reach": 2.0})
    assert counts["used"] == 1 and float(observation.values[0]) == pytest.approx(0.01448, rel=3e-3)


# Localisation of the climatological covariance


def test_localisation_is_a_correlation_that_ends():
    taper = localisation((2, 6, 9), (False, True), 2.0)
    assert torch.allclose(taper, taper.T) and torch.allclose(taper.diagonal(), torch.ones(108, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(localisation((1, 6, 9), (False, False), 2.0)).min()) > -1e-12
    corner = taper[:54, :54].reshape(6, 9, 6, 9)[0, 0]
    assert float(corner[4, 0]) == 0.0 and float(corner[0, 8]) == float(corner[0, 1]) > 0.5  # columns wrap around


def test_a_tapered_covariance_keeps_the_variance_of_every_place():
    series = torch.randn(1, 20, 54, generator=torch.Generator().manual_seed(0))
    taper = localisation((1, 6, 9), (False, False), 2.0)
    covariance = estimate_covariance(series, 54, 4, taper)
    power = (covariance.basis**2 @ covariance.autocovariance[:, 0]).double()
    assert torch.allclose(power, series[0].square().mean(0).double(), rtol=1e-2)
