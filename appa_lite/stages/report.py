"""``report``: one self-contained HTML page of a run directory, whatever it holds."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from omegaconf import DictConfig

from appa_lite.core.errors import UserError
from appa_lite.core.store import atomic, open_dataset
from appa_lite.data.open import open_fields
from appa_lite.observations.build import build_observation
from appa_lite.observations.table import read_table
from appa_lite.stages.rare_events import drawn_again
from appa_lite.verification.grid import standardise
from appa_lite.verification.hero import hero
from appa_lite.verification.report import Run, report

DATASETS = ("truth", "reanalysis", "optimal_interpolation", "forecast")
TABLES = ("observations", "withheld")
KINDS = ("reanalysis", "withheld", "forecast")


def run(cfg: DictConfig) -> None:
    """Write ``cfg.out`` from the outputs in ``cfg.run``, and the README's picture to ``cfg.picture`` if it is named."""
    if Path(cfg.out).suffix not in (".html", ".htm"):
        raise UserError(f"cannot write {cfg.out}: expected a name that ends in .html")
    found = read_run(cfg.run, cfg.title, cfg.network)
    page = report(found)
    with atomic(cfg.out) as partial:
        partial.write_text(page, encoding="utf-8")
    print(f"{cfg.out}: {len(page) / 1e6:.1f} MB")
    if cfg.picture is not None:
        if found.reanalysis is None or found.observations is None:
            raise UserError(f"{cfg.run} holds no reanalysis and observations to make a picture of: leave picture out")
        with atomic(cfg.picture) as partial:
            variables = None if cfg.variables is None else list(cfg.variables)
            partial.write_bytes(hero(found.reanalysis, found.observations, found.truth, found.forecast, variables))
        print(cfg.picture)


def read_run(directory: str | Path, title: str | None = None, network: DictConfig | None = None) -> Run:
    """What a directory holds under the names that ``quickstart`` gives its files.

    ``truth, reanalysis, optimal_interpolation, forecast`` (.zarr or .nc), ``observations, withheld`` (.parquet, .csv or
    .nc), ``scores_reanalysis.json, scores_withheld.json, scores_forecast.json`` and their ``_details``, ``commands.txt``.
    Outputs of ``extremes`` are found under any name. ``network`` tells how the observation files are to be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}")
    found = Run(title=title or directory.resolve().name.replace("_", " ").capitalize())
    for name in DATASETS:
        path = _first(directory, name, (".zarr", ".nc"))
        if path is not None:
            setattr(found, name, _one(standardise(open_dataset(path))))
    for name in TABLES:
        path = _first(directory, name, (".parquet", ".csv", ".nc"))
        if path is not None:
            setattr(found, name, _in_units(read_table(path, network), found, network))
    for kind in KINDS:
        for name, target in ((f"scores_{kind}", found.scores), (f"scores_{kind}_details", found.details)):
            if (directory / f"{name}.json").exists():
                target[kind] = _json(directory / f"{name}.json")
    for path in sorted([*directory.glob("*.zarr"), *directory.glob("*.nc")]):
        dataset = open_dataset(path)
        if "event_where" in dataset.attrs:
            found.events.append((path.stem.replace("_", " "), str(dataset.attrs["sentence"]), drawn_again(dataset)))
    if (directory / "commands.txt").exists():
        found.commands = (directory / "commands.txt").read_text().splitlines()
    if found.reanalysis is None and found.forecast is None and not found.scores and not found.events:
        raise UserError(
            f"{directory} holds no reanalysis, forecast, scores or extremes: expected reanalysis.zarr, scores_reanalysis.json, ..."
        )
    return found


def _in_units(table: pd.DataFrame, found: Run, network: DictConfig | None) -> pd.DataFrame:
    """The table's good rows in the names and units of the fields; as it is where there is nothing to compare with."""
    data = next((d for d in (found.reanalysis, found.truth) if d is not None), None)
    if data is None or network is None:
        return table
    _, spec = open_fields(data.isel(number=0, drop=True) if "number" in data.dims else data)
    ends = np.unique(table["time"].dropna().to_numpy())[[0, -1]]
    return build_observation(table, spec, np.unique(ends), network)[0].provenance


def _first(directory: Path, name: str, endings: tuple[str, ...]) -> Path | None:
    return next((directory / f"{name}{e}" for e in endings if (directory / f"{name}{e}").exists()), None)


def _one(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.isel(trajectory=0, drop=True) if "trajectory" in dataset.dims else dataset


def _json(path: Path) -> list | dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): make it again with verify") from error
