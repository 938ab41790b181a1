"""Datasets on disk: read back as written, whole or not there, errors in one line."""

import errno
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from appa_lite.core import store
from appa_lite.core.errors import UserError
from appa_lite.core.store import atomic, chunking, digest, open_dataset, provenance, write_dataset

ENDINGS = (".zarr", ".nc")


def forecast() -> xr.Dataset:
    rng = np.random.default_rng(1)
    return xr.Dataset(
        {"u": (("time", "prediction_timedelta", "number", "x"), rng.normal(size=(3, 4, 2, 5)).astype("float32"), {"units": "m s-1"})},
        {
            "time": ("time", np.datetime64("2000-02-28T23:00", "ns") + np.arange(3) * np.timedelta64(1, "h"), {"axis": "T"}),
            "prediction_timedelta": ("prediction_timedelta", np.arange(4) * np.timedelta64(6 * 3600 * 10**9, "ns")),
            "number": np.arange(2),
            "x": np.arange(5.0),
        },
        {"title": "test", "nested": {"a": None}},
    )


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("ending", ENDINGS)
def test_reads_back_what_was_written_also_without_this_package(tmp_path, ending):
    path = tmp_path / f"new/a{ending}"
    write_dataset(forecast(), path, {"seed": 3})
    again = open_dataset(path)
    xr.testing.assert_equal(again.load(), forecast())
    assert again.attrs == {"title": "test", "nested": '{"a": null}', "seed": 3, "Conventions": "CF-1.11"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = xr.open_dataset(path, engine="zarr" if ending == ".zarr" else "h5netcdf")
    xr.testing.assert_equal(plain, forecast())
    assert not leftovers(path.parent)


@pytest.mark.parametrize("ending", ENDINGS)
def test_coordinates_follow_cf(tmp_path, ending):
    write_dataset(forecast(), tmp_path / f"a{ending}")
    raw = xr.open_dataset(tmp_path / f"a{ending}", engine="zarr" if ending == ".zarr" else "h5netcdf", decode_cf=False)
    assert raw["time"].dtype == np.float64 and raw["time"].attrs["units"] == "seconds since 1970-01-01"
    assert all("_FillValue" not in raw[name].attrs for name in raw.coords)


def test_reads_zarr_v2_and_classic_netcdf(tmp_path, plane):
    plane.to_zarr(tmp_path / "v2.zarr", zarr_format=2, consolidated=False)
    plane.to_netcdf(tmp_path / "classic.nc", engine="netcdf4", format="NETCDF3_CLASSIC")
    for name in ("v2.zarr", "classic.nc"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            xr.testing.assert_equal(open_dataset(tmp_path / name).load(), plane)


def test_many_chunks_are_sharded(tmp_path):
    import zarr

    chunks, shards = chunking(("trajectory", "time", "y", "x"), (500, 400, 64, 64), 4)
    assert chunks == (1, 64, 64, 64) and shards == (9, 448, 64, 64)
    assert chunking(("time", "x"), (200, 40), 4) == ((200, 40), None)
    assert np.prod(shards) * 4 < 1.1 * store.SHARD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK", 64)
        dataset = xr.Dataset({"u": (("time", "x"), np.arange(4000.0).reshape(1000, 4))})
        write_dataset(dataset, tmp_path / "a.zarr")
    assert zarr.open_array(tmp_path / "a.zarr/u").shards is not None
    xr.testing.assert_equal(open_dataset(tmp_path / "a.zarr").load(), dataset)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_interrupt_leaves_the_old_file_or_none(tmp_path, plane, ending):
    path = tmp_path / f"a{ending}"
    for old in (None, plane):
        with pytest.raises(KeyboardInterrupt), atomic(path) as partial:
            store._write(2 * plane, partial)
            raise KeyboardInterrupt
        assert path.exists() == (old is not None)
        assert not leftovers(tmp_path)
        write_dataset(plane, path)
    xr.testing.assert_equal(open_dataset(path).load(), plane)
    write_dataset(plane + 1, path)
    xr.testing.assert_equal(open_dataset(path).load(), plane + 1)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_is_one_line_and_no_file(tmp_path, plane, ending, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_zarr", full)
    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    with pytest.raises(UserError, match="no space left"):
        write_dataset(plane, tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


def test_refuses_in_one_line(tmp_path, plane):
    write_dataset(plane, tmp_path / "a.nc")
    whole = (tmp_path / "a.nc").read_bytes()
    (tmp_path / "cut.nc").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.nc").write_text("hello")
    (tmp_path / "empty.nc").touch()
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.zarr/notes.txt").touch()
    for name, reason in {
        "none.nc": "no file",
        "none.zarr": "no file",
        "a.txt": "ends in .zarr or .nc",
        "cut.nc": "truncated",
        "text.nc": "cannot be read",
        "empty.nc": "empty",
        "folder.zarr": "not a zarr group",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            open_dataset(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="ends in"):
        write_dataset(plane, tmp_path / "a.csv")
    with pytest.raises(UserError, match="did not make"):
        write_dataset(plane, tmp_path / "folder.zarr")
    assert (tmp_path / "folder.zarr/notes.txt").exists()


def test_atomic_file(tmp_path):
    with atomic(tmp_path / "scores.json") as partial:
        partial.write_text("[]")
        assert partial.suffix == ".json" and not (tmp_path / "scores.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


def test_provenance(tmp_path, plane):
    write_dataset(plane, tmp_path / "a.zarr")
    write_dataset(plane, tmp_path / "b.zarr")
    (tmp_path / "c.csv").write_text("1")
    assert digest(tmp_path / "a.zarr") == digest(tmp_path / "b.zarr")
    assert digest(tmp_path / "c.csv") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    attrs = provenance({"members": 4}, 7, [tmp_path / "c.csv"])
    assert json.loads(attrs["configuration"]) == {"members": 4} and attrs["seed"] == 7
    assert json.loads(attrs["inputs"]) == {"c.csv": digest(tmp_path / "c.csv")}
