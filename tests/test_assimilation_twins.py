"""The comparison of assimilation methods: its means over truths, methods that diverge, and all of it from the command line."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy.stats import t as student

from appa_lite.cli import main
from appa_lite.core.errors import DivergedError, UserError
from appa_lite.core.store import open_dataset
from appa_lite.forecasters.ensemble import Ensemble
from appa_lite.simulators.lorenz96 import Lorenz96
from appa_lite.verification.assimilation_page import assimilation_page
from appa_lite.verification.assimilation_scores import climatology_of, jackknife, over_truths, score_forecasts, score_truth, summary
from appa_lite.verification.verify import Verification

ROOT = Path(__file__).parents[1]
SCORER = Verification(replicates=20, spectra=False)


def world(rng: np.random.Generator, frames: int = 30, members: int = 8):
    """A truth of variance one, and analyses whose members and truth are exchangeable draws around a centre."""
    dims, coords = ("time", "x"), {"time": pd.date_range("2001-01-01", periods=frames, freq="6h").values, "x": np.arange(40.0)}

    def analysis(error: float, factor: float = 1.0) -> xr.Dataset:
        centre = truth["v"].values[:, None] + error * rng.standard_normal((frames, 1, 40))
        values = centre + factor * error * rng.standard_normal((frames, members, 40))
        return xr.Dataset({"v": (("time", "number", "x"), values)}, coords | {"number": np.arange(members)})

    truth = xr.Dataset({"v": (dims, rng.standard_normal((frames, 40)))}, coords)
    return truth, analysis


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).standard_normal((7, 1))
    value, low, high = jackknife(lambda a: float(a.mean()), values, 0.9)
    half = student.ppf(0.95, 6) * values.std(ddof=1) / 7**0.5
    assert value == pytest.approx(values.mean()) and high - value == pytest.approx(half) and value - low == pytest.approx(half)
    assert jackknife(lambda a: float(a.mean()), values[:1], 0.9)[1:] == (None, None)


def test_means_over_truths_differences_and_lost_truths():
    rng, records, errors = np.random.default_rng(1), [], []
    for number in range(6):
        truth, analysis = world(rng)
        error = 0.2 + 0.02 * number
        errors.append(error)
        systems = {
            "good": analysis(error),
            "narrow": analysis(1.5 * error, 0.5),
            "wild": None if number == 0 else analysis(3.0 if number == 1 else error),
        }
        climatology = climatology_of(truth)
        records += score_truth(SCORER, systems, truth, climatology, number)
    table = {(r["system"], r["metric"]): r for r in over_truths(records, "good")}
    members = 8
    factor = (1 + 1 / members) ** 0.5  # the mean of finitely many members
    assert table["good", "rmse"]["value"] == pytest.approx(np.mean(errors) * factor, rel=0.03) and table["good", "rmse"]["count"] == 6
    assert table["good", "spread_skill"]["value"] == pytest.approx(1, abs=0.03)
    assert table["narrow", "spread_skill"]["value"] < 0.6 and table["narrow", "rmse_wins_good"]["value"] == -1
    assert table["narrow", "rmse_minus_good"]["low"] > 0 and ("good", "rmse_minus_good") not in table
    lost = table["wild", "diverged"]
    assert lost["value"] * lost["count"] == 2 and table["wild", "rmse"]["count"] == 4  # not in the mean of what holds
    assert table["wild", "rmse_wins_good"]["value"] == 0 and table["climatology", "rmse"]["value"] == pytest.approx(1, rel=0.05)
    blank = {"members": 8, "seconds_per_member": 0.5, "network_calls": 0.0}
    whole = [r | blank for r in (*over_truths(records, "good"), *records)]
    assert "2 of 6" in summary(whole)
    tuned = [{"method": "wild", "forecaster.radius": 8, "seconds": 1.0, "variable": "v", "rmse": 0.3, "best": True}]
    page = assimilation_page(whole, tuned, {"experiment": "x", "twins": {"truths": 6, "frames": 30}}, "good", ["a command"])
    assert all(word in page for word in ("worse", "2 of 6", "forecaster.radius 8", "a command"))


def test_forecasts_are_scored_by_lead_beside_persistence():
    rng, records = np.random.default_rng(3), []
    for number in range(3):
        truth, analysis = world(rng)
        leads = np.arange(3) * np.timedelta64(6, "h").astype("timedelta64[ns]")
        values = analysis(0.3).isel(time=slice(0, 3)).rename(time="prediction_timedelta").assign_coords(prediction_timedelta=leads)
        forecast = values.expand_dims(time=truth["time"].values[:1])
        records += score_forecasts(SCORER, {"good": forecast}, truth, climatology_of(truth), number)
    table = {(r["lead_time"], r["system"], r["metric"]): r["value"] for r in over_truths(records, "good")}
    assert {lead for lead, _, _ in table} == {21600.0, 43200.0}
    assert table[21600.0, "good", "rmse"] < 0.5 < 1.2 < table[21600.0, "persistence", "rmse"]
    assert table[21600.0, "persistence", "rmse_wins_good"] == -1 and "6 h" in summary(records + over_truths(records, "good"))


def test_where_every_method_blew_up_the_climatology_is_left():
    truth, _ = world(np.random.default_rng(2))
    table = over_truths(score_truth(SCORER, {"wild": None}, truth, climatology_of(truth), 0), "wild")
    found = {(r["system"], r["metric"]): r["value"] for r in table}
    assert found["wild", "diverged"] == 1 and found["wild", "rmse"] is None and found["climatology", "rmse"] > 0.9


def test_members_that_run_away_are_told_from_mistakes():
    simulator = Lorenz96(spinup=5)
    ensemble = Ensemble(simulator, 0, [0, 1])
    with pytest.raises(DivergedError, match="after frame 3"):
        ensemble.advance(torch.linspace(-1e30, 1e30, 80).view(2, 40), 3)
    assert issubclass(DivergedError, UserError) and issubclass(DivergedError, FloatingPointError)


# From the command line


@pytest.fixture
def checkout(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)  # methods name the shipped models


def test_methods_are_compared_from_the_command_line(tmp_path, capsys, checkout):
    out = tmp_path / "c"
    line = ["compare", "experiment=lorenz96_assimilation", "size=debug", "processes=1", f"out={out}"]
    assert main(line) == 0
    records = json.loads((out / "scores.json").read_text())
    assert {r["system"] for r in records} == {"latent_diffusion", "optimal_interpolation", "enkf", "letkf", "climatology", "persistence"}
    assert {r["seed"] for r in records} == {None, 0, 1} and len({tuple(r) for r in records}) == 1
    ours = next(r for r in records if r["system"] == "latent_diffusion")
    assert ours["network_calls"] > 0 and ours["members"] == 4 and ours["seconds_per_member"] > 0
    ahead = {r["system"]: r for r in records if r["lead_time"] and r["seed"] is None}
    assert set(ahead) == {"latent_diffusion", "enkf", "climatology", "persistence"} and ahead["enkf"]["members"] == 6
    assert sorted({r["lead_time"] for r in records if r["lead_time"]}) == [21600.0, 43200.0]
    residuals = {r["system"]: r["value"] for r in records if r["metric"] == "one_step_residual"}
    assert 0 < residuals["latent_diffusion"] < residuals["optimal_interpolation"]
    chosen = next(p for p in (out / "tuning").glob("enkf-*.json"))
    assert sum(r["best"] for r in json.loads(chosen.read_text())) == 1
    (analysis,) = (out / "analyses").glob("enkf-*/1.zarr")
    assert open_dataset(analysis).sizes["time"] == 12 and "report.html" in capsys.readouterr().out
    commands = (out / "commands.txt").read_text()
    assert "appa-lite tune" in commands and "forecaster.inflation=" in commands
    before = (analysis / "zarr.json").stat().st_mtime_ns
    assert (
        main([*line, "methods={latent_diffusion: null, letkf: null}", "forecasts={latent_diffusion: null}"]) == 0
    )  # nothing is analysed again
    assert (analysis / "zarr.json").stat().st_mtime_ns == before
    assert main([*line, "twins.frames=9"]) == 2 and "other settings (twins)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("methods={enkf: 'forecaster=enkff'}", "unknown forecaster 'enkff'"),
        ("methods={latent_diffusion: 'checkpoint=nowhere'}", "no model at 'nowhere'"),
        ("network=null", "network"),
        ("reference=nobody", "is none of"),
        ("twins.truths=0", "at least 1"),
        ("forecasts={letkf: 'nobody forecaster=simulator_ensemble'}", "first a method"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, checkout, key, says):
    assert main(["compare", "experiment=lorenz96_assimilation", "size=debug", f"out={tmp_path / 'c'}", key]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "c").exists()
