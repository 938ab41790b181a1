"""Observations: operators are exact where they can be, files survive a round trip, noise is honest."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml

from appa_lite.core.errors import UserError
from appa_lite.core.fields import Derived, FieldSpec, Grid, Variable, to_datetime, to_seconds
from appa_lite.observations import (
    AreaMeanOperator,
    FullStateOperator,
    Observation,
    PointOperator,
    build_observation,
    observe,
    read_table,
    write_table,
)
from appa_lite.observations.cells import MISSING_CELL, OUTSIDE_DOMAIN, OUTSIDE_PERIOD, USED
from appa_lite.observations.coarse import BlockMeans
from appa_lite.observations.full_state import FullState
from appa_lite.observations.nadir import NadirAltimeter
from appa_lite.observations.random_points import RandomPoints
from appa_lite.observations.stations import Stations
from appa_lite.observations.swath import Swath
from appa_lite.observations.units import conversion  # fmt: skip

DATA = Path(__file__).parents[2] / "shared" / "data"
DAY = 86400.0
START = np.datetime64("2020-01-01", "ns")


def plane(mask=None, periodic=(False, False), height=8, width=10, step=DAY) -> FieldSpec:
    variables = (Variable("eta", "m"), Variable("u", "m s-1", shift=(0.0, -0.5)), Variable("v", "m s-1", shift=(-0.5, 0.0)))
    derived = (
        Derived("ssh", "linear", ("eta", "u"), (0.7, -0.3), "m"),
        Derived("speed", "norm", ("u", "v"), (1.0, 1.0), "m s-1"),
    )
    grid = Grid(("y", "x"), tuple(np.arange(height) * 2.0), tuple(100 + np.arange(width) * 3.0), periodic)
    return FieldSpec(variables, grid, step, mask, derived)


def earth(longitudes) -> FieldSpec:
    grid = Grid(("latitude", "longitude"), (50.0, 51.0, 52.0, 53.0), tuple(longitudes), (False, len(longitudes) == 36))
    return FieldSpec((Variable("Tair", "K"), Variable("psl", "Pa")), grid, 3600.0)


def frames(spec, count=6) -> np.ndarray:
    return to_datetime(to_seconds(np.array([START])) + spec.step * np.arange(count))


def at(seconds) -> np.ndarray:
    return START + (np.asarray(seconds) * 1e9).astype("timedelta64[ns]")


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(spec, count=40, names=("eta", "u", "v", "ssh"), seed=0) -> pd.DataFrame:
    r = np.random.default_rng(seed)
    y, x = r.uniform(0, 2 * (spec.grid.shape[0] - 1), count), 100 + r.uniform(0, 3 * (spec.grid.shape[1] - 1), count)
    time = at(r.uniform(0, 5 * spec.step, count))
    return pd.DataFrame({"time": time, "y": y, "x": x, "variable": r.choice(names, count), "error_std": 0.1})


def values_of(spec, table, f) -> torch.Tensor:
    """Fields (T, C, H, W) = f(t, y, x) at each variable's own positions, and f at the rows of the table."""
    t = torch.arange(6, dtype=torch.float64)[:, None, None] * spec.step
    fields = []
    for v in spec.variables:
        y = torch.tensor(spec.grid.y)[:, None] + v.shift[0] * 2
        x = torch.tensor(spec.grid.x)[None] + v.shift[1] * 3
        fields.append(f(t, y, x))
    return torch.stack(fields, dim=1)


# operators


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_adjoint_identity(batch):
    spec = plane()
    x = noise(*batch, 6, *spec.shape).requires_grad_()
    area = points(spec, 15).assign(half_width=3.5)
    operators = [
        PointOperator.locate(spec, frames(spec), points(spec))[0],
        AreaMeanOperator.locate(spec, frames(spec), area)[0],
        FullStateOperator.at(spec, [1, 4]),
        Observation.concatenate(
            [
                Observation(torch.zeros(len(a)), torch.ones(len(a)), a)
                for a in (FullStateOperator.at(spec, [0]), FullStateOperator.at(spec, [3]))
            ]
        ).operator,
    ]
    for operator in operators:
        assert operator.linear
        y = noise(*batch, len(operator), seed=1)
        adjoint = torch.autograd.grad(operator(x), x, y)[0]
        assert torch.allclose((operator(x) * y).sum(), (x * adjoint).sum(), rtol=1e-12)


