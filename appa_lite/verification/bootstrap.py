"""Confidence intervals of scores whose cases follow each other in time."""

from functools import lru_cache

import numpy as np


def block_length(series: np.ndarray) -> int:
    """Block length for a mean of n correlated values: (2 rho / (1 - rho^2))^(2/3) n^(1/3), from the lag-one autocorrelation.

    The optimal rate and its constant for an AR(1) process: Carlstein 1986, https://doi.org/10.1214/aos/1176350057. At least
    one, at most a quarter of the series.
    """
    series = np.asarray(series, dtype=np.float64)
    series = series[np.isfinite(series)]
    n = series.size
    anomaly = series - series.mean() if n else series
    power = np.square(anomaly).sum()
    if n < 4 or power == 0:
        return 1
    rho = float(np.clip((anomaly[1:] * anomaly[:-1]).sum() / power + 1 / n, 0.0, 0.97))
    length = np.ceil((2 * rho / (1 - rho**2)) ** (2 / 3) * n ** (1 / 3))
    return int(np.clip(length, 1, max(n // 4, 1)))


@lru_cache(maxsize=16)  # every lead of every variable draws the same
def multiplicities(n: int, block: int, replicates: int, seed: int) -> np.ndarray:
    """How often each of n successive cases is drawn in each replicate (replicates, n), by a moving block bootstrap.

    Blocks wrap around the end, so that every case is drawn equally often (Politis and Romano 1992); the last block is cut
    so that every replicate has n cases.
    """
    generator = np.random.default_rng([seed, n, block])
    starts = generator.integers(0, n, size=(replicates, -(-n // block)))
    drawn = ((starts[:, :, None] + np.arange(block)) % n).reshape(replicates, -1)[:, :n]
    drawn = drawn + n * np.arange(replicates)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=n * replicates).reshape(replicates, n).astype(np.float64)
    counts.flags.writeable = False
    return counts


def interval(replicates: np.ndarray, confidence: float = 0.9) -> tuple[float | None, float | None]:
    """The central interval of bootstrap replicates; (None, None) when there are none."""
    values = np.asarray(replicates, dtype=np.float64)
    values = np.sort(values[np.isfinite(values)])
    if values.size < 20:
        return None, None
    place = (values.size - 1) * (1 - confidence) / 2
    below, part = int(place), place % 1
    low = values[below] + part * (values[below + 1] - values[below])
    high = values[-1 - below] + part * (values[-2 - below] - values[-1 - below])
    return float(low), float(high)


def bootstrap_mean(series: np.ndarray, block: int | None = None, replicates: int = 1000, seed: int = 0, confidence: float = 0.9):
    """(low, high) of the mean of a time series; for two systems give the series of their differences."""
    series = np.asarray(series, dtype=np.float64)
    counts = multiplicities(series.size, block or block_length(series), replicates, seed)
    return interval(counts @ series / series.size, confidence)
