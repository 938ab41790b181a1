"""The comparison of families: its twin experiments, its matrix of jobs, its table, and all of it from the command line."""

import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from appa_lite.cli import main
from appa_lite.core.errors import UserError
from appa_lite.core.store import open_dataset
from appa_lite.simulators.lorenz96 import Lorenz96
from appa_lite.simulators.lorenz96_two_scale import Lorenz96TwoScale
from appa_lite.stages.matrix import Job, Matrix
from appa_lite.stages.twin import Design, analysed, forecast_dataset, oracle, truths
from appa_lite.verification.comparison import Trial, climatological_ensemble, mean_crps, score_trials, summary
from appa_lite.verification.comparison_page import comparison_page
from appa_lite.verification.verify import Verification

DESIGN = Design(trajectories=2, starts=3, spacing=4, history=2, lead=5, members=4, begin=0.0)


def silent(done: int, total: int) -> None:
    pass


def quiet_simulator(std: float) -> Lorenz96:
    return Lorenz96(forcing_std=std, forcing_memory=0.1, spinup=30)


# Twins


def test_an_oracle_without_random_forcing_is_the_truth():
    simulator = quiet_simulator(0.0)
    fields, known = truths(simulator, DESIGN, 1, None, silent)
    ahead = oracle(simulator, known, DESIGN, 1, silent)
    assert fields.shape == (2, DESIGN.frames, 1, 1, 40) and ahead.shape == (2, 3, 5, 4, 1, 1, 40)
    for start, frame in enumerate(DESIGN.initial_frames):
        expected = fields[:, frame + 1 : frame + 6, None].expand(-1, -1, 4, -1, -1, -1)
        torch.testing.assert_close(ahead[:, start], expected)


def test_an_oracle_is_exchangeable_with_the_truth():
    """The truth ranks anywhere among the members: the histogram over many starts is flat."""
    simulator = quiet_simulator(4.0)
    design = Design(trajectories=40, starts=3, spacing=12, history=2, lead=6, members=3, begin=0.0)
    fields, known = truths(simulator, design, 3, None, silent)
    ahead = oracle(simulator, known, design, 3, silent)
    true = torch.stack([fields[:, f + 6] for f in design.initial_frames], 1)
    ranks = (ahead[:, :, -1] < true[:, :, None]).sum(2)
    share = torch.bincount(ranks.flatten(), minlength=4) / ranks.numel()
    assert (share - 0.25).abs().max() < 0.03  # 120 independent maps of 40 sites
    assert ahead[:, :, 0].var(2).mean() > 1e-3


def test_two_frames_tell_the_hidden_forcing():
    """One Runge-Kutta step is invertible in the forcing that is held during it: the law given two frames is the oracle's."""
    simulator = quiet_simulator(4.0)
    state = simulator.initial(0, [0])
    for frame in range(50):
        before, state = state, simulator.advance(state, frame, 0, [0])
    x, y = before[:, :40].double(), state[:, :40].double()
    e = torch.zeros_like(x)
    step = lambda e: _step(simulator, x, e)  # noqa: E731
    for _ in range(8):
        e = e - torch.linalg.solve(torch.autograd.functional.jacobian(step, e)[0, :, 0], (step(e) - y)[0])
    torch.testing.assert_close(e, state[:, 40:].double(), atol=1e-3, rtol=1e-3)  # the states are float32


