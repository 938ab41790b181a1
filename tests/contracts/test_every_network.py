"""What every network of instruments promises: over all files of configs/observations."""

import numpy as np
import pandas as pd
import pytest
import torch

from appa_lite.config import build, compose, options
from appa_lite.core.fields import FieldSpec, to_datetime
from appa_lite.observations import build_observation
from appa_lite.observations.network import Network
from appa_lite.observations.observe import observe
from appa_lite.observations.options import TableOptions
from appa_lite.simulators.base import Simulator

FRAMES = 4


@pytest.fixture(scope="module")
def spec() -> FieldSpec:
    """Of the ocean, whose variables every shipped network can observe."""
    return build(compose("simulate", ["simulator=ocean"], partial=True).simulator, Simulator).spec


@pytest.fixture(scope="module")
def times(spec) -> np.ndarray:
    return to_datetime(946684800 + spec.step * np.arange(FRAMES))


@pytest.fixture(scope="module")
def fields(spec) -> torch.Tensor:
    return torch.randn(FRAMES, *spec.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=options("network"))
def cfg(request):
    network = compose("observe", ["size=debug", f"network={request.param}"], partial=True).network
    if not network.get("networks"):
        pytest.skip("reads real observation files only")
    return network


@pytest.fixture(scope="module")
def networks(cfg) -> list[Network]:
    return [build(entry, Network) for entry in cfg.networks]


@pytest.fixture(scope="module")
def table(fields, spec, times, networks) -> pd.DataFrame:
    return observe(fields, spec, times, networks, seed=5)


def test_rows_fall_inside_the_domain_and_the_period(table, spec, times):
    half = np.array(spec.grid.spacing) / 2
    for name, axis, room in (("y", spec.grid.y, half[0]), ("x", spec.grid.x, half[1])):
        assert table[name].between(axis[0] - room, axis[-1] + room).all()
    assert table["time"].between(times[0], times[-1]).all()
    assert all(spec.quantity(name) for name in table["variable"].unique())
    assert (table["error_std"] > 0).all() and np.isfinite(table["observation"]).all()
    for name, units in table.groupby("variable")["units"].first().items():
        assert units == spec.quantity(name).units


def test_the_table_is_a_function_of_the_seed(table, fields, spec, times, networks):
    pd.testing.assert_frame_equal(observe(fields, spec, times, networks, seed=5), table)
    assert not observe(fields, spec, times, networks, seed=6)["observation"].equals(table["observation"])


def test_every_row_can_be_assimilated_and_its_noise_is_honest(table, fields, spec, times, cfg):
    observation, counts = build_observation(table, spec, times, TableOptions.parse({k: v for k, v in cfg.items() if k != "networks"}))
    assert counts == {"used": len(table)}
    ratio = observation.residual(fields) / observation.variance.sqrt()
    assert abs(float(ratio.square().mean()) - 1) < 6 * (2 / len(table)) ** 0.5
