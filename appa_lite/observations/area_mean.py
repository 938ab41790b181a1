"""Means over a footprint: what a coarse pixel, a radar bin or a wide beam sees; observing them all is downscaling."""

from typing import final

import numpy as np
import pandas as pd
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid
from appa_lite.observations import cells
from appa_lite.observations.base import WeightedCells


@final
class AreaMeanOperator(WeightedCells):
    """Area-weighted mean of a variable over a box or a disc.

        y = sum_ij a_ij x_ij / sum_ij a_ij,   a_ij = cell weight * share of the cell inside the footprint

    A box takes the share of each cell that it covers, a disc the cells whose centre it holds. Only cells that exist
    count, at the variable's own position on a staggered grid.
    """

    @classmethod
    def locate(
        cls, spec: FieldSpec, times: np.ndarray, table: pd.DataFrame, *, time_interpolation: str = "linear"
    ) -> tuple["AreaMeanOperator", np.ndarray]:
        """The operator of the rows of a table that can be observed, and the status (N,) of every row.

        Args:
            table: as for `PointOperator.locate`, with ``half_width`` (box) or ``radius`` (disc), in coordinate units.

        Raises:
            UserError: a quantity that is not linear, an unknown variable, or a missing coordinate.
        """
        y, x = cells.table_positions(spec.grid, table)
        when = table["time"].to_numpy().astype("datetime64[ns]")
        lower, fraction, known = cells.bracket(spec, times, when, time_interpolation)
        within = cells.inside(spec.grid, *cells.locate_cells(spec.grid, y, x))
        status = np.where(known, np.where(within, cells.USED, cells.OUTSIDE_DOMAIN), cells.OUTSIDE_PERIOD)
        rows = np.flatnonzero(status == cells.USED)
        lower, fraction = lower[rows], fraction[rows]
        places = table.iloc[rows][["variable"]].assign(y=y[rows], x=x[rows], half=_column(table, "half_width")[rows])
        places["radius"] = _column(table, "radius")[rows]
        areas, seen, terms = spec.weights().numpy(), np.ones(len(rows), dtype=bool), []
        for (name, *footprint), at in places.groupby(list(places), dropna=False).indices.items():
            pairs, norm = cells.inputs(spec, name)
            if norm:
                raise UserError(f"the area mean of '{name}' is not linear in the fields: observe it at points")
            parts = []
            for channel, coefficient in pairs:
                share = areas * _footprint(spec.grid, *footprint, spec.variables[channel].shift)
                seen[at] &= share.any()
                index = np.flatnonzero(share)
                weight = coefficient * share.flat[index] / (share.sum() or 1.0)
                parts.append(cells.in_time(spec, channel, lower[at], fraction[at], index[None], weight[None]))
            if seen[at].all():
                terms.append((at, np.concatenate([i for i, _ in parts], axis=1), np.concatenate([w for _, w in parts], axis=1)))
        status[rows[~seen]] = cells.MISSING_CELL
        arguments = cells.collate(spec, terms, lower, fraction, np.zeros(len(rows), bool))
        return cls(**arguments).select(torch.from_numpy(seen)), status


def _column(table: pd.DataFrame, name: str) -> np.ndarray:
    return table[name].to_numpy(np.float64) if name in table else np.full(len(table), np.nan)


def _footprint(grid: Grid, y: float, x: float, half: float, radius: float, shift: tuple[float, float]) -> np.ndarray:
    """Share (H, W) of each cell inside a box of half-width ``half``, or (NaN) a disc of ``radius``."""
    dy, dx = (
        _distance(centres, s, position, wraps)
        for centres, s, position, wraps in zip((grid.y, grid.x), shift, (y, x), grid.periodic, strict=True)
    )
    if not np.isnan(half):
        flat = len(grid.dims) == 1
        return (np.ones(1) if flat else _overlap(dy, half, grid.spacing[0]))[:, None] * _overlap(dx, half, grid.spacing[1])
    return (np.hypot(dy[:, None], dx) <= radius).astype(np.float64)


def _distance(centres: tuple[float, ...], shift: float, position: float, periodic: bool) -> np.ndarray:
    distance = cells.coordinate(centres, np.arange(len(centres)) + shift) - position
    if not periodic:
        return distance
    period = (centres[-1] - centres[0]) / (len(centres) - 1) * len(centres) if len(centres) > 1 else 1.0
    return np.mod(distance + period / 2, period) - period / 2


def _overlap(distance: np.ndarray, half: float, spacing: float) -> np.ndarray:
    """Share of cells [d - spacing/2, d + spacing/2] inside [-half, half]."""
    return np.clip(np.minimum(distance + spacing / 2, half) - np.maximum(distance - spacing / 2, -half), 0, None) / spacing
