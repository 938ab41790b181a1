"""Scores of forecasts and analyses against a truth or against observations, beside baselines, in one tidy table."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import final

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification.base import Sums
from appa_lite.verification.cases import Cases
from appa_lite.verification.details import Details
from appa_lite.verification.distance import Distance, distances
from appa_lite.verification.grid import standardise
from appa_lite.verification.pairs import ObservationPairs, TruthPairs
from appa_lite.verification.resampling import Group, Resampling
from appa_lite.verification.tables import Record
from appa_lite.verification.tally import Against, Tally, energy_tally, tallies
from appa_lite.verification.thresholds import QUANTILES, check_quantiles
from appa_lite.verification.views import Energy, parse, winds

COMPARED = ("rmse", "crps_fair", "twcrps", "brier")  #: what is compared in pairs


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
        views: transformations of fields that are scored too: ``mean2, mean5, ...`` (over so many neighbours), ``energy``,
            ``gradient``.
        quantiles: of the training climatology, at which extremes are scored where thresholds are given.
        lapse_rates: kriging's lapse rate (units per metre) per variable; null: 6.5 K/km for 2 m temperature.
    """

    def __init__(
        self,
        replicates: int = 1000,
        confidence: float = 0.9,
        block: int | None = None,
        spectra: bool = True,
        views: Sequence[str] = (),
        quantiles: Sequence[float] = QUANTILES,
        lapse_rates: dict | None = None,
    ):
        if replicates < 20 or not 0 < confidence < 1 or (block is not None and block < 1):
            raise UserError("verification needs replicates >= 20, 0 < confidence < 1 and block >= 1 (or null)")
        self.replicates, self.confidence, self.block = replicates, confidence, block
        check_quantiles(quantiles)
        self.spectra, self.views, self.quantiles, self.lapse_rates = spectra, parse(views), tuple(quantiles), lapse_rates

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
        thresholds: xr.Dataset | None = None,
        observed: pd.DataFrame | None = None,
    ) -> Scores:
        """Scores of every system and baseline, on the cases that all systems share.

        Args:
            systems: forecasts (time, prediction_timedelta, number, grid) or analyses (time, number, grid) by name; an
                ensemble, a Gaussian (dimension ``moment``) or a single state. The first is compared with each other in pairs.
            truth: (time, grid), (trajectory, time, grid) of which ``trajectory`` is taken, or like a forecast (time,
                prediction_timedelta, grid); or else
            observations: an observation table; its errors are accounted for.
            variables: which; default all that both sides have.
            climatology: ``<name>`` and ``<name>_std`` per cell, by ``hour``, ``dayofyear`` or ``month`` if it has these.
            kriging: a table of station reports to interpolate; ``kriging_fit`` what its variogram is fitted on.
            thresholds: quantiles of the training climatology, ``climatological_quantiles(training)``; None: no extremes.
            observed: what the analyses were given: scores and ranks of the variable's cells by their distance to it, too.

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
        if observed is not None and truth is None:
            raise UserError("observed=... tells cells apart by their distance to it: give a truth on a grid")
        places = {} if observed is None else distances(observed, against.truth)
        details, records = Details(against, self.block), []
        first, *others = against.names
        for tally in self.tallies(against, against.variables(variables), thresholds, seed, details, places):
            for lead, index in grouped(against.cases):
                group = Group(tally, lead, index, self.resampling(seed))
                records += group.scores() + group.differences([(first, other) for other in others], COMPARED)
        if not records:
            raise UserError("nothing could be compared: no cell or observation has both a forecast and a truth")
        return Scores(records, details.to_dict())

    def tallies(
        self, against: Against, variables: Sequence[str], thresholds: xr.Dataset | None, seed: int, details: Details | None = None,
        places: Mapping[str, Sequence[Distance]] = MappingProxyType({}),
    ) -> Iterator[Tally]:  # fmt: skip
        """The sums of every variable, of its views, and of the kinetic energy where both components of a velocity are there."""
        energies = winds(variables) if any(isinstance(v, Energy) for v in self.views) else {}
        components = {n for wind in energies.values() for n in wind}
        for variable in variables:
            box = against.box(variable) if self.spectra else None
            views = [v for v in self.views if not (isinstance(v, Energy) and variable in components)]
            views += places.get(variable, ())
            found = tallies(against, variable, views, thresholds, seed, box, None if details is None else details.stations)
            for name, sums in found[0].sums.items() if found and found[0].variable == variable else ():
                if name in against.systems:
                    _warn_missing(name, variable, sums["count"])
            if details is not None and found:
                details.add(found[0], box)
                classes = {f"{variable}_{v.name}" for v in places.get(variable, ())}
                for tally in (t for t in found if t.variable in classes):
                    details.add(tally, None)
            yield from found
        for name, wind in energies.items():
            tally = energy_tally(against, name, wind, Energy(), thresholds, seed)
            if tally.sums:
                yield tally

    def resampling(self, seed: int) -> Resampling:
        """How intervals are made."""
        return Resampling(self.replicates, self.confidence, self.block, seed)


def score(
    systems: Mapping[str, xr.Dataset], truth: xr.Dataset | None = None, observations: pd.DataFrame | None = None, **choices
) -> list[Record]:
    """The tidy table of ``Verification().evaluate(...)``: records ``system, variable, metric, lead_time, value, low, high, count``."""
    return Verification().evaluate(systems, truth, observations, **choices).records


def grouped(cases: Cases) -> list[tuple[float | None, np.ndarray]]:
    """The cases of every lead, None for analyses."""
    if not cases.forecasts:
        return [(None, np.arange(len(cases)))]
    return [(float(s), np.flatnonzero(cases.seconds == s)) for s in np.unique(cases.seconds)]


def _warn_missing(name: str, variable: str, count: Sums) -> None:
    found, known = float(count.total.sum()), float(count.weight.sum())
    if found < known:
        warnings.warn(f"{variable}: '{name}' has missing values: {found:.0f} of {known:.0f} are compared", stacklevel=2)
