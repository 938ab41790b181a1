"""What a guided call costs beside a plain forward of the same prior, and where the rest of it goes."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from appa_lite.diffusion.base import Sampler
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.forecasters.posterior import ModeCovariance, Prior, later
from appa_lite.guidance.base import Guidance, LatentObservation, SolverReport, no_gradient
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.observations.base import Observation

T = TypeVar("T")


class Stopwatch:
    """Seconds by what was done: of this process on a CPU, whoever else uses it; of the clock on an accelerator."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    def __call__(self, name: str, function: Callable[[], T]) -> T:
        begin = self._now()
        result = function()
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - begin
        return result

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def guided_cost(
    checkpoint: Checkpoint,
    observation: Observation,
    times: np.ndarray,
    guidance: Guidance,
    sampler: Sampler,
    members: Sequence[int],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Parts of a guided call, as multiples of a plain forward, along one guided trajectory of the sampler.

    At every step the plain forward, the forward that keeps a graph, a product with its Jacobian, the decoder with the
    observation operator, and the guided call are made one after the other at the same place: what else the machine does
    falls on all of them alike. ``solver`` is what is left of the guided call.

    Returns:
        ``multiple`` of a guided call, and of its parts ``graph, product, decoder, solver``; ``products, iterations`` a step;
        ``seconds_plain, seconds_guided`` for a member; ``seconds_member_day``: of a member and day of the period, guided.
    """
    model = LatentDiffusion(checkpoint, guidance, sampler, batch=len(members))
    prior = Prior(checkpoint, model.period(times), model.overlap, model.batch)
    denoiser, latent, report = prior.denoiser(), prior.observe(later(observation, prior.period.before)), SolverReport()
    latent = LatentObservation(latent.operator, latent.values.expand(len(members), -1), latent.variance)
    plain, guided = no_gradient(denoiser), guidance(denoiser, latent, ModeCovariance(prior), report)
    watch, steps = Stopwatch(latent.variance.device), []

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        mean = watch("plain", lambda: plain(x, sigma))
        with torch.enable_grad():
            estimate = watch("graph", lambda: denoiser(leaf, sigma))
        watch("product", lambda: torch.autograd.grad(estimate, leaf, torch.ones_like(estimate)))
        with torch.no_grad():
            watch("decoder", lambda: latent.operator.predict(mean))
        steps.append(float(sigma))
        return watch("guided", lambda: guided(x, sigma))

    sampler(call, model.noise(prior, seed, list(members), "reanalysis"), progress)
    found = {name: seconds / watch.seconds["plain"] for name, seconds in watch.seconds.items() if name != "plain"}
    products = sum(report.products) / len(steps)
    forward = found["graph"] if products else 1.0
    days = len(times) * checkpoint.spec.step / 86400
    return {
        "multiple": found.pop("guided"),
        **found,
        "solver": watch.seconds["guided"] / watch.seconds["plain"] - forward - found["decoder"] - products * found["product"],
        "products": products,
        "iterations": sum(report.iterations) / len(steps),
        "steps": len(steps),
        "seconds_plain": watch.seconds["plain"] / len(members),
        "seconds_guided": watch.seconds["guided"] / len(members),
        "seconds_member_day": watch.seconds["guided"] / len(members) / days,
    }
