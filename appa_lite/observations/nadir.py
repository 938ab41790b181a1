"""A nadir altimeter: one value in each cell under the satellite's track."""

from typing import final

import numpy as np
import pandas as pd
import torch

from appa_lite.core.fields import FieldSpec
from appa_lite.observations import cells
from appa_lite.observations.network import Network, error_table, table_of
from appa_lite.observations.tracks import LocalPlane, Orbit


@final
class NadirAltimeter(Network):
    """One value per cell crossed, in the middle of the crossing, along one ground track at a time.

    Args:
        variable: what is measured, such as ``ssh``.
        error_std: in its units.
        repeat: passes before the tracks repeat.
        every: seconds between passes.
        angle: degrees between the tracks and north.
        dropout: share of the passes that are lost, in [0, 1).
    """

    def __init__(
        self, variable: str, error_std: float, repeat: int = 10, every: float = 86400.0, angle: float = 25.0, dropout: float = 0.0
    ):
        self.variable, self.error_std = variable, error_std
        self.orbit = Orbit(repeat, every, angle, dropout)

    def draw(self, spec: FieldSpec, times: np.ndarray, generator: torch.Generator) -> pd.DataFrame:
        plane, grid = LocalPlane.of(spec), spec.grid
        error_std = error_table(spec, [self.variable], self.error_std)[self.variable]
        finest = min(s * m for s, m in zip(grid.spacing, plane.metres, strict=True)) / 16
        along = np.arange(-plane.extent[0] / 2 + finest / 2, plane.extent[0] / 2, finest)
        tables = [table_of(spec, np.zeros(0), np.zeros(0), np.zeros(0), self.variable, error_std, "nadir", "")]
        for crossing in self.orbit.passes(plane, times, generator):
            y, x = plane.coordinates(along, crossing.centre + crossing.slope * along)
            if grid.periodic[1]:
                x = grid.x[0] - grid.spacing[1] / 2 + np.mod(x - grid.x[0] + grid.spacing[1] / 2, grid.spacing[1] * grid.shape[1])
            rows, columns = cells.fractional(grid.y, y), cells.fractional(grid.x, x)
            keep = cells.inside(grid, rows, columns)
            cell = np.clip(np.round(rows), 0, grid.shape[0] - 1) * grid.shape[1] + np.clip(np.round(columns), 0, grid.shape[1] - 1)
            crossed = pd.DataFrame({"cell": cell[keep], "y": y[keep], "x": x[keep]}).groupby("cell", sort=False).mean()
            places = crossed["y"].to_numpy(), crossed["x"].to_numpy()
            moment = np.full(len(crossed), crossing.time)
            tables.append(table_of(spec, moment, *places, self.variable, error_std, "nadir", f"track {crossing.track}"))
        return pd.concat(tables, ignore_index=True)
