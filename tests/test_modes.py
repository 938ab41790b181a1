"""Modes of long series: from the covariance, from products of frames, from random directions: the same."""

import pytest
import torch

from appa_lite.core import covariance, modes
from appa_lite.core.covariance import estimate_covariance, localisation
from appa_lite.core.errors import UserError
from appa_lite.core.modes import leading_modes, working_bytes
from appa_lite.core.random import generator


def red(count: int, frames: int, size: int, decay: float = 0.8) -> torch.Tensor:
    """Trajectories (N, T, D) with standard deviations that decay geometrically along random axes."""
    draw = generator(0, "red")
    axes = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))[0]
    deviations = decay ** torch.arange(size, dtype=torch.float64)
    return (torch.randn(count, frames, size, generator=draw, dtype=torch.float64) * deviations) @ axes.T


@pytest.mark.parametrize("block", [2**26, 500])
@pytest.mark.parametrize(("count", "frames", "largest", "way"), [(2, 20, 50, "_snapshots"), (3, 60, 50, "_subspace")])
def test_all_ways_find_the_same(monkeypatch, count, frames, largest, way, block):
    series = red(count, frames, 70)
    values, basis, left = leading_modes(series, 12)
    monkeypatch.setattr(modes, "BLOCK", block)
    monkeypatch.setattr(modes, "LARGEST", largest)
    called = []
    plain = getattr(modes, way)
    monkeypatch.setattr(modes, way, lambda *args: called.append(way) or plain(*args))
    found, axes, rest = leading_modes(series, 12)
    assert called == [way]
    torch.testing.assert_close(found, values, rtol=1e-9, atol=0)
    torch.testing.assert_close(rest, left, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(axes.T @ axes, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10)
    overlap = torch.linalg.svdvals(axes.T @ basis)  # cosines of the angles between the spaces
    assert overlap.min() > 1 - 1e-9


def test_fewer_directions_than_modes_asked_for(monkeypatch):
    """Snapshots without a mean span one direction less than there are frames; the rest is orthonormal all the same."""
    series = red(1, 9, 30)
    series = series - series.mean(1, keepdim=True)
    monkeypatch.setattr(modes, "LARGEST", 20)
    values, basis, left = leading_modes(series, 9)
    assert values[-1] < 1e-14 * values[0] and abs(left) < 1e-12
    torch.testing.assert_close(basis.T @ basis, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_covariance_is_the_same_function(monkeypatch):
    series = red(2, 40, 60).float()
    whole = estimate_covariance(series, 20, 5)
    monkeypatch.setattr(modes, "LARGEST", 50)
    few = estimate_covariance(series[:1], 20, 5)
    many = estimate_covariance(series, 20, 5)
    x = torch.randn(3, 8, 60, generator=generator(1, "x"))
    assert few.modes == many.modes == 20
    torch.testing.assert_close(many.function(x, lambda v: v / (1 + v)), whole.function(x, lambda v: v / (1 + v)), rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_said():
    assert working_bytes(1000, 100) == 16e6 and working_bytes(1_000_000, 1024) < 2e10 < working_bytes(1_000_000, 1024, tapered=True)
    with pytest.raises(UserError, match="localisation=null"):
        localisation((8, 128, 128), (False, False), 3.0)
    assert covariance.LARGEST_TAPER > modes.LARGEST
