"""Fields to pictures: shared colour scales, and small images for pages."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image, features
from scipy.ndimage import zoom

from appa_lite.verification.grid import NUMBER, grid_dims

DIVERGING, SEQUENTIAL, SPREAD = "RdBu_r", "viridis", "magma"
PIXELS = 168  # along the longer side of a page's image


@dataclass(frozen=True)
class Scale:
    """A colour scale that several pictures share."""

    low: float
    high: float
    colormap: str

    @classmethod
    def of(cls, *fields: np.ndarray, spread: bool = False) -> "Scale":
        """From the bulk of the values; diverging and symmetric where they take both signs, from zero for a spread."""
        values = np.concatenate([np.asarray(f, dtype=np.float64).ravel() for f in fields])
        values = values[np.isfinite(values)]
        if not values.size:
            return cls(0.0, 1.0, SEQUENTIAL)
        low, high = np.percentile(values, [0.5, 99.5])
        if spread:
            return cls(0.0, float(np.percentile(values, 99.8)) or 1.0, SPREAD)
        if low < 0 < high and min(-low, high) > 0.2 * max(-low, high):
            return cls(-float(max(-low, high)), float(max(-low, high)), DIVERGING)
        return cls(float(low), float(high) if high > low else float(low) + 1.0, SEQUENTIAL)

    def colours(self, values: np.ndarray) -> np.ndarray:
        """RGBA (..., 4), uint8; missing values are transparent."""
        unit = (np.nan_to_num(values) - self.low) / (self.high - self.low)
        rgba = colormaps[self.colormap](np.clip(unit, 0, 1), bytes=True)
        rgba[~np.isfinite(values), 3] = 0
        return rgba

    def gradient(self) -> str:
        """A CSS gradient, low to high."""
        return f"linear-gradient(90deg,{','.join(self.hexes(np.linspace(self.low, self.high, 12)))})"

    def hexes(self, values: np.ndarray) -> list[str]:
        """Colours as ``#rrggbb``."""
        return [to_hex(rgba) for rgba in self.colours(values) / 255]


def image(field: np.ndarray, scale: Scale, aspect: float = 1.0, quality: int = 80) -> str:
    """A field (H, W), first row at the bottom, as a data URI of a small picture.

    Args:
        aspect: height of a cell over its width.
    """
    field = np.asarray(field, dtype=np.float64)[::-1]
    missing = ~np.isfinite(field)
    factor = max(PIXELS / max(field.shape[0] * aspect, field.shape[1]), 0.25)
    factors = max(factor * aspect, 1 / field.shape[0]), max(factor, 1 / field.shape[1])
    smooth = zoom(
        np.where(missing, np.nanmean(field) if not missing.all() else 0.0, field), factors, order=1, grid_mode=True, mode="nearest"
    )
    if missing.any():
        smooth[zoom(missing.astype(np.float64), factors, order=1, grid_mode=True, mode="nearest") > 0.5] = np.nan
    picture, file = Image.fromarray(scale.colours(smooth), "RGBA"), io.BytesIO()
    if features.check("webp"):
        picture.save(file, "WEBP", quality=quality, method=4)
        kind = "webp"
    else:
        picture.save(file, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def cell_aspect(array: xr.DataArray) -> float:
    """Height of a grid cell over its width, on the ground."""
    dims = grid_dims(array)
    if len(dims) == 1 or min(array.sizes[d] for d in dims) < 2:
        return 1.0
    height, width = (float(np.ptp(array[d].values)) / (array.sizes[d] - 1) for d in dims)
    if dims[0] == "latitude":
        width *= np.cos(np.deg2rad(float(array["latitude"].mean())))
    return float(np.clip(height / width, 0.2, 5.0))


def label(array: xr.DataArray) -> str:
    """'sea surface height (m)', from the attributes."""
    name = array.attrs.get("long_name") or str(array.name)
    units = array.attrs.get("units", "")
    return f"{name} ({units})" if units not in ("", "1") else str(name)


def mean_and_spread(array: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray | None]:
    """The ensemble's mean and standard deviation (None for a single state)."""
    if array.sizes.get(NUMBER, 1) < 2:
        return (array.isel({NUMBER: 0}) if NUMBER in array.dims else array), None
    return array.mean(NUMBER), array.std(NUMBER, ddof=1)


def near(table: pd.DataFrame, variable: str | None, time: np.datetime64, half_window: np.timedelta64) -> pd.DataFrame:
    """The observations around a time, of one variable or of all."""
    chosen = np.abs(table["time"].to_numpy() - time) <= half_window
    if variable is not None:
        chosen &= (table["variable"] == variable).to_numpy()
    return table[chosen]
