"""Tails of generated fields beside those of the law they were learned from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from appa_lite.core.covariance import SpaceTimeCovariance, estimate_covariance
from appa_lite.core.pareto import fit_pareto
from appa_lite.core.random import Streams
from appa_lite.diffusion.base import Denoiser, Sampler
from appa_lite.diffusion.noise_laws import NoiseLaw
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.margins import Margin
from appa_lite.simulators.base import Simulator, trajectories

LEVELS = (0.99, 0.999, 0.9999)
BOX = 8  # cells along each side of the areas whose means are looked at
Record = dict[str, object]

#: (members) -> guesses of latents z (B, T, ...) whose law resembles that of the data
Proxy = Callable[[list[int]], Tensor]


# Drawing


def gaussian_proxy(checkpoint: Checkpoint, seed: int) -> Proxy:
    """N(m, C), the climatology of the denoiser."""
    model = checkpoint.denoiser
    shape = (model.config.frames, *checkpoint.autoencoder.latent_shape)

    def draw(members: list[int]) -> Tensor:
        noise = Streams(seed, members, "proxy").normal(shape)
        return (model.covariance.sample(noise.flatten(2)) + model.mean).reshape(noise.shape)

    return draw


@dataclass(frozen=True)
class MetaGaussian:
    """Heavy-tailed fields without a network: Gaussian ones with the covariance of the scores, behind the fitted margins.

    Where a diffusion starts at a small sigma_max, its start carries the tail (Gaussian noising, heavy-tailed law at the end).
    """

    margins: tuple[Margin, ...]
    covariance: SpaceTimeCovariance
    mean: Tensor

    @classmethod
    def fit(cls, fields: Tensor, periodic: Sequence[bool]) -> "MetaGaussian":
        """To independent fields (N, C, H, W)."""
        mask = torch.ones(fields.shape[-2:])
        margins = tuple(Margin(periodic).fit(fields[:, c], mask) for c in range(fields.shape[1]))
        scores = torch.stack([margin(fields[:, c]) for c, margin in enumerate(margins)], dim=1).flatten(1)[:, None]
        mean = scores.mean((0, 1))
        return cls(margins, estimate_covariance(scores - mean, 1024, 1), mean)

    def draw(self, noise: Tensor) -> Tensor:
        """Fields (B, C, H, W) from white noise of that shape."""
        scores = (self.covariance.sample(noise.flatten(1)[:, None])[:, 0] + self.mean).reshape(noise.shape)
        return torch.stack([margin.inverse(scores[:, c]) for c, margin in enumerate(self.margins)], dim=1)

    def proxy(self, checkpoint: Checkpoint, seed: int) -> Proxy:
        """Its fields as latents of a checkpoint with windows of one frame."""

        def draw(members: list[int]) -> Tensor:
            fields = self.draw(Streams(seed, members, "proxy").normal(checkpoint.spec.shape))[:, None]
            return checkpoint.autoencoder.encode(checkpoint.normalizer(fields, torch.zeros(1, dtype=torch.float64)))

        return draw


@torch.no_grad()
def draw_fields(
    checkpoint: Checkpoint, denoiser: Denoiser, law: NoiseLaw, sampler: Sampler, proxy: Proxy, count: int, seed: int,
    batch: int = 256, progress: Callable[[int], None] = lambda done: None,
) -> Tensor:  # fmt: skip
    """Fields (count, C, H, W): the sampler starts from z' + sigma_max s g, with z' of the proxy and s of the law.

    Without z' the start would be too narrow by var(z) / (2 sigma_max^2), which the tail magnifies.
    """
    largest, parts = float(sampler.levels[0]), []
    for begin in range(0, count, batch):
        members = list(range(begin, min(begin + batch, count)))
        streams = Streams(seed, members, "tails")
        uniform = torch.special.ndtr(Streams(seed, members, "tails", "scale").normal((2,), torch.float64))
        start = proxy(members)
        scale = law.scale(uniform).to(start).reshape(-1, *[1] * (start.ndim - 1))

        def noise(step: int, streams=streams, start=start, scale=scale) -> Tensor:
            fresh = streams.normal(start.shape[1:])
            return scale * fresh + start / largest if step == 0 else fresh

        latents = sampler(denoiser, noise)
        normal = checkpoint.autoencoder.decode(latents)[:, :1]
        parts.append(checkpoint.normalizer.inverse(normal, torch.zeros(1, dtype=torch.float64))[:, 0])
        progress(members[-1] + 1)
    return torch.cat(parts)


def snapshots(simulator: Simulator, seed: int, count: int, batch: int = 256) -> Tensor:
    """Independent fields (count, C, H, W) of a simulator."""
    parts = [trajectories(simulator, seed, range(b, min(b + batch, count)), 1)[:, 0] for b in range(0, count, batch)]
    return torch.cat(parts)


# Judging


@dataclass(frozen=True)
class Summary:
    """What the scores need of fields (N, H, W): separated pixels, pairs of neighbours, area means and maxima, all (n,)."""

    pixels: Tensor
    pairs: Tensor  #: (2, n)
    areas: Tensor
    maxima: Tensor

    @classmethod
    def of(cls, fields: Tensor, spacing: int) -> "Summary":
        """``spacing``: cells between pixels along rows and columns; of a plane, the middles of the squares count too."""
        x, half = fields.double(), spacing // 2
        h, w = x.shape[-2:]
        box = (min(BOX, h), min(BOX, w))
        areas = x[..., : h // box[0] * box[0], : w // box[1] * box[1]].unfold(-2, box[0], box[0]).unfold(-2, box[1], box[1]).mean((-2, -1))
        pairs = torch.stack([x[..., ::spacing, :-1:2], x[..., ::spacing, 1::2]]).flatten(1)
        pixels = [x[..., ::spacing, ::spacing], x[..., half::spacing, half::spacing]][: 1 if h == 1 else 2]
        return cls(torch.cat([p.flatten() for p in pixels]), pairs, areas.flatten(), x.amax((-2, -1)).flatten())


def tail_scores(found: Summary, truth: Summary, quantile: Callable[[Tensor], Tensor] | None = None) -> list[Record]:
    """Records {metric, level, value, truth, error} of a sample beside a true one; ``error`` is the sampling error of value alone.

    - ``shape``: of the generalised Pareto law above the sample's own 99 % quantile, by maximum likelihood;
    - ``quantile_ratio``: over the true quantile, in closed form (``quantile``, of the probability of exceedance) where there is one;
    - ``mass_ratio``: probability above the true 99 % quantile, over 0.01;
    - ``chi``: probability that a neighbour is above the 99 % quantile, given that a cell is;
    - ``area_mean_ratio``, ``maximum_ratio``: quantiles of means over boxes and of maxima over the fields, over the true ones.
    """
    records, n = [], len(found.pixels)

    def exact(level: float) -> float:
        return float(_quantile(truth.pixels, level) if quantile is None else quantile(torch.tensor(1 - level, dtype=torch.float64)))

    def add(metric: str, level: float, value: float, true: float, error: float | None = None) -> None:
        records.append({"metric": metric, "level": level, "value": value, "truth": true, "error": error})

    own, theirs = _tail(found.pixels), _tail(truth.pixels if quantile is None else _exact_tail(quantile))
    add("shape", LEVELS[0], *own[:1], theirs[0], own[1])
    for level in LEVELS:
        beyond = max(n * (1 - level), 1.0)
        add("quantile_ratio", level, float(_quantile(found.pixels, level)) / exact(level), 1.0, max(theirs[0], 0.1) / beyond**0.5)
    mass = float((found.pixels > exact(LEVELS[0])).double().mean()) / (1 - LEVELS[0])
    add("mass_ratio", LEVELS[0], mass, 1.0, (n * (1 - LEVELS[0])) ** -0.5)
    chi = [_chi(s.pairs) for s in (found, truth)]
    add("chi", LEVELS[0], chi[0], chi[1], (chi[1] * (1 - chi[1]) / (0.01 * found.pairs.shape[1])) ** 0.5)
    for metric, name, levels in (("area_mean_ratio", "areas", (0.9, 0.99, 0.999)), ("maximum_ratio", "maxima", (0.5, 0.99))):
        for level in levels:
            value, true = (float(_quantile(getattr(s, name), level)) for s in (found, truth))
            add(metric, level, value / true if true else float("nan"), 1.0)
    return records


def _exact_tail(quantile: Callable[[Tensor], Tensor], count: int = 100_000) -> Tensor:
    """Values that stand for the law itself: its quantiles at evenly spaced probabilities."""
    return quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def _quantile(x: Tensor, level: float) -> Tensor:
    """Of any number of values, which ``torch.quantile`` is not."""
    return x.kthvalue(min(len(x), max(1, round(level * len(x)))))[0]


def _tail(x: Tensor) -> tuple[float, float]:
    threshold = _quantile(x, LEVELS[0])
    above = x[x > threshold] - threshold
    if len(above) < 10:
        return float("nan"), float("nan")
    fit = fit_pareto(above)
    return fit.shape, fit.shape_error


def _chi(pairs: Tensor) -> float:
    above = pairs > _quantile(pairs.flatten(), LEVELS[0])
    return float((above[0] & above[1]).double().sum() * 2 / above.double().sum().clamp(min=1))
