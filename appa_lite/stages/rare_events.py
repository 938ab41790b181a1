"""What an ``extremes`` command finds: fields given the event, its probability and cost, and what is known beside them."""

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from omegaconf import DictConfig

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.core.random import generator
from appa_lite.diffusion.rare_events.base import WIDE, Estimate, GuidedMethod, Method, RareEventMethod, lognormal
from appa_lite.forecasters.sampled_law import SampledLaw
from appa_lite.observations.event import Event
from appa_lite.stages.prior import Bar
from appa_lite.verification.event_figure import event_figure

Facts = dict[str, float]


def leveled(cfg: DictConfig, law: SampledLaw, event: Event, probability: float, method: Method, bar: Bar) -> tuple[float, Facts]:
    """The threshold that is exceeded with ``probability``, and its interval: of one estimate, or from the spread of several.

    The estimate that follows has draws of its own, so that its probability is a check of this one.
    """
    if isinstance(method, GuidedMethod):
        raise UserError("probability=... and return_period=... of a model need method=subset or brute_force: this one needs a threshold")
    levels = [
        method.level(law.response(event, cfg.batch), probability, generator(cfg.seed, "level", number), bar)
        for number in range(cfg.replicates)
    ]
    found = [level.threshold for level in levels]
    threshold = float(np.mean(found))
    half = WIDE * float(np.std(found, ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    ends = (threshold - half, threshold + half) if half else (levels[0].low, levels[0].high)
    low, high = ends if event.above else (-ends[1], -ends[0])
    facts = {"probability_asked": probability, "threshold_low": low, "threshold_high": high}
    return threshold, facts | {"level_calls": sum(level.calls for level in levels)}


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
    if "probability_asked" in facts:
        ends = f"{facts['threshold_low']:.4g} to {facts['threshold_high']:.4g}"
        lines = [f"{what} has probability {facts['probability_asked']:.3g} of this model's law; 95 % interval of the threshold {ends}"]
        if "probability" in facts:
            found = f"{facts['probability']:.3g}, 95 % interval {facts['probability_low']:.2g} to {facts['probability_high']:.2g}"
            lines.append(f"estimated anew, with draws of its own: P = {found}")
    elif "probability" in facts:
        interval = f"{facts['probability_low']:.2g} to {facts['probability_high']:.2g}"
        lines = [f"P({what}) = {facts['probability']:.3g}, 95 % interval {interval}, of this model's law"]
    level = f"{facts['level_calls']} model calls for the threshold, " if "level_calls" in facts else ""
    lines.append(
        f"{facts['method']}: {level}{facts['model_calls']} model calls ({facts['network_calls']} of the network); "
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


# Pictures


def drawing(
    event: Event, threshold: float, fields: torch.Tensor, title: str, density: Callable[[np.ndarray], np.ndarray] | None = None
) -> bytes:
    """The picture of an ensemble given the event: the variable that the event names first.

    Raises:
        UserError: no member.
    """
    if not len(fields):
        raise UserError("no member is in the event, so that there is no picture of it: leave picture out, or raise method.samples")
    sign = 1 if event.above else -1
    values, shown = sign * event.functional(fields).double().numpy(), event.scene(fields).numpy()
    units = event.spec.quantity(event.variable).units
    return event_figure(values, sign * threshold, shown, event.variable, units, event.expression, title, density)


def where(event: Event) -> str:
    """What makes the event again beside its text, as JSON."""
    return json.dumps({"text": event.text, "boxes": event.boxes, "frames": [event.frames.start, event.frames.stop]})


def drawn_again(dataset: xr.Dataset) -> bytes | None:
    """The picture of a dataset that ``extremes`` wrote; None of one without members."""
    spec, known = FieldSpec.from_dict(json.loads(dataset.attrs["field_spec"])), json.loads(dataset.attrs["event_where"])
    if not dataset.sizes["number"]:
        return None
    if "prediction_timedelta" in dataset.dims:
        dataset = dataset.isel(time=0, drop=True).rename(prediction_timedelta="time")
    event = Event(known["text"], spec, known["boxes"], slice(*known["frames"]))
    threshold = float(dataset.attrs["threshold"]) * (1 if event.above else -1)
    return drawing(event, threshold, spec.to_tensor(dataset), str(dataset.attrs["sentence"]).splitlines()[0])
