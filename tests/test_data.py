"""Gridded data of others and our own: recognised exactly, or refused with the reason."""

import json
from pathlib import Path

import cftime
import numpy as np
import pytest
import torch
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.core.fields import Derived, FieldSpec, Grid, Variable
from appa_lite.core.store import write_dataset
from appa_lite.data.open import open_fields, parse_date

SHARED = Path(__file__).parents[2] / "shared" / "data"


def same(dataset: xr.Dataset, expected: xr.Dataset) -> None:
    """Equal values and spec as the plain dataset gives."""
    found, spec = open_fields(dataset)
    wanted, plain = open_fields(expected)
    assert spec.to_dict() == plain.to_dict()
    torch.testing.assert_close(spec.to_tensor(found), plain.to_tensor(wanted), rtol=0, atol=0)


def test_plain(plane):
    dataset, spec = open_fields(plane)
    assert spec.names == ("t2m", "msl") and spec.step == 21600 and spec.mask is None and spec.grid.periodic == (False, False)
    assert spec.variables[0] == Variable("t2m", "K", "air_temperature")
    assert FieldSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    np.testing.assert_array_equal(spec.to_tensor(dataset)[:, 1], plane["msl"])


def test_other_names_and_orders_are_the_same_data(plane):
    same(plane.rename(latitude="lat", longitude="lon"), plane)
    same(plane.rename(latitude="nav_lat", longitude="nav_lon", time="t"), plane)
    same(plane.rename(latitude="j", longitude="i"), plane)
    same(plane.isel(latitude=slice(None, None, -1)), plane)
    same(plane.transpose("longitude", "time", "latitude"), plane)
    same(plane.assign_coords(longitude=("longitude", plane.longitude.values % 360, plane.longitude.attrs)), plane)
    same(plane.assign_coords(longitude=("longitude", plane.longitude.values % 360, plane.longitude.attrs)).sortby("longitude"), plane)
    same(plane.expand_dims(level=[500.0]), plane)
    same(plane.rename(latitude="lat").drop_attrs(), plane.drop_attrs())


def test_longitudes_around_the_globe_and_across_the_date_line(plane):
    globe = xr.concat([plane.isel(longitude=[0]).assign_coords(longitude=[lon]) for lon in np.arange(0.0, 360.0, 10.0)], "longitude")
    dataset, spec = open_fields(globe)
    assert spec.grid.periodic == (False, True) and spec.grid.x[0] == -180 and spec.grid.x[-1] == 170
    assert dataset.longitude.values.tolist() == list(spec.grid.x)
    _, spec = open_fields(plane.assign_coords(longitude=[178.0, 179, -180, -179, -178, -177]))
    assert spec.grid.x == (178.0, 179.0, 180.0, 181.0, 182.0, 183.0)
    with pytest.raises(UserError, match="gaps"):
        open_fields(plane.assign_coords(longitude=[0.0, 1, 2, 3, 50, 51]))
    with pytest.raises(UserError, match="same longitude"):
        open_fields(plane.assign_coords(longitude=[0.0, 72, 144, 216, 288, 360]))


def test_planes_rings_members_and_trajectories(plane):
    flat = plane.drop_attrs().rename(latitude="y", longitude="x")
    _, spec = open_fields(flat, ["msl"], {"periodic": [True, True]})
    assert spec.grid.dims == ("y", "x") and spec.grid.periodic == (True, True) and spec.names == ("msl",)
    ring = flat.isel(y=0, drop=True)
    dataset, spec = open_fields(ring)
    assert spec.shape == (2, 1, 6) and spec.to_tensor(dataset).shape == (8, 2, 1, 6)
    members = xr.concat([plane, plane + 1, plane + 2], "member")
    dataset, spec = open_fields(members)
    assert dataset["t2m"].dims == ("time", "number", "latitude", "longitude") and spec.to_tensor(dataset).shape == (3, 8, 2, 5, 6)
    dataset, spec = open_fields(xr.concat([plane, plane + 1], "trajectory"))
    assert spec.to_tensor(dataset).shape == (2, 8, 2, 5, 6)


def test_levels_and_periods(plane):
    levels = xr.concat([plane, plane + 100], xr.DataArray([500.0, 850.0], dims="plev", name="plev"))
    with pytest.raises(UserError, match="option level"):
        open_fields(levels)
    with pytest.raises(UserError, match="not among"):
        open_fields(levels, options={"level": 700})
    dataset, _ = open_fields(levels, options={"level": 850})
    np.testing.assert_array_equal(dataset["t2m"], plane["t2m"] + 100)
    dataset, _ = open_fields(plane, options={"start": "2017-01-01T12:00", "end": "2017-01-02"})
    assert dataset.sizes["time"] == 6
    with pytest.raises(UserError, match="no frame from 2018"):
        open_fields(plane, options={"start": "2018"})
    with pytest.raises(UserError, match="not a date"):
        parse_date("soon", "start")


