"""Scores of extremes: fairness, agreement with other libraries, the forecaster's dilemma, events behind every figure."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification import score_figures
from appa_lite.verification.base import Sums
from appa_lite.verification.extremes import (
    COST_LOSS,
    Brier,
    Contingency,
    Threshold,
    ThresholdCRPS,
    brier_fair,
    economic_value,
    extreme_metrics,
    independent_events,
    split,
    twcrps_fair,
    twcrps_gaussian,
)
from appa_lite.verification.reliability import claim, expected_frequency, reliability
from appa_lite.verification.statistics import crps_fair, crps_gaussian
from appa_lite.verification.tables import format_table
from appa_lite.verification.thresholds import climatological_quantiles, label, read_thresholds, thresholds_of
from appa_lite.verification.verify import Verification
from appa_lite.verification.views import parse


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def pareto(rng, size, shape=0.25):
    """A generalised Pareto sample of unit scale."""
    return (rng.random(size) ** -shape - 1) / shape


def times(n):
    return pd.date_range("2001-01-01", periods=n, freq="D").to_numpy().astype("datetime64[ns]")


def ring(rng, n=60, members=None, cells=24, draw=None):
    shape, dims = ((n, cells), ("time", "x")) if members is None else ((n, members, cells), ("time", "number", "x"))
    values = rng.standard_normal(shape) if draw is None else draw(rng, shape)
    return xr.Dataset({"r": (dims, values)}, coords={"time": times(n), "x": np.arange(float(cells))})


def at(value, name="q99"):
    return Threshold(name, xr.DataArray(value))


# one pair at a time


def test_threshold_weighted_crps_is_the_integral_and_other_libraries(rng):
    x, y = rng.standard_normal((50, 7)), rng.standard_normal(50)
    for t in (-5.0, 0.3, 1.5, 9.0):
        z = np.linspace(t, 6, 200_001) if t < 6 else np.array([t, t])
        cdf = (x[:3, :, None] <= z).mean(1)
        integral = np.trapezoid((cdf - (y[:3, None] <= z)) ** 2, z)
        ordered = np.sort(np.maximum(x[:3], t), 1)
        ranks = 2 * np.arange(1, 8) - 8
        unfair = (ordered @ ranks) * (1 / (7 * 6) - 1 / 49)  # the integral is the plain score of the step function
        assert np.allclose(twcrps_fair(x, y, t)[:3], integral - unfair, atol=1e-4)
    assert np.allclose(twcrps_fair(x, y, -99.0), crps_fair(x, y), atol=1e-13)
    scoringrules = pytest.importorskip("scoringrules")
    theirs = scoringrules.twcrps_ensemble(y, x, a=0.4, estimator="fair")
    assert np.allclose(twcrps_fair(x, y, 0.4), theirs, atol=1e-13)
    scores = pytest.importorskip("scores").probability
    forecast, truth = xr.DataArray(x, dims=("case", "number")), xr.DataArray(y, dims="case")
    theirs = scores.tail_tw_crps_for_ensemble(forecast, truth, "number", threshold=0.4, method="fair", preserve_dims="case")
    assert np.allclose(twcrps_fair(x, y, 0.4), theirs, atol=1e-13)
    theirs = scores.brier_score_for_ensemble(forecast, truth, "number", 0.4, fair_correction=True, preserve_dims="case")
    assert np.allclose(brier_fair((x > 0.4).sum(1), 7, y > 0.4), theirs.squeeze(), atol=1e-13)


def test_gaussian_threshold_weighted_crps_is_that_of_a_large_ensemble(rng):
    members = 1.5 + 0.7 * rng.standard_normal(400_000)
    for y in (0.4, 2.0, 3.1):
        wanted = twcrps_fair(members[None], np.array([y]), 1.9)[0]
        assert twcrps_gaussian(np.array(1.5), np.array(0.7), np.array(y), 1.9) == pytest.approx(wanted, abs=3e-3)
    far = twcrps_gaussian(np.array(1.5), np.array(0.7), np.array(2.0), -50.0)
    assert far == pytest.approx(crps_gaussian(np.array(1.5), np.array(0.7), np.array(2.0)), rel=1e-10)
    assert twcrps_gaussian(np.array(3.0), np.array(0.0), np.array(1.0), 2.0) == 1.0


def test_fair_scores_do_not_depend_on_ensemble_size(rng):
    y, t = pareto(rng, 150_000), (0.01**-0.25 - 1) / 0.25
    fair, plain, brier = [], [], []
    for n in (4, 20):
        x = pareto(rng, (y.size, n))
        fair.append(twcrps_fair(x, y, t).mean())
        plain.append(fair[-1] + crps_excess(np.maximum(x, t)))
        brier.append(brier_fair((x > t).sum(1), n, y > t).mean())
    assert fair == pytest.approx(2 * [(4 / 3) * 0.01**0.75 - (4 / 7) * 0.01**1.75], rel=0.06)  # the integral of (1 - F) F above t
    assert plain[0] > 1.15 * plain[1]  # the unfair score prefers the larger of two perfect ensembles
    assert brier == pytest.approx([0.0099, 0.0099], rel=0.06)


def crps_excess(x):
    n = x.shape[1]
    return (np.sort(x, 1) @ (2 * np.arange(1, n + 1) - n - 1)).mean() * (1 / (n * (n - 1)) - 1 / n**2)


def test_the_forecasters_dilemma(rng):
    """Scored on extreme observations alone, a forecast twice too large beats the truth's own law; twCRPS is not fooled."""
    y, x, t = pareto(rng, 60_000), pareto(rng, (60_000, 20)), (0.01**-0.25 - 1) / 0.25
    extreme = y > t
    assert crps_fair(2 * x, y)[extreme].mean() < crps_fair(x, y)[extreme].mean()
    assert crps_fair(2 * x, y).mean() > crps_fair(x, y).mean()
    assert twcrps_fair(2 * x, y, t).mean() > twcrps_fair(x, y, t).mean()
    assert brier_fair((2 * x > t).sum(1), 20, y > t).mean() > brier_fair((x > t).sum(1), 20, y > t).mean()


