"""Line and bar charts as inline SVG: they take the page's colours, fonts and theme, and need no library in the browser."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, HEIGHT = 360, 228
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 10, 42
COLOURS = {  # CSS classes of the page's style sheet
    "truth": "k", "observations": "k", "optimal_interpolation": "c1", "climatology": "c2", "persistence": "c3", "kriging": "c4",
}  # fmt: skip
OTHERS = ("c0", "c5", "c6", "c7")


@dataclass(frozen=True)
class Line:
    """One curve: values NaN are gaps; ``low, high`` a band around it; ``style`` is line, dashed or points."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str = "c0"
    style: str = "line"
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


def colours(systems: Sequence[str]) -> dict[str, str]:
    """A colour class per system: the baselines have theirs, everybody else takes the next."""
    others = [s for s in systems if s not in COLOURS]
    return {s: COLOURS.get(s) or OTHERS[others.index(s) % len(OTHERS)] for s in systems}


class Axis:
    """One axis: ``kind`` is linear, log or time (seconds since 1970)."""

    def __init__(self, values: np.ndarray, kind: str, start: float, stop: float, zero: bool = False):
        values = values[np.isfinite(values) & ((values > 0) | (kind != "log"))]
        self.kind, self.start, self.stop = kind, start, stop
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        if kind == "log":
            low = max(low, high * 1e-7)
        elif kind == "linear":
            low = min(low, 0.0) if zero else low
            margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
            low, high = (low if zero and low == 0 else low - margin), high + margin
        self.low, self.high = low, high if high > low else low + 1.0

    def __call__(self, value: np.ndarray) -> np.ndarray:
        if self.kind == "log":
            share = (np.log(np.maximum(value, self.low)) - np.log(self.low)) / (np.log(self.high) - np.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        if self.kind == "time":
            days = MaxNLocator(4, steps=[1, 2, 5, 10], integer=self.high - self.low > 4 * 86400).tick_values(
                self.low / 86400, self.high / 86400
            )
            shape = "%-d %b" if self.high - self.low > 4 * 86400 else "%-d %b %H:%M"
            found = [(d * 86400, np.datetime64(round(d * 86400), "s").item().strftime(shape)) for d in days]
        elif self.kind == "log":
            decades = self.high / self.low > 30
            values = LogLocator(10, subs=(1.0,) if decades else (1.0, 2.0, 5.0)).tick_values(self.low, self.high)
            found = [(t, _power_of_ten(t) if decades else f"{t:g}") for t in values]
        else:
            found = [(t, f"{t:.6g}") for t in MaxNLocator(5).tick_values(self.low, self.high)]
        inside = self(np.array([t for t, _ in found]))
        low, high = sorted((self.start, self.stop))
        return [entry for entry, place in zip(found, inside, strict=True) if low - 0.5 <= place <= high + 0.5 and self._visible(entry[0])]

    def _visible(self, value: float) -> bool:
        return self.kind != "log" or value >= 0.999 * self.low


def line_chart(
    lines: Sequence[Line], title: str, xlabel: str, ylabel: str, xkind: str = "linear", ykind: str = "linear", zero: bool = False
) -> str:
    """A chart with its legend, as an HTML figure."""
    lines = [
        Line(s.name, *(_array(v) for v in (s.x, s.y)), s.colour, s.style, *(None if v is None else _array(v) for v in (s.low, s.high)))
        for s in lines
    ]
    y = np.concatenate([v for s in lines for v in (s.y, s.low, s.high) if v is not None])
    x_axis = Axis(np.concatenate([s.x for s in lines]), xkind, LEFT, WIDTH - RIGHT)
    y_axis = Axis(y, ykind, HEIGHT - BOTTOM, TOP, zero)
    body = [_frame(x_axis, y_axis, xlabel, ylabel)]
    for s in lines:
        if s.low is not None:
            good = np.isfinite(s.low) & np.isfinite(s.high)
            across = np.concatenate([s.x[good], s.x[good][::-1]])
            edge = _points(x_axis(across), y_axis(np.concatenate([s.low[good], s.high[good][::-1]])))
            body.append(f'<polygon class="band {s.colour}" points="{edge}"/>')
    for s in lines:
        body.append(_curve(s, x_axis, y_axis, ykind))
    legend = "".join(f'<li><i class="{s.colour} {s.style}"></i>{escape(s.name)}</li>' for s in lines if s.name)
    return _figure(title, "".join(body), legend)


def bar_chart(values: Sequence[float], title: str, xlabel: str, ylabel: str, colour: str = "c0", reference: float = 1.0) -> str:
    """Bars from zero with a line at ``reference``."""
    heights = _array(values)
    x_axis = Axis(np.array([0.0, len(heights)]), "time", LEFT, WIDTH - RIGHT)
    y_axis = Axis(np.append(heights, [0.0, reference * 1.5]), "linear", HEIGHT - BOTTOM, TOP, zero=True)
    edges, base = x_axis(np.arange(len(heights) + 1.0)), y_axis(np.zeros(1))[0]
    body = [_frame(None, y_axis, xlabel, ylabel)]
    for left, right, top in zip(edges[:-1], edges[1:], y_axis(heights), strict=True):
        gap = 0.12 * (right - left)
        size = f'width="{right - left - 2 * gap:.1f}" height="{base - top:.1f}"'
        body.append(f'<rect class="bar {colour}" x="{left + gap:.1f}" y="{top:.1f}" {size}/>')
    level = y_axis(np.array([reference]))[0]
    body.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
    return _figure(title, "".join(body), "")


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _power_of_ten(value: float) -> str:
    exponent = round(np.log10(value))
    return f"{value:g}" if -3 < exponent < 4 else "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _curve(line: Line, x_axis: Axis, y_axis: Axis, ykind: str) -> str:
    good = np.isfinite(line.x) & np.isfinite(line.y) & ((line.y > 0) | (ykind != "log"))
    if line.style == "points":
        return "".join(
            f'<circle class="{line.colour}" cx="{a:.1f}" cy="{b:.1f}" r="2"/>'
            for a, b in zip(x_axis(line.x[good]), y_axis(line.y[good]), strict=True)
        )
    parts = [run for run in np.split(np.arange(line.x.size), np.flatnonzero(~good)) if good[run].any()]
    parts = [run[good[run]] for run in parts]
    return "".join(
        f'<polyline class="{line.colour} {line.style}" points="{_points(x_axis(line.x[r]), y_axis(line.y[r]))}"/>' for r in parts
    )


def _frame(x_axis: Axis | None, y_axis: Axis, xlabel: str, ylabel: str) -> str:
    parts = []
    for value, name in y_axis.ticks():
        y = y_axis(np.array([value]))[0]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    for value, name in x_axis.ticks() if x_axis else ():
        x = x_axis(np.array([value]))[0]
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(name)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(xlabel)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="name" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(ylabel)}</text>')
    return "".join(parts)


def _figure(title: str, body: str, legend: str) -> str:
    keys = f"<ul class='legend'>{legend}</ul>" if legend else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>{keys}</figure>'
    )
