"""Which of several fitted tails do observations support: the censored log score, and how many events its verdict rests on."""

from collections.abc import Mapping

import numpy as np

from appa_lite.core.errors import UserError
from appa_lite.verification.bootstrap import block_length, interval, multiplicities
from appa_lite.verification.extreme_values import ParetoTail, decluster
from appa_lite.verification.extremes import FEWEST

Row = dict[str, object]


def censored_log_score(tail: ParetoTail, observed: np.ndarray) -> np.ndarray:
    """-log of the density of what exceeds the threshold, and of the probability of staying below for what does not; NaN stays.

        -1{o > u} log(p g(o - u)) - 1{o <= u} log(1 - p)

    Proper, unlike a score of the exceedances alone (Diks et al. 2011, https://doi.org/10.1016/j.jeconom.2011.04.001). Infinite
    above the end point of a bounded tail.
    """
    excess = np.asarray(observed, dtype=np.float64) - tail.threshold
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = 1 + tail.shape * excess / tail.scale
        power = (1 + 1 / tail.shape) * np.log(np.maximum(inside, 0.0)) if abs(tail.shape) > 1e-9 else excess / tail.scale
        above = np.where(inside > 0, np.log(tail.scale / tail.rate) + power, np.inf)
    return np.where(np.isnan(excess), np.nan, np.where(excess > 0, above, -np.log1p(-tail.rate)))


def score_tails(
    tails: Mapping[str, ParetoTail], observed: np.ndarray, confidence: float = 0.9, replicates: int = 1000, seed: int = 0
) -> list[Row]:
    """Mean censored log score of every tail on observations, and its difference from the first's, by block bootstrap in time.

    Args:
        tails: with one threshold: ``fit_tail(values, threshold)`` of a model's values, of the training data, ...
        observed: series (..., time); values at one time may depend on each other.

    Returns:
        Flat records ``system, metric, value, low, high, events, independent_events``; ``metric`` is ``censored_log_score`` or
        ``censored_log_score_minus_<first>``, negative where the tail is better. Intervals are None under 10 independent events.

    Raises:
        UserError: the tails' thresholds differ.
    """
    first, *_ = tails
    threshold = tails[first].threshold
    if not all(np.isclose(tail.threshold, threshold) for tail in tails.values()):
        raise UserError(
            f"tails are scored above one threshold, found {', '.join(f'{t.threshold:g}' for t in tails.values())}: fit them alike"
        )
    observed = np.asarray(observed, dtype=np.float64)
    observed = observed.reshape(-1, observed.shape[-1])
    events = int((observed > threshold).sum())
    independent = len(decluster(np.nanmax(observed, 0), threshold).peaks)  # whatever the number of cells, an event in time is one
    known = np.isfinite(observed).sum(0).astype(np.float64)
    sums = {name: np.nansum(censored_log_score(tail, observed), 0) for name, tail in tails.items()}
    block = block_length((observed > threshold).mean(0))
    counts = multiplicities(observed.shape[1], block, replicates, seed)
    out = []
    for name, total in sums.items():
        parts = {"censored_log_score": total} | ({f"censored_log_score_minus_{first}": total - sums[first]} if name != first else {})
        for metric, values in parts.items():
            few = independent < FEWEST or not np.isfinite(values).all()
            low, high = (None, None) if few else interval(counts @ values / (counts @ known), confidence)
            row = {"system": name, "metric": metric, "value": float(values.sum() / known.sum()), "low": low, "high": high}
            out.append(row | {"events": events, "independent_events": independent})
    return out
