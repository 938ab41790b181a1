"""Extreme-value statistics: exact laws, agreement with scipy, lmoments3 and pyextremes, coverage of the intervals, refusals."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from appa_lite.core.errors import UserError
from appa_lite.verification.block_maxima import block_maxima, fit_maxima
from appa_lite.verification.extreme_values import ParetoTail, decluster, extremal_index, fit_pareto, fit_series, fit_tail, l_moments
from appa_lite.verification.return_levels import compare_return_levels
from appa_lite.verification.tail_scores import censored_log_score, score_tails


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def pareto(rng, size, shape=0.25):
    return (rng.random(size) ** -shape - 1) / shape


def quantile(p, shape=0.25):
    return (p**-shape - 1) / shape


def moving_maximum(rng, n, width):
    """Frechet with tail index 1/4 and extremal index 1 / width, its exceedances in runs of ``width``."""
    z = -1 / np.log(rng.random(n + width - 1))
    return (np.lib.stride_tricks.sliding_window_view(z, width).max(1) / width) ** 0.25


# generalised Pareto


@pytest.mark.parametrize("shape", [-0.15, 0.0, 0.25, 0.6])
def test_pareto_fits_find_the_law_and_know_their_error(rng, shape):
    sample = stats.genpareto.rvs(shape, scale=2.0, size=(60, 400), random_state=rng)
    for method in ("ml", "pwm"):
        fits = [fit_pareto(s, method, 0.0, 1.0, 400) for s in sample]
        found = np.array([(f.scale, f.shape) for f in fits])
        if method == "pwm" and shape >= 0.5:
            assert any(np.isinf(f.shape_se) for f in fits)
            continue
        errors = np.sqrt(np.mean([np.diag(f.covariance)[1:] for f in fits], 0))
        assert np.allclose(found.mean(0), (2.0, shape), atol=4 * errors / np.sqrt(60) + 0.01)
        assert np.allclose(found.std(0), errors, rtol=0.3)


def test_maximum_likelihood_is_scipys(rng):
    for shape in (-0.25, 0.1, 0.5):
        sample = stats.genpareto.rvs(shape, size=500, random_state=rng)
        theirs = stats.genpareto.fit(sample, floc=0)
        ours = fit_pareto(sample, "ml", 0.0, 1.0, 500)
        best = [stats.genpareto.logpdf(sample, c, scale=s).sum() for c, s in ((ours.shape, ours.scale), (theirs[0], theirs[2]))]
        assert best[0] >= best[1] - 1e-6
        assert (ours.shape, ours.scale) == pytest.approx((theirs[0], theirs[2]), abs=2e-3)


def test_levels_of_an_exact_tail():
    for shape in (-0.2, 0.0, 1e-8, 0.25):
        tail = ParetoTail(10.0, 2.0, shape, np.diag([1e-6, 0.01, 0.001]), 0.05, 10_000, "ml", np.ones(500))
        wanted = 10 + stats.genpareto.isf(1e-3 / 0.05, shape, scale=2.0)
        assert tail.level(1e-3) == pytest.approx(wanted)
        level = tail.delta(1e-3)
        assert level.low < level.value < level.high and level.high - level.value > level.value - level.low
        slope = []
        for step in 1e-5 * np.diag([0.05, 1.0, 1.0]):
            moved = ParetoTail(10.0, 2.0 + step[1], shape + step[2], tail.covariance, 0.05 + step[0], 1, "ml", tail.excesses)
            slope.append((moved.level(1e-3) - wanted) / step.sum() / (wanted - 10))
        log = np.log((level.high - 10) / (wanted - 10)) / stats.norm.ppf(0.975)
        assert log**2 == pytest.approx(np.array(slope) @ tail.covariance @ slope, rel=1e-3)
    with pytest.raises(UserError, match="says nothing of"):
        tail.level(0.2)


def coverage(rng, replicates, n=10_000, p=1e-3):
    hits = {"delta": 0, "profile": 0}
    for _ in range(replicates):
        tail = fit_tail(pareto(rng, n))
        for method in hits:
            level = getattr(tail, method)(p)
            hits[method] += level.low <= quantile(p) <= level.high
    return {method: count / replicates for method, count in hits.items()}


def test_return_levels_are_covered(rng):
    assert min(coverage(rng, 60).values()) >= 0.86


@pytest.mark.slow
def test_return_levels_are_covered_in_88_of_100_cases(rng):
    found = coverage(rng, 200)
    assert min(found.values()) >= 0.88, found


def test_a_short_series_says_that_it_does_not_know(rng):
    notes = [fit_tail(pareto(rng, 2000)).profile(1e-4).note for _ in range(30)]
    assert np.mean(["wider than 2 times" in n for n in notes]) > 0.3
    assert not any(fit_tail(pareto(rng, 10_000)).profile(1e-3).note for _ in range(10))
    tail = fit_tail(pareto(rng, 2000))
    assert f"+- {tail.shape_se:.3f} from 100 exceedances" in str(tail)
    with pytest.raises(UserError, match="expected 30 or more"):
        fit_tail(pareto(rng, 400))


def test_a_threshold_that_is_not_asymptotic_biases_far_levels():
    """Student's t with four degrees of freedom: at the 95 % quantile the tail is not yet Pareto, and one in 10 000 is 5 % low."""
    exact = stats.t.isf((np.arange(200_000) + 0.5) / 200_000, 4)
    ratio = [fit_tail(exact, quantile=q).level(1e-4) / stats.t.isf(1e-4, 4) for q in (0.95, 0.99, 0.995)]
    assert ratio[0] == pytest.approx(0.95, abs=0.015) and ratio[0] < ratio[1] < ratio[2] and ratio[2] == pytest.approx(1, abs=0.01)


