"""The words everyone uses: Variable, Grid, FieldSpec. FieldSpec is the only door between xarray and tensors.

Tensors of fields have shape ``(..., T, C, H, W)``; a 1-D system is a grid with one row (H = 1).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from appa_lite.core.errors import UserError

FUNCTION = re.compile(r"(abs|square)\((\w+)\)")  # of a variable, known without an entry of its own
GRID_DIMS = (("latitude", "longitude"), ("y", "x"), ("x",))
COORDINATE_ATTRS = {
    "latitude": {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"},
    "longitude": {"standard_name": "longitude", "units": "degrees_east", "axis": "X"},
    "y": {"standard_name": "projection_y_coordinate", "units": "m", "axis": "Y"},
    "x": {"standard_name": "projection_x_coordinate", "units": "m", "axis": "X"},
}


@dataclass(frozen=True)
class Variable:
    """A prognostic variable. ``shift`` is the position (in cells, y then x) of its values relative to the cell
    centres: (0, -0.5) for u on the western faces of an Arakawa C grid."""

    name: str
    units: str = "1"
    standard_name: str = ""
    long_name: str = ""
    shift: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Derived:
    """A quantity computed from the prognostic variables, point by point.

    ``kind='linear'``: sum_i coefficient_i * input_i; ``kind='norm'``: sqrt(sum_i (coefficient_i * input_i)^2),
    such as a wind speed from u and v; ``kind='square'``: sum_i (coefficient_i * input_i)^2. ``abs(name)`` and
    ``square(name)`` of any variable need no entry of their own.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    coefficients: tuple[float, ...]
    units: str = "1"
    standard_name: str = ""
    long_name: str = ""


@dataclass(frozen=True)
class Grid:
    """A rectilinear grid. ``y`` and ``x`` are the coordinates of the rows and columns, ascending; ``periodic`` tells
    whether (rows, columns) wrap around; the period of a periodic axis is its length times its spacing."""

    dims: tuple[str, ...]
    y: tuple[float, ...]
    x: tuple[float, ...]
    periodic: tuple[bool, bool] = (False, False)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.y), len(self.x)

    @property
    def spacing(self) -> tuple[float, float]:
        """Distance between rows and between columns (1 where there is only one)."""
        return _spacing(self.y), _spacing(self.x)

    def coords(self) -> dict[str, tuple]:
        """xarray coordinates of the grid, with CF attributes."""
        values = {self.dims[-1]: self.x}
        if len(self.dims) == 2:
            values[self.dims[0]] = self.y
        return {name: (name, np.asarray(v, dtype=np.float64), dict(COORDINATE_ATTRS[name])) for name, v in values.items()}


def _spacing(values: Sequence[float]) -> float:
    return (values[-1] - values[0]) / (len(values) - 1) if len(values) > 1 else 1.0


