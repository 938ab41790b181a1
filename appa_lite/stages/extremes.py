"""``extremes``: how likely an event is under a model, and an ensemble of what it looks like."""

import json
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from omegaconf import DictConfig

from appa_lite.config import build
from appa_lite.core.errors import UserError
from appa_lite.core.store import atomic, check_target, provenance, write_dataset
from appa_lite.diffusion.rare_events.base import GuidedMethod, Method
from appa_lite.forecasters.sampled_law import SampledLaw
from appa_lite.stages.event_laws import event_of, judge_sampler, law_of
from appa_lite.stages.prior import Bar
from appa_lite.stages.rare_events import drawing, estimated, guided, leveled, told, where


def run(cfg: DictConfig) -> None:
    """Write ``cfg.members`` fields given ``cfg.event`` to ``cfg.out``, and print how likely the event is."""
    check_target(cfg.out)
    if min(cfg.members, cfg.replicates, cfg.batch, cfg.frames) < 1:
        raise UserError("members, replicates, batch and frames are at least 1")
    if cfg.picture is not None and Path(cfg.picture).suffix != ".png":
        raise UserError(f"cannot write {cfg.picture}: expected a name that ends in .png")
    law, times, inputs = law_of(cfg)
    event, threshold, probability = event_of(cfg, law, times)
    facts = judge_sampler(cfg, law, event)
    method, bar = build(cfg.method, Method), Bar()
    drawn = guided if isinstance(method, GuidedMethod) else estimated
    try:
        if threshold is None:
            threshold, level = leveled(cfg, law, event, probability, method, bar)
            facts |= level
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
        | {"threshold": threshold if event.above else -threshold}
        | {"members_distinct": len(fields.unique(dim=0)) if len(fields) else 0}
    )
    words = told(event, threshold, dataset.attrs, len(fields))
    dataset.attrs |= {"sentence": words, "event_where": where(event)} | {"field_spec": json.dumps(law.spec.to_dict())}
    write_dataset(dataset, cfg.out, dataset.attrs)
    print(words)
    print(f"{cfg.out}: {len(fields)} members, {len(times)} frames")
    if cfg.picture is not None:
        exact, sign = law.exact(event), 1 if event.above else -1
        density = None if exact is None else lambda s: exact.density(torch.from_numpy(sign * s), threshold).numpy()
        with atomic(cfg.picture) as partial:
            partial.write_bytes(drawing(event, threshold, fields, words.splitlines()[0], density))
        print(cfg.picture)


def packed(cfg: DictConfig, law: SampledLaw, times: np.ndarray, fields: torch.Tensor) -> xr.Dataset:
    """An analysis (time, number, grid), or a forecast from an initial state."""
    numbers = np.arange(len(fields))
    if cfg.initial is None:
        return law.spec.to_dataset(fields.transpose(0, 1), {"time": times, "number": numbers})
    coords = {"time": times[:1], "prediction_timedelta": times - times[0], "number": numbers}
    return law.spec.to_dataset(fields.transpose(0, 1)[None], coords)
