"""What the inference commands share: the competitor a configuration describes, progress bars, lengths of time."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from omegaconf import DictConfig, ListConfig, OmegaConf
from tqdm import tqdm

from appa_lite.config import build, compose, options, resolve
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_seconds
from appa_lite.data.open import open_fields, parse_date
from appa_lite.diffusion.base import Sampler
from appa_lite.forecasters.base import Assimilator, Forecaster
from appa_lite.guidance.base import Guidance
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.simulators.base import Simulator
from appa_lite.stages.device import device

BEGINNING = "2000-01-01"


@dataclass(frozen=True)
class Setting:
    """What a competitor works on: the fields (None: those of its input), the phase of their frames (seconds), and the trained
    model if it has one."""

    spec: FieldSpec | None
    phase: float
    checkpoint: Checkpoint | None


def competitor(cfg: DictConfig, kind: type[Assimilator] | type[Forecaster]) -> tuple[Assimilator | Forecaster, Setting]:
    """The forecaster or assimilator ``cfg.forecaster`` describes, on the model in ``cfg.checkpoint`` or on ``cfg.simulator``.

    Without a checkpoint, frames are in phase with ``cfg.start``, else with 2000-01-01, where ``simulate`` begins.
    """
    models = _models(cfg)
    entry = _entry(cfg, models)
    cls, _ = resolve(entry, kind)
    wanted = inspect.signature(cls).parameters
    given, checkpoint, simulator = {"batch": cfg.get("batch")}, models[0] if models else None, None
    if "checkpoint" in wanted:
        if not models:
            raise UserError(f"{cls.__name__} needs checkpoint=...: directory of a trained model")
        if kind is Assimilator and checkpoint.denoiser is None:
            raise UserError(f"'{cfg.checkpoint}' forecasts only: {cls.__name__} needs the model directory of a trained denoiser")
        given |= {"checkpoint": models if len(models) > 1 else checkpoint}
    if "simulator" in wanted:
        simulator = _simulator(cfg, cls.__name__, checkpoint)
        given |= {"simulator": simulator}
    if "guidance" in wanted:
        given |= {"guidance": build(cfg.guidance, Guidance), "sampler": build(cfg.sampler, Sampler)}
    if "device" in wanted:
        given |= {"device": device(cfg.device)}
    built = build(entry, kind, **{name: part for name, part in given.items() if name in wanted and name not in entry})
    if checkpoint is not None:
        return built, Setting(checkpoint.spec, checkpoint.settings.get("phase", 0.0), checkpoint)
    if simulator is None:
        return built, Setting(None, 0.0, None)
    began = to_seconds(np.array([parse_date(cfg.get("start") or BEGINNING, "start")]))[0]
    return built, Setting(simulator.spec, float(began % simulator.spec.step), None)


def _models(cfg: DictConfig) -> list[Checkpoint]:
    """The trained models in ``cfg.checkpoint``, a directory or a list of them; none if it is null."""
    given = cfg.checkpoint if isinstance(cfg.checkpoint, ListConfig) else [cfg.checkpoint]
    paths = [path for path in given if path is not None]
    models = [Checkpoint.load(path, device(cfg.device)) for path in paths]
    for path, model in zip(paths, models, strict=True):
        if model.forecaster is None:
            raise UserError(f"'{path}' holds an autoencoder only: train a model on it, and give that run's model directory")
    return models


def _entry(cfg: DictConfig, models: list[Checkpoint]) -> dict[str, Any]:
    """``cfg.forecaster``; where it names no class, the one that fits the trained model, with the keys that were given."""
    entry = OmegaConf.to_container(cfg.forecaster) if cfg.forecaster is not None else {}
    if "class" in entry:
        return entry
    if not models:
        raise UserError(f"{cfg.command} needs checkpoint=..., directory of a trained model, or forecaster=...")
    return OmegaConf.to_container(compose("forecast", [f"forecaster={models[0].forecaster}"], partial=True).forecaster) | entry


def _simulator(cfg: DictConfig, name: str, checkpoint: Checkpoint | None) -> Simulator:
    if cfg.get("simulator") is None:
        raise UserError(f"{name} runs a simulator: give experiment=... or simulator=... (one of: {', '.join(options('simulator'))})")
    simulator = build(cfg.simulator, Simulator)
    if checkpoint is not None and (checkpoint.spec.shape, checkpoint.spec.step) != (simulator.spec.shape, simulator.spec.step):
        sizes = [f"{s.channels} x {s.grid.shape[0]} x {s.grid.shape[1]} every {s.step:g} s" for s in (simulator.spec, checkpoint.spec)]
        raise UserError(f"the simulator's fields are {sizes[0]}, those of '{cfg.checkpoint}' {sizes[1]}: leave checkpoint out")
    return simulator


def matching_fields(path: str | xr.Dataset, spec: FieldSpec, options: Mapping[str, Any] | None = None) -> xr.Dataset:
    """The dataset at ``path``, in the names, order and axes of a model's ``spec``.

    Raises:
        UserError: it lacks variables, or has another grid or other units than the model.
    """
    dataset, found = open_fields(path, list(spec.names), options)
    path = "the dataset" if isinstance(path, xr.Dataset) else path
    axes = [(np.asarray(getattr(found.grid, axis)), np.asarray(getattr(spec.grid, axis))) for axis in ("y", "x")]
    if found.grid.dims != spec.grid.dims or any(len(a) != len(b) for a, b in axes):
        shapes = [f"{' x '.join(map(str, grid.shape))} cells ({', '.join(grid.dims)})" for grid in (found.grid, spec.grid)]
        raise UserError(f"'{path}' has {shapes[0]}, the model {shapes[1]}: this checkpoint was made for another grid")
    if any(np.abs(a - b).max() > 0.01 * spacing for (a, b), spacing in zip(axes, spec.grid.spacing, strict=True)):
        raise UserError(f"'{path}' lies elsewhere than the model's grid, though it has as many cells: regrid it, or train on it")
    for theirs, ours in zip(found.variables, spec.variables, strict=True):
        if theirs.units != ours.units:
            raise UserError(f"wrong units: '{ours.name}' of '{path}' is in '{theirs.units}', in the model in '{ours.units}': convert it")
    return dataset


@contextmanager
def counted(checkpoint: Checkpoint | None) -> Iterator[list[int]]:
    """Within the context, the rows that every evaluation of the checkpoint's networks is given are noted in the list."""
    rows: list[int] = []
    networks = [] if checkpoint is None else [m for m in (checkpoint.denoiser, checkpoint.emulator) if m is not None]
    first = [module for network in networks for name, module in network.named_modules() if name.endswith("blocks.0")]
    hooks = [module.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[0])) for module in first]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


class Bar:
    """A progress bar fed by (what, done, all)."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.what or self.bar is None or done < self.bar.n:
            self.close()
            self.bar, self.what = tqdm(total=total, desc=what, unit="step", leave=False), what
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def duration(text: object, key: str) -> float:
    """Seconds in a length of time such as ``20d``, ``36h`` or ``90min``."""
    try:
        seconds = pd.Timedelta(re.sub(r"(?<=[\d.\s])d$", "D", str(text))).total_seconds()
    except ValueError:
        raise UserError(f"{key}={text} is not a length of time: expected such as 20d, 36h or 90min") from None
    if not seconds > 0:
        raise UserError(f"{key}={text} must be positive")
    return seconds