# economic value and reliability


def contingency(forecast, truth, t):
    return split(Contingency(at(t)).compute(forecast, truth).pooled().total.values)


def test_economic_value_of_perfect_useless_and_known_forecasts(rng):
    truth = ring(rng, 300)["r"]
    sharp = truth.expand_dims(number=5).transpose("time", "number", "x")
    assert np.allclose(economic_value(contingency(sharp, truth, 1.5), COST_LOSS), 1)
    noise = ring(rng, 300, 5)["r"]
    assert economic_value(contingency(noise, truth, 1.5), COST_LOSS).max() < 0.1
    hits, alarms, base = 0.7, 0.1, 0.2  # Richardson's formula by hand, one member
    joint = np.array([[(1 - alarms) * (1 - base), alarms * (1 - base)], [(1 - hits) * base, hits * base]])
    ours = economic_value(joint, COST_LOSS)
    climate = np.minimum(COST_LOSS, base)
    wanted = (climate - alarms * COST_LOSS * (1 - base) + hits * base * (1 - COST_LOSS) - base) / (climate - base * COST_LOSS)
    assert np.allclose(ours, np.maximum(wanted, 0))
    assert economic_value(joint, np.array([base]))[0] == pytest.approx(hits - alarms)
    value = extreme_metrics((at(1.5),))[2]
    assert value.value({value.source: joint.reshape(-1)}) == pytest.approx(hits - alarms)


