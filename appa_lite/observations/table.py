"""Observation files in and out: Parquet, CSV and NetCDF to one long pandas table, one row per value.

Columns: ``time`` (datetime64[ns], UTC), the coordinates (``latitude, longitude``; ``y, x``; ``x``), ``variable``,
``observation``, ``error_std`` (NaN where the file has none), and, where the file has them, ``units, level, elev,
station, type, source, qc, bias, half_width, radius``.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from appa_lite.core.errors import UserError
from appa_lite.core.store import atomic
from appa_lite.observations import discrete
from appa_lite.observations.options import TableOptions

ALIASES = {  # canonical column: what files call it, in lower case, in order of preference
    "time": ("time", "valid_time", "datetime", "timeobs", "obs_time", "date_time", "timestamp", "date", "juld"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon", "long"),
    "y": ("y",),
    "x": ("x",),
    "variable": ("variable", "variable_name", "element", "varname"),
    "observation": ("observation", "value", "obs", "data_value"),
    "error_std": ("error_std", "obs_error", "sigma"),
    "units": ("units", "unit"),
    "level": ("level", "depth"),
    "elev": ("elev", "elevation", "altitude", "alt"),
    "station": ("station", "station_id", "station_name", "stationname", "platform_number", "wmo_id", "id"),
    "type": ("type", "report_type", "reporttype"),
    "source": ("source",),
    "qc": ("qc", "qc_flag", "quality_flag", "q_flag"),
    "bias": ("bias",),
    "half_width": ("half_width",),
    "radius": ("radius",),
}
TEXT = ("variable", "units", "station", "type", "source", "qc")
ORDER = ("time", "latitude", "longitude", "y", "x", "level", "variable", "station", "half_width", "radius", "observation", "error_std")


def read_table(path: str | Path, options: TableOptions | Mapping | None = None) -> pd.DataFrame:
    """The canonical table of an observation file, by its ending (.parquet, .csv, .nc).

    A file with one column per variable is accepted when ``options.variables`` names the columns to take. Values,
    names and units stay those of the file: `build_observation` converts them.

    Raises:
        UserError: no such file, an ending or content that cannot be read, or columns missing.
    """
    path, options = Path(path), TableOptions.parse(options)
    readers = {".parquet": pd.read_parquet, ".csv": _read_csv, ".nc": lambda p: discrete.read(p, tuple(options.variables))}
    if path.suffix not in readers:
        raise UserError(f"{path}: expected observations in .parquet, .csv or .nc, found '{path.suffix}': convert it first")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        table = readers[path.suffix](path)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())[:200]}") from error
    return canonical(table, options, str(path))


def _read_csv(path: Path) -> pd.DataFrame:
    names = pd.read_csv(path, nrows=0).columns
    text = {n: str for n in names if any(n.strip().lower() in ALIASES[c] for c in TEXT)}
    return pd.read_csv(path, dtype=text, skipinitialspace=True)


def canonical(table: pd.DataFrame, options: TableOptions | Mapping | None = None, where: str = "observations") -> pd.DataFrame:
    """A table with canonical names and types, rows and units unchanged. Applying it twice changes nothing.

    Raises:
        UserError: columns missing, or times that cannot be understood.
    """
    options = TableOptions.parse(options)
    table = table.reset_index(drop=True).rename(columns=dict(options.columns))
    table = table.rename(columns=_aliases(table, taken=tuple(options.variables)))
    if "variable" not in table:
        table = _melt(table, options, where)
    missing = [c for c in ("time", "variable", "observation") if c not in table]
    if "x" not in table and not {"latitude", "longitude"} <= set(table):
        missing.append("lat and lon (or y and x, or x)")
    if missing:
        raise UserError(f"{where}: no column {', '.join(missing)}; found {', '.join(map(str, table.columns))}; name them in 'columns'")
    columns = {"time": _times(table["time"], where)}
    for name in ALIASES:
        if name in table and name != "time":
            columns[name] = _text(table[name]) if name in TEXT else pd.to_numeric(table[name], errors="coerce").astype(np.float64)
    columns.setdefault("error_std", pd.Series(np.nan, index=table.index))
    return pd.DataFrame({name: columns[name] for name in ALIASES if name in columns})


def _aliases(table: pd.DataFrame, taken: tuple[str, ...]) -> dict[str, str]:
    lower = {str(c).strip().lower(): c for c in reversed(table.columns) if c not in taken}
    found = {name: next((lower[a] for a in aliases if a in lower), None) for name, aliases in ALIASES.items()}
    return {column: name for name, column in found.items() if column is not None and (name == column or name not in table)}


def _melt(table: pd.DataFrame, options: TableOptions, where: str) -> pd.DataFrame:
    """One row per value, of a table with one column per variable."""
    named = [c for c in options.variables if c in table]
    if not named:
        raise UserError(
            f"{where}: expected a column 'variable', or a column for each of the names in 'variables'; "
            f"found {', '.join(map(str, table.columns[:12]))}{' ...' if len(table.columns) > 12 else ''}"
        )
    keep = [c for c in ALIASES if c in table and c not in ("observation", "units", "variable")]
    return table.melt(id_vars=keep, value_vars=named, var_name="variable", value_name="observation")


def _text(column: pd.Series) -> pd.Series:
    text = column.map(lambda v: v.decode() if isinstance(v, bytes) else v)
    return text.where(text.notna(), "").astype(str).str.strip().astype(object)


def _times(column: pd.Series, where: str) -> pd.Series:
    """datetime64[ns] in UTC; numbers only when they are dates such as 20200228."""
    if pd.api.types.is_numeric_dtype(column):
        days = column.dropna()
        if not ((days >= 1_000_01_01) & (days <= 3000_12_31) & (days % 1 == 0)).all():
            raise UserError(f"{where}: the times are numbers ({column.iloc[0]}): give dates such as 2017-01-31T12:00:00Z")
        column = column.map(lambda day: "" if pd.isna(day) else str(int(day)))
    elif column.dtype == object or pd.api.types.is_string_dtype(column):
        column = column.map(lambda v: v if isinstance(v, str) else "" if pd.isna(v) else str(v))
    try:
        times = pd.to_datetime(column, utc=True, errors="coerce", **({} if _is_time(column) else {"format": "ISO8601"}))
        times = times.dt.tz_localize(None).astype("datetime64[ns]")
    except (ValueError, OverflowError, TypeError) as error:
        raise UserError(f"{where}: the times cannot be read: {error}") from error
    if len(times) and times.isna().all():
        raise UserError(f"{where}: no time can be read, such as '{column.iloc[0]}': expected 2017-01-31T12:00:00Z")
    return times


def _is_time(column: pd.Series) -> bool:
    return pd.api.types.is_datetime64_any_dtype(column)


def sort(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by time, position, variable, station and value, so that the order of a file does not matter."""
    return table.sort_values([c for c in ORDER if c in table], kind="stable", ignore_index=True)


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Writes a table by its ending (.parquet, .csv, .nc); the final name appears only once the file is whole.

    Raises:
        UserError: another ending, or a place that cannot be written to.
    """
    path = Path(path)
    writers = {
        ".parquet": lambda p: table.to_parquet(p, index=False),
        ".csv": lambda p: table.to_csv(p, index=False, date_format="%Y-%m-%dT%H:%M:%S.%fZ"),
        ".nc": lambda p: discrete.write(p, table),
    }
    if path.suffix not in writers:
        raise UserError(f"{path}: expected an ending .parquet, .csv or .nc for observations, got '{path.suffix}'")
    with atomic(path) as temporary:
        writers[path.suffix](temporary)
