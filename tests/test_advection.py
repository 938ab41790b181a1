"""Lagrangian persistence: exact where nothing but drift happens, persistence where nothing moves."""

import numpy as np
import pytest
import torch

from appa_lite.core.errors import UserError
from appa_lite.forecasters.advection import Advection, extrapolate, motion, sample
from appa_lite.forecasters.persistence import Persistence

TIMES = np.datetime64("2016-08-28", "ns") + np.arange(3) * np.timedelta64(300, "s")
N = 32


def blobs(centres, widths=(2.5, 3.5), heights=(3.0, 8.0), n=N):
    """Smooth fields (1, n, n) of two blobs, zero at the edges."""
    y, x = torch.meshgrid(torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64), indexing="ij")
    return sum(h * torch.exp(-((y - a) ** 2 + (x - b) ** 2) / (2 * w**2)) for (a, b), w, h in zip(centres, widths, heights, strict=True))[
        None
    ]


def forecast(known, frames, members=1, **keywords):
    return Advection(**keywords).forecast(known[None], TIMES[: len(known)], frames, range(members), 0)[0]


@pytest.mark.parametrize("shift", [(0, 0), (1, -2), (-3, 4)])
def test_a_translated_field_on_a_torus_is_forecast_exactly(shift):
    field = torch.randn(2, N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    frames = torch.stack([field.roll((k * shift[0], k * shift[1]), (1, 2)) for k in range(8)])
    torch.testing.assert_close(forecast(frames[:3], 5, periodic=(True, True)), frames[3:], rtol=0, atol=1e-6)


def test_a_translated_field_inside_bounds_is_forecast_exactly():
    frames = torch.stack([blobs([(8 + 2 * k, 20 - k), (16 + 2 * k, 12 - k)], n=64, widths=(1.0, 1.5)) for k in range(8)])
    torch.testing.assert_close(forecast(frames[:3], 5), frames[3:], rtol=0, atol=1e-6)


def test_no_motion_is_persistence():
    known = torch.randn(1, 1, 2, N, N, generator=torch.Generator().manual_seed(1)).expand(-1, 3, -1, -1, -1)
    still = Persistence().forecast(known, TIMES, 4, range(3), 0)
    torch.testing.assert_close(Advection().forecast(known, TIMES, 4, range(3), 0), still, rtol=0, atol=1e-5)


def test_the_motion_between_cells_is_found_to_a_hundredth():
    """Of smooth blobs that move by a fraction of a cell, where bilinear interpolation is not exact."""
    known = torch.stack([blobs([(12 + 0.4 * k, 12 - 0.7 * k), (19 + 0.4 * k, 18 - 0.7 * k)]) for k in range(3)])
    v = motion(known, 1, 0.1, (False, False))
    wet = known[-1, 0] > 0.1
    assert abs(float(v[0][wet].mean()) - 0.4) < 0.01 and abs(float(v[1][wet].mean()) + 0.7) < 0.01


def turned(angle, n=N):
    """Blobs that turn about the centre of the domain by an angle (radians)."""
    c, (cos, sin) = (n - 1) / 2, (np.cos(angle), np.sin(angle))
    return blobs([(c + 8 * cos, c + 8 * sin), (c - 8 * cos, c - 8 * sin)], widths=(3.0, 3.0))


def test_a_rotation_is_followed_round_the_bend():
    """Opposite motions of two blobs: the error stays a fifth of persistence's while they turn by half a radian."""
    frames = torch.stack([turned(0.1 * k) for k in range(8)])
    error = (forecast(frames[:3], 5, smoothness=0.01) - frames[3:]).square().mean((1, 2, 3)).sqrt()
    still = (frames[2] - frames[3:]).square().mean((1, 2, 3)).sqrt()
    assert (error < 0.2 * still).all()


def test_trajectories_of_a_rotation_close_at_second_order():
    """Midpoint steps of a solid rotation: the displacement's error falls fourfold as the step is halved."""
    c = (N - 1) / 2
    y, x = torch.meshgrid(*2 * [torch.arange(N, dtype=torch.float64) - c], indexing="ij")
    errors = []
    for steps in (4, 8, 16):
        speed = 0.8 / steps
        v = speed * torch.stack([-x, y])
        exact = torch.stack([y * np.cos(0.8) + x * np.sin(0.8), -y * np.sin(0.8) + x * np.cos(0.8)]) + c  # where it came from
        coordinates = torch.stack([y, x]) + c
        reached = extrapolate(coordinates, v, steps, (False, False))[-1]
        middle = (slice(None), slice(10, 22), slice(10, 22))
        errors.append(float((reached - exact)[middle].abs().max()))
    assert errors[0] / errors[1] > 3.5 and errors[1] / errors[2] > 3.5


def test_samples_wrap_or_stay_at_the_edge():
    field = torch.arange(5.0, dtype=torch.float64)[None].expand(3, 5)
    place = torch.stack([torch.zeros(1, 3), torch.tensor([[-1.0, 4.5, 1.25]])]).double()
    assert sample(field, place, (False, False)).tolist() == [[0.0, 4.0, 1.25]]
    assert sample(field, place, (False, True)).tolist() == [[4.0, 2.0, 1.25]]


def test_members_keep_their_own_motion():
    known = torch.stack([torch.stack([blobs([(10 + s * k, 12), (18 + s * k, 18)]) for k in range(2)]) for s in (0, 1)])
    out = Advection(sectors=1).forecast(known, TIMES[:2], 1, range(4), 0)
    torch.testing.assert_close(out[0, 0], known[0, -1], rtol=0, atol=1e-6)
    torch.testing.assert_close(out[3, 0], blobs([(12, 12), (20, 18)]), rtol=0, atol=1e-3)


def test_flat_fields_stay_and_one_frame_is_refused():
    assert torch.equal(forecast(torch.ones(2, 1, N, N), 2), torch.ones(2, 1, N, N))
    with pytest.raises(UserError, match="history=2"):
        forecast(torch.ones(1, 1, N, N), 2)
