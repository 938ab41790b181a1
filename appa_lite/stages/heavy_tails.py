"""The priors that ``tails`` compares: what each does to the data, to the noise and to the start of its sampler."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from appa_lite.config import build
from appa_lite.core.fields import FieldSpec
from appa_lite.core.pareto import fit_pareto
from appa_lite.diffusion.base import Denoiser, Sampler
from appa_lite.diffusion.noise_laws import Gaussian, NoiseLaw, Stable, Student
from appa_lite.diffusion.samplers import DLPM
from appa_lite.forecasters.tail_laboratory import MetaGaussian, Proxy, gaussian_proxy
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.stages.prior import duration
from appa_lite.training.autoencoder import AutoencoderRecipe
from appa_lite.training.base import Recipe
from appa_lite.training.data import Sample, TrainingData
from appa_lite.training.denoiser import DenoiserRecipe
from appa_lite.training.heavy_tails import HeavyTailedRecipe, evaluate
from appa_lite.training.loop import TrainingConfig, train

#: the transform of the normaliser that each prior has
PRIORS = {"edm": "identity", "gaussianize": "gaussianize", "student": "identity", "stable": "identity", "heavy_start": "identity"}
LIGHTEST = 30.0  # degrees of freedom of Student noise where the data have no heavy tail


@dataclass(frozen=True)
class Fitted:
    """A trained prior: its model, the law of its noise, what its sampler starts from, and how its sampler is made."""

    name: str
    checkpoint: Checkpoint
    law: NoiseLaw
    proxy: Proxy

    @property
    def denoiser(self) -> Denoiser:
        return lambda x, sigma: evaluate(self.checkpoint.denoiser, self.law, x, sigma)

    def sampler(self, cfg: DictConfig) -> Sampler:
        """The sampler of the command, except where the prior has its own: DLPM, or a low start."""
        given = OmegaConf.to_container(cfg.sampler)
        if self.name == "stable":
            return DLPM(cfg.stable_steps, cfg.noise.high, given["sigma_min"], cfg.alpha)
        return build(given | ({"sigma_max": cfg.heavy_start} if self.name == "heavy_start" else {}), Sampler)

    def calls(self, sampler: Sampler) -> int:
        """Evaluations of the network for a snapshot."""
        count = 0

        def counting(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return torch.zeros_like(x)

        sampler(counting, lambda _: torch.zeros(1, 2))
        return count


def fit_prior(cfg: DictConfig, spec: FieldSpec, fields: Tensor, name: str, seed: int, place: Path) -> Fitted:
    """Train a prior on independent snapshots (N, C, H, W), a tenth of them held out, in the directory ``place``."""
    cut = len(fields) * 9 // 10
    times = torch.zeros(1, dtype=torch.float64)
    parts = [Sample(part[:, None], times) for part in (fields[:cut], fields[cut:])]
    normalizer = {"periods": [], "transforms": dict.fromkeys(spec.names, PRIORS[name]), "offsets": {}}
    normalizer["homogeneous"] = cfg.denoiser.homogeneous
    settings = {"experiment": cfg.experiment, "forcing_periods": [], "phase": 0.0}
    data = TrainingData(spec, *parts, None, normalizer, settings, {"seed": seed})
    encoder = OmegaConf.to_container(cfg.autoencoder)
    steps = encoder.pop("steps")
    shared = place.parent.parent / f"autoencoder_{PRIORS[name]}" / place.name  # the same for all priors with this normaliser
    config = _config(cfg, seed)
    space = _train(
        AutoencoderRecipe(**encoder, window=1), data, dataclasses.replace(config, steps=steps, warmup=20, time_limit=None), shared
    )
    law = _law(cfg, name, fields[:cut])
    noise = OmegaConf.to_container(cfg.noise) | ({"high": 2 * cfg.heavy_start} if name == "heavy_start" else {})
    recipe: Recipe = DenoiserRecipe(**OmegaConf.to_container(cfg.denoiser), lags=1, window=1, noise=noise)
    if not isinstance(law, Gaussian):
        recipe = HeavyTailedRecipe(recipe, law)
    limit = None if cfg.budget is None else duration(cfg.budget, "budget")
    checkpoint = _train(recipe, dataclasses.replace(data, base=space), dataclasses.replace(config, time_limit=limit), place)
    if name == "heavy_start":
        return Fitted(name, checkpoint, law, MetaGaussian.fit(fields[:cut], spec.grid.periodic).proxy(checkpoint, seed))
    return Fitted(name, checkpoint, law, gaussian_proxy(checkpoint, seed))


def _config(cfg: DictConfig, seed: int) -> TrainingConfig:
    return TrainingConfig(**OmegaConf.to_container(cfg.training), seed=seed, device=cfg.device)


def _train(recipe: Recipe, data: TrainingData, config: TrainingConfig, run: Path) -> Checkpoint:
    """The checkpoint in ``run``, trained unless it was."""
    if not (run / "summary.json").is_file():
        torch.manual_seed(config.seed)  # layers draw their first weights from torch's own generator
        train(*recipe.prepare(data), config, run)
    return Checkpoint.load(run / "model")


def _law(cfg: DictConfig, name: str, fields: Tensor) -> NoiseLaw:
    """Student noise has the tail of the data, as Pandey et al. choose it; the index of stable noise is given."""
    if name == "student":
        x = fields[:, 0].flatten().double()
        start = x.kthvalue(round(0.99 * len(x)))[0]
        shape = fit_pareto(x[x > start] - start).shape
        return Student(min(max(1 / max(shape, 1e-3), 2.2), LIGHTEST))
    return Stable(cfg.alpha) if name == "stable" else Gaussian()
