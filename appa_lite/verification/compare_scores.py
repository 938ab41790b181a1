"""Several systems on the same cases, side by side: scores, differences, wins, fractions of the way from climatology to an oracle."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from scipy.stats import t as student

from appa_lite.core.errors import UserError
from appa_lite.verification.details import Details
from appa_lite.verification.grid import standardise
from appa_lite.verification.pairs import TruthPairs
from appa_lite.verification.resampling import LOSSES, Group
from appa_lite.verification.tables import Record
from appa_lite.verification.tally import by_start
from appa_lite.verification.verify import Scores, Verification, grouped

VIEWS = ("mean2", "mean5", "mean10", "mean20", "energy", "gradient")
KEYS = ("system", "variable", "metric", "lead_time")


def compare_systems(
    systems: Mapping[str, xr.Dataset],
    truth: xr.Dataset,
    thresholds: xr.Dataset | None = None,
    reference: str | None = None,
    climatology: str = "climatology",
    oracle: str = "oracle",
    scorer: Verification | None = None,
    variables: Sequence[str] | None = None,
    seed: int = 0,
) -> Scores:
    """``records``: tidy, of all systems, ``system, variable, metric, lead_time, value, low, high, count``. ``details``: for figures.

    One for every lead time, and one of all leads together, ``lead_time`` None: what happens within one forecast is one case there.
    Metrics are those of ``Verification`` (fields, then views ``<variable>_mean5, ...``; extremes ``twcrps_q99, brier_q99, rev_q99``
    with ``events_q99`` and ``independent_events_q99``), and from the same resampled start times, so that all is paired:

        <metric>_minus_<reference>   difference of losses, negative where the system is better than the reference
        <metric>_wins_<reference>    1, -1, or 0 where the interval of the difference includes zero
        <metric>_skill_score         (S_climatology - S) / (S_climatology - S_oracle), of proper scores

    The loss of a score that is best at one (spread_skill, power_ratio_small, correlation_length_ratio) is |log value|, that of a
    bias or rank coefficient its magnitude, that of economic value its negative. A skill is given only where the interval of its
    denominator is above zero. With some hundred wins in a table, a few are chance: one in ten at 90 % if all systems are equal.

    Args:
        systems: forecasts (time, prediction_timedelta, [number], grid) by name; scored on the cases that all have. Each start has
            a time of its own: starts from different trajectories are given times far apart.
        truth: (time, grid), or (time, prediction_timedelta, grid) like the forecasts; with a lead of zero persistence is added.
        thresholds: ``climatological_quantiles(training)``; None: no extremes.
        reference: whom every other system is compared with; by default the first.
        climatology, oracle: names of systems at the ends of the scale of skill; without them there is no skill. A climatology
            that is an ensemble of training states has scores of views too, one of mean and standard deviation does not.
        scorer: metrics, views and intervals.

    Raises:
        UserError: nothing in common, or no system of the reference's name.
    """
    scorer = scorer or Verification(views=VIEWS)
    reference = reference or next(iter(systems))
    against = TruthPairs({name: standardise(dataset) for name, dataset in systems.items()}, truth, 0, None)
    if reference not in against.names:
        raise UserError(f"reference={reference} is no system: expected one of {', '.join(against.names)}")
    pairs = [(name, reference) for name in against.names if name != reference]
    records, details = [], Details(against, scorer.block)
    for tally in scorer.tallies(against, against.variables(variables), thresholds, seed, details):
        groups = [(tally, lead, index) for lead, index in grouped(against.cases)]
        if len(groups) > 1:
            whole = by_start(tally, against.cases)
            groups.append((whole, None, np.arange(len(np.unique(against.cases.time)))))
        for part, lead, index in groups:
            group = Group(part, lead, index, scorer.resampling(seed))
            differences = group.differences(pairs, LOSSES)
            records += group.scores() + differences + wins(differences) + group.skills(climatology, oracle)
    return Scores(records, details.to_dict())


def compare_scores(systems: Mapping[str, xr.Dataset], truth: xr.Dataset, thresholds: xr.Dataset | None = None, **choices) -> list[Record]:
    """The tidy table of ``compare_systems(systems, truth, thresholds, ...)``."""
    return compare_systems(systems, truth, thresholds, **choices).records


def wins(differences: Sequence[Record]) -> list[Record]:
    """``<metric>_wins_<other>`` of differences: 1 where the interval is below zero, -1 where it is above, else 0."""
    out = []
    for r in differences:
        if "_minus_" in str(r["metric"]) and r["low"] is not None:
            won = float(r["high"] < 0) - float(r["low"] > 0)
            out.append(r | {"metric": str(r["metric"]).replace("_minus_", "_wins_"), "value": won, "low": None, "high": None})
    return out


def over_seeds(tables: Mapping[int, Sequence[Record]], confidence: float = 0.9) -> list[Record]:
    """One table of several training seeds: the mean of every score, and an interval for start times and seeds together.

        mean +- sqrt(h^2 + (t s)^2 / n)

    h is the mean half width over the n seeds (the cases are the same for all, so it does not shrink), s the standard deviation
    between seeds, t Student's quantile. Two columns more: ``seeds`` n and ``seed_std`` s, null for one seed. Wins are decided anew,
    by these intervals. Records that not all seeds have are left out.
    """
    grouped_records: dict[tuple, list[Record]] = {}
    for records in tables.values():
        for r in records:
            if "_wins_" not in str(r["metric"]):
                grouped_records.setdefault(tuple(r[k] for k in KEYS), []).append(r)
    out = []
    for same in (rows for rows in grouped_records.values() if len(rows) == len(tables)):
        n, first = len(same), same[0]
        values = np.array([r["value"] for r in same], dtype=np.float64)
        spread = float(values.std(ddof=1)) if n > 1 else None
        low = high = None
        if all(r["low"] is not None for r in same):
            between = student.ppf(0.5 + confidence / 2, n - 1) * spread / np.sqrt(n) if n > 1 else 0.0
            halves = [np.mean([abs(r["value"] - r[end]) for r in same]) for end in ("low", "high")]
            low, high = (float(values.mean() + s * np.hypot(h, between)) for s, h in zip((-1, 1), halves, strict=True))
        out.append(first | {"value": float(values.mean()), "low": low, "high": high, "seeds": n, "seed_std": spread})
    return out + wins(out)
