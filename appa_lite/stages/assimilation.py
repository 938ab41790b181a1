"""What reanalysis and filter share: rows read, withheld and judged, the analysis they are given to, and its evidence."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike

import numpy as np
import pandas as pd
import torch
import xarray as xr
from omegaconf import DictConfig, ListConfig, OmegaConf

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_datetime, to_seconds
from appa_lite.core.random import derive
from appa_lite.data.open import parse_date
from appa_lite.forecasters.base import Assimilator, Progress
from appa_lite.forecasters.errors import gross_errors, innovations
from appa_lite.guidance.base import SolverReport
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.observations import build_observation, read_table
from appa_lite.observations.base import Observation
from appa_lite.observations.options import TableOptions
from appa_lite.observations.rows import drop_duplicates, kinds, withheld
from appa_lite.observations.table import canonical
from appa_lite.stages.parallel import Part, batches, packed, unpacked
from appa_lite.stages.prior import competitor
from appa_lite.verification.innovations import MISFIT, effective_members, evidence, summary, used_sums, withheld_sums

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """The assimilator of a configuration, and what it works on: fields, phase of the frames (seconds), trained model or None."""

    assimilator: Assimilator
    spec: FieldSpec
    phase: float
    checkpoint: Checkpoint | None


def engine(cfg: DictConfig) -> Engine:
    """The assimilator that ``cfg`` describes."""
    if cfg.members < 1:
        raise UserError(f"members={cfg.members} must be at least 1")
    if not 0 <= cfg.gross_error_probability < 0.5:
        raise UserError(f"gross_error_probability={cfg.gross_error_probability}: expected a share of the rows, below 0.5")
    assimilator, setting = competitor(cfg, Assimilator)
    return Engine(assimilator, setting.spec, setting.phase, setting.checkpoint)


# Rows


def files(observations: str | ListConfig) -> list[str]:
    """The observation files of a key that takes one or several."""
    return [str(f) for f in observations] if isinstance(observations, ListConfig) else [str(observations)]


def table_options(cfg: DictConfig) -> TableOptions:
    """How observation files are to be read."""
    return TableOptions.parse(None if cfg.network is None else OmegaConf.to_container(cfg.network))


def read_files(paths: Sequence[str | PathLike], options: TableOptions) -> pd.DataFrame:
    """The rows of all files, in one table."""
    return pd.concat([read_table(path, options) for path in paths], ignore_index=True)


def share(text: object) -> float:
    """The number in ``10%`` or ``0.1``; nothing is zero."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%?)\s*", str(0 if text is None else text))
    try:
        value = float(match[1]) / (100 if match[2] else 1)
    except (ValueError, TypeError):
        raise UserError(f"withhold={text} is not a share: expected such as 10% or 0.1") from None
    if not 0 <= value < 1:
        raise UserError(f"withhold={text} must be at least 0 and below 100%")
    return value


@dataclass(frozen=True)
class Rows:
    """Observations of a stretch of frames, which of them are withheld (M,), what kind each is (M,), and what became of all rows."""

    observation: Observation
    withheld: np.ndarray
    kinds: np.ndarray
    counts: dict[str, int]

    @property
    def names(self) -> list[str]:
        return sorted(set(self.kinds))

    @property
    def time(self) -> np.ndarray:
        """(M,) datetime64."""
        return self.observation.provenance["time"].to_numpy()

    def part(self, keep: np.ndarray) -> Observation:
        return self.observation.select(torch.from_numpy(keep))


def prepare(cfg: DictConfig, table: pd.DataFrame, spec: FieldSpec, times: np.ndarray) -> Rows:
    """The rows of a canonical table that fields at ``times`` can be compared with: no row twice, some withheld."""
    table, duplicates = drop_duplicates(table)
    observation, counts = build_observation(table, spec, times, table_options(cfg))
    hidden = withheld(observation.provenance, share(cfg.withhold), cfg.seed, list(cfg.withhold_stations))
    counts |= {k: n for k, n in (("duplicate", duplicates), ("withheld", int(hidden.sum()))) if n}
    counts["used"] -= int(hidden.sum())
    return Rows(observation, hidden, kinds(observation.provenance), counts)


def judged(cfg: DictConfig, model: Engine, observation: Observation, times: np.ndarray) -> tuple[Observation, np.ndarray]:
    """The observation with the errors of doubtful values enlarged, and bool (M,): those whose error is probably gross."""
    if not cfg.gross_error_probability or not len(observation):
        return observation, np.zeros(len(observation), dtype=bool)
    if model.checkpoint is None:
        raise UserError("gross_error_probability needs the climatology of a trained checkpoint: leave it out")
    if observation.degrees is not None:
        raise UserError("gross_error_probability and network.student_t are two ways to doubt values: leave one out")
    pieces = innovations(model.checkpoint, replace(observation, correlation=None), times)  # each value is judged for itself
    probability, weight = gross_errors(pieces, len(observation), cfg.gross_error_probability, cfg.seed)
    return observation.inflated(weight), (probability > 0.5).numpy()


