"""What is compared with what: systems and baselines beside a truth, or at observations."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification import baselines
from appa_lite.verification.base import center, ensemble_valid, variance
from appa_lite.verification.cases import Slots, check_grid, common_cases, gather, known_to, on_longitudes, truth_at
from appa_lite.verification.grid import MOMENT, NUMBER, grid_dims, periodicity, standardise
from appa_lite.verification.kriging import krige_table
from appa_lite.verification.spectra import Box, spectral_box
from appa_lite.verification.stations import predict, tidy, truth_of

Pairs = Iterator[tuple[xr.DataArray, xr.DataArray]]


def _shared(systems: Mapping[str, xr.Dataset], known: Sequence[str], chosen: Sequence[str] | None, what: str) -> list[str]:
    first = next(iter(systems.values()))
    both = [str(n) for n in first.data_vars if n in known]
    missing = [n for n in chosen or () if n not in both]
    if missing or not both:
        raise UserError(
            f"variable {', '.join(missing) or 'in common'} not found: the forecast has {', '.join(map(str, first.data_vars))}; "
            f"the {what} {', '.join(map(str, known))}"
        )
    return list(chosen) if chosen else both


class TruthPairs:
    """Pairs of forecasts and true fields."""

    kind = "truth"

    def __init__(self, systems: dict[str, xr.Dataset], truth: xr.Dataset, trajectory: int, climatology: xr.Dataset | None):
        truth = standardise(truth)
        for dim in {"trajectory", NUMBER} & set(truth.dims):  # of an ensemble, a member
            if not 0 <= trajectory < truth.sizes[dim]:
                raise UserError(f"trajectory={trajectory} is not there: the truth has {truth.sizes[dim]}, counted from 0")
            truth = truth.isel({dim: trajectory}, drop=True)
        systems = {name: on_longitudes(dataset, truth) for name, dataset in systems.items()}
        climatology = None if climatology is None else on_longitudes(climatology, truth)
        for name, dataset in systems.items():
            check_grid(name, dataset, truth)
        self.systems, self.truth, self.climatology = systems, truth, climatology
        self.cases = known_to(truth, common_cases(systems))
        self.periodic = periodicity(truth)
        extra = ["climatology"] if climatology is not None and "climatology" not in systems else []
        self.names = [*systems, *extra, *(["persistence"] if self.cases.forecasts and "persistence" not in systems else [])]

    def variables(self, chosen: Sequence[str] | None) -> list[str]:
        return _shared(self.systems, list(self.truth.data_vars), chosen, "truth")

    def pairs(self, name: str, variable: str) -> Pairs:
        array = self.systems[name].get(variable) if name in self.systems else self.truth[variable]
        if array is None:
            return
        dims = grid_dims(array)
        per_case = int(np.prod([array.sizes[d] for d in dims]) * array.sizes.get(NUMBER, 1) * array.sizes.get(MOMENT, 1))
        for part in self.cases.chunks(per_case):
            cases = self.cases[part]
            if name in self.systems:
                forecast = gather(array, cases).load()
            elif name == "climatology":
                forecast = baselines.climatology_forecast(self.climatology, variable, cases)
            else:
                initial = baselines.initial_states(self.truth[variable], self.truth[variable])
                forecast = None if initial is None else baselines.persistence_forecast(initial, cases)
            if forecast is None:
                return
            truth = truth_at(self.truth[variable], cases).load()
            yield _aligned(forecast, truth, dims), truth

    def box(self, variable: str) -> Box:
        """The cells that spectra are computed on: those that the truth and every forecast have, at their first time."""
        truth = truth_at(self.truth[variable], self.cases[:1])
        dims = grid_dims(truth)
        known = np.isfinite(truth).transpose("case", *dims).values[0]
        for dataset in self.systems.values():
            if variable in dataset:
                first = gather(dataset[variable], self.cases[:1])
                known = known & ensemble_valid(first).transpose("case", *dims).values[0]
        return spectral_box(known, self.periodic)


def _aligned(forecast: xr.DataArray, truth: xr.DataArray, dims: tuple[str, ...]) -> xr.DataArray:
    """The forecast on exactly the truth's coordinates (they agree to rounding), so that xarray pairs them by name."""
    keep = {d: truth[d] for d in dims if d in truth.coords}
    return forecast.drop_vars([c for c in forecast.coords if c not in (NUMBER, MOMENT)]).assign_coords(keep)


