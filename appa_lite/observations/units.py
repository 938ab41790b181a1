"""The units that observations come in, and the conversions between those that measure the same thing."""

import re

_BASES = {  # canonical unit: (what it is compared in, scale, offset), base value = scale * value + offset
    "K": ("K", 1.0, 0.0),
    "degC": ("K", 1.0, 273.15),
    "degF": ("K", 5 / 9, 459.67 * 5 / 9),
    "Pa": ("Pa", 1.0, 0.0),
    "hPa": ("Pa", 100.0, 0.0),
    "kPa": ("Pa", 1000.0, 0.0),
    "dbar": ("Pa", 1e4, 0.0),
    "bar": ("Pa", 1e5, 0.0),
    "1": ("1", 1.0, 0.0),
    "%": ("1", 0.01, 0.0),
    "kg kg-1": ("1", 1.0, 0.0),
    "g kg-1": ("1", 1e-3, 0.0),
    "km": ("m", 1000.0, 0.0),
    "m": ("m", 1.0, 0.0),
    "cm": ("m", 0.01, 0.0),
    "mm": ("m", 1e-3, 0.0),
    "ft": ("m", 0.3048, 0.0),
    "m s-1": ("m s-1", 1.0, 0.0),
    "cm s-1": ("m s-1", 0.01, 0.0),
    "km h-1": ("m s-1", 1 / 3.6, 0.0),
    "knot": ("m s-1", 1852 / 3600, 0.0),
    "mm h-1": ("m s-1", 1e-3 / 3600, 0.0),
    "mm day-1": ("m s-1", 1e-3 / 86400, 0.0),
    "s": ("s", 1.0, 0.0),
    "h": ("s", 3600.0, 0.0),
    "day": ("s", 86400.0, 0.0),
    "degree": ("rad", 3.141592653589793 / 180, 0.0),
    "rad": ("rad", 1.0, 0.0),
}
_ALIASES = {
    "c": "degC", "°c": "degC", "celsius": "degC", "degree_celsius": "degC", "degrees_celsius": "degC", "deg_c": "degC", "degc": "degC",
    "f": "degF", "°f": "degF", "fahrenheit": "degF", "degf": "degF", "kelvin": "K", "k": "K", "degk": "K",
    "pascal": "Pa", "pa": "Pa", "hpa": "hPa", "mb": "hPa", "mbar": "hPa", "millibar": "hPa", "kpa": "kPa", "decibar": "dbar",
    "": "1", "-": "1", "dimensionless": "1", "fraction": "1", "percent": "%", "metre": "m", "meter": "m", "metres": "m", "meters": "m",
    "kt": "knot", "kts": "knot", "knots": "knot", "kmh-1": "km h-1", "degrees": "degree", "deg": "degree", "°": "degree",
    "radian": "rad", "radians": "rad",
}  # fmt: skip


def canonical(units: str) -> str:
    """One spelling per unit: ``m/s``, ``m s^-1`` and ``m s**-1`` become ``m s-1``, ``Celsius`` becomes ``degC``."""
    text = " ".join(str(units).replace("**", "").replace("^", "").replace(".", " ").split())
    text = re.sub(r"\s*/\s*([A-Za-z]+)(\d*)", lambda m: f" {m[1]}-{m[2] or 1}", text)
    text = re.sub(r"\bd-1", "day-1", re.sub(r"\bhr-1", "h-1", text))
    return _ALIASES.get(text.lower(), text)


def conversion(found: str, expected: str) -> tuple[float, float] | None:
    """(scale, offset) such that value in ``expected`` = scale * value in ``found`` + offset; None if there is none known."""
    found, expected = canonical(found), canonical(expected)
    if found == expected:
        return 1.0, 0.0
    if found not in _BASES or expected not in _BASES or _BASES[found][0] != _BASES[expected][0]:
        return None
    _, scale, offset = _BASES[found]
    _, to_scale, to_offset = _BASES[expected]
    return scale / to_scale, (offset - to_offset) / to_scale