def _step(simulator: Lorenz96, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    from appa_lite.simulators.stepping import rk4

    return rk4(lambda z: simulator.tendency(z) + e, x, simulator.dt)


def test_forecasts_of_several_truths_share_a_time_axis():
    simulator = quiet_simulator(0.0)
    fields, known = truths(simulator, DESIGN, 1, None, silent)
    dataset = forecast_dataset(simulator, DESIGN, oracle(simulator, known, DESIGN, 1, silent), fields[:, DESIGN.initial_frames])
    assert len(np.unique(dataset["time"])) == 6 and dataset.sizes["prediction_timedelta"] == 6
    times = np.concatenate([DESIGN.times(n, simulator.spec.step) for n in range(2)])
    truth = xr.concat([simulator.spec.to_dataset(f, {"time": DESIGN.times(n, simulator.spec.step)}) for n, f in enumerate(fields)], "time")
    assert (np.diff(times) == np.diff(times)[0]).all()
    name = next(iter(truth.data_vars))
    valid = dataset["time"].values[4] + dataset["prediction_timedelta"].values[3]
    np.testing.assert_allclose(dataset[name].isel(time=4, prediction_timedelta=3, number=0), truth[name].sel(time=valid))


@pytest.mark.parametrize("simulator", [Lorenz96(spinup=100), Lorenz96TwoScale(spinup=60, steps_per_frame=5)], ids=["one", "two"])
def test_truths_are_exchangeable_with_members_where_states_are_known_with_an_error(simulator):
    design = Design(trajectories=40, starts=3, spacing=8, history=2, lead=6, members=3, begin=0.0)
    drawn = analysed(simulator, design, 0.2, 1, None, silent)
    assert drawn.shape == (40, 3, 4, 8, *simulator.spec.shape)
    first = drawn[:, :, :, 0]
    assert float((first - first.mean(2, keepdim=True)).std()) == pytest.approx(0.2 * 0.75**0.5, rel=0.05)
    ranks = (drawn[:, :, 1:, -1] < drawn[:, :, :1, -1]).sum(2)
    share = torch.bincount(ranks.flatten(), minlength=4) / ranks.numel()
    assert (share - 0.25).abs().max() < 0.06
    with pytest.raises(UserError, match="spacing"):
        analysed(simulator, Design(1, 2, 1, 2, 1, 2, 0.0), 0.2, 1, None, silent)


@pytest.mark.parametrize("wrong", [{"starts": 0}, {"members": 1}, {"lead": 0}])
def test_a_design_without_forecasts_is_refused(wrong):
    with pytest.raises(UserError, match="at least"):
        Design(**({"trajectories": 1, "starts": 1, "spacing": 1, "history": 1, "lead": 1, "members": 2, "begin": 0.0} | wrong))


# Jobs


def test_jobs_that_are_done_are_not_run_again_and_failures_name_their_log(tmp_path):
    good = ("simulate", "experiment=lorenz96", "size=debug", "simulator.spinup=1", f"out={tmp_path / 'a.zarr'}")
    with Matrix(tmp_path / "jobs", 1) as matrix:
        first = matrix.run([Job("a", (good,))], "one")
        assert len(first["a"]) == 1 and (tmp_path / "a.zarr").exists()
        bad = Job("b", (("simulate", "experiment=nowhere", "out=x.zarr"),))
        with pytest.raises(UserError, match=r"b failed: unknown experiment 'nowhere'.*b\.log"):
            matrix.run([Job("a", (good,)), bad], "two")
    assert Matrix(tmp_path / "jobs", 1).run([Job("a", (good,))], "three") == first
    assert "$ appa-lite simulate" in (tmp_path / "jobs" / "b.log").read_text()


def test_workers_do_not_outlive_who_started_them(tmp_path):
    program = f"""
from pathlib import Path
from appa_lite.stages.matrix import Job, Matrix
if __name__ == "__main__":
    line = ("simulate", "experiment=lorenz96", "frames=100000", "trajectories=1", "out={tmp_path / "a.zarr"}")
    Matrix(Path("{tmp_path}") / "jobs", 1).run([Job("a", (line,))], "one")
"""
    (tmp_path / "program.py").write_text(program)
    started = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], stderr=subprocess.DEVNULL)
    log = tmp_path / "jobs" / "a.log"
    wait_for(log.exists)
    children = [pid for pid, parent, _ in processes() if parent == str(started.pid)]
    assert children
    started.kill()
    started.wait()
    wait_for(lambda: not {pid for pid, _, state in processes() if not state.startswith("Z")} & set(children))


def wait_for(done, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)


