"""The commands from Python, for notebooks: tables and datasets in, xarray datasets out.

import appa_lite
model = appa_lite.load("checkpoints/ocean")
analysis = model.reanalysis("observations.parquet", members=16)
forecast = model.forecast(analysis, lead="20d")
"""

from os import PathLike
from pathlib import Path

import pandas as pd
import xarray as xr

from appa_lite.config import compose
from appa_lite.core.errors import UserError
from appa_lite.core.store import open_dataset
from appa_lite.models.checkpoint import FILE
from appa_lite.observations import read_table
from appa_lite.stages import assimilation, forecast, reanalysis
from appa_lite.stages import filter as filtering
from appa_lite.stages.parallel import Work


class Model:
    """A trained prior. What a command can be told, its method can: ``model.reanalysis(file, "sampler.steps=16", members=8)``.

    Args:
        checkpoint: a model directory; device: auto, cpu or cuda.
    """

    def __init__(self, checkpoint: str | PathLike, device: str = "auto"):
        if not (Path(checkpoint) / FILE).is_file():
            raise UserError(f"no model at '{checkpoint}': expected a directory with {FILE}")
        self.checkpoint, self.device = str(checkpoint), device

    def reanalysis(self, observations: str | PathLike | pd.DataFrame, *choices: str, members: int = 16, seed: int = 0) -> xr.Dataset:
        """The posterior ensemble (time, number, grid) given an observation file, or a table of the same columns."""
        cfg, rows, files = self._observed("reanalysis", choices, observations, members, seed)
        return reanalysis.analyse(cfg, rows, files, Work())[0]

    def filter(
        self,
        observations: str | PathLike | pd.DataFrame,
        *choices: str,
        members: int = 16,
        seed: int = 0,
        previous: str | PathLike | xr.Dataset | None = None,
    ) -> xr.Dataset:
        """Analyses (time, number, grid), each from the observations up to its time, going on from a previous output or its file."""
        cfg, rows, files = self._observed("filter", choices, observations, members, seed)
        if previous is not None and not isinstance(previous, xr.Dataset):
            files, previous = [*files, str(previous)], open_dataset(previous)
        return filtering.analyse(cfg, rows, files, Work(), previous)[0]

    def forecast(
        self, initial: str | PathLike | xr.Dataset, *choices: str, lead: str, members: int | None = None, seed: int = 0
    ) -> xr.Dataset:
        """The forecast ensemble (time, prediction_timedelta, number, grid) from an analysis, its file or a trajectory."""
        data = isinstance(initial, xr.Dataset)
        cfg = self._compose("forecast", choices, initial="a dataset" if data else str(initial), lead=lead, members=members, seed=seed)
        return forecast.predict(cfg, initial if data else str(initial), [] if data else [str(initial)], Work())

    def _observed(self, command: str, choices: tuple[str, ...], observations: str | PathLike | pd.DataFrame, members: int, seed: int):
        """Configuration, table and files of a command that reads observations."""
        table = isinstance(observations, pd.DataFrame)
        name = "a table" if table else str(observations)
        cfg = self._compose(command, choices, observations=name, members=members, seed=seed)
        return cfg, observations if table else read_table(name, assimilation.table_options(cfg)), [] if table else [name]

    def _compose(self, command: str, choices: tuple[str, ...], **values: object):
        given = {"checkpoint": self.checkpoint, "device": self.device, "out": "returned"} | values
        typed = [f"{key}={'null' if value is None else value}" for key, value in given.items()]
        return compose(command, [*typed, *choices])


def load(checkpoint: str | PathLike, device: str = "auto") -> Model:
    """The trained prior in a model directory."""
    return Model(checkpoint, device)
