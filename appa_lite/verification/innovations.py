"""What an analysis says about itself: innovations of the values it used, and values it never saw.

For a value y = Hx + e, e ~ N(0, R), the ensemble of N members at its place has the mean a and the variance A. Whatever
the prior, if the members are drawn from p(x | y), then

    E[(y - a)^2] = R - A (1 - 1/N),        E[(y - a) (y - c)] = R   for any constant c

(y - a is orthogonal to functions of y but for its own error), so that two ratios are one when prior and errors are right:

    chi_square = sum (y - a)^2 / R  /  sum (1 - A (1 - 1/N) / R)        (Talagrand 1999; Chapnik et al. 2006)
    desroziers = mean of (y - a) (y - c) / R,   c the mean of its kind   (Desroziers et al. 2005)

The first is the sharper one. Error variances multiplied by it, again and again, tend to the most likely ones. The
second is noisy (its relative error is about the ratio of signal to error over the root of the number of values), but
needs no A: where the two differ, the ensemble's spread is wrong rather than R. Values that were withheld are
compared with members that carry noise of their own, x + N(0, R): ranks, CRPS and coverage include the observation error.

All of it follows from sums per kind of observation, which add up over times, files and processes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from appa_lite.verification.grid import NUMBER
from appa_lite.verification.statistics import crps_fair

#: sums over the values used: 1, 1/R, (y - a)/R, (y - a)^2/R, A (1 - 1/N)/R, y, (y - a) y/R
USED = ("rows", "precision", "misfit", "squared_misfit", "spread", "value", "product")
MISFIT = USED.index("misfit")
#: sums over the values withheld: number, CRPS, squared error, the one a perfect ensemble expects
WITHHELD = ("withheld", "crps", "squared_error", "expected_squared_error")
INTERVAL = 0.8  # of the central interval whose coverage is counted


def width(members: int) -> int:
    """Length of the vector of sums: those of ``USED`` and ``WITHHELD``, and the ranks 0 .. members."""
    return len(USED) + len(WITHHELD) + members + 1


def used_sums(values: np.ndarray, ensemble: np.ndarray, variance: np.ndarray, kinds: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Sums (len(names), width) over values (M,) that an analysis used.

    Args:
        values: (M,); ensemble: (N, M), the analysis at them; variance: (M,), R; kinds: (M,), each one of ``names``.
    """
    values, ensemble, variance = (np.asarray(a, dtype=np.float64) for a in (values, ensemble, variance))
    misfit = values - ensemble.mean(0)
    parts = (np.ones_like(misfit), 1 / variance, misfit / variance, misfit**2 / variance)
    parts += (ensemble.var(0) / variance, values, misfit * values / variance)
    out = np.zeros((len(names), width(len(ensemble))))
    np.add.at(out[:, : len(USED)], _index(kinds, names), np.stack(parts, axis=1))
    return out


def withheld_sums(
    values: np.ndarray, ensemble: np.ndarray, variance: np.ndarray, kinds: np.ndarray, names: Sequence[str], rng: np.random.Generator
) -> np.ndarray:
    """Sums (len(names), width) over values (M,) that were withheld; arguments as in ``used_sums``; ``rng`` draws the members' noise."""
    values, ensemble, variance = (np.asarray(a, dtype=np.float64) for a in (values, ensemble, variance))
    n, index = len(ensemble), _index(kinds, names)
    out = np.zeros((len(names), width(n)))
    if not len(values):
        return out
    noisy = ensemble + np.sqrt(variance) * rng.standard_normal(ensemble.shape)
    crps = crps_fair(noisy.T, values) if n > 1 else np.abs(noisy[0] - values)
    expected = variance + (1 + 1 / n) * (ensemble.var(0, ddof=1) if n > 1 else 0.0)
    terms = np.stack([np.ones_like(values), crps, (values - ensemble.mean(0)) ** 2, expected], axis=1)
    start = len(USED)
    np.add.at(out[:, start : start + len(WITHHELD)], index, terms)
    np.add.at(out, (index, start + len(WITHHELD) + (noisy < values).sum(0)), 1.0)
    return out


def _index(kinds: np.ndarray, names: Sequence[str]) -> np.ndarray:
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[kind] for kind in kinds], dtype=np.int64)