def test_interpolation_is_exact_on_affine_fields():
    spec = plane()
    f = lambda t, y, x: 1.5 + 2e-5 * t - 0.7 * y + 0.3 * x  # noqa: E731
    table = points(spec, 200, ("eta", "u", "v"))
    table = table[(table.y < 13) & (table.x < 125.5)].reset_index(drop=True)  # staggered variables end half a cell earlier
    operator, status = PointOperator.locate(spec, frames(spec), table)
    assert (status == USED).all()
    expected = f(
        *(torch.tensor(v) for v in ((table.time.to_numpy() - START) / np.timedelta64(1, "s"), table.y.to_numpy(), table.x.to_numpy()))
    )
    assert torch.allclose(operator(values_of(spec, table, f)), expected, atol=1e-10)


def test_periodic_axis_wraps():
    spec = plane(periodic=(False, True))
    fields = noise(6, *spec.shape)
    table = pd.DataFrame({"time": frames(spec)[2], "y": 4.0, "x": [128.5, 98.5, 158.5], "variable": "eta"})
    operator, status = PointOperator.locate(spec, frames(spec), table)
    row = fields[2, 0, 2]
    assert (status == USED).all()
    assert torch.allclose(operator(fields), ((row[9] + row[0]) / 2).expand(3))


def test_missing_cells_are_never_read():
    mask = np.ones((8, 10), dtype=bool)
    mask[:, 5:] = False
    spec = plane(tuple(map(tuple, mask.tolist())))
    fields = torch.where(spec.mask_tensor(), noise(6, *spec.shape), torch.nan)
    table = pd.DataFrame({"time": frames(spec)[0], "y": 4.0, "x": [113.5, 116.0, 118.0, 140.0], "variable": "eta"})
    operator, status = PointOperator.locate(spec, frames(spec), table)
    assert status.tolist() == [USED, USED, MISSING_CELL, OUTSIDE_DOMAIN]
    assert torch.equal(operator(fields), fields[0, 0, 2, 4].expand(2))  # renormalised; then the nearest within 1.5 cells
    everywhere, _ = PointOperator.locate(spec, frames(spec), points(spec))
    assert everywhere(fields).isfinite().all()
    assert FullStateOperator.at(spec, [0])(fields).isfinite().all()
    mean, _ = AreaMeanOperator.locate(spec, frames(spec), points(spec).assign(half_width=6.0))
    assert mean(fields).isfinite().all()


def test_status_of_rows_that_cannot_be_observed():
    spec = plane()
    late, early = frames(spec)[-1] + np.timedelta64(1, "h"), frames(spec)[0] - np.timedelta64(13, "h")
    table = pd.DataFrame({"time": [late, early, START], "y": [2.0, 2.0, 15.1], "x": 103.0, "variable": "eta"})
    expected = {"linear": [OUTSIDE_PERIOD, OUTSIDE_PERIOD, OUTSIDE_DOMAIN], "nearest": [USED, OUTSIDE_PERIOD, OUTSIDE_DOMAIN]}
    for how, status in expected.items():
        assert PointOperator.locate(spec, frames(spec), table, time_interpolation=how)[1].tolist() == status
    with pytest.raises(UserError, match="linear or nearest"):
        PointOperator.locate(spec, frames(spec), table, time_interpolation="cubic")