class ObservationPairs:
    """Pairs of forecasts at the observations' places and times, and the observations."""

    kind = "observations"

    def __init__(
        self,
        systems: dict[str, xr.Dataset],
        observations: pd.DataFrame,
        climatology: xr.Dataset | None,
        kriging: pd.DataFrame | None,
        kriging_fit: pd.DataFrame | None,
        lapse_rates: dict | None,
    ):
        first = next(iter(systems.values()))
        self.systems, self.climatology = systems, climatology
        self.dims, self.cases, self.periodic = grid_dims(first), common_cases(systems), periodicity(first)
        self.table, self.lapse_rates = tidy(observations), lapse_rates
        self.source = None if kriging is None else tidy(kriging)
        self.fit = None if kriging_fit is None else tidy(kriging_fit)
        self.names = [*systems, *(["climatology"] if climatology is not None else []), *(["kriging"] if kriging is not None else [])]
        self.names += ["persistence"] if self.cases.forecasts else []
        self._variable: str | None = None
        self._predictions: dict[str, xr.DataArray] = {}

    def variables(self, chosen: Sequence[str] | None) -> list[str]:
        return _shared(self.systems, list(self.table["variable"].unique()), chosen, "observation table")

    def pairs(self, name: str, variable: str) -> Pairs:
        if variable != self._variable:
            self._prepare(variable)
        if name in self._predictions:
            truth = self.truth.drop_vars("error_std") if name == "kriging" else self.truth
            yield self._predictions[name], truth

    def box(self, variable: str) -> None:
        """Observations have no spectrum."""

    def _prepare(self, variable: str) -> None:
        """All systems at the observations of one variable; kept are the observations that all of them reach."""
        rows = self.table[self.table["variable"] == variable].reset_index(drop=True)
        slots = Slots.assign(rows["time"].to_numpy(), self.cases)
        self._variable, self._predictions, self.rows, self.slots = variable, {}, rows, slots
        if not slots.row.size:
            period = f"{rows['time'].min()} to {rows['time'].max()}"
            raise UserError(f"the observations of {variable} ({period}) and the forecast have no time in common")
        for name in self.names:
            forecast = self._predict(name, variable)
            if forecast is not None:
                self._predictions[name] = forecast.assign_coords(self.cases.coords())
        truth = truth_of(rows, self.cases, slots)
        for forecast in self._predictions.values():
            truth = truth.where(np.isfinite(center(forecast)))
        self.truth = truth

    def _predict(self, name: str, variable: str) -> xr.DataArray | None:
        if name == "kriging":
            values = krige_table(self.source, self.rows, self.dims, self.lapse_rates, self.fit)
            if not np.isfinite(values).any():
                return None
            return self.slots.pack(values[self.slots.row], (MOMENT,)).assign_coords({MOMENT: ["mean", "std"]})
        if name in self.systems:
            array = self.systems[name].get(variable)
        elif name == "climatology":
            array = baselines.climatology_forecast(self.climatology, variable, self.cases)
        else:
            initial = baselines.initial_states(next(iter(self.systems.values()))[variable], None)
            array = None if initial is None else baselines.persistence_forecast(initial, self.cases)
        return None if array is None else predict(array, self.rows, self.cases, self.slots, self.periodic)

    def envelope(self, forecast: xr.DataArray, truth: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (K,) of the observation that the forecast predicts, in the slots' order."""
        predicted = variance(forecast)
        if "error_std" in truth.coords:
            predicted = predicted.fillna(0.0) + truth["error_std"].reset_coords(drop=True) ** 2
        place = self.slots.case, self.slots.place
        return center(forecast).transpose("case", "place").values[place], np.sqrt(predicted).transpose("case", "place").values[place]
