"""A coarse product: means over blocks of cells at every frame, as a low-resolution analysis gives them."""

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import pandas as pd
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.observations import cells
from appa_lite.observations.network import Network, error_table, table_of


@final
class BlockMeans(Network):
    """The mean over each block of ``factor`` x ``factor`` cells: observing them is downscaling.

    Args:
        error_std: one number, or one per variable, in the variable's units.
        factor: cells along each side of a block; blocks that would cross the edge of the domain are left out.
        variables: names; None for every prognostic variable.
        every: frames between observed frames.
    """

    def __init__(self, error_std: float | Mapping[str, float], factor: int, variables: Sequence[str] | None = None, every: int = 1):
        if factor < 1 or every < 1:
            raise UserError(f"block_means: factor and every must be at least 1, got {factor} and {every}")
        self.error_std, self.factor, self.variables, self.every = error_std, factor, variables, every

    def draw(self, spec: FieldSpec, times: np.ndarray, generator: torch.Generator) -> pd.DataFrame:
        grid, half = spec.grid, self.factor / 2
        if max(grid.spacing) > min(s for s, n in zip(grid.spacing, grid.shape, strict=True) if n > 1) * (1 + 1e-6) and len(grid.dims) > 1:
            raise UserError(f"block_means: needs cells as wide as high in coordinates, these are {grid.spacing}")
        if min(n for n in grid.shape if n > 1) < self.factor:
            raise UserError(f"block_means: blocks of {self.factor} cells do not fit in a grid of {grid.shape}")
        middles = [np.arange(half - 0.5, n - half, self.factor) if n > 1 else np.zeros(1) for n in grid.shape]
        rows, columns = (m.ravel() for m in np.meshgrid(*middles, indexing="ij"))
        y, x = cells.coordinate(grid.y, rows), cells.coordinate(grid.x, columns)
        tables = [
            table_of(spec, np.full(len(y), time), y, x, name, error_std, "block_means")
            for time in times[:: self.every]
            for name, error_std in error_table(spec, self.variables, self.error_std).items()
        ]
        return pd.concat(tables, ignore_index=True).assign(half_width=half * grid.spacing[1])
