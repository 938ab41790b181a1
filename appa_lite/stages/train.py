"""``train``: a run directory, resumable, and a model directory."""

import dataclasses
import json
import os
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from appa_lite.config import build, resolve
from appa_lite.core.covariance import estimate_covariance, localisation
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_seconds
from appa_lite.data.open import open_fields
from appa_lite.data.windows import WindowDataset
from appa_lite.forecasters.posterior import forcing_features
from appa_lite.models.base import Autoencoder
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.normalizer import Normalizer
from appa_lite.stages.prior import matching_fields
from appa_lite.training.autoencoder import AutoencoderTraining, Sample, climatology, reconstruction_card
from appa_lite.training.denoiser import DenoiserTraining, LatentWindows
from appa_lite.training.loop import TrainingConfig, train

MAIN = os.environ.get("RANK", "0") == "0"  # of the processes that a launcher started, the one that writes and prints


def run(cfg: DictConfig) -> None:
    """Train ``cfg.trainable`` on ``cfg.data``; the model directory is ``cfg.run``/model."""
    run_directory = Path(cfg.run)
    if not cfg.resume and (run_directory / "checkpoints").is_dir():
        raise UserError(f"'{run_directory}' holds a training: give another run=, or resume=true")
    torch.manual_seed(cfg.seed)
    cls, keywords = resolve(cfg.trainable, object)
    work = _denoiser if issubclass(cls, LatentDenoiser) else _autoencoder
    scores = work(cfg, cls, keywords, run_directory)
    if MAIN:
        print(f"{run_directory / 'model'}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))


def _fields(cfg: DictConfig, path: str, period: list | None, spec: FieldSpec | None = None) -> tuple[torch.Tensor, torch.Tensor, FieldSpec]:
    """Fields (N, T, C, H, W) and times (T,) of the part of a dataset that ``period`` names."""
    options = OmegaConf.to_container(cfg.dataset) | (dict(zip(("start", "end"), period, strict=True)) if period else {})
    if spec is None:
        dataset, spec = open_fields(path, cfg.variables, options)
    else:
        dataset = matching_fields(path, spec, options)
    fields = spec.to_tensor(dataset)
    return fields if fields.ndim == 5 else fields[None], torch.from_numpy(to_seconds(dataset["time"].values)), spec


def _data(cfg: DictConfig, spec: FieldSpec | None = None) -> tuple:
    """Training and validation fields; without a validation set the last tenth of the period is held out."""
    fields, times, spec = _fields(cfg, cfg.data, cfg.period, spec)
    if cfg.validation is None and cfg.validation_period is None:
        cut = fields.shape[1] * 9 // 10
        return fields[:, :cut], times[:cut], fields[:, cut:], times[cut:], spec
    held, held_times, _ = _fields(cfg, cfg.validation or cfg.data, cfg.validation_period, spec)
    return fields, times, held, held_times, spec


def _settings(cfg: DictConfig) -> TrainingConfig:
    return TrainingConfig(**OmegaConf.to_container(cfg.training), seed=cfg.seed, device=cfg.device)


def _autoencoder(cfg: DictConfig, cls: type, keywords: dict, run_directory: Path) -> dict[str, float]:
    fields, times, held, held_times, spec = _data(cfg)
    if min(fields.shape[1], held.shape[1]) < cfg.window:
        raise UserError(
            f"window={cfg.window} frames is longer than the data: {fields.shape[1]} and {held.shape[1]} frames to train and validate on"
        )
    pick = [
        [dict(cfg.normalizer[key]).get(name, default) for name in spec.names]
        for key, default in (("transforms", "identity"), ("offsets", 1.0))
    ]
    normalizer = Normalizer(spec.shape, list(cfg.normalizer.periods), *pick).fit(fields, times, spec.mask_tensor())
    settings = {"experiment": cfg.experiment, "forcing_periods": list(cfg.forcing_periods), "phase": float(times[0] % spec.step)}
    some = Sample(fields[: max(1, 3000 // fields.shape[1])], times)
    test = Sample(held[:4, :400], held_times[:400])
    given = {"shape": spec.shape} | ({"periodic": spec.grid.periodic} if "periodic" in cls.__init__.__wrapped__.__annotations__ else {})
    model = _fitting(cfg.trainable, Autoencoder, given)
    if not any(p.requires_grad for p in model.parameters()):
        card = reconstruction_card(model, normalizer, spec, some, test)
        result = Checkpoint(spec, normalizer, model, None, settings | {"autoencoder": card}, climatology(spec, fields))
        if MAIN:
            result.save(run_directory / "model")
        return {"compression": card["compression"]}
    model.mask.copy_(spec.mask_tensor())
    weights = OmegaConf.to_container(cfg.weights)
    training = AutoencoderTraining(model, normalizer, spec, weights, some, test, settings, climatology(spec, fields))
    model.start_from_components(normalizer(some.fields, some.times), torch.tensor([float(weights.get(n, 1.0)) for n in spec.names]))
    windows = [WindowDataset(f, t, cfg.window, s) for f, t, s in ((fields, times, cfg.window_stride), (held, held_times, cfg.window))]
    return train(training, *windows, _settings(cfg), run_directory)


def _fitting(config: DictConfig, kind: type, given: dict) -> torch.nn.Module:
    """The model, or what is wrong with its sizes on this data."""
    try:
        return build(config, kind, **given)
    except ValueError as error:
        raise UserError(f"{error}: change the keys of trainable, or the grid of the data") from error


@torch.no_grad()
def encode(checkpoint: Checkpoint, fields: torch.Tensor, times: torch.Tensor, chunk: int = 64) -> torch.Tensor:
    """Latents (N, T', Z, h, w) of trajectories, in overlapping pieces so that the ends of a piece do not show."""
    stride, reach = checkpoint.autoencoder.stride[0], 2 * checkpoint.autoencoder.reach
    total, out = fields.shape[1] // stride, []
    for trajectory in fields:
        normal = checkpoint.normalizer(trajectory[: total * stride], times[: total * stride])[None]
        parts = []
        for start in range(0, total, chunk):
            low, high = max(0, start - reach), min(total, start + chunk + reach)
            latents = checkpoint.autoencoder.encode(normal[:, low * stride : high * stride])
            parts.append(latents[:, start - low : start - low + min(chunk, total - start)])
        out.append(torch.cat(parts, dim=1)[0])
    return torch.stack(out)


def _denoiser(cfg: DictConfig, cls: type, keywords: dict, run_directory: Path) -> dict[str, float]:
    if cfg.autoencoder is None:
        raise UserError("trainable=denoiser needs autoencoder=DIR, the model directory of a trained autoencoder")
    base = Checkpoint.load(cfg.autoencoder)
    fields, times, held, held_times, _ = _data(cfg, base.spec)
    stride = base.autoencoder.stride[0]
    base = dataclasses.replace(base, climatology=climatology(base.spec, fields))
    pairs = [(encode(base, f, t), t[: f.shape[1] // stride * stride : stride]) for f, t in ((fields, times), (held, held_times))]
    shortest = min(z.shape[1] for z, _ in pairs)
    if shortest < cfg.window:
        raise UserError(f"window={cfg.window} is longer than the data to train or validate on: {shortest} latent frames of {stride} frames")
    del fields, held
    periods = tuple(base.settings["forcing_periods"])
    levels = torch.logspace(*(torch.tensor(v).log10() for v in (cfg.noise.low, cfg.noise.high)), cfg.noise.levels).tolist()
    given = {"latent_shape": base.autoencoder.latent_shape, "frames": cfg.window, "periodic": base.spec.grid.periodic}
    given |= {"forcings": 2 * len(periods), "noise_levels": levels}
    train_latents = pairs[0][0].flatten(2)
    lags, modes = min(cfg.trainable.lags, train_latents.shape[1]), min(cfg.trainable.modes, train_latents[..., 0].numel())
    model = _fitting(OmegaConf.merge(cfg.trainable, {"lags": lags, "modes": modes}), LatentDenoiser, given)
    mean = train_latents.mean((0, 1))
    taper = None if cfg.localisation is None else localisation(base.autoencoder.latent_shape, base.spec.grid.periodic, cfg.localisation)
    model.set_climatology(mean, estimate_covariance(train_latents - mean, model.covariance.modes, lags, taper))
    windows = [
        LatentWindows(z, forcing_features(t, periods), cfg.window, s)
        for (z, t), s in zip(pairs, (cfg.window_stride, max(1, cfg.window // 4)), strict=True)
    ]
    record = {"seed": cfg.seed, "training": dataclasses.asdict(_settings(cfg)), "train_windows": len(windows[0])}
    settings = {"denoiser": json.loads(json.dumps(record)), "window": cfg.window}
    training = DenoiserTraining(model, base, cfg.noise.low, cfg.noise.high, windows[1], settings, cfg.half)
    return train(training, *windows, _settings(cfg), run_directory)
