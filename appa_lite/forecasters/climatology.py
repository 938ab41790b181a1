"""Climatology: what the past has held, whatever the initial state."""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_seconds
from appa_lite.core.random import generator
from appa_lite.data.open import open_fields
from appa_lite.forecasters.base import Forecaster, Progress, silent


@final
class Climatology(Forecaster):
    """Each member is a stretch of the past, drawn at random: reliable by construction, and what everything must beat at long leads.

    Args:
        data: the past, a dataset or its file (.zarr, .nc), of the fields that are forecast;
        cycle: seconds, such as a year: stretches begin at nearly the same phase of it as the forecast; None: anywhere;
        within: how nearly, as a fraction of the cycle on either side.

    Raises:
        UserError: no stretch of the past is as long as the forecast and of its phase.
    """

    def __init__(self, data: str | Path | xr.Dataset, cycle: float | None = None, within: float = 0.05):
        self.data, self.cycle, self.within = data, cycle, within
        self.past: tuple[Tensor, np.ndarray, FieldSpec] | None = None

    def forecast(
        self, initial: Tensor, times: np.ndarray, frames: int, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        fields, seconds, spec = self._read()
        if fields.shape[-3:] != initial.shape[-3:]:
            sizes = [" x ".join(map(str, s)) for s in (spec.shape, initial.shape[-3:])]
            raise UserError(f"the past has fields of {sizes[0]}, the initial state of {sizes[1]} (variables, rows, columns)")
        starts = self._starts(seconds, frames, float(to_seconds(times)[-1]) + spec.step)
        rows = []
        for m in members:
            draw = generator(seed, "climatology", "member", m)
            n = int(torch.randint(len(fields), (), generator=draw))
            t = int(starts[int(torch.randint(len(starts), (), generator=draw))])
            rows.append(fields[n, t : t + frames])
        return torch.stack(rows)

    def _starts(self, seconds: np.ndarray, frames: int, first: float) -> np.ndarray:
        starts = np.arange(len(seconds) - frames + 1)
        if self.cycle is not None and len(starts):
            phase = (seconds[starts] - first) / self.cycle
            starts = starts[np.abs(phase - np.round(phase)) <= self.within]
        if not len(starts):
            raise UserError(f"the past of {len(seconds)} frames has no stretch of {frames} at this phase: give more, or a shorter lead")
        return starts

    def _read(self) -> tuple[Tensor, np.ndarray, FieldSpec]:
        if self.past is None:
            dataset, spec = open_fields(self.data)
            fields = spec.to_tensor(dataset)
            self.past = (fields if fields.ndim == 5 else fields[None]), to_seconds(dataset["time"].values), spec
        return self.past
