"""What launch/radar_rain.sh found: python launch/radar_rain_report.py DATA OUT

Writes beside the forecasts in OUT

    nowcasts.json       scores of each episode's domains in one table, and their range from domain to domain
    law.json            wet share, quantiles and maxima of the model's own rain beside the three episodes observed
    return_levels.json  hourly rain of Amsterdam (DATA/data_Radar_grid_cell_vals.csv): levels, and one year beside the next
    nowcasts.png        a nowcast, and law.png: exceedances and spectra

Two or three domains of one weather system: no interval is computed from them, only the lowest and the highest are told.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from scipy.stats import beta

from appa_lite.config import compose
from appa_lite.core.store import atomic
from appa_lite.forecasters.base import Assimilator
from appa_lite.stages.prior import competitor
from appa_lite.verification.extreme_values import fit_series
from appa_lite.verification.return_levels import compare_return_levels
from appa_lite.verification.spectra import power_spectrum

SYSTEMS = ("latent_diffusion", "advection", "persistence", "climatology")
MEANS = ("bias", "mae", "crps_fair", "twcrps", "brier")  # of everything compared
SQUARED = ("rmse", "spread")  # their squares are means
COUNTS = ("events", "independent_events")
LEVELS = (1.0, 5.0, 10.0, 20.0)  # mm/h
HOURS = {"month": 720, "year": 8766, "two years": 17532, "ten years": 87660}
WINDOWS, FRAMES = 64, 8  # of the model's own rain


# Nowcasts


def pooled(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One value per (episode, system, metric, lead): that of all the episode's domains; ``low, high``: of single domains.

    Args:
        tables: of ``appa-lite verify``, by episode and number of the domain, such as ``night0``.
    """
    rows = pd.concat([table.assign(episode=name.rstrip("0123456789"), domain=name) for name, table in tables.items()])
    rows = rows[rows["system"].isin(SYSTEMS) & (rows["variable"] == "rain") & (rows["lead_time"] > 0)].dropna(subset="value")
    error = rows[rows["metric"] == "rmse"].set_index(["system", "lead_time", "domain"])["value"] ** 2
    out = []
    for (episode, system, metric, lead), group in rows.groupby(["episode", "system", "metric", "lead_time"], sort=False):
        weight, value, kind = group["count"].to_numpy(float), group["value"].to_numpy(float), metric.split("_q")[0]
        if kind in SQUARED:
            whole = np.sqrt(np.average(value**2, weights=weight))
        elif kind == "spread_skill":
            squares = error.loc[[(system, lead, domain) for domain in group["domain"]]].to_numpy()
            whole = np.sqrt(np.average(value**2 * squares, weights=weight) / np.average(squares, weights=weight))
        elif kind in MEANS:
            whole = np.average(value, weights=weight)
        elif kind in COUNTS:
            whole = value.sum()
        else:
            continue
        row = {"episode": episode, "system": system, "variable": "rain", "metric": metric, "lead_time": lead, "value": float(whole)}
        out.append(row | {"low": value.min(), "high": value.max(), "count": int(weight.sum()), "domains": len(group)})
    return pd.DataFrame(out)


# The law


def drawn(model: Path, windows: int = WINDOWS, *choices: str) -> np.ndarray:
    """Rain (N, T, H, W) of the model with nothing observed."""
    given = ["experiment=radar_rain", f"checkpoint={model}", "observations=none", "out=none", "forecaster=latent_diffusion", "device=cpu"]
    cfg = compose("reanalysis", [*given, *choices])
    prior, setting = competitor(cfg, Assimilator)
    times = np.datetime64("2016-08-28T10:00", "ns") + np.arange(FRAMES) * np.timedelta64(int(setting.spec.step), "s")
    return prior.assimilate(None, times, range(windows), cfg.seed)[:, :, 0].double().numpy()


