"""Values at points: bilinear in space, linear in time."""

from typing import final

import numpy as np
import pandas as pd
import torch

from appa_lite.core.fields import FieldSpec
from appa_lite.observations import cells
from appa_lite.observations.base import WeightedCells


@final
class PointOperator(WeightedCells):
    """Fields interpolated to positions and times that need not be on the grid nor on frames.

        y = sum_t sum_ij w_t w_ij x[t, c, i, j]

    Bilinear in space at each variable's own position on a staggered grid, around periodic axes, over the cells that
    exist; linear (or nearest) in time. Linear derived quantities add their inputs, norms take the root of their squares.
    """

    @classmethod
    def locate(
        cls, spec: FieldSpec, times: np.ndarray, table: pd.DataFrame, *, time_interpolation: str = "linear", reach: float = 1.5
    ) -> tuple["PointOperator", np.ndarray]:
        """The operator of the rows of a table that can be observed, and why the others cannot.

        Args:
            times: (T,) datetime64 of the frames.
            table: N rows with ``time``, the grid's coordinates and ``variable`` (a name of the spec).
            time_interpolation: ``linear`` or ``nearest``.
            reach: cells; how far the nearest existing cell may be where all four corners are missing.

        Returns:
            The operator, with the rows of status 0 in the table's order, and the status (N,) of every row
            (`cells.USED`, `OUTSIDE_PERIOD`, `OUTSIDE_DOMAIN`, `MISSING_CELL`).

        Raises:
            UserError: unknown variable or interpolation, or a missing coordinate.
        """
        y, x = cells.locate_cells(spec.grid, *cells.table_positions(spec.grid, table))
        when = table["time"].to_numpy().astype("datetime64[ns]")
        lower, fraction, known = cells.bracket(spec, times, when, time_interpolation)
        within = cells.inside(spec.grid, y, x)
        status = np.where(known, np.where(within, cells.USED, cells.OUTSIDE_DOMAIN), cells.OUTSIDE_PERIOD)
        rows = np.flatnonzero(status == cells.USED)
        y, x, lower, fraction = y[rows], x[rows], lower[rows], fraction[rows]
        names = table["variable"].to_numpy()[rows]
        norm, seen, terms = np.zeros(len(rows), dtype=np.int64), np.ones(len(rows), dtype=bool), []
        for name in pd.unique(names):
            at = np.flatnonzero(names == name)
            pairs, norm[at] = cells.inputs(spec, name)
            parts = []
            for channel, coefficient in pairs:
                index, weight, found = cells.corners(spec, y[at], x[at], spec.variables[channel].shift, reach)
                seen[at] &= found
                parts.append(cells.in_time(spec, channel, lower[at], fraction[at], index, coefficient * weight))
            if norm[at].all():
                terms += [(at, index, weight) for index, weight in parts]
            else:
                terms.append((at, np.concatenate([i for i, _ in parts], axis=1), np.concatenate([w for _, w in parts], axis=1)))
        status[rows[~seen]] = cells.MISSING_CELL
        return cls(**cells.collate(spec, terms, lower, fraction, norm)).select(torch.from_numpy(seen)), status
