"""``plan``: memory, time, traffic and cost of a training, before any of it is paid."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from appa_lite.config import build, compose, directory, unknown
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable
from appa_lite.core.modes import working_bytes
from appa_lite.core.store import atomic
from appa_lite.data.open import open_fields
from appa_lite.models.autoencoder import SpatiotemporalAutoencoder
from appa_lite.models.base import Autoencoder
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer
from appa_lite.simulators.base import Simulator
from appa_lite.stages.device import device
from appa_lite.training import costs
from appa_lite.training.autoencoder import AutoencoderRecipe, AutoencoderTraining
from appa_lite.training.base import fitting
from appa_lite.training.denoiser import DenoiserRecipe, DenoiserTraining
from appa_lite.training.schedule import TrainingConfig
from appa_lite.verification.tables import check_table_path, dumps

HOST = 1e12  #: bytes of memory of a large node
Rows = dict[str, tuple[float | str, str]]  #: quantity -> value, unit


def run(cfg: DictConfig) -> None:
    """Print, and write to ``cfg.out``, what the trainings of ``cfg.experiment`` and its reanalyses cost."""
    if cfg.out is not None:
        check_table_path(cfg.out)
    rows = planned(cfg)
    width = max(map(len, rows))
    for quantity, (value, unit) in rows.items():
        print(f"{quantity:{width}}  {value if isinstance(value, str) else f'{value:.4g}'} {unit}".rstrip())
    if cfg.out is not None:
        records = [{"quantity": q, "value": value, "unit": unit} for q, (value, unit) in rows.items()]
        with atomic(cfg.out) as partial_path:
            partial_path.write_text(dumps(records, Path(cfg.out).suffix))


def planned(cfg: DictConfig) -> Rows:
    """All quantities. Nothing is allocated, unless ``cfg.calibrate``."""
    spec, frames = _fields(cfg)
    strategy, world = _launch(cfg)
    machine = _machine(cfg)
    settings = {name: _train(cfg, name) for name in ("autoencoder", "denoiser")}
    small = build(settings["autoencoder"].trainable, AutoencoderRecipe) if cfg.autoencoder == "autoencoder" else None
    recipe = _recipe(settings["denoiser"])
    recipe = replace(recipe, window=cfg.window or recipe.window)
    forcings = 2 * len(settings["denoiser"].forcing_periods)
    with torch.device("meta"):
        encoder = _encoder(small, spec)
    rows: Rows = {"processes": (world, ""), "strategy": (strategy, "")}
    makers = {} if small is None else {"autoencoder": partial(_autoencoder, _recipe(settings["autoencoder"]), spec)}
    makers["denoiser"] = partial(_denoiser, recipe, encoder.latent_shape, spec.grid.periodic, forcings)
    total = {"hours": 0.0, "device_hours": 0.0, "price": 0.0}
    for name, make in makers.items():
        config = _config(settings[name], cfg)
        part, speed = _training(cfg, config, make, strategy, world, machine)
        rows |= {f"{name}.{key}": value for key, value in part.items()}
        for key in total:
            total[key] += part[key][0] if key in part else 0.0
        if name == "denoiser":
            rows |= _reanalysis(cfg, recipe, encoder, part, speed)
    rows |= {f"total.{key}": (value, {"hours": "h", "device_hours": "h", "price": "of price"}[key]) for key, value in total.items()}
    if cfg.published is not None:
        rows["total.device_hours_over_published"] = (total["device_hours"] / cfg.published, "")
    size = 1.0 * frames * spec.channels * spec.grid.shape[0] * spec.grid.shape[1]
    z, h, w = encoder.latent_shape
    rows["storage.fields"] = (4 * size, "B")
    rows["storage.latents"] = (4.0 * frames / encoder.stride[0] * z * h * w, "B")
    return rows


# What is asked for


def _fields(cfg: DictConfig) -> tuple[FieldSpec, int]:
    """The fields and how many frames of them there are to train on."""
    simulated = compose("simulate", [f"experiment={cfg.experiment}", f"size={cfg.size}"], partial=True)
    frames = simulated.frames * simulated.trajectories
    if cfg.data is not None:
        dataset, spec = open_fields(cfg.data, None, {})
        return spec, dataset.sizes["time"] * dataset.sizes.get("trajectory", 1)
    if cfg.simulator is not None:
        return build(cfg.simulator, Simulator).spec, frames
    if not cfg.grid:
        raise UserError("plan needs data=FILE, simulator=... or grid={channels: C, rows: H, columns: W, step: SECONDS}")
    g = {"periodic": [False, True], "frames": frames, "step": 3600.0} | OmegaConf.to_container(cfg.grid)
    absent = {"channels", "rows", "columns"} - set(g)
    if absent:
        raise UserError(f"grid needs {', '.join(sorted(absent))}")
    axes = tuple(tuple(map(float, range(g[name]))) for name in ("rows", "columns"))
    variables = tuple(Variable(f"v{i}", "1") for i in range(g["channels"]))
    return FieldSpec(variables, Grid(("y", "x"), *axes, tuple(g["periodic"])), float(g["step"])), int(g["frames"])


def _train(cfg: DictConfig, trainable: str) -> DictConfig:
    return compose("train", [f"experiment={cfg.experiment}", f"size={cfg.size}", f"trainable={trainable}"], partial=True)


def _recipe(settings: DictConfig) -> AutoencoderRecipe | DenoiserRecipe:
    """The recipe of a configuration of ``train``, with the keys of the command that it has parameters for."""
    kind = DenoiserRecipe if settings.trainable["class"].endswith("DenoiserRecipe") else AutoencoderRecipe
    recipe = build(settings.trainable, kind)
    keys = OmegaConf.to_container(settings)
    shared = [name for name in vars(recipe) if name in keys and name not in settings.trainable]
    return replace(recipe, **{name: keys[name] for name in shared})


def _config(settings: DictConfig, cfg: DictConfig) -> TrainingConfig:
    keys = OmegaConf.to_container(settings.training) | OmegaConf.to_container(cfg.training)
    wrong = set(keys) - set(TrainingConfig.__dataclass_fields__)
    if wrong:
        raise unknown("key of training", min(wrong), TrainingConfig.__dataclass_fields__)
    if keys["precision"] == "auto":
        keys["precision"] = "fp32" if cfg.device == "cpu" else "bf16"
    return TrainingConfig(**keys)


def _launch(cfg: DictConfig) -> tuple[str, int]:
    """Strategy and number of processes of a launch file."""
    folder = directory().parent / "launch" / "accelerate"
    path = folder / f"{cfg.launch}.yaml"
    if not path.is_file():
        raise unknown("launch configuration", str(cfg.launch), [p.stem for p in folder.glob("*.yaml")])
    launch = OmegaConf.load(path)
    world = int(cfg.processes or launch.num_processes)
    if launch.distributed_type == "FSDP":
        return "fsdp2", world
    if launch.distributed_type != "DEEPSPEED":
        return "ddp", world
    zero = json.loads((folder.parents[1] / launch.deepspeed_config.deepspeed_config_file).read_text())["zero_optimization"]
    return f"zero{zero['stage']}" + ("_offload" if any(key.startswith("offload") for key in zero) else ""), world


def _machine(cfg: DictConfig) -> dict[str, float]:
    """Peaks, memory and bandwidths of the device."""
    if cfg.device == "cpu":
        here = device("cpu")
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        peaks = {"bf16": costs.peak_here(here, True), "fp32": costs.peak_here(here, False)}
        return {**peaks, "memory": memory, "node": 10e9, "network": 1e9}
    if cfg.device not in costs.DEVICES:
        raise unknown("device", str(cfg.device), [*costs.DEVICES, "cpu"])
    if cfg.calibrate:
        raise UserError(f"calibrate=true measures this machine, not a {cfg.device}: say device=cpu, or calibrate=false")
    return costs.DEVICES[cfg.device]


# What is made, where tensors have no content


def _encoder(recipe: AutoencoderRecipe | None, spec: FieldSpec) -> Autoencoder:
    if recipe is None:
        return IdentityAutoencoder(spec.shape)
    r = recipe
    with fitting():
        return SpatiotemporalAutoencoder(spec.shape, r.stride, r.channels, r.width, r.depth, r.lap, r.kernel, spec.grid.periodic)


def _autoencoder(recipe: AutoencoderRecipe, spec: FieldSpec, samples: int) -> costs.Made:
    training = AutoencoderTraining(_encoder(recipe, spec), Normalizer(spec.shape), spec, dict(recipe.weights), None, None)
    return training, {"fields": torch.randn(samples, recipe.window, *spec.shape), "time": torch.zeros(samples, recipe.window)}


def _denoiser(recipe: DenoiserRecipe, latent: tuple[int, int, int], periodic: tuple, forcings: int, samples: int) -> costs.Made:
    r, levels = recipe, [float(i + 1) for i in range(recipe.noise["levels"])]
    places = (r.patch, periodic, r.spatial_attention, r.homogeneous, forcings, min(r.modes, latent[0] * latent[1] * latent[2]), r.lags)
    with fitting():
        model = LatentDenoiser(latent, r.window, r.width, r.depth, r.heads, r.kernel, *places, levels)
    batch = {"latents": torch.randn(samples, r.window, *latent)}
    if forcings:
        batch["forcing"] = torch.zeros(samples, r.window, forcings)
    return DenoiserTraining(model, None, r.noise["low"], r.noise["high"], None, {}), batch


# What it costs


def _training(
    cfg: DictConfig, config: TrainingConfig, make: partial, strategy: str, world: int, machine: Mapping[str, float]
) -> tuple[Rows, float]:
    """The rows of one model, and the operations per second that it is computed with."""
    if config.batch % (world * config.accumulate):
        raise UserError(f"a batch of {config.batch} is not a multiple of {world} processes x {config.accumulate} parts: training.batch=...")
    samples = config.batch // (world * config.accumulate)
    cost = costs.step_cost(lambda: make(samples), config)
    peak, mfu = machine[config.precision], cfg.mfu
    rows: Rows = {"parameters": (cost.parameters, ""), "flops_forward": (cost.forward / samples, "FLOP per sample")}
    rows["flops"] = (cost.operations, "FLOP per sample")
    if cfg.calibrate:
        torch.manual_seed(cfg.seed)
        measured = costs.seconds_per_step(lambda: make(samples), config)
        mfu = cost.operations * samples / measured / peak
    rows |= _memories(cost, strategy, world, machine["memory"])
    compute = cost.operations * samples * config.accumulate / (peak * mfu)
    sent = costs.traffic(cost, strategy, world, config.accumulate)
    wire = machine["node" if world <= cfg.per_node else "network"]
    step = max(compute, sent / wire)
    rows |= {
        "traffic": (sent, "B per step and process"),
        "seconds_compute": (compute, "s per step"),
        "seconds_traffic": (sent / wire, "s per step"),
    }
    rows |= {"seconds_per_step": (step, "s"), "mfu": (mfu * compute / step, "")}
    rows["storage.checkpoint"] = (1.0 * cost.weights + cost.optimizer + cost.average, "B")
    rows["storage.checkpoints"] = (config.keep * (cost.weights + cost.optimizer + cost.average), "B")
    steps = cfg.samples / config.batch if cfg.samples else config.steps
    if steps is not None:
        hours = step * steps / 3600
        rows |= {"samples": (steps * config.batch, ""), "hours": (hours, "h"), "device_hours": (hours * world, "h")}
        rows["price"] = (hours * world * cfg.price, "of price")
    elif config.time_limit:
        rows |= {"samples": (config.time_limit / step * config.batch, ""), "hours": (config.time_limit / 3600, "h")}
        rows |= {
            "device_hours": (config.time_limit / 3600 * world, "h"),
            "price": (config.time_limit / 3600 * world * cfg.price, "of price"),
        }
    return rows, peak * mfu


def _memories(cost: costs.StepCost, strategy: str, world: int, limit: float) -> Rows:
    """Memory of each process by what it holds, the total of every other strategy, and which of them would fit."""
    chosen = costs.memory(cost, strategy, world)
    rows: Rows = {f"memory.{key}": (value, "B per process") for key, value in chosen.items()}
    totals = {name: costs.memory(cost, name, world)["total"] for name in costs.STRATEGIES}
    rows |= {f"memory.{name}.total": (value, "B per process") for name, value in totals.items() if name != strategy}
    fits = [name for name, value in totals.items() if value <= 0.9 * limit]
    rows["fits"] = ("yes" if strategy in fits else "no", f"of {limit:.3g} B, with a tenth to spare")
    if strategy not in fits:
        rows["would_fit"] = (", ".join(fits) or "none: checkpoint_activations=1, or a larger accumulate", "")
    return rows


def _reanalysis(cfg: DictConfig, recipe: DenoiserRecipe, encoder: Autoencoder, denoiser: Rows, speed: float) -> Rows:
    """What a member of a reanalysis costs, and what the climatology behind the modes needs.

    A step of the sampler denoises every window, and with a Jacobian pulls one gradient back through it; the decoder and the
    solver of the observations, which depend on how many there are, are left out.
    """
    chosen = compose("reanalysis", [f"experiment={cfg.experiment}", f"size={cfg.size}"], partial=True)
    size = encoder.latent_shape[0] * encoder.latent_shape[1] * encoder.latent_shape[2]
    overlap = min(chosen.forecaster.get("overlap", 6), recipe.window - 1)
    frames = max(cfg.latent_frames or recipe.window, recipe.window)
    windows = -(-(frames - recipe.window) // (recipe.window - overlap)) + 1
    forward, both = denoiser["flops_forward"][0], denoiser["flops"][0]
    covariance = working_bytes(size, min(recipe.modes, size), recipe.localisation is not None)
    operations = chosen.sampler.steps * windows * (both if chosen.guidance.get("jacobian", True) else forward)
    return {
        "denoiser.modes": (4.0 * size * min(recipe.modes, size), "B"),
        "denoiser.covariance": (covariance, "B on the host, once"),
        "denoiser.covariance_fits": ("yes" if covariance < HOST else "no: fewer modes, or localisation=null", ""),
        "reanalysis.windows": (windows, ""),
        "reanalysis.flops": (operations, "FLOP per member"),
        "reanalysis.seconds": (operations / speed, "s per member"),
    }
