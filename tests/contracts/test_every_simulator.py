"""What every simulator promises, whatever it simulates: over all files of configs/simulator."""

import json

import numpy as np
import pytest
import torch

from appa_lite.config import build, compose, options
from appa_lite.core.fields import FieldSpec
from appa_lite.simulators.base import Simulator, trajectories

FRAMES = 2


@pytest.fixture(scope="module", params=options("simulator"))
def simulator(request) -> Simulator:
    cfg = compose("simulate", ["size=debug", f"simulator={request.param}"], partial=True)
    if "compiled" in cfg.simulator:
        cfg.simulator.compiled = False  # no compiler needed, no quarter of a minute spent
    return build(cfg.simulator, Simulator)


@pytest.fixture(scope="module")
def fields(simulator) -> torch.Tensor:
    return trajectories(simulator, 3, [0, 1], FRAMES, spinup=0)


def test_trajectories_are_finite_fields_of_the_spec(simulator, fields):
    assert fields.shape == (2, FRAMES, *simulator.spec.shape)
    assert torch.isfinite(fields).all()
    assert (fields[:, 1] != fields[:, 0]).any()


def test_a_member_is_a_function_of_its_seed_and_number(simulator, fields):
    assert torch.equal(trajectories(simulator, 3, [0, 1], FRAMES, spinup=0), fields)
    alone = trajectories(simulator, 3, [1], FRAMES, spinup=0)
    torch.testing.assert_close(alone[0], fields[1], rtol=1e-5, atol=1e-6 * float(fields.abs().max()))
    assert not torch.equal(fields[0], fields[1])
    assert not torch.equal(trajectories(simulator, 4, [0], 1, spinup=0)[0, 0], fields[0, 0])


def test_nothing_is_drawn_from_global_random_state(simulator):
    before = torch.random.get_rng_state()
    trajectories(simulator, 3, [0], 1, spinup=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_spec_survives_json(simulator):
    spec = simulator.spec
    assert FieldSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.step > 0 and all(v.units for v in (*spec.variables, *spec.derived))
    assert len(set(spec.names)) == spec.channels


def test_fields_survive_a_dataset(simulator, fields):
    spec = simulator.spec
    times = np.datetime64("2000-01-01", "ns") + np.arange(FRAMES) * np.timedelta64(int(spec.step), "s")
    dataset = spec.to_dataset(fields, {"trajectory": [0, 1], "time": times})
    assert set(dataset.data_vars) == {v.name for v in (*spec.variables, *spec.derived)}
    assert torch.equal(spec.to_tensor(dataset), fields)


def test_budgets_are_finite_numbers_of_each_member(simulator):
    state = simulator.initial(0, [0, 1, 2])
    budgets = simulator.budgets(state)
    assert budgets
    for name, value in budgets.items():
        assert value.shape == (3,) and torch.isfinite(value).all(), name


def test_spin_up_and_branches(simulator):
    assert simulator.spinup_frames >= 0 and simulator.decorrelation_frames >= 0
    state = simulator.initial(0, [0]).expand(2, *simulator.initial(0, [0]).shape[1:])
    branches = simulator.perturb(state, 0, [0, 1])
    assert branches.shape == state.shape and not torch.equal(branches[0], branches[1])
    assert torch.equal(simulator.perturb(state, 0, [0, 1]), branches)