def test_economic_value_agrees_with_scores(rng):
    scores = pytest.importorskip("scores").probability
    truth = ring(rng, 200)["r"]
    forecast = 0.7 * truth + 0.7 * ring(rng, 200, 4)["r"]
    chance = (forecast > 1.2).mean("number")
    theirs = scores.relative_economic_value(
        chance,
        (truth > 1.2).astype(float),
        cost_loss_ratios=list(COST_LOSS),
        probability_thresholds=[0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
        generate_maximum_rev=True,
    )
    ours = economic_value(contingency(forecast, truth, 1.2), COST_LOSS)
    assert np.allclose(ours, np.maximum(theirs["maximum"].values, 0), atol=1e-10)


def test_a_perfect_ensemble_falls_within_the_bars(rng):
    """Members and truth are exchangeable: a small perfect ensemble is not on the diagonal, and must not look overconfident."""
    inside = total = 0
    for _ in range(40):
        center = rng.standard_normal((500, 1)) * 0.8
        x, y = center + 0.6 * rng.standard_normal((500, 8)), center[:, 0] + 0.6 * rng.standard_normal(500)
        joint = np.zeros((500, 2, 9))
        joint[np.arange(500), (y > 1.2).astype(int), (x > 1.2).sum(1)] = 1
        found = {k: np.array(v) for k, v in reliability(joint).items()}
        inside += ((found["observed"] >= found["low"]) & (found["observed"] <= found["high"])).sum()
        total += len(found["observed"])
    assert 0.85 <= inside / total <= 0.99
    counts = joint.sum((0, 1))
    assert expected_frequency(counts)[-1] < 0.98 and expected_frequency(counts)[0] > 0.0


def test_reliability_knows_that_cells_are_not_independent(rng):
    center = rng.standard_normal((100, 1, 1))
    x = xr.DataArray(center + rng.standard_normal((100, 6, 1)) + np.zeros(50), dims=("case", "number", "x"))
    y = xr.DataArray((center + rng.standard_normal((100, 1, 1)))[:, 0] + np.zeros(50), dims=("case", "x"))
    joint = split(Contingency(at(1.0)).compute(x, y).total.values)
    one, many = (reliability(j) for j in (split(Contingency(at(1.0)).compute(x[..., :1], y[..., :1]).total.values), joint))
    width = [np.mean(np.subtract(f["high"], f["low"])) for f in (one, many)]
    assert width[1] == pytest.approx(width[0], rel=0.25)  # fifty equal cells say no more than one
    assert claim(2500, 0.01) and not claim(2400, 0.01)


def test_independent_events():
    events = np.array([0, 5, 3, 0, 0, 0, 1, 0, 0, 9])
    assert independent_events(events, 1) == 4 and independent_events(events, 2) == 3 and independent_events(events, 9) == 1
    assert independent_events(np.ones(100), 5) == 20 and independent_events(np.zeros(4), 1) == 0


# as statistics


def test_chunked_equals_whole_and_missing_values_are_left_out(rng):
    forecast, truth = ring(rng, 20, 5)["r"], ring(rng, 20)["r"]
    truth, forecast = truth.where(rng.random(truth.shape) > 0.2), forecast.where(rng.random(forecast.shape) > 0.05)
    known = np.isfinite(truth) & np.isfinite(forecast).all("number")
    per_cell = Threshold("q95", xr.DataArray(np.linspace(0, 1, 24), dims="x"))
    for t in (at(0.8), per_cell):
        for statistic in (ThresholdCRPS(t), Brier(t), Contingency(t)):
            whole = statistic.compute(forecast, truth)
            parts = [statistic.compute(forecast.isel(time=s), truth.isel(time=s)) for s in (slice(0, 7), slice(7, 20))]
            merged = Sums.concat(parts, "time")
            assert np.allclose(merged.total, whole.total, rtol=1e-12) and np.array_equal(merged.weight, whole.weight)
            assert np.array_equal(whole.weight, known.sum("x"))
    joint = split(Contingency(at(0.8)).compute(forecast, truth).pooled().total.values)
    hits = (forecast > 0.8).sum("number")
    assert joint[1, 2] == int(((hits == 2) & (truth > 0.8) & known).sum())


# thresholds


def test_thresholds_come_from_the_training_data(rng, tmp_path):
    training = xr.concat([ring(rng, 2000), ring(rng, 2000)], "trajectory")
    found = climatological_quantiles(training, views=parse(["mean2", "gradient"]))
    assert found["r"].dims == ("quantile",) and set(found) == {"r", "r_mean2", "r_gradient"}
    assert found["r"].values == pytest.approx([1.645, 2.326, 3.09], rel=0.05)
    assert found["r_mean2"].values == pytest.approx(found["r"].values / np.sqrt(2), rel=0.05)
    assert climatological_quantiles(training, [0.9], per_cell=True)["r"].dims == ("quantile", "x")
    with pytest.warns(UserWarning, match="too short"):
        short = climatological_quantiles(ring(rng, 200))
    assert [t.label for t in thresholds_of(short, "r")] == ["q95", "q99"] and label(0.999) == "q99.9"
    for bad in ([], [0.3], [1.0]):
        with pytest.raises(UserError, match=r"between 0\.5 and 1"):
            climatological_quantiles(training, bad)
    training.to_netcdf(tmp_path / "train.nc", engine="h5netcdf")
    (tmp_path / "t.json").write_text(json.dumps({"r": {"0.99": 2.0}}))
    assert float(read_thresholds(tmp_path / "t.json", (0.99,), ())["r"][0]) == 2.0
    again = read_thresholds(tmp_path / "train.nc", (0.99,), (), truth=tmp_path / "t.json")
    assert float(again["r"][0]) == pytest.approx(float(found["r"][1]))
    with pytest.raises(UserError, match="is the truth itself"):
        read_thresholds(tmp_path / "train.nc", (0.99,), (), truth=tmp_path / "train.nc")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(UserError, match="expected"):
        read_thresholds(tmp_path / "bad.json", (0.99,), ())


def test_extremes_stand_in_the_table_with_their_events(rng):
    truth, forecast = ring(rng, 120), ring(rng, 120, 8)
    forecast["r"] = 0.8 * truth["r"] + 0.6 * forecast["r"]
    thresholds = climatological_quantiles(ring(rng, 3000), [0.95, 0.999])
    scores = Verification(replicates=50, spectra=False).evaluate({"f": forecast}, truth, thresholds=thresholds)
    found = {r["metric"]: r for r in scores.records if r["system"] == "f"}
    t = float(thresholds["r"][0])
    assert found["events_q95"]["value"] == int((truth["r"] > t).sum()) == pytest.approx(144, rel=0.3)
    assert 10 < found["independent_events_q95"]["value"] <= 120
    assert found["rev_q95"]["low"] < found["rev_q95"]["value"] < found["rev_q95"]["high"]
    assert found["twcrps_q99.9"]["value"] >= 0 and found["twcrps_q99.9"]["low"] is None  # too few events for an interval
    assert found["brier_q95"]["value"] < 0.05
    (diagram,) = [d for d in scores.details["reliability"] if d["threshold"] == "q95"]
    assert diagram["events"] == found["events_q95"]["value"] and len(diagram["probability"]) == len(diagram["observed"]) > 4
    assert not [d for d in scores.details["reliability"] if d["threshold"] == "q99.9"][0]["claim"]
    json.dumps(scores.details, allow_nan=False)
    page = score_figures.reliability(scores.details["reliability"]) + score_figures.economic_value(scores.details["economic_value"])
    assert page.count("<figure") >= 2 and f"{diagram['events']} exceedances, {diagram['independent_events']} independent" in page
    assert f"<td>{diagram['events']}</td><td>{diagram['independent_events']}</td>" in score_figures.extremes_table(scores.records)
    text = format_table(scores.records)
    assert "exceedances of the 95 % quantile of the training climatology" in text and f" {diagram['events']} " in text


def test_thresholds_per_cell_are_on_the_grid_or_refused(rng):
    truth, forecast = ring(rng, 200), ring(rng, 200, 4)
    scale = xr.DataArray(np.linspace(1, 3, 24), dims="x")
    training = ring(rng, 4000) * scale.values
    thresholds = climatological_quantiles(training, [0.95], per_cell=True)
    assert thresholds["r"].values[0] == pytest.approx(1.645 * scale.values, rel=0.1)
    records = Verification(replicates=20, spectra=False).evaluate({"f": forecast * scale}, truth * scale, thresholds=thresholds).records
    (events,) = [r["value"] for r in records if r["metric"] == "events_q95" and r["system"] == "f"]
    assert events / (200 * 24) == pytest.approx(0.05, abs=0.012)
    with pytest.raises(UserError, match="give thresholds on its grid"):
        Verification(spectra=False).evaluate({"f": forecast}, truth, thresholds=thresholds.isel(x=slice(0, 9)))


def test_extremes_at_observations_account_for_their_error(rng):
    """Members with the observation's error are exchangeable with it, so a perfect ensemble is reliable for the noisy event."""
    center = rng.standard_normal((400, 1, 30))
    members = xr.DataArray(center + rng.standard_normal((400, 10, 30)), dims=("case", "number", "place"))
    noisy = (center + rng.standard_normal((400, 1, 30)))[:, 0] + 1.5 * rng.standard_normal((400, 30))
    errors = xr.DataArray(np.full((400, 30), 1.5), dims=("case", "place"))
    truth = xr.DataArray(noisy, dims=("case", "place"), coords={"error_std": errors})
    joint = split(Contingency(at(3.0)).compute(members, truth).pooled().total.values)
    assert joint[1].sum() / joint.sum() == pytest.approx((joint.sum(0) * np.arange(11)).sum() / 10 / joint.sum(), rel=0.1)
    assert Brier(at(3.0)).compute(members, truth).mean() < Brier(at(3.0)).compute(members, truth.drop_vars("error_std")).mean()
