"""What every competitor promises, on a small Gaussian prior or a small linear simulator: over all files of configs/forecaster."""

import inspect
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from appa_lite.config import build, compose, options, resolve
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.core.random import Streams
from appa_lite.diffusion.samplers import DPMSolverPP2M
from appa_lite.forecasters.base import Assimilator, Forecaster
from appa_lite.forecasters.rollout import Rollout
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer
from appa_lite.observations import build_observation
from appa_lite.simulators.base import Simulator

CELLS, WINDOW, STEP, FRAMES = 8, 5, 3600.0, 7
TIMES = to_datetime(STEP * np.arange(FRAMES))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    spec = FieldSpec((Variable("u", "m"),), Grid(("x",), (0.0,), tuple(map(float, range(CELLS))), (False, True)), STEP)
    denoiser = LatentDenoiser(spec.shape, WINDOW, width=8, depth=1, heads=1, modes=CELLS, lags=40)
    denoiser.covariance.basis.copy_(torch.eye(CELLS))
    denoiser.covariance.autocovariance.copy_((0.9 ** torch.arange(40.0)).expand(CELLS, 40))
    denoiser.covariance.remainder.zero_()
    return Checkpoint(spec, Normalizer(spec.shape), IdentityAutoencoder(spec.shape), denoiser.eval().requires_grad_(False), {})


class Waves(Simulator):
    """Waves that travel half a cell a frame: x <- C x with C orthogonal and circulant; a white start is the climate."""

    def __init__(self, spec: FieldSpec):
        self.spec = spec
        phase = torch.exp(-1j * torch.pi * torch.fft.rfftfreq(CELLS))
        self.matrix = torch.fft.irfft(torch.fft.rfft(torch.eye(CELLS)) * torch.where(phase.real > 1e-6, phase, 1), CELLS)

    spinup_frames = 0
    gaussian = True

    def initial(self, seed, members, device="cpu"):
        return 3 * Streams(seed, members, "waves").normal((CELLS,)).to(device)

    def from_fields(self, fields):
        return fields[:, 0, 0]

    def advance(self, state, frame, seed, members):
        return state @ self.matrix

    def fields(self, state):
        return state[:, None, None]

    def budgets(self, state):
        return {"energy": state.square().sum(1)}


@pytest.fixture(scope="module")
def simulator(checkpoint) -> Waves:
    return Waves(checkpoint.spec)


@pytest.fixture(scope="module")
def past(checkpoint):
    fields = 1.5 + 0.1 * torch.randn(30, *checkpoint.spec.shape, generator=torch.Generator().manual_seed(0))
    return checkpoint.spec.to_dataset(fields, {"time": to_datetime(STEP * np.arange(30))})


def emulating(checkpoint: Checkpoint, cls: type) -> Checkpoint:
    """With the untrained model, of small increments, that a forecaster rolls out."""
    if not issubclass(cls, Rollout):
        return checkpoint
    shape = checkpoint.spec.shape
    keywords = {"mean": {"shape": shape}} if "mean" in inspect.signature(cls.kind).parameters else {}
    model = cls.kind(shape=shape, history=2, backbone={"width": 8, "depth": 1}, **keywords).eval()
    model.scale.fill_(0.1)
    return replace(checkpoint, denoiser=None, emulator=model)


@pytest.fixture(params=options("forecaster"))
def make(request, checkpoint, simulator, past):
    """Builds the competitor as a given kind, or skips where it is of another."""
    entry = compose("reanalysis", ["size=debug", f"forecaster={request.param}"], partial=True).forecaster

    def build_as(kind: type) -> Assimilator | Forecaster:
        cls, _ = resolve(entry, object)
        if not issubclass(cls, kind):
            pytest.skip(f"{cls.__name__} is no {kind.__name__}")
        parts = {"guidance": MomentMatching(), "sampler": DPMSolverPP2M(6, 50.0, 0.01), "batch": 2}
        parts |= {"checkpoint": emulating(checkpoint, cls), "simulator": simulator, "data": past}
        wanted = inspect.signature(cls).parameters
        given = {k: v for k, v in OmegaConf.to_container(entry).items() if v != "???"}
        return build(given, kind, **{k: v for k, v in parts.items() if k in wanted})

    return build_as


@pytest.fixture(scope="module")
def observation(checkpoint):
    table = pd.DataFrame({"time": TIMES[[1, 3, 5]], "x": [1.0, 4.0, 6.0], "observation": [2.0, -2.0, 1.0]})
    return build_observation(table.assign(variable="u", error_std=0.01), checkpoint.spec, TIMES)[0]


def test_analyses_follow_precise_observations(make, observation):
    assimilator = make(Assimilator)
    members = 16 if assimilator.coupled else 4  # more than there are observations, so that spread is left
    fields = assimilator.assimilate(observation, TIMES, range(members), seed=0)
    assert fields.shape == (members, FRAMES, 1, 1, CELLS) and torch.isfinite(fields).all()
    assert (observation.residual(fields).abs() < 0.1).all()
    assert fields[:, 0, 0, 0, 3].std() > 0.1  # nobody looked there: members differ


@pytest.mark.parametrize("observed", [True, False])
def test_analyses_are_a_function_of_seed_and_member(make, observation, observed):
    y = observation if observed else None
    few = make(Assimilator).assimilate(y, TIMES, range(2), seed=3)
    if observed and make(Assimilator).coupled:  # members are each other's covariance: a function of the seed and all of them
        assert torch.equal(make(Assimilator).assimilate(y, TIMES, range(2), seed=3), few)
    else:
        many = make(Assimilator).assimilate(y, TIMES, range(5), seed=3)
        torch.testing.assert_close(many[:2], few, rtol=1e-3, atol=1e-3)
        alone = [3, 4] if make(Assimilator).coupled else [4]
        torch.testing.assert_close(make(Assimilator).assimilate(y, TIMES, alone, seed=3)[-1], many[4], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(make(Assimilator).assimilate(y, TIMES, range(2), seed=4), few, atol=1e-2)


@pytest.mark.parametrize("frames", [1, 11])
def test_forecasts_go_on_for_any_lead(make, frames):
    initial = torch.full((2, 2, 1, 1, CELLS), 1.5)
    forecaster = make(Forecaster)
    out = forecaster.forecast(initial, TIMES[:2], frames, range(3), seed=0)
    assert out.shape == (3, frames, 1, 1, CELLS) and torch.isfinite(out).all()
    assert abs(float(out[:, 0].mean()) - 1.35) < 0.5
    torch.testing.assert_close(make(Forecaster).forecast(initial, TIMES[:2], frames, range(2), seed=0), out[:2], rtol=1e-3, atol=1e-3)
