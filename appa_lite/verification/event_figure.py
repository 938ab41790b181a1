"""An event as a picture: how far beyond the threshold its members lie, and what they look like."""

import io
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MEMBERS = 4  #: drawn one by one
LAYOUT = [["histogram", "member 0", "member 1", "mean"], ["histogram", "member 2", "member 3", "mean"]]


def event_figure(
    values: np.ndarray,
    threshold: float,
    fields: np.ndarray,
    name: str,
    units: str,
    label: str,
    title: str,
    density: Callable[[np.ndarray], np.ndarray] | None = None,
) -> bytes:
    """PNG: a histogram of the event's functional, the first four members, and the mean of all.

    Args:
        values: the functional S of the members (M,); threshold: s, in its units; fields: of one variable (M, H, W), a line
            where H is 1; name, units: of the variable; label: of S; title: of the picture;
        density: p(S | event) at values (n,), where it is known.
    """
    figure = Figure(figsize=(11.0, 4.0), dpi=100)
    figure.set_layout_engine("constrained")
    axes = figure.subplot_mosaic(LAYOUT, width_ratios=[1.5, 1, 1, 1.6])
    _histogram(axes["histogram"], values, threshold, label, density)
    low, high = float(fields[:MEMBERS].min()), float(fields[:MEMBERS].max())
    shown = [axes[f"member {number}"] for number in range(MEMBERS)]
    for number, axis in enumerate(shown):
        if number < len(fields):
            image = _field(axis, fields[number], low, high, f"member {number}")
        else:
            axis.set_axis_off()
    mean = fields.mean(0)
    average = _field(axes["mean"], mean, *((low, high) if image is None else (float(mean.min()), float(mean.max()))), "")
    axes["mean"].set_title(f"mean of {len(fields)}", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=shown, label=f"{name} ({units})", shrink=0.8)
        figure.colorbar(average, ax=axes["mean"], shrink=0.8)
    else:
        axes["mean"].set_ylabel(f"{name} ({units})")
    figure.suptitle(title, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _histogram(axis: Axes, values: np.ndarray, threshold: float, label: str, density: Callable[[np.ndarray], np.ndarray] | None) -> None:
    edges = np.linspace(*sorted((threshold, float(values[np.abs(values - threshold).argmax()]))), max(6, round(2 * len(values) ** 0.4)) + 1)
    axis.hist(values, edges, density=True, color="C0", alpha=0.55, label=f"{len(values)} members")
    if density is not None:
        place = np.linspace(edges[0], edges[-1], 200)
        axis.plot(place, density(place), color="black", linewidth=1.4, label="exact")
    axis.axvline(threshold, color="C3", linewidth=1.2, label="threshold")
    axis.set(xlabel=label, ylabel="density given the event")
    axis.xaxis.label.set_size(8)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(True, color="0.92", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _field(axis: Axes, field: np.ndarray, low: float, high: float, title: str):
    """An image from ``low`` to ``high``, or None and a line where the field has one row."""
    axis.set_title(title, fontsize=8)
    if len(field) == 1:
        axis.plot(field[0], linewidth=1.0)
        axis.set_ylim(low, high)
        return None
    axis.set(xticks=[], yticks=[])
    signed = low < 0 < high
    low, high, colours = (-max(-low, high), max(-low, high), "RdBu_r") if signed else (low, high, "viridis")
    return axis.imshow(field, vmin=low, vmax=high, cmap=colours, origin="lower", interpolation="nearest")
