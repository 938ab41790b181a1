"""Tails as pictures and tables: generated quantiles against those of the true law."""

import io
from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

Record = dict[str, object]
COLUMNS = (
    ("shape", 0.99), ("quantile_ratio", 0.99), ("quantile_ratio", 0.999), ("quantile_ratio", 0.9999), ("mass_ratio", 0.99), ("chi", 0.99),
    ("area_mean_ratio", 0.999), ("maximum_ratio", 0.99),
)  # fmt: skip


def tail_table(records: Sequence[Record]) -> str:
    """Means over the seeds, and their range where there are several; the truth in the first line."""
    names = [f"{metric} {100 * level:g}%" for metric, level in COLUMNS]
    width = max(len(n) for n in names) + 2
    lines = [f"{'':14}" + "".join(f"{n:>{width}}" for n in names)]
    first = {(r["metric"], r["level"]): r["truth"] for r in records}
    lines.append(f"{'truth':14}" + "".join(f"{first[c] or float('nan'):>{width}.2f}" for c in COLUMNS))
    for prior in dict.fromkeys(r["prior"] for r in records):
        cells = []
        for metric, level in COLUMNS:
            values = [r["value"] for r in records if (r["prior"], r["metric"], r["level"]) == (prior, metric, level)]
            values = [v for v in values if v is not None] or [float("nan")]
            spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}")
        lines.append(f"{prior:14}" + "".join(f"{c:>{width}}" for c in cells))
    return "\n".join(lines)


def tail_figure(samples: Mapping[str, Tensor], records: Sequence[Record], quantile: Callable[[Tensor], Tensor] | None, title: str) -> bytes:
    """PNG: values against their probability of being exceeded, and quantile ratios by level with one dot a seed."""
    figure = Figure(figsize=(10.5, 4.4), dpi=110)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    p = torch.logspace(-1, -4.5, 40, dtype=torch.float64)
    for name, x in samples.items():
        x = x.sort(descending=True)[0]
        ranks = (p * len(x)).round().long().clamp(1) - 1
        line = {"color": "black", "linewidth": 2.0} if name == "truth" else {"linewidth": 1.2}
        value = quantile(p) if name == "truth" and quantile is not None else x[ranks]
        left.plot(p, value, label=name, **line)
    left.set(xscale="log", yscale="log", xlabel="probability of being exceeded", ylabel="value")
    left.invert_xaxis()
    left.legend(frameon=False, fontsize=8)
    levels = [level for metric, level in COLUMNS if metric == "quantile_ratio"]
    priors = list(dict.fromkeys(r["prior"] for r in records))
    for k, prior in enumerate(priors):
        for i, level in enumerate(levels):
            rows = [
                r for r in records if (r["prior"], r["metric"], r["level"]) == (prior, "quantile_ratio", level) and r["value"] is not None
            ]
            at = i + 0.8 * (k / max(len(priors) - 1, 1) - 0.5)
            right.plot([at] * len(rows), [r["value"] for r in rows], "o", color=f"C{k}", markersize=4, label=prior if i == 0 else None)
    right.axhline(1.0, color="black", linewidth=1)
    right.set_xticks(range(len(levels)), [f"{100 * level:g} %" for level in levels])
    right.set(ylabel="generated / true quantile", ylim=(0.3, 2.0))
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(True, color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()
