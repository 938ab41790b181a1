"""Pieces of work: the same output, to the last bit, for any number of processes and however often they were killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from appa_lite import cli
from appa_lite.config import compose
from appa_lite.core.fields import Derived, FieldSpec, Grid, Variable
from appa_lite.core.store import open_dataset, write_dataset
from appa_lite.stages.parallel import Work, batches, packed, stacked, unpacked

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "accelerate" / "cpu2.yaml")]
MODEL = ("experiment=lorenz96", f"checkpoint={ROOT / 'checkpoints' / 'lorenz96'}", "sampler.steps=3")


def start(directory: Path, *arguments: str, processes: int = 1) -> subprocess.Popen:
    """The command in one process, or as a launcher starts two; nothing else of the environment tells ranks."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*([sys.executable] if processes == 1 else LAUNCH), "-m", "appa_lite", *arguments]
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def content(path: Path) -> dict[str, bytes]:
    """Every file of a zarr store; of the attributes, all but the name that it was written under."""
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    root = json.loads(found["zarr.json"])
    root["attributes"]["configuration"] = json.loads(root["attributes"]["configuration"]) | {"out": None}
    return found | {"zarr.json": json.dumps(root).encode()}


@pytest.fixture(scope="module")
def ring(tmp_path_factory) -> Path:
    """A truth of Lorenz-96 and observations of it."""
    here = tmp_path_factory.mktemp("ring")
    finish(start(here, "simulate", "experiment=lorenz96", "trajectories=1", "frames=20", "spinup=20", "out=truth.zarr"))
    finish(start(here, "observe", "experiment=lorenz96", "truth=truth.zarr", "out=observations.parquet"))
    return here


REANALYSIS = ("reanalysis", *MODEL, "observations=observations.parquet", "members=6", "batch=2", "withhold=10%")
FILTER = ("filter", *MODEL, "observations=observations.parquet", "members=3", "batch=2", "start=2000-01-03")
FORECAST = ("forecast", *MODEL, "initial=truth.zarr", "members=3", "batch=2", "lead=1d", "initial_time=[2000-01-02,2000-01-03]")
SIMULATE = ("simulate", "experiment=lorenz96", "trajectories=3", "frames=4", "spinup=3", "batch=2")


@pytest.fixture(scope="module")
def whole(ring) -> Path:
    """The reanalysis of one process that nobody disturbed."""
    finish(start(ring, *REANALYSIS, "out=whole.zarr"))
    return ring / "whole.zarr"


def test_one_process_and_two_write_the_same(ring, whole):
    assert finish(start(ring, *REANALYSIS, "out=shared.zarr", processes=2)).count("shared.zarr: ") == 1  # one of them speaks
    assert content(ring / "shared.zarr") == content(whole)
    assert not list(ring.glob(".*partial*"))


def test_killed_and_started_again_is_as_if_never_killed(ring, whole):
    process, began = start(ring, *REANALYSIS, "out=killed.nc"), time.monotonic()
    while not list(ring.glob(".killed.nc.partial-*/*.safetensors")) and time.monotonic() - began < 60:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (ring / "killed.nc").exists()
    finished = list(ring.glob(".killed.nc.partial-*/*.safetensors"))
    assert 0 < len(finished) < 3
    assert f"{len(finished)} of 3 pieces are finished already" in finish(start(ring, *REANALYSIS, "out=killed.nc"))
    a, b = (open_dataset(path).load() for path in (whole, ring / "killed.nc"))
    xr.testing.assert_equal(a, b)
    assert a.attrs["evidence"] == b.attrs["evidence"] and a.attrs["solver_steps"] == b.attrs["solver_steps"]
    assert not list(ring.glob(".*partial*"))


