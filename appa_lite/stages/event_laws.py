"""What an ``extremes`` command asks about: the law that is sampled, the event, and whether its sampler may be trusted with a tail."""

import logging
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from appa_lite.config import build
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_seconds
from appa_lite.data.open import parse_date
from appa_lite.diffusion.base import Sampler
from appa_lite.forecasters.base import Assimilator, Forecaster
from appa_lite.forecasters.given_event import GivenEvent
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.forecasters.sampled_law import GaussianLaw, ModelLaw, SampledLaw
from appa_lite.observations import build_observation
from appa_lite.observations.event import Event
from appa_lite.observations.rows import drop_duplicates
from appa_lite.simulators.base import Simulator
from appa_lite.simulators.gaussian_process import GaussianProcess
from appa_lite.stages import assimilation as shared
from appa_lite.stages.prior import BEGINNING, competitor, duration, matching_fields

log = logging.getLogger(__name__)

YEAR = 365.25 * 86400.0


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


def event_of(cfg: DictConfig, law: SampledLaw, times: np.ndarray) -> tuple[Event, float | None, float | None]:
    """The event, of the frames within its dates, its threshold (of the functional that is to be exceeded), and the probability
    that it is to have in the place of a threshold: one of the two is None, or both are known (of a Gaussian process)."""
    event = event_within(cfg, law.spec, times)
    if sum(given is not None for given in (event.threshold, cfg.probability, cfg.return_period)) != 1:
        raise UserError(f"event='{event.text}': expected a threshold, such as '... > 30', or else probability=1e-4 or return_period=10y")
    if event.threshold is not None:
        return event, event.threshold, None
    probability = cfg.probability if cfg.return_period is None else once_in(cfg, event, law.spec.step, len(times))
    if not 0 < probability < 0.5:
        raise UserError(f"probability={probability:.3g} is not that of a rare event: expected between 0 and 0.5")
    exact = law.exact(event)
    return event, None if exact is None else exact.threshold(probability), probability


def once_in(cfg: DictConfig, event: Event, step: float, frames: int) -> float:
    """The probability of what one in so many periods has, as long as the event's own: T / return period."""
    if cfg.observations is not None or cfg.initial is not None:
        raise UserError("return_period=... is of a model's climate: beside observations or an initial state give probability=...")
    years = re.fullmatch(r"\s*([0-9.]+)\s*y(ears?)?\s*", str(cfg.return_period))
    seconds = float(years[1]) * YEAR if years else duration(cfg.return_period, "return_period")
    return len(range(frames)[event.frames]) * step / seconds


def event_within(cfg: DictConfig, spec: FieldSpec, times: np.ndarray) -> Event:
    """The event that ``cfg`` names, of the frames within its dates."""
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
    return Event(cfg.event, spec, OmegaConf.to_container(cfg.boxes), slice(int(frames[0]), int(frames[-1]) + 1))


def given_event(cfg: DictConfig, model: Assimilator | Forecaster, spec: FieldSpec, times: np.ndarray) -> Assimilator | Forecaster:
    """``model``, whose members are such that ``cfg.event`` happens; as it is where there is none.

    Raises:
        UserError: an event without a threshold, or a model that cannot be guided.
    """
    if cfg.get("event") is None:
        return model
    if type(model) is not LatentDiffusion:
        raise UserError(f"event=... guides forecaster=latent_diffusion, found {type(model).__name__}")
    event = event_within(cfg, spec, times)
    if event.threshold is None:
        raise UserError(f"event='{event.text}': expected a threshold, such as '... > 30'")
    return GivenEvent(model, event)


def drawn_anew(model: Assimilator | Forecaster) -> dict[str, torch.Tensor]:
    """What a finished piece says of the draws that missed the event; the count starts anew."""
    if not isinstance(model, GivenEvent):
        return {}
    count, model.redrawn = model.redrawn, 0
    return {"redrawn": torch.tensor(count)}


def event_facts(model: Assimilator | Forecaster, parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, str | int]:
    """Attributes of members given an event; nothing where there is none."""
    if not isinstance(model, GivenEvent):
        return {}
    return {"event": f"{model.event.text}{model.event.when}", "event_redrawn": sum(int(part["redrawn"]) for part in parts)}


def event_words(facts: Mapping[str, str | int]) -> str:
    """What to say about such members."""
    return (
        f"every member has {facts['event']}; {facts['event_redrawn']} that missed it were drawn anew. "
        "How likely it is, `appa-lite extremes` tells; this does not"
    )


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
