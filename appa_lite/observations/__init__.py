"""Observations: operators from fields to values, files of values, and the networks of twin experiments."""

from appa_lite.observations.area_mean import AreaMeanOperator
from appa_lite.observations.base import Observation, ObservationOperator
from appa_lite.observations.build import build_observation
from appa_lite.observations.full_state import FullStateOperator
from appa_lite.observations.network import Network
from appa_lite.observations.observe import observe
from appa_lite.observations.options import TableOptions
from appa_lite.observations.points import PointOperator
from appa_lite.observations.table import read_table, write_table

__all__ = [
    "AreaMeanOperator", "FullStateOperator", "Network", "Observation", "ObservationOperator", "PointOperator", "TableOptions",
    "build_observation", "observe", "read_table", "write_table",
]  # fmt: skip
