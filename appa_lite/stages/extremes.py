"""``extremes``: how likely an event is under a model, and an ensemble of what it looks like."""

import json
import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from omegaconf import DictConfig, OmegaConf

from appa_lite.config import build
from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_seconds
from appa_lite.core.random import generator
from appa_lite.core.store import check_target, provenance, write_dataset
from appa_lite.data.open import parse_date
from appa_lite.diffusion.base import Sampler
from appa_lite.diffusion.rare_events.base import WIDE, Estimate, GuidedMethod, Method, RareEventMethod, lognormal
from appa_lite.forecasters.base import Assimilator
from appa_lite.forecasters.sampled_law import GaussianLaw, ModelLaw, SampledLaw
from appa_lite.observations import build_observation
from appa_lite.observations.event import Event
from appa_lite.observations.rows import drop_duplicates
from appa_lite.simulators.base import Simulator
from appa_lite.simulators.gaussian_process import GaussianProcess
from appa_lite.stages import assimilation as shared
from appa_lite.stages.prior import BEGINNING, Bar, competitor, duration, matching_fields

log = logging.getLogger(__name__)
Facts = dict[str, float]


def run(cfg: DictConfig) -> None:
    """Write ``cfg.members`` fields given ``cfg.event`` to ``cfg.out``, and print how likely the event is."""
    check_target(cfg.out)
    if min(cfg.members, cfg.replicates, cfg.batch, cfg.frames) < 1:
        raise UserError("members, replicates, batch and frames are at least 1")
    law, times, inputs = law_of(cfg)
    event, threshold = event_of(cfg, law, times)
    facts = judge_sampler(cfg, law, event)
    method, bar = build(cfg.method, Method), Bar()
    drawn = guided if isinstance(method, GuidedMethod) else estimated
    try:
        fields, found = drawn(cfg, law, event, threshold, method, bar)
    finally:
        bar.close()
    facts |= found
    dataset = packed(cfg, law, times, fields)
    values = event.functional(fields).double().numpy() if len(fields) else np.zeros(0)
    dataset["event_functional"] = ("number", values if event.above else -values, {"long_name": event.expression})
    name = cfg.method["class"].rsplit(".", 1)[-1]
    dataset.attrs = (
        provenance(cfg, cfg.seed, inputs)
        | facts
        | {"method": name, "event": f"{event.text}{event.when}", "members_in_event": int((values > threshold).sum())}
        | {"members_distinct": len(fields.unique(dim=0)) if len(fields) else 0}
    )
    dataset.attrs["field_spec"] = json.dumps(law.spec.to_dict())
    write_dataset(dataset, cfg.out, dataset.attrs)
    print(told(event, threshold, dataset.attrs, len(fields)))
    print(f"{cfg.out}: {len(fields)} members, {len(times)} frames")


# The law and the event


def law_of(cfg: DictConfig) -> tuple[SampledLaw, np.ndarray, list[str]]:
    """What is sampled, the times of its frames and the files behind it."""
    if cfg.checkpoint is None:
        if cfg.simulator is None:
            raise UserError("extremes needs checkpoint=..., directory of a trained prior, or experiment=gaussian_process")
        process = build(cfg.simulator, Simulator)
        if not isinstance(process, GaussianProcess):
            raise UserError(f"the law of a {type(process).__name__} is not known: give checkpoint=..., a prior that was trained on it")
        if cfg.observations is not None or cfg.initial is not None:
            raise UserError("observations and initial states need checkpoint=...: a Gaussian process is sampled freely")
        sampler = build(cfg.sampler, Sampler)
        return (
            GaussianLaw(process, sampler, cfg.frames),
            shared.frames_between(0, cfg.frames - 1, process.spec.step, _seconds(BEGINNING)),
            [],
        )
    model, setting = competitor(cfg, Assimilator)
    spec = setting.spec
    if cfg.initial is not None:
        if cfg.observations is not None:
            raise UserError("give observations=... or initial=..., not both: a reanalysis may reach beyond its observations, with end=...")
        if cfg.lead is None:
            raise UserError("extremes from an initial state needs lead=..., the length of the forecast, such as 24h")
        dataset = matching_fields(cfg.initial, spec, {"step": spec.step})
        if "prediction_timedelta" in dataset.dims or "trajectory" in dataset.dims:
            raise UserError(
                f"'{cfg.initial}' is a forecast or a set of trajectories: expected an analysis or reanalysis (time, [number], grid)"
            )
        fields = spec.to_tensor(dataset)[..., -cfg.history :, :, :, :]
        first, frames = to_seconds(dataset["time"].values[-1:])[0], round(duration(cfg.lead, "lead") / spec.step)
        if frames < 1:
            raise UserError(f"lead={cfg.lead} is shorter than a frame of this model, {spec.step / 3600:g} hours")
        times = shared.frames_between(0, frames, spec.step, first)
        return ModelLaw(model, times, initial=fields if fields.ndim == 5 else fields[None]), times, [cfg.initial]
    if cfg.observations is not None:
        paths = shared.files(cfg.observations)
        table, _ = drop_duplicates(shared.canonical_table(shared.read_files(paths, shared.table_options(cfg)), cfg))
        times = shared.covering(*shared.ends(table["time"], cfg.start, cfg.end), spec.step, setting.phase)
        observation, _ = build_observation(table, spec, times, shared.table_options(cfg))
        return ModelLaw(model, times, observation), times, paths
    first = _seconds(cfg.start or BEGINNING)
    last = first + (cfg.frames - 1) * spec.step if cfg.end is None else _seconds(cfg.end)
    low, high = (int(np.ceil((t - setting.phase) / spec.step - 1e-9)) for t in (first, last))
    times = shared.frames_between(low, max(low, high), spec.step, setting.phase)
    return ModelLaw(model, times), times, []


