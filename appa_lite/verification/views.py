"""Views: transformations of fields to which every metric applies: means over neighbours, energy, gradients.

A model can look calibrated in every cell and be twice over-dispersed in area means, as its members' errors are correlated
wrongly between cells; scores of views see that. In tables the view is the last word of the variable: ``h_mean5, h_energy``.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import numpy as np
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification.base import ensemble_valid
from appa_lite.verification.grid import GRIDS, MOMENT, area_weights

COVERED = 0.5  #: part of a window's area that must be known
KINETIC = "kinetic_energy"


class View(ABC):
    """A transformation of fields (..., grid), the same for forecast and truth."""

    name: str

    @abstractmethod
    def apply(self, field: xr.DataArray, dims: tuple[str, ...], periodic: tuple[bool, ...]) -> xr.DataArray:
        """The view of a field that may miss cells (NaN)."""

    def suits(self, sizes: Mapping[str, int], dims: tuple[str, ...]) -> bool:
        """Whether the grid is large enough."""
        return True

    def pair(self, forecast: xr.DataArray, truth: xr.DataArray, periodic: tuple[bool, ...]) -> tuple[xr.DataArray, xr.DataArray]:
        """Both, over the cells that both have."""
        dims = plane(truth)
        known = ensemble_valid(forecast) & np.isfinite(truth)
        if not bool(known.all()):
            forecast, truth = forecast.where(known), truth.where(known)
        return self.apply(forecast, dims, periodic), self.apply(truth, dims, periodic)


class Mean(View):
    """Means over windows of k neighbouring sites, or k x k cells: sum w x / sum w over the cells that exist, w their areas.

    Windows overlap: one begins at every cell, across the edge where the grid is periodic and wholly inside where not. Windows
    of which less than half the area exists are left out. Pooled CRPS: Price et al. 2025, https://doi.org/10.1038/s41586-024-08252-9.
    """

    def __init__(self, size: int):
        self.size, self.name = size, f"mean{size}"

    def suits(self, sizes, dims):
        return self.size <= min(n for n in (sizes[d] for d in dims) if n > 1)

    def apply(self, field, dims, periodic):
        field = field.transpose(..., *dims)
        values = field.values.astype(np.float64)
        shape = [field.sizes[d] for d in dims]
        weights = np.broadcast_to(area_weights(field).values.reshape(-1, *[1] * (len(dims) - 1)), shape)
        known = np.isfinite(values)
        always, leading = known.reshape(-1, *shape), tuple(range(values.ndim - len(dims)))
        if (always.all(0) == always.any(0)).all():  # a mask, the same for all
            known = known[(0,) * len(leading)]
        above = self._sum(np.where(known, values, 0.0) * weights, periodic)
        full, below = self._sum(weights, periodic), self._sum(known * weights, periodic)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = above * np.where(below > COVERED * full * (1 - 1e-9), 1 / below, np.nan)
        coords = {n: c for n, c in field.coords.items() if not set(c.dims) & set(dims)}
        if "latitude" in dims and "latitude" in field.coords:  # the middle of the window, for its weight
            size = self.size if field.sizes["latitude"] > 1 else 1
            coords["latitude"] = ("latitude", moving_sum(field["latitude"].values.astype(np.float64), size, -1, periodic[0]) / size)
        return xr.DataArray(means, dims=field.dims, coords=coords, name=field.name, attrs=field.attrs)

    def _sum(self, values: np.ndarray, periodic: tuple[bool, ...]) -> np.ndarray:
        for axis, wraps in zip(range(-len(periodic), 0), periodic, strict=True):
            if values.shape[axis] > 1:
                values = moving_sum(values, self.size, axis, wraps)
        return values


class Energy(View):
    """The energy of the whole field, one number: the area-weighted mean of x^2 over the cells that exist."""

    name = "energy"

    def apply(self, field, dims, periodic):
        square = field.astype(np.float64) ** 2
        return square.weighted(area_weights(field)).mean(dims)


class Gradient(View):
    """Differences between neighbours along every grid dimension, x_{i+1} - x_i, in the variable's units per cell."""

    name = "gradient"

    def suits(self, sizes, dims):
        return any(sizes[d] > 1 for d in dims)

    def apply(self, field, dims, periodic):
        parts = []
        for dim, wraps in zip(dims, periodic, strict=True):
            if field.sizes[dim] > 1:
                after = field.roll({dim: -1}, roll_coords=False) if wraps else field.shift({dim: -1})
                parts.append(after - field)
        return xr.concat(parts, "direction") if len(parts) > 1 else parts[0]


def moving_sum(values: np.ndarray, size: int, axis: int, wraps: bool) -> np.ndarray:
    """Sums over windows of ``size`` along a (negative) axis: one per cell if it wraps around, else one per window that fits.

    By doubling: windows of 1, 2, 4, ... are sums of two shifted ones, and those in the binary digits of ``size`` are joined.
    """

    def part(array: np.ndarray, start: int, count: int) -> np.ndarray:
        return array[(..., slice(start, start + count), *[slice(None)] * (-axis - 1))]

    if wraps and size > 1:
        values = np.concatenate([values, part(values, 0, size - 1)], axis)
    count, width, done, total = values.shape[axis] - size + 1, 1, 0, None
    while True:
        if size & width:
            piece = part(values, done, count)
            total, done = piece if total is None else total + piece, done + width
        if done == size:
            return total
        shorter = values.shape[axis] - width
        values, width = part(values, 0, shorter) + part(values, width, shorter), 2 * width


def plane(array: xr.DataArray | xr.Dataset) -> tuple[str, ...]:
    """The grid's dimensions, rows first; none where it holds a list of observations."""
    return next((dims for dims in GRIDS if all(d in array.dims for d in dims)), ())


def parse(names: Iterable[str]) -> tuple[View, ...]:
    """Views by name: ``mean<k>``, ``energy``, ``gradient``.

    Raises:
        UserError: another name.
    """
    found: list[View] = []
    for name in names:
        size = re.fullmatch(r"mean([1-9]\d*)", str(name))
        if size and int(size[1]) > 1:
            found.append(Mean(int(size[1])))
        elif name in ("energy", "gradient"):
            found.append(Energy() if name == "energy" else Gradient())
        else:
            raise UserError(f"there is no view '{name}': expected mean2, mean5 or any mean<k>, energy, gradient")
    return tuple(found)


def applicable(views: Iterable[View], forecast: xr.DataArray, truth: xr.DataArray) -> list[View]:
    """The views that this pair has: none at observations or of Gaussians, whose cells' covariance is not known."""
    dims = plane(truth)
    return [] if not dims or MOMENT in forecast.dims else [v for v in views if v.suits(truth.sizes, dims)]


def viewed(variable: str) -> tuple[str, str]:
    """A table's variable as (variable, view), the view empty for the field itself."""
    if re.fullmatch(rf"{KINETIC}\w*", variable):
        return variable, "energy"
    found = re.fullmatch(r"(.+)_(mean\d+|energy|gradient|observed|near|beyond)", variable)
    return (found[1], found[2]) if found else (variable, "")


def winds(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Pairs of velocities among variables, ``u<s>, v<s>``, by the name of their energy ``kinetic_energy<s>``."""
    names = list(names)
    return {f"{KINETIC}{n[1:]}": (n, f"v{n[1:]}") for n in names if re.fullmatch(r"u(_?\d*)", n) and f"v{n[1:]}" in names}
