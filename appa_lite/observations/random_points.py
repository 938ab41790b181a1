"""Random points: a new draw of places at each frame and for each variable."""

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import pandas as pd
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.observations.network import Network, error_table, scatter, table_of


@final
class RandomPoints(Network):
    """Values in randomly chosen distinct cells, drawn anew at each frame.

    Args:
        error_std: one number, or one per variable, in the variable's units.
        variables: names; None for every variable.
        number: places per frame and variable; or
        fraction: share of the cells that exist, in (0, 1].
        every: frames between observed frames.
        on_grid: at cell centres; otherwise anywhere in the cell.
    """

    def __init__(
        self, error_std: float | Mapping[str, float], variables: Sequence[str] | None = None, number: int | None = None,
        fraction: float | None = None, every: int = 1, on_grid: bool = True,
    ):  # fmt: skip
        if (number is None) == (fraction is None):
            raise UserError("random_points: give either number or fraction, not both or neither")
        if every < 1:
            raise UserError(f"random_points: every must be at least 1 frame, got {every}")
        self.error_std, self.variables, self.number, self.fraction = error_std, variables, number, fraction
        self.every, self.on_grid = every, on_grid

    def draw(self, spec: FieldSpec, times: np.ndarray, generator: torch.Generator) -> pd.DataFrame:
        existing = int(spec.mask_tensor().sum())
        number = self.number if self.number is not None else max(1, round(self.fraction * existing))
        tables = []
        for time in times[:: self.every]:
            for name, error_std in error_table(spec, self.variables, self.error_std).items():
                y, x = scatter(spec, number, generator, self.on_grid)
                tables.append(table_of(spec, np.full(number, time), y, x, name, error_std, "random_points"))
        return pd.concat(tables, ignore_index=True)
