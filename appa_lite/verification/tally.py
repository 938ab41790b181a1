"""Sums per case of every statistic of every system, of a variable and of views of it, chunk by chunk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification.base import Metric, Sums
from appa_lite.verification.cases import Cases
from appa_lite.verification.extremes import Events, Threshold, extreme_metrics
from appa_lite.verification.grid import NUMBER
from appa_lite.verification.metrics import standard
from appa_lite.verification.pairs import ObservationPairs, Pairs, TruthPairs
from appa_lite.verification.spectra import Box
from appa_lite.verification.statistics import Count
from appa_lite.verification.thresholds import thresholds_of
from appa_lite.verification.views import View, applicable, plane

Against = TruthPairs | ObservationPairs


@dataclass
class Tally:
    """``sums[system][statistic]`` over the cases, and ``metrics[system]`` that they are for, of one variable or view."""

    variable: str
    thresholds: tuple[Threshold, ...] = ()
    metrics: dict[str, tuple[Metric, ...]] = field(default_factory=dict)
    sums: dict[str, dict[str, Sums]] = field(default_factory=dict)


def by_start(tally: Tally, cases: Cases) -> Tally:
    """The tally with a case per initial time, its leads added up."""
    starts, place = np.unique(cases.time, return_inverse=True)

    def added(array: xr.DataArray) -> xr.DataArray:
        out = np.zeros((len(starts), *array.shape[1:]))
        np.add.at(out, place, array.values)
        return xr.DataArray(out, dims=array.dims)

    sums = {n: {k: Sums(added(s.total), added(s.weight)) for k, s in every.items()} for n, every in tally.sums.items()}
    return Tally(tally.variable, tally.thresholds, tally.metrics, sums)


class _Gathering:
    """The parts of one tally, system by system."""

    def __init__(self, variable: str, thresholds: xr.Dataset | None, seed: int, box: Box | None):
        self.tally, self.seed, self.box = Tally(variable, thresholds_of(thresholds, variable)), seed, box

    def metrics(self, forecast: xr.DataArray) -> tuple[Metric, ...]:
        spectral = {} if self.box is None else {"periodic": self.box.periodic, "part": self.box.part}
        plain = standard(self.seed, forecast.sizes.get(NUMBER, 0) > 1, **spectral)
        return plain + extreme_metrics(self.tally.thresholds, self.seed)

    def add(self, parts: dict[str, list[Sums]], system: str, forecast: xr.DataArray, truth: xr.DataArray) -> None:
        for t in self.tally.thresholds:
            if any(truth.sizes.get(d) != n for d, n in t.value.sizes.items()):
                raise UserError(
                    f"the thresholds of {self.tally.variable} have cells {dict(t.value.sizes)}, what is scored {dict(truth.sizes)}: "
                    "give thresholds on its grid, or pooled over cells"
                )
        metrics = self.tally.metrics[system] = self.metrics(forecast)
        every = {s.name: s for m in metrics for s in m.statistics} | {"count": Count()}
        every |= {s.name: s for s in (Events(t) for t in self.tally.thresholds)}
        for key, statistic in every.items():
            parts.setdefault(key, []).append(statistic.compute(forecast, truth))


def tallies(
    against: Against, variable: str, views: Sequence[View], thresholds: xr.Dataset | None, seed: int, box: Box | None, watch=None
) -> list[Tally]:
    """The tally of a variable, then those of its views.

    Args:
        thresholds: quantiles (quantile, ...) by variable or ``<variable>_<view>``; None: no extremes.
        box: where spectra are computed; None: no spectra.
        watch: called with every pair, ``watch(system, variable, forecast, truth)``.
    """
    plain = _Gathering(variable, thresholds, seed, box)
    seen = {view.name: _Gathering(f"{variable}_{view.name}", thresholds, seed, None) for view in views}
    for system in against.names:
        parts: dict[str, dict[str, list[Sums]]] = {}
        for forecast, truth in against.pairs(system, variable):
            plain.add(parts.setdefault("", {}), system, forecast, truth)
            if watch is not None:
                watch(system, variable, forecast, truth)
            for view in applicable(views, forecast, truth):
                seen[view.name].add(parts.setdefault(view.name, {}), system, *view.pair(forecast, truth, against.periodic))
        for name, found in parts.items():
            (seen[name] if name else plain).tally.sums[system] = {key: Sums.concat(chunks) for key, chunks in found.items()}
    return [g.tally for g in (plain, *seen.values()) if g.tally.sums]


def energy_tally(against: Against, name: str, wind: tuple[str, str], energy: View, thresholds: xr.Dataset | None, seed: int) -> Tally:
    """The tally of the kinetic energy (u^2 + v^2) / 2, of the whole field."""
    gathering = _Gathering(name, thresholds, seed, None)
    for system in against.names:
        parts: dict[str, list[Sums]] = {}
        for forecast, truth in _kinetic(against.pairs(system, wind[0]), against.pairs(system, wind[1]), energy, against.periodic):
            gathering.add(parts, system, forecast, truth)
        if parts:
            gathering.tally.sums[system] = {key: Sums.concat(chunks) for key, chunks in parts.items()}
    return gathering.tally


def _kinetic(first: Pairs, second: Pairs, energy: View, periodic: tuple[bool, ...]) -> Iterator[tuple[xr.DataArray, xr.DataArray]]:
    for u, v in zip(first, second, strict=True):
        if not applicable([energy], *u) or not applicable([energy], *v) or plane(u[1]) != plane(v[1]):
            return
        parts = [energy.pair(*pair, periodic) for pair in (u, v)]
        yield tuple(0.5 * (a + b) for a, b in zip(*parts, strict=True))


def series(sums: Sums, index: np.ndarray | slice = slice(None)) -> np.ndarray:
    """The mean per case, NaN where a case has no weight."""
    total, weight = sums.total.values[index], sums.weight.values[index]
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)
