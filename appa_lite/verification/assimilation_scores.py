"""Assimilation methods on the same observations of several truths: scores of every truth, means over truths, differences in pairs."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr
from scipy.stats import t as student

from appa_lite.verification.compare_scores import wins
from appa_lite.verification.tables import Record, duration, format_number
from appa_lite.verification.verify import Verification

CLIMATOLOGY, DIVERGED, RESIDUAL = "climatology", "diverged", "one_step_residual"
BY_TRUTH = ("rmse", "crps_fair", "spread_skill")
COMPARED = ("rmse", "crps_fair")


def climatology_of(fields: xr.Dataset) -> xr.Dataset:
    """``<name>`` and ``<name>_std`` of every cell, over all dimensions that are not of the grid."""
    dims = [d for d in ("trajectory", "time") if d in fields.dims]
    return xr.Dataset(dict(fields.mean(dims)) | {f"{name}_std": array.std(dims) for name, array in fields.items()})


def score_truth(
    verification: Verification,
    analyses: Mapping[str, xr.Dataset | None],
    truth: xr.Dataset,
    climatology: xr.Dataset,
    number: int,
    variables: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Record]:
    """``rmse, crps_fair, spread_skill`` of every method and of the climatology on truth ``number``, and whether it ``diverged``.

    ``diverged`` is one where the RMSE is above the climatology's, or members blew up.

    Args:
        analyses: (time, number, grid) by method; None where members blew up, which leaves scores without a value.
        truth: (time, grid); only its times are scored. climatology: ``<name>`` and ``<name>_std`` of every cell.
    """
    alive = {name: dataset for name, dataset in analyses.items() if dataset is not None}
    systems = alive or {CLIMATOLOGY: _as_gaussian(climatology, truth)}
    found = verification.evaluate(systems, truth, variables=variables, climatology=climatology, seed=seed).records
    records = [{"seed": number} | r for r in found if r["metric"] in BY_TRUTH]
    limits = {r["variable"]: r for r in records if (r["system"], r["metric"]) == (CLIMATOLOGY, "rmse")}
    blank = {"low": None, "high": None, "count": 1}
    for name in analyses:
        for variable, limit in limits.items():
            if name not in alive:
                records += [limit | {"system": name, "metric": m, "value": None} | blank for m in BY_TRUTH]
            rmse = next(r["value"] for r in records if (r["system"], r["variable"], r["metric"]) == (name, variable, "rmse"))
            lost = rmse is None or not rmse < limit["value"]
            records.append(limit | {"system": name, "metric": DIVERGED, "value": float(lost)} | blank)
    return records


def score_forecasts(
    verification: Verification,
    forecasts: Mapping[str, xr.Dataset],
    truth: xr.Dataset,
    climatology: xr.Dataset,
    number: int,
    variables: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Record]:
    """``rmse, crps_fair, spread_skill`` by lead time of forecasts of truth ``number``, of climatology and of persistence.

    Args:
        forecasts: (time, prediction_timedelta, number, grid) by name, from the last analyses of methods.
        truth: (time, grid), with the initial time, at which it is persistence.
    """
    found = verification.evaluate(forecasts, truth, variables=variables, climatology=climatology, seed=seed).records
    return [{"seed": number} | r for r in found if r["metric"] in BY_TRUTH and r["lead_time"]]


def _as_gaussian(climatology: xr.Dataset, truth: xr.Dataset) -> xr.Dataset:
    """The climatology as an analysis at every time of the truth."""
    names = [n for n in truth.data_vars if n in climatology]
    parts = [climatology[names], xr.Dataset({n: climatology[f"{n}_std"] for n in names})]
    joined = xr.concat(parts, xr.DataArray(["mean", "std"], dims="moment", name="moment"))
    return joined.expand_dims(time=truth["time"].values)


def jackknife(function: Callable[[np.ndarray], float], cases: np.ndarray, confidence: float) -> tuple[float, float | None, float | None]:
    """f(cases), and an interval from f without each of the n cases (n, ...): f +- t sqrt((n - 1)/n sum_i (f_-i - mean f_-i)^2).

    Efron and Tibshirani 1993, ch. 11; for a mean it is Student's.
    """
    value, n = function(cases), len(cases)
    if n < 2:
        return value, None, None
    without = np.array([function(np.delete(cases, i, axis=0)) for i in range(n)])
    half = student.ppf(0.5 + confidence / 2, n - 1) * np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    return value, float(value - half), float(value + half)


def _mean(cases: np.ndarray) -> float:
    return float(cases[:, 0].mean())


def _pooled_ratio(cases: np.ndarray) -> float:
    """sqrt(sum of predicted / sum of found squared errors) from columns RMSE and spread over skill."""
    return float(np.sqrt(np.square(cases.prod(1)).sum() / np.square(cases[:, 0]).sum()))


def over_truths(records: Sequence[Record], reference: str, confidence: float = 0.9) -> list[Record]:
    """One table of all truths, ``seed`` None: what ``score_truth`` and ``score_forecasts`` gave for each of them, put together.

    ``rmse`` and ``crps_fair`` are means over truths, ``spread_skill`` is the ratio of their root mean squares, ``diverged`` the
    share of truths. A method that diverged on a truth is not in its mean there: ``count`` says how many are.
    ``<metric>_minus_<reference>`` is the mean difference on the truths that both hold, ``<metric>_wins_<reference>`` 1 or -1
    where its interval excludes zero. Intervals take the truths as independent.
    """
    table = {(*_place(r), r["metric"], r["seed"]): r["value"] for r in records}
    places, seeds = list(dict.fromkeys(map(_place, records))), list(dict.fromkeys(r["seed"] for r in records))

    def cases(place: tuple, *metrics: str, beside: tuple | None = None) -> np.ndarray:
        """(truths, metrics): of a system where it holds, minus those of the one ``beside``."""
        both = (place,) if beside is None else (place, beside)
        kept = [s for s in seeds if not any(table.get((*x, DIVERGED, s)) for x in both)]
        values = [[table.get((*x, m, s)) for m in metrics] for x in both for s in kept]
        values = np.array(values, dtype=np.float64).reshape(len(both), len(kept), len(metrics))
        found = values[0] if beside is None else values[0] - values[1]
        return found[np.isfinite(found).all(1)]

    out: list[Record] = []
    for place in places:
        other = (*place[:2], reference)
        wanted: list[tuple[str, Callable, np.ndarray]] = [(m, _mean, cases(place, m)) for m in COMPARED]
        wanted.append(("spread_skill", _pooled_ratio, cases(place, "rmse", "spread_skill")))
        if place != other and other in places:
            wanted += [(f"{m}_minus_{reference}", _mean, cases(place, m, beside=other)) for m in COMPARED]
        for metric, function, values in wanted:
            value, low, high = jackknife(function, values, confidence) if len(values) else (None, None, None)
            out.append(_record(place, metric, value, low, high, len(values)))
        lost = [table[*place, DIVERGED, s] for s in seeds if (*place, DIVERGED, s) in table]
        if lost:
            out.append(_record(place, DIVERGED, float(np.mean(lost)), None, None, len(lost)))
    return out + wins(out)


def _place(record: Record) -> tuple:
    return record["variable"], record["lead_time"], record["system"]


def _record(place: tuple, metric: str, value: float | None, low: float | None, high: float | None, count: int) -> Record:
    variable, lead, system = place
    named = {"seed": None, "system": system, "variable": variable, "metric": metric, "lead_time": lead}
    return named | {"value": value, "low": low, "high": high, "count": count}


def lookup(records: Sequence[Record]) -> dict[tuple, Record]:
    """Records of all truths by (variable, lead time, system, metric)."""
    return {(*_place(r), r["metric"]): r for r in records if r["seed"] is None}


def groups(records: Sequence[Record]) -> dict[tuple[str, float | None], list[str]]:
    """The systems of every variable and lead time, analyses first."""
    found: dict[tuple, list[str]] = {}
    for variable, lead, system in dict.fromkeys(map(_place, sorted(records, key=lambda r: r["lead_time"] is not None))):
        found.setdefault((variable, lead), []).append(system)
    return found


def summary(records: Sequence[Record]) -> str:
    """A table to read: error, spread over it, truths lost, cost; a block for each variable, and for each lead of forecasts."""
    table = lookup(records)
    rows = [["", "", "RMSE", "fair CRPS", "spread/error", "diverged", "one-step residual", "s/member", "calls"]]
    for (variable, lead), systems in groups(records).items():
        for k, system in enumerate(systems):
            found = [table.get((variable, lead, system, m)) for m in (*BY_TRUTH, DIVERGED, RESIDUAL)]
            lost, first = found[3], found[0]
            cells = ["-" if r is None or r["value"] is None else format_number(r["value"]) for r in found]
            cells[3] = "-" if lost is None else f"{lost['value'] * lost['count']:.0f} of {lost['count']}"
            costs = ["-" if not (first and first.get(c)) else format_number(first[c]) for c in ("seconds_per_member", "network_calls")]
            rows.append([" ".join([variable, duration(lead)]) if k == 0 else "", system, *cells, *costs])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join([f"{row[0]:<{widths[0]}}", f"{row[1]:<{widths[1]}}", *map(str.rjust, row[2:], widths[2:])]) for row in rows)
