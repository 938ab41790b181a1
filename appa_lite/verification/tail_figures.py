"""Tails as pictures and tables: generated quantiles against those of the true law."""

import io
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

Record = dict[str, object]
#: what the table shows, by the name of the column
COLUMNS = {
    "shape": ("shape", 0.99), "q99": ("quantile_ratio", 0.99), "q999": ("quantile_ratio", 0.999), "q9999": ("quantile_ratio", 0.9999),
    "mass": ("mass_ratio", 0.99), "chi": ("chi", 0.99), "area_q999": ("area_mean_ratio", 0.999), "max_q99": ("maximum_ratio", 0.99),
}  # fmt: skip


def over_seeds(records: Sequence[Record]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """(mean, standard deviation, truth) over the seeds, by prior and column; NaN where a number is missing."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for prior in dict.fromkeys(str(r["prior"]) for r in records):
        for name, column in COLUMNS.items():
            rows = [r for r in records if (r["prior"], r["metric"], r["level"]) == (prior, *column)]
            values, truths = (torch.tensor([float("nan") if r[k] is None else r[k] for r in rows]).double() for k in ("value", "truth"))
            spread = float(values.std()) if len(values) > 1 else float("nan")
            found.setdefault(prior, {})[name] = float(values.mean()), spread, float(truths.mean())
    return found


def tail_table(records: Sequence[Record], bounds: Mapping[str, float]) -> str:
    """Means and standard deviations over the seeds below the truth, and which of the ``bounds`` on their distance each prior keeps.

    Args:
        records: of ``tail_scores`` with ``prior`` and ``seed``; bounds: |mean - truth| by column, as far as any is asked for.
    """
    found = over_seeds(records)
    truth = {name: true for name, (_, _, true) in next(iter(found.values())).items()}
    lines = [f"{'':14}" + "".join(f"{name:>13}" for name in COLUMNS)]
    lines.append(f"{'truth':14}" + "".join(f"{true:>13.2f}" for true in truth.values()))
    for prior, row in found.items():
        cells = [f"{mean:.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}") for mean, spread, _ in row.values()]
        lines.append(f"{prior:14}" + "".join(f"{cell:>13}" for cell in cells))
    asked = ", ".join(f"{name} {truth[name] - by:.2f} to {truth[name] + by:.2f}" for name, by in bounds.items())
    lines += [f"asked: {asked}"] * bool(bounds)
    for prior, row in found.items() if bounds else ():
        missed = [f"{name} ({row[name][0]:.2f})" for name, by in bounds.items() if not abs(row[name][0] - row[name][2]) <= by]
        lines.append(f"{prior:14}" + (f"misses {', '.join(missed)}" if missed else "keeps all"))
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
    levels = [level for metric, level in COLUMNS.values() if metric == "quantile_ratio"]
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
