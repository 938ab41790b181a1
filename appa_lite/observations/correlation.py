"""Observation errors that are correlated along a pass, over a swath or in time: R = S C S from what a table says of its rows.

    C_ij = (1 - share) delta_ij + share k(|p_i - p_j| / length) k(|t_i - t_j| / time)

for rows i and j of one group, zero between groups; S holds the stated standard deviations. The kernels k are correlation
functions in any number of dimensions (Rasmussen and Williams 2006, ch. 4.2), distances are those of straight lines, through
the Earth and across rings too, so that every C is positive definite (Gaspari and Cohn 1999, sec. 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from appa_lite.core.blocks import Blocks
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, to_seconds
from appa_lite.observations import cells

EARTH = 6.371e6  # radius, m
FAR = 12.0  # lengths or times beyond which errors count as independent: less than 1e-4 of the variance
LARGEST = 4000  # rows of a block, whose matrix is factorised

KERNELS = {
    "exponential": lambda r: np.exp(-r),
    "soar": lambda r: (1 + r) * np.exp(-r),
    "gaussian": lambda r: np.exp(-(r**2) / 2),
}


@dataclass(frozen=True)
class ErrorCorrelation:
    """How the errors of one type of observation, or of one variable, hang together.

    Args:
        length: m on the Earth, units of the coordinates elsewhere; None: errors at different places are independent.
        time: seconds; None: errors at different times are independent.
        kernel: ``exponential``, ``soar`` (second-order autoregressive: (1 + r) exp(-r)) or ``gaussian`` (exp(-r^2 / 2)).
        share: of the error variance that is correlated, in (0, 1); the rest is independent from row to row.
        by: columns that rows have in common whose errors are correlated; those that a table lacks are passed over.
    """

    length: float | None = None
    time: float | None = None
    kernel: str = "exponential"
    share: float = 0.9
    by: tuple[str, ...] = ("variable", "type", "source", "station")

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise UserError(f"error_correlation: kernel={self.kernel}: expected one of {', '.join(KERNELS)}")
        if not 0 < self.share < 1:
            raise UserError(f"error_correlation: share={self.share} must lie between 0 and 1")
        scales = [s for s in (self.length, self.time) if s is not None]
        if not scales or min(scales) <= 0:
            raise UserError(f"error_correlation needs a length or a time, positive, found {self.length} and {self.time}")

    def blocks(self, table: pd.DataFrame, rows: np.ndarray, where: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(rows (n,), C (n, n)) of those rows of a table that hang together; ``where`` (N, d) are their places in space."""
        kernel, found = KERNELS[self.kernel], []
        seconds = to_seconds(table["time"].to_numpy())
        for members in self._groups(table, rows, where, seconds):
            if len(members) > LARGEST:
                found = f"{len(members)} rows of one group, at most {LARGEST}"
                raise UserError(f"error_correlation: {found}: give a shorter time or more columns in by")
            matrix = np.ones((len(members), len(members)))
            if self.length is not None:
                apart = where[members, None] - where[None, members]
                matrix *= kernel(np.sqrt((apart**2).sum(-1)) / self.length)
            if self.time is not None:
                matrix *= kernel(np.abs(seconds[members, None] - seconds[None, members]) / self.time)
            found.append((members, self.share * matrix + (1 - self.share) * np.eye(len(members))))
        return found

    def _groups(self, table: pd.DataFrame, rows: np.ndarray, where: np.ndarray, seconds: np.ndarray) -> list[np.ndarray]:
        columns = {c: table[c].to_numpy()[rows] for c in self.by if c in table}
        if self.length is None:
            columns |= {f"place {i}": x for i, x in enumerate(where[rows].T)}
        groups = [rows]
        if columns:
            same = pd.DataFrame(columns).groupby(list(columns), dropna=False, sort=False).ngroup().to_numpy()
            groups = [rows[same == g] for g in range(same.max() + 1)]
        found = []
        for group in groups:
            group = group[np.argsort(seconds[group], kind="stable")]
            gaps = np.diff(seconds[group]) > (0.0 if self.time is None else FAR * self.time)
            found += [np.sort(part) for part in np.split(group, np.flatnonzero(gaps) + 1) if len(part) > 1]
        return found


def places(grid: Grid, table: pd.DataFrame) -> np.ndarray:
    """Positions (N, d) of the rows in a space where straight lines measure: the Earth's, a plane, a circle for each periodic axis."""
    y, x = cells.table_positions(grid, table)
    if grid.dims[0] == "latitude":
        latitude, longitude = np.radians(y), np.radians(x)
        axes = np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)
        return EARTH * np.stack(axes, axis=1)
    axes = []
    for position, n, apart, periodic in zip((y, x), grid.shape, grid.spacing, grid.periodic, strict=True):
        radius = n * apart / (2 * np.pi)
        axes += [radius * np.cos(position / radius), radius * np.sin(position / radius)] if periodic else [position]
    return np.stack(axes, axis=1)


def correlate(table: pd.DataFrame, spec: FieldSpec, correlations: Mapping[str, ErrorCorrelation]) -> Blocks | None:
    """C of the rows of a table, by the ``type`` or else the ``variable`` of a row; None where nothing is correlated.

    Args:
        table: M rows of `build_observation`; correlations: {type or variable: its correlation}.
    """
    if not correlations or not len(table):
        return None
    where, found, taken = places(spec.grid, table), [], np.zeros(len(table), bool)
    for name, correlation in correlations.items():
        chosen = np.zeros(len(table), bool)
        for column in ("type", "variable"):
            if column in table and not chosen.any():
                chosen = (table[column].astype(str) == name).to_numpy()
        rows = np.flatnonzero(chosen & ~taken)
        taken[rows] = True
        found += correlation.blocks(table, rows, where) if len(rows) else []
    if not found:
        return None
    return Blocks(tuple(torch.from_numpy(r) for r, _ in found), tuple(torch.from_numpy(m) for _, m in found))
