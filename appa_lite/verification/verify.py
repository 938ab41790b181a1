"""Scores of forecasts and analyses against a truth or against observations, beside baselines, in one tidy table."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification.base import Metric, Sums
from appa_lite.verification.bootstrap import block_length, interval, multiplicities
from appa_lite.verification.cases import Cases
from appa_lite.verification.details import Details
from appa_lite.verification.grid import NUMBER, standardise
from appa_lite.verification.metrics import standard
from appa_lite.verification.pairs import ObservationPairs, TruthPairs
from appa_lite.verification.statistics import Count
from appa_lite.verification.tables import COLUMNS, Record


@dataclass
class Scores:
    """``records``: the tidy table. ``details``: JSON-able curves, histograms and spectra for figures."""

    records: list[Record] = field(default_factory=list)
    details: dict = field(default_factory=dict)


@final
class Verification:
    """How to score: every choice that is not data.

    Args:
        replicates: bootstrap replicates behind every interval.
        confidence: of the intervals.
        block: cases per bootstrap block; null: from the autocorrelation of the squared error.
        spectra: whether to compute power spectra.
        lapse_rates: kriging's lapse rate (units per metre) per variable; null: 6.5 K/km for 2 m temperature.
    """

    def __init__(
        self,
        replicates: int = 1000,
        confidence: float = 0.9,
        block: int | None = None,
        spectra: bool = True,
        lapse_rates: dict | None = None,
    ):
        if replicates < 20 or not 0 < confidence < 1 or (block is not None and block < 1):
            raise UserError("verification needs replicates >= 20, 0 < confidence < 1 and block >= 1 (or null)")
        self.replicates, self.confidence, self.block = replicates, confidence, block
        self.spectra, self.lapse_rates = spectra, lapse_rates

    def evaluate(
        self,
        systems: Mapping[str, xr.Dataset],
        truth: xr.Dataset | None = None,
        observations: pd.DataFrame | None = None,
        variables: Sequence[str] | None = None,
        climatology: xr.Dataset | None = None,
        kriging: pd.DataFrame | None = None,
        kriging_fit: pd.DataFrame | None = None,
        trajectory: int = 0,
        seed: int = 0,
    ) -> Scores:
        """Scores of every system and baseline, on the cases that all systems share.

        Args:
            systems: forecasts (time, prediction_timedelta, number, grid) or analyses (time, number, grid) by name; an
                ensemble, a Gaussian (dimension ``moment``) or a single state. The first is compared with each other in pairs.
            truth: (time, grid), or (trajectory, time, grid) of which ``trajectory`` is taken; or else
            observations: an observation table; its errors are accounted for.
            variables: which; default all that both sides have.
            climatology: ``<name>`` and ``<name>_std`` per cell, by ``hour``, ``dayofyear`` or ``month`` if it has these.
            kriging: a table of station reports to interpolate; ``kriging_fit`` what its variogram is fitted on.

        Raises:
            UserError: nothing in common in time, variables or grid.
        """
        if (truth is None) == (observations is None):
            raise UserError("expected either a truth or observations to verify against, found " + ("neither" if truth is None else "both"))
        systems = {name: standardise(dataset) for name, dataset in systems.items()}
        climatology = None if climatology is None else standardise(climatology)
        if climatology is not None and climatology.sizes.get("time") == 1:
            climatology = climatology.isel(time=0, drop=True)
        against = (
            TruthPairs(systems, truth, trajectory, climatology)
            if truth is not None
            else ObservationPairs(systems, observations, climatology, kriging, kriging_fit, self.lapse_rates)
        )
        details, records = Details(against.kind), []
        for variable in against.variables(variables):
            records += self._variable(against, variable, details, seed)
        if not records:
            raise UserError("nothing could be compared: no cell or observation has both a forecast and a truth")
        return Scores(records, details.to_dict())

    def _variable(self, against: TruthPairs | ObservationPairs, variable: str, details: Details, seed: int) -> list[Record]:
        sums: dict[str, dict[str, Sums]] = {}
        metrics: dict[str, tuple[Metric, ...]] = {}
        for name in against.names:
            parts: dict[str, list[Sums]] = {}
            for forecast, truth in against.pairs(name, variable):
                periodic = against.whole(truth) if self.spectra else None
                metrics[name] = standard(seed, forecast.sizes.get(NUMBER, 0) > 1, periodic)
                every = {s.name: s for m in metrics[name] for s in m.statistics} | {"count": Count()}
                for key, statistic in every.items():
                    parts.setdefault(key, []).append(statistic.compute(forecast, truth))
                details.stations(name, variable, forecast, truth, against)
            if parts:
                sums[name] = {key: Sums.concat(chunks) for key, chunks in parts.items()}
                details.add(name, variable, sums[name], against.cases)
                if name in against.systems:
                    _warn_missing(name, variable, sums[name]["count"])
        records = []
        for lead, index in _groups(against.cases):
            records += self._group(variable, lead, index, sums, metrics, seed)
        return records

    def _group(self, variable: str, lead: float | None, index: np.ndarray, sums: dict, metrics: dict, seed: int) -> list[Record]:
        """The records of one variable and lead; all systems are resampled alike, so that differences are paired."""
        records, replicates = [], {}
        counts = None
        for name, statistics in sums.items():
            here = {key: (s.total.values[index], s.weight.values[index]) for key, s in statistics.items()}
            compared = int(here["count"][0].sum())
            if not compared:
                continue
            if counts is None and len(index) >= 3:
                total, weight = here["squared_error"]
                series = np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)
                counts = multiplicities(len(index), self.block or block_length(series), self.replicates, seed)
            for metric in metrics[name]:
                value = metric.value({s.name: _mean(*here[s.name]) for s in metric.statistics})
                if not np.isfinite(value):
                    continue
                low = high = None
                if counts is not None:
                    drawn = metric.value({s.name: _mean(*here[s.name], counts) for s in metric.statistics})
                    replicates[name, metric.name] = float(value), drawn
                    low, high = interval(drawn, self.confidence)
                records.append(_record(name, variable, metric.name, lead, float(value), low, high, compared))
        first = next(iter(sums), None)
        for (name, metric), (value, drawn) in replicates.items():
            if name != first and metric in ("rmse", "crps_fair") and (first, metric) in replicates:
                ours, ours_drawn = replicates[first, metric]
                low, high = interval(ours_drawn - drawn, self.confidence)
                records.append(_record(first, variable, f"{metric}_minus_{name}", lead, ours - value, low, high, len(index)))
        return records


def score(
    systems: Mapping[str, xr.Dataset], truth: xr.Dataset | None = None, observations: pd.DataFrame | None = None, **choices
) -> list[Record]:
    """The tidy table of ``Verification().evaluate(...)``: records ``system, variable, metric, lead_time, value, low, high, count``."""
    return Verification().evaluate(systems, truth, observations, **choices).records


def _mean(total: np.ndarray, weight: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """sum_c n_c total_c / sum_c n_c weight_c, (replicates, [bins]); n_c = 1 without counts."""
    if counts is None:
        counts = np.ones(len(weight))
    above, below = counts @ total, counts @ weight
    below = below[..., None] if above.ndim > np.ndim(below) else below
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below


def _record(system, variable, metric, lead, value, low, high, count) -> Record:
    return dict(zip(COLUMNS, (system, variable, metric, lead, value, low, high, count), strict=True))


def _groups(cases: Cases) -> list[tuple[float | None, np.ndarray]]:
    if not cases.forecasts:
        return [(None, np.arange(len(cases)))]
    return [(float(s), np.flatnonzero(cases.seconds == s)) for s in np.unique(cases.seconds)]


def _warn_missing(name: str, variable: str, count: Sums) -> None:
    found, known = float(count.total.sum()), float(count.weight.sum())
    if found < known:
        warnings.warn(f"{variable}: '{name}' has missing values: {found:.0f} of {known:.0f} are compared", stacklevel=2)