def event_of(cfg: DictConfig, law: SampledLaw, times: np.ndarray) -> tuple[Event, float]:
    """The event, of the frames within its dates, and its threshold (of the functional that is to be exceeded)."""
    inside = np.ones(len(times), bool)
    if cfg.event_start is not None:
        inside &= to_seconds(times) >= _seconds(cfg.event_start) - 1
    if cfg.event_end is not None:
        inside &= to_seconds(times) <= _seconds(cfg.event_end) + 1
    if not inside.any():
        raise UserError(
            f"no frame lies between event_start={cfg.event_start} and event_end={cfg.event_end}: they are {times[0]} to {times[-1]}"
        )
    frames = np.flatnonzero(inside)
    event = Event(cfg.event, law.spec, OmegaConf.to_container(cfg.boxes), slice(int(frames[0]), int(frames[-1]) + 1))
    if (event.threshold is None) == (cfg.probability is None):
        raise UserError(f"event='{event.text}': expected a threshold, such as '... > 30', or else probability=1e-4")
    if event.threshold is not None:
        return event, event.threshold
    exact = law.exact(event)
    if exact is None or not 0 < cfg.probability < 1:
        raise UserError(
            "probability=... gives the threshold of a linear functional of a Gaussian process, and is between 0 and 1: give a threshold"
        )
    return event, exact.threshold(cfg.probability)


def _seconds(date: object) -> float:
    return float(to_seconds(np.array([parse_date(date, "date")], dtype="datetime64[ns]"))[0])


def judge_sampler(cfg: DictConfig, law: SampledLaw, event: Event) -> dict[str, float]:
    """The sampler's own error of a Gaussian's tail: a warning above 10 % at one in ten thousand, an error above a factor of two.

    Raises:
        UserError: such a sampler, unless ``accept_sampler``.
    """
    tail = law.tail(event)
    ratio, warning = tail.probability_ratio(1e-4), tail.warning()
    if not 0.5 <= ratio <= 2 and not cfg.accept_sampler:
        raise UserError(f"{warning}: choose sampler=eab3_tail, more sampler.steps, or accept_sampler=true")
    if warning is not None:
        log.warning("%s: choose sampler=eab3_tail or more sampler.steps", warning)
    return {"sampler_spread_ratio": tail.ratio, "sampler_probability_ratio": ratio}


# What came of it


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


def packed(cfg: DictConfig, law: SampledLaw, times: np.ndarray, fields: torch.Tensor) -> xr.Dataset:
    """An analysis (time, number, grid), or a forecast from an initial state."""
    numbers = np.arange(len(fields))
    if cfg.initial is None:
        return law.spec.to_dataset(fields.transpose(0, 1), {"time": times, "number": numbers})
    coords = {"time": times[:1], "prediction_timedelta": times - times[0], "number": numbers}
    return law.spec.to_dataset(fields.transpose(0, 1)[None], coords)


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
