"""The truth seen through networks: values with honest noise."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.core.random import generator
from appa_lite.observations.build import place
from appa_lite.observations.network import Network
from appa_lite.observations.options import TableOptions
from appa_lite.observations.table import sort


def observe(
    fields: Tensor, spec: FieldSpec, times: np.ndarray, networks: Sequence[Network], seed: int, time_interpolation: str = "linear"
) -> pd.DataFrame:
    """The canonical table of what networks see of the truth: observation = A(truth) + N(0, error_std^2).

    Positions and noise of each network are streams of their own: a network added at the end changes nothing in the
    others. Places where the truth has no value (over missing cells) yield no row.

    Args:
        fields: truth (T, C, H, W), physical units.
        times: (T,) datetime64.
        seed: the table is a function of it and of the arguments.
        time_interpolation: ``linear`` or ``nearest``, of the truth to the times of the observations.

    Raises:
        UserError: a network that does not fit the data, or networks that see nothing.
    """
    options, tables = TableOptions(time_interpolation=time_interpolation), []
    for number, network in enumerate(networks):
        table = sort(network.draw(spec, times, generator(seed, "observe", number, "positions")))
        operator, rows, _ = place(table, spec, times, options)
        noise = torch.randn(len(rows), generator=generator(seed, "observe", number, "noise"), dtype=torch.float64).numpy()
        table = table.iloc[rows].reset_index(drop=True)
        table["observation"] = operator(fields.to("cpu", torch.float64)).numpy() + table["error_std"].to_numpy() * noise
        tables.append(table)
    if not sum(map(len, tables)):
        raise UserError("the networks see nothing of this truth: look at their times and positions")
    table = sort(pd.concat([t for t in tables if len(t)], ignore_index=True))
    table["units"] = table["variable"].map({e.name: e.units for e in (*spec.variables, *spec.derived)})
    first = ["time", *spec.grid.dims, "variable", "observation", "error_std", "units"]
    return table[first + [c for c in table if c not in first]]
