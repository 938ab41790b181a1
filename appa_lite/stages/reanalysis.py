"""``reanalysis``: observation file in, posterior ensemble out."""

import json

import numpy as np
import pandas as pd
import xarray as xr
from omegaconf import DictConfig

from appa_lite.core.store import check_target, provenance, write_dataset
from appa_lite.stages import assimilation as shared
from appa_lite.stages.prior import Bar


def run(cfg: DictConfig) -> None:
    """Write the posterior ensemble (time, number, grid) of ``cfg.observations`` to ``cfg.out``."""
    check_target(cfg.out)
    paths = shared.files(cfg.observations)
    dataset, facts = analyse(cfg, shared.read_files(paths, shared.table_options(cfg)), paths)
    write_dataset(dataset, cfg.out, dataset.attrs)
    print(f"{', '.join(paths)}: {shared.counted(json.loads(dataset.attrs['observation_counts']))}")
    print(f"{cfg.out}: {dataset.sizes['time']} frames, {cfg.members} members; {facts}")


def analyse(cfg: DictConfig, table: pd.DataFrame, inputs: list[str]) -> tuple[xr.Dataset, str]:
    """The posterior ensemble given a table of observations, and what to say about it; ``inputs`` are the files behind it."""
    model = shared.engine(cfg)
    table = shared.canonical_table(table, cfg)
    times = shared.covering(*shared.ends(table["time"], cfg.start, cfg.end), model.spec.step, model.phase)
    rows = shared.prepare(cfg, table, model.spec, times)
    used, gross = shared.judged(cfg, model, rows.part(~rows.withheld), times)
    bar = Bar()
    try:
        fields = model.assimilator.assimilate(used if len(used) else None, times, range(cfg.members), cfg.seed, bar)
    finally:
        bar.close()
    attrs, facts = shared.solver(model)
    dataset = model.spec.to_dataset(fields.transpose(0, 1), {"time": times, "number": np.arange(cfg.members)})
    dataset.attrs = provenance(cfg, cfg.seed, inputs) | attrs | {"field_spec": json.dumps(model.spec.to_dict())}
    sums = shared.sums_of(rows, used, np.ones(len(rows.withheld), bool), fields, 0, rows.names, cfg.seed)
    lines = shared.testify(dataset, sums, rows.names, rows.counts | ({"gross error": int(gross.sum())} if gross.any() else {}))
    return dataset, f"{facts}\n{lines}"
