"""Reliability diagrams from contingency tables: observed frequencies, what a perfect ensemble of this size would show, and bars."""

import numpy as np
from scipy.stats import binom

CLAIM = 25  #: independent cases times the event's rate below which nothing is claimed of reliability


def expected_frequency(counts: np.ndarray) -> np.ndarray:
    """The frequency of the event where k of n members exceed, for a truth that is exchangeable with the members; NaN if unknown.

    With few members it is not k / n: extreme counts are partly chance (Richardson 2001, https://doi.org/10.1256/smsqj.57714).
    Leaving a member out of every ensemble makes it the truth of a perfect ensemble of n - 1, whose table follows from the
    frequencies h_k of counts alone:

        P(o | j of n - 1) = h_{j+1} (j + 1) / (h_{j+1} (j + 1) + h_j (n - j)),

    read at j / (n - 1) = k / n by linear interpolation.

    Args:
        counts: weights h (n + 1,) of k = 0..n.
    """
    n = len(counts) - 1
    if n < 2:
        return np.arange(n + 1) / max(n, 1)
    j = np.arange(n)
    yes, no = counts[1:] * (j + 1), counts[:-1] * (n - j)
    with np.errstate(divide="ignore", invalid="ignore"):
        frequency = yes / (yes + no)
    known = np.isfinite(frequency)
    return np.interp(np.arange(n + 1) / n, j[known] / (n - 1), frequency[known]) if known.any() else np.full(n + 1, np.nan)


def design_effect(joint: np.ndarray, block: int) -> float:
    """How many times larger the variance of the observed frequencies is than that of as many independent cases, at least one.

    Var(sum_c r_c) over the binomial variance, r_c = sum_k (o_ck - f_k h_ck) the residual of a block of successive cases.

    Args:
        joint: weights per case (cases, 2, n + 1).
        block: cases per block.
    """
    counts, events = joint.sum(1), joint[:, 1]
    total = counts.sum(0)
    frequency = np.divide(events.sum(0), total, out=np.zeros_like(total), where=total > 0)
    residual = (events - frequency * counts).sum(1)
    blocks = np.add.reduceat(residual, np.arange(0, len(residual), max(block, 1)))
    binomial = (total * frequency * (1 - frequency)).sum()
    return float(max((blocks**2).sum() / binomial, 1.0)) if binomial > 0 else 1.0


def reliability(joint: np.ndarray, block: int = 1, confidence: float = 0.9, most: int = 10) -> dict[str, list]:
    """A reliability diagram: ``probability, observed, expected, low, high, share``, lists over at most ``most`` + 1 bins.

    Bars are consistency bars (Broecker and Smith 2007, https://doi.org/10.1175/WAF993.1): where the observed frequency falls
    with the given confidence if the truth is exchangeable with the members; from the binomial law of as many independent
    cases as the design effect leaves.

    Args:
        joint: weights per case (cases, 2, n + 1), or summed over cases (2, n + 1), which then count as independent.
    """
    effect = design_effect(joint, block) if joint.ndim == 3 else 1.0
    joint = joint.sum(0) if joint.ndim == 3 else joint
    n = joint.shape[-1] - 1
    wanted = expected_frequency(joint.sum(0))
    group = np.round(np.arange(n + 1) / max(n, 1) * min(n, most)).astype(int)
    merge = (group == np.arange(group.max() + 1)[:, None]).astype(np.float64)
    counts = merge @ joint.sum(0)
    kept = counts > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = {
            "probability": merge @ (joint.sum(0) * np.arange(n + 1) / max(n, 1)) / counts,
            "observed": merge @ joint[1] / counts,
            "expected": merge @ (joint.sum(0) * np.nan_to_num(wanted)) / counts,
        }
    sizes = np.maximum(np.round(counts / effect), 1)
    tail = (1 - confidence) / 2
    middle = np.clip(np.nan_to_num(columns["expected"]), 0, 1)
    columns |= {"low": binom.ppf(tail, sizes, middle) / sizes, "high": binom.ppf(1 - tail, sizes, middle) / sizes}
    columns["share"] = counts / counts.sum() if counts.sum() > 0 else counts
    return {key: [float(v) for v in values[kept]] for key, values in columns.items()}


def claim(independent_cases: float, rate: float) -> bool:
    """Whether there are the 25 / p independent cases that a statement on the reliability of an event of rate p needs."""
    return bool(independent_cases * rate >= CLAIM)
