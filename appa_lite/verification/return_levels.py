"""Return levels of a model's free run beside those of the simulator or of observations: does it have the right tail?"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

from appa_lite.core.errors import UserError
from appa_lite.verification.extreme_values import ParetoTail, fit_series

Row = dict[str, object]


def compare_return_levels(
    model: np.ndarray,
    truth: np.ndarray,
    periods: Sequence[float],
    quantile: float = 0.95,
    run: int | None = None,
    confidence: float = 0.95,
) -> list[Row]:
    """Levels that one event in N values exceeds, of both and their difference; and the tails' shapes.

    Each series has its own threshold, a quantile of its own values, and its exceedances are declustered. Intervals are profile
    likelihoods; that of the difference combines both (Zou and Donner 2008, https://doi.org/10.1002/sim.3095):
    d - sqrt((m - m_low)^2 + (t_high - t)^2) and likewise above.

    Args:
        model, truth: series (time), (run, time) or (run, cell, time) of the same step; runs are independent of each other, the
            cells of a run need not be.
        periods: N, in values of the series.

    Returns:
        Flat records ``quantity, period, system, value, low, high, events, note``: ``quantity`` is ``return_level`` or ``shape``,
        ``system`` is ``model, truth`` or ``difference``; ``note`` names what cannot be claimed.

    Raises:
        UserError: fewer than 30 independent exceedances in either, or a period within the body of the distribution.
    """
    tails = {}
    for name, series in (("model", model), ("truth", truth)):
        try:
            tails[name] = fit_series(series, quantile, run)
        except UserError as error:
            raise UserError(f"return levels of the {name}: {error}") from error
    rows = _shapes(tails, confidence)
    for period in periods:
        levels = {name: tail.profile(1 / period, confidence) for name, tail in tails.items()}
        m, t = levels["model"], levels["truth"]
        low = m.value - t.value - np.hypot(m.value - m.low, t.high - t.value)
        high = m.value - t.value + np.hypot(m.high - m.value, t.value - t.low)
        note = "beyond the longer series" if period > max(tail.size for tail in tails.values()) else ""
        for name, level in levels.items():
            rows.append(_row("return_level", period, name, level.value, level.low, level.high, tails[name].exceedances, level.note or note))
        events = min(tail.exceedances for tail in tails.values())
        verdict = "" if low > 0 or high < 0 else "no difference is shown"
        rows.append(_row("return_level", period, "difference", m.value - t.value, low, high, events, verdict))
    return rows


def _shapes(tails: dict[str, ParetoTail], confidence: float) -> list[Row]:
    z, rows = norm.ppf(0.5 + confidence / 2), []
    for name, tail in tails.items():
        half = z * tail.shape_se
        rows.append(_row("shape", None, name, tail.shape, tail.shape - half, tail.shape + half, tail.exceedances, ""))
    value = tails["model"].shape - tails["truth"].shape
    half = z * np.hypot(tails["model"].shape_se, tails["truth"].shape_se)
    events = min(tail.exceedances for tail in tails.values())
    return [
        *rows,
        _row("shape", None, "difference", value, value - half, value + half, events, "" if abs(value) > half else "no difference is shown"),
    ]


def _row(quantity, period, system, value, low, high, events, note) -> Row:
    numbers = {"value": float(value), "low": float(low), "high": float(high)}
    return {"quantity": quantity, "period": period, "system": system, **numbers, "events": int(events), "note": note}
