"""Maps under a slider: truth, observations, mean, spread and members of every variable, at a few times."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from appa_lite.verification.figures import Scale, cell_aspect, image, label, mean_and_spread, near
from appa_lite.verification.grid import NUMBER, grid_dims
from appa_lite.verification.page import viewer
from appa_lite.verification.tables import duration

PANELS, VARIABLES = 8, 6


def analysis_maps(
    reanalysis: xr.Dataset, truth: xr.Dataset | None, other: xr.Dataset | None, observations: pd.DataFrame | None, frames: int
) -> str:
    """The reanalysis beside the truth, the observations around each time, and optimal interpolation."""
    times = reanalysis["time"].values
    if len(grid_dims(reanalysis)) == 1:
        return _hovmoeller(reanalysis, truth, observations)
    chosen = np.unique(np.linspace(0, len(times) - 1, min(frames, len(times))).round().astype(int))
    moments = times[chosen]
    half = np.median(np.diff(moments)) / 2 if len(moments) > 1 else np.timedelta64(1, "D")
    variables = []
    for name in _variables(reanalysis, observations):
        ensemble = reanalysis[name].isel(time=chosen).load()
        states = [("truth", _at(truth, name, moments)), ("optimal interpolation, mean", _at(other, name, moments))]
        variables.append(_variable(name, ensemble, dict(states), observations, moments, half))
    return viewer(
        {
            "labels": [_stamp(t, times) for t in moments],
            "aspect": _aspect(reanalysis),
            "start": len(moments) // 2,
            "variables": variables,
        }
    )


def forecast_maps(forecast: xr.Dataset, truth: xr.Dataset | None, frames: int) -> str:
    """The first forecast of a file, lead by lead, beside the truth."""
    start, leads = forecast["time"].values[0], forecast["prediction_timedelta"].values
    run = forecast.isel(time=0, drop=True)
    run = run.rename(prediction_timedelta="time").assign_coords(time=start + leads)
    if len(grid_dims(run)) == 1:
        return _hovmoeller(run, truth, None)
    chosen = np.unique(np.linspace(0, len(leads) - 1, min(frames, len(leads))).round().astype(int))
    moments = run["time"].values[chosen]
    variables = [
        _variable(n, run[n].isel(time=chosen).load(), {"truth": _at(truth, n, moments)}, None, moments, None) for n in _variables(run, None)
    ]
    labels = [f"{_stamp(start + leads[k], run['time'].values)} ({_ahead(leads[k])})" for k in chosen]
    return viewer({"labels": labels, "aspect": _aspect(run), "start": 0, "variables": variables})


def _variables(data: xr.Dataset, observations: pd.DataFrame | None) -> list[str]:
    """At most six, those that are observed first."""
    names = [str(n) for n, a in data.data_vars.items() if set(grid_dims(data)) <= set(a.dims) and "time" in a.dims]
    observed = set() if observations is None else set(observations["variable"].unique())
    return sorted(names, key=lambda n: (n not in observed, names.index(n)))[:VARIABLES]


def _at(data: xr.Dataset | None, name: str, moments: np.ndarray) -> xr.DataArray | None:
    """The mean state at the moments, missing where the data end; None when there is none."""
    if data is None or name not in data or not np.isin(moments, data["time"].values).any():
        return None
    state = mean_and_spread(data[name].sel(time=moments[np.isin(moments, data["time"].values)]))[0]
    return state.reindex(time=moments).load()


def _variable(
    name: str, ensemble: xr.DataArray, states: dict[str, xr.DataArray | None], observations: pd.DataFrame | None, moments: np.ndarray, half
) -> dict:
    """The panels of one variable, all but the spread on one colour scale."""
    dims, aspect = grid_dims(ensemble), cell_aspect(ensemble)
    mean, spread = mean_and_spread(ensemble)
    states = {title: state for title, state in states.items() if state is not None}
    scale = Scale.of(ensemble.values, *(s.values for s in states.values()))
    panels = [_panel(title, state, scale, dims, aspect) for title, state in states.items() if title == "truth"]
    if observations is not None:
        panels.append(_observed(name, observations, ensemble, scale, moments, half))
    panels.append(_panel("mean", mean, scale, dims, aspect))
    if spread is not None:
        panels.append(_panel("spread", spread, Scale.of(spread.values, spread=True), dims, aspect))
    rest = PANELS - len(panels) - (len(states) - ("truth" in states))
    for k in range(min(max(rest, 3), ensemble.sizes.get(NUMBER, 0))):
        panels.append(_panel(f"member {k + 1}", ensemble.isel({NUMBER: k}), scale, dims, aspect))
    panels += [_panel(title, state, scale, dims, aspect) for title, state in states.items() if title != "truth"]
    return {"label": label(ensemble), "panels": panels}


def _panel(title: str, states: xr.DataArray, scale: Scale, dims: tuple[str, ...], aspect: float) -> dict:
    pictures = [image(s, scale, aspect) if np.isfinite(s).any() else None for s in states.transpose("time", *dims).values]
    return {"title": title, "low": scale.low, "high": scale.high, "gradient": scale.gradient(), "frames": pictures}


def _observed(name: str, table: pd.DataFrame, like: xr.DataArray, scale: Scale, moments: np.ndarray, half: np.timedelta64) -> dict:
    """Positions coloured by value; hollow where only other variables were observed."""
    direct = bool((table["variable"] == name).any())
    points = []
    for moment in moments:
        part = near(table, name if direct else None, moment, half)
        part = part.iloc[np.unique(np.linspace(0, len(part) - 1, min(len(part), 600)).astype(int))] if len(part) else part
        paint = scale.hexes(part["observation"].to_numpy(dtype=np.float64)) if direct else [None] * len(part)
        across, up = _place(part, like)
        points.append([[round(a, 1), round(b, 1), colour] for a, b, colour in zip(across, up, paint, strict=True)])
    title = "observations" if direct else "observations (of other variables)"
    radius = 1.1 if max(len(p) for p in points) > 60 else 1.7
    return {"title": title, "low": scale.low, "high": scale.high, "gradient": scale.gradient(), "points": points, "radius": radius}


def _place(table: pd.DataFrame, like: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in a drawing 100 wide whose first row is at the bottom."""
    rows, columns = (like[d].values for d in grid_dims(like))
    y, x = (table[d].to_numpy(dtype=np.float64) for d in grid_dims(like))
    if "longitude" in like.dims:
        x = columns[0] + (x - columns[0] + 180) % 360 - 180 if np.ptp(columns) < 180 else columns[0] + (x - columns[0]) % 360
    dy, dx = ((v[-1] - v[0]) / (len(v) - 1) for v in (rows, columns))
    height = 100 / _aspect(like)
    return 100 * ((x - columns[0]) / dx + 0.5) / len(columns), height * (1 - ((y - rows[0]) / dy + 0.5) / len(rows))


