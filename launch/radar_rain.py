"""Radar rain of MeteoNet (Météo-France, Etalab Open Licence 2.0) to CF zarr: python launch/radar_rain.py DATA OUT

DATA holds rainfall_NW_2016_08.3.npz and rainfall_SE_2016_08.3.npz: five-minute sums in 0.01 mm, -1 where no radar looks, on a
grid of 0.01 degrees with the north up, and their dates as pickled objects, which is why this is a script and no part of the
library. Of a month's last third they hold 45 frames, and no more unbroken runs than these, which become domains of 64 x 64
cells of about 2.2 x 2.3 km (means of 2 x 3 pixels) in mm per hour, missing = NaN:

    train.zarr         28 August 10:00-11:10, both regions     every domain with rain, 16 cells apart, in 8 orientations
    validation.zarr    28 August 13:00-13:55, the north-west   disjoint domains, as below
    afternoon.zarr     28 August 13:00-13:55, the south-east   disjoint domains, one after the other where most rain is
    night.zarr         30 August 23:45-00:05, the south-east   the same; night_truth.zarr adds 00:20-00:30

A domain is chosen by its first frame alone (at least 2 % of its cells above 0.1 mm/h), never by what comes.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import xarray as xr

from appa_lite.core.store import write_dataset

SIZE, POOL, STEP = 64, (2, 3), np.timedelta64(5, "m")
SPACING = (2224.0, 2300.0)  # metres: 0.02 degrees of latitude, and about 0.03 of longitude between 41 and 52 degrees north
WET, SHARE = 0.1, 0.02  # mm per hour; of the cells of a domain
ATTRIBUTION = "Météo-France, MeteoNet (https://meteonet.umr-cnrm.fr), Etalab Open Licence 2.0"
REGIONS = ("NW", "SE")
Corner = tuple[int, int]


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Dates (T,) datetime64 and rain (T, H, W) in mm per hour on coarse cells, rows from south to north."""
    with np.load(path, allow_pickle=True) as file:
        dates, counts = file["dates"].astype("datetime64[ns]"), file["data"][:, ::-1].astype(np.float32)
    rain = np.where(counts < 0, np.nan, 0.12 * counts)
    (h, w), (a, b) = rain.shape[1:], POOL
    rain = rain[:, : h // a * a, : w // b * b].reshape(len(rain), h // a, a, w // b, b)
    return dates, rain.mean((2, 4), dtype=np.float32)  # missing where one of the six pixels is


def runs(dates: np.ndarray) -> list[slice]:
    """Frames that follow each other without a gap."""
    cuts = [0, *(np.flatnonzero(np.diff(dates) != STEP) + 1).tolist(), len(dates)]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def wetness(rain: np.ndarray) -> np.ndarray:
    """The share of wet cells in the first frame of every domain (by its corner), -1 where a frame lacks a cell."""
    table = lambda cells: np.pad(cells.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # noqa: E731
    sums = [
        t[SIZE:, SIZE:] - t[:-SIZE, SIZE:] - t[SIZE:, :-SIZE] + t[:-SIZE, :-SIZE]
        for t in map(table, (rain[0] > WET, np.isnan(rain).any(0)))
    ]
    return np.where(sums[1] > 0, -1.0, sums[0] / SIZE**2)


def every(rain: np.ndarray, apart: int = 16) -> list[Corner]:
    """All domains with rain whose corners are multiples of ``apart``."""
    share = wetness(rain)[::apart, ::apart]
    return [tuple(c) for c in (apart * np.argwhere(share >= SHARE)).tolist()]


def disjoint(rain: np.ndarray) -> list[Corner]:
    """Disjoint domains, one after the other where most rain is."""
    share, found = wetness(rain), []
    while share.max() >= SHARE:
        row, column = (int(i) for i in np.unravel_index(share.argmax(), share.shape))
        found.append((row, column))
        share[max(0, row - SIZE + 1) : row + SIZE, max(0, column - SIZE + 1) : column + SIZE] = -1
    return found


def domains(rain: np.ndarray, corners: list[Corner]) -> np.ndarray:
    """(N, T, 64, 64)."""
    return np.stack([rain[:, r : r + SIZE, c : c + SIZE] for r, c in corners])


def orientations(fields: np.ndarray) -> np.ndarray:
    """The 8 N turned and mirrored copies of fields (N, T, 64, 64): rain drifts in every direction on other days."""
    return np.concatenate([np.rot90(f, k, (2, 3)) for f in (fields, fields[..., ::-1]) for k in range(4)])


def dataset(fields: np.ndarray, dates: np.ndarray, region: list[str], corners: list[Corner]) -> xr.Dataset:
    """CF, ``(trajectory, time, y, x)``: a trajectory is a domain."""
    axes = {
        d: (d, s * np.arange(SIZE), {"units": "m", "axis": d.upper(), "standard_name": f"projection_{d}_coordinate"})
        for d, s in zip("yx", SPACING, strict=True)
    }
    rain = (("trajectory", "time", "y", "x"), fields, {"units": "mm h-1", "standard_name": "rainfall_rate", "long_name": "rain by radar"})
    places = {
        "region": (
            "trajectory",
            np.array([REGIONS.index(r) for r in region], np.int8),
            {"flag_values": np.arange(2, dtype=np.int8), "flag_meanings": "north_west south_east"},
        ),
        "row": ("trajectory", [r for r, _ in corners], {"long_name": "first row of cells from the south"}),
        "column": ("trajectory", [c for _, c in corners], {"long_name": "first column of cells from the west"}),
    }
    coords = {"trajectory": np.arange(len(fields)), "time": ("time", dates, {"standard_name": "time", "axis": "T"}), **axes, **places}
    return xr.Dataset({"rain": rain}, coords, {"source": ATTRIBUTION, "title": "five-minute rain, means of 2 x 3 pixels of 0.01 degrees"})


def convert(data: Path, out: Path) -> dict[str, xr.Dataset]:
    """Write the five datasets."""
    fields = {region: read(data / f"rainfall_{region}_2016_08.3.npz") for region in REGIONS}
    dates = fields["SE"][0]
    long = [run for run in runs(dates) if run.stop - run.start >= 5]
    if [str(dates[run.start])[:16] for run in long] != ["2016-08-28T10:00", "2016-08-28T13:00", "2016-08-30T23:45"]:
        raise SystemExit(f"{data} does not hold the sample of 45 frames that this script knows")
    morning, afternoon, night = long
    parts = [(r, rain[morning], every(rain[morning])) for r, (_, rain) in fields.items()]
    train = np.concatenate([domains(rain, corners) for _, rain, corners in parts])
    places = [(r, c) for r, _, corners in parts for c in corners]
    made = {"train": dataset(orientations(train), dates[morning], 8 * [r for r, _ in places], 8 * [c for _, c in places])}
    for name, region, run in (("validation", "NW", afternoon), ("afternoon", "SE", afternoon), ("night", "SE", night)):
        rain = fields[region][1]
        corners = disjoint(rain[run])
        made[name] = dataset(domains(rain[run], corners), dates[run], len(corners) * [region], corners)
    end, places = (
        slice(night.start, len(dates)),
        [tuple(int(v) for v in c) for c in zip(made["night"].row, made["night"].column, strict=True)],
    )
    made["night_truth"] = dataset(domains(fields["SE"][1][end], places), dates[end], len(places) * ["SE"], places)
    for name, one in made.items():
        write_dataset(one, out / f"{name}.zarr")
    return made


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for name, one in convert(Path(sys.argv[1]), Path(sys.argv[2])).items():
        wet = float((one["rain"] > WET).mean())
        sizes = f"{one.sizes['trajectory']} domains of {one.sizes['time']} frames"
        sys.stdout.write(f"{name}.zarr: {sizes}, {wet:.1%} wet, at most {float(one['rain'].max()):.1f} mm/h\n")
