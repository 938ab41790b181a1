"""The matrix of a comparison: which commands make its data, models and forecasts, and where they leave them."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from omegaconf import DictConfig

from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_seconds
from appa_lite.core.store import open_dataset, write_dataset
from appa_lite.data.open import parse_date
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.nn.backbone import parameters
from appa_lite.simulators.base import Simulator
from appa_lite.stages.matrix import Job
from appa_lite.stages.prior import BEGINNING, Bar, duration
from appa_lite.stages.twin import Design, forecast_dataset, oracle, truths
from appa_lite.verification.comparison import Trial, mean_crps

TRAINING = 0.7  # of the budget goes to trainings, the rest to data, forecasts and scores
SEARCH = 0.2  # of the time of a training, for each learning rate that is tried
UNTRAINED = ("identity",)  # trainables without parameters, which take no time


class Comparison:
    """What ``cfg`` of ``compare`` asks for.

    Raises:
        UserError: settings that do not fit together.
    """

    def __init__(self, cfg: DictConfig, simulator: Simulator):
        self.cfg, self.simulator, self.out = cfg, simulator, Path(cfg.out)
        self.families = {str(name): [shlex.split(step) for step in chain] for name, chain in cfg.families.items() if chain is not None}
        if not self.families or not all(chain and all(chain) for chain in self.families.values()):
            raise UserError("families: expected {name: [trainable, ...]}, such as families={fgn: [fgn]}")
        if cfg.seeds < 1 or not cfg.learning_rates or min(cfg.learning_rates) <= 0 or cfg.scored < 1:
            raise UserError("seeds and scored are at least 1, learning_rates a list of positive numbers")
        self.ensembles = {str(name): str(family) for name, family in cfg.ensembles.items() if family}
        for name, family in self.ensembles.items():
            if family not in self.families or name in self.families:
                raise UserError(f"ensembles: '{name}: {family}' is not a new name for one of {', '.join(self.families)}")
        self.variables = None if cfg.variables is None else list(cfg.variables)
        self.reference = cfg.reference or next(iter(self.families))
        if self.reference not in (*self.families, *self.ensembles):
            raise UserError(f"reference={self.reference} is none of {', '.join((*self.families, *self.ensembles))}")
        test, begin = cfg.test, to_seconds(np.array([parse_date(BEGINNING, "start")]))[0]
        self.design = Design(test.trajectories, test.starts, test.spacing, test.history, test.lead, test.members, begin)
        self.seconds = TRAINING * duration(cfg.budget, "budget") * cfg.processes / self._shares()

    def _shares(self) -> float:
        """The trainings to be paid, in units of one: the same wall clock for all, whatever a step of theirs costs."""
        tried = len(self.cfg.learning_rates) if len(self.cfg.learning_rates) > 1 else 0
        return len(self.families) * (self.cfg.seeds + SEARCH * tried)

    def file(self, name: str) -> Path:
        return self.out / "data" / name

    # Data

    def simulations(self) -> list[Job]:
        """Trajectories to train and to validate on."""
        data, jobs = self.cfg.data, []
        for number, (name, count) in enumerate((("train", data.trajectories), ("validation", data.validation))):
            line = ["simulate", *self._common(), f"out={self.file(name)}.zarr", f"trajectories={count}", f"frames={data.frames}"]
            line += [f"seed={self.cfg.seed + 1000 * (number + 1)}"] + ([f"states={self.cfg.states}"] if self.cfg.states else [])
            jobs.append(Job(f"simulate-{name}", (tuple(line),), count))
        return jobs

    def twins(self) -> None:
        """The truths of the test, and the forecasts of a perfect model: ``truth.zarr``, ``truth_N.zarr`` and ``oracle.zarr``."""
        if self.file("oracle.zarr").exists():
            return
        design, spec, bar = self.design, self.simulator.spec, Bar()
        seed = self.cfg.seed + 3000
        fields, known = truths(self.simulator, design, seed, self.cfg.states, lambda done, total: bar("truths", done, total))
        wholes = [spec.to_dataset(f, {"time": design.times(n, spec.step)}) for n, f in enumerate(fields)]
        for n, whole in enumerate(wholes):
            write_dataset(whole, self.file(f"truth_{n}.zarr"))
        write_dataset(xr.concat(wholes, "time"), self.file("truth.zarr"))
        ahead = oracle(self.simulator, known, design, seed, lambda done, total: bar("oracle", done, total))
        bar.close()
        write_dataset(forecast_dataset(self.simulator, design, ahead, fields[:, design.initial_frames]), self.file("oracle.zarr"))

    # Trainings and forecasts

    def search(self, seconds: float) -> list[Job]:
        """A short training of every family with every learning rate, and its forecasts of the first trajectory of validation."""
        times = open_dataset(self.file("validation.zarr"))["time"].values
        last = len(times) - 1 - self.design.lead
        if last < self.design.history:
            raise UserError(
                f"data.frames={len(times)} leaves no forecast of test.lead={self.design.lead} frames to choose learning rates by"
            )
        dates = times[np.unique(np.linspace(self.design.history - 1, last, min(self.design.starts, 8)).astype(int))]
        jobs = []
        for family in self.families:
            for rate in self.cfg.learning_rates:
                path = self.out / "search" / f"{family}-{rate:g}"
                ahead = self._forecast([path / "model"], path.with_suffix(f"{path.suffix}.zarr"), self.file("validation.zarr"), dates, 0)
                jobs.append(Job(f"search-{path.name}", (*self._train(family, path, 0, rate, SEARCH * seconds), (*ahead, "trajectory=0"))))
        return jobs

    def search_scores(self) -> list[dict]:
        """``family, learning_rate, crps_fair``: means over leads and variables, in standard deviations of the truth."""
        truth, out = open_dataset(self.file("validation.zarr")).isel(trajectory=0, drop=True), []
        for family in self.families:
            for rate in self.cfg.learning_rates:
                forecast = open_dataset(self.out / "search" / f"{family}-{rate:g}.zarr")
                out.append({"family": family, "learning_rate": float(rate), "crps_fair": mean_crps(forecast, truth)})
        return out

    def trainings(self, rates: dict[str, float], seconds: float) -> list[Job]:
        """Every family with every seed, and its forecasts of the test; what is typed is kept in ``commands.txt``."""
        jobs = []
        for seed in range(self.cfg.seeds):
            for family, rate in rates.items():
                path = self.out / "models" / f"{family}-{seed}"
                train = self._train(family, path, seed, rate, seconds)
                jobs.append(Job(path.name, (*train, *self._test([path / "model"], path.name, seed))))
        lines = [f"appa-lite {shlex.join(line)}" for job in (*self.simulations(), *jobs, *self.together()) for line in job.commands]
        (self.out / "commands.txt").write_text("\n".join(lines) + "\n")
        return jobs

    def together(self) -> list[Job]:
        """Ensembles of the models of all seeds of a family."""
        models = {
            name: [self.out / "models" / f"{family}-{s}" / "model" for s in range(self.cfg.seeds)]
            for name, family in self.ensembles.items()
        }
        return [Job(name, tuple(self._test(paths, name, 0))) for name, paths in models.items()]

    def _common(self) -> list[str]:
        return [f"experiment={self.cfg.experiment}", f"size={self.cfg.size}"]

    def _train(self, family: str, run: Path, seed: int, rate: float, seconds: float) -> list[tuple[str, ...]]:
        """The commands of a family's chain of trainables, whose trained ones share the time; the last one's run directory is ``run``."""
        chain = [step for step in self.families[family] if step[0] not in UNTRAINED or self.cfg.autoencoder is None]
        timed = sum(step[0] not in UNTRAINED for step in chain)
        base, out = self.cfg.autoencoder, []
        for number, (trainable, *keys) in enumerate(chain):
            folder = run if number == len(chain) - 1 else run.with_name(f"{run.name}-{trainable}")
            line = ["train", *self._common(), f"trainable={trainable}", f"run={folder}", f"seed={self.cfg.seed + seed}", "device=cpu"]
            line += [f"data={self.file('train.zarr')}", f"validation={self.file('validation.zarr')}"]
            line += [] if base is None else [f"autoencoder={base}"]
            if trainable not in UNTRAINED:
                line += ["training.steps=null", f"training.time_limit={seconds / timed:.1f}", f"training.learning_rate={rate:g}"]
            out.append((*line, *keys))
            base = folder / "model"
        return out

    def _test(self, models: Sequence[Path], name: str, seed: int) -> list[tuple[str, ...]]:
        out = []
        for n in range(self.design.trajectories):
            dates = self.design.times(n, self.simulator.spec.step)[self.design.initial_frames]
            out.append(self._forecast(models, self._ahead(name, n), self.file(f"truth_{n}.zarr"), dates, seed))
        return out

    def _ahead(self, name: str, trajectory: int) -> Path:
        return self.out / "forecasts" / f"{name}_{trajectory}.zarr"

    def _forecast(self, models: Sequence[Path], out: Path, initial: Path, dates: np.ndarray, seed: int) -> tuple[str, ...]:
        when = ",".join(str(np.datetime64(t, "s")) for t in dates)
        which = str(models[0]) if len(models) == 1 else f"[{','.join(map(str, models))}]"
        line = ["forecast", *self._common(), f"checkpoint={which}", f"initial={initial}", f"initial_time=[{when}]", f"out={out}"]
        line += [f"lead={self.design.lead * self.simulator.spec.step:.0f}s", f"history={self.design.history}", "device=cpu"]
        return (*line, f"members={self.design.members}", f"seed={self.cfg.seed + seed}")

    # Results

    def trials(self, rates: dict[str, float], timing: dict[str, list[float]], seconds: float) -> list[Trial]:
        """What was trained, and what its forecasts cost. An ensemble of models has the sums of their trainings and sizes."""
        out, draws = [], self.design.members * self.design.trajectories * self.design.starts
        kinds = [(f, s, f"{f}-{s}") for f in rates for s in range(self.cfg.seeds)] + [(n, 0, n) for n in self.ensembles]
        for family, seed, name in kinds:
            source, models = self.ensembles.get(family, family), self.cfg.seeds if family in self.ensembles else 1
            run = self.out / "models" / f"{source}-{seed}"
            model = Checkpoint.load(run / "model")
            steps = json.loads((run / "summary.json").read_text())["step"]
            ahead = sum(timing[name][-self.design.trajectories :]) / draws
            calls = [open_dataset(self._ahead(run.name, n)).attrs["network_calls"] for n in range(self.design.trajectories)]
            trained = (rates[source], models * steps, models * seconds)
            out.append(
                Trial(family, seed, name, *trained, ahead, float(np.mean(calls)), models * parameters(model.emulator or model.denoiser))
            )
        return out

    def systems(self, trials: Sequence[Trial]) -> tuple[dict[str, xr.Dataset], xr.Dataset, xr.Dataset]:
        """Forecasts by name, the oracle's among them, at the leads to be scored; the truth; the training trajectories."""
        wanted = np.unique(np.round(np.geomspace(1, self.design.lead, self.cfg.scored)).astype(int))
        found = {"oracle": open_dataset(self.file("oracle.zarr"))}
        for trial in trials:
            parts = [open_dataset(self._ahead(trial.name, n)) for n in range(self.design.trajectories)]
            found[trial.name] = xr.concat(parts, "time") if len(parts) > 1 else parts[0]
        systems = {name: d.isel(prediction_timedelta=np.append(0, wanted)) for name, d in found.items()}
        return systems, open_dataset(self.file("truth.zarr")), open_dataset(self.file("train.zarr"))
