"""What a result may not depend on: batch, ensemble size, order and files of the rows, processes. On the shipped Lorenz-96 model."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from appa_lite import cli, open_dataset

MODEL = ("experiment=lorenz96", f"checkpoint={Path(__file__).parents[1] / 'checkpoints' / 'lorenz96'}", "sampler.steps=3")
COMMANDS = {
    "reanalysis": ("observations={rows}", "withhold=10%"),
    "filter": ("observations={rows}", "withhold=10%", "start=2000-01-03T06", "window=10"),
    "forecast": ("initial=truth.zarr", "lead=1d", "initial_time=[2000-01-02,2000-01-03]"),
}
#: errors of other laws have systems of their own
LAWS = {
    "reanalysis student": ("network.student_t=4",),
    "reanalysis correlated": ("network.error_correlation={u: {length: 3.0}}",),
}


@pytest.fixture(scope="module")
def ring(tmp_path_factory) -> Path:
    """A truth, its observations, and the same rows in another order, some twice, in two files."""
    here = tmp_path_factory.mktemp("invariance")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert cli.main(["simulate", "experiment=lorenz96", "trajectories=1", "frames=16", "spinup=20", "out=truth.zarr"]) == 0
        assert cli.main(["observe", "experiment=lorenz96", "truth=truth.zarr", "out=rows.parquet"]) == 0
    table = pd.read_parquet(here / "rows.parquet")
    shuffled = pd.concat([table, table[5:9]]).sample(frac=1, random_state=0, ignore_index=True)
    shuffled[:11].to_csv(here / "one.csv", index=False)
    shuffled[11:].to_parquet(here / "two.parquet")
    return here


def run(name: str, *settings: str, rows: str, out: str) -> None:
    command = name.split()[0]
    given = [word.format(rows=rows) for word in COMMANDS[command]]
    assert cli.main([command, *MODEL, *given, *LAWS.get(name, ()), *settings, f"out={out}"]) == 0


@pytest.mark.parametrize("name", [*COMMANDS, *LAWS])
def test_results_depend_on_nothing_but_the_problem(ring, name, monkeypatch):
    """Five members, two at a time, from one file, in one process; and the first three of them all at once from two files,
    whose rows stand anyhow, shared by two processes."""
    monkeypatch.chdir(ring)
    run(name, "members=5", "batch=2", rows="rows.parquet", out="first.nc")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        run(name, "members=3", "batch=3" if name == "filter" else "batch=1", rows="[one.csv,two.parquet]", out="second.nc")
    with open_dataset("first.nc") as first, open_dataset("second.nc") as second:
        a, b = first["u"].load().isel(number=slice(3)), second["u"].load()
    assert a.dims == b.dims and a.indexes["number"].equals(b.indexes["number"])
    assert float(b.std("number").mean()) > 0.01
    assert_allclose(a.values, b.values, atol=2e-3 * float(np.std(b.values)))
    for path in ring.glob("*.nc"):
        path.unlink()
