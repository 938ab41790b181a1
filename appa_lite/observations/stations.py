"""Stations and moorings: fixed places, regular times."""

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import pandas as pd
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_datetime, to_seconds
from appa_lite.observations.network import Network, error_table, scatter, table_of


@final
class Stations(Network):
    """The same places at regular times, every variable at every place.

    Args:
        error_std: one number, or one per variable, in the variable's units.
        variables: names; None for every variable.
        positions: coordinates of each station in the grid's order, (y, x), (latitude, longitude) or (x,); or
        number: stations placed at random in distinct cells.
        every: seconds between reports; None for every frame.
        name: what stations are called (name and number) and their ``type``.
    """

    def __init__(
        self, error_std: float | Mapping[str, float], variables: Sequence[str] | None = None,
        positions: Sequence[Sequence[float]] | None = None, number: int | None = None, every: float | None = None,
        name: str = "station",
    ):  # fmt: skip
        if (number is None) == (positions is None):
            raise UserError(f"{name}: give either number or positions, not both or neither")
        if every is not None and not every > 0:
            raise UserError(f"{name}: every must be a positive number of seconds, got {every}")
        self.error_std, self.variables, self.positions = error_std, variables, positions
        self.number, self.every, self.name = number, every, name

    def draw(self, spec: FieldSpec, times: np.ndarray, generator: torch.Generator) -> pd.DataFrame:
        y, x = scatter(spec, self.number, generator, on_grid=False) if self.positions is None else self._positions(spec)
        reports = np.asarray(times, dtype="datetime64[ns]")
        if self.every is not None:
            start, stop = to_seconds(reports[[0, -1]])
            reports = to_datetime(start + self.every * np.arange(np.floor((stop - start) / self.every + 1e-9) + 1))
        stations = np.array([f"{self.name} {i}" for i in range(len(x))])
        count, repeats = len(x), len(reports)
        tables = [
            table_of(spec, np.repeat(reports, count), np.tile(y, repeats), np.tile(x, repeats), v, e, self.name, np.tile(stations, repeats))
            for v, e in error_table(spec, self.variables, self.error_std).items()
        ]
        return pd.concat(tables, ignore_index=True)

    def _positions(self, spec: FieldSpec) -> tuple[np.ndarray, np.ndarray]:
        dims = spec.grid.dims
        if any(len(p) != len(dims) for p in self.positions):
            raise UserError(f"{self.name}: each position needs ({', '.join(dims)}), got {list(self.positions[0])}")
        places = np.array([list(p) for p in self.positions], dtype=np.float64)
        return (places[:, 0] if len(dims) == 2 else np.full(len(places), spec.grid.y[0])), places[:, -1]
