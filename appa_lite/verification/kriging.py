"""Ordinary kriging of simultaneous station reports: the baseline that any reanalysis of stations has to match."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from appa_lite.core.errors import UserError
from appa_lite.verification.grid import EARTH_RADIUS

LAPSE_RATES = {"t2m": 0.0065, "Tair": 0.0065, "tas": 0.0065, "2m_temperature": 0.0065}  # K per m, standard atmosphere


@dataclass(frozen=True)
class Variogram:
    """gamma(d) = nugget + sill (1 - rho(d / length)), rho exponential or Matern 3/2; lengths in km or the coordinates' unit."""

    sill: float
    length: float
    nugget: float
    kind: str = "exponential"

    def correlation(self, distance: np.ndarray) -> np.ndarray:
        scaled = distance / self.length
        if self.kind == "matern":
            return (1 + np.sqrt(3) * scaled) * np.exp(-np.sqrt(3) * scaled)
        return np.exp(-scaled)


def distances(a: np.ndarray, b: np.ndarray, earth: bool) -> np.ndarray:
    """Distances (M, N) between positions (M, D) and (N, D): great circles in km of (latitude, longitude), else Euclidean."""
    if not earth:
        return cdist(a, b)
    (la, oa), (lb, ob) = np.deg2rad(a).T, np.deg2rad(b).T
    h = np.sin((la[:, None] - lb) / 2) ** 2 + np.cos(la)[:, None] * np.cos(lb) * np.sin((oa[:, None] - ob) / 2) ** 2
    return 2 * EARTH_RADIUS * np.arcsin(np.sqrt(np.clip(h, 0, 1)))


def fit_variogram(positions: np.ndarray, reports: np.ndarray, earth: bool, kind: str = "exponential") -> Variogram:
    """Restricted maximum likelihood over all report times, each with its own unknown mean.

    For the sites S_t that report at t, with C = sill (rho + q I), z_t ~ N(mu_t 1, C): minimise
    sum_t [log|C| + log(1' C^-1 1) + z' P z], P = C^-1 - C^-1 1 (1' C^-1 1)^-1 1' C^-1 over (length, q); the sill is in closed form
    (Stein 1999, Interpolation of Spatial Data, ch. 6).

    Args:
        positions: (S, D); reports: (T, S), NaN where a station did not report.
    """
    distance = distances(positions, positions, earth)
    patterns: dict[bytes, list[np.ndarray]] = {}
    for row in reports:
        patterns.setdefault(np.isfinite(row).tobytes(), []).append(row)
    groups = [(np.frombuffer(key, dtype=bool), np.stack(rows)) for key, rows in patterns.items()]
    groups = [(sites, rows[:, sites]) for sites, rows in groups if sites.sum() >= 3]
    if not groups:
        raise UserError("kriging needs at least three stations that report at the same time")

    def terms(parameters: np.ndarray) -> tuple[float, float]:
        unit, logdet, quadratic, count = Variogram(1.0, float(np.exp(parameters[0])), 0.0, kind), 0.0, 0.0, 0
        for sites, rows in groups:
            c = unit.correlation(distance[np.ix_(sites, sites)]) + (np.exp(parameters[1]) + 1e-9) * np.eye(int(sites.sum()))
            inverse = np.linalg.inv(c)
            one = inverse.sum(0)
            projected = inverse - np.outer(one, one) / one.sum()
            logdet += len(rows) * (np.linalg.slogdet(c)[1] + np.log(one.sum()))
            quadratic += np.einsum("ti,ij,tj->", rows, projected, rows)
            count += rows.size - len(rows)
        return 0.5 * (logdet + count * np.log(quadratic / count)), quadratic / count

    reach = float(np.median(distance[distance > 0]))
    starts = [(np.log(reach * f), np.log(q)) for f in (0.5, 3.0) for q in (0.05, 0.5)]
    bounds = [(np.log(reach / 20), np.log(reach * 50)), (np.log(1e-6), np.log(50.0))]
    best = min((minimize(lambda p: terms(p)[0], s, method="Nelder-Mead", bounds=bounds) for s in starts), key=lambda r: r.fun)
    sill = terms(best.x)[1]
    return Variogram(sill, float(np.exp(best.x[0])), sill * float(np.exp(best.x[1])), kind)


