"""Where the time of a training step goes: its parts by the clock, arithmetic over the peak, and a trace to look at.

The first steps after ``WARM`` are watched, ``TIMED`` by the clock alone and ``TRACED`` by PyTorch's profiler; then the training
goes on untouched. On a GPU each part waits for its kernels, so that they are told apart; a step without that is a little faster.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from appa_lite.core.errors import UserError
from appa_lite.training.costs import DEVICES, operations, peak_here
from appa_lite.training.processes import Processes
from appa_lite.training.schedule import TrainingConfig

WARM, TIMED, TRACED = 3, 10, 3
#: methods of the loop that are timed -> what is said of them
PARTS = {"_fetch": "data", "_forward": "forward", "_backward": "backward", "_update": "optimizer", "_average": "average"}
COLLECTIVES = ("gloo:", "nccl:")  # as the profiler calls them


class Steps(Protocol):
    """A training loop: the parts of a step are methods."""

    run: Path
    step: int
    processes: Processes

    def _take_step(self, batches: Any, rate: float) -> None: ...


class Profile:
    """Watches a loop from now on, until its steps are measured; the main process writes ``profile.json`` and ``trace.json``.

    Args:
        loop: about to make its first step; config: its settings.

    Raises:
        UserError: the training is too short to be measured.
    """

    def __init__(self, loop: Steps, config: TrainingConfig):
        needed = WARM + TIMED + TRACED
        if config.steps is not None and config.steps - loop.step < needed:
            raise UserError(
                f"profile=true watches {needed} steps, {max(config.steps - loop.step, 0)} are left: raise steps, or say profile=false"
            )
        self.loop, self.device = loop, loop.processes.device
        self.precision = ("bf16" if self.device.type == "cuda" else "fp32") if config.precision == "auto" else config.precision
        self.seconds: dict[str, list[float]] = {name: [] for name in ("step", *PARTS.values())}
        self.now: dict[str, float] = {}
        self.count = self.flops = 0
        self.profiler: profile | None = None
        self.take = loop._take_step
        loop._take_step = self._step  # type: ignore[method-assign]
        for method, part in PARTS.items():
            setattr(loop, method, self._timed(part, getattr(loop, method)))

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _timed(self, part: str, method: Callable) -> Callable:
        def timed(*args: Any) -> Any:
            began = self._clock()
            try:
                return method(*args)
            finally:
                self.now[part] = self.now.get(part, 0.0) + self._clock() - began

        return timed

    def _step(self, batches: Any, rate: float) -> None:
        self.count += 1
        self.now = {}
        if self.count == 1:
            self.flops = operations(lambda: self.take(batches, rate))
            return
        if self.count == WARM + TIMED + 1:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.profiler = profile(activities=kinds, acc_events=True)
            self.profiler.start()
        began = self._clock()
        self.take(batches, rate)
        whole = self._clock() - began
        if WARM < self.count <= WARM + TIMED:
            for part, values in self.seconds.items():
                values.append(whole if part == "step" else self.now.get(part, 0.0))
        if self.count == WARM + TIMED + TRACED:
            self._finish()

    def _finish(self) -> None:
        """Writes what was seen, and leaves the loop as it was."""
        for method in ("_take_step", *PARTS):
            delattr(self.loop, method)
        self.profiler.stop()
        if not self.loop.processes.main:
            return
        partial = self.loop.run / f".trace.{os.getpid()}.json"
        self.profiler.export_chrome_trace(str(partial))
        partial.replace(self.loop.run / "trace.json")
        events = self.profiler.events() or []
        (self.loop.run / "profile.json").write_text(dumps(self._records(events)))

    def _records(self, events: Iterable[Any]) -> list[dict[str, Any]]:
        seconds = {part: fmean(values) for part, values in self.seconds.items()}
        step = seconds.pop("step")
        collective = sum(e.time_range.elapsed_us() for e in events if e.name.startswith(COLLECTIVES))
        peak = self._peak()
        rows = [("step", step, "s"), *((part, value, "s") for part, value in seconds.items())]
        rows += [("rest", step - sum(seconds.values()), "s"), ("communication", 1e-6 * collective / TRACED, "s, within the others")]
        rows += [("flops", float(self.flops), "FLOP per step and process"), ("flops_per_second", self.flops / step, "FLOP per second")]
        rows += [("peak", peak, "FLOP per second"), ("mfu", self.flops / step / peak, "")]
        if self.device.type == "cuda":
            rows.append(("memory", float(torch.cuda.max_memory_allocated(self.device)), "B"))
        return [{"quantity": name, "value": value, "unit": unit} for name, value, unit in rows]

    def _peak(self) -> float:
        """That of the data sheet where the device is known, else of a large matrix product here."""
        name = torch.cuda.get_device_name(self.device).lower() if self.device.type == "cuda" else ""
        known = [sheet[self.precision] for key, sheet in DEVICES.items() if key in name]
        return known[0] if known else peak_here(self.device, self.precision == "bf16")


def dumps(records: list[dict[str, Any]]) -> str:
    """A JSON list, one record a line."""
    return "[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n"


def table(run: Path) -> str:
    """``profile.json`` of a run directory, readable; parts of a step with their share."""
    records = json.loads((run / "profile.json").read_text())
    step = records[0]["value"]
    share = {r["quantity"]: f"  {100 * r['value'] / step:5.1f} %" for r in records if r["unit"].startswith("s")}
    return "\n".join(f"{r['quantity']:18}{r['value']:10.4g} {r['unit']}{share.get(r['quantity'], '')}" for r in records)
