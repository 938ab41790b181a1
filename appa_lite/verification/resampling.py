"""Scores with intervals, differences and fractions of the way to an oracle, of systems whose cases are resampled together."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from appa_lite.verification.base import Sums
from appa_lite.verification.bootstrap import block_length, interval, multiplicities
from appa_lite.verification.extremes import FEWEST, independent_events
from appa_lite.verification.tables import COLUMNS, Record
from appa_lite.verification.tally import Tally, series

Loss = Callable[[np.ndarray], np.ndarray]


def plain_loss(values: np.ndarray) -> np.ndarray:
    return np.asarray(values)


def log_loss(values: np.ndarray) -> np.ndarray:
    """|log v|, of a ratio that is best at one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(np.log(values))


#: what is smaller for the better of two systems, by the first words of the metric's name
LOSSES: dict[str, Loss] = {
    "rmse": plain_loss, "mae": plain_loss, "crps_fair": plain_loss, "twcrps": plain_loss, "brier": plain_loss,
    "log_spectral_distance": plain_loss, "rev": np.negative, "bias": np.abs, "rank_slope": np.abs, "rank_u": np.abs,
    "spread_skill": log_loss, "power_ratio_small": log_loss, "correlation_length_ratio": log_loss,
}  # fmt: skip
SCORES = ("rmse", "mae", "crps_fair", "twcrps", "brier")  #: of which a fraction of the way from climatology to an oracle makes sense


def kind(metric: str) -> str:
    """The metric without its threshold: ``twcrps`` of ``twcrps_q99``."""
    return metric.rsplit("_q", 1)[0]


@dataclass(frozen=True)
class Estimate:
    """A score, its bootstrap replicates (None: too few cases or events) and the number of values compared."""

    value: float
    drawn: np.ndarray | None
    count: int


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: bootstrap replicates, confidence, cases per block (None: from the autocorrelation), seed."""

    replicates: int = 1000
    confidence: float = 0.9
    block: int | None = None
    seed: int = 0

    def interval(self, drawn: np.ndarray | None) -> tuple[float | None, float | None]:
        return (None, None) if drawn is None else interval(drawn, self.confidence)


class Group:
    """All scores of all systems for one variable at one lead. Every system is resampled alike, so that differences are paired."""

    def __init__(self, tally: Tally, lead: float | None, index: np.ndarray, how: Resampling):
        self.variable, self.lead, self.how = tally.variable, lead, how
        self.estimates: dict[tuple[str, str], Estimate] = {}
        self.events: dict[str, dict[str, tuple[int, int, int]]] = {}
        self.size = len(index)
        counts, block = None, how.block
        for system, statistics in tally.sums.items():
            compared = int(statistics["count"].total.values[index].sum())
            if not compared:
                continue
            if counts is None and len(index) >= 3:
                block = how.block or block_length(series(statistics["squared_error"], index))
                counts = multiplicities(len(index), block, how.replicates, how.seed)
            found = self.events[system] = {}
            for t in tally.thresholds:
                events = statistics[f"events_{t.label}"].total.values[index]
                found[t.label] = int(events.sum()), independent_events(events, block), compared
            means: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
            for metric in tally.metrics[system]:
                for s in metric.statistics:
                    if s.name not in means:
                        means[s.name] = _means(statistics[s.name], index, counts)
                value = metric.value({s.name: means[s.name][0] for s in metric.statistics})
                if np.isfinite(value):
                    few = "_q" in metric.name and found[metric.name.rsplit("_", 1)[1]][1] < FEWEST
                    drawn = None if counts is None or few else metric.value({s.name: means[s.name][1] for s in metric.statistics})
                    self.estimates[system, metric.name] = Estimate(float(value), drawn, compared)

    def record(self, system: str, metric: str, value: float, low: float | None, high: float | None, count: int) -> Record:
        return dict(zip(COLUMNS, (system, self.variable, metric, self.lead, value, low, high, count), strict=True))

    def scores(self) -> list[Record]:
        """Every score; then the events behind those of extremes."""
        out = [self.record(s, m, e.value, *self.how.interval(e.drawn), e.count) for (s, m), e in self.estimates.items()]
        for system, found in self.events.items():
            for label, (events, independent, compared) in found.items():
                out.append(self.record(system, f"events_{label}", events, None, None, compared))
                out.append(self.record(system, f"independent_events_{label}", independent, None, None, self.size))
        return out

    def differences(self, pairs: Iterable[tuple[str, str]], kinds: Iterable[str]) -> list[Record]:
        """``<metric>_minus_<other>``: the loss of one system minus that of another, negative where the first is better."""
        out, kinds = [], set(kinds)
        for one, other in pairs:
            for (system, metric), mine in self.estimates.items():
                theirs = self.estimates.get((other, metric))
                if system != one or theirs is None or kind(metric) not in kinds:
                    continue
                loss, drawn = LOSSES[kind(metric)], None
                if mine.drawn is not None and theirs.drawn is not None:
                    drawn = loss(mine.drawn) - loss(theirs.drawn)
                value = float(loss(mine.value) - loss(theirs.value))
                if drawn is not None and np.isfinite(value):
                    out.append(self.record(one, f"{metric}_minus_{other}", value, *self.how.interval(drawn), self.size))
        return out

    def skills(self, climatology: str, oracle: str, kinds: Iterable[str] = SCORES) -> list[Record]:
        """``<metric>_skill_score``: (S_climatology - S) / (S_climatology - S_oracle), zero for climatology and one for the oracle.

        None where the interval of the denominator includes zero: an oracle that is not better is no goal.
        """
        out, kinds = [], set(kinds)
        for (system, metric), mine in self.estimates.items():
            zero, one = (self.estimates.get((name, metric)) for name in (climatology, oracle))
            if kind(metric) not in kinds or zero is None or one is None or any(e.drawn is None for e in (mine, zero, one)):
                continue
            low, _ = self.how.interval(zero.drawn - one.drawn)
            if low is None or low <= 0:
                continue
            value = (zero.value - mine.value) / (zero.value - one.value)
            with np.errstate(divide="ignore", invalid="ignore"):
                drawn = (zero.drawn - mine.drawn) / (zero.drawn - one.drawn)
            out.append(self.record(system, f"{metric}_skill_score", float(value), *self.how.interval(drawn), self.size))
        return out


def _means(sums: Sums, index: np.ndarray, counts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The mean over cases (..., [bins]) and its replicates, sum_c n_c total_c / sum_c n_c weight_c."""
    total, weight = sums.total.values[index], sums.weight.values[index]
    return _ratio(total.sum(0), weight.sum(0)), None if counts is None else _ratio(counts @ total, counts @ weight)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    below = below[..., None] if np.ndim(above) > np.ndim(below) else below
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below
