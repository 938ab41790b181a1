"""``train``: a run directory, resumable, and a model directory."""

import dataclasses
import inspect
import json
import os
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from appa_lite.config import build, resolve
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_seconds
from appa_lite.core.store import digest
from appa_lite.data.open import open_fields
from appa_lite.data.windows import LazyFields
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.stages.device import device
from appa_lite.stages.prior import matching_fields
from appa_lite.training.base import Recipe
from appa_lite.training.data import Sample, TrainingData
from appa_lite.training.latents import LatentStore
from appa_lite.training.loop import TrainingConfig, train
from appa_lite.training.profile import table

MAIN = os.environ.get("RANK", "0") == "0"  # of the processes that a launcher started, the one that writes and prints


def run(cfg: DictConfig) -> None:
    """Train ``cfg.trainable`` on ``cfg.data``; the model directory is ``cfg.run``/model."""
    directory = Path(cfg.run)
    if not cfg.resume and (directory / "checkpoints").is_dir():
        raise UserError(f"'{directory}' holds a training: give another run=, or resume=true")
    recipe = _recipe(cfg)
    torch.manual_seed(cfg.seed)
    config = TrainingConfig(**OmegaConf.to_container(cfg.training), seed=cfg.seed, device=cfg.device)
    trainable, windows, held = recipe.prepare(_data(cfg, config))
    if any(p.requires_grad for p in trainable.model.parameters()):
        scores = train(trainable, windows, held, config, directory)
    else:
        scores = {}
        if MAIN:
            (directory / "model").mkdir(parents=True, exist_ok=True)
            trainable.export(directory / "model")
    if MAIN and config.profile and (directory / "profile.json").exists():
        print(table(directory))
    if MAIN:
        print(f"{directory / 'model'}: " + (", ".join(f"{k} {v:.4g}" for k, v in scores.items()) or "nothing to train"))


def _recipe(cfg: DictConfig) -> Recipe:
    """The recipe of ``cfg.trainable``, with those keys of the command that it has parameters for."""
    entry = OmegaConf.to_container(cfg.trainable)
    cls, _ = resolve(entry, Recipe)
    shared = [name for name in inspect.signature(cls).parameters if name in cfg and name not in entry]
    keys = OmegaConf.to_container(cfg)
    return build(entry, Recipe, **{name: keys[name] for name in shared})


def _data(cfg: DictConfig, config: TrainingConfig) -> TrainingData:
    """Training and validation fields; without a validation set the last tenth of the period is held out."""
    base = None if cfg.autoencoder is None else Checkpoint.load(cfg.autoencoder)
    train, spec = _sample(cfg, cfg.data, cfg.period, base and base.spec)
    if cfg.validation is None and cfg.validation_period is None:
        cut = train.fields.shape[1] * 9 // 10
        held = train.part(train.fields.shape[0], slice(cut, None))
        train = train.part(train.fields.shape[0], slice(cut))
    else:
        held, _ = _sample(cfg, cfg.validation or cfg.data, cfg.validation_period, spec)
    settings = {"experiment": cfg.experiment, "forcing_periods": list(cfg.forcing_periods), "phase": float(train.times[0] % spec.step)}
    record = json.loads(json.dumps({"seed": cfg.seed, "training": dataclasses.asdict(config)}))
    store = LatentStore(Path(cfg.latents or Path(cfg.run).parent / "latents"), cfg.memory, device(cfg.device))
    return TrainingData(spec, train, held, base, OmegaConf.to_container(cfg.normalizer), settings, record, store)


def _sample(cfg: DictConfig, path: str, period: list | None, spec: FieldSpec | None) -> tuple[Sample, FieldSpec]:
    """The part of a dataset that ``period`` names, in the terms of ``spec`` if there is one."""
    options = OmegaConf.to_container(cfg.dataset) | (dict(zip(("start", "end"), period, strict=True)) if period else {})
    if spec is None:
        dataset, spec = open_fields(path, cfg.variables, options)
    else:
        dataset = matching_fields(path, spec, options)
    times = torch.from_numpy(to_seconds(dataset["time"].values))
    source = digest(path) if Path(path).exists() else str(path)  # a store elsewhere is known by its address
    streamed = LazyFields(dataset, spec)
    if streamed.nbytes > cfg.memory:
        return Sample(streamed, times, source), spec
    fields = spec.to_tensor(dataset)
    return Sample(fields if fields.ndim == 5 else fields[None], times, source), spec