def evidence(sums: np.ndarray, names: Sequence[str], members: int) -> list[dict]:
    """One JSON-able record per kind: how many values, and what they say; keys are absent where there is nothing to say it from.

    ``rows, chi_square, desroziers, bias`` (mean misfit, in the units of the variable, weighted by 1/R), ``signal`` (share of
    the values' information that the analysis took up: mean A/R); ``withheld, crps, spread_skill, coverage,
    coverage_expected`` (of the central interval of about 80 %) and ``ranks`` (counts).
    """
    return [_record(name, row, members) for name, row in zip(names, np.asarray(sums), strict=True) if row[0] or row[len(USED)]]


def _record(name: str, row: np.ndarray, members: int) -> dict:
    used, kept = dict(zip(USED, row, strict=False)), dict(zip(WITHHELD, row[len(USED) :], strict=False))
    ranks = row[len(USED) + len(WITHHELD) :]
    out: dict = {"kind": str(name), "rows": int(used["rows"])}
    if used["rows"]:
        freedom = used["rows"] - used["spread"]
        centre = used["value"] / used["rows"]
        out["chi_square"] = used["squared_misfit"] / freedom if members > 1 and freedom > 0 else None
        out["desroziers"] = (used["product"] - centre * used["misfit"]) / used["rows"]
        out["bias"] = used["misfit"] / used["precision"]
        out["signal"] = used["spread"] / used["rows"]
    if kept["withheld"]:
        tail = tail_ranks(members)
        inside = ranks[tail : members + 1 - tail].sum()
        out |= {"withheld": int(kept["withheld"]), "crps": kept["crps"] / kept["withheld"]}
        out["spread_skill"] = float(np.sqrt(kept["expected_squared_error"] / kept["squared_error"])) if kept["squared_error"] > 0 else None
        out |= {"coverage": inside / kept["withheld"], "coverage_expected": (members + 1 - 2 * tail) / (members + 1)}
        out["ranks"] = [int(r) for r in ranks]
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in out.items() if v is not None}


def tail_ranks(members: int) -> int:
    """Ranks left out on either side of the central interval."""
    return max(round((members + 1) * (1 - INTERVAL) / 2), 1) if members > 1 else 0


def effective_members(analysis: xr.Dataset) -> float:
    """How many independent members an ensemble (time, number, grid) is worth, averaged over time.

        N_eff = 1 + (tr G)^2 / tr G^2,      G_ij = sum over cells and variables of the anomalies' products

    with every variable in units of its own spread: the participation ratio of the anomalies (Bretherton et al. 1999;
    Oczkowski et al. 2005). At most N; N when members differ in as many directions as they can; two when all lie on a line.
    Small values mean copies, or a posterior that is itself uncertain in few directions.
    """
    arrays = [a.transpose("time", NUMBER, ...) for a in analysis.data_vars.values() if {"time", NUMBER} <= set(a.dims)]
    found = []
    for t in range(analysis.sizes["time"]):  # one frame in memory at a time
        gram = np.zeros((analysis.sizes[NUMBER],) * 2)
        for array in arrays:
            x = np.nan_to_num(array.isel(time=t).values.reshape(len(gram), -1).astype(np.float64))
            scale = (x**2).sum()
            x = x - x.mean(0)
            total = (x**2).sum()
            if total > 1e-20 * scale:  # not rounding
                gram += x @ x.T / total
        square = (gram**2).sum()
        found.append(1 + (np.trace(gram) ** 2 / square if square > 0 else 0.0))
    return float(np.mean(found))


def summary(records: Sequence[Mapping], effective: float, members: int) -> str:
    """Evidence in two or three lines."""
    used = [r for r in records if r["rows"]]
    lines = []
    if any("chi_square" in r for r in used):
        pairs = ", ".join(f"{r['kind']} {r['chi_square']:.2f} and {r['desroziers']:.2f}" for r in used if "chi_square" in r)
        lines.append(f"chi-square and Desroziers ratio of innovations (one is right): {pairs}")
    kept = [r for r in records if "withheld" in r]
    if kept:
        parts = [f"{r['kind']} {r['coverage']:.2f} of {r['withheld']} (CRPS {r['crps']:.3g})" for r in kept]
        lines.append(f"withheld values inside the central {100 * kept[0]['coverage_expected']:.0f} % interval: {', '.join(parts)}")
    lines.append(f"effective members: {effective:.1f} of {members}")
    return "\n".join(lines)