@dataclass(frozen=True)
class FieldSpec:
    """What a dataset holds: variables, grid, seconds between frames, which cells exist.

    ``mask`` is True where a cell exists (None: everywhere). ``to_dict``/``from_dict`` are JSON-able.
    """

    variables: tuple[Variable, ...]
    grid: Grid
    step: float
    mask: tuple[tuple[bool, ...], ...] | None = None
    derived: tuple[Derived, ...] = field(default=())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(v.name for v in self.variables)

    @property
    def channels(self) -> int:
        return len(self.variables)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one frame."""
        return (self.channels, *self.grid.shape)

    def index(self, name: str) -> int:
        if name not in self.names:
            raise UserError(f"unknown variable '{name}': this data has {', '.join(self.names)}")
        return self.names.index(name)

    def mask_tensor(self) -> Tensor:
        """Bool (H, W), True where a cell exists."""
        if self.mask is None:
            return torch.ones(self.grid.shape, dtype=torch.bool)
        return torch.tensor(self.mask, dtype=torch.bool)

    def weights(self) -> Tensor:
        """Cell weights (H, W), proportional to area, zero outside the mask, mean one over the cells that exist."""
        weights = torch.ones(self.grid.shape, dtype=torch.float64)
        if self.grid.dims[0] == "latitude":
            weights *= torch.cos(torch.deg2rad(torch.tensor(self.grid.y, dtype=torch.float64)))[:, None]
        weights = weights * self.mask_tensor()
        return weights / weights[self.mask_tensor()].mean()

    def evaluate(self, fields: Tensor, name: str) -> Tensor:
        """The variable or derived quantity ``name`` (..., H, W) of fields (..., C, H, W), without moving staggered inputs."""
        if name in self.names:
            return fields[..., self.index(name), :, :]
        quantity = self.quantity(name)
        terms = [c * fields[..., self.index(i), :, :] for i, c in zip(quantity.inputs, quantity.coefficients, strict=True)]
        if quantity.kind == "norm":
            return torch.stack(terms).square().sum(0).clamp(min=1e-12).sqrt()
        if quantity.kind == "square":
            return torch.stack(terms).square().sum(0)
        return torch.stack(terms).sum(0)

    def quantity(self, name: str) -> Variable | Derived:
        """The variable or derived quantity called ``name``, which may be ``abs(VARIABLE)`` or ``square(VARIABLE)``."""
        for entry in (*self.variables, *self.derived):
            if entry.name == name:
                return entry
        inner = FUNCTION.fullmatch(str(name))
        if inner is not None and inner[2] in self.names:
            units = self.variables[self.index(inner[2])].units
            if inner[1] == "abs":
                return Derived(name, "norm", (inner[2],), (1.0,), units)
            return Derived(name, "square", (inner[2],), (1.0,), "1" if units == "1" else f"({units})2")
        known = ", ".join(entry.name for entry in (*self.variables, *self.derived))
        raise UserError(f"unknown variable '{name}': this data has {known}")

    # JSON

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: Mapping) -> "FieldSpec":
        g = d["grid"]
        grid = Grid(tuple(g["dims"]), tuple(map(float, g["y"])), tuple(map(float, g["x"])), tuple(map(bool, g["periodic"])))
        variables = tuple(Variable(**{**v, "shift": tuple(v.get("shift", (0.0, 0.0)))}) for v in d["variables"])
        derived = tuple(
            Derived(**{**q, "inputs": tuple(q["inputs"]), "coefficients": tuple(q["coefficients"])}) for q in d.get("derived", ())
        )
        mask = d.get("mask")
        mask = None if mask is None else tuple(tuple(bool(m) for m in row) for row in mask)
        return cls(variables, grid, float(d["step"]), mask, derived)

    # xarray

    def to_tensor(self, dataset: xr.Dataset, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fields (..., T, C, H, W) of a dataset in this spec's names and grid; cells outside the mask become zero.

        Leading dimensions are those of the dataset other than time and the grid's, in their order
        (``trajectory``, or ``number`` whichever side of ``time`` it stands on).
        """
        missing = [n for n in self.names if n not in dataset]
        if missing:
            raise UserError(f"variables {missing} are missing: the dataset has {list(dataset.data_vars)}")
        arrays = []
        for name in self.names:
            array = dataset[name]
            if "time" not in array.dims:
                array = array.expand_dims("time")
            lead = [d for d in array.dims if d != "time" and d not in self.grid.dims]
            array = array.transpose(*lead, "time", *self.grid.dims)
            values = np.asarray(array.values)
            arrays.append(values[..., None, :] if len(self.grid.dims) == 1 else values)
        if arrays[0].shape[-2:] != self.grid.shape:
            raise UserError(f"the grid is {arrays[0].shape[-2:]}, expected {self.grid.shape}: this data was made for another grid")
        fields = torch.from_numpy(np.stack(arrays, axis=-3)).to(dtype)
        return torch.where(self.mask_tensor(), fields, torch.zeros((), dtype=dtype))

    def values(self, fields: Tensor, name: str) -> np.ndarray:
        """A variable or derived quantity of fields (..., C, H, W) on the grid's own dimensions, NaN outside the mask."""
        values = self.evaluate(fields.detach(), name).cpu()
        values = torch.where(self.mask_tensor(), values, torch.nan).numpy()
        return values[..., 0, :] if len(self.grid.dims) == 1 else values

    def to_dataset(self, fields: Tensor, coords: Mapping[str, object], derived: bool = True) -> xr.Dataset:
        """A CF dataset of fields (..., C, H, W); ``coords`` names the leading dimensions, in order, with their values.

        Cells outside the mask become NaN. With ``derived``, derived quantities are written beside the variables.
        """
        if fields.ndim != len(coords) + 3:
            raise ValueError(f"fields of shape {tuple(fields.shape)} need {fields.ndim - 3} leading coordinates, got {list(coords)}")
        dims = (*coords, *self.grid.dims)
        out = xr.Dataset(coords={**{k: _coordinate(k, v) for k, v in coords.items()}, **self.grid.coords()})
        for entry in (*self.variables, *(self.derived if derived else ())):
            values = self.values(fields, entry.name)
            attrs = {k: getattr(entry, k) for k in ("units", "standard_name", "long_name") if getattr(entry, k)}
            shift = getattr(entry, "shift", (0.0, 0.0))
            if any(shift):
                attrs["grid_shift"] = list(shift)
            out[entry.name] = (dims, values, attrs)
        return out


def _coordinate(name: str, values: object) -> tuple:
    attrs = {
        "number": {"standard_name": "realization", "units": "1", "axis": "E"},
        "time": {"standard_name": "time", "axis": "T"},
        "prediction_timedelta": {"standard_name": "forecast_period"},
    }.get(name, {})
    return (name, np.asarray(values), attrs)


def to_seconds(times: np.ndarray) -> np.ndarray:
    """datetime64 of any resolution to float64 seconds since 1970-01-01."""
    return times.astype("datetime64[ns]").astype(np.int64) / 1e9


def to_datetime(seconds: np.ndarray | Sequence[float]) -> np.ndarray:
    """Seconds since 1970-01-01 to datetime64[ns]."""
    return np.round(np.asarray(seconds, dtype=np.float64) * 1e9).astype(np.int64).astype("datetime64[ns]")
