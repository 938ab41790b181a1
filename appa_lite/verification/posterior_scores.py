"""How far an ensemble is from a posterior that is known exactly. Numbers of one trajectory are n, members N; numpy float64."""

from collections.abc import Callable

import numpy as np

DIRECTIONS = 256


def mean_error(samples: np.ndarray, mean: np.ndarray, std: np.ndarray) -> float:
    """Error of the mean of samples (N, n), in posterior standard deviations: RMS over n, Monte-Carlo noise removed.

        sqrt(max(0, < ((m_N - m) / s)^2 - v_N / (N s^2) >)),    v_N the unbiased variance of the samples

    For an exact ensemble it is zero or, by chance, about (2 / (N^2 n_eff))^{1/4}, n_eff the independent numbers.
    """
    excess = ((samples.mean(0) - mean) ** 2 - samples.var(0, ddof=1) / len(samples)) / std**2
    return float(np.sqrt(max(0.0, excess.mean())))


def spread_ratio(samples: np.ndarray, std: np.ndarray) -> float:
    """RMS over n of the standard deviation of samples (N, n) over the exact one."""
    return float(np.sqrt((samples.var(0, ddof=1) / std**2).mean()))


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, seed: int = 0, directions: int = DIRECTIONS) -> float:
    """Sliced 2-Wasserstein distance of two ensembles (N, n) of equal size (Bonneel et al. 2015).

    The root of the mean, over random directions of length one, of the squared distance of the sorted projections.
    """
    if a.shape != b.shape:
        raise ValueError(f"two ensembles of equal size are needed, found {a.shape} and {b.shape}")
    axes = np.random.default_rng(seed).standard_normal((a.shape[1], directions))
    axes /= np.linalg.norm(axes, axis=0)
    return float(np.sqrt(((np.sort(a @ axes, axis=0) - np.sort(b @ axes, axis=0)) ** 2).mean()))


def chi_square(predictions: np.ndarray, values: np.ndarray, variance: np.ndarray) -> float:
    """Mean over members of sum ((y - A x)^2 / R), for predictions A x (N, M)."""
    return float((((values - predictions) ** 2) / variance).sum(1).mean())


def exact_chi_square(mean: np.ndarray, spread: np.ndarray, values: np.ndarray, variance: np.ndarray) -> float:
    """What ``chi_square`` is expected to be, for the exact mean and variance ``spread`` (M,) of A x given y."""
    return float((((values - mean) ** 2 + spread) / variance).sum())


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the sum of the absolute differences of two probability vectors."""
    return float(np.abs(p - q).sum() / 2)


def gaussian_wasserstein(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """2-Wasserstein distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A^{1/2} B A^{1/2})^{1/2}), its root.

    The last term is computed as the sum of the singular values of A^{1/2} B^{1/2} (Bures distance; Dowson and Landau 1982).
    """
    roots = [_root(c) for c in (cov_a, cov_b)]
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    square = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(np.sqrt(max(0.0, square)))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def score(
    samples: np.ndarray,
    exact: Callable[[int], np.ndarray],
    moments: tuple[np.ndarray, np.ndarray],
    predict: Callable[[np.ndarray], np.ndarray],
    predicted: tuple[np.ndarray, np.ndarray],
    observed: tuple[np.ndarray, np.ndarray],
    unit: float = 1.0,
    pairs: int = 3,
) -> dict[str, float]:
    """All of the above for samples (N, n).

    Args:
        exact: number -> an independent exact ensemble (N, n).
        moments: exact mean and variance (n,); predict: A; predicted: exact mean and variance (M,) of A x.
        observed: y and R (M,); unit: of Wasserstein distances; pairs: of exact ensembles whose distance is the floor.

    Returns:
        mean_error, spread_ratio, spread_ratio_observed, sliced_wasserstein, sliced_wasserstein_floor, chi2_ratio.
    """
    seen = predict(samples)
    sets = [exact(k) for k in range(2 * pairs)]
    return {
        "mean_error": mean_error(samples, moments[0], np.sqrt(moments[1])),
        "spread_ratio": spread_ratio(samples, np.sqrt(moments[1])),
        "spread_ratio_observed": spread_ratio(seen, np.sqrt(predicted[1])),
        "sliced_wasserstein": float(np.sqrt(np.mean([sliced_wasserstein(samples, e, k) ** 2 for k, e in enumerate(sets)]))) / unit,
        "sliced_wasserstein_floor": floor(sets) / unit,
        "chi2_ratio": chi_square(seen, *observed) / exact_chi_square(*predicted, *observed),
    }


def floor(sets: list[np.ndarray]) -> float:
    """Root mean square of the sliced Wasserstein distances of exact ensembles, two by two."""
    distances = [sliced_wasserstein(a, b, k) ** 2 for k, (a, b) in enumerate(zip(sets[::2], sets[1::2], strict=True))]
    return float(np.sqrt(np.mean(distances)))
