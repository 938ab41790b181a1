"""The metrics: functions of mean statistics. All but the Gaussian CRPS take ensembles, most take any forecast."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from appa_lite.verification.base import Metric
from appa_lite.verification.spectra import Spectrum, correlation_length
from appa_lite.verification.statistics import CRPS, AbsoluteError, Error, PredictedSquaredError, Ranks, SquaredError, Variance

Means = Mapping[str, np.ndarray]


class RMSE(Metric):
    """sqrt(mean (f - o)^2) of the ensemble mean."""

    name = "rmse"
    statistics = (SquaredError(),)

    def value(self, means: Means) -> np.ndarray:
        return np.sqrt(means["squared_error"])


class Bias(Metric):
    """mean (f - o)."""

    name = "bias"
    statistics = (Error(),)

    def value(self, means: Means) -> np.ndarray:
        return means["error"]


class MAE(Metric):
    """mean |f - o| of the ensemble mean."""

    name = "mae"
    statistics = (AbsoluteError(),)

    def value(self, means: Means) -> np.ndarray:
        return means["absolute_error"]


class FairCRPS(Metric):
    """The mean CRPS: fair for an ensemble, in closed form for a Gaussian, the absolute error for a single state."""

    name = "crps_fair"

    def __init__(self, seed: int = 0):
        self.statistics = (CRPS(seed),)

    def value(self, means: Means) -> np.ndarray:
        return means["crps"]


class Spread(Metric):
    """sqrt(mean unbiased variance)."""

    name = "spread"
    statistics = (Variance(),)

    def value(self, means: Means) -> np.ndarray:
        return np.sqrt(means["variance"])


class SpreadSkill(Metric):
    """sqrt(mean of ((n + 1) / n s^2 + R)) / RMSE: one for a reliable ensemble, of any size; less is overconfident."""

    name = "spread_skill"
    statistics = (PredictedSquaredError(), SquaredError())

    def value(self, means: Means) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(means["predicted_squared_error"] / means["squared_error"])


class RankShape(Metric):
    """A coefficient of the rank histogram r(xi) ~ 1 + slope P1(xi) + u P2(xi), xi from -1 to 1, r = 1 when it is flat.

    ``rank_slope`` (degree 1): positive when the truth ranks high, so that the forecast is too low. ``rank_u`` (degree 2):
    positive for a U, an overconfident ensemble; the ends exceed the middle by 1.5 u. The contrasts are those of
    Jolliffe and Primo 2008, https://doi.org/10.1175/2007MWR2219.1.
    """

    def __init__(self, degree: int, seed: int = 0):
        self.degree, self.name, self.statistics = degree, {1: "rank_slope", 2: "rank_u"}[degree], (Ranks(seed),)

    def value(self, means: Means) -> np.ndarray:
        bins = means["ranks"].shape[-1]
        if self.degree >= bins:
            return np.full(means["ranks"].shape[:-1], np.nan)
        return means["ranks"] @ _contrasts(bins)[self.degree]


@lru_cache(maxsize=64)
def _contrasts(bins: int) -> np.ndarray:
    """What takes frequencies (bins,) to the coefficients of P0, P1, P2 in least squares, (degrees, bins)."""
    position = (2 * np.arange(bins) + 1) / bins - 1
    return bins * np.linalg.pinv(np.polynomial.legendre.legvander(position, min(2, bins - 1)))


class _Spectral(Metric):
    """A comparison of the members' mean spectrum with the truth's."""

    def __init__(self, periodic: tuple[bool, ...], part: tuple[np.ndarray, ...] = ()):
        self.periodic = periodic
        self.statistics = (Spectrum("members", periodic, part), Spectrum("truth", periodic, part))


class PowerRatio(_Spectral):
    """Power of the members over the truth's in the shorter half of the resolved wavelengths: one for realistic texture."""

    name = "power_ratio_small"

    def value(self, means: Means) -> np.ndarray:
        half = means["spectrum_truth"].shape[-1] // 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return means["spectrum_members"][..., half:].sum(-1) / means["spectrum_truth"][..., half:].sum(-1)


class LogSpectralDistance(_Spectral):
    """sqrt(mean_k (10 log10(E_members(k) / E_truth(k)))^2), in decibels: zero for the truth's spectrum, at every scale alike.

    Gray and Markel 1976, https://doi.org/10.1109/TASSP.1976.1162849. Wavenumbers without power in the truth are left out.
    """

    name = "log_spectral_distance"

    def value(self, means: Means) -> np.ndarray:
        members, truth = means["spectrum_members"], means["spectrum_truth"]
        with np.errstate(divide="ignore", invalid="ignore"):
            decibels = 10 * np.log10(np.where(truth > 1e-14 * truth.max(-1, keepdims=True), members / truth, np.nan))
        known = ~np.isnan(decibels)
        return np.sqrt(np.where(known, np.square(decibels), 0.0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan))


class CorrelationLength(_Spectral):
    """The members' correlation length over the truth's: below one for fields that are too rough, above for too smooth ones."""

    name = "correlation_length_ratio"

    def value(self, means: Means) -> np.ndarray:
        lengths = [correlation_length(means[f"spectrum_{k}"], len(self.periodic)) for k in ("members", "truth")]
        return lengths[0] / lengths[1]


def standard(
    seed: int = 0, ensemble: bool = True, periodic: tuple[bool, ...] | None = None, part: tuple[np.ndarray, ...] = ()
) -> tuple[Metric, ...]:
    """The metrics of ``verify``: those that need members for ensembles only, spectral ones given ``periodic`` (and a ``part``)."""
    metrics = [RMSE(), Bias(), MAE(), FairCRPS(seed), Spread(), SpreadSkill()]
    metrics += [RankShape(1, seed), RankShape(2, seed)] if ensemble else []
    metrics += [kind(periodic, part) for kind in (PowerRatio, LogSpectralDistance, CorrelationLength)] if periodic is not None else []
    return tuple(metrics)
