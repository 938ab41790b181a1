"""``reanalysis``: observation file in, posterior ensemble out."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import xarray as xr
from omegaconf import DictConfig

from appa_lite.core.store import check_target, provenance, write_dataset
from appa_lite.forecasters.base import Progress
from appa_lite.stages import assimilation as shared
from appa_lite.stages.event_laws import drawn_anew, event_facts, event_words, given_event
from appa_lite.stages.parallel import Part, Work, stacked
from appa_lite.stages.prior import counted


def run(cfg: DictConfig) -> None:
    """Write the posterior ensemble (time, number, grid) of ``cfg.observations`` to ``cfg.out``."""
    check_target(cfg.out)
    paths = shared.files(cfg.observations)
    table = shared.read_files(paths, shared.table_options(cfg))
    with Work.of(cfg, paths) as work:
        made = analyse(cfg, table, paths, work)
        if made is None:
            return
        dataset, facts = made
        write_dataset(dataset, cfg.out, dataset.attrs)
    print(f"{', '.join(paths)}: {shared.counted(json.loads(dataset.attrs['observation_counts']))}")
    print(f"{cfg.out}: {dataset.sizes['time']} frames, {cfg.members} members; {facts}")


def analyse(cfg: DictConfig, table: pd.DataFrame, inputs: list[str], work: Work) -> tuple[xr.Dataset, str] | None:
    """The posterior ensemble given a table of observations, and what to say about it; ``inputs`` are the files behind it.

    A piece of the work is a batch of members; None for processes that leave the merging to another.
    """
    model = shared.engine(cfg)
    table = shared.canonical_table(table, cfg)
    times = shared.covering(*shared.ends(table["time"], cfg.start, cfg.end), model.spec.step, model.phase)
    rows = shared.prepare(cfg, table, model.spec, times)
    model = replace(model, assimilator=given_event(cfg, model.assimilator, model.spec, times))
    used, gross = shared.judged(cfg, model, rows.part(~rows.withheld), times)
    members, every = shared.pieces(cfg, model), np.ones(len(rows.withheld), bool)

    def piece(i: int, progress: Progress) -> Part:
        with counted(model.checkpoint) as calls:
            fields, solver = shared.assimilated(model, used, times, members[i], cfg.seed, progress)
        return (
            {"fields": fields, "solver": solver, "calls": torch.tensor(sum(calls))}
            | shared.seen(rows, used, every, fields, 0)
            | drawn_anew(model.assimilator)
        )

    parts = work.map(len(members), piece)
    if parts is None:
        return None
    attrs, facts = shared.solver(parts)
    given = event_facts(model.assimilator, parts)
    attrs, facts = attrs | given, "\n".join([facts, *([event_words(given)] if given else [])])
    attrs |= {"network_calls": sum(int(part["calls"]) for part in parts) / cfg.members}
    fields = stacked([part["fields"] for part in parts]).swapaxes(0, 1)
    dataset = work.dataset(model.spec, fields, {"time": times, "number": np.arange(cfg.members)})
    dataset.attrs = provenance(cfg, cfg.seed, inputs) | attrs | {"field_spec": json.dumps(model.spec.to_dict())}
    sums = shared.sums_of(rows, used, every, parts, rows.names, cfg.seed)
    lines = shared.testify(dataset, sums, rows.names, rows.counts | ({"gross error": int(gross.sum())} if gross.any() else {}))
    return dataset, f"{facts}\n{lines}"
