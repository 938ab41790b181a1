"""Temporal eigenvectors: exact for short stretches, waves on a ring for long ones."""

import pytest
import torch

from appa_lite.core.covariance import RING, SpaceTimeCovariance
from appa_lite.core.temporal import DenseModes, RingModes

SERIES, LAGS = 3, 12


def autocovariance() -> torch.Tensor:
    """Of autoregressive series, faded to zero at the last lag."""
    lag = torch.arange(LAGS, dtype=torch.float64)
    powers = torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64)[:, None] ** lag
    return torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64) * powers * torch.cos(torch.pi / 2 * lag / LAGS) ** 2


def toeplitz(frames: int) -> torch.Tensor:
    c = torch.nn.functional.pad(autocovariance(), (0, frames - LAGS))
    return c[:, (torch.arange(frames)[:, None] - torch.arange(frames)[None, :]).abs()]


def dense(modes, values: torch.Tensor) -> torch.Tensor:
    """U diag(values) U^T, by its action."""
    eye = torch.eye(values.shape[1], dtype=values.dtype)[:, :, None].expand(-1, -1, SERIES)
    return modes.inverse(modes.forward(eye) * values).permute(2, 1, 0)


@pytest.mark.parametrize("frames", [24, 37, 50])
def test_ring_modes_are_orthonormal_and_inverse(frames):
    modes = RingModes(autocovariance(), frames, torch.float64)
    x = torch.randn(2, frames, SERIES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(modes.inverse(modes.forward(x)), x)
    torch.testing.assert_close(modes.forward(x).square().sum(), x.square().sum())


def test_a_stretch_of_a_ring_has_exactly_the_stationary_covariance():
    frames = 30
    modes = RingModes(autocovariance(), frames + LAGS, torch.float64)
    whole = dense(modes, modes.values)
    torch.testing.assert_close(whole[:, :frames, :frames], toeplitz(frames))
    assert (whole[:, 0, -1] > 0.1 * whole[:, 0, 0]).any()  # the axis closes on itself behind the stretch


@pytest.mark.parametrize("kind", ["dense", "ring"])
def test_blocks_are_parts_of_the_whole(kind):
    frames = 30
    padded = torch.nn.functional.pad(autocovariance(), (0, frames - LAGS))
    modes = DenseModes(padded, torch.float64) if kind == "dense" else RingModes(autocovariance(), frames, torch.float64)
    values = modes.values / (1 + modes.values)
    torch.testing.assert_close(modes.block(values, 4, 9), dense(modes, values)[:, 4:13, 4:13])


def test_slow_variability_comes_first_in_both():
    ring = RingModes(autocovariance(), 64, torch.float64)
    assert (ring.values.diff(dim=1) < 1e-9).double().mean() > 0.95
    assert (DenseModes(toeplitz(64)[:, 0], torch.float64).values.diff(dim=1) <= 0).all()


def test_a_ring_too_short_for_its_correlations_is_refused():
    with pytest.raises(ValueError, match="too short"):
        RingModes(autocovariance(), 2 * LAGS - 1, torch.float64)


def test_a_covariance_takes_long_stretches_as_rings_with_a_seam_behind_them():
    covariance = SpaceTimeCovariance(torch.eye(SERIES), autocovariance().float(), torch.zeros(())).double()
    long = RING * LAGS + 1
    assert covariance.seam(long - 1) == 0 and covariance.seam(long) == LAGS
    assert isinstance(covariance.temporal(long - 1), DenseModes)
    ring = covariance.temporal(long + LAGS)
    assert isinstance(ring, RingModes)
    fade = torch.cos(torch.linspace(0, torch.pi / 2, LAGS + 1, dtype=torch.float64)[:-1]) ** 2
    c = torch.nn.functional.pad(covariance.autocovariance * fade, (0, long - LAGS))
    exact = c[:, (torch.arange(long)[:, None] - torch.arange(long)[None, :]).abs()]
    torch.testing.assert_close(dense(ring, ring.values)[:, :long, :long], exact)
