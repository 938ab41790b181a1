"""Many commands side by side: jobs in worker processes of one thread each, what is done is kept, and the time left is shown."""

import contextlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from appa_lite.core.errors import UserError
from appa_lite.core.store import atomic
from appa_lite.stages.parallel import rank, world

ELSEWHERE = "another process runs it"
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Job:
    """Commands to run one after the other, as they could be typed, and a name that is a path below the matrix's folder."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    weight: float = 1.0  #: expected share of the time, in units of the other jobs'
    may_diverge: bool = False  #: numbers that run away are a result, not a failure: the job counts as done, without its output


class Matrix:
    """Runs jobs, ``processes`` at a time; a job that ended well leaves a record and is not run again.

        with Matrix(folder, 2) as matrix:
            seconds = matrix.run(jobs, "trainings")

    Of several processes that a launcher started, the first runs the matrix, and the others ``serve``: they compute what it has to
    run. A job is claimed by a lock of the operating system, which opens when the one who runs it dies.

    Args:
        folder: of records (``NAME.json``: seconds of each command), logs (``NAME.log``) and locks.
        processes: workers of each launched process, each with one thread, so that they do not wait for each other's.
    """

    def __init__(self, folder: Path, processes: int):
        if processes < 1:
            raise UserError(f"processes={processes} must be at least 1")
        self.folder, self.processes = folder, processes
        self._pool: ProcessPoolExecutor | None = None
        self.orders = folder / "orders.json"  #: what the first process has to run

    def __enter__(self) -> "Matrix":
        return self

    def __exit__(self, *error: object) -> None:
        if world() > 1 and rank() == 0:
            self._order(None)
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, jobs: Sequence[Job], title: str) -> dict[str, list[float]]:
        """Seconds of the commands of every job, by its name.

        Raises:
            UserError: a job failed. Those that are running still end well; the same command goes on from there.
        """
        waiting = [job for job in jobs if not self._record(job).exists()]
        if waiting:
            total = sum(job.weight for job in jobs)
            done = total - sum(job.weight for job in waiting)
            if world() > 1:
                self._order(waiting)
            with tqdm(total=total, initial=done, desc=title, bar_format="{l_bar}{bar}| {elapsed}<{remaining}", leave=False) as bar:
                self._run(waiting, bar)
        return {job.name: json.loads(self._record(job).read_text())["seconds"] for job in jobs}

    def serve(self) -> None:
        """Run what the first process of this launch has to run, until it has ended."""
        while True:
            orders = json.loads(self.orders.read_text()) if self.orders.exists() else {"launch": None}
            if orders["launch"] == _launch() and orders["jobs"] is None:
                return
            if orders["launch"] == _launch():
                jobs = [Job(name, tuple(tuple(c) for c in commands), 1.0, diverges) for name, commands, diverges in orders["jobs"]]
                self._run([job for job in jobs if not self._record(job).exists()], tqdm(disable=True))
            time.sleep(0.5)

    def _order(self, jobs: Sequence[Job] | None) -> None:
        """Tell the other processes of this launch; None: that all is done."""
        told = None if jobs is None else [(job.name, job.commands, job.may_diverge) for job in jobs]
        with atomic(self.orders) as partial:
            partial.write_text(json.dumps({"launch": _launch(), "jobs": told}))

    def _record(self, job: Job) -> Path:
        return self.folder / f"{job.name}.json"

    def _run(self, jobs: list[Job], bar: tqdm) -> None:
        if self._pool is None:  # workers import for seconds: the same ones serve all that is run
            self._pool = ProcessPoolExecutor(self.processes, get_context("spawn"), _start)
        running: dict[Future, Job] = {}
        waiting = list(jobs)
        while waiting or running:
            for job in waiting:
                running[self._pool.submit(_claimed, job, str(self.folder / job.name))] = job
            waiting = []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                failure = future.result()
                if failure == ELSEWHERE:
                    waiting.append(job)
                elif failure:
                    for other in running:
                        other.cancel()
                    raise UserError(f"{job.name} failed: {failure} (all it said is in {self.folder / job.name}.log)")
                else:
                    bar.update(job.weight)
            if waiting and not running:
                time.sleep(0.5)  # the rest is run by others; should they be lost, it is run here


def _launch() -> list[str | None]:
    """What this launch has that another does not: its address, and the job or the launcher's process."""
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    names = ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
    return [os.environ.get(name) for name in names] + [str(os.getppid()) if one_machine else None]


def _start() -> None:
    """One thread for each worker, none of the launcher's environment, and no life after the process that started it."""
    for name in list(os.environ):
        if name in LAUNCHED or name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_")):
            del os.environ[name]
    threading.Thread(target=_stop_with, args=(os.getppid(),), daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _stop_with(parent: int) -> None:
    """SIGTERM to this process when its parent is gone: a training saves, and goes on with the next run of the matrix."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _claimed(job: Job, place: str) -> str | None:
    """Runs a job unless another process does, and notes it; what went wrong if something did."""
    record = Path(f"{place}.json")
    record.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{place}.lock", timeout=0):
            if record.exists():
                return None
            seconds, failure, diverged = _work(job.commands, f"{place}.log")
            if failure and not (diverged and job.may_diverge):
                return failure
            with atomic(record) as partial:
                partial.write_text(json.dumps({"commands": [shlex.join(c) for c in job.commands], "seconds": seconds}))
    except Timeout:
        return ELSEWHERE
    return None


def _work(commands: Sequence[Sequence[str]], log: str) -> tuple[list[float], str | None, bool]:
    """Seconds of each command, what went wrong if something did, and whether that was numbers that ran away."""
    from appa_lite.config import compose

    Path(log).parent.mkdir(parents=True, exist_ok=True)
    seconds = []
    with open(log, "a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        for command in commands:
            print(f"$ appa-lite {shlex.join(command)}", file=sys.stdout)
            began = time.monotonic()
            try:
                import_module(f"appa_lite.stages.{command[0]}").run(compose(command[0], list(command[1:])))
            except (UserError, OSError, FloatingPointError, SystemExit) as error:
                return seconds, str(error) or type(error).__name__, isinstance(error, FloatingPointError)
            seconds.append(round(time.monotonic() - began, 3))
    return seconds, None, False
