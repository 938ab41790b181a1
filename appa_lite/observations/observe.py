"""The truth seen through networks: values with honest noise."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import chi2
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.core.random import generator
from appa_lite.observations.build import place
from appa_lite.observations.correlation import correlate
from appa_lite.observations.network import Network
from appa_lite.observations.options import TableOptions
from appa_lite.observations.table import sort


def observe(
    fields: Tensor, spec: FieldSpec, times: np.ndarray, networks: Sequence[Network], seed: int, options: TableOptions | None = None
) -> pd.DataFrame:
    """The canonical table of what networks see of the truth: observation = A(truth) + e, e ~ N(0, error_std^2) or as the options say.

    Positions and noise of each network are streams of their own: a network added at the end changes nothing in the
    others. Places where the truth has no value (over missing cells) yield no row.

    Args:
        fields: truth (T, C, H, W), physical units.
        times: (T,) datetime64.
        seed: the table is a function of it and of the arguments.
        options: how the truth is interpolated to the times of the observations, and the law of their errors.

    Raises:
        UserError: a network that does not fit the data, or networks that see nothing.
    """
    options, tables = options or TableOptions(), []
    for number, network in enumerate(networks):
        table = sort(network.draw(spec, times, generator(seed, "observe", number, "positions")))
        operator, rows, _ = place(table, spec, times, options)
        table = table.iloc[rows].reset_index(drop=True)
        noise = _noise(table, spec, options, seed, number)
        table["observation"] = operator(fields.to("cpu", torch.float64)).numpy() + table["error_std"].to_numpy() * noise
        tables.append(table)
    if not sum(map(len, tables)):
        raise UserError("the networks see nothing of this truth: look at their times and positions")
    table = sort(pd.concat([t for t in tables if len(t)], ignore_index=True))
    table["units"] = table["variable"].map({name: spec.quantity(name).units for name in table["variable"].unique()})
    first = ["time", *spec.grid.dims, "variable", "observation", "error_std", "units"]
    return table[first + [c for c in table if c not in first]]


def _noise(table: pd.DataFrame, spec: FieldSpec, options: TableOptions, seed: int, number: int) -> np.ndarray:
    """Errors (N,) of a network over their scale: normal, correlated, or normal over the root of a chi-square's mean square."""
    noise = torch.randn(len(table), generator=generator(seed, "observe", number, "noise"), dtype=torch.float64)
    correlation = correlate(table, spec, options.error_correlation)
    if correlation is not None:
        noise = correlation.cholesky()(noise)
    if options.student_t is not None:
        level = torch.rand(len(table), generator=generator(seed, "observe", number, "tails"), dtype=torch.float64)
        noise = noise * np.sqrt(options.student_t / chi2.ppf(level.numpy(), options.student_t))
    return noise.numpy()
