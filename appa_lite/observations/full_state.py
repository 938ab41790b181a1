"""Everything at some frames: the operator (a state as an observation) and the network (a perfect coverage)."""

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import pandas as pd
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.observations import cells
from appa_lite.observations.base import WeightedCells
from appa_lite.observations.network import Network, error_table, table_of


@final
class FullStateOperator(WeightedCells):
    """Every existing cell of every variable at the given frames, in the order T, C, H, W: a restriction, A A^T = I."""

    @classmethod
    def at(cls, spec: FieldSpec, frames: Sequence[int]) -> "FullStateOperator":
        """The operator of ``frames``, ascending; M = len(frames) * C * (cells that exist)."""
        size = int(np.prod(spec.shape))
        exists = spec.mask_tensor().flatten().repeat(spec.channels)
        frame = torch.as_tensor(list(frames), dtype=torch.int64)
        index = (frame[:, None] * size + torch.arange(size)[exists]).flatten()
        rows, frame = len(index), frame.repeat_interleave(int(exists.sum()))
        return cls(
            index=index[:, None],
            weight=torch.ones(rows, 1, dtype=torch.float64),
            row=torch.arange(rows),
            norm=torch.zeros(rows, dtype=torch.bool),
            offset=torch.zeros(rows, dtype=torch.float64),
            frame=frame, first=frame, last=frame, frame_size=size,
        )  # fmt: skip


@final
class FullState(Network):
    """Every existing cell of the chosen variables, at their own positions on a staggered grid, at chosen frames.

    Args:
        variables: names; None for every prognostic variable.
        error_std: one number, or one per variable, in the variable's units.
        frames: indices of frames, negative ones from the end; None for every one.
        function: ``abs`` or ``square`` of the variables is what is seen; None: the variables.
    """

    def __init__(
        self, error_std: float | Mapping[str, float], variables: Sequence[str] | None = None, frames: Sequence[int] | None = None,
        function: str | None = None,
    ):  # fmt: skip
        if function not in (None, "abs", "square"):
            raise UserError(f"full_state: function={function}: expected abs, square or null")
        self.error_std, self.variables, self.frames, self.function = error_std, variables, frames, function

    def draw(self, spec: FieldSpec, times: np.ndarray, generator: torch.Generator) -> pd.DataFrame:
        count = len(times)
        frames = range(count) if self.frames is None else [f + count if f < 0 else f for f in self.frames]
        if any(not 0 <= f < count for f in frames):
            raise UserError(f"full_state: frames {list(self.frames)} must lie within the {count} frames of the truth")
        rows, columns = np.nonzero(spec.mask_tensor().numpy())
        tables = []
        for name, error_std in error_table(spec, self.variables, self.error_std).items():
            shift = getattr(spec.quantity(name), "shift", (0.0, 0.0))
            y, x = cells.coordinate(spec.grid.y, rows + shift[0]), cells.coordinate(spec.grid.x, columns + shift[1])
            seen = name if self.function is None else f"{self.function}({name})"
            for frame in frames:
                tables.append(table_of(spec, np.full(len(y), times[frame]), y, x, seen, error_std, "full_state"))
        return pd.concat(tables, ignore_index=True)
