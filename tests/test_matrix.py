"""Jobs shared by the processes of a launch: each run once, whoever runs it, and taken over from those that are lost."""

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from appa_lite.core.errors import UserError
from appa_lite.stages import matrix
from appa_lite.stages.matrix import Job, Matrix

JOBS = [Job(f"trainings/{i}", (("simulate", f"seed={i}"),)) for i in range(6)]


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Two processes on two machines; what jobs do is only noted, after a moment."""

    def work(commands, log):
        time.sleep(0.15)
        with (tmp_path / "notes").open("a") as file:
            file.write(json.dumps([os.environ["RANK"], commands[0][1]]) + "\n")
        return [0.1], "out of luck" if "seed=bad" in commands[0] else None, False

    monkeypatch.setattr(matrix, "_work", work)
    monkeypatch.setattr(matrix, "ProcessPoolExecutor", lambda processes, *_: ThreadPoolExecutor(processes))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def serving(folder) -> multiprocessing.Process:
    """The other process."""

    def serve():
        os.environ["RANK"] = "1"
        with Matrix(folder, 1) as other:
            other.serve()

    process = multiprocessing.get_context("fork").Process(target=serve)
    process.start()
    return process


def notes(folder) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()] if (folder / "notes").exists() else []


def test_two_processes_share_the_jobs(launched):
    folder = launched / "jobs"
    folder.mkdir()
    (folder / "orders.json").write_text(json.dumps({"launch": ["earlier"], "jobs": None}))  # of a launch that has ended
    other = serving(folder)
    with Matrix(folder, 1) as first:
        assert set(first.run(JOBS, "jobs")) == {job.name for job in JOBS}
        while not any(rank == "1" for rank, _ in notes(launched)):  # it may have come late
            first.run([Job(f"more/{time.monotonic()}-{k}", (("simulate", f"seed=more{k}"),)) for k in range(4)], "more")
        assert other.is_alive()
    other.join(20)
    assert other.exitcode == 0
    seeds = [seed for _, seed in notes(launched) if "more" not in seed]
    assert sorted(seeds) == [f"seed={i}" for i in range(6)]


def test_a_lost_process_is_replaced(launched):
    folder = launched / "jobs"
    other = serving(folder)
    with Matrix(folder, 1) as first:
        first._order(JOBS)
        while not list(folder.glob("trainings/*.lock")):
            time.sleep(0.01)
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        assert len(first.run(JOBS, "jobs")) == 6
    assert {seed for _, seed in notes(launched)} == {f"seed={i}" for i in range(6)}


def test_a_failure_is_told(launched):
    with pytest.raises(UserError, match="b failed: out of luck"), Matrix(launched / "jobs", 1) as first:
        first.run([Job("b", (("simulate", "seed=bad"),))], "one")
    assert json.loads((launched / "jobs" / "orders.json").read_text())["jobs"] is None  # the others leave
