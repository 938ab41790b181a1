"""``verify``: scores of a forecast or analysis beside baselines, printed as a table and written to a file."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from omegaconf import DictConfig

from appa_lite.config import build
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.core.store import atomic, open_dataset
from appa_lite.data.open import open_fields
from appa_lite.observations.build import build_observation
from appa_lite.observations.options import TableOptions
from appa_lite.observations.table import read_table
from appa_lite.verification.grid import standardise
from appa_lite.verification.tables import check_table_path, dumps, format_table
from appa_lite.verification.thresholds import read_thresholds
from appa_lite.verification.verify import Verification


def run(cfg: DictConfig) -> None:
    """Score ``cfg.forecast`` and ``cfg.baselines``; write ``cfg.out`` and, for figures, ``<out>_details.json`` beside it."""
    check_table_path(cfg.out)
    verification = build(cfg.verification, Verification)
    name = cfg.name or Path(cfg.forecast).stem
    if name in cfg.baselines:
        raise UserError(f"'{name}' is the forecast's name and a baseline's: give the forecast another with name=...")
    systems = {str(k): open_dataset(path) for k, path in {name: cfg.forecast, **cfg.baselines}.items()}
    files = ("observations", "kriging", "kriging_fit", "observed")
    tables = {key: None if cfg[key] is None else read_table(cfg[key], cfg.network) for key in files}
    if cfg.stations is not None:
        tables["observations"] = _stations(tables["observations"], list(map(str, cfg.stations)))
    if any(t is not None for t in tables.values()):
        spec = _spec(systems[name])
        tables = {key: None if t is None else _as_fields(t, spec, cfg.network) for key, t in tables.items()}
    scores = verification.evaluate(
        systems,
        None if cfg.truth is None else open_dataset(cfg.truth),
        variables=None if cfg.variables is None else list(cfg.variables),
        climatology=_climatology(cfg),
        trajectory=cfg.trajectory,
        seed=cfg.seed,
        thresholds=None
        if cfg.thresholds is None
        else read_thresholds(cfg.thresholds, verification.quantiles, verification.views, cfg.truth),
        **tables,
    )
    print(format_table(scores.records))
    out = Path(cfg.out)
    details = out.with_name(f"{out.stem}_details.json")
    for path, text in ((details, json.dumps(scores.details, allow_nan=False)), (out, dumps(scores.records, out.suffix))):
        with atomic(path) as partial:
            partial.write_text(text)
    print(f"{out}: {len(scores.records)} scores of {', '.join(dict.fromkeys(r['system'] for r in scores.records))}")


def _stations(table: pd.DataFrame | None, names: list[str]) -> pd.DataFrame:
    """The rows of the stations that are scored against."""
    if table is None or "station" not in table:
        raise UserError("stations=[...] needs observations with a column 'station'")
    missing = set(names) - set(table["station"])
    if missing:
        raise UserError(f"stations: {', '.join(sorted(missing))} not in the file; it has {', '.join(sorted(set(table['station']))[:30])}")
    return table[table["station"].isin(names)]


def _climatology(cfg: DictConfig) -> xr.Dataset | None:
    """The dataset given, or that of the checkpoint."""
    if cfg.climatology is not None:
        return open_dataset(cfg.climatology)
    if cfg.checkpoint is None:
        return None
    found = [Path(cfg.checkpoint) / f"climatology{ending}" for ending in (".nc", ".zarr")]
    found = [path for path in found if path.exists()]
    if not found:
        raise UserError(f"{cfg.checkpoint} holds no climatology.nc: give climatology=FILE, or leave checkpoint out")
    return open_dataset(found[0])


def _spec(dataset: xr.Dataset) -> FieldSpec:
    """What the forecast holds, from one member of it."""
    dataset = standardise(dataset)
    options = {}
    if "prediction_timedelta" in dataset.dims:
        steps = np.diff(dataset["prediction_timedelta"].values)
        options["step"] = float(steps[0] / np.timedelta64(1, "s")) if len(steps) else 3600.0
        dataset = dataset.isel(prediction_timedelta=0, drop=True).isel(time=[0])
    return open_fields(dataset.isel({d: 0 for d in ("number", "moment") if d in dataset.dims}, drop=True), options=options)[1]


def _as_fields(table: pd.DataFrame, spec: FieldSpec, options: DictConfig | None) -> pd.DataFrame:
    """The table's good rows in the names and units of the fields; ``bias`` holds biases and the correction for elevation."""
    times = np.unique(table["time"].dropna().to_numpy())
    if not times.size:
        raise UserError("the observation file has no row with a time")
    parsed = TableOptions.parse(options)
    ends = np.unique(times[[0, -1]])
    observation, _ = build_observation(table, spec, ends, parsed, torch.float64)
    bias = observation.operator(torch.zeros((len(ends), *spec.shape), dtype=torch.float64)).numpy()  # A(0) is all that is added
    return observation.provenance.assign(bias=np.where(np.abs(bias) < 1e-5, 0.0, bias))