def test_missing_cells_make_a_mask_and_gaps_are_refused_or_filled(plane):
    land = plane.copy(deep=True)
    land["t2m"][:, 0, :3] = np.nan
    dataset, spec = open_fields(land)
    assert spec.mask_tensor().logical_not().nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    assert spec.to_tensor(dataset).isfinite().all()
    land["msl"][3, 2, 2] = np.nan
    land["msl"][0, 4, 4] = np.nan
    with pytest.raises(UserError, match="msl: 2"):
        open_fields(land)
    dataset, spec = open_fields(land, options={"fill": "interpolate"})
    assert json.loads(dataset.attrs["filled_values"]) == {"msl": 2}
    np.testing.assert_allclose(dataset["msl"][3, 2, 2], (land["msl"][2, 2, 2] + land["msl"][4, 2, 2]) / 2)
    assert dataset["msl"][0, 4, 4] == land["msl"][1, 4, 4]
    with pytest.raises(UserError, match="no cell"):
        open_fields(plane * np.nan)


def test_calendars(plane):
    hours = np.arange(8) * 6
    january = plane.assign_coords(time=cftime.num2date(hours, "hours since 2017-01-01", "noleap"))
    same(january, plane)
    leap = plane.assign_coords(time=cftime.num2date(hours, "hours since 2016-02-28", "noleap"))
    with pytest.raises(UserError, match="irregular"):
        open_fields(leap)
    short = plane.assign_coords(time=cftime.num2date(hours, "hours since 2017-02-29", "360_day"))
    with pytest.raises(UserError, match="360_day"):
        open_fields(short)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.isel(time=[0, 1, 3, 4]), "irregular"),
        (lambda d: d.isel(time=[1, 0, 2]), "irregular"),
        (lambda d: d.isel(time=0), "single time"),
        (lambda d: d.drop_vars("time"), "no time coordinate"),
        (lambda d: d.assign_coords(time=np.arange(8)), "CF units"),
        (lambda d: d.assign_coords(latitude=[0.0, 1, 2, 3, 10]), "unequal"),
        (lambda d: d.assign_coords(latitude=[0.0, 1, 5, 3, 4]), "neither"),
        (lambda d: d.assign_coords(latitude=[80.0, 85, 90, 95, 100]), "beyond 90"),
        (lambda d: d.drop_attrs().rename(latitude="a", longitude="b"), "no grid"),
        (lambda d: d.astype(str), "missing"),
        (lambda d: d.drop_attrs().rename(latitude="y", longitude="x").assign_coords(nav_lat=(("y", "x"), np.ones((5, 6)))), "curvilinear"),
    ],
)
def test_refused_with_the_reason(plane, change, reason):
    with pytest.raises(UserError, match=reason):
        open_fields(change(plane))


def test_unknown_variable_or_option(plane):
    with pytest.raises(UserError, match="it has t2m, msl"):
        open_fields(plane, ["q"])
    with pytest.raises(UserError, match="unknown options"):
        open_fields(plane, options={"fil": "interpolate"})


@pytest.mark.parametrize("ending", [".zarr", ".nc"])
def test_our_own_datasets_round_trip_exactly(tmp_path, ending):
    grid = Grid(("y", "x"), tuple(np.arange(4) * 16e3), tuple(np.arange(5) * 16e3), (False, True))
    mask = tuple(tuple(bool((i + j) % 3) for j in range(5)) for i in range(4))
    variables = (Variable("u", "m s-1", shift=(0.0, -0.5)), Variable("v", "m s-1", long_name="northward", shift=(-0.5, 0.0)))
    spec = FieldSpec(variables, grid, 3600.0, mask, (Derived("speed", "norm", ("u", "v"), (1.0, 1.0), "m s-1"),))
    fields = torch.randn(2, 3, 2, 4, 5) * spec.mask_tensor()
    times = np.datetime64("2000-01-01", "ns") + np.arange(3) * np.timedelta64(1, "h")
    path = tmp_path / f"a{ending}"
    write_dataset(spec.to_dataset(fields, {"trajectory": [0, 1], "time": times}), path, {"field_spec": json.dumps(spec.to_dict())})
    dataset, again = open_fields(path)
    assert again == spec
    assert torch.equal(again.to_tensor(dataset), fields)
    assert open_fields(path, ["u"])[1].names == ("u",) and open_fields(path, ["u"])[1].derived == ()
    part, cut = open_fields(dataset.isel(x=slice(1, 4), time=slice(None, None, 2)))
    assert torch.equal(cut.to_tensor(part), fields[:, ::2, ..., 1:4]) and cut.derived == spec.derived
    assert cut.grid.periodic == (False, False) and cut.step == 7200 and cut.variables[0].shift == (0.0, -0.5)
    with pytest.raises(UserError, match="but was written in"):
        open_fields(dataset.assign(u=dataset["u"].assign_attrs(units="km h-1")))


@pytest.mark.parametrize(
    ("file", "variables", "step", "shape", "exists"),
    [
        ("ncep_slp_daily_2001-2010_north_atlantic.nc", ["msl"], 86400.0, (3652, 1, 17, 33), 1.0),
        ("wfde5_hourly_2017-01_british_isles.nc", ["Tair", "Qair", "Wind", "pr"], 3600.0, (744, 4, 20, 28), 250 / 560),
    ],
)
def test_real_files(file, variables, step, shape, exists):
    if not (SHARED / file).exists():
        pytest.skip(f"the shared data file {file} is not here")
    dataset, spec = open_fields(SHARED / file, variables)
    fields = spec.to_tensor(dataset)
    assert fields.shape == shape and fields.isfinite().all() and spec.step == step
    assert spec.mask_tensor().double().mean() == pytest.approx(exists)
