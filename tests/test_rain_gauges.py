"""Rain between gauges: the exact posterior as an assimilator, scores by the distance to gauges, and the commands in a row."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from appa_lite.config import compose
from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_datetime
from appa_lite.forecasters.hidden_gaussian import HiddenGaussian
from appa_lite.observations import build_observation
from appa_lite.simulators.advected_rain import AdvectedRain
from appa_lite.simulators.base import trajectories
from appa_lite.simulators.gaussian_process import GaussianProcess
from appa_lite.simulators.lorenz96 import Lorenz96
from appa_lite.stages import observe, reanalysis, simulate, tails, verify
from appa_lite.verification.distance import distances
from appa_lite.verification.verify import Verification


def gauges(simulator, truth: torch.Tensor, number: int, error: float) -> pd.DataFrame:
    """Rows at random cells of every frame of (T, C, H, W), with errors."""
    rng, n = np.random.default_rng(0), simulator.n
    rows = []
    for t, time in enumerate(to_datetime(simulator.spec.step * np.arange(len(truth)))):
        cells = rng.choice(n * n, number, replace=False)
        values = truth[t, 0].flatten()[cells].numpy() + error * rng.standard_normal(number)
        rows.append(pd.DataFrame({"time": time, "y": cells // n, "x": cells % n, "observation": values}))
    return pd.concat(rows, ignore_index=True).assign(variable=simulator.spec.names[0], error_std=error)


# The exact posterior as an assimilator


def test_frames_without_memory_have_chains_of_their_own_and_the_posterior_of_kriging():
    simulator = GaussianProcess(n=4, memory=0.0)
    truth = trajectories(simulator, 5, 1, 2)[0].double()
    table = gauges(simulator, truth, 3, 0.3)
    times = to_datetime(simulator.spec.step * np.arange(2))
    draws = HiddenGaussian(simulator, 40, 20).assimilate(build_observation(table, simulator.spec, times)[0], times, range(400), 0)
    k = simulator.covariance
    for frame, rows in enumerate(table.groupby("time").indices.values()):
        a = torch.zeros(3, 16, dtype=torch.float64)
        a[range(3), (table.y[rows] * 4 + table.x[rows]).tolist()] = 1
        gain = k @ a.T @ torch.linalg.inv(a @ k @ a.T + 0.09 * torch.eye(3, dtype=torch.float64))
        mean, variance = gain @ torch.tensor(table.observation[rows].tolist(), dtype=torch.float64), (k - gain @ a @ k).diagonal()
        x = draws[:, frame].flatten(1).double()
        assert ((x.mean(0) - mean).abs() < 5 * (variance / 400).sqrt()).all()
        torch.testing.assert_close(x.var(0), variance, rtol=0.35, atol=0.02)


def test_only_gaussian_states_have_an_exact_posterior():
    with pytest.raises(UserError, match="Gaussian process"):
        HiddenGaussian(Lorenz96())
    with pytest.raises(UserError, match="steps >= 1"):
        HiddenGaussian(AdvectedRain(), steps=0)


def test_ranks_of_the_truth_in_the_exact_posterior_are_flat_at_and_between_gauges():
    """Zeros included: a dry truth among dry members takes a rank at random."""
    simulator, frames = AdvectedRain(n=8, length=1.5, memory=0.0), 40
    truth = trajectories(simulator, 7, 1, frames)[0].double()
    times = to_datetime(simulator.spec.step * np.arange(frames))
    table = gauges(simulator, truth, 4, 0.1)
    members = HiddenGaussian(simulator, 50, 40).assimilate(build_observation(table, simulator.spec, times)[0], times, range(7), 1)
    analysis = simulator.spec.to_dataset(members.swapaxes(0, 1), {"time": times, "number": np.arange(7)})
    analysis.attrs["field_spec"] = json.dumps(simulator.spec.to_dict())
    truth = simulator.spec.to_dataset(truth, {"time": times}).assign_attrs(analysis.attrs)
    scores = Verification(replicates=50, spectra=False).evaluate({"exact": analysis}, truth, observed=table)
    ranks = {r["variable"]: r["frequencies"] for r in scores.details["ranks"]}
    assert set(ranks) == {"rain", "rain_observed", "rain_near", "rain_beyond"}
    for name in ("rain_observed", "rain_near", "rain_beyond"):  # neighbours' ranks go together: as many are independent as frames
        assert np.abs(np.array(ranks[name]) - 1 / 8).max() < 4.5 * (1 / 8 * 7 / 8 / frames) ** 0.5


# Scores by distance


@pytest.mark.parametrize("periodic", [True, False])
def test_distances_are_brute_force(periodic):
    rng = np.random.default_rng(1)
    times = pd.date_range("2001-01-01", periods=2, freq="h").to_numpy()
    coords = {"time": times, "y": 10.0 * np.arange(6), "x": 5.0 * np.arange(9)}
    spec = json.dumps({"grid": {"periodic": [periodic, periodic]}})
    truth = xr.Dataset({"r": (("time", "y", "x"), rng.standard_normal((2, 6, 9)))}, coords, {"field_spec": spec})
    table = pd.DataFrame({"time": times[[1, 1, 1]], "y": [-4.0, 20.0, 33.0], "x": [1.0, 40.0, 12.0], "variable": "r", "observation": 0.0})
    observed, near, beyond = (view.keep for view in distances(table, truth)["r"])
    assert (observed.astype(int) + near + beyond == 1).all()
    assert bool(beyond[0].all())  # nobody looked then
    y, x = np.mgrid[:6, :9]
    away = np.full((6, 9), np.inf)
    for row in table.itertuples():
        dy, dx = np.abs(y - row.y / 10), np.abs(x - row.x / 5)
        if periodic:
            dy, dx = np.minimum(dy, 6 - dy), np.minimum(dx, 9 - dx)
        away = np.minimum(away, np.hypot(dy, dx))
        at = (round(row.y / 10) % 6, round(row.x / 5) % 9) if periodic else (max(round(row.y / 10), 0), round(row.x / 5))
        assert bool(observed[1][at])
    assert int(observed[1].sum()) == 3
    assert np.array_equal(near[1].values, (away <= 2) & ~observed[1].values)
    with pytest.raises(UserError, match="no observation falls on a time"):
        distances(table.assign(time=np.datetime64("1999-01-01", "ns")), truth)


# The commands


def test_gauges_end_to_end(tmp_path):
    """What launch/rain_gauges.sh does."""

    def go(stage, command, *overrides):
        stage.run(compose(command, ["experiment=advected_rain", "size=debug", *overrides]))

    still = ["simulator.n=8", "simulator.memory=0"]
    go(tails, "tails", "priors=[gaussianize]", f"out={tmp_path}/tails")
    go(simulate, "simulate", *still, "trajectories=1", "frames=3", "seed=1", f"out={tmp_path}/truth.zarr")
    go(observe, "observe", f"truth={tmp_path}/truth.zarr", f"out={tmp_path}/gauges.parquet")
    shared = [f"observations={tmp_path}/gauges.parquet", "members=3"]
    go(reanalysis, "reanalysis", f"checkpoint={tmp_path}/tails/gaussianize/seed_0/model", *shared, f"out={tmp_path}/model.zarr")
    go(reanalysis, "reanalysis", "forecaster=hidden_gaussian", *still, *shared, f"out={tmp_path}/exact.zarr")
    against = ["verification=quick", f"forecast={tmp_path}/model.zarr", f"observed={tmp_path}/gauges.parquet"]
    exact = f"baselines={{exact: {tmp_path}/exact.zarr}}"
    go(verify, "verify", *against, exact, f"truth={tmp_path}/truth.zarr", f"out={tmp_path}/truth.json")
    go(verify, "verify", *against, f"truth={tmp_path}/exact.zarr", "trajectory=2", f"out={tmp_path}/exact.json")
    for name, systems in (("truth", {"model", "exact"}), ("exact", {"model"})):
        table = pd.read_json(tmp_path / f"{name}.json")
        assert {"rain", "rain_near", "rain_observed", "rain_beyond"} >= set(table.variable) >= {"rain", "rain_observed"}
        assert set(table.system) == systems and "rank_u" in set(table.metric)
    with pytest.raises(UserError, match="trajectory=3 is not there"):
        go(verify, "verify", *against, f"truth={tmp_path}/exact.zarr", "trajectory=3", f"out={tmp_path}/exact.json")
