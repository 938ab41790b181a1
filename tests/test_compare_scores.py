"""Systems side by side: pairing, skill between climatology and oracle, wins, seeds."""

import json
import time

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification.compare_scores import compare_scores, compare_systems, over_seeds, wins
from appa_lite.verification.tables import COLUMNS
from appa_lite.verification.thresholds import climatological_quantiles
from appa_lite.verification.verify import Verification

CELLS = 40


def coords(starts, leads):
    when = pd.date_range("2001-01-01", periods=starts, freq="40D").to_numpy().astype("datetime64[ns]")
    return {"time": when, "prediction_timedelta": pd.to_timedelta(6 * np.arange(leads), unit="h").to_numpy(), "x": np.arange(float(CELLS))}


def world(rng, starts=50, leads=3, members=10):
    """A truth s + e of which an oracle knows the signal s, and another half of it; members are exchangeable with the truth."""
    known = rng.standard_normal((starts, leads, 1, CELLS)) / np.sqrt(2)
    signal = known + rng.standard_normal((starts, leads, 1, CELLS)) / np.sqrt(2)
    draw = lambda n: rng.standard_normal((starts, leads, n, CELLS))  # noqa: E731
    dims = ("time", "prediction_timedelta", "number", "x")
    make = lambda values: xr.Dataset({"v": (dims, values)}, coords(starts, leads))  # noqa: E731
    truth = make(signal + draw(1)).isel(number=0)
    systems = {
        "oracle": make(signal + draw(members)),
        "half": make(known + np.sqrt(1.5) * draw(members)),
        "climatology": make(np.sqrt(2) * draw(members)),
    }
    return systems, truth, make, signal, draw


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def table(records):
    return {(r["system"], r["variable"], r["metric"], r["lead_time"]): r for r in records}


def test_skill_is_zero_for_climatology_and_one_for_the_oracle(rng):
    systems, truth, *_ = world(rng)
    both = compare_systems(systems, truth, scorer=Verification(replicates=200, views=["mean5"]))
    records = both.records
    assert {r["system"] for r in both.details["ranks"]} == set(systems) and json.dumps(both.details, allow_nan=False)
    assert all(tuple(r) == COLUMNS for r in records)
    found = table(records)
    lead = 6 * 3600.0
    for variable in ("v", "v_mean5"):
        for name, wanted in (("oracle", 1), ("climatology", 0)):
            row = found[name, variable, "crps_fair_skill_score", lead]
            assert (row["value"], row["low"], row["high"]) == pytest.approx((wanted,) * 3)
    half = found["half", "v", "crps_fair_skill_score", lead]
    score = {n: found[n, "v", "crps_fair", lead]["value"] for n in systems}
    assert half["value"] == pytest.approx((score["climatology"] - score["half"]) / (score["climatology"] - score["oracle"]))
    assert half["low"] < half["value"] < half["high"]
    assert half["value"] == pytest.approx((np.sqrt(2) - np.sqrt(1.5)) / (np.sqrt(2) - 1), abs=0.1)
    scored = {r["metric"] for r in records if r["metric"].endswith("_skill_score")}
    assert scored == {f"{m}_skill_score" for m in ("rmse", "mae", "crps_fair")}
    assert found["half", "v", "crps_fair_wins_oracle", lead]["value"] == -1
    assert found["persistence", "v", "rmse_minus_oracle", lead]["low"] > 0


def test_all_leads_together_are_one_case_a_start(rng):
    systems, truth, *_ = world(rng, starts=30)
    found = table(compare_scores(systems, truth, scorer=Verification(replicates=100, spectra=False, block=1)))
    leads = [found["half", "v", "rmse", 6 * 3600.0 * k] for k in range(3)]
    whole = found["half", "v", "rmse", None]
    assert whole["value"] == pytest.approx(np.sqrt(np.mean([r["value"] ** 2 for r in leads]))) and whole["count"] == 3 * leads[0]["count"]
    assert found["half", "v", "crps_fair_minus_oracle", None]["count"] == 30
    assert whole["high"] - whole["low"] < min(r["high"] - r["low"] for r in leads)


def test_an_oracle_that_is_no_better_is_no_goal(rng):
    systems, truth, make, _, draw = world(rng)
    systems["oracle"] = make(np.sqrt(2) * draw(10))
    assert not [
        r for r in compare_scores(systems, truth, scorer=Verification(replicates=50, spectra=False)) if r["metric"].endswith("_skill_score")
    ]


