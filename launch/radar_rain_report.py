"""What launch/radar_rain.sh found: python launch/radar_rain_report.py DATA OUT

Writes beside the forecasts in OUT

    nowcasts.json       scores of the five domains in one table, and their range from domain to domain
    law.json            wet share, quantiles and maxima of the model's own rain beside the three episodes observed
    return_levels.json  hourly rain of Amsterdam (DATA/data_Radar_grid_cell_vals.csv): levels, and one year beside the next
    nowcasts.png        a nowcast, and law.png: exceedances and spectra

Five domains are two weather systems: no interval is computed from them, only the lowest and the highest.
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

SQUARED = ("rmse", "spread")  # pooled as mean squares
LEVELS = (1.0, 5.0, 10.0, 20.0)  # mm/h
HOURS = {"month": 720, "year": 8766, "two years": 17532, "ten years": 87660}
WINDOWS, FRAMES = 64, 8  # of the model's own rain


# Nowcasts


def pooled(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One value per (system, metric, lead), the mean over domains weighted by what was compared; ``low, high``: over domains."""
    rows = pd.concat([table.assign(domain=name) for name, table in tables.items()])
    rows = rows[rows["system"].isin(["latent_diffusion", "advection", "persistence", "climatology"]) & (rows["variable"] == "rain")]
    rmse = rows[rows["metric"] == "rmse"].set_index(["system", "lead_time", "domain"])["value"]
    out = []
    for (system, metric, lead), group in rows.dropna(subset="value").groupby(["system", "metric", "lead_time"], sort=False):
        weight, value = group["count"].to_numpy(float), group["value"].to_numpy(float)
        if metric in SQUARED:
            mean = np.sqrt(np.average(value**2, weights=weight))
        elif metric == "spread_skill":
            error = rmse.loc[[(system, lead, domain) for domain in group["domain"]]].to_numpy() ** 2
            mean = np.sqrt(np.average(value**2 * error, weights=weight) / np.average(error, weights=weight))
        else:
            mean = np.average(value, weights=weight)
        numbers = {"value": float(mean), "low": float(value.min()), "high": float(value.max())}
        out.append(
            {
                "system": system,
                "variable": "rain",
                "metric": metric,
                "lead_time": lead,
                **numbers,
                "count": int(weight.sum()),
                "domains": len(group),
            }
        )
    return pd.DataFrame(out)


# The law


def drawn(model: Path, seed: int = 0) -> np.ndarray:
    """Rain (N, T, H, W) of the model with nothing observed."""
    choices = ["experiment=radar_rain", f"checkpoint={model}", "observations=none", "out=none", "forecaster=latent_diffusion", "device=cpu"]
    cfg = compose("reanalysis", choices)
    prior, setting = competitor(cfg, Assimilator)
    times = np.datetime64("2016-08-28T10:00", "ns") + np.arange(FRAMES) * np.timedelta64(int(setting.spec.step), "s")
    return prior.assimilate(None, times, range(WINDOWS), seed)[:, :, 0].double().numpy()


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


def nowcast_picture(out: Path, case: str = "night0") -> Figure:
    """Observed, latent diffusion (two members and the mean) and advection, at 0 to 25 minutes."""
    ours, drifted = (
        xr.open_dataset(out / f"{case}.nc", decode_timedelta=True),
        xr.open_dataset(out / f"{case}_advection.nc", decode_timedelta=True),
    )
    truth = xr.open_zarr(out / "data" / f"{case[:-1]}_truth.zarr")["rain"].isel(trajectory=int(case[-1]))
    ours, drifted = ours["rain"].isel(time=0), drifted["rain"].isel(time=0, number=0)
    steps = [k for k, lead in enumerate(ours["prediction_timedelta"].values) if ours["time"].values + lead in truth["time"].values]
    rows = {
        "observed": None,
        "member 0": ours.isel(number=0),
        "member 1": ours.isel(number=1),
        "mean of the members": ours.mean("number"),
        "advection": drifted,
    }
    figure = Figure(figsize=(2.2 * len(steps) + 1, 10.5), dpi=90, layout="constrained")
    axes = figure.subplots(len(rows), len(steps), squeeze=False)
    colours = BoundaryNorm(BOUNDS, 256, extend="max")
    for line, (name, fields) in zip(axes, rows.items(), strict=True):
        for axis, k in zip(line, steps, strict=True):
            lead = ours["prediction_timedelta"].values[k]
            field = truth.sel(time=ours["time"].values + lead) if fields is None else fields.isel(prediction_timedelta=k)
            image = axis.imshow(
                np.where(field.values >= BOUNDS[0], field.values, np.nan),
                norm=colours,
                cmap="turbo",
                origin="lower",
                interpolation="nearest",
            )
            axis.set(xticks=[], yticks=[], facecolor="0.95")
            if line is axes[0]:
                axis.set_title(f"+{int(lead / np.timedelta64(1, 'm'))} min", fontsize=9)
        line[0].set_ylabel(name, fontsize=9)
    figure.colorbar(image, ax=axes, label="rain (mm/h)", shrink=0.5)
    figure.suptitle(f"{str(ours['time'].values)[:16]} UTC, 142 x 147 km of south-east France", fontsize=10)
    return figure


def law_picture(episodes: Mapping[str, np.ndarray]) -> Figure:
    """P(rain > r) and mean spectra, the model's with the 90 % range of resampled windows."""
    figure = Figure(figsize=(9, 3.6), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = np.geomspace(0.1, 60, 60)
    choose = np.random.default_rng(0)
    for colour, (name, rain) in zip(("C1", "C2", "C4", "C0"), episodes.items(), strict=False):
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
    save(out, results, {"nowcasts": nowcast_picture(out), "law": law_picture(episodes)})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