# series


def test_declustering_finds_runs_and_the_extremal_index(rng):
    series = np.array([0, 3, 4, 0, 5, 0, 0, 0, 9, 8, np.nan, 2.0])
    for run, peaks in ((1, [4, 5, 9, 2]), (2, [5, 9]), (4, [9])):
        found = decluster(series, 1.0, run)
        assert found.peaks.tolist() == peaks and found.extremal_index == len(peaks) / 6
    assert len(decluster(series, 99.0).peaks) == 0
    independent, clustered = pareto(rng, 60_000), moving_maximum(rng, 60_000, 4)
    assert extremal_index(independent, np.quantile(independent, 0.99)) == pytest.approx(1, abs=0.08)
    assert extremal_index(clustered, np.quantile(clustered, 0.99)) == pytest.approx(0.25, abs=0.05)
    assert decluster(clustered, np.quantile(clustered, 0.99)).extremal_index == pytest.approx(0.25, abs=0.05)


def test_clusters_not_values_are_counted(rng):
    series = moving_maximum(rng, 60_000, 4)
    tail = fit_series(series, 0.98)
    assert tail.exceedances == pytest.approx(300, rel=0.2) and tail.rate == pytest.approx(0.005, rel=0.2)
    assert abs(tail.shape - 0.25) < 0.22
    naive = fit_tail(series, quantile=0.98)
    assert naive.shape_se < 0.75 * tail.shape_se  # dependent exceedances flatter
    event = (-1 / np.log1p(-1e-4) / 4) ** 0.25  # exceeded by one of the independent Z / 4 in 10 000
    level = tail.profile(1e-4)
    assert level.low < event < level.high


def test_cells_that_repeat_each_other_say_no_more_than_one(rng):
    """Errors of a field's tail are those of sums over blocks of time: copies of a cell add nothing, independent cells do."""
    one = pareto(rng, (1, 1, 40_000))
    copies, others = np.repeat(one, 9, 1), pareto(rng, (1, 9, 40_000))
    single, same, more = (fit_series(s) for s in (one, copies, others))
    assert single.shape == pytest.approx(same.shape) and same.exceedances == 9 * single.exceedances
    assert single.shape_se == pytest.approx(np.sqrt(fit_tail(one).covariance[2, 2]), rel=0.3)
    assert same.shape_se == pytest.approx(single.shape_se, rel=1e-6) and more.shape_se == pytest.approx(single.shape_se / 3, rel=0.3)
    wide = [(level.high - level.low) / level.value for level in (t.profile(1e-4) for t in (single, same, more))]
    assert wide[1] == pytest.approx(wide[0], rel=0.05) and wide[2] < 0.5 * wide[0]


# generalised extreme values


def test_extreme_value_fits_find_the_law(rng):
    for shape in (-0.2, 1e-9, 0.2):
        maxima = stats.genextreme.rvs(-shape, 10, 2, size=4000, random_state=rng)
        for method in ("ml", "l_moments"):
            fit = fit_maxima(maxima, method)
            errors = np.sqrt(np.diag(fit.covariance))
            assert np.all(np.abs(np.array([fit.location, fit.scale, fit.shape]) - (10, 2, shape)) < 3.5 * errors)
            assert errors[2] < 0.02
            wanted = stats.genextreme.isf(0.01, -shape, 10, 2)
            for level in (fit.delta(100, 0.999), fit.profile(100, 0.999)):
                assert level.low < wanted < level.high
        theirs = stats.genextreme.fit(maxima)
        ours = fit_maxima(maxima, "ml")
        assert (ours.location, ours.scale, ours.shape) == pytest.approx((theirs[1], theirs[2], -theirs[0]), abs=5e-3)


def test_few_maxima_are_fitted_by_l_moments(rng):
    sample = stats.genextreme.rvs(-0.2, size=(150, 30), random_state=rng)
    assert fit_maxima(sample[0]).method == "l_moments" and fit_maxima(sample[:2].ravel()).method == "ml"
    truth = stats.genextreme.isf(0.01, -0.2)
    error = {m: np.sqrt(np.mean([(fit_maxima(s, m).level(100) / truth - 1) ** 2 for s in sample])) for m in ("ml", "l_moments")}
    assert error["l_moments"] < error["ml"] and error["l_moments"] < 0.6
    hits = [(level := fit_maxima(s).delta(100)).low <= truth <= level.high for s in sample]
    assert np.mean(hits) > 0.75
    with pytest.raises(UserError, match="expected 15 or more"):
        fit_maxima(sample[0, :10])
    assert block_maxima(np.arange(11.0), 5).tolist() == [4, 9]