def krige(
    variogram: Variogram, positions: np.ndarray, values: np.ndarray, targets: np.ndarray, earth: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (M,) of new reports at targets (M, D), from values (S,) at positions (S, D); the mean is unknown.

    Weights [w; mu] = [[C, 1], [1', 0]]^-1 [c; 1], mean w'z, variance sill + nugget - w'c - mu (Cressie 1993, section 3.2). The
    nugget belongs to reports: off the stations it is part of the variance, at one of them the report is reproduced.
    """
    size = len(values)
    system = np.ones((size + 1, size + 1))
    system[:size, :size] = variogram.sill * variogram.correlation(distances(positions, positions, earth)) + variogram.nugget * np.eye(size)
    system[size, size] = 0.0
    apart = distances(positions, targets, earth)
    right = np.ones((size + 1, len(targets)))
    right[:size] = variogram.sill * variogram.correlation(apart) + variogram.nugget * (apart < 1e-9)
    weights = np.linalg.solve(system, right)
    spread = variogram.sill + variogram.nugget - (weights * right).sum(0)
    return weights[:size].T @ values, np.maximum(spread, 0.0)


def krige_table(
    source: pd.DataFrame,
    targets: pd.DataFrame,
    dims: tuple[str, ...],
    lapse: dict[str, float] | None = None,
    fit: pd.DataFrame | None = None,
) -> np.ndarray:
    """Mean and standard deviation (M, 2) of every target row, from the source's reports of that variable and time.

    Stations that appear among the targets are never used. Where both tables have ``elev``, temperatures are reduced to sea
    level by the lapse rate and brought back to the target's height. Rows without three simultaneous reports are NaN.

    Args:
        source, targets: tidy observation tables; ``fit`` is the table the variogram is fitted on (default: the source).
        lapse: lapse rate per variable, units per metre (default ``LAPSE_RATES``).
    """
    out = np.full((len(targets), 2), np.nan)
    lapse = LAPSE_RATES if lapse is None else lapse
    earth = "latitude" in dims
    for name, wanted in targets.groupby("variable"):
        rate = lapse.get(name, 0.0) if all("elev" in t for t in (source, targets)) else 0.0
        given = _reports(source, name, targets, dims, rate)
        trained = given if fit is None else _reports(fit, name, targets, dims, rate)
        if given is None or trained is None:
            continue
        variogram = fit_variogram(trained[0], trained[1].to_numpy(), earth)
        where, reports = given
        for time, rows in wanted.groupby("time"):
            if time not in reports.index:
                continue
            values = reports.loc[time].to_numpy()
            known = np.isfinite(values)
            if known.sum() >= 3:
                mean, var = krige(variogram, where[known], values[known], rows[list(dims)].to_numpy(dtype=float), earth)
                drop = rate * np.nan_to_num(rows["elev"].to_numpy(dtype=float)) if rate else 0.0
                out[targets.index.get_indexer(rows.index)] = np.stack([mean - drop, np.sqrt(var)], axis=-1)
    return out


def _reports(table: pd.DataFrame, name: str, targets: pd.DataFrame, dims: tuple[str, ...], rate: float):
    """Positions (S, D) and reports, a frame (T, S), of one variable, reduced to sea level; None when there are too few stations."""
    rows = table[table["variable"] == name]
    if "station" in rows and "station" in targets:
        rows = rows[~rows["station"].isin(targets["station"].unique())]
    places = list(zip(*(rows[d].astype(float) for d in dims), strict=True))
    rows = rows.assign(place=pd.Series(places, index=rows.index, dtype=object))
    if rows["place"].nunique() < 3:
        return None
    value = rows["observation"].astype(float)
    rows = rows.assign(value=value + rate * rows["elev"].astype(float).fillna(0.0) if rate else value)
    sites = sorted(rows["place"].unique())
    codes = {place: k for k, place in enumerate(sites)}
    frame = rows.assign(site=[codes[p] for p in rows["place"]]).pivot_table(index="time", columns="site", values="value", aggfunc="mean")
    return np.array(sites), frame.reindex(columns=range(len(sites)))