# Members


def pieces(cfg: DictConfig, model: Engine) -> list[range]:
    """Members that are computed together: all of them where they are each other's covariance."""
    return batches(cfg.members, cfg.members if model.assimilator.coupled else cfg.batch)


def assimilated(
    model: Engine, used: Observation, times: np.ndarray, members: range, seed: int, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fields (N, T, C, H, W) of some members, and what the solver did for them."""
    model.assimilator.report = SolverReport()
    fields = model.assimilator.assimilate(used if len(used) else None, times, members, seed, progress).cpu()
    return fields, packed(asdict(model.assimilator.report))


# Times


def canonical_table(table: pd.DataFrame, cfg: DictConfig) -> pd.DataFrame:
    """The table in canonical columns, with at least one time."""
    table = canonical(table, table_options(cfg))
    if not len(table["time"].dropna()):
        raise UserError("the observation file has no time")
    return table


def ends(when: pd.Series, start: object, end: object) -> tuple[float, float]:
    """Seconds of ``start`` and ``end`` (dates, or None: those of the observations)."""
    first = to_seconds(np.array([parse_date(start, "start") if start else when.min()], dtype="datetime64[ns]"))[0]
    last = to_seconds(np.array([parse_date(end, "end") if end else when.max()], dtype="datetime64[ns]"))[0]
    if last < first:
        raise UserError(f"end={end} is before start={start}")
    return float(first), float(last)


def frames_between(low: int, high: int, step: float, phase: float) -> np.ndarray:
    """Times (T,) of the model's frames ``low`` to ``high``, counted from the training's phase."""
    return to_datetime(phase + step * np.arange(low, high + 1))


def covering(first: float, last: float, step: float, phase: float) -> np.ndarray:
    """The model's frames (at least two) around a stretch of time, given in seconds."""
    low, high = int(np.floor((first - phase) / step + 1e-9)), int(np.ceil((last - phase) / step - 1e-9))
    return frames_between(low, max(high, low + 1), step, phase)


# Evidence


def seen(rows: Rows, used: Observation, keep: np.ndarray, fields: torch.Tensor, start: int) -> Part:
    """What members (N, T, C, H, W), whose first frame is ``start``, have where values were ``used``, and where ``withheld``.

    ``used`` is what they were given, of the same frames; ``keep`` (M,) tells which withheld rows are looked at.
    """
    hidden = rows.withheld & keep
    return {
        "used": used.operator(fields),
        "withheld": rows.part(hidden).operator.rebase(start)(fields) if hidden.any() else fields[:, 0, 0, 0, :0],
    }


def sums_of(rows: Rows, used: Observation, keep: np.ndarray, parts: Sequence[Part], names: list[str], seed: int) -> np.ndarray:
    """Sums of the innovations of the ensemble whose members are in ``parts``, see `seen`."""
    at_used, at_withheld = (torch.cat([part[name] for part in parts]) for name in ("used", "withheld"))
    sums, mixing = used_sums(used.values, at_used, used.variance, kinds(used.provenance), names), used.mixing()
    if mixing is not None:  # ratios from independent combinations of rows, biases from the rows themselves
        bias = sums[:, MISFIT].copy()
        sums = used_sums(mixing(used.values), mixing(at_used), used.variance, kinds(used.provenance), names)
        sums[:, MISFIT] = bias
    hidden = rows.withheld & keep
    if hidden.any():
        kept = rows.part(hidden)
        rng = np.random.default_rng(derive(seed, "withheld"))
        sums += withheld_sums(kept.values, at_withheld, kept.variance, rows.kinds[hidden], names, rng)
    return sums


def testify(dataset: xr.Dataset, sums: np.ndarray, names: list[str], counts: dict[str, int]) -> str:
    """Write the evidence into the attributes of an analysis, and return it in a few lines."""
    members = dataset.sizes["number"]
    records, effective = evidence(sums, names, members), effective_members(dataset)
    dataset.attrs |= {
        "observation_counts": json.dumps(counts),
        "evidence": json.dumps(records),
        "effective_members": float(f"{effective:.5g}"),
    }
    return summary(records, effective, members)


def solver(parts: Sequence[Part]) -> tuple[dict[str, float | str], str]:
    """What the solver reports of all parts, as attributes and in words; a warning if it did not get there."""
    report = SolverReport()
    for part in parts:
        report.merge(SolverReport(**unpacked(part["solver"])))
    found, warning = report.attributes(), report.warning()
    if warning is not None:
        log.warning(warning)
    return found, f"solver {found['solver_iterations_mean']:.0f} iterations a step, residual at most {found['solver_residual_max']:.1g}"


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in counts.items())
