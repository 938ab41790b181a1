"""How a table of observations is to be read: the keys of ``configs/observations/*.yaml`` beside ``networks``."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches

from appa_lite.core.errors import UserError
from appa_lite.observations.correlation import ErrorCorrelation


@dataclass(frozen=True)
class Renaming:
    """One entry of ``variables``: value in the dataset's variable ``name`` = scale * value in the file + offset.

    ``error_std`` is the default, in the dataset's units; ``level`` (low, high) keeps only the rows between the two.
    With a scale or an offset, the file's own units are not looked at.
    """

    name: str
    scale: float | None = None
    offset: float | None = None
    error_std: float | None = None
    level: tuple[float, float] | None = None


@dataclass(frozen=True)
class Elevation:
    """Correction for stations above or below the model's ground: A(x) - lapse_rate * (elev - grid elevation).

    Args:
        variable: what decreases with height.
        lapse_rate: its units per metre.
        grid_elevation: NetCDF or zarr file with the elevation (m) of the grid's cells; None if the fields are at 0 m.
    """

    variable: str
    lapse_rate: float = 0.0065
    grid_elevation: str | None = None


@dataclass(frozen=True)
class Humidity:
    """Specific humidity from simultaneous reports of a station, named as in the file (see `humidity`).

    Args:
        relative_humidity, temperature, pressure: what they are called in the file.
        name: what the result is called in the dataset.
        reduced: the pressure is that at mean sea level; False: at the station.
    """

    relative_humidity: str
    temperature: str
    pressure: str
    name: str
    reduced: bool = True


@dataclass(frozen=True)
class TableOptions:
    """Options of `read_table` and `build_observation`.

    Args:
        time_interpolation: ``linear`` or ``nearest``.
        variables: {name in the file: {name, scale, offset, error_std, level}}.
        elevation: {variable, lapse_rate, grid_elevation}, or None.
        specific_humidity: {relative_humidity, temperature, pressure, name, reduced}, or None.
        columns: {name in the file: time, latitude, ..., observation}, for files with names of their own.
        good_qc: flags that are accepted; no flag always is.
        reach: cells; how far the nearest existing cell may be from a point whose four neighbours are missing.
        error_correlation: {type or variable: {length, time, kernel, share, by}}, see `correlation`.
        student_t: degrees of freedom of errors with heavier tails than normal ones, of scale error_std; None: normal errors.
    """

    time_interpolation: str = "linear"
    variables: Mapping[str, Renaming] = field(default_factory=dict)
    elevation: Elevation | None = None
    specific_humidity: Humidity | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    good_qc: tuple[str, ...] = ("0", "1")
    reach: float = 1.5
    error_correlation: Mapping[str, ErrorCorrelation] = field(default_factory=dict)
    student_t: float | None = None

    @classmethod
    def parse(cls, options: "TableOptions | Mapping | None") -> "TableOptions":
        """Options of a configuration; the key ``networks`` belongs to someone else and is passed over.

        Raises:
            UserError: unknown key.
        """
        if isinstance(options, TableOptions):
            return options
        options = {k: v for k, v in (options or {}).items() if k != "networks"}
        _check(options, cls, "observations")
        if options.get("variables"):
            options["variables"] = {k: _entry({"name": k, **(v or {})}, Renaming, k) for k, v in options["variables"].items()}
        if options.get("elevation"):
            options["elevation"] = _entry(options["elevation"], Elevation, "elevation")
        if options.get("specific_humidity"):
            options["specific_humidity"] = _entry(options["specific_humidity"], Humidity, "specific_humidity")
        if options.get("error_correlation"):
            options["error_correlation"] = {k: _correlation(k, v) for k, v in options["error_correlation"].items()}
        if options.get("student_t") is not None and not float(options["student_t"]) > 0:
            raise UserError(f"observations: student_t={options['student_t']} must be a positive number of degrees of freedom")
        if options.get("student_t") is not None and options.get("error_correlation"):
            raise UserError("observations: errors are either correlated or Student-t distributed: give error_correlation or student_t")
        if "good_qc" in options:
            options["good_qc"] = tuple(flag(q) for q in options["good_qc"] or ())
        return cls(**{k: v for k, v in options.items() if v is not None})

    def renaming(self, name: str) -> Renaming:
        return self.variables.get(name, Renaming(name))


def flag(value: object) -> str:
    """A quality flag as text: 1, 1.0, '1' and b'1' are the same."""
    text = (value.decode() if isinstance(value, bytes) else str(value)).strip()
    text = text.removesuffix(".0")
    return "" if text.lower() in ("nan", "none", "<na>") else text


def _correlation(name: str, values: Mapping) -> ErrorCorrelation:
    entry = {**(values or {})}
    if "by" in entry:
        entry["by"] = (entry["by"],) if isinstance(entry["by"], str) else tuple(entry["by"])
    return _entry(entry, ErrorCorrelation, f"error_correlation.{name}")


def _entry(values: Mapping, kind: type, where: str) -> object:
    _check(values, kind, where)
    absent = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if absent:
        raise UserError(f"{where} needs {', '.join(absent)}")
    return kind(**values)


def _check(values: Mapping | Sequence[str], kind: type, where: str) -> None:
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            raise UserError(
                f"{where}: unknown key '{key}'" + (f", did you mean '{close[0]}'?" if close else f", known: {', '.join(known)}")
            )
