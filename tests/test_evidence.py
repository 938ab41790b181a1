"""What an analysis says about itself is right where the posterior is; errors that were stated wrong are found."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from test_filter import LINEAR, gaussian, twin

import appa_lite
from appa_lite.cli import main
from appa_lite.forecasters.errors import estimate_errors, innovations
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.observations import build_observation
from appa_lite.observations.rows import hashes, withheld
from appa_lite.stages import assimilation
from appa_lite.verification.innovations import effective_members, evidence, used_sums, width, withheld_sums


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    here = tmp_path_factory.mktemp("evidence")
    gaussian(here / "model")
    return here


@pytest.fixture(scope="module")
def model(directory):
    return appa_lite.load(directory / "model")


def of(analysis: xr.Dataset) -> dict:
    (record,) = json.loads(analysis.attrs["evidence"])
    return record


# The two ratios and the ranks


def bimodal(count: int, members: int, error: float, claimed: float = 1.0) -> tuple[np.ndarray, ...]:
    """Observed values, exact draws of the posteriors, and values withheld, of independent unknowns with two modes each."""
    rng = np.random.default_rng(0)
    x = rng.choice([-2.0, 2.0], count) + 0.5 * rng.standard_normal(count)
    y, z = (x + error * rng.standard_normal(count) for _ in range(2))
    r = (claimed * error) ** 2
    gain = 0.25 / (0.25 + r)
    odds = np.exp(4 * y / (0.25 + r))  # p(upper mode | y) / p(lower mode | y)
    upper = rng.random((members, count)) < odds / (1 + odds)
    mode = np.where(upper, 2.0, -2.0)
    return y, mode + gain * (y - mode) + np.sqrt(gain * r) * rng.standard_normal((members, count)), z


@pytest.mark.parametrize("error", [0.3, 2.0])
def test_ratios_are_one_and_ranks_flat_whatever_the_prior(error):
    y, ensemble, z = bimodal(40000, 9, error)
    kinds, variance = np.full(len(y), "u", object), np.full(len(y), error**2)
    sums = used_sums(y, ensemble, variance, kinds, ["u"]) + withheld_sums(z, ensemble, variance, kinds, ["u"], np.random.default_rng(1))
    (found,) = evidence(sums, ["u"], 9)
    assert abs(found["chi_square"] - 1) < 0.03 and abs(found["desroziers"] - 1) < 0.1 and abs(found["bias"]) < 0.02
    assert abs(found["spread_skill"] - 1) < 0.02
    assert found["coverage_expected"] == 0.8 and abs(found["coverage"] - 0.8) < 0.01
    ranks = np.array(found["ranks"])
    assert len(ranks) == 10 and ranks.sum() == 40000 and ((ranks - 4000) ** 2 / 4000).sum() < 27.9  # 0.1 % of chi-square with 9


def test_wrong_errors_show():
    for claimed in (0.5, 2.0):
        y, ensemble, _ = bimodal(20000, 9, 0.5, claimed)
        kinds = np.full(len(y), "u", object)
        (found,) = evidence(used_sums(y, ensemble, np.full(len(y), (claimed * 0.5) ** 2), kinds, ["u"]), ["u"], 9)
        assert (found["chi_square"] - 1) * (1 - claimed) > 0.2


def test_sums_add_up():
    y, ensemble, z = bimodal(300, 5, 1.0)
    kinds, r = np.where(np.arange(300) % 3, "a", "b").astype(object), np.ones(300)
    whole = used_sums(y, ensemble, r, kinds, ["a", "b"])
    parts = [used_sums(y[s], ensemble[:, s], r[s], kinds[s], ["a", "b"]) for s in (slice(100), slice(100, None))]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-10)
    empty = slice(0)
    assert not withheld_sums(z[empty], ensemble[:, empty], r[empty], kinds[empty], ["a"], np.random.default_rng()).any()
    assert whole.shape == (2, width(5)) and evidence(0 * whole, ["a", "b"], 5) == []


def test_effective_members():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 6, 20000))

    def count(values: np.ndarray) -> float:
        return effective_members(xr.Dataset({"u": (("time", "number", "x"), values)}))

    assert abs(count(x) - 6) < 0.01
    assert abs(count(np.repeat(x[:, :3], 2, axis=1)) - 3) < 0.01
    assert abs(count(x[:, :1] * np.arange(6)[:, None]) - 2) < 1e-6
    assert count(x[:, :1] * np.ones((6, 1))) == pytest.approx(1)


def test_the_analysis_of_the_right_prior_has_good_evidence(model):
    _, table = twin(60, 5, seed=3)
    found = of(model.reanalysis(table, LINEAR, "withhold=30%", members=60))
    assert abs(found["chi_square"] - 1) < 0.25 and abs(found["desroziers"] - 1) < 0.6 and abs(found["spread_skill"] - 1) < 0.15
    assert abs(found["coverage"] - found["coverage_expected"]) < 0.1
    assert found["rows"] + found["withheld"] == 300 and 60 < found["withheld"] < 120 and sum(found["ranks"]) == found["withheld"]
    wrong = of(model.reanalysis(table.assign(error_std=0.1), LINEAR, members=60))
    assert wrong["chi_square"] > 2


# Rows that are kept out


def test_who_is_withheld_depends_on_nothing_else():
    _, table = twin(200, 5)
    chosen = withheld(table, 0.1, seed=1)
    assert abs(chosen.mean() - 0.1) < 0.03
    order = np.random.default_rng(0).permutation(len(table))
    np.testing.assert_array_equal(withheld(table.iloc[order], 0.1, seed=1), chosen[order])
    np.testing.assert_array_equal(withheld(table.assign(observation=0.0, error_std=9.0), 0.1, seed=1), chosen)
    np.testing.assert_array_equal(withheld(table[:300], 0.1, seed=1), chosen[:300])
    assert (chosen <= withheld(table, 0.3, seed=1)).all() and (chosen != withheld(table, 0.1, seed=2)).any()
    assert not withheld(table, 0.0, seed=1).any()
    assert len(np.unique(hashes(table))) == len(table)


@pytest.mark.parametrize("command", ["reanalysis", "filter"])
def test_withheld_rows_never_enter(model, command):
    _, table = twin(8, 4)
    table["station"] = (table.index % 5).astype(str)
    out = withheld(table.assign(station=table["station"]), 0.2, 0) | (table["station"] == "3").to_numpy()
    choices = ("sampler.steps=4", "withhold=0.2", "withhold_stations=[3]")
    run = getattr(model, command)
    first, second = (run(t, *choices, members=2) for t in (table, table.assign(observation=table["observation"].mask(out, 1e3))))
    np.testing.assert_array_equal(first["u"].values, second["u"].values)
    assert of(first)["withheld"] == out.sum() and of(second)["crps"] > 100
    without = run(table[~out], "sampler.steps=4", "start=2020-01-01T00:00", "end=2020-01-01T07:00", members=2)
    np.testing.assert_allclose(without["u"].values, first["u"].values, atol=1e-4)


@pytest.mark.parametrize("command", ["reanalysis", "filter"])
def test_the_order_of_rows_changes_nothing(model, command):
    _, table = twin(6, 4)
    shuffled = pd.concat([table, table[3:5]]).sample(frac=1, random_state=1)
    a, b = (getattr(model, command)(t, "sampler.steps=4", "withhold=20%", members=2) for t in (table, shuffled))
    np.testing.assert_array_equal(a["u"].values, b["u"].values)
    assert a.attrs["evidence"] == b.attrs["evidence"]
    assert json.loads(b.attrs["observation_counts"])["duplicate"] == 2


@pytest.mark.parametrize(("text", "value"), [(None, 0.0), ("10%", 0.1), (0.25, 0.25), ("0.5 %", 0.005)])
def test_shares(text, value):
    assert assimilation.share(text) == pytest.approx(value)
    for wrong in ("some", "-1%", "100%", 1.5):
        with pytest.raises(appa_lite.UserError, match=f"withhold={wrong}"):
            assimilation.share(wrong)


# Errors that nobody stated right


def learn(directory, table: pd.DataFrame, bias: bool = False) -> dict:
    checkpoint = Checkpoint.load(directory / "model")
    times = np.unique(table["time"].to_numpy())
    observation, _ = build_observation(table, checkpoint.spec, times)
    return estimate_errors(innovations(checkpoint, observation, times), assimilation.kinds(observation.provenance), bias)


@pytest.mark.parametrize("claimed", [0.5, 2.0])
def test_errors_stated_wrong_by_a_factor_of_two_are_recovered(directory, claimed):
    """Over several pieces of the period."""
    _, table = twin(120, 8, seed=4)
    found = learn(directory, table.assign(error_std=claimed * 0.4))["u"]
    assert abs(found.factor * claimed - 1) < 0.1 and found.uncertainty < 0.06 and found.bias == 0


def test_instruments_are_told_apart(directory):
    """One stated right, one stated wrong and biased."""
    _, table = twin(80, 8, seed=5, error=0.8)
    poor = np.arange(len(table)) % 2 == 0
    table["type"] = np.where(poor, "poor", "good")
    table.loc[poor, "error_std"] *= 2
    table.loc[poor, "observation"] += 0.5
    found = learn(directory, table, bias=True)
    for name, factor in (("u good", 1.0), ("u poor", 0.5)):
        assert abs(np.log(found[name].factor / factor)) < min(3 * found[name].uncertainty, 0.2)
    assert abs(found["u poor"].bias - found["u good"].bias - 0.5) < 0.2
    assert abs(found["u good"].bias) < 3 * found["u good"].bias_error


def test_stations_are_told_apart(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, table = twin(60, 8, seed=5, error=0.8)
    table["station"] = np.where(table["x"] < 6, "west", "east")
    table.loc[table["station"] == "west", "error_std"] *= 2
    table.to_csv("stated.csv", index=False)
    command = ["estimate", "experiment=lorenz96", "size=debug", f"checkpoint={directory / 'model'}", "observations=stated.csv"]
    assert main([*command, "out=estimated.parquet", "by=station"]) == 0
    assert "u west  error_std x 0." in capsys.readouterr().out
    out = pd.read_parquet("estimated.parquet")
    assert np.abs(np.log(out["error_std"] / 0.8)).max() < 0.3
    assert main([*command, "out=estimated.parquet", "by=ship"]) == 2


def test_the_command_writes_a_file_that_fits(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, table = twin(60, 6, seed=5)
    table.assign(error_std=0.8).to_csv("stated.csv", index=False)
    command = ["estimate", "experiment=lorenz96", "size=debug", f"checkpoint={directory / 'model'}", "observations=stated.csv"]
    assert main([*command, "out=estimated.parquet", "bias=true"]) == 0
    assert "u  error_std x 0." in capsys.readouterr().out
    out = pd.read_parquet("estimated.parquet")
    assert len(out) == len(table) and abs(out["error_std"].iloc[0] / 0.4 - 1) < 0.12 and "bias" in out
    model = appa_lite.load(directory / "model")
    before, after = (of(model.reanalysis(f, LINEAR, members=40)) for f in ("stated.csv", "estimated.parquet"))
    assert abs(after["chi_square"] - 1) < 0.2 < abs(before["chi_square"] - 1)


def test_gross_errors_barely_matter(model):
    """5 % of the values are wrong by ten standard deviations: the analysis is as good as if they had been thrown out."""
    x, table = twin(40, 8, seed=6)
    rng = np.random.default_rng(7)
    gross = rng.random(len(table)) < 0.05
    spoiled = table.assign(observation=table["observation"] + 10 * 0.4 * gross * rng.choice([-1, 1], len(table)))
    rows = {"clean": table, "thrown out": table[~gross], "spoiled": spoiled}
    found = {name: model.reanalysis(t, LINEAR, members=100) for name, t in rows.items()}
    found |= {
        f"{name}, judged": model.reanalysis(rows[name], LINEAR, "gross_error_probability=0.05", members=100)
        for name in ("clean", "spoiled")
    }
    rmse = {name: float(np.sqrt(((a["u"].mean("number").values - x) ** 2).mean())) for name, a in found.items()}
    assert rmse["spoiled"] > 1.5 * rmse["clean"]
    assert rmse["spoiled, judged"] < min(1.04 * rmse["thrown out"], 1.08 * rmse["clean"])
    assert rmse["clean, judged"] < 1.02 * rmse["clean"]
    assert abs(json.loads(found["spoiled, judged"].attrs["observation_counts"])["gross error"] - gross.sum()) <= 2


# Where it is shown


def test_from_files_to_a_page(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, table = twin(10, 5)
    table.to_parquet("observations.parquet")
    command = ["reanalysis", "experiment=lorenz96", "size=debug", f"checkpoint={directory / 'model'}", "observations=observations.parquet"]
    assert main([*command, "withhold=20%", "gross_error_probability=0.01", "out=reanalysis.nc", "sampler.steps=4", "members=4"]) == 0
    said = capsys.readouterr().out
    assert "withheld values inside the central 60 % interval: u " in said and "effective members: " in said and "Desroziers" in said
    with appa_lite.open_dataset("reanalysis.nc") as written:
        assert 1 < written.attrs["effective_members"] <= 4 and of(written)["kind"] == "u"
    assert main(["report", "run=.", "out=report.html"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Desroziers ratio" in page and "Values never assimilated" in page


def test_probes_and_weights_are_reproducible(directory):
    _, table = twin(10, 4)
    checkpoint = Checkpoint.load(directory / "model")
    times = np.unique(table["time"].to_numpy())
    observation, _ = build_observation(table, checkpoint.spec, times)
    (a,), (b,) = (innovations(checkpoint, observation, times) for _ in range(2))
    assert torch.equal(a.probes(3, 1, 0), b.probes(3, 1, 0)) and set(a.probes(3, 1).flatten().tolist()) == {-1.0, 1.0}
