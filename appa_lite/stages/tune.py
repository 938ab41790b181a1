"""``tune``: the settings of an assimilation method with the smallest error on validation data."""

import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr
from omegaconf import DictConfig, OmegaConf

from appa_lite.config import compose
from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_seconds
from appa_lite.core.store import atomic, open_dataset
from appa_lite.forecasters.base import Progress
from appa_lite.stages import assimilation, reanalysis
from appa_lite.stages.parallel import Part, Work, packed, unpacked
from appa_lite.verification.tables import check_table_path, dumps

Record = dict[str, object]


def run(cfg: DictConfig) -> None:
    """Try every combination of ``cfg.grid`` on ``cfg.observations``; write the scores to ``cfg.out`` and print the best."""
    check_table_path(cfg.out)
    grid = _grid(cfg.grid)
    truth = _truth(cfg)
    base = _reanalysis(cfg)
    tried = [_with(base, setting) for setting in grid]
    paths = assimilation.files(cfg.observations)
    table = assimilation.read_files(paths, assimilation.table_options(base))

    def attempt(i: int, progress: Progress) -> Part:
        began, failure = time.monotonic(), None
        try:
            scores = _scores(reanalysis.analyse(tried[i], table, paths, Work())[0], truth, cfg)
            if not all(math.isfinite(score["rmse"]) for score in scores.values()):
                raise UserError("the members ran away")
            note = ", ".join(f"{name} {score['rmse']:.4g}" for name, score in scores.items())
        except UserError as error:  # members that blow up are a result
            failure, note = str(error), f"failed: {error}"
            scores = {"": {"rmse": None, "spread_skill": None, "relative": None}}
        seconds = round(time.monotonic() - began, 3)
        print(f"{_words(base, grid[i])}: {note} ({seconds:.0f} s)", flush=True)
        return {"tried": packed([failure, [{"variable": name} | score | {"seconds": seconds} for name, score in scores.items()]])}

    with Work.of(cfg, [*paths, cfg.truth]) as work:
        parts = work.map(len(grid), attempt)
        if parts is not None:
            _conclude(cfg, base, grid, [unpacked(part["tried"]) for part in parts])


def _conclude(cfg: DictConfig, base: DictConfig, grid: list[dict[str, object]], tried: list[tuple[str | None, list[Record]]]) -> None:
    """The table of all that was tried, and the best of it."""
    records = [setting | score for setting, (_, scores) in zip(grid, tried, strict=True) for score in scores]
    if all(record["rmse"] is None for record in records):
        raise UserError(f"no setting of the grid worked; the last: {tried[-1][0]}")
    best = _best(records, grid)
    for record in records:
        record["best"] = all(record[key] == value for key, value in best.items())
    with atomic(cfg.out) as partial:
        partial.write_text(dumps(records, Path(cfg.out).suffix))
    print(f"best: {_words(base, best)}\n{cfg.out}: {len(grid)} settings")


def _grid(tree: Mapping[str, object]) -> list[dict[str, object]]:
    """All combinations {key: value}."""
    plain = OmegaConf.to_container(tree) if isinstance(tree, DictConfig) else None
    if not isinstance(plain, dict) or not plain or not all(isinstance(v, list) and v for v in plain.values()):
        raise UserError(f"grid={plain}: expected lists of values to try, such as grid={{inflation: [1.0, 1.02], radius: [8, 16]}}")
    return [dict(zip(plain, values, strict=True)) for values in itertools.product(*plain.values())]


def _reanalysis(cfg: DictConfig) -> DictConfig:
    """The configuration of ``reanalysis`` with the experiment's choices for it, and those made here."""
    chosen = [f"{key}={cfg[key]}" for key in ("experiment", "size") if cfg[key] is not None]
    base = compose("reanalysis", [*chosen, "out=unused.zarr", f"observations={json.dumps(cfg.observations)}"], partial=True)
    for key in set(cfg) & set(base) - {"command", "experiment", "size", "out", "observations"}:
        if cfg[key] is not None:
            base[key] = cfg[key]
    return base


def _with(base: DictConfig, setting: Mapping[str, object]) -> DictConfig:
    """The configuration with one combination of the grid; keys without a section are the method's, else the command's."""
    new = OmegaConf.create(OmegaConf.to_container(base))
    for key, value in setting.items():
        path = _path(base, key)
        if OmegaConf.select(base, path, default="???") == "???":
            known = ", ".join([*(str(k) for k in base.forecaster if k != "class"), "guidance.*", "sampler.*", "members"])
            raise UserError(f"grid: unknown key '{key}'; known: {known}")
        OmegaConf.update(new, path, value)
    return new


def _path(base: DictConfig, key: str) -> str:
    return f"forecaster.{key}" if key in base.forecaster else key


def _words(base: DictConfig, setting: Mapping[str, object]) -> str:
    """The combination as one would type it."""
    return " ".join(f"{_path(base, key)}={'null' if value is None else value}" for key, value in setting.items())


def _truth(cfg: DictConfig) -> xr.Dataset:
    truth = open_dataset(cfg.truth)
    if "trajectory" not in truth.dims:
        return truth
    if not 0 <= cfg.trajectory < truth.sizes["trajectory"]:
        raise UserError(f"trajectory={cfg.trajectory}: '{cfg.truth}' has {truth.sizes['trajectory']}, numbered from 0")
    return truth.isel(trajectory=cfg.trajectory)


def _scores(analysis: xr.Dataset, truth: xr.Dataset, cfg: DictConfig) -> dict[str, dict[str, float | None]]:
    """Of each variable: RMSE of the ensemble mean, spread over it, and the RMSE over the truth's standard deviation."""
    common = np.intersect1d(to_seconds(analysis["time"].values), to_seconds(truth["time"].values))[cfg.burn_in :]
    if not len(common):
        raise UserError(f"the truth and the analyses have no frames in common after burn_in={cfg.burn_in}: give start=... and end=...")
    frames = [np.isin(to_seconds(d["time"].values), common) for d in (analysis, truth)]
    analysis, truth = (d.isel(time=keep) for d, keep in zip((analysis, truth), frames, strict=True))
    names = [str(n) for n in (cfg.variables or [n for n in analysis.data_vars if n in truth])]
    missing = [n for n in names if n not in analysis or n not in truth]
    if missing or not names:
        raise UserError(f"variables: {', '.join(missing) or 'none'} not in both the analyses and '{cfg.truth}'")
    out = {}
    for name in names:
        members, true = analysis[name].transpose("number", ...), truth[name].transpose(*analysis[name].isel(number=0).dims).values
        rmse = float(np.sqrt(np.nanmean((members.mean("number").values - true) ** 2)))
        spread = float(np.sqrt(np.nanmean(members.var("number", ddof=1).values))) if members.sizes["number"] > 1 else None
        out[name] = {"rmse": rmse, "spread_skill": None if spread is None else spread / rmse, "relative": rmse / float(np.nanstd(true))}
    return out


def _best(records: list[Record], grid: list[dict[str, object]]) -> dict[str, object]:
    """The combination with the smallest mean over variables of the relative RMSE."""

    def error(setting: dict[str, object]) -> float:
        found = [r["relative"] for r in records if all(r[key] == value for key, value in setting.items())]
        return float("inf") if None in found else float(np.mean(found))

    return min(grid, key=error)