def test_derived_quantities():
    spec = plane()
    fields = noise(6, *spec.shape)
    table = points(spec, 60)
    one = lambda name: PointOperator.locate(spec, frames(spec), table.assign(variable=name))[0]  # noqa: E731
    u, v = one("u")(fields), one("v")(fields)
    assert torch.allclose(one("ssh")(fields), 0.7 * one("eta")(fields) - 0.3 * u)
    assert torch.allclose(one("speed")(fields), (u**2 + v**2).sqrt())
    assert not one("speed").linear
    mixed = PointOperator.locate(spec, frames(spec), points(spec, 12, ("eta", "speed", "ssh")))[0]
    assert torch.autograd.gradcheck(mixed, noise(6, *spec.shape).requires_grad_())
    still = torch.zeros(6, *spec.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(one("speed")(still).sum(), still)[0].isfinite().all()
    with pytest.raises(UserError, match="not linear"):
        AreaMeanOperator.locate(spec, frames(spec), table.assign(variable="speed", half_width=4.0))


def test_area_mean():
    spec = plane()
    table = points(spec, 20, ("eta", "u"))
    for footprint in ({"half_width": 3.3}, {"radius": 4.0}):
        operator, status = AreaMeanOperator.locate(spec, frames(spec), table.assign(**footprint))
        assert (status == USED).all()
        assert torch.allclose(operator(torch.full((6, *spec.shape), 7.0, dtype=torch.float64)), torch.tensor(7.0, dtype=torch.float64))
    square = FieldSpec(spec.variables, Grid(("y", "x"), tuple(np.arange(8.0)), tuple(np.arange(8.0))), DAY)
    fields = noise(1, *square.shape)
    table = pd.DataFrame({"time": [START], "y": 1.5, "x": 5.5, "variable": "eta", "half_width": 2.0})
    operator, _ = AreaMeanOperator.locate(square, frames(square, 1), table)
    assert torch.allclose(operator(fields), fields[0, 0, 0:4, 4:8].mean())


def test_full_state_is_a_restriction():
    spec = plane()
    fields = noise(2, 6, *spec.shape)
    operator = FullStateOperator.at(spec, [1, 4])
    assert torch.equal(operator(fields), fields[:, [1, 4]].flatten(1))
    assert operator.frame.tolist() == [1] * 240 + [4] * 240


# observations


def build(spec, table, **options):
    return build_observation(table, spec, frames(spec), options, dtype=torch.float64)


def test_windows_partition_the_observations():
    spec = plane()
    fields = noise(6, *spec.shape)
    table = points(spec, 80, ("eta", "ssh", "speed")).assign(observation=np.arange(80.0), half_width=np.nan)
    table.loc[::4, ["variable", "half_width"]] = ["eta", 4.0]
    whole, _ = build(spec, table, time_interpolation="nearest")
    windows = [(0, 2), (2, 3), (3, 6)]
    parts = [whole.window(*w) for w in windows]
    assert sorted(torch.cat([p.values for p in parts]).tolist()) == sorted(whole.values.tolist())
    for (start, stop), part in zip(windows, parts, strict=True):
        kept = whole.operator.within(start, stop)
        assert torch.equal(part.residual(fields[start:stop]), whole.residual(fields)[kept])
        assert part.provenance.observation.tolist() == part.values.tolist()
    linear, _ = build(spec, table)
    cut = [linear.window(*w) for w in windows]
    between = ((linear.operator.first < 2) & (linear.operator.last >= 2)) | ((linear.operator.first < 3) & (linear.operator.last >= 3))
    assert sum(map(len, cut)) == len(linear) - int(between.sum()) < len(linear)
    assert len(linear.window(0, 6)) == len(linear)
    assert linear.window(6, 9).residual(fields).shape == (0,)


def test_through_and_concatenate():
    spec = plane()
    z, decode = noise(3, 6, *spec.shape), lambda z: 2 * z + 1
    observation, _ = build(spec, points(spec).assign(observation=1.0))
    assert torch.equal(observation.through(decode).residual(z), observation.residual(decode(z)))
    both = Observation.concatenate([observation, observation.select(observation.frame > 2)])
    assert torch.equal(both.residual(z)[:, : len(observation)], observation.residual(z))
    assert both.to("cpu", torch.float32).residual(z.float()).dtype == torch.float32
    assert len(both.window(3, 6)) == 2 * len(observation.window(3, 6))
    members = Observation(noise(3, len(observation)), observation.variance, observation.operator)
    assert members.window(0, 2).residual(z[:, :2]).shape == (3, len(observation.window(0, 2)))
    with pytest.raises(TypeError, match="window"):
        observation.through(decode).window(0, 2)
    with pytest.raises(ValueError, match="as many rows"):
        Observation(torch.zeros(3), torch.ones(2), observation.operator)


def test_bad_rows_are_counted_by_reason():
    mask = np.ones((8, 10), dtype=bool)
    mask[:, 5:] = False
    spec = plane(tuple(map(tuple, mask.tolist())))
    good = {"time": "2020-01-02T06:00:00+01:00", "y": 2.0, "x": 103.0, "variable": "eta", "observation": 1.0, "error_std": 0.1, "qc": 1}
    bad = [
        {}, {"qc": None}, {"variable": "salt"}, {"observation": np.nan}, {"time": "2021-01-01"}, {"x": 400.0}, {"error_std": -1.0},
        {"error_std": np.nan}, {"qc": 4}, {"x": 126.0}, {"x": np.nan}, {"time": None}, {"error_std": np.inf},
    ]  # fmt: skip
    table = pd.DataFrame([{**good, **b} for b in bad])
    observation, counts = build(spec, table)
    assert counts == {
        "used": 2, "unknown variable": 1, "missing value": 1, "outside the period": 1, "outside the domain": 1,
        "non-positive or missing error": 3, "flagged": 1, "over a missing cell": 1, "missing position or time": 2,
    }  # fmt: skip
    assert observation.provenance.time.iloc[0] == pd.Timestamp("2020-01-02T05:00:00")
    assert sum(counts.values()) == len(table)
    with pytest.raises(UserError, match=r"none of the 2 observations can be used: 1 flagged, 1 outside the domain"):
        build(spec, table.iloc[[5, 8]])
    _, counts = build(spec, table, variables={"eta": {"error_std": 0.2}}, good_qc=[1, 4])
    assert counts["used"] == 4


def test_order_of_rows_does_not_matter():
    spec = plane()
    table = points(spec).assign(observation=np.arange(40.0))
    one, _ = build(spec, table)
    other, _ = build(spec, table.sample(frac=1, random_state=3))
    assert torch.equal(one.values, other.values) and torch.equal(one.operator.index, other.operator.index)


@pytest.mark.parametrize("grid", [np.arange(-4.0, 5.0), np.arange(356.0, 365.0), np.arange(0.0, 360.0, 10.0)])
def test_longitude_conventions(grid):
    spec = earth(grid)
    table = pd.DataFrame({"lat": 51.0, "lon": [-2.5, 357.5], "time": START, "variable": "Tair", "observation": 280.0, "error_std": 1.0})
    observation, counts = build_observation(table, spec, frames(spec), dtype=torch.float64)
    assert counts == {"used": 2}
    fields = torch.cos(torch.deg2rad(torch.tensor(grid))).expand(6, *spec.shape).to(torch.float64)
    seen = observation.operator(fields)
    assert seen[0] == pytest.approx(seen[1].item(), abs=1e-12)
    assert seen[0] == pytest.approx(np.cos(np.radians(2.5)), abs=5e-3)


def test_names_units_bias_and_elevation(tmp_path):
    spec = earth(np.arange(-4.0, 5.0))
    base = {"lat": 51.2, "lon": 0.3, "time": START, "elev": 300.0}
    rows = [
        {**base, "variable": "t2m", "observation": 10.0, "units": "degC"},
        {**base, "variable": "psl", "observation": 1000.0, "units": "hPa", "error_std": 2.0, "bias": 150.0},
        {**base, "variable": "ff", "observation": 50.0, "units": "furlong"},
    ]
    options = {
        "variables": {"t2m": {"name": "Tair", "error_std": 1.0}, "ff": {"name": "Tair", "scale": 2.0, "offset": 170.0, "error_std": 1.0}}
    }
    observation, _ = build_observation(pd.DataFrame(rows), spec, frames(spec), options, dtype=torch.float64)
    fields = torch.zeros(6, *spec.shape, dtype=torch.float64)
    found = dict(zip(observation.provenance.variable + observation.provenance.units, observation.values.tolist(), strict=True))
    assert sorted(observation.values.tolist()) == pytest.approx([270.0, 283.15, 1e5]) and set(found) == {"TairK", "pslPa"}
    assert sorted(observation.variance.tolist()) == pytest.approx([1.0, 1.0, 200.0**2])
    assert observation.operator(fields).max() == 150.0
    ground = xr.Dataset({"z": (("latitude", "longitude"), np.full(spec.grid.shape, 100.0))}, coords=spec.grid.coords())
    ground.to_netcdf(tmp_path / "z.nc", engine="netcdf4")
    for path, above in ((None, 300.0), (str(tmp_path / "z.nc"), 200.0)):
        elevation = {"variable": "Tair", "lapse_rate": 0.0065, "grid_elevation": path}
        corrected, _ = build_observation(
            pd.DataFrame(rows[:1]), spec, frames(spec), {**options, "elevation": elevation}, dtype=torch.float64
        )
        assert corrected.residual(fields).item() == pytest.approx(283.15 + 0.0065 * above)
    with pytest.raises(UserError, match="wrong units: 'ff' is in 'furlong'"):
        build_observation(pd.DataFrame(rows[2:]), spec, frames(spec), {"variables": {"ff": {"name": "Tair", "error_std": 1.0}}})
    with pytest.raises(UserError, match="did you mean 'variables'"):
        build_observation(pd.DataFrame(rows), spec, frames(spec), {"variable": {}})
    with pytest.raises(UserError, match="unknown variable 'Tiar'"):
        build_observation(pd.DataFrame(rows), spec, frames(spec), {"variables": {"t2m": {"name": "Tiar"}}})


def test_conversions():
    assert conversion("m/s", "m s**-1") == (1.0, 0.0)
    assert conversion("degree_Celsius", "K") == pytest.approx((1.0, 273.15))
    assert conversion("degF", "degC") == pytest.approx((5 / 9, -160 / 9))
    assert conversion("kt", "m/s") == pytest.approx((0.514444, 0.0), rel=1e-5)
    assert conversion("%", "1") == (0.01, 0.0)
    assert conversion("hPa", "K") is None


# files


def sample() -> pd.DataFrame:
    columns = {
        "time": at([0.0, 3600.25, 86399.123456789]), "latitude": [51.1, 52.0, 52.9], "longitude": [1 / 3, -2.0, 3.0],
        "variable": ["Tair", "psl", "Tair"], "observation": [281.123456789, np.nan, 280.0], "error_std": [1.0, 100.0, np.nan],
        "units": ["K", "Pa", ""], "level": [2.0, np.nan, 2.0], "elev": [12.0, 3.5, np.nan], "station": ["007", "Dublin", ""],
        "type": ["synop", "", "buoy"], "source": "test", "qc": ["1", "", "0"],
    }  # fmt: skip
    return pd.DataFrame(columns).astype(dict.fromkeys(("variable", "units", "station", "type", "source", "qc"), object))


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".nc"])
def test_round_trip(tmp_path, ending):
    path = tmp_path / f"obs{ending}"
    write_table(path, sample())
    again = read_table(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if ending == ".csv":  # microseconds
        assert (again.time - sample().time).abs().max() < pd.Timedelta("1us")
        again["time"] = sample().time
    pd.testing.assert_frame_equal(again[list(sample())], sample())


def test_files_that_are_refused(tmp_path):
    (tmp_path / "text.nc").write_text("not a NetCDF file")
    (tmp_path / "number.csv").write_text("time,x,variable,value\n12.5,1,eta,2\n")
    (tmp_path / "place.csv").write_text("time,variable,value\n2020-01-01,eta,2\n")
    (tmp_path / "what.csv").write_text("time,x,eta\n2020-01-01,1,2\n")
    (tmp_path / "when.csv").write_text("time,x,variable,value\nyesterday,1,eta,2\n")
    (tmp_path / "empty.csv").write_text("")
    for name, message in {
        "text.nc": "cannot be read", "number.csv": "times are numbers", "place.csv": "no column lat and lon",
        "what.csv": "column 'variable'",
        "when.csv": "no time can be read", "none.csv": "no such file", "a.bufr": "convert it first", "empty.csv": "cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            read_table(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="expected an ending"):
        write_table(tmp_path / "obs.xlsx", sample())
    wide = read_table(tmp_path / "what.csv", {"variables": {"eta": {"error_std": 1.0}}})
    assert wide[["variable", "observation"]].to_numpy().tolist() == [["eta", 2]]


def geometry(kind: str) -> xr.Dataset:
    """Two stations, with 3 and 2 temperatures, in one of the representations of CF chapter 9."""
    station = {
        "lat": ("station", [51.0, 52.0], {"standard_name": "latitude"}),
        "lon": ("station", [1.0, 2.0], {"standard_name": "longitude"}),
    }
    name = {"id": ("station", np.array(["A", "B"], dtype=object), {"cf_role": "timeseries_id"})}
    temperature = {"standard_name": "air_temperature", "units": "degC", "ancillary_variables": "temp_qc"}
    hours = at(np.array([0, 3600, 7200, 0, 3600.0]))
    values, quality = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([1, 1, 4, 1, 1])
    if kind == "orthogonal":
        full = np.array([[1.0, 2, 3], [4, 5, np.nan]])
        flags = np.array([[1, 1, 4], [1, 1, 1]])
        return xr.Dataset({
            **station, **name, "time": ("time", hours[:3]), "temp": (("station", "time"), full, temperature),
            "temp_qc": (("station", "time"), flags, {"standard_name": "air_temperature status_flag"}),
        })  # fmt: skip
    samples = {
        "time": ("obs", hours, {"standard_name": "time"}), "temp": ("obs", values, temperature),
        "temp_qc": ("obs", quality, {"standard_name": "air_temperature status_flag"}),
    }  # fmt: skip
    if kind == "contiguous":
        return xr.Dataset({**station, **name, **samples, "row_size": ("station", [3, 2], {"sample_dimension": "obs"})})
    if kind == "indexed":
        return xr.Dataset({**station, **name, **samples, "which": ("obs", [0, 0, 0, 1, 1], {"instance_dimension": "station"})})
    repeat = [0, 0, 0, 1, 1]
    return xr.Dataset({**{k: ("obs", np.asarray(v[1])[repeat], *v[2:]) for k, v in (station | name).items()}, **samples})


@pytest.mark.parametrize("kind", ["point", "orthogonal", "contiguous", "indexed"])
def test_discrete_sampling_geometries(tmp_path, kind):
    geometry(kind).to_netcdf(tmp_path / "obs.nc", engine="netcdf4")
    table = read_table(tmp_path / "obs.nc").dropna(subset="observation").sort_values("observation")
    assert table.station.tolist() == list("AAABB")
    assert table.observation.tolist() == [1, 2, 3, 4, 5] and table.qc.tolist()[2] in ("4", "4.0")
    assert table.latitude.tolist() == [51, 51, 51, 52, 52] and table.longitude.tolist() == [1, 1, 1, 2, 2]
    assert (table.time.to_numpy() == at(np.array([0, 3600, 7200, 0, 3600.0]))).all()
    spec = earth(np.arange(-4.0, 5.0))
    observation, counts = build_observation(table, spec, frames(spec), {"variables": {"temp": {"name": "Tair", "error_std": 0.5}}})
    assert counts == {"used": 4, "flagged": 1}
    assert observation.values.max().item() == pytest.approx(278.15)


def formats(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name}: real data are not part of the repository")
    return path


def test_met_eireann():
    path = formats("met_eireann_hourly_2017-01_19stations.parquet")
    grid = Grid(("latitude", "longitude"), tuple(np.arange(50.25, 60.0, 0.5)), tuple(np.arange(-10.75, 3.0, 0.5)))
    spec = FieldSpec((Variable("Tair", "K"), Variable("Wind", "m s-1")), grid, 3600.0)
    times = np.datetime64("2017-01-01", "ns") + np.arange(25) * np.timedelta64(1, "h")
    options = {"variables": {"t2m": {"name": "Tair", "error_std": 1.0}, "ws10m": {"name": "Wind", "error_std": 1.5}}}
    observation, counts = build_observation(read_table(path), spec, times, options)
    assert counts["used"] > 900 and counts["unknown variable"] > 50000
    assert set(observation.provenance.variable) == {"Tair", "Wind"}
    assert torch.equal(observation.frame, observation.operator.first)


def test_argo_metar_and_ghcn():
    argo = read_table(formats("obs_formats/argo_R6901929_176.nc"))
    assert {"TEMP", "PSAL"} <= set(argo.variable) <= {"TEMP", "PSAL", "TEMP_ADJUSTED", "PSAL_ADJUSTED"}
    surface = argo[(argo.variable == "TEMP") & (argo.level < 5)]
    assert surface.observation.iloc[0] == pytest.approx(9.238, abs=1e-3) and surface.qc.iloc[0] == "1"
    assert surface.station.iloc[0] == "6901929" and surface.latitude.iloc[0] == pytest.approx(62.863665)
    metar = formats("obs_formats/weatherbenchX_metar_2020-01.parquet")
    with pytest.raises(UserError, match="expected a column 'variable'"):
        read_table(metar)
    table = read_table(metar, {"variables": {"temperature": {"name": "Tair", "error_std": 1.0}}})
    assert len(table) == 12549 and {"elev", "station"} <= set(table) and table.time.dt.year.max() == 2020
    with pytest.raises(UserError, match="no column lat and lon"):
        read_table(formats("obs_formats/iodaconv_ghcn_20200228.csv"))
    for name in ("metview_obs_3day.bufr", "metview_small_odb.odb"):
        with pytest.raises(UserError, match="convert it first"):
            read_table(formats(f"obs_formats/{name}"))


# networks

NETWORKS = [
    RandomPoints(0.1, number=15, on_grid=False), Stations({"u": 0.05, "v": 0.05}, number=4, every=DAY / 2),
    NadirAltimeter("ssh", 0.03), Swath("ssh", 0.03, half_width=6.0, gap=2.0), FullState(0.2, frames=[0, -1]), BlockMeans(0.1, 2, ["eta"]),
]  # fmt: skip


def square(count=16, step=DAY) -> FieldSpec:
    spec = plane(step=step)
    return FieldSpec(
        spec.variables, Grid(("y", "x"), tuple(np.arange(count) * 2.0), tuple(np.arange(count) * 2.0)), step, None, spec.derived
    )


def test_noise_is_honest():
    spec = square()
    fields, times = noise(6, *spec.shape), frames(spec)
    table = observe(fields, spec, times, NETWORKS, seed=1)
    observation, counts = build_observation(table, spec, times, dtype=torch.float64)
    assert counts == {"used": len(table)}
    chi2 = (observation.residual(fields) ** 2 / observation.variance).numpy()
    for kind, rows in observation.provenance.groupby("type").indices.items():
        n = len(rows)
        assert abs(chi2[rows].mean() - 1) < 4 * np.sqrt(2 / n), kind
    assert set(observation.provenance.type) == {"random_points", "station", "nadir", "swath", "full_state", "block_means"}


def test_observe_is_a_function_of_the_seed():
    spec = square()
    fields, times = noise(6, *spec.shape), frames(spec)
    one, same, other = (observe(fields, spec, times, NETWORKS, seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one, same)
    assert not one.observation.equals(other.observation)
    alone = observe(fields, spec, times, NETWORKS[:1], 1)
    assert alone.observation.tolist() == one[one.type == "random_points"].observation.tolist()


def test_full_state_network_sees_every_cell_exactly():
    spec = square(6)
    fields, times = noise(3, *spec.shape), frames(spec, 3)
    observation, _ = build_observation(observe(fields, spec, times, [FullState(1e-9)], 0), spec, times, dtype=torch.float64)
    assert observation.operator.index.shape == (fields.numel(), 1)
    assert torch.equal(observation.operator.index.flatten().sort().values, torch.arange(fields.numel()))
    assert observation.residual(fields).abs().max() < 1e-7


def test_nadir_repeat_covers_the_basin():
    spec, days = square(32), 31
    table = NadirAltimeter("ssh", 0.03, repeat=10).draw(spec, frames(spec, days), torch.Generator().manual_seed(0))
    seconds = (table.time - table.time.min()).dt.total_seconds()
    assert table.groupby("time").ngroups == days - 1 and table.station.nunique() == 10
    cells = np.round(table[["y", "x"]].to_numpy() / 2).astype(int)
    assert not pd.DataFrame(cells).assign(t=seconds).duplicated().any()  # one value in a cell per pass
    octants, _, _ = np.histogram2d(*cells.T, bins=4, range=[[0, 32], [0, 32]])
    assert octants.min() > 0 and octants.std() / octants.mean() < 0.5
    repeats = table.groupby("station").time.unique().map(lambda t: np.diff(np.sort(t)) / np.timedelta64(1, "D"))
    assert all((r == 10).all() for r in repeats)
    lossy = NadirAltimeter("ssh", 0.03, dropout=0.5).draw(spec, frames(spec, days), torch.Generator().manual_seed(0))
    assert 5 < lossy.groupby("time").ngroups < 25


def test_tracks_on_the_sphere_and_swath_distance():
    spec = FieldSpec((Variable("ssh", "m"),), Grid(("latitude", "longitude"), tuple(np.arange(40, 50.0)), tuple(np.arange(-20, -5.0))), DAY)
    for network in (NadirAltimeter("ssh", 0.03), Swath("ssh", 0.03, half_width=200e3, gap=20e3)):
        table = network.draw(spec, frames(spec, 11), torch.Generator().manual_seed(1))
        assert len(table) > 40 and set(table) >= {"latitude", "longitude", "time", "error_std"}
    spec = square()
    swath = Swath("ssh", 0.03, half_width=6.0, gap=2.0, angle=0.0, repeat=1).draw(spec, frames(spec), torch.Generator().manual_seed(0))
    assert set(np.abs(swath.x - 15.0)) == {3.0, 5.0}


def test_networks_say_what_is_wrong():
    ring = FieldSpec((Variable("x"),), Grid(("x",), (0.0,), tuple(np.arange(40.0)), (False, True)), 3600.0)
    times, fields = frames(ring), noise(6, 1, 1, 40)
    observation, _ = build_observation(observe(fields, ring, times, [RandomPoints(0.1, fraction=0.25), BlockMeans(0.1, 4)], 0), ring, times)
    assert len(observation) == 6 * 10 + 6 * 10
    wrong = {
        "two-dimensional": NadirAltimeter("x", 0.1), "unknown variable 'ssh'": RandomPoints(0.1, ["ssh"], number=1),
        "cannot place 50": Stations(0.1, number=50), "positive": RandomPoints({"x": -1}, number=1), "frames": FullState(0.1, frames=[9]),
    }  # fmt: skip
    for message, network in wrong.items():
        with pytest.raises(UserError, match=message):
            observe(fields, ring, times, [network], 0)
    with pytest.raises(UserError, match="either number or fraction"):
        RandomPoints(0.1)


def test_every_configuration_names_a_network():
    paths = sorted((Path(__file__).parents[1] / "configs" / "observations").glob("*.yaml"))
    assert len(paths) >= 6
    classes = {f"{c.__module__}.{c.__name__}": c for c in (RandomPoints, Stations, NadirAltimeter, Swath, FullState, BlockMeans)}
    for path in paths:
        config = yaml.safe_load(path.read_text())
        for network in config["networks"]:
            classes[network.pop("class")](**network)
        spec = plane()
        build_observation(points(spec).assign(observation=1.0), spec, frames(spec), config)
