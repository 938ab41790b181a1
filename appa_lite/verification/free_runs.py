"""Free runs of models beside the simulator's: do they stay with it, and do they reach its extremes as often?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy.stats import norm

from appa_lite.core.errors import UserError
from appa_lite.verification.bootstrap import interval, multiplicities
from appa_lite.verification.grid import area_weights, grid_dims, periodicity, spacing, standardise
from appa_lite.verification.metrics import CorrelationLength, LogSpectralDistance, PowerRatio
from appa_lite.verification.return_levels import compare_return_levels
from appa_lite.verification.spectra import power_spectrum, spectral_box
from appa_lite.verification.tables import COLUMNS, Record

FAR = 3.0  #: a run is lost once a value is so many times further from the simulator's mean than the simulator ever is
MOST_CELLS = 400  #: whose series return levels are taken from, evenly spread over the grid
PREFIX = "free_run_"


@dataclass(frozen=True)
class Behaviour:
    """Of one variable of runs (run, time, grid): what the metrics need of every run, and the series of its extremes."""

    moments: np.ndarray  #: (run, 2): means of x and of x^2
    spectra: np.ndarray | None  #: (run, K)
    cells: np.ndarray  #: (run, cell, time)
    energy: np.ndarray  #: (run, time): the mean of x^2 over the field


@dataclass(frozen=True)
class How:
    """Choices: return periods in frames, bootstrap replicates, confidence of intervals, seed."""

    periods: Sequence[int] = (200, 1000, 5000)
    replicates: int = 500
    confidence: float = 0.9
    seed: int = 0


def score_free_runs(
    runs: Mapping[str, xr.Dataset | None],
    simulator: xr.Dataset,
    variables: Sequence[str] | None = None,
    how: How = How(),
    name: str = "oracle",
) -> tuple[list[Record], list[dict]]:
    """Records of every family's runs, of the columns of all tables, ``lead_time`` None; and spectra, as ``Details`` has them.

        free_run_lost                   the share of runs that leave the simulator's range threefold or are not finite
        free_run_mean_shift             difference of means, in the simulator's standard deviations
        free_run_std_ratio, free_run_energy_ratio, free_run_power_ratio_small, free_run_correlation_length_ratio
        free_run_log_spectral_distance  in decibels, of the mean spectra
        free_run_level_<N>              exceeded by one event in N frames, of a cell (``<variable>``) and of the energy of the
                                        field (``<variable>_energy``), of the family and of the simulator (``name``)
        free_run_level_<N>_minus_<name> their difference

    All but the first are of the runs that are not lost; levels are left out under 30 independent exceedances. Intervals are
    bootstraps over runs, of levels profile likelihoods (``compare_return_levels``); the distance has none, since runs drawn
    again are further apart than the runs are.

    Args:
        runs: (time, prediction_timedelta, number, grid), the initial state first; None: a run that ended without a result.
        simulator: trajectories (trajectory, time, grid) of the same step on the simulator's climate.
    """
    simulator = standardise(simulator)
    dims, steps = grid_dims(simulator), spacing(simulator)
    names = [str(v) for v in variables or simulator.data_vars if set(dims) <= set(simulator[v].dims)]
    truth = {v: _series(simulator[v], dims, "time") for v in names}
    alive = {family: _alive(None if d is None else standardise(d), truth, dims) for family, d in runs.items()}
    records: list[Record] = [_lost(family, names[0], kept) for family, (_, kept) in alive.items()]
    spectra: list[dict] = []
    for variable in names:
        box = spectral_box(np.isfinite(truth[variable]).all((0, 1)), periodicity(simulator))
        theirs = _behaviour(truth[variable], simulator[variable], box)
        axis = [] if theirs.spectra is None else _wavenumbers(truth[variable], steps[0], box)
        for family, (fields, kept) in alive.items():
            if not kept.any():
                continue
            mine = _behaviour(fields[variable][kept], simulator[variable], box)
            records += _climate(family, variable, mine, theirs, box.periodic, how)
            records += _levels(family, variable, mine, theirs, how, name)
            if mine.spectra is not None:
                curves = {"members": mine.spectra.mean(0).tolist(), "truth": theirs.spectra.mean(0).tolist()}
                where = {"system": family, "variable": variable, "lead_time": None, "wavenumber": axis}
                spectra.append(where | {"unit": f"1/{steps[1]}", **curves})
    return list({tuple(r[k] for k in COLUMNS[:4]): r for r in records}.values()), spectra


def _series(array: xr.DataArray, dims: tuple[str, ...], time: str) -> np.ndarray:
    """(run, time, grid), float64."""
    others = [d for d in array.dims if d not in (*dims, time)]
    values = array.transpose(*others, time, *dims).values.astype(np.float64)
    return values.reshape(-1, *values.shape[len(others) :])


def _alive(runs: xr.Dataset | None, truth: dict[str, np.ndarray], dims: tuple[str, ...]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Fields by variable after the initial state, and which runs are not lost."""
    if runs is None:
        return {}, np.zeros(1, dtype=bool)
    after = runs.isel(prediction_timedelta=slice(1, None))
    fields = {v: _series(after[v], dims, "prediction_timedelta") for v in truth}
    kept = np.ones(len(next(iter(fields.values()))), dtype=bool)
    for variable, values in fields.items():
        exists = np.isfinite(truth[variable]).all((0, 1))
        center = truth[variable][..., exists].mean()
        far = FAR * np.abs(truth[variable][..., exists] - center).max()
        with np.errstate(invalid="ignore", over="ignore"):
            kept &= (np.abs(values[..., exists] - center) <= far).all((1, 2))  # false where not finite
    return fields, kept


