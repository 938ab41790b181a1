"""Specific humidity from what stations report: relative humidity, temperature and pressure at the same time and place.

Sources: saturation vapour pressure, Bolton (1980), The computation of equivalent potential temperature, Mon. Wea. Rev. 108,
eq. 10 (within 0.1 % from -30 to 35 degrees Celsius); pressure at the station from that at mean sea level by the
hydrostatic equation with the lapse rate of the standard atmosphere (WMO-No. 8, part I, chapter 3).
"""

import numpy as np
import pandas as pd

from appa_lite.core.errors import UserError
from appa_lite.observations.options import Humidity, flag
from appa_lite.observations.units import conversion

EPSILON = 0.62198  # ratio of the gas constants of dry air and of water vapour
GAS_CONSTANT = 287.05  # of dry air, J kg-1 K-1
GRAVITY = 9.80665  # m s-2
LAPSE_RATE = 0.0065  # K m-1


def saturation_pressure(temperature: np.ndarray) -> np.ndarray:
    """e_s = 611.2 Pa exp(17.67 t / (t + 243.5)), over water, t in degrees Celsius; ``temperature`` in K, result in Pa."""
    t = np.asarray(temperature, dtype=np.float64) - 273.15
    return 611.2 * np.exp(17.67 * t / (t + 243.5))


def station_pressure(sea_level: np.ndarray, temperature: np.ndarray, elevation: np.ndarray) -> np.ndarray:
    """p = p_0 (1 - L z / (T + L z))^(g / (R L)), in the units of ``sea_level``; T in K and z in m, both at the station."""
    drop = LAPSE_RATE * np.asarray(elevation, dtype=np.float64)
    return sea_level * (1 - drop / (temperature + drop)) ** (GRAVITY / (GAS_CONSTANT * LAPSE_RATE))


def specific_humidity(relative: np.ndarray, temperature: np.ndarray, pressure: np.ndarray) -> np.ndarray:
    """q = epsilon e / (p - (1 - epsilon) e), e = relative e_s(T), in kg kg-1; relative humidity as a fraction, K, Pa."""
    vapour = relative * saturation_pressure(temperature)
    return EPSILON * vapour / (pressure - (1 - EPSILON) * vapour)


def add_specific_humidity(table: pd.DataFrame, rule: Humidity, good_qc: tuple[str, ...] = ("0", "1")) -> pd.DataFrame:
    """The table with the rows of relative humidity turned into rows of specific humidity, all other rows unchanged.

    A row whose temperature or pressure is missing or flagged becomes a missing value, which is counted when the table is
    used. A table that holds ``rule.name`` and no relative humidity is returned as it is.

    Args:
        table: canonical, as `read_table` returns it; stations are told apart by ``station``, or by their position.
        rule: the names of the variables; good_qc: flags that are accepted.

    Raises:
        UserError: a variable is absent, comes in units that are not known, or pressure at sea level has no elevation to leave from.
    """
    rows = {key: table[table["variable"] == getattr(rule, key)] for key in ("relative_humidity", "temperature", "pressure")}
    if rows["relative_humidity"].empty and (table["variable"] == rule.name).any():
        return table
    absent = [f"{key.replace('_', ' ')} '{getattr(rule, key)}'" for key, part in rows.items() if part.empty]
    if absent:
        found = ", ".join(sorted(map(str, table["variable"].unique())))
        raise UserError(f"specific_humidity: the observations have no {' and no '.join(absent)}; they have {found}")
    if rule.reduced and "elev" not in table:
        raise UserError("specific_humidity: pressure at sea level needs a column 'elev'; set reduced=false if it is at the station")
    moist = rows["relative_humidity"]
    relative = _converted(moist, "1")
    temperature, pressure = (_partner(moist, rows[key], units, good_qc) for key, units in (("temperature", "K"), ("pressure", "Pa")))
    if rule.reduced:
        pressure = station_pressure(pressure, temperature, moist["elev"].to_numpy(np.float64))
    values = specific_humidity(relative, temperature, pressure)
    changed = {"variable": rule.name, "observation": np.where(np.isfinite(values), values, np.nan), "error_std": np.nan, "units": "kg kg-1"}
    out = pd.concat([table.drop(moist.index), moist.assign(**changed)])
    return out.sort_index().reset_index(drop=True)


def _converted(rows: pd.DataFrame, units: str) -> np.ndarray:
    """The values (N,) in ``units``; a file without units is taken at its word."""
    values = rows["observation"].to_numpy(np.float64, copy=True)
    for found, part in rows.reset_index(drop=True).groupby("units").indices.items() if "units" in rows else ():
        change = conversion(found, units) if found else (1.0, 0.0)
        if change is None:
            raise UserError(f"specific_humidity: '{rows['variable'].iloc[0]}' is in '{found}', expected '{units}'")
        values[part] = values[part] * change[0] + change[1]
    return values


def _place(rows: pd.DataFrame) -> list[str]:
    """The columns that tell stations apart."""
    if "station" in rows:
        return ["station"]
    return [c for c in ("latitude", "longitude", "y", "x") if c in rows]


def _partner(rows: pd.DataFrame, others: pd.DataFrame, units: str, good_qc: tuple[str, ...]) -> np.ndarray:
    """Values (N,) of another variable at the times and places of ``rows``, NaN where there is none that is accepted."""
    keys = ["time", *_place(rows)]
    values = pd.Series(_converted(others, units), index=others.index)
    if "qc" in others:
        values = values.where(others["qc"].map(flag).isin(["", *good_qc]))
    known = others[keys].assign(value=values).dropna(subset=["value"]).groupby(keys, as_index=False)["value"].mean()
    return rows[keys].merge(known, on=keys, how="left")["value"].to_numpy(np.float64)
