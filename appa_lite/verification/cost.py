"""Error against cost: the table and the picture of a benchmark's records."""

import io
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from appa_lite.verification.tables import Record, format_number

METHOD = ("guidance", "sampler", "steps")
SCORES = ("mean_error", "spread_ratio", "spread_ratio_observed", "sliced_wasserstein", "sliced_wasserstein_floor", "chi2_ratio")
COST = ("forwards", "vjps", "solver_iterations", "solver_residual", "seconds")
HEADS = {"mean_error": "mean error", "spread_ratio": "spread", "spread_ratio_observed": "observed", "sliced_wasserstein": "SW"}
HEADS |= {"sliced_wasserstein_floor": "SW floor", "chi2_ratio": "chi2", "mode_weight_error": "mode weights", "solver_residual": "residual"}
PANELS = (
    ("mean_error", "error of the mean\n(posterior standard deviations)"),
    ("spread_error", "|spread ratio - 1|"),
    ("sliced_wasserstein", "sliced Wasserstein distance"),
    ("mode_weight_error", "error of the mode weights\n(total variation)"),
)
SMALLEST = 1e-3  # what is drawn for errors below it
MARKERS = "osD^vP*X<>hp"


def over_problems(records: Sequence[Record]) -> list[Record]:
    """One record per method: the means over problems; nothing for a method that diverged on any of them."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in METHOD), []).append(record)
    out = []
    for group in groups.values():
        numbers = [k for k in group[0] if k in (*SCORES, *COST, "mode_weight_error")]
        means = {k: None if any(r[k] is None for r in group) else sum(r[k] for r in group) / len(group) for k in numbers}
        out.append({key: group[0][key] for key in METHOD} | means | {"remark": next((r["remark"] for r in group if r["remark"]), None)})
    return out


def cost_table(records: Sequence[Record]) -> str:
    """The same for people, one line per record."""
    columns = [k for k in ("forwards", "vjps", *SCORES, "mode_weight_error", "solver_residual", "seconds") if k in records[0]]
    columns = [k for k in columns if any(r[k] is not None for r in records)]
    rows = [[*METHOD, *(HEADS.get(k, k) for k in columns)]]
    for record in records:
        cells = [str(record[key] if record[key] is not None else "-") for key in METHOD]
        rows.append(cells + [_cell(key, record[key]) for key in columns] + ([str(record["remark"])] if record["remark"] else []))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    line = lambda row: "  ".join([*map(str.ljust, row[:2], widths[:2]), *map(str.rjust, row[2 : len(widths)], widths[2:])])  # noqa: E731
    return "\n".join("  ".join([line(row), *row[len(widths) :]]) for row in rows)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in ("forwards", "vjps", "seconds"):
        return f"{value:.0f}"
    return f"{value:.1e}" if key == "solver_residual" else f"{value:.3f}" if abs(value) < 10 else format_number(value)


def cost_figure(records: Sequence[Record], title: str = "") -> bytes:
    """PNG: errors of each method against its passes through the denoiser, forwards and vector-Jacobian products alike.

    A line joins the records of one guidance and sampler, in order of cost; methods that diverged are left out.
    """
    rows = [{**r, "spread_error": abs(r["spread_ratio"] - 1)} for r in records if r["mean_error"] is not None]
    panels = [(key, text) for key, text in PANELS if any(r.get(key) is not None for r in rows)] or list(PANELS[:1])
    figure = Figure(figsize=(0.6 + 3.9 * len(panels), 4.4), dpi=110)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, text) in zip(axes, panels, strict=True):
        _panel(axis, rows, key)
        axis.set(xlabel="denoiser calls per member (forward + VJP)", ylabel=text)
        axis.grid(True, which="both", color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _panel(axis: Axes, rows: Sequence[Record], key: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    if rows:  # whole powers of two and ten, so that there are labels
        cost, value = [r["forwards"] + r["vjps"] for r in rows], [max(r[key], SMALLEST) for r in rows]
        axis.set_xlim(2 ** math.floor(math.log2(min(cost)) - 0.2), 2 ** math.ceil(math.log2(max(cost)) + 0.2))
        axis.set_ylim(0.7 * 10 ** math.floor(math.log10(min(value))), 1.4 * 10 ** math.ceil(math.log10(max(value))))
    for k, method in enumerate(dict.fromkeys((r["guidance"], r["sampler"]) for r in rows)):
        chosen = sorted((r["forwards"] + r["vjps"], max(r[key], SMALLEST)) for r in rows if (r["guidance"], r["sampler"]) == method)
        axis.plot(*zip(*chosen, strict=True), marker=MARKERS[k % len(MARKERS)], markersize=5, linewidth=1.2, label=", ".join(method))
    if key == "sliced_wasserstein" and rows:
        floor = sum(r["sliced_wasserstein_floor"] for r in rows) / len(rows)
        axis.axhline(floor, color="0.4", linewidth=1, linestyle="--")
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axis.annotate("two exact ensembles", (1, floor), fontsize=8, color="0.4", **place)
