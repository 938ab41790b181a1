"""CF discrete sampling geometries in NetCDF to a long table and back (CF conventions, chapter 9).

Point, timeSeries, trajectory and profile files are read in every representation: orthogonal and incomplete
multidimensional arrays by broadcasting coordinates against each variable, contiguous and indexed ragged arrays by
first bringing what belongs to an instance (a station, a profile) to its samples.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.core.errors import UserError

ROLES = {  # canonical column: (standard names, names in lower case)
    "time": (("time",), ("time", "juld")),
    "latitude": (("latitude",), ("latitude", "lat")),
    "longitude": (("longitude",), ("longitude", "lon")),
    "y": (("projection_y_coordinate",), ("y",)),
    "x": (("projection_x_coordinate",), ("x",)),
    "level": (("depth", "height", "altitude", "air_pressure", "sea_water_pressure"), ("level", "depth", "pres", "z")),
    "elev": (("surface_altitude",), ("elev", "elevation", "station_altitude")),
    "station": (("platform_id", "platform_name"), ("station", "station_id", "station_name", "platform_number", "platform")),
}
FLAGS = ("_qc", "_QC", "_flag", "_quality_flag")
ERRORS = ("_error_std", "_error", "_ERROR", "_uncertainty")


def read(path: Path, wanted: tuple[str, ...] = ()) -> pd.DataFrame:
    """The long table of a NetCDF file; variables are those with a standard name (or else units), and ``wanted``.

    Values of one variable where the file says "missing" are kept as NaN; array padding (no time) is dropped.

    Raises:
        UserError: no times, no positions, no variables, or a calendar that is not the real one.
    """
    with xr.open_dataset(path, engine="netcdf4") as dataset:
        dataset = _flatten(dataset.load())
        if "variable" in dataset.variables and {"observation", "value"} & set(dataset.variables):
            return _long(dataset)
        roles = _roles(dataset)
        if "time" not in roles or not {"x", "longitude"} & set(roles):
            raise UserError(
                f"{path}: expected coordinates time and longitude, latitude (or x, y), found {', '.join(map(str, dataset.variables))}"
            )
        if dataset[roles["time"]].dtype.kind != "M":
            raise UserError(f"{path}: the times are not dates of the standard calendar: convert them first")
        names = _variables(dataset, roles, wanted)
        if not names:
            raise UserError(f"{path}: no variable has both a standard_name or units and the dimensions of the times")
        return pd.concat([_column(dataset, roles, name) for name in names], ignore_index=True)


def _flatten(dataset: xr.Dataset) -> xr.Dataset:
    """Ragged arrays with everything on the dimension of the samples."""
    for name, variable in dataset.variables.items():
        if "sample_dimension" in variable.attrs:
            sample, instance = variable.attrs["sample_dimension"], variable.dims[0]
            index = np.repeat(np.arange(variable.size), np.asarray(variable.values).astype(np.int64))
        elif "instance_dimension" in variable.attrs:
            sample, instance = variable.dims[0], variable.attrs["instance_dimension"]
            index = np.asarray(variable.values).astype(np.int64)
        else:
            continue
        dataset = dataset.drop_vars(name)
        return _flatten(dataset.isel({instance: xr.DataArray(index, dims=sample)}))
    return dataset


def _long(dataset: xr.Dataset) -> pd.DataFrame:
    """A file that is a long table already: one dimension, with the names of the variables in ``variable``."""
    (dim,) = dataset["variable"].dims
    return pd.DataFrame({str(n): _values(v) for n, v in dataset.variables.items() if v.dims == (dim,)})


def _roles(dataset: xr.Dataset) -> dict[str, str]:
    """Which variable gives the time, the coordinates, the level and the station."""
    roles = {}
    for role, (standard, names) in ROLES.items():
        found = [n for n, v in dataset.variables.items() if v.attrs.get("standard_name") in standard and not _ancillary(dataset, n)]
        found += [n for n in dataset.variables if str(n).lower() in names]
        if role == "station":
            found = [n for n, v in dataset.variables.items() if "cf_role" in v.attrs] + found
        if role == "level":
            found = [n for n, v in dataset.variables.items() if v.attrs.get("axis") == "Z"] + found
        if found:
            roles[role] = found[0]
    return roles


def _ancillary(dataset: xr.Dataset, name: str) -> bool:
    """Errors, flags and the like."""
    listed = {n for v in dataset.variables.values() for n in str(v.attrs.get("ancillary_variables", "")).split()}
    standard = str(dataset[name].attrs.get("standard_name", ""))
    return name in listed or " " in standard or standard.endswith("status_flag") or str(name).endswith(FLAGS + ERRORS)


def _variables(dataset: xr.Dataset, roles: dict[str, str], wanted: tuple[str, ...]) -> list[str]:
    """Names of what was measured."""
    needed = {d for role in ("time", "latitude", "longitude", "y", "x") if role in roles for d in dataset[roles[role]].dims}
    coordinates = [r for role, r in roles.items() if role != "level" or r not in wanted]
    numbers = [
        n for n, v in dataset.variables.items()
        if n not in coordinates and v.dtype.kind in "fiu" and needed <= set(v.dims) and not _ancillary(dataset, n)
        and not str(v.attrs.get("axis", "")) and str(v.attrs.get("standard_name")) not in ROLES["level"][0]
    ]  # fmt: skip
    named = [n for n in numbers if "standard_name" in dataset[n].attrs or n in wanted]
    return named or [n for n in numbers if "units" in dataset[n].attrs]


def _column(dataset: xr.Dataset, roles: dict[str, str], name: str) -> pd.DataFrame:
    """The long table of one variable."""
    target = dataset[name]
    columns = {role: dataset[r] for role, r in roles.items() if set(dataset[r].dims) <= set(target.dims)}
    for column, suffixes, marks in (("qc", FLAGS, ("status_flag",)), ("error_std", ERRORS, ("standard_error",))):
        listed = str(target.attrs.get("ancillary_variables", "")).split()
        listed = [n for n in listed if n in dataset and str(dataset[n].attrs.get("standard_name", "")).endswith(marks)]
        found = listed + [name + s for s in suffixes if name + s in dataset]
        if found and dataset[found[0]].dims == target.dims:
            columns[column] = dataset[found[0]]
    table = {"observation": _values(target.variable).ravel()}
    for column, array in columns.items():
        full = array.variable.set_dims({d: target.sizes[d] for d in target.dims if d not in array.dims} | dict(array.sizes))
        table[column] = _values(full.transpose(*target.dims)).ravel()
    table = pd.DataFrame({**table, "variable": name, "units": str(target.attrs.get("units", ""))})
    return table[table["time"].notna()]


def _values(variable: xr.Variable) -> np.ndarray:
    values = np.asarray(variable.values)
    if values.dtype.kind == "S" or values.dtype == object:
        return np.vectorize(lambda v: v.decode().strip() if isinstance(v, bytes) else v, otypes=[object])(values)
    return values


ATTRIBUTES = {
    "time": {"standard_name": "time", "axis": "T"},
    "latitude": {"standard_name": "latitude", "units": "degrees_north"},
    "longitude": {"standard_name": "longitude", "units": "degrees_east"},
    "y": {"standard_name": "projection_y_coordinate", "units": "m"},
    "x": {"standard_name": "projection_x_coordinate", "units": "m"},
    "elev": {"standard_name": "surface_altitude", "units": "m"},
    "observation": {"long_name": "observed value, in the units given by 'units' where there are any"},
    "error_std": {"long_name": "standard deviation of the error of the observation"},
    "variable": {"long_name": "name of the observed variable"},
}


def write(path: Path, table: pd.DataFrame) -> None:
    """A long table as a CF point file, one value per point; times in nanoseconds, nothing rounded."""
    place = [c for c in ("time", "latitude", "longitude", "y", "x") if c in table]
    dataset = xr.Dataset(attrs={"Conventions": "CF-1.8", "featureType": "point"})
    for name in table:
        values = table[name].to_numpy()
        if name == "time":
            values = values.astype("datetime64[ns]")
        elif values.dtype.kind not in "fiu":
            values = table[name].where(table[name].notna(), "").astype(str).to_numpy(dtype=object)
        dataset[name] = ("obs", values, dict(ATTRIBUTES.get(name, {})))
    dataset["observation"].attrs["coordinates"] = " ".join(place)
    encoding = {"time": {"units": "nanoseconds since 1970-01-01", "dtype": "int64"}}
    dataset.to_netcdf(path, engine="netcdf4", encoding={k: v for k, v in encoding.items() if k in dataset})