def processes() -> list[list[str]]:
    """(id, parent's id, state) of all processes, by the ``ps`` of POSIX."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat="], capture_output=True, text=True, check=True)
    return [line.split()[:3] for line in listed.stdout.splitlines()]


# The table


def worlds(rng: np.random.Generator, starts: int = 24, members: int = 6):
    """Forecasts that know a part of the truth, of two families with two trainings each."""
    leads = 3
    coords = {
        "time": pd.date_range("2001-01-01", periods=starts, freq="10D").to_numpy().astype("datetime64[ns]"),
        "prediction_timedelta": pd.to_timedelta(6 * np.arange(leads), unit="h").to_numpy(),
        "number": np.arange(members),
        "x": np.arange(40.0),
    }
    dims = ("time", "prediction_timedelta", "number", "x")
    signal = rng.standard_normal((starts, leads, 1, 40))

    def make(share: float) -> xr.Dataset:
        noise = rng.standard_normal((starts, leads, members, 40))
        return xr.Dataset({"v": (dims, share * signal + (2 - share**2) ** 0.5 * noise)}, coords)

    truth = make(1.0).isel(number=0, drop=True)
    training = xr.Dataset({"v": (("trajectory", "time", "x"), 2**0.5 * rng.standard_normal((5, 200, 40)))}, {"x": coords["x"]})
    names = {"oracle": 1.0, "good-0": 0.8, "good-1": 0.8, "poor-0": 0.3, "poor-1": 0.3, "both": 0.8}
    return {name: make(share) for name, share in names.items()}, truth, training


TEST = {"trajectories": 1, "starts": 24, "members": 6, "lead": 2, "analysis_error": None}


def trials() -> list[Trial]:
    kinds = [("good", 0), ("poor", 0), ("good", 1), ("poor", 1)]
    return [Trial(f, s, f"{f}-{s}", 0.01, 500, 10.0, 0.5, 20.0, 1000) for f, s in kinds] + [
        Trial("both", 0, "both", 0.01, 1000, 20.0, 0.5, 20.0, 2000)
    ]


def test_the_table_and_page_of_a_comparison():
    forecasts, truth, training = worlds(np.random.default_rng(0))
    scorer = Verification(replicates=100, views=["mean5"], quantiles=[0.95])
    records, details = score_trials(scorer, forecasts, truth, training, trials(), "good")
    columns = {tuple(r) for r in records}
    assert len(columns) == 1 and {"seed", "system", "seconds_train", "network_calls", "seed_std"} < set(next(iter(columns)))
    found = {(r["system"], r["variable"], r["metric"], r["lead_time"]): r for r in records if r["seed"] is None}
    skill = {s: found[s, "v", "crps_fair_skill_score", 21600.0]["value"] for s in ("oracle", "good", "poor", "both", "climatology")}
    assert skill["oracle"] == pytest.approx(1) and skill["climatology"] == pytest.approx(0)
    assert skill["oracle"] > skill["good"] > skill["poor"] and skill["both"] == pytest.approx(skill["good"], abs=0.1)
    assert found["poor", "v", "crps_fair_wins_good", 21600.0]["value"] == -1
    assert found["good", "v_mean5", "spread_skill", 21600.0]["value"] == pytest.approx(1, abs=0.2)
    single = [r["value"] for r in records if r["seed"] is not None and r["system"] == "good" and r["metric"] == "crps_fair"]
    assert len(single) == 2 * 2 * 4 and found["good", "v", "crps_fair", 21600.0]["seeds"] == 2
    page = comparison_page(
        records,
        trials(),
        {"experiment": "x", "test": TEST, "seeds": 2, "reference": "good", "free": {"runs": 0, "frames": 1, "periods": []}},
        ["a"],
        details,
    )
    assert all(word in page for word in ("CRPS skill", "worse", "Extremes", "network calls", "v mean5", "all leads together"))
    assert all(word in page for word in ("rank of the truth", "share of members", "relative economic value", "wavenumber"))
    assert "good" in summary(records, trials())


def test_the_climatological_ensemble_has_the_law_of_the_training_data():
    forecasts, truth, training = worlds(np.random.default_rng(1), starts=60, members=10)
    drawn = climatological_ensemble(training, forecasts["oracle"], 0)
    assert set(drawn["v"].dims) == set(forecasts["oracle"]["v"].dims)
    assert float(drawn["v"].std()) == pytest.approx(2**0.5, rel=0.03)
    assert not np.array_equal(drawn["v"].isel(time=0), drawn["v"].isel(time=1))
    exact = 2 / np.pi**0.5  # sigma / sqrt(pi), in standard deviations of a truth of variance 2... of the law itself
    assert mean_crps(drawn, truth) == pytest.approx(exact / 2, rel=0.05)


# From the command line


def test_compare_from_the_command_line(tmp_path, capsys):
    families = "families={next_state_diffusion: null, flow_residual: null, latent_diffusion: null}"
    line = ["compare", "experiment=lorenz96_compare", "size=debug", "budget=3s", f"out={tmp_path / 'c'}", families]
    assert main(line) == 0
    out = tmp_path / "c"
    records = json.loads((out / "scores.json").read_text())
    learned = {"fgn", "fgn_ensemble", "deterministic", "deterministic_perturbed"}
    assert {r["system"] for r in records} == learned | {"oracle", "climatology", "persistence"}
    spread = {r["system"]: r["value"] for r in records if (r["metric"], r["variable"], r["lead_time"]) == ("spread", "u", 21600.0)}
    assert spread["deterministic"] == 0 < spread["deterministic_perturbed"]
    assert {r["system"] for r in records if r["metric"] == "free_run_lost"} == {"fgn", "deterministic"}
    assert {r["seed"] for r in records} == {None, 0, 1}
    assert all(r["network_calls"] > 0 for r in records if r["system"] == "fgn")
    assert "report.html" in capsys.readouterr().out and (out / "report.html").stat().st_size > 10_000
    assert open_dataset(out / "forecasts" / "fgn-0_0.zarr").sizes["number"] == 2
    before = (out / "forecasts" / "fgn-0_0.zarr" / "zarr.json").stat().st_mtime_ns
    assert main(line) == 0  # nothing is trained or forecast again
    assert (out / "forecasts" / "fgn-0_0.zarr" / "zarr.json").stat().st_mtime_ns == before
    assert main([*line, "seeds=3"]) == 2 and "other settings (seeds)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("families={fgn: []}", "families"),
        ("ensembles={fgn: fgn}", "not a new name"),
        ("reference=nobody", "is none of"),
        ("seeds=0", "at least 1"),
        ("variants={mine: {family: nobody, key: batch, values: [1]}}", "needs a new name"),
        ("free.runs=99", "at most one"),
    ],
)
def test_compare_refuses_what_cannot_be(tmp_path, capsys, key, says):
    assert main(["compare", "experiment=lorenz96_compare", "size=debug", f"out={tmp_path / 'c'}", key]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "c").exists()
