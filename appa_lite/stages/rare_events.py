"""What an ``extremes`` command finds: fields given the event, its probability and cost, and what is known beside them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from omegaconf import DictConfig

from appa_lite.core.errors import UserError
from appa_lite.core.random import generator
from appa_lite.diffusion.rare_events.base import WIDE, Estimate, GuidedMethod, RareEventMethod, lognormal
from appa_lite.forecasters.sampled_law import SampledLaw
from appa_lite.observations.event import Event
from appa_lite.stages.prior import Bar

Facts = dict[str, float]


def estimated(
    cfg: DictConfig, law: SampledLaw, event: Event, threshold: float, method: RareEventMethod, bar: Bar
) -> tuple[torch.Tensor, Facts]:
    """Fields given the event and what is known of it, by a method in the noise of the sampler."""
    estimates = []
    for number in range(cfg.replicates):
        response = law.response(event, cfg.batch)
        estimates.append(method.estimate(response, threshold, cfg.members, generator(cfg.seed, "rare event", number), bar))
        estimates[-1].facts["calls_in_all"] = float(response.calls)
    noise = torch.cat([e.noise for e in estimates])[: cfg.members]
    with torch.no_grad():
        empty = torch.zeros(0, *law.fields(torch.zeros(1, law.dimension, dtype=law.dtype)).shape[1:])
        fields = torch.cat([law.fields(part) for part in noise.split(cfg.batch)]) if len(noise) else empty
    return fields, summary(estimates, law.evaluations) | truth(law, event, threshold, estimates)


def guided(cfg: DictConfig, law: SampledLaw, event: Event, threshold: float, method: GuidedMethod, bar: Bar) -> tuple[torch.Tensor, Facts]:
    """The same by a method that guides: its calls are passes through the network, forward or backward."""
    if cfg.replicates > 1:
        raise UserError("replicates=... is for methods in the noise of a sampler (subset, splitting, instanton, brute_force)")
    found = method.sample(law.latent(event, threshold), cfg.members, cfg.batch, generator(cfg.seed, "rare event", 0), bar)
    with torch.no_grad():
        fields = law.decoded(found.latents)
    facts = {"model_calls": found.passes, "network_calls": found.passes}
    if found.probability is not None:
        facts |= {
            "probability": found.probability,
            "probability_low": found.low,
            "probability_high": found.high,
            "relative_error": found.error,
        }
    exact = law.exact(event)
    if exact is not None:
        mean, std = exact.given(threshold)
        values = event.functional(fields).double()
        facts |= {
            "probability_exact": exact.probability(threshold),
            "mean_ratio_given_event": float((values.mean() - exact.mean) / (mean - exact.mean)),
        }
        facts |= {"std_ratio_given_event": float(values.std() / std)}
        shift = fields.mean(0) / (mean - exact.mean) - exact.response
        facts |= {"field_error_given_event": float(shift.norm() / exact.response.norm())}
    return fields, facts


def summary(estimates: Sequence[Estimate], evaluations: int) -> dict[str, float]:
    """Probability, interval and cost, of one estimate or of the mean of several."""
    p = [e.probability for e in estimates]
    calls = sum(e.facts["calls_in_all"] for e in estimates)
    facts = {
        "model_calls": int(calls),
        "network_calls": int(calls * evaluations),
        "calls_per_estimate": sum(e.calls for e in estimates) / len(p),
    }
    facts |= {key: float(np.mean([e.facts[key] for e in estimates])) for key in estimates[0].facts if key != "calls_in_all"}
    if len(p) == 1:
        return facts | {
            "probability": p[0],
            "probability_low": estimates[0].low,
            "probability_high": estimates[0].high,
            "relative_error": estimates[0].error,
        }
    mean, error = float(np.mean(p)), float(np.std(p, ddof=1) / np.mean(p) / math.sqrt(len(p))) if np.mean(p) > 0 else math.inf
    low, high = lognormal(mean, error) if math.isfinite(error) else (0.0, min(1.0, WIDE * estimates[0].high))
    stated = float(np.mean([e.error for e in estimates]))
    return facts | {
        "probability": mean,
        "probability_low": low,
        "probability_high": high,
        "relative_error": error,
        "relative_error_stated": stated,
    }


def truth(law: SampledLaw, event: Event, threshold: float, estimates: Sequence[Estimate]) -> dict[str, float]:
    """What is known of a Gaussian process: the probability, and how far estimates and the ensemble given the event are from it."""
    exact = law.exact(event)
    if exact is None:
        return {}
    p, drawn = exact.probability(threshold), exact.probability(threshold, sampler=True)
    found = {"probability_exact": p, "probability_of_sampler": drawn}
    ratios = torch.tensor([e.probability for e in estimates], dtype=torch.float64) / drawn
    mean, std = exact.given(threshold)
    values = torch.cat([e.values for e in estimates]).double()
    errors = [float((law.fields(e.noise).mean(0) / (mean - exact.mean) - exact.response).norm() / exact.response.norm()) for e in estimates]
    inside = [e.low <= drawn <= e.high for e in estimates]
    return found | {
        "relative_rmse": float((ratios - 1).square().mean().sqrt()),
        "relative_bias": float(ratios.mean() - 1),
        "coverage": float(np.mean(inside)),
        "mean_ratio_given_event": float((values.mean() - exact.mean) / (mean - exact.mean)),
        "std_ratio_given_event": float(values.std() / std),
        "field_error_given_event": float(np.mean(errors)),
    }


def told(event: Event, threshold: float, facts: dict, members: int) -> str:
    """The result in a few lines."""
    side, units = (">", threshold) if event.above else ("<", -threshold)
    what = f"{event.expression} {side} {units:.5g}{event.when}"
    lines = [f"{what}: {facts['method']} draws from it, and does not tell how likely it is (method=subset does)"]
    if "probability" in facts:
        interval = f"{facts['probability_low']:.2g} to {facts['probability_high']:.2g}"
        lines = [f"P({what}) = {facts['probability']:.3g}, 95 % interval {interval}, of this model's law"]
    lines.append(
        f"{facts['method']}: {facts['model_calls']} model calls ({facts['network_calls']} of the network); "
        f"{facts['members_in_event']} of {members} members are in the event"
    )
    if "probability_exact" in facts:
        lines.append(f"exact: {facts['probability_exact']:.4g}")
    if "relative_rmse" in facts:
        lines[-1] += (
            f", of the sampler's law {facts['probability_of_sampler']:.4g}; relative rmse {facts['relative_rmse']:.3f}, "
            f"bias {facts['relative_bias']:+.3f}, interval covers {facts['coverage']:.0%}, "
            f"{facts['calls_per_estimate']:.0f} calls an estimate"
        )
    if "mean_ratio_given_event" in facts:
        lines.append(
            f"given the event: mean {facts['mean_ratio_given_event']:.4f} and spread {facts['std_ratio_given_event']:.3f} of the "
            f"exact ones, mean field off by {facts['field_error_given_event']:.1%}"
        )
    return "\n".join(lines)
