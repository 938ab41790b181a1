"""What several test files share: the command line in a process of its own, small datasets."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def appa_lite(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs ``appa-lite`` with the given arguments, in a directory of its own."""

    def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, "-m", "appa_lite", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def plane() -> xr.Dataset:
    """Two variables on a small latitude-longitude grid, six-hourly."""
    rng = np.random.default_rng(0)
    dims, shape = ("time", "latitude", "longitude"), (8, 5, 6)
    return xr.Dataset(
        {
            "t2m": (dims, rng.normal(280, 5, shape).astype("float32"), {"units": "K", "standard_name": "air_temperature"}),
            "msl": (dims, rng.normal(1e5, 500, shape).astype("float32"), {"units": "Pa"}),
        },
        {
            "time": np.datetime64("2017-01-01", "ns") + np.arange(8) * np.timedelta64(6 * 3600, "s"),
            "latitude": ("latitude", 50 + np.arange(5.0), {"units": "degrees_north"}),
            "longitude": ("longitude", -3 + np.arange(6.0), {"units": "degrees_east"}),
        },
    )