def observed(data: Path) -> dict[str, np.ndarray]:
    """Rain (N, T, H, W) of disjoint domains in the three episodes, those of the training in one orientation."""
    train = xr.open_zarr(data / "train.zarr")
    train = train.isel(trajectory=slice(train.sizes["trajectory"] // 8))
    places = np.stack([train[name].values for name in ("region", "row", "column")], 1)
    kept: list[int] = []
    for i, place in enumerate(places):
        apart = [bool(place[0] != places[j, 0]) or abs(place[1:] - places[j, 1:]).max() >= train.sizes["y"] for j in kept]
        kept += [i] if all(apart) else []
    episodes = {"morning": train["rain"].values[kept]}
    return episodes | {name: xr.open_zarr(data / f"{name}.zarr")["rain"].values for name in ("afternoon", "night")}


def law(episodes: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Wet share, quantiles where it is wet, and how many domains have a maximum above a level, with its exact 90 % interval."""
    rows = []
    for system, rain in episodes.items():
        wet = rain[rain > 0.1]
        rows.append({"system": system, "quantity": "wet share", "level": 0.1, "value": wet.size / rain.size, "domains": len(rain)})
        rows += [
            {"system": system, "quantity": "quantile", "level": q, "value": np.quantile(wet, q), "domains": len(rain)}
            for q in (0.5, 0.9, 0.99, 0.999)
        ]
        top = rain[:, 0].max((1, 2))
        for level in LEVELS:
            k, n = int((top > level).sum()), len(top)
            ends = (beta.ppf(0.05, k, n - k + 1) if k else 0.0), (beta.ppf(0.95, k + 1, n - k) if k < n else 1.0)
            rows.append(
                {
                    "system": system,
                    "quantity": "maximum above",
                    "level": level,
                    "value": k / n,
                    "low": ends[0],
                    "high": ends[1],
                    "domains": n,
                }
            )
    return pd.DataFrame(rows)


def spectrum(rain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wavenumbers (cycles per km) and mean power of the fields."""
    wavenumbers, power = power_spectrum(rain.reshape(-1, *rain.shape[-2:]), (2.224, 2.3), (False, False))
    return wavenumbers, power.mean(0)


# A longer record


def amsterdam(path: Path) -> pd.DataFrame:
    """Return levels of an hour's rain (mm) at a pixel, from 19 pixels and 25 months, and of the first year beside the second."""
    table = pd.read_csv(path, sep=";", index_col=0, parse_dates=True)
    rain = table.where(table >= 0).to_numpy().T[None]  # (run, pixel, hour)
    rain = rain[:, ~np.isnan(rain).all((0, 2))]
    tail, rows = fit_series(rain, 0.99), []
    rows.append(
        {
            "quantity": "shape",
            "system": "25 months",
            "value": tail.shape,
            "low": tail.shape - 1.645 * tail.shape_se,
            "high": tail.shape + 1.645 * tail.shape_se,
            "events": tail.exceedances,
        }
    )
    for period in HOURS.values():
        level = tail.profile(1 / period, 0.9)
        rows.append(
            {
                "quantity": "return_level",
                "period": period,
                "system": "25 months",
                "value": level.value,
                "low": level.low,
                "high": level.high,
                "events": tail.exceedances,
            }
        )
    names = {"model": "first year", "truth": "second year"}
    halves = compare_return_levels(rain[..., :8760], rain[..., 8760:17520], list(HOURS.values()), 0.99, confidence=0.9)
    return pd.DataFrame(rows + [row | {"system": names.get(row["system"], row["system"])} for row in halves])


# Pictures

BOUNDS = [0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32]


def nowcast_picture(truth: xr.DataArray, forecasts: Mapping[str, xr.DataArray]) -> Figure:
    """What was observed (time, y, x), and forecasts (prediction_timedelta, y, x), at the leads that were observed."""
    first = next(iter(forecasts.values()))
    start = first["time"].values
    leads = [lead for lead in first["prediction_timedelta"].values if start + lead in truth["time"].values]
    figure = Figure(figsize=(2.1 * len(leads) + 1, 2.1 * len(forecasts) + 2.6), dpi=80, layout="constrained")
    axes = figure.subplots(1 + len(forecasts), len(leads), squeeze=False)
    colours = BoundaryNorm(BOUNDS, 256, extend="max")
    for line, (name, fields) in zip(axes, {"observed": truth, **forecasts}.items(), strict=True):
        for axis, lead in zip(line, leads, strict=True):
            field = (truth.sel(time=start + lead) if name == "observed" else fields.sel(prediction_timedelta=lead)).values
            shown = np.where(field >= BOUNDS[0], field, np.nan)
            image = axis.imshow(shown, norm=colours, cmap="turbo", origin="lower", interpolation="nearest")
            axis.set(xticks=[], yticks=[], facecolor="0.95")
            if name == "observed":
                axis.set_title(f"+{int(lead / np.timedelta64(1, 'm'))} min", fontsize=9)
        line[0].set_ylabel(name, fontsize=9)
    figure.colorbar(image, ax=axes, label="rain (mm/h)", shrink=0.5)
    figure.suptitle(f"from {str(start)[:16]} UTC, 142 x 147 km of south-east France", fontsize=10)
    return figure


def nowcast(out: Path, case: str = "night0") -> Figure:
    """Two members, their mean and advection, from the case's first initial time."""
    ours, drifted = (
        xr.open_dataset(out / name, decode_timedelta=True)["rain"].isel(time=0) for name in (f"{case}.nc", f"{case}_advection.nc")
    )
    truth = xr.open_zarr(out / "data" / f"{case[:-1]}_truth.zarr")["rain"].isel(trajectory=int(case[-1]))
    members = {f"member {number}": ours.isel(number=number) for number in (0, 1)}
    return nowcast_picture(truth, members | {"mean of members": ours.mean("number"), "advection": drifted.isel(number=0)})


def law_picture(episodes: Mapping[str, np.ndarray]) -> Figure:
    """P(rain > r) and mean spectra, the model's with the 90 % range of resampled windows."""
    figure = Figure(figsize=(9, 3.6), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = np.geomspace(0.1, 60, 60)
    choose = np.random.default_rng(0)
    for number, (name, rain) in enumerate(episodes.items(), 1):
        colour = f"C{number}"
        each = np.stack([1 - np.searchsorted(np.sort(r.ravel()), levels, "right") / r.size for r in rain])
        left.loglog(levels, np.where(each.mean(0) > 0, each.mean(0), np.nan), color=colour, label=f"{name}: {len(rain)} domains")
        right.loglog(*spectrum(rain), color=colour)
        if name == "model":
            again = np.stack([each[choose.integers(0, len(each), len(each))].mean(0) for _ in range(500)])
            left.fill_between(levels, *np.quantile(again, (0.05, 0.95), axis=0), color=colour, alpha=0.25, linewidth=0)
    left.set(xlabel="r (mm/h)", ylabel="P(rain > r), all cells", ylim=(1e-7, 1))
    right.set(xlabel="cycles per km", ylabel="power (mm²/h²)")
    left.legend(frameon=False, fontsize=8)
    return figure


def save(out: Path, tables: Mapping[str, pd.DataFrame], pictures: Mapping[str, Figure]) -> None:
    for name, table in tables.items():
        with atomic(out / f"{name}.json") as partial:
            partial.write_text(json.dumps(json.loads(table.to_json(orient="records")), indent=1))
        sys.stdout.write(f"\n{name}\n{table.to_string(index=False, float_format='%.4g')}\n")
    for name, figure in pictures.items():
        with atomic(out / f"{name}.png") as partial:
            figure.savefig(partial, facecolor="white")


def main(data: Path, out: Path) -> None:
    torch.set_grad_enabled(False)
    tables = {path.stem: pd.DataFrame(json.loads(path.read_text())) for path in sorted((out / "scores").glob("*[0-9].json"))}
    episodes = observed(out / "data") | {"model": drawn(out / "denoiser" / "model")}
    results = {"nowcasts": pooled(tables), "law": law(episodes)}
    if (data / "data_Radar_grid_cell_vals.csv").exists():
        results["return_levels"] = amsterdam(data / "data_Radar_grid_cell_vals.csv")
    save(out, results, {"nowcasts": nowcast(out), "law": law_picture(episodes)})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
