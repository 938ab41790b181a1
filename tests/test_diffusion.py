"""The composition of windows: identities, in float64."""

import itertools

import pytest
import torch

from appa_lite.diffusion.windows import WindowLayout, compose_windows
from appa_lite.models.denoiser import LatentDenoiser

# Windows


@pytest.mark.parametrize(("frames", "window", "overlap"), [(5, 5, 2), (12, 5, 2), (13, 5, 0), (31, 8, 7), (200, 12, 6)])
def test_windows_cover_every_frame_and_their_weights_sum_to_one(frames, window, overlap):
    layout = WindowLayout(frames, window, overlap)
    starts, weights = layout.starts(), layout.weights()
    assert starts[0] == 0 and starts[-1] == frames - window and starts == sorted(set(starts))
    assert all(b - a <= window - overlap for a, b in itertools.pairwise(starts))
    total = torch.zeros(frames, dtype=torch.float64)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + window] += row
    torch.testing.assert_close(total, torch.ones_like(total))
    assert weights.shape == (len(starts), window) and (weights > 0).all()


@pytest.mark.parametrize(("arguments", "reason"), [((4, 5, 1), "shorter than the window"), ((9, 5, 5), "overlap"), ((9, 5, -1), "overlap")])
def test_layouts_that_cannot_be(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        WindowLayout(*arguments)


def far(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x.cumsum(1) / (1 + sigma**2)


def local(x: torch.Tensor, sigma: torch.Tensor, first: list[int]) -> torch.Tensor:
    """Nonlinear, coupling the frames of a window, and different from window to window."""
    place = torch.tensor(first, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x + x.roll(1, 1) * sigma) * (1 + place)


def test_one_window_is_the_plain_denoiser():
    torch.manual_seed(0)
    model = LatentDenoiser((2, 1, 6), 5, width=8, depth=2, heads=2, modes=12, lags=5, periodic=(False, True)).eval()
    torch.nn.init.normal_(model.outputs.weight, std=0.3)
    model.covariance.basis.copy_(torch.linalg.qr(torch.randn(12, 12))[0])
    model.covariance.autocovariance.copy_(torch.linspace(3, 0.5, 12)[:, None] * 0.8 ** torch.arange(5.0))
    composed = compose_windows(lambda x, sigma, first: model.correction(x, sigma), model.gaussian, WindowLayout(5, 5, 2))
    x, sigma = torch.randn(3, 5, 2, 1, 6), torch.tensor(0.7)
    assert not torch.equal(model(x, sigma), model.gaussian(x, sigma))
    assert torch.equal(composed(x, sigma), model(x, sigma))


def test_a_correction_that_is_the_same_everywhere_is_added_once():
    layout = WindowLayout(23, 6, 3)
    composed = compose_windows(lambda x, sigma, first: torch.ones_like(x), far, layout, batch=3)
    x = torch.randn(2, 23, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(composed(x, torch.tensor(2.0)), far(x, torch.tensor(2.0)) + 1)


def test_windows_are_blended_where_they_overlap():
    layout = WindowLayout(9, 5, 1)  # windows begin at 0 and 4 and share frame 4
    place = lambda x, sigma, first: torch.ones_like(x) * torch.tensor(first)[:, None, None]  # noqa: E731
    composed = compose_windows(place, lambda x, sigma: 0 * x, layout)
    assert composed(torch.zeros(1, 9, 1), torch.tensor(1.0)).flatten().tolist() == [0, 0, 0, 0, 2, 4, 4, 4, 4]


def test_the_batch_of_windows_does_not_matter():
    x, sigma = torch.randn(3, 20, 2, 2, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    results = [compose_windows(local, far, WindowLayout(20, 6, 2), batch)(x, sigma) for batch in (1, 4, 7, 100)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-13, atol=1e-13)


def test_members_are_composed_one_by_one():
    x, sigma = torch.randn(3, 20, 2, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    composed = compose_windows(local, far, WindowLayout(20, 6, 2), batch=4)
    torch.testing.assert_close(composed(x, sigma)[1:2], composed(x[1:2], sigma), rtol=1e-13, atol=1e-13)


def test_gradients_that_are_computed_again_are_the_same():
    sigma = torch.tensor(0.4, dtype=torch.float64)
    start, push = torch.randn(2, 2, 20, 2, 2, dtype=torch.float64)
    gradients, calls = [], []
    for batch in (2, 1000):
        count = []

        def counted(x: torch.Tensor, sigma: torch.Tensor, first: list[int], count: list = count) -> torch.Tensor:
            count.append(len(x))
            return local(x, sigma, first)

        x = start.clone().requires_grad_(True)
        value = compose_windows(counted, far, WindowLayout(20, 6, 2), batch)(x, sigma)
        gradients.append(torch.autograd.grad(value, x, push)[0])
        calls.append(len(count))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert calls[1] == 1 and calls[0] == 2 * -(-2 * len(WindowLayout(20, 6, 2).starts()) // 2)  # each batch twice
