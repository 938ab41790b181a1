"""Datasets on disk: zarr v3 and NetCDF-4 out, those and zarr v2 and classic NetCDF in; complete under their name or not there.

Everything is written beside its final name and renamed when it is whole.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from appa_lite import __version__
from appa_lite.core.errors import UserError

CHUNK = 2**20  #: bytes of a chunk, uncompressed
SHARD = 2**26  #: bytes of a shard
FEW_CHUNKS = 64  #: an array with more chunks than these is sharded
INNER_FIRST = ("x", "longitude", "y", "latitude", "level", "time", "prediction_timedelta", "number", "trajectory")


# Reading


def open_dataset(path: str | os.PathLike) -> xr.Dataset:
    """A dataset, lazily: ``.zarr`` (v2 or v3) or ``.nc`` (NetCDF-4 or classic); zarr also under a URL that fsspec knows.

    Raises:
        UserError: there is no such file, it is truncated, or it is not a dataset.
    """
    if "://" in str(path):
        return _open_remote(str(path))
    path = Path(path)
    if path.suffix not in (".zarr", ".nc", ".nc4", ".netcdf"):
        raise UserError(f"{path} is not named like a dataset: expected a name that ends in .zarr or .nc")
    if not path.exists():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".zarr":
        if not any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zmetadata")):
            raise UserError(f"{path} is not a zarr group: it has no zarr.json or .zgroup; was its writing interrupted?")
        engine = "zarr"
    else:
        with path.open("rb") as file:
            head = file.read(4)
        if not head:
            raise UserError(f"{path} is empty: make or copy it again")
        engine = "netcdf4" if head[:3] == b"CDF" else "h5netcdf"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Failed to open Zarr store with consolidated metadata")
            return xr.open_dataset(path, engine=engine, decode_timedelta=True)
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as a dataset, perhaps it is truncated ({reason}): make or copy it again") from error


def _open_remote(url: str) -> xr.Dataset:
    """A zarr store that fsspec reaches (``s3://``, ``gs://``, ``https://``, ...), with the credentials of its environment."""
    if not url.split("?")[0].rstrip("/").endswith(".zarr"):
        raise UserError(f"{url} is not a zarr store: only names that end in .zarr are read from afar; copy other files first")
    try:
        return xr.open_dataset(url, engine="zarr", decode_timedelta=True)
    except ImportError as error:
        raise UserError(f"{url} needs another package ({error}): install it, such as s3fs, gcsfs or aiohttp") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{url} cannot be read as a zarr store ({reason}): check the address and the credentials") from error


# Writing


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside ``path`` to write a file or directory under; it becomes ``path`` when the block ends well, else it is removed."""
    path = Path(path)
    if path.is_dir() and not _is_store(path):
        raise UserError(f"{path} is a directory that this program did not make: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    _remove(partial)
    try:
        yield partial
        _replace(partial, path)
    except (OSError, RuntimeError) as error:
        if "No space left" in str(error) or "errno = 28" in str(error):
            raise UserError(f"{path}: no space left on the device: free some, or write elsewhere") from error
        raise
    finally:
        _remove(partial)


def write_dataset(dataset: xr.Dataset, path: str | os.PathLike, attrs: Mapping[str, Any] | None = None) -> None:
    """Write ``.zarr`` (v3; sharded when it has many chunks) or ``.nc`` (NetCDF-4, compressed), whole or not at all.

    Times are float64 seconds since 1970, coordinates have no ``_FillValue``; ``attrs`` are added to the dataset's.
    """
    check_target(path)
    with atomic(path) as partial:
        _write(_prepare(dataset, attrs or {}), partial)


def check_target(path: str | os.PathLike) -> None:
    """Raise UserError unless ``path`` is a name that datasets can be written under; cheap, for before the work."""
    if Path(path).suffix not in (".zarr", ".nc"):
        raise UserError(f"cannot write {path}: expected a name that ends in .zarr or .nc")


def _prepare(dataset: xr.Dataset, attrs: Mapping[str, Any]) -> xr.Dataset:
    dataset = dataset.drop_encoding()
    merged = {**dataset.attrs, **attrs, "Conventions": "CF-1.11"}
    plain = (str, int, float, list, np.ndarray, np.generic)
    dataset.attrs = {key: value if isinstance(value, plain) else json.dumps(value) for key, value in merged.items()}
    return dataset


def _write(dataset: xr.Dataset, path: Path) -> None:
    if path.suffix == ".zarr":
        encoding = _encoding(dataset, True)
        for name, variable in dataset.data_vars.items():
            if variable.chunks is not None:  # read as it is written: every task writes whole shards
                whole = encoding[name].get("shards") or encoding[name]["chunks"]
                dataset[name] = variable.copy(data=variable.data.rechunk(whole))
        dataset.to_zarr(path, mode="w", zarr_format=3, encoding=encoding, consolidated=False, safe_chunks=False)
        consolidate(path)
    else:
        dataset.to_netcdf(path, engine="h5netcdf", encoding=_encoding(dataset, False))


def consolidate(path: Path) -> None:
    """Write the metadata of all arrays of a zarr group together, so that it opens with one read."""
    import zarr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(path)


def _encoding(dataset: xr.Dataset, zarr: bool) -> dict[Hashable, dict]:
    encoding: dict[Hashable, dict] = {}
    for name, variable in dataset.variables.items():
        entry: dict[str, Any] = {}
        if name in dataset.coords:
            entry["_FillValue"] = None
        if np.issubdtype(variable.dtype, np.datetime64):
            entry |= {"dtype": "float64", "units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"}
        elif np.issubdtype(variable.dtype, np.timedelta64):
            entry |= {"dtype": "float64", "units": "seconds"}
        if variable.ndim and variable.size:
            plain = variable.dtype.kind in "fiub"
            if zarr:
                chunks, shards = chunking(variable.dims, variable.shape, variable.dtype.itemsize)
                entry |= {"chunks": chunks} | ({"shards": shards} if shards else {})
            elif plain and name in dataset.data_vars:
                chunks, _ = chunking(variable.dims, variable.shape, variable.dtype.itemsize)
                entry |= {"zlib": True, "complevel": 4, "shuffle": True, "chunksizes": chunks}
        encoding[name] = entry
    return encoding


def chunking(dims: Iterable[Hashable], shape: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Chunks of about a MiB, whole in space first and then in time, and shards of about 64 MiB if the chunks are many."""
    dims = tuple(dims)
    order = sorted(range(len(dims)), key=lambda i: INNER_FIRST.index(dims[i]) if dims[i] in INNER_FIRST else len(INNER_FIRST))
    chunks, room = [1] * len(dims), CHUNK // itemsize
    for i in order:
        chunks[i] = max(1, min(shape[i], room))
        room //= chunks[i]
    counts = [-(-n // c) for n, c in zip(shape, chunks, strict=True)]
    if np.prod(counts) <= FEW_CHUNKS:
        return tuple(chunks), None
    shards, room = list(chunks), SHARD // (itemsize * int(np.prod(chunks)))
    for i in order:
        times = max(1, min(counts[i], room))
        shards[i] *= times
        room //= times
    return tuple(chunks), tuple(shards)


def _is_store(path: Path) -> bool:
    return not any(path.iterdir()) or any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _replace(partial: Path, path: Path) -> None:
    """Rename over what was there; a directory cannot be replaced in one step, so the old one steps aside first."""
    if not path.is_dir():
        partial.replace(path)
        return
    old = path.with_name(f".{path.stem}.old-{os.getpid()}{path.suffix}")
    path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        raise
    _remove(old)


# Provenance


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content; of a directory, its listing with sizes and the content of its metadata files."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{part.relative_to(path).as_posix()} {part.stat().st_size}\n".encode())
        if part.suffix == ".json" or part.name in (".zgroup", ".zattrs", ".zarray", ".zmetadata"):
            total.update(part.read_bytes())
    return total.hexdigest()


def provenance(config: Mapping[str, Any], seed: int | None, inputs: Iterable[str | os.PathLike] = ()) -> dict[str, Any]:
    """Attributes that say where an output comes from: version, configuration, seed, digests of its inputs."""
    if not isinstance(config, dict):
        from omegaconf import OmegaConf

        config = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
    attrs = {
        "source": f"appa_lite {__version__}",
        "appa_lite_version": __version__,
        "configuration": json.dumps(config, default=str),
        "inputs": json.dumps({Path(path).name: digest(path) for path in inputs}),
    }
    return attrs if seed is None else attrs | {"seed": seed}
