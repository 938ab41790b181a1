"""The command line as a user meets it: in a process of its own, in another directory."""

import shlex
import subprocess
import sys
import time

import pandas as pd
import pytest
import xarray as xr
from omegaconf import OmegaConf

from appa_lite import __version__, cli
from appa_lite.config import describe, options
from appa_lite.core.errors import UserError


def test_help_is_quick(appa_lite):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        text = appa_lite("--help").stdout
        times.append(time.perf_counter() - start)
    assert all(command in text for command in cli.COMMANDS)
    assert min(times) < 1.5
    assert appa_lite("--version").stdout.strip() == f"appa-lite {__version__}"
    assert "usage" in appa_lite(status=2).stdout


def test_help_imports_nothing_heavy(appa_lite, tmp_path):
    code = "import sys; from appa_lite.cli import main; main(['observe', '--help']); print({'torch', 'hydra', 'xarray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_table_of_commands_is_that_of_the_files():
    assert sorted(cli.COMMANDS) == options("")


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_of_a_command_lists_every_key(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for key, default, meaning in describe(command):
        assert f"{key}={default}" in text and meaning in text
    assert f"appa-lite {command} {cli.COMMANDS[command][1]}" in text


def test_examples_compose():
    from appa_lite.config import compose

    for command, (_, example) in cli.COMMANDS.items():
        words = [word for word in shlex.split(example) if not word.startswith("trainable=")]
        compose(command, words, partial=True)


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, expected in {
        ("simulat",): "did you mean 'simulate'?",
        ("simulate", "experiment=lorenz96", "out=a.zarr", "framse=3"): "did you mean 'frames'?",
        ("observe", "truth=none.zarr", "network=random_points", "out=a.csv"): "there is no file none.zarr",
        ("simulate", "experiment=lorenz96", "out=a.txt"): "ends in .zarr or .nc",
        ("simulate", "simulator=lorenz96", "simulator.G=1", "out=a.nc"): "unknown keyword of Lorenz96 'G'",
    }.items():
        assert cli.main(arguments) == 2
        out, err = capsys.readouterr()
        assert err.startswith("appa-lite: error: ") and expected in err and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir())


def test_show_config(appa_lite):
    shown = OmegaConf.create(appa_lite("simulate", "experiment=lorenz96", "frames=3", "--show-config").stdout)
    assert shown.frames == 3 and shown.simulator["class"].endswith("Lorenz96")


def test_exit_status(monkeypatch, capsys):
    def fail_with(error):
        def run(_):
            raise error

        monkeypatch.setattr("appa_lite.stages.simulate.run", run)
        return cli.main(["simulate", "experiment=lorenz96", "out=a.nc"])

    assert fail_with(KeyboardInterrupt()) == 130
    assert fail_with(OSError(28, "No space left on device", "a.nc")) == 2
    assert fail_with(PermissionError(13, "Permission denied", "a.nc")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [" interrupted", " error", " error"]
    with pytest.raises(ZeroDivisionError):
        fail_with(ZeroDivisionError())
    monkeypatch.setenv("APPA_LITE_DEBUG", "1")
    with pytest.raises(UserError):
        fail_with(UserError("why"))


def test_simulate_then_observe(appa_lite, tmp_path, monkeypatch, capsys):
    run = ("simulate", "experiment=lorenz96", "size=debug", "spinup=5", "batch=1", "start=2001-02-03")
    appa_lite(*run, "out=a.zarr")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*run, "out=b.nc"]) == 0
    truth = xr.open_dataset(tmp_path / "a.zarr", engine="zarr")
    assert truth.sizes == {"trajectory": 2, "time": 8, "x": 40} and str(truth.time.values[0]).startswith("2001-02-03T00")
    xr.testing.assert_equal(truth, xr.open_dataset(tmp_path / "b.nc", engine="h5netcdf"))
    assert not truth.isel(trajectory=0).equals(truth.isel(trajectory=1))
    tables = []
    for name in ("a.parquet", "again.parquet"):
        wanted = ("network=random_points", "trajectory=1", "start=2001-02-03T12:00", "seed=4")
        assert cli.main(["observe", "truth=a.zarr", f"out={name}", *wanted]) == 0
        tables.append(pd.read_parquet(tmp_path / name))
    pd.testing.assert_frame_equal(*tables)
    assert tables[0].attrs["seed"] == 4 and "a.zarr" in tables[0].attrs["inputs"]
    assert len(tables[0]) == 6 * 2 and tables[0]["time"].min() == pd.Timestamp("2001-02-03T12:00")
    capsys.readouterr()
    assert cli.main(["observe", "truth=a.zarr", "network=random_points", "out=c.csv", "trajectory=2"]) == 2
    assert "numbered from 0" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"a.zarr", "b.nc", "a.parquet", "again.parquet"}