def test_differences_are_paired(rng):
    """Two systems that share their errors differ by less than their own intervals, which unpaired intervals would not show."""
    _, truth, make, signal, draw = world(rng, members=20)
    center = signal + 1.2 * draw(1) * np.linspace(0.2, 2, 50)[:, None, None, None]  # some starts are far harder
    noise = draw(20)
    pair = {"a": make(center + 0.9 * noise), "b": make(center + 0.98 * noise)}
    found = table(compare_scores(pair, truth, scorer=Verification(replicates=300, spectra=False, block=1)))
    a, b = (found[n, "v", "crps_fair", 0.0] for n in pair)
    difference = found["b", "v", "crps_fair_minus_a", 0.0]
    assert difference["value"] == pytest.approx(b["value"] - a["value"])
    assert difference["high"] - difference["low"] < 0.3 * min(r["high"] - r["low"] for r in (a, b))
    assert found["b", "v", "crps_fair_wins_a", 0.0]["value"] == 1


def test_equal_systems_rarely_win(rng):
    results = []
    for _ in range(4):
        _, truth, make, signal, draw = world(rng, starts=40, leads=5)
        equal = {name: make(signal + draw(8)) for name in "abcd"}
        records = compare_scores(equal, truth, scorer=Verification(replicates=200, spectra=False, block=1))
        results += [r["value"] for r in records if r["metric"] == "crps_fair_wins_a" and r["system"] != "persistence"]
    assert len(results) == 72 and np.mean(np.abs(results)) < 0.3  # 0.1 is expected; those of one reference are correlated


def test_calibration_is_compared_by_its_distance_from_one(rng):
    systems, truth, make, signal, draw = world(rng, members=12)
    spread = {"good": systems["oracle"], "narrow": make(signal + 0.5 * draw(12)), "wide": make(signal + 2 * draw(12))}
    found = table(compare_scores(spread, truth, scorer=Verification(replicates=100, spectra=False)))
    for name in ("narrow", "wide"):
        row = found[name, "v", "spread_skill_minus_good", 0.0]
        ratio = [found[n, "v", "spread_skill", 0.0]["value"] for n in (name, "good")]
        assert row["value"] == pytest.approx(np.abs(np.log(ratio)) @ [1, -1]) and row["low"] > 0
        assert found[name, "v", "rank_u_wins_good", 0.0]["value"] == -1


def test_extremes_and_refusals(rng):
    systems, truth, *_ = world(rng, starts=60)
    training = xr.Dataset({"v": (("time", "x"), np.sqrt(2) * rng.standard_normal((4000, CELLS)))}, {"x": np.arange(float(CELLS))})
    thresholds = climatological_quantiles(training, [0.95, 0.9999])
    found = table(compare_scores(systems, truth, thresholds, scorer=Verification(replicates=100, spectra=False)))
    assert found["oracle", "v", "rev_q95", 0.0]["value"] > 0.3 and found["climatology", "v", "rev_q95_wins_oracle", 0.0]["value"] == -1
    assert 0 < found["half", "v", "twcrps_q95_skill_score", 0.0]["value"] < 1
    assert found["half", "v", "events_q95", 0.0]["value"] == found["oracle", "v", "events_q95", 0.0]["value"] > 50
    assert found["half", "v", "twcrps_q99.99", 0.0]["low"] is None
    assert ("half", "v", "twcrps_q99.99_wins_oracle", 0.0) not in found  # too few events for a verdict
    with pytest.raises(UserError, match="is no system"):
        compare_scores(systems, truth, reference="nobody")


def test_seeds_widen_intervals_and_decide_wins():
    row = dict(zip(COLUMNS, ("a", "v", "rmse_minus_b", 0.0, -1.0, -1.5, -0.5, 9), strict=True))
    (same, won) = over_seeds({s: [row] for s in range(3)})
    assert (same["low"], same["high"], same["seed_std"], same["seeds"]) == (-1.5, -0.5, 0.0, 3) and won["value"] == 1
    (wide, undecided) = over_seeds(
        {s: [row | {"value": -1.0 + d, "low": -1.5 + d, "high": -0.5 + d}] for s, d in enumerate((-1.0, 0.0, 1.0))}
    )
    half = np.hypot(0.5, 2.91999 * 1.0 / np.sqrt(3))
    assert (wide["low"], wide["high"]) == pytest.approx((-1 - half, -1 + half), rel=1e-4)
    assert undecided["metric"] == "rmse_wins_b" and undecided["value"] == 0
    assert over_seeds({0: [row], 1: []}) == [] and wins([row])[0]["value"] == 1


@pytest.mark.slow
def test_a_whole_comparison_takes_seconds(rng):
    systems, truth, make, signal, draw = world(rng, leads=20, members=20)
    systems |= {f"s{k}": make(signal + draw(20)) for k in range(5)}
    training = xr.Dataset({"v": (("time", "x"), rng.standard_normal((4000, CELLS)))}, {"x": np.arange(float(CELLS))})
    start = time.process_time()
    compare_scores(systems, truth, climatological_quantiles(training))
    assert time.process_time() - start < 15
