"""Ground tracks of a satellite that repeats its orbit: straight lines across the domain, one pass at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, gcd, radians, tan

import numpy as np
import torch

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, to_datetime, to_seconds
from appa_lite.observations.network import uniform

METRES_PER_DEGREE = 111_195.0


@dataclass(frozen=True)
class LocalPlane:
    """Metres (Y, X) from the middle of the domain; on the sphere, with the parallels of the middle latitude."""

    middle: tuple[float, float]
    metres: tuple[float, float]
    extent: tuple[float, float]

    @classmethod
    def of(cls, spec: FieldSpec) -> "LocalPlane":
        """The plane of a 2-D grid, cell edges included.

        Raises:
            UserError: the grid is one-dimensional.
        """
        grid = spec.grid
        if len(grid.dims) != 2:
            raise UserError(f"a satellite track needs a two-dimensional grid, this one has only {grid.dims[0]}")
        middle = tuple((c[0] + c[-1]) / 2 for c in (grid.y, grid.x))
        metres = (1.0, 1.0)
        if grid.dims[0] == "latitude":
            metres = METRES_PER_DEGREE, METRES_PER_DEGREE * max(float(np.cos(np.radians(middle[0]))), 0.1)
        extent = tuple((c[-1] - c[0] + s) * m for c, s, m in zip((grid.y, grid.x), grid.spacing, metres, strict=True))
        return cls(middle, metres, extent)

    def coordinates(self, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Grid coordinates of metres."""
        return self.middle[0] + y / self.metres[0], self.middle[1] + x / self.metres[1]

    def positions(self, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Metres of grid coordinates."""
        return (np.asarray(y) - self.middle[0]) * self.metres[0], (np.asarray(x) - self.middle[1]) * self.metres[1]


@dataclass(frozen=True)
class Pass:
    """One crossing at ``time``: the line X = centre + slope Y, in metres from the middle of the domain."""

    time: np.datetime64
    centre: float
    slope: float
    track: int


@dataclass(frozen=True)
class Orbit:
    """Tracks numbered 0 to ``repeat`` - 1, ascending (even) and descending (odd) ones evenly spread over the domain.

    Consecutive passes visit distant tracks of alternating direction. Each track has a time in the cycle of its own,
    anywhere within its turn, drawn once; so has the track that comes first.

    Args:
        repeat: passes before the tracks repeat.
        every: seconds between turns (86400: one pass a day).
        angle: degrees between the tracks and north.
        dropout: share of the passes that are lost, in [0, 1).
    """

    repeat: int
    every: float
    angle: float
    dropout: float

    def __post_init__(self):
        if self.repeat < 1 or not self.every > 0 or not 0 <= self.angle < 80 or not 0 <= self.dropout < 1:
            raise UserError(
                f"an orbit needs repeat >= 1, every > 0 s, 0 <= angle < 80 degrees and 0 <= dropout < 1, got "
                f"repeat={self.repeat}, every={self.every}, angle={self.angle}, dropout={self.dropout}"
            )

    def passes(self, plane: LocalPlane, times: np.ndarray, generator: torch.Generator) -> Iterator[Pass]:
        """The passes within [times[0], times[-1]], in order. A pass takes no time (minutes, in truth)."""
        start, stop = to_seconds(np.asarray(times))[[0, -1]]
        within, first = uniform(generator, self.repeat), int(uniform(generator, 1)[0] * self.repeat)
        stride = next(s for s in range(max(1, round(0.38 * self.repeat)), 2 * self.repeat + 2) if gcd(s, self.repeat) == 1)
        for turn in range(ceil((stop - start) / self.every)):
            lost = uniform(generator, 1)[0] < self.dropout
            track = (first + turn * stride) % self.repeat
            seconds = start + self.every * (turn + within[track])
            if not lost and seconds <= stop:
                yield Pass(to_datetime([seconds])[0], *self._line(plane, track), track)

    def _line(self, plane: LocalPlane, track: int) -> tuple[float, float]:
        descending = track % 2
        count = self.repeat // 2 if descending else (self.repeat + 1) // 2
        centre = ((track // 2 + 0.5) / count - 0.5) * plane.extent[1]
        return centre, (-1 if descending else 1) * tan(radians(self.angle))