# other libraries


def test_l_moments_are_those_of_lmoments3(rng):
    lmoments3 = pytest.importorskip("lmoments3")
    from lmoments3 import distr

    maxima = stats.genextreme.rvs(-0.15, 5, 2, size=300, random_state=rng)
    ours, theirs = l_moments(maxima), lmoments3.lmom_ratios(maxima, 3)
    assert np.allclose(ours, theirs, rtol=1e-10)
    fit, other = fit_maxima(maxima, "l_moments"), distr.gev.lmom_fit(maxima)
    assert (fit.location, fit.scale, -fit.shape) == pytest.approx((other["loc"], other["scale"], other["c"]), abs=2e-3)
    excesses = pareto(rng, 400)
    tail = fit_pareto(excesses, "pwm", 0.0, 1.0, 400)
    l1, l2 = lmoments3.lmom_ratios(excesses, 2)
    assert (tail.shape, tail.scale) == pytest.approx((2 - l1 / l2, l1 * (l1 / l2 - 1)))
    assert distr.gpa(c=tail.shape, scale=tail.scale).lmom(2) == pytest.approx([l1, l2], rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_clusters_and_fits_are_those_of_pyextremes(rng):
    pyextremes = pytest.importorskip("pyextremes")
    values = moving_maximum(rng, 5000, 3)
    index = pd.date_range("2000-01-01", periods=5000, freq="D")
    threshold = float(np.quantile(values, 0.97))
    theirs = pyextremes.get_extremes(pd.Series(values, index=index, name="x"), "POT", threshold=threshold, r="2D")
    ours = decluster(values, threshold, run=2)
    assert np.allclose(theirs.to_numpy(), ours.peaks) and np.array_equal(theirs.index, index[ours.where])
    model = pyextremes.models.get_model("MLE", extremes=theirs, distribution="genpareto", distribution_kwargs={"floc": threshold})
    tail = fit_pareto(ours.peaks - threshold, "ml", threshold, 1.0, 5000)
    assert (model.fit_parameters["c"], model.fit_parameters["scale"]) == pytest.approx((tail.shape, tail.scale), abs=3e-3)


# free runs


def test_return_levels_of_two_runs(rng):
    truth, heavier = pareto(rng, (4, 20_000), 0.1), pareto(rng, (4, 20_000), 0.3)
    same = {(r["quantity"], r["period"], r["system"]): r for r in compare_return_levels(pareto(rng, (4, 20_000), 0.1), truth, [1e3, 1e4])}
    assert same["return_level", 1e3, "difference"]["low"] < 0 < same["return_level", 1e3, "difference"]["high"]
    assert same["return_level", 1e4, "difference"]["note"] == "no difference is shown"
    level = same["return_level", 1e4, "truth"]
    assert level["low"] < quantile(1e-4, 0.1) < level["high"] and level["events"] > 1000
    other = {(r["quantity"], r["period"], r["system"]): r for r in compare_return_levels(heavier, truth, [1e3])}
    assert other["return_level", 1e3, "difference"]["low"] > 0 and other["shape", None, "difference"]["low"] > 0
    far = compare_return_levels(truth, truth, [1e6])
    assert any("beyond the longer series" in r["note"] for r in far)
    with pytest.raises(UserError, match="return levels of the model"):
        compare_return_levels(truth[:, :100], truth, [1e3])


# which tail


def test_the_censored_log_score_is_proper_and_counts_its_events(rng):
    law = lambda shape: ParetoTail(2.0, 1.5 if shape else 2.3, shape, np.eye(2), 0.1, 1, "ml", np.ones(30))  # noqa: E731
    assert censored_log_score(law(0.3), np.array([1.0, 5.0])) == pytest.approx(
        [-np.log(0.9), -np.log(0.1) - stats.genpareto.logpdf(3.0, 0.3, scale=1.5)]
    )
    assert np.isinf(censored_log_score(law(-0.5), np.array([9.0])))[0] and np.isnan(censored_log_score(law(0.3), np.array([np.nan])))[0]
    events = rng.random((2, 20_000)) < 0.1
    observed = np.where(events, 2 + stats.genpareto.rvs(0.3, scale=1.5, size=events.shape, random_state=rng), 0.0)
    tails = {"truth": law(0.3), "exponential": law(0.0), "doubled": ParetoTail(2.0, 3.0, 0.3, np.eye(2), 0.2, 1, "ml", np.ones(30))}
    rows = {(r["system"], r["metric"]): r for r in score_tails(tails, observed)}
    for name in ("exponential", "doubled"):
        assert rows[name, "censored_log_score_minus_truth"]["low"] > 0
    assert rows["truth", "censored_log_score"]["events"] == events.sum() > rows["truth", "censored_log_score"]["independent_events"] > 1000
    assert all(r["low"] is None for r in score_tails(tails, observed[:, :20]))
    with pytest.raises(UserError, match="above one threshold"):
        score_tails({"a": law(0.3), "b": fit_tail(observed, 4.0)}, observed)