def _lost(family: str, variable: str, kept: np.ndarray, confidence: float = 0.9) -> Record:
    """The share that is lost, with Wilson's interval."""
    n, share, z = len(kept), float(1 - kept.mean()), norm.ppf(0.5 + confidence / 2)
    middle, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    ends = [float(np.clip((middle + s * half) / (1 + z**2 / n), 0.0, 1.0)) for s in (-1, 1)]
    return dict(zip(COLUMNS, (family, variable, f"{PREFIX}lost", None, share, *ends, n), strict=True))


def _behaviour(fields: np.ndarray, like: xr.DataArray, box) -> Behaviour:
    dims = grid_dims(like)
    weights = np.broadcast_to(area_weights(like).values.reshape(-1, *[1] * (len(dims) - 1)), fields.shape[2:])
    exists = np.isfinite(fields).all((0, 1))
    weights, cells = weights[exists] / weights[exists].sum(), fields[..., exists]
    energy = np.square(cells) @ weights
    moments = np.stack([(cells @ weights).mean(1), energy.mean(1)], 1)
    spectra = None
    if box.periodic is not None:
        spectra = power_spectrum(_part(fields, box), spacing(like)[0], box.periodic)[1].mean(1)
    stride = -(-cells.shape[-1] // MOST_CELLS)
    return Behaviour(moments, spectra, cells[..., ::stride].transpose(0, 2, 1), energy)


def _part(fields: np.ndarray, box) -> np.ndarray:
    for axis, index in zip(range(-len(box.part), 0), box.part, strict=True):
        fields = np.take(fields, index, axis)
    return fields


def _wavenumbers(fields: np.ndarray, steps: tuple[float, ...], box) -> list[float]:
    return power_spectrum(_part(fields[:1, :1], box), steps, box.periodic)[0].tolist()


def _climate(family: str, variable: str, mine: Behaviour, theirs: Behaviour, periodic: tuple[bool, ...] | None, how: How) -> list[Record]:
    """What is compared of means over runs, with intervals from both sets of runs drawn again."""
    spectral = [] if periodic is None else [PowerRatio(periodic), LogSpectralDistance(periodic), CorrelationLength(periodic)]

    def metrics(mean: np.ndarray, spectrum: np.ndarray | None, other: np.ndarray, truth: np.ndarray | None) -> dict[str, np.ndarray]:
        std, true_std = (np.sqrt(np.maximum(m[..., 1] - m[..., 0] ** 2, 0.0)) for m in (mean, other))
        found = {"mean_shift": (mean[..., 0] - other[..., 0]) / true_std, "std_ratio": std / true_std}
        found["energy_ratio"] = mean[..., 1] / other[..., 1]
        return found | {m.name: m.value({"spectrum_members": spectrum, "spectrum_truth": truth}) for m in spectral}

    def drawn(runs: Behaviour, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        shares = multiplicities(len(runs.moments), 1, how.replicates, seed) / len(runs.moments)
        return shares @ runs.moments, None if runs.spectra is None else shares @ runs.spectra

    means = [(b.moments.mean(0), None if b.spectra is None else b.spectra.mean(0)) for b in (mine, theirs)]
    values = metrics(*means[0], *means[1])
    several = min(len(mine.moments), len(theirs.moments)) > 2
    replicates = metrics(*drawn(mine, how.seed), *drawn(theirs, how.seed + 1)) if several else {}
    rows = []
    for metric, value in values.items():
        low, high = interval(replicates[metric], how.confidence) if several and metric != "log_spectral_distance" else (None, None)
        row = (family, variable, f"{PREFIX}{metric}", None, float(value), low, high, len(mine.moments))
        rows += [dict(zip(COLUMNS, row, strict=True))] if np.isfinite(value) else []
    return rows


def _levels(family: str, variable: str, mine: Behaviour, theirs: Behaviour, how: How, name: str) -> list[Record]:
    """Return levels of cells and of the energy, where there are exceedances enough."""
    rows = []
    for what, kind in ((variable, "cells"), (f"{variable}_energy", "energy")):
        try:
            found = compare_return_levels(getattr(mine, kind), getattr(theirs, kind), how.periods, confidence=how.confidence)
        except UserError:  # too few exceedances, which the absence of the row says
            continue
        for r in found:
            if r["quantity"] == "return_level":
                metric = f"{PREFIX}level_{r['period']:g}"
                system = {"model": family, "truth": name, "difference": family}[r["system"]]
                metric = f"{metric}_minus_{name}" if r["system"] == "difference" else metric
                row = (system, what, metric, None, r["value"], r["low"], r["high"], r["events"])
                rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows
