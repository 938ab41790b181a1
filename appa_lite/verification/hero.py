"""The one picture that opens the README: truth | observations | reanalysis mean | spread | forecast."""

import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from appa_lite.core.errors import UserError
from appa_lite.verification.figures import Scale, cell_aspect, label, mean_and_spread, near
from appa_lite.verification.grid import grid_dims


def hero(
    reanalysis: xr.Dataset,
    observations: pd.DataFrame,
    truth: xr.Dataset | None = None,
    forecast: xr.Dataset | None = None,
    variables: Sequence[str] | None = None,
    half_window: float = 5.0,
) -> bytes:
    """PNG, one row per variable (at most two), on maps.

    Shown are the forecast's initial time (else the middle of the period), the observations within ``half_window`` days of
    it, and the forecast's mean half-way through.
    """
    dims = grid_dims(reanalysis)
    if len(dims) == 1:
        raise UserError("the picture needs maps: a ring has none, see the report")
    names = list(variables or [str(n) for n in reanalysis.data_vars][:1])[:2]
    unknown = [n for n in names if n not in reanalysis]
    if unknown:
        raise UserError(f"unknown variable {', '.join(unknown)}: the reanalysis has {', '.join(map(str, reanalysis.data_vars))}")
    moment = reanalysis["time"].values[reanalysis.sizes["time"] // 2]
    if forecast is not None and forecast["time"].values[0] in reanalysis["time"].values:
        moment = forecast["time"].values[0]
    if truth is not None and moment not in truth["time"].values:
        truth = None
    figure = Figure(figsize=(3.05 * (3 + (truth is not None) + (forecast is not None)), 0.3 + 3.35 * len(names)), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.04)
    rows = figure.subplots(len(names), 3 + (truth is not None) + (forecast is not None), squeeze=False)
    window = np.timedelta64(int(half_window * 86400), "s")
    for row, (axes, name) in enumerate(zip(rows, names, strict=True)):
        mean, spread = mean_and_spread(reanalysis[name].sel(time=moment))
        panels = [(f"observations, \u00b1{half_window:g} days", near(observations, name, moment, window)), ("reanalysis: mean", mean)]
        panels.append(("reanalysis: spread", spread))
        known = [mean.values]
        if truth is not None:
            panels.insert(0, ("truth", truth[name].sel(time=moment)))
            known.append(panels[0][1].values)
        if forecast is not None:
            panels.append(_ahead(forecast[name].isel(time=0)))
        scale = Scale.of(*known)
        for axis, (title, content) in zip(axes, panels, strict=True):
            _panel(figure, axis, "" if row else title, content, scale, reanalysis[name], "spread" in title)
        axes[0].set_ylabel(label(reanalysis[name]), fontsize=12)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _ahead(forecast: xr.DataArray) -> tuple[str, xr.DataArray]:
    """The mean half-way through a forecast, and its title."""
    state = forecast.sel(prediction_timedelta=forecast["prediction_timedelta"].values[-1] / 2, method="nearest")
    return f"forecast: mean, {float(state['prediction_timedelta'] / np.timedelta64(1, 'D')):.3g} days later", mean_and_spread(state)[0]


def _panel(
    figure: Figure, axis: Axes, title: str, content: xr.DataArray | pd.DataFrame | None, scale: Scale, like: xr.DataArray, spread: bool
) -> None:
    """A map of a field, or of observations coloured by their values."""
    dims = grid_dims(like)
    y, x = (like[d].values for d in dims)
    dy, dx = ((v[-1] - v[0]) / (len(v) - 1) for v in (y, x))
    extent = (x[0] - dx / 2, x[-1] + dx / 2, y[0] - dy / 2, y[-1] + dy / 2)
    aspect = cell_aspect(like) * dx / dy
    axis.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:], aspect=aspect)
    axis.set_title(title, fontsize=12)
    if content is None:
        return
    if spread:
        scale = Scale.of(content.values, spread=True)
    colours = {"vmin": scale.low, "vmax": scale.high, "cmap": scale.colormap}
    if isinstance(content, pd.DataFrame):
        axis.set_facecolor("0.93")
        where = content[dims[1]], content[dims[0]]
        drawn = axis.scatter(*where, c=content["observation"], s=10, linewidths=0.25, edgecolors="0.35", **colours)
        if not len(content):
            axis.text(0.5, 0.5, "not observed", transform=axis.transAxes, ha="center", va="center", color="0.4", fontsize=12)
    else:
        drawn = axis.imshow(content.transpose(*dims).values, origin="lower", extent=extent, interpolation="bilinear", **colours)
        axis.set_aspect(aspect)
    bar = figure.colorbar(drawn, ax=axis, orientation="horizontal", fraction=0.045, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, length=2)
