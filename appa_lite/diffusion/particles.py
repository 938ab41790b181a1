"""Particle-corrected posterior sampling: right also where the posterior has several modes."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.diffusion.base import Denoiser, GuidedDenoiser, NoiseSource, Sampler, Twist, check_sample
from appa_lite.diffusion.schedule import noise_levels

RESAMPLING = ("systematic", "multinomial")


class TwistedSMC(Sampler):
    """The twisted diffusion sampler: sequential Monte Carlo whose particles are the members of an ensemble.

    Members move with the guided denoiser and are weighed by how much likelier the prior's own path, twisted by the
    Gaussian p~(y | x_t) of the guidance, makes where they went than the guided path does:

        w_{i+1} = w_i p(x_{i+1} | x_i) p~(y | x_{i+1}) / [q(x_{i+1} | x_i, y) p~(y | x_i)]

    with p and q the Gaussian steps of SDE-DPM-Solver++(2M) under D(x_t) and E[x | x_t, y]. The weights tell the modes'
    masses, which a guided denoiser gets wrong where the posterior has several. Exact as islands and steps grow, for any
    guidance with a twist. Wu et al. 2023, 'Practical and asymptotically exact conditional sampling in diffusion
    models', algorithm 1.

    It is for posteriors of several modes seen through few values. In many dimensions the weights degenerate even where
    the guided denoiser is exact, the more the fewer the steps: an island is left with the descendants of a few members,
    or, of a learned denoiser, of one, which shows in a spread far too small. sigma_max is to be well above the largest
    standard deviation of the prior, or the modes start with wrong masses.

    Members compete in islands of consecutive ones and depend on their island alone. Each step takes one more draw of
    noise than a plain sampler: the normal probability Phi(n) of its first number is the uniform that resampling needs
    (systematic: that of the island's first member; multinomial: one a member), so that it is a function of the seed
    and the members as all noise is. Without an observation this is SDE-DPM-Solver++(2M).

    Args:
        steps: evaluations of the denoiser; sigma_max, sigma_min: first and last noise level, in units of the latents.
        island: members that compete.
        threshold: effective size 1 / sum w^2, as a share of the island, below which it is resampled; always at the end.
        resampling: ``systematic`` or ``multinomial``.
        schedule: 'log_uniform' or 'edm'.

    Raises:
        UserError: the guidance has no twist, or the members given are not whole islands.
        FloatingPointError: no member of an island has a weight, or the sample is not finite.
    """

    def __init__(
        self,
        steps: int = 64,
        sigma_max: float = 300.0,
        sigma_min: float = 0.01,
        island: int = 8,
        threshold: float = 0.5,
        resampling: str = "systematic",
        schedule: str = "log_uniform",
    ):
        if resampling not in RESAMPLING:
            raise UserError(f"sampler.resampling={resampling}: expected one of {', '.join(RESAMPLING)}")
        if island < 2 or not 0 <= threshold <= 1:
            raise UserError(f"sampler.island is at least 2 and sampler.threshold within [0, 1], found {island} and {threshold}")
        self.levels = noise_levels(schedule, steps, sigma_max, sigma_min)
        self.steps, self.island, self.threshold, self.resampling = steps, island, threshold, resampling

    def __call__(self, denoiser: Denoiser, noise: NoiseSource, progress: Callable[[int, int], None] | None = None) -> Tensor:
        guided, draws = isinstance(denoiser, GuidedDenoiser), itertools.count()
        x = noise(next(draws))
        if guided and len(x) % self.island:
            raise UserError(
                f"{len(x)} members computed together are not whole islands of {self.island}: choose batch and members, or sampler.island"
            )
        x = x * self.levels[0].to(x)
        weight = torch.zeros(len(x), dtype=torch.float64, device=x.device)  # logarithm, without the twist
        before, last_h = None, None
        for i, (sigma, after) in enumerate(itertools.pairwise(self.levels)):
            now = denoiser.twist(x, sigma.to(x)) if guided else _untwisted(denoiser, x, sigma.to(x))
            if guided:
                chosen, weight = self._select(weight + now.log_likelihood, noise(next(draws)), last=bool(after == 0))
                x, now, before = x[chosen], _members(now, chosen), None if before is None else _members(before, chosen)
                weight = weight - now.log_likelihood
            if after == 0:
                x = now.posterior
            else:
                h = torch.log(sigma / after)
                x, change = _step(x, now, before, sigma, h, last_h, noise(next(draws)))
                weight, before, last_h = weight + change, now, h
            if progress is not None:
                progress(i + 1, self.steps)
        check_sample(x, float(self.levels[0]))
        return x

    def _select(self, weight: Tensor, draw: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Who goes on (B,), and the logarithms of their weights (B,), islands resampled where they have degenerated."""
        size = self.island
        islands = weight.reshape(-1, size) - torch.logsumexp(weight.reshape(-1, size), dim=1, keepdim=True)
        share = islands.exp()
        if not torch.isfinite(share).all():
            raise FloatingPointError("the particles have lost all weight: take more steps, or check the observation errors")
        uniform = torch.special.ndtr(draw.flatten(1)[:, 0].double()).reshape(-1, size)
        if self.resampling == "systematic":
            uniform = (torch.arange(size, device=weight.device) + uniform[:, :1]) / size
        picks = torch.searchsorted(share.cumsum(1), uniform.contiguous()).clamp(max=size - 1)
        worn = 1 / share.square().sum(1, keepdim=True) < self.threshold * size
        worn = worn | last
        stay = torch.arange(size, device=weight.device).expand_as(picks)
        picks = torch.where(worn, picks, stay) + size * torch.arange(len(picks), device=weight.device)[:, None]
        return picks.flatten(), torch.where(worn, 0, islands).flatten()


def _step(
    x: Tensor, now: Twist, before: Twist | None, sigma: Tensor, h: Tensor, last_h: Tensor | None, draw: Tensor
) -> tuple[Tensor, Tensor]:
    """x at the next level, from the guided step, and log p - log q of it under the prior's step and the guided one (B,)."""
    gain, spread = -torch.expm1(-2 * h), sigma * torch.exp(-h) * torch.sqrt(-torch.expm1(-2 * h))
    guided, prior = now.posterior, now.prior
    if before is not None:
        ahead = (h / (2 * last_h)).to(x)
        guided, prior = guided + ahead * (guided - before.posterior), prior + ahead * (prior - before.prior)
    after = torch.exp(-2 * h).to(x) * x + gain.to(x) * guided + spread.to(x) * draw
    apart = ((gain / spread).to(x) * (guided - prior)).flatten(1).double()
    return after, -(apart * (draw.flatten(1).double() + apart / 2)).sum(1)


def _untwisted(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Twist:
    mean = denoiser(x, sigma)
    return Twist(mean, mean, mean.new_zeros(len(x)))


def _members(twist: Twist, chosen: Tensor) -> Twist:
    return Twist(twist.prior[chosen], twist.posterior[chosen], twist.log_likelihood[chosen])
