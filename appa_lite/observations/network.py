"""Networks: where, when and how well an instrument looks. They draw positions; `observe` makes the values."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.observations import cells


class Network(ABC):
    """An instrument or a set of them."""

    @abstractmethod
    def draw(self, spec: FieldSpec, times: np.ndarray, generator: torch.Generator) -> pd.DataFrame:
        """Positions to observe: ``time``, the grid's coordinates, ``variable``, ``error_std``, ``type``, ``station``.

        Args:
            times: (T,) datetime64 of the frames, the period to observe.
            generator: the only source of chance.
        """


def error_table(spec: FieldSpec, variables: Sequence[str] | None, error_std: float | Mapping[str, float]) -> dict[str, float]:
    """Error standard deviation of each variable, in its units; ``variables`` None means those that have an error, or all.

    Raises:
        UserError: unknown variable, or one without a positive error.
    """
    mapping = isinstance(error_std, Mapping)
    names = list(variables) if variables is not None else list(error_std) if mapping else list(spec.names)
    table = {}
    for name in names:
        spec.quantity(name)
        value = error_std.get(name) if mapping else error_std
        if value is None or not float(value) > 0:
            raise UserError(f"error_std of '{name}' must be a positive number in its units, got {value}")
        table[name] = float(value)
    return table


def table_of(
    spec: FieldSpec, time: np.ndarray, y: np.ndarray, x: np.ndarray, variable: str, error_std: float, kind: str, station: object = ""
) -> pd.DataFrame:
    """A table of positions, (N,) each; ``y`` is ignored on a ring."""
    coordinates = {spec.grid.dims[-1]: x} if len(spec.grid.dims) == 1 else dict(zip(spec.grid.dims, (y, x), strict=True))
    columns = {"time": np.asarray(time, dtype="datetime64[ns]"), **coordinates, "variable": variable, "error_std": error_std}
    return pd.DataFrame({**columns, "type": kind, "station": station})


def uniform(generator: torch.Generator, *shape: int) -> np.ndarray:
    """Uniform draws in [0, 1), float64."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).numpy()


def scatter(spec: FieldSpec, number: int, generator: torch.Generator, on_grid: bool) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (y, x) of ``number`` places in distinct existing cells (anywhere in the cell unless ``on_grid``).

    Raises:
        UserError: more places than cells.
    """
    rows, columns = np.nonzero(spec.mask_tensor().numpy())
    if not 0 < number <= len(rows):
        raise UserError(f"cannot place {number} observations in the {len(rows)} cells that exist")
    chosen = torch.randperm(len(rows), generator=generator)[:number].numpy()
    away = np.zeros((2, number)) if on_grid else uniform(generator, 2, number) - 0.5
    return cells.coordinate(spec.grid.y, rows[chosen] + away[0]), cells.coordinate(spec.grid.x, columns[chosen] + away[1])