@pytest.mark.parametrize("command", [FILTER, FORECAST, SIMULATE], ids=lambda c: c[0])
def test_what_another_rank_made_is_merged(ring, command, monkeypatch):
    monkeypatch.chdir(ring)
    name = command[0]
    assert cli.main([*command, f"out={name}1.zarr"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert cli.main([*command, f"out={name}2.zarr"]) == 0
        assert (ring / f"{name}2.zarr").exists() == (rank == "0")
    assert content(ring / f"{name}1.zarr") == content(ring / f"{name}2.zarr")
    assert not list(ring.glob(f".{name}1*partial*"))


def test_candidates_of_tune_are_shared(ring, monkeypatch, capsys):
    monkeypatch.chdir(ring)
    grid = "grid={radius: [2.0, 20.0], finite_size: [1.0, null]}"
    tune = ["tune", "experiment=lorenz96", "size=debug", "forecaster=letkf", "truth=truth.zarr", "observations=observations.parquet"]
    tune += ["members=6", grid]
    assert cli.main([*tune, "out=one.json"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert cli.main([*tune, "out=two.json"]) == 0
        assert (ring / "two.json").exists() == (rank == "0")
    one, two = ([r | {"seconds": 0} for r in json.loads((ring / f"{name}.json").read_text())] for name in ("one", "two"))
    assert one == two and len(one) == 4 and capsys.readouterr().out.count("best: ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", [FILTER, FORECAST, SIMULATE], ids=lambda c: c[0])
def test_one_process_and_two_of_every_command(ring, command):
    finish(start(ring, *command, f"out={command[0]}3.zarr"))
    finish(start(ring, *command, f"out={command[0]}4.zarr", processes=2))
    assert content(ring / f"{command[0]}3.zarr") == content(ring / f"{command[0]}4.zarr")


@pytest.mark.slow
def test_fifty_random_kills(ring):
    rng = np.random.default_rng(0)
    command = [arg.replace("steps=3", "steps=10").replace("members=6", "members=40") for arg in REANALYSIS]
    finish(start(ring, *command, "out=unhurt.zarr"))
    kills = 0
    while kills < 50:
        process = start(ring, *command, f"out=hurt{kills // 10}.zarr")
        time.sleep(float(rng.uniform(2, 8)))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    for i in range(5):
        finish(start(ring, *command, f"out=hurt{i}.zarr"))
        assert content(ring / f"hurt{i}.zarr") == content(ring / "unhurt.zarr")


# The work itself


def settings(tmp_path: Path, *overrides: str):
    return compose("simulate", ["simulator=lorenz96", f"out={tmp_path / 'a.zarr'}", *overrides])


def count_up(made: list[int]):
    def piece(i, progress):
        made.append(i)
        progress("piece", 1, 1)
        return {"n": torch.full((2,), float(i)), "note": packed({"i": [i, "ä"]})}

    return piece


def test_pieces_of_the_same_settings_are_kept_others_not(tmp_path, caplog):
    made: list[int] = []

    def torn(i, progress):
        if i == 2:
            raise RuntimeError("out of luck")
        return count_up(made)(i, progress)

    with pytest.raises(RuntimeError), Work.of(settings(tmp_path)) as work:
        work.map(4, torn)
    damaged = work.directory / "000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with Work.of(settings(tmp_path, "seed=1")) as other:
        assert len(other.map(1, count_up([]))) == 1
    assert "other settings" in caplog.text and not other.directory.exists()
    with Work.of(settings(tmp_path)) as work:
        parts = work.map(4, count_up(made))
        assert [float(part["n"][1]) for part in parts] == [0, 1, 2, 3] and unpacked(parts[3]["note"]) == {"i": [3, "ä"]}
    assert made == [0, 1, 1, 2, 3] and not work.directory.exists()
    assert "damaged" in caplog.text


def test_what_pieces_depend_on(tmp_path):
    file = tmp_path / "input.csv"
    file.write_text("a")
    first = Work.of(settings(tmp_path), [file]).directory
    assert Work.of(settings(tmp_path), [file]).directory == first
    assert Work.of(settings(tmp_path, "batch=3"), [file]).directory != first
    file.write_text("b")
    assert Work.of(settings(tmp_path), [file]).directory != first


def test_ranks_share_the_pieces_and_rank_0_waits_and_takes_over(tmp_path, monkeypatch):
    """Another process holds a claim while rank 0 works; when it dies, rank 0 makes its piece too."""
    work = Work.of(settings(tmp_path))
    work.directory.mkdir()
    claim = f"import filelock, time; lock = filelock.FileLock({str(work.directory / '000000.lock')!r}); lock.acquire()"
    other = subprocess.Popen([sys.executable, "-c", claim + "; print(1, flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    other.stdout.readline()
    made: list[int] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Work.of(settings(tmp_path)) as second:
        assert second.map(3, count_up(made)) is None and made == [1, 2]  # leaves without waiting for the straggler
    monkeypatch.setenv("RANK", "0")
    other.kill()
    other.wait()
    with Work.of(settings(tmp_path)) as first:
        assert len(first.map(3, count_up(made))) == 3 and made == [1, 2, 0]
    assert (work.directory / "merged").exists()  # rank 1 might come late ...
    monkeypatch.setenv("RANK", "1")
    with Work.of(settings(tmp_path)) as late:
        assert late.map(3, count_up(made)) is None and made == [1, 2, 0]  # ... and must not begin again
    assert not work.directory.exists()


def test_datasets_are_written_as_they_are_read(tmp_path):
    """A lazy dataset of parts is what ``to_dataset`` makes of the fields in memory: mask, derived quantities, one-row grids."""
    mask = ((True,) * 4, (True, True, False, True), (True,) * 4)
    grid = Grid(("latitude", "longitude"), (0.0, 1.0, 2.0), (0.0, 1.0, 2.0, 3.0))
    plane = FieldSpec((Variable("u", "m"), Variable("v", "m")), grid, 60.0, mask, (Derived("s", "norm", ("u", "v"), (1.0, 1.0), "m"),))
    line = FieldSpec((Variable("u", "m"),), Grid(("x",), (0.0,), (0.0, 1.0)), 60.0)
    time_axis = np.datetime64("2000-01-01", "ns") + np.arange(5) * np.timedelta64(60, "s")
    for spec in (plane, line):
        fields = torch.randn(7, 5, *spec.shape)
        expected = spec.to_dataset(fields.transpose(0, 1), {"time": time_axis, "number": np.arange(7)})
        for work in (Work(), Work.of(settings(tmp_path))):
            array = stacked([fields[list(b)] for b in batches(7, 3)]).swapaxes(0, 1)
            dataset = work.dataset(spec, array, {"time": time_axis, "number": np.arange(7)})
            xr.testing.assert_identical(dataset.load(), expected)
        write_dataset(work.dataset(spec, array, {"time": time_axis, "number": np.arange(7)}), tmp_path / "lazy.zarr")
        xr.testing.assert_equal(open_dataset(tmp_path / "lazy.zarr").load(), expected)
