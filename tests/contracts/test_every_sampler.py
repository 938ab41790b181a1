"""What every sampler promises: with the denoiser of a Gaussian it draws from that Gaussian; over all of configs/sampler."""

import pytest
import torch

from appa_lite.config import build, compose, options
from appa_lite.core.random import Streams, generator
from appa_lite.diffusion.base import Sampler

MEAN = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
STD = torch.tensor([1.0, 0.3, 0.7, 2.0], dtype=torch.float64)
MEMBERS = 6000


@pytest.fixture(scope="module", params=options("sampler"))
def sampler(request) -> Sampler:
    return build(compose("reanalysis", ["size=debug", f"sampler={request.param}"], partial=True).sampler, Sampler)


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


def source(members: int, seed: int = 0):
    streams = Streams(seed, range(members), "contract")
    return lambda draw: streams.normal((4,), torch.float64)


def crowd(seed: int = 0):
    """As many members as statistics need, from one stream."""
    stream = generator(seed, "contract")
    return lambda draw: torch.randn(MEMBERS, 4, generator=stream, dtype=torch.float64)


def test_a_gaussian_is_sampled(sampler):
    sample = sampler(gaussian, crowd())
    assert (((sample.mean(0) - MEAN) / STD).abs() < 5 / MEMBERS**0.5 + 0.01).all()
    assert ((sample.std(0) / STD - 1).abs() < 0.05).all()
    shape = (sample - MEAN) / STD
    assert (shape.pow(4).mean(0) - 3).abs().max() < 0.6  # no tails that a Gaussian has not
    correlation = torch.corrcoef(shape.T) - torch.eye(4)
    assert correlation.abs().max() < 6 / MEMBERS**0.5


def test_a_member_is_a_function_of_its_noise(sampler):
    few, many = sampler(gaussian, source(3)), sampler(gaussian, source(7))
    torch.testing.assert_close(many[:3], few, rtol=1e-12, atol=1e-12)
    assert not torch.equal(sampler(gaussian, source(3, seed=1)), few)


def test_progress_ends_at_its_total(sampler):
    told = []
    sampler(gaussian, source(2), lambda *now: told.append(now))
    assert told[-1][0] == told[-1][1] == len(told)