def _aspect(data: xr.Dataset | xr.DataArray) -> float:
    """Width over height of the whole map."""
    like = data if isinstance(data, xr.DataArray) else next(iter(data.data_vars.values()))
    rows, columns = (data.sizes[d] for d in grid_dims(data))
    return round(columns / (rows * cell_aspect(like)), 4)


def _hovmoeller(data: xr.Dataset, truth: xr.Dataset | None, observations: pd.DataFrame | None) -> str:
    """A ring: position across, time upwards, one picture each."""
    dim, moments, variables = grid_dims(data)[0], data["time"].values, []
    chosen = np.unique(np.linspace(0, len(moments) - 1, min(240, len(moments))).round().astype(int))
    moments = moments[chosen]
    for name in _variables(data, observations):
        ensemble = data[name].isel(time=chosen).load()
        mean, spread = mean_and_spread(ensemble)
        known = _at(truth, name, moments)
        scale = Scale.of(ensemble.values, *([known.values] if known is not None else []))
        states: Sequence[tuple[str, xr.DataArray | None, Scale]] = [
            ("truth", known, scale),
            ("mean", mean, scale),
            ("spread", spread, scale if spread is None else Scale.of(spread.values, spread=True)),
            *((f"member {k + 1}", ensemble.isel({NUMBER: k}), scale) for k in range(min(5, ensemble.sizes.get(NUMBER, 0)))),
        ]
        panels = []
        for title, state, shown in states:
            if state is not None:
                picture = image(state.transpose("time", dim).values, shown, ensemble.sizes[dim] / len(moments))
                panels.append({"title": title, "low": shown.low, "high": shown.high, "gradient": shown.gradient(), "frames": [picture]})
        if observations is not None:
            panels.insert(int(known is not None), _observed_ring(name, observations, ensemble, scale))
        variables.append({"label": f"{label(ensemble)}: position across, time upwards", "panels": panels})
    return viewer({"labels": [""], "aspect": 1.0, "start": 0, "variables": variables})


def _observed_ring(name: str, table: pd.DataFrame, like: xr.DataArray, scale: Scale) -> dict:
    """Observations of a ring, at most 1500 of them, in space and time."""
    times, x = like["time"].values, like["x"].values
    part = table[(table["variable"] == name) & (table["time"] >= times[0]) & (table["time"] <= times[-1])]
    part = part.iloc[np.unique(np.linspace(0, max(len(part) - 1, 0), min(len(part), 1500)).astype(int))]
    up = (part["time"].to_numpy() - times[0]) / max(times[-1] - times[0], np.timedelta64(1, "ns"))
    across = (part["x"].to_numpy(dtype=np.float64) - x[0]) / (np.ptp(x) or 1.0)
    size = np.array([len(x), len(times)])
    places = 100 * (np.stack([across, 1 - up], axis=-1) * (size - 1) + 0.5) / size
    colour = scale.hexes(part["observation"].to_numpy(dtype=np.float64))
    points = [[round(float(a), 1), round(float(b), 1), c] for (a, b), c in zip(places, colour, strict=True)]
    shared = {"low": scale.low, "high": scale.high, "gradient": scale.gradient()}
    return {"title": "observations", **shared, "points": [points], "radius": 0.9}


def _ahead(lead: np.timedelta64) -> str:
    seconds = float(lead / np.timedelta64(1, "s"))
    return f"+{duration(seconds)}" if seconds else "initial"


def _stamp(time: np.datetime64, times: np.ndarray) -> str:
    hourly = len(times) > 1 and np.min(np.diff(times)) < np.timedelta64(1, "D")
    return f"{pd.Timestamp(time):{'%-d %b %Y %H:%M' if hourly else '%-d %b %Y'}}"
