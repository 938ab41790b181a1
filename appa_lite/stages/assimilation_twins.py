"""Twin experiments of assimilation methods: truths, what is observed of them, settings tuned on another truth, analyses, scores."""

import hashlib
import json
import shlex
import time
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from omegaconf import DictConfig, OmegaConf

from appa_lite.config import compose
from appa_lite.core.errors import UserError
from appa_lite.core.random import derive
from appa_lite.core.store import atomic, open_dataset
from appa_lite.data.open import parse_date
from appa_lite.simulators.base import Simulator, save_states, states
from appa_lite.stages.assimilation import assimilated, engine, frames_between
from appa_lite.stages.matrix import Job, Matrix
from appa_lite.stages.prior import BEGINNING, Bar
from appa_lite.verification.assimilation_page import assimilation_page
from appa_lite.verification.assimilation_scores import RESIDUAL, climatology_of, over_truths, score_forecasts, score_truth, summary
from appa_lite.verification.tables import Record, dumps
from appa_lite.verification.verify import Verification

COSTS = ("members", "seconds_per_member", "network_calls")


class AssimilationTwins:
    """What ``cfg`` of ``compare`` asks for where it has ``methods``; all of it in ``cfg.out``, resumable.

    Raises:
        UserError: settings that do not fit together, or overrides that ``reanalysis`` does not know.
    """

    seconds = None  #: no trainings

    def __init__(self, cfg: DictConfig, simulator: Simulator):
        self.cfg, self.simulator, self.out = cfg, simulator, Path(cfg.out)
        self.methods = {str(name): shlex.split(line) for name, line in cfg.methods.items() if line is not None}
        if not self.methods:
            raise UserError("methods: expected {name: keys of reanalysis}, such as methods={letkf: forecaster=letkf}")
        if cfg.network is None:
            raise UserError("a comparison of methods needs a network: choose an experiment with network: NAME")
        if min(cfg.twins.truths, cfg.twins.frames) < 1 or cfg.twins.burn_in < 0:
            raise UserError("twins: truths and frames are at least 1, burn_in at least 0")
        self.tuning = {str(name): OmegaConf.to_container(grid) for name, grid in cfg.tuning.items() if grid and name in self.methods}
        self.reference = cfg.reference or next(iter(self.methods))
        if self.reference not in self.methods:
            raise UserError(f"reference={self.reference} is none of {', '.join(self.methods)}")
        self.composed = {name: self._compose(name) for name in self.methods}
        self.forecasts = {str(name): shlex.split(line) for name, line in cfg.forecasts.items() if line is not None}
        for name, words in self.forecasts.items():
            if words[0] not in self.methods or cfg.twins.lead < 1:
                raise UserError(
                    f"forecasts: {name}: expected twins.lead of at least 1 and first a method, one of {', '.join(self.methods)}"
                )
        self.ahead = {
            name: self._checked(name, "forecast", [*keys, "initial=x", "out=x.zarr", "lead=1d"])
            for name, (_, *keys) in self.forecasts.items()
        }
        self.variables = None if cfg.variables is None else list(cfg.variables)

    def run(self, verification: Verification) -> None:
        """Simulate, observe, tune, analyse, score; write ``scores.json``, ``report.html`` and ``commands.txt``."""
        began = time.monotonic()
        with Matrix(self.out / "jobs", self.cfg.processes) as matrix:
            data = self.simulations()
            matrix.run(data, "truths")
            self.spin_up()
            tunings = self.tunings()
            matrix.run(tunings, "settings")
            chosen, tuned = self.settings()
            analyses = self.analyses(chosen)
            seconds = matrix.run(list(analyses.values()), "analyses")
            forecasts = self.predictions(analyses)
            seconds |= matrix.run(list(forecasts.values()), "forecasts")
        commands = [
            f"appa-lite {shlex.join(line)}" for job in (*data, *tunings, *analyses.values(), *forecasts.values()) for line in job.commands
        ]
        records = self.scores(verification, analyses, forecasts, seconds)
        page = assimilation_page(records, tuned, OmegaConf.to_container(self.cfg), self.reference, commands)
        texts = {"scores.json": dumps(records, ".json"), "report.html": page, "commands.txt": "\n".join(commands) + "\n"}
        for name, text in texts.items():
            with atomic(self.out / name) as partial:
                partial.write_text(text, encoding="utf-8")
        print(summary(records))
        minutes = (time.monotonic() - began) / 60
        print(f"{self.out / 'scores.json'}: {len(records)} scores\n{self.out / 'report.html'}: {minutes:.1f} minutes")

    # Truths and observations

    def file(self, name: str) -> Path:
        return self.out / "data" / name

    def simulations(self) -> list[Job]:
        """The truths and the one to tune on, and observations of each."""
        jobs = [self._truths("truth", self.cfg.twins.truths, self.cfg.seed)]
        return jobs + ([self._truths("validation", 1, derive(self.cfg.seed, "validation") % 2**31)] if self.tuning else [])

    def _truths(self, name: str, count: int, seed: int) -> Job:
        path, frames = self.file(f"{name}.zarr"), self.cfg.twins.burn_in + self.cfg.twins.frames
        length = frames + self.cfg.twins.lead
        end = parse_date(BEGINNING, "start") + np.timedelta64(round((frames - 1) * self.simulator.spec.step), "s")
        line = ["simulate", *self._common(), f"out={path}", f"trajectories={count}", f"frames={length}", f"seed={seed}", "device=cpu"]
        lines = [(*line, *([f"states={self.cfg.states}"] if self.cfg.states else []))]
        for n in range(count):
            rows = self.file(f"{name}_{n}.parquet")
            when = f"end={end.astype('datetime64[s]')}"
            lines.append(("observe", *self._common(), f"truth={path}", f"trajectory={n}", when, f"out={rows}", f"seed={seed + n}"))
        return Job(name, tuple(lines), count)

    @torch.no_grad()
    def spin_up(self) -> None:
        """``ensemble.safetensors``: states of the climate, apart from the truths, for methods whose members branch from states."""
        path = self.file("ensemble.safetensors")
        if not self.cfg.twins.spun_up or path.exists():
            return
        bar, seed = Bar(), derive(self.cfg.seed, "spun up")
        numbers = range(self.cfg.twins.spun_up)
        (found,) = states(self.simulator, seed, numbers, 1, None, "cpu", self.cfg.states, lambda d, n: bar("members spun up", d, n))
        bar.close()
        with atomic(path) as partial:
            save_states(partial, found)

    # Methods

    def tunings(self) -> list[Job]:
        """``tune`` of the methods that have a grid, on the validation truth."""
        jobs = []
        for name, grid in self.tuning.items():
            tried = ", ".join(f"{key}: {json.dumps(values)}" for key, values in grid.items())
            line = ["tune", *self._common(), *self._keys(name), f"grid={{{tried}}}", f"truth={self.file('validation.zarr')}"]
            line += [f"observations={self.file('validation_0.parquet')}", f"burn_in={self.cfg.twins.burn_in}", f"seed={self.cfg.seed}"]
            line += [] if self.variables is None else [f"variables=[{','.join(self.variables)}]"]
            jobs.append(Job(f"tune-{name}-{self._label(line)}", ((*line, "device=cpu", f"out={self._tuned(name)}"),)))
        return jobs

    def settings(self) -> tuple[dict[str, list[str]], list[Record]]:
        """The keys of ``reanalysis`` of every method, tuned ones among them, and the tables behind the choice."""
        chosen, tables = {}, []
        for name in self.methods:
            chosen[name] = self._keys(name)
            if name in self.tuning:
                table = json.loads(self._tuned(name).read_text())
                tables += [{"method": name} | row for row in table]
                best = next(row for row in table if row["best"])
                chosen[name] = chosen[name] + [f"{key}={'null' if best[key] is None else best[key]}" for key in self.tuning[name]]
        return chosen, tables

    def analyses(self, chosen: dict[str, list[str]]) -> dict[tuple[str, int], Job]:
        """One job for each method and truth; other settings, or a model trained again, are another job."""
        jobs = {}
        labels = {name: self._label([*keys, *self._weights(self.composed[name].checkpoint)]) for name, keys in chosen.items()}
        for n in range(self.cfg.twins.truths):
            for name, keys in chosen.items():
                label = labels[name]
                out = self.out / "analyses" / f"{name}-{label}" / f"{n}.zarr"
                line = ["reanalysis", *self._common(), *keys, f"seed={self.cfg.seed + n}", "device=cpu"]
                line += [f"observations={self.file(f'truth_{n}.parquet')}", f"out={out}"]
                jobs[name, n] = Job(f"{name}-{label}/{n}", (tuple(line),), may_diverge=True)
        return jobs

    def predictions(self, analyses: dict[tuple[str, int], Job]) -> dict[tuple[str, int], Job]:
        """Forecasts from the last frame of the analyses that hold."""
        jobs, length = {}, self.cfg.twins.lead * self.simulator.spec.step
        for n in range(self.cfg.twins.truths):
            for name, (method, *keys) in self.forecasts.items():
                initial = _out(analyses[method, n])
                if not initial.exists():
                    continue
                label = self._label([initial.parent.name, *keys, *self._weights(self.ahead[name].checkpoint)])
                out = self.out / "forecasts" / f"{name}-{label}" / f"{n}.zarr"
                line = [
                    "forecast",
                    *self._common(),
                    "members=null",
                    *keys,
                    f"lead={length:.0f}s",
                    f"seed={self.cfg.seed + n}",
                    "device=cpu",
                ]
                line += [f"initial={initial}", f"out={out}"]
                jobs[name, n] = Job(f"forecast-{name}-{label}/{n}", (tuple(line),), may_diverge=True)
        return jobs

    def _common(self) -> list[str]:
        return [f"experiment={self.cfg.experiment}", f"size={self.cfg.size}"]

    def _keys(self, name: str) -> list[str]:
        """What was asked for, the number of members, and states to branch from where the method has a use for them."""
        keys, given = list(self.methods[name]), {key.split("=")[0] for key in self.methods[name]}
        keys += [] if "members" in given else [f"members={self.cfg.twins.members}"]
        if self.cfg.twins.spun_up and "states" in self.composed[name].forecaster and "forecaster.states" not in given:
            keys += [f"forecaster.states={self.file('ensemble.safetensors')}", "forecaster.spinup=0"]
        return keys

    def _compose(self, name: str) -> DictConfig:
        return self._checked(name, "reanalysis", [*self.methods[name], "observations=x", "out=x.zarr"])

    def _checked(self, name: str, command: str, keys: list[str]) -> DictConfig:
        found = compose(command, [*self._common(), *keys])
        if found.checkpoint is not None and not Path(found.checkpoint).is_dir():
            raise UserError(f"{name}: no model at '{found.checkpoint}'")
        return found

    def _weights(self, path: str | None) -> list[str]:
        """Digests of the model's files."""
        files = [] if path is None else sorted(f for f in Path(path).rglob("*") if f.is_file())
        return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]

    def _label(self, words: list[str]) -> str:
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]

    def _tuned(self, name: str) -> Path:
        grid = json.dumps(self.tuning[name], sort_keys=True)
        return self.out / "tuning" / f"{name}-{self._label([*self._keys(name), grid, str(self.variables)])}.json"

    # Scores

    def scores(
        self,
        verification: Verification,
        analyses: dict[tuple[str, int], Job],
        forecasts: dict[tuple[str, int], Job],
        seconds: dict[str, list[float]],
    ) -> list[Record]:
        """The tidy table: means over truths, then every truth, with what a member costs."""
        whole, design = open_dataset(self.file("truth.zarr")), self.cfg.twins
        climatology = open_dataset(self.cfg.climatology) if self.cfg.climatology else climatology_of(whole)
        choices, records = (self.variables, self.cfg.seed), []
        for n in range(design.truths):
            truth = whole.isel(trajectory=n, drop=True)
            found = {name: _opened(analyses[name, n]) for name in self.methods}
            scored = truth.isel(time=slice(design.burn_in, design.burn_in + design.frames))
            records += score_truth(verification, found, scored, climatology, n, *choices)
            made = {name: _opened(forecasts[name, n]) for name in self.forecasts if (name, n) in forecasts}
            made = {name: dataset for name, dataset in made.items() if dataset is not None}
            if made:
                ahead = truth.isel(time=slice(design.burn_in + design.frames - 1, None))
                records += score_forecasts(verification, made, ahead, climatology, n, *choices)
        records = over_truths(records, self.reference, verification.confidence) + records
        costs, ahead = self._costs(analyses, seconds), self._costs(forecasts, seconds)
        blank = dict.fromkeys(COSTS)
        every = [*records, *self.residuals(climatology)]
        return [r | (costs if r["lead_time"] is None else ahead).get(str(r["system"]), blank) for r in every]

    def _costs(self, jobs: dict[tuple[str, int], Job], seconds: dict[str, list[float]]) -> dict[str, dict[str, float | None]]:
        """Of each system, means over truths: members, seconds and network calls of each of them."""
        out = {}
        for name in dict.fromkeys(name for name, _ in jobs):
            mine = [job for (other, _), job in jobs.items() if other == name]
            found = [dataset for job in mine if (dataset := _opened(job)) is not None]
            if not found:
                continue
            members = found[0].sizes["number"]
            spent = float(np.mean([sum(seconds[job.name]) for job in mine])) / members
            out[name] = dict(zip(COSTS, (members, spent, float(np.mean([d.attrs["network_calls"] for d in found]))), strict=True))
        return out

    @torch.no_grad()
    def residuals(self, climatology: xr.Dataset) -> list[Record]:
        """How sharply each prior knows the dynamics: |x(t + dt) - M(x(t))| of free runs, in climatological standard deviations.

        ``cfg.twins.free_runs`` trajectories of ``cfg.twins.frames`` frames, drawn given no observation. M is the simulator's, which
        must have no random forcing; root mean square over runs, frames and cells.
        """
        if not self.cfg.twins.free_runs:
            return []
        out = []
        for name in self.methods:
            if self.composed[name].checkpoint is None:
                continue
            path = (
                self.out / "free_runs" / f"{name}-{self._label([*self.methods[name], *self._weights(self.composed[name].checkpoint)])}.json"
            )
            if not path.exists():
                with atomic(path) as partial:
                    partial.write_text(json.dumps(self._residual(name)))
            for variable, value in json.loads(path.read_text()).items():
                scale = float(np.sqrt(np.square(climatology[f"{variable}_std"]).mean()))
                named = {"seed": None, "system": name, "variable": variable, "metric": RESIDUAL, "lead_time": None}
                out.append(named | {"value": value / scale, "low": None, "high": None, "count": self.cfg.twins.free_runs})
        return out

    def _residual(self, name: str) -> dict[str, float]:
        model, bar = engine(self.composed[name]), Bar()
        first = round((parse_date(BEGINNING, "start") - np.datetime64(0, "s")) / np.timedelta64(1, "s") / model.spec.step)
        times = frames_between(first, first + self.cfg.twins.frames - 1, model.spec.step, model.phase)
        nothing = torch.empty(0)
        runs, _ = assimilated(model, nothing, times, range(self.cfg.twins.free_runs), self.cfg.seed, bar)
        bar.close()
        before, after = runs[:, :-1].flatten(0, 1), runs[:, 1:].flatten(0, 1)
        state = self.simulator.from_fields(before)
        ahead = self.simulator.fields(self.simulator.advance(state, 0, self.cfg.seed, list(range(len(state)))))
        error = (after - ahead).square().mean((0, 2, 3)).sqrt()
        return {variable: float(value) for variable, value in zip(model.spec.names, error, strict=True)}


def _out(job: Job) -> Path:
    """What a job's last command writes."""
    return Path(job.commands[-1][-1].removeprefix("out="))


def _opened(job: Job) -> xr.Dataset | None:
    """What a job left, None if its numbers ran away."""
    return open_dataset(_out(job)) if _out(job).exists() else None
