"""A wide-swath altimeter or imager: every cell centre on both sides of the track, but for a gap at nadir."""

from math import hypot
from typing import final

import numpy as np
import pandas as pd
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.observations.network import Network, error_table, table_of
from appa_lite.observations.tracks import LocalPlane, Orbit


@final
class Swath(Network):
    """Values at the cell centres whose distance across the track lies in [gap, half_width].

    Args:
        variable: what is measured, such as ``ssh``.
        error_std: in its units.
        half_width: metres from the track to the outer edge of the swath.
        gap: metres from the track to the inner edge.
        repeat, every, angle, dropout: as for the nadir altimeter.
    """

    def __init__(
        self, variable: str, error_std: float, half_width: float = 60e3, gap: float = 10e3, repeat: int = 10,
        every: float = 86400.0, angle: float = 25.0, dropout: float = 0.0,
    ):  # fmt: skip
        if not 0 <= gap < half_width:
            raise UserError(f"a swath needs 0 <= gap < half_width in metres, got gap={gap}, half_width={half_width}")
        self.variable, self.error_std, self.half_width, self.gap = variable, error_std, half_width, gap
        self.orbit = Orbit(repeat, every, angle, dropout)

    def draw(self, spec: FieldSpec, times: np.ndarray, generator: torch.Generator) -> pd.DataFrame:
        plane, grid, exists = LocalPlane.of(spec), spec.grid, spec.mask_tensor().numpy()
        error_std = error_table(spec, [self.variable], self.error_std)[self.variable]
        rows, columns = np.nonzero(exists)
        south_north, west_east = np.asarray(grid.y)[rows], np.asarray(grid.x)[columns]
        y, x = plane.positions(south_north, west_east)
        tables = [table_of(spec, np.zeros(0), np.zeros(0), np.zeros(0), self.variable, error_std, "swath", "")]
        for crossing in self.orbit.passes(plane, times, generator):
            away = x - crossing.centre - crossing.slope * y
            if grid.periodic[1]:
                away = np.mod(away + plane.extent[1] / 2, plane.extent[1]) - plane.extent[1] / 2
            across = np.abs(away) / hypot(1, crossing.slope)
            seen = (across >= self.gap) & (across <= self.half_width)
            moment = np.full(int(seen.sum()), crossing.time)
            places = south_north[seen], west_east[seen]
            tables.append(table_of(spec, moment, *places, self.variable, error_std, "swath", f"track {crossing.track}"))
        return pd.concat(tables, ignore_index=True)
