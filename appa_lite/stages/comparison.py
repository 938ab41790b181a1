"""The matrix of a comparison: which commands make its data, models and forecasts, and where they leave them."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
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
from appa_lite.stages.parallel import world
from appa_lite.stages.prior import BEGINNING, Bar, duration
from appa_lite.stages.twin import Design, analysed, forecast_dataset, oracle, truths
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
        chains = {str(name): [chain] if isinstance(chain, str) else chain for name, chain in cfg.families.items() if chain is not None}
        self.families = {name: [shlex.split(step) for step in chain] for name, chain in chains.items()}
        if not self.families or not all(chain and all(chain) for chain in self.families.values()):
            raise UserError("families: expected {name: [trainable, ...]}, such as families={fgn: [fgn]}")
        if cfg.seeds < 1 or not cfg.learning_rates or min(cfg.learning_rates) <= 0 or cfg.scored < 1:
            raise UserError("seeds and scored are at least 1, learning_rates a list of positive numbers")
        self.ensembles = {str(name): str(family) for name, family in cfg.ensembles.items() if family}
        for name, family in self.ensembles.items():
            if family not in self.families or name in self.families:
                raise UserError(f"ensembles: '{name}: {family}' is not a new name for one of {', '.join(self.families)}")
        self.variants = self._variants()
        if not 0 <= cfg.free.runs <= cfg.test.trajectories * cfg.test.starts or cfg.free.frames < 1:
            raise UserError(f"free.runs={cfg.free.runs}: expected at most one from each of the test's initial times")
        self.variables = None if cfg.variables is None else list(cfg.variables)
        self.reference = cfg.reference or next(iter(self.families))
        if self.reference not in (names := (*self.families, *self.ensembles, *self.variants)):
            raise UserError(f"reference={self.reference} is none of {', '.join(names)}")
        test, begin = cfg.test, to_seconds(np.array([parse_date(BEGINNING, "start")]))[0]
        self.design = Design(test.trajectories, test.starts, test.spacing, test.history, test.lead, test.members, begin)
        self.seconds = TRAINING * duration(cfg.budget, "budget") * cfg.processes * world() / self._shares()

    def _variants(self) -> dict[str, tuple[str, str, list]]:
        """(family, key, values) by name; those of families that are left out are left out too."""
        found = {}
        for name, entry in self.cfg.variants.items():
            if entry is None or self.cfg.families.get(entry.get("family"), ()) is None:
                continue
            family, key, values = (entry.get(k) for k in ("family", "key", "values"))
            if family not in self.families or name in (*self.families, *self.ensembles) or not key or not values:
                raise UserError(f"variants: '{name}' needs a new name, one of {', '.join(self.families)}, a key of forecast and its values")
            found[str(name)] = (str(family), str(key), list(values))
        return found

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
        """The truths of the test, what is known of their initial states, and the forecasts of a perfect model.

        ``truth.zarr`` and ``oracle.zarr``, for every truth ``initial_N.zarr``, and ``free.zarr``, the initial states of free runs.
        """
        if self.file("free.zarr").exists():
            return
        simulator, design, spec, bar = self.simulator, self.design, self.simulator.spec, Bar()
        seed, error, frames = self.cfg.seed + 3000, self.cfg.test.analysis_error, design.initial_frames
        if error is None:
            fields, states = truths(simulator, design, seed, self.cfg.states, lambda done, total: bar("truths", done, total))
            wholes = [spec.to_dataset(f, {"time": design.times(n, spec.step)}) for n, f in enumerate(fields)]
            truth = xr.concat(wholes, "time")
            known = torch.stack([fields[:, f + 1 - design.history : f + 1] for f in frames], 1)[:, :, None]
            ahead = oracle(simulator, states, design, seed, lambda done, total: bar("oracle", done, total))
        else:
            drawn = analysed(simulator, design, error, seed, self.cfg.states, lambda done, total: bar("truths and oracle", done, total))
            true, members = drawn[:, :, 0, design.history - 1 :], drawn[:, :, 1:]
            truth = forecast_dataset(simulator, design, true[:, :, 1:, None], true[:, :, 0]).isel(number=0, drop=True)
            known, ahead = members[:, :, :, : design.history], members[:, :, :, design.history :].transpose(2, 3)
            wholes = [self._known(n, members[n]) for n in range(design.trajectories)]
        bar.close()
        for n, whole in enumerate(wholes):
            write_dataset(whole, self.file(f"initial_{n}.zarr"))
        write_dataset(truth, self.file("truth.zarr"))
        write_dataset(forecast_dataset(simulator, design, ahead, known[:, :, :, -1]), self.file("oracle.zarr"))
        runs = known[:, :, 0].flatten(0, 1)[: max(self.cfg.free.runs, 1)]  # one known trajectory of every start
        times = {"time": design.times(0, spec.step)[: design.history], "number": np.arange(len(runs))}
        write_dataset(spec.to_dataset(runs.transpose(0, 1), times), self.file("free.zarr"))

    def _known(self, trajectory: int, members: torch.Tensor) -> xr.Dataset:
        """What is known at all starts of a truth, an ensemble (time, number, grid), of the members' runs (starts, members, frames, ...).

        The known frames of a start end at its initial time; the members' own runs fill the gaps to the next start's.
        """
        parts = [*members[:-1, :, : self.design.spacing], members[-1, :, : self.design.history]]
        fields = torch.cat([p.transpose(0, 1) for p in parts])
        times = self.design.times(trajectory, self.simulator.spec.step)[: len(fields)]
        return self.simulator.spec.to_dataset(fields, {"time": times, "number": np.arange(members.shape[1])})

    # Trainings and forecasts

    def _validation_dates(self) -> np.ndarray:
        times = open_dataset(self.file("validation.zarr"))["time"].values
        last = len(times) - 1 - self.design.lead
        if last < self.design.history:
            raise UserError(
                f"data.frames={len(times)} leaves no forecast of test.lead={self.design.lead} frames to choose learning rates by"
            )
        return times[np.unique(np.linspace(self.design.history - 1, last, min(self.design.starts, 8)).astype(int))]

    def search(self, seconds: float) -> list[Job]:
        """A short training of every family with every learning rate, and its forecasts of the first trajectory of validation."""
        jobs = []
        for family in self.families:
            for rate in self.cfg.learning_rates:
                path = self.out / "search" / f"{family}-{rate:g}"
                train = self._train(family, path, 0, rate, SEARCH * seconds)
                jobs.append(Job(f"search-{path.name}", (*train, self._validate(path, path.name))))
        return jobs

    def search_scores(self) -> list[dict]:
        """``family, key, value, crps_fair``: means over leads and variables, in standard deviations of the truth."""
        rates = [(family, "learning_rate", rate) for family in self.families for rate in self.cfg.learning_rates]
        return [self._searched(name, key, rate, f"{name}-{rate:g}") for name, key, rate in rates]

    def variant_search(self) -> list[Job]:
        """Forecasts of the validation by the first training of a variant's family, with every value of its key."""
        jobs = []
        for name, (family, key, values) in self.variants.items():
            for value in values if len(values) > 1 else ():
                path = self.out / "models" / f"{family}-0"
                jobs.append(Job(f"search-{name}-{value}", ((*self._validate(path, f"{name}-{value}"), f"{key}={value}"),)))
        return jobs

    def variant_scores(self) -> list[dict]:
        """As ``search_scores``."""
        return [self._searched(n, key, v, f"{n}-{v}") for n, (_, key, values) in self.variants.items() if len(values) > 1 for v in values]

    def _validate(self, run: Path, name: str) -> tuple[str, ...]:
        dates, out = self._validation_dates(), self.out / "search" / f"{name}.zarr"
        return (*self._forecast([run / "model"], out, self.file("validation.zarr"), dates, 0), "trajectory=0")

    def _searched(self, family: str, key: str, value: object, name: str) -> dict:
        truth = open_dataset(self.file("validation.zarr")).isel(trajectory=0, drop=True)
        crps = mean_crps(open_dataset(self.out / "search" / f"{name}.zarr"), truth)
        return {"family": family, "key": key, "value": value, "crps_fair": crps}

    def trainings(self, rates: dict[str, float], seconds: float) -> list[Job]:
        """Every family with every seed, and its forecasts of the test."""
        jobs = []
        for seed in range(self.cfg.seeds):
            for family, rate in rates.items():
                path = self.out / "models" / f"{family}-{seed}"
                train = self._train(family, path, seed, rate, seconds)
                jobs.append(Job(path.name, (*train, *self._test([path / "model"], path.name, seed))))
        return jobs

    def together(self, chosen: dict[str, object]) -> list[Job]:
        """What trained models do besides: ensembles of all seeds, variants with the values ``chosen`` for them, and free runs."""
        models = {f: [self.out / "models" / f"{f}-{s}" / "model" for s in range(self.cfg.seeds)] for f in self.families}
        jobs = [Job(name, tuple(self._test(models[family], name, 0))) for name, family in self.ensembles.items()]
        for name, (family, key, _) in self.variants.items():
            for seed, model in enumerate(models[family]):
                lines = self._test([model], f"{name}-{seed}", seed)
                jobs.append(Job(f"{name}-{seed}", tuple((*line, f"{key}={chosen[name]}") for line in lines)))
        return jobs

    def free_runs(self) -> list[Job]:
        """Long forecasts of the first training of every family: one member from each of the first initial states of the test."""
        free, jobs = self.cfg.free, []
        for family in self.families if free.runs else ():
            line = ["forecast", *self._common(), f"checkpoint={self.out / 'models' / f'{family}-0' / 'model'}", f"seed={self.cfg.seed}"]
            line += [f"initial={self.file('free.zarr')}", f"out={self._free(family)}", f"history={self.design.history}", "device=cpu"]
            line += [f"lead={free.frames * self.simulator.spec.step:.0f}s", f"members={free.runs}"]
            jobs.append(Job(f"free-{family}", (tuple(line),), may_diverge=True))
        return jobs

    def _free(self, family: str) -> Path:
        return self.out / "forecasts" / f"free-{family}.zarr"

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
            out.append(self._forecast(models, self._ahead(name, n), self.file(f"initial_{n}.zarr"), dates, seed))
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
        kinds = [(f, s, f"{f}-{s}") for f in (*rates, *self.variants) for s in range(self.cfg.seeds)] + [(n, 0, n) for n in self.ensembles]
        sources = self.ensembles | {name: family for name, (family, _, _) in self.variants.items()}
        for family, seed, name in kinds:
            source, models = sources.get(family, family), self.cfg.seeds if family in self.ensembles else 1
            run = self.out / "models" / f"{source}-{seed}"
            model = Checkpoint.load(run / "model")
            steps = json.loads((run / "summary.json").read_text())["step"]
            ahead = sum(timing[name][-self.design.trajectories :]) / draws
            calls = [open_dataset(self._ahead(name, n)).attrs["network_calls"] for n in range(self.design.trajectories)]
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

    def ran_free(self) -> dict[str, xr.Dataset | None]:
        """The free runs of every family; None where nothing came of them."""
        paths = {family: self._free(family) for family in self.families} if self.cfg.free.runs else {}
        return {family: open_dataset(path) if path.exists() else None for family, path in paths.items()}
