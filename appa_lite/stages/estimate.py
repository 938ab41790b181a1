"""``estimate``: standard deviations and biases of observation errors from innovations, no truth needed."""

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig

from appa_lite.core.errors import UserError
from appa_lite.core.store import provenance
from appa_lite.forecasters.errors import ErrorEstimate, estimate_errors, innovations
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.observations import build_observation, write_table
from appa_lite.observations.rows import drop_duplicates, kinds, withheld
from appa_lite.stages import assimilation as shared
from appa_lite.stages.device import device


def run(cfg: DictConfig) -> None:
    """Learn from ``cfg.observations`` between ``cfg.start`` and ``cfg.end``; write all usable rows, with their errors, to ``cfg.out``."""
    model = Checkpoint.load(cfg.checkpoint, device(cfg.device))
    if model.denoiser is None:
        raise UserError(f"'{cfg.checkpoint}' holds an autoencoder only: give the model directory of a denoiser")
    paths, options = shared.files(cfg.observations), shared.table_options(cfg)
    if options.student_t is not None:
        raise UserError("estimate takes errors for normal: leave network.student_t out")
    table, _ = drop_duplicates(shared.canonical_table(shared.read_files(paths, options), cfg))
    step, phase = model.spec.step, model.settings.get("phase", 0.0)
    whole = shared.covering(*shared.ends(table["time"], None, None), step, phase)
    everything, _ = build_observation(table, model.spec, whole[[0, -1]], options)
    first, last = shared.ends(table["time"], cfg.start, cfg.end)
    times = shared.covering(first, last, step, phase)
    past = table[table["time"].between(*pd.to_datetime([first, last], unit="s"))]
    observation, _ = build_observation(past, model.spec, times, options)
    observation = observation.select(torch.from_numpy(~withheld(observation.provenance, 0.0, cfg.seed, list(cfg.withhold_stations))))
    found = estimate_errors(innovations(model, observation, times), groups(observation.provenance, cfg.by), cfg.bias, cfg.seed)
    out = corrected(everything.provenance, found, cfg.bias, cfg.by)
    out.attrs = provenance(cfg, cfg.seed, paths)
    write_table(cfg.out, out)
    print(describe(found, cfg.bias))
    print(f"{cfg.out}: {len(out)} rows, learned from {len(observation)}")


def groups(table: pd.DataFrame, by: str) -> np.ndarray:
    """Rows (N,) whose errors are alike: of one kind, or also of one station."""
    if by not in ("kind", "station"):
        raise UserError(f"by={by}: expected kind or station")
    if by == "kind":
        return kinds(table)
    if "station" not in table:
        raise UserError("by=station needs a column 'station' in the observation file")
    return np.array([f"{kind} {station}" for kind, station in zip(kinds(table), table["station"].fillna(""), strict=True)], dtype=object)


def corrected(table: pd.DataFrame, found: dict[str, ErrorEstimate], bias: bool, by: str = "kind") -> pd.DataFrame:
    """The table with ``error_std`` times the factor of its kind, and ``bias`` plus the kind's; kinds not learned stay as they are."""
    out, kind = table.copy(), pd.Series(groups(table, by), index=table.index)
    out["error_std"] *= kind.map({k: e.factor for k, e in found.items()}).fillna(1.0).to_numpy(np.float64)
    if bias:
        own = kind.map({k: e.bias for k, e in found.items()}).fillna(0.0).to_numpy(np.float64)
        out["bias"] = own + (out["bias"].fillna(0.0).to_numpy() if "bias" in out else 0.0)
    return out


def describe(found: dict[str, ErrorEstimate], bias: bool) -> str:
    """A line for each kind."""
    width, lines = max(map(len, found)) + 2, []
    for kind, e in found.items():
        low, high = (e.factor * np.exp(sign * 2 * e.uncertainty) for sign in (-1, 1))
        line = f"{kind:{width}}error_std x {e.factor:.3g} ({low:.3g} to {high:.3g})"
        lines.append(line + (f", bias {e.bias:.3g} ({e.bias - 2 * e.bias_error:.3g} to {e.bias + 2 * e.bias_error:.3g})" if bias else ""))
    return "\n".join(lines)
