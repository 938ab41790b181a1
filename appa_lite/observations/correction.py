"""Station corrections and representativeness error, learned from a period in which the gridded truth is known.

    r_st = y_st - A(x)_st = alpha + beta elev_s + u_s + h(t) + e_st,    u_s ~ N(0, sigma_b^2)

with h the harmonics of given periods (a day), which all stations share: what the gridded field does not resolve, such as the
amplitude of the daily cycle near the ground, is alike at all of them.

A station that is assimilated is corrected by its own mean residual, shrunk towards the regression as far as its mean is
uncertain; one that is withheld by the regression alone, which it takes no part in. Source: empirical Bayes estimation of
normal means (Efron and Morris 1973), the variational and adaptive bias corrections of operational systems (Dee 2005).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_seconds

SHORT = 2  # stations (or independent samples) below which a spread cannot be estimated


@dataclass(frozen=True)
class Correction:
    """What was learned about one variable, in its units.

    Args:
        intercept, slope: alpha and beta (per metre); elevation: mean of the stations (m); scatter: sum of (elev - mean)^2 (m^2).
        between: sigma_b, spread of the stations' means about the regression, the sampling error of the means taken off.
        within: standard deviation of a station's residuals about its own correction: representativeness and instrument.
        memory: correlation of successive residuals of a station.
        stations: bias of each station that is assimilated.
        periods: seconds; harmonics: their cosines' and sines' amplitudes, in turn.
    """

    intercept: float
    slope: float
    elevation: float
    scatter: float
    between: float
    within: float
    memory: float
    stations: dict[str, float]
    periods: tuple[float, ...] = ()
    harmonics: tuple[float, ...] = ()

    def cycle(self, time: pd.Series) -> np.ndarray:
        """h(t), (N,)."""
        return _features(time, self.periods) @ np.array(self.harmonics) if self.periods else np.zeros(len(time))

    def regression(self, elevation: np.ndarray) -> np.ndarray:
        """alpha + beta elev, (N,); stations of unknown elevation count as average ones."""
        return self.intercept + self.slope * np.nan_to_num(elevation, nan=self.elevation)

    def error_std(self, elevation: np.ndarray, known: np.ndarray) -> np.ndarray:
        """(N,): ``within`` for stations whose bias is ``known``; else with the predictive spread of the regression."""
        away = np.nan_to_num(elevation, nan=self.elevation) - self.elevation
        leverage = 1 / max(len(self.stations), 1) + (away**2 / self.scatter if self.slope else 0.0)
        return np.where(known, self.within, np.sqrt(self.within**2 + self.between**2 * (1 + leverage)))


def _features(time: pd.Series, periods: Sequence[float]) -> np.ndarray:
    """Cosines and sines (N, 2 P) of the phases of ``periods`` at ``time``."""
    seconds = to_seconds(time.to_numpy())
    return np.stack([f(2 * np.pi * np.mod(seconds, p) / p) for p in periods for f in (np.cos, np.sin)], axis=1)


def station_names(table: pd.DataFrame) -> pd.Series:
    """The station of each row, or its position where the file has no stations."""
    if "station" in table and (table["station"].astype(str) != "").any():
        return table["station"].astype(str)
    places = [c for c in ("latitude", "longitude", "y", "x") if c in table]
    return table[places].round(4).astype(str).agg(" ".join, axis=1)


def fit_corrections(
    table: pd.DataFrame, residual: np.ndarray, withheld: Sequence[str] = (), memory: float = 86400.0, periods: Sequence[float] = ()
) -> dict[str, Correction]:
    """Corrections per variable from the residuals y - A(truth).

    Args:
        table: M rows with ``time, variable``, ``station`` and, for a regression, ``elev`` (m).
        residual: (M,), in the units of the variables.
        withheld: stations that take no part.
        memory: seconds within which residuals of a station count as one sample.
        periods: seconds; of the harmonics that all stations share.

    Raises:
        UserError: a variable that no station but the withheld ones reports.
    """
    data = table[["time", "variable"]].assign(station=station_names(table), residual=np.asarray(residual, dtype=np.float64))
    data["elev"] = table.get("elev", np.nan)
    data["sample"] = data["time"].to_numpy().astype("datetime64[ns]").astype(np.int64) // int(memory * 1e9)
    kept = data[~data["station"].isin(set(map(str, withheld)))]
    lost = sorted(set(data["variable"]) - set(kept["variable"]))
    if lost:
        raise UserError(f"only withheld stations report {', '.join(lost)} in the period: withhold fewer, or take a longer period")
    return {str(name): _fit(rows, tuple(map(float, periods))) for name, rows in kept.groupby("variable")}


def _fit(rows: pd.DataFrame, periods: tuple[float, ...]) -> Correction:
    """The correction of one variable."""
    harmonics: tuple[float, ...] = ()
    if periods:
        features = _features(rows["time"], periods)
        centered = rows["residual"] - rows.groupby("station")["residual"].transform("mean")
        harmonics = tuple(np.linalg.lstsq(features - features.mean(0), centered.to_numpy(), rcond=None)[0].tolist())
        rows = rows.assign(residual=rows["residual"] - features @ np.array(harmonics))
    groups = rows.groupby("station")
    mean, elevation, samples = groups["residual"].mean(), groups["elev"].mean(), groups["sample"].nunique()
    within = float(np.sqrt((rows["residual"] - rows["station"].map(mean)).pow(2).mean()))
    blocks = rows.groupby(["station", "sample"])["residual"].mean()
    sampling = float((blocks - blocks.groupby("station").transform("mean")).pow(2).sum() / max((samples - 1).sum(), 1))  # of one sample
    intercept, slope, scatter = _regression(elevation.to_numpy(), mean.to_numpy())
    center = float(np.nan_to_num(elevation.mean()))
    fitted = intercept + slope * np.nan_to_num(elevation.to_numpy(), nan=center)
    freedom = len(mean) - (2 if slope else 1)
    total = float(((mean - fitted) ** 2).sum() / freedom) if freedom > 0 else float(rows["residual"].var(ddof=0))
    between2 = max(total - float((sampling / samples).mean()), 0.0)
    weight = between2 / (between2 + sampling / samples) if between2 > 0 else 0.0 * samples
    bias = fitted + weight * (mean - fitted)
    left = float(np.sqrt((rows["residual"] - rows["station"].map(bias)).pow(2).mean()))
    ordered = rows.sort_values("time", kind="stable").groupby("station")["residual"]
    anomalies = rows["residual"] - rows["station"].map(mean)
    after = (ordered.shift(-1) - rows["station"].map(mean)).reindex(rows.index)
    lagged = float((anomalies * after).mean() / within**2) if within > 0 and after.notna().any() else 0.0
    stations = {str(k): float(v) for k, v in bias.items()}
    return Correction(intercept, slope, center, scatter, float(np.sqrt(between2)), max(left, 1e-12), lagged, stations, periods, harmonics)


def _regression(elevation: np.ndarray, mean: np.ndarray) -> tuple[float, float, float]:
    """Least squares (intercept, slope, scatter); without three stations of different elevation the slope is zero."""
    known = np.isfinite(elevation)
    if known.sum() <= SHORT or np.ptp(elevation[known]) < 1.0:
        return float(mean.mean()), 0.0, 0.0
    away = elevation[known] - elevation[known].mean()
    slope = float((away * mean[known]).sum() / (away**2).sum())
    center = float(np.nanmean(elevation))
    return float(mean[known].mean() - slope * center), slope, float((away**2).sum())


def apply_corrections(
    table: pd.DataFrame, corrections: dict[str, Correction], withheld: Sequence[str] = (), inflation: dict[str, float] | None = None
) -> pd.DataFrame:
    """The table with ``bias`` and ``error_std`` set; stations that were withheld or never seen take the regression's.

    Args:
        inflation: factor on the error of the stations that are assimilated, per variable: successive errors of a station are
            correlated, which an analysis that takes them for independent pays for with larger ones.
    """
    out = table.copy()
    out["bias"], out["error_std"] = 0.0, out["error_std"].astype(np.float64) if "error_std" in out else np.nan
    names, hidden = station_names(out), set(map(str, withheld))
    elevation = out["elev"].to_numpy(np.float64) if "elev" in out else np.full(len(out), np.nan)
    for variable, correction in corrections.items():
        rows = (out["variable"] == variable).to_numpy()
        own = names[rows].map(correction.stations).to_numpy(np.float64, copy=True)
        own[names[rows].isin(hidden).to_numpy()] = np.nan
        known = np.isfinite(own)
        out.loc[rows, "bias"] = np.where(known, own, correction.regression(elevation[rows])) + correction.cycle(out["time"][rows])
        factor = np.where(names[rows].isin(hidden), 1.0, float((inflation or {}).get(variable, 1.0)))
        out.loc[rows, "error_std"] = correction.error_std(elevation[rows], known) * factor
    return out
