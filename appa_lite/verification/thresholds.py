"""Thresholds of extremes: quantiles of the training climatology, never of the period that is scored."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.core.store import digest, open_dataset
from appa_lite.verification.extremes import Threshold
from appa_lite.verification.grid import grid_dims, periodicity, standardise
from appa_lite.verification.views import View, plane

QUANTILES = (0.95, 0.99, 0.999)
STORED = "climatology.nc"  #: in a model directory
MOST_VALUES = 2e7  #: of a variable in memory; of a longer record every k-th time is taken
FEWEST_ABOVE = 10  #: values above a quantile without which it is not known


def climatological_quantiles(
    training: xr.Dataset, quantiles: Sequence[float] = QUANTILES, views: Sequence[View] = (), per_cell: bool = False
) -> xr.Dataset:
    """Quantiles of every variable of a training dataset, and of views of it: (quantile), or (quantile, grid) ``per_cell``.

    Pooled, all cells, times and trajectories count alike. Quantiles with fewer than 10 values above them are NaN, with a warning.

    Args:
        training: (trajectory, time, grid) or (time, grid).
        quantiles: between 0.5 and 1.
        views: whose quantiles are wanted too, as ``<variable>_<view>``.
    """
    check_quantiles(quantiles)
    training, found = standardise(training), {}
    dims, periodic = grid_dims(training), periodicity(training)
    for name, array in training.data_vars.items():
        if not set(dims) <= set(array.dims) or array.dtype.kind not in "fiu":
            continue
        stride = -(-array.size // int(MOST_VALUES)) if "time" in array.dims else 1
        array = (array.isel(time=slice(None, None, stride)) if stride > 1 else array).load()
        for view in (None, *(v for v in views if v.suits(array.sizes, dims))):
            shown = array if view is None else view.apply(array, dims, periodic)
            found[str(name) if view is None else f"{name}_{view.name}"] = _quantiles(shown, quantiles, dims if per_cell else ())
    known = {n: q for n, q in found.items() if bool(np.isfinite(q).any())}
    poor = [n for n, q in found.items() if not bool(np.isfinite(q).any(q.dims[1:]).all())]
    if poor:
        warnings.warn(
            f"the training data are too short for some quantiles of {', '.join(poor)}: no extremes are scored there", stacklevel=2
        )
    return xr.Dataset(known, attrs={"pooled": "no" if per_cell else "yes"})


def _quantiles(array: xr.DataArray, quantiles: Sequence[float], kept: tuple[str, ...]) -> xr.DataArray:
    kept = tuple(d for d in kept if d in array.dims)
    pooled = array.stack(sample=[d for d in array.dims if d not in kept]).astype(np.float64)
    count = np.isfinite(pooled).sum("sample").max()
    values = pooled.quantile(list(quantiles), "sample", skipna=True)
    enough = xr.DataArray([float(count * (1 - q)) >= FEWEST_ABOVE for q in quantiles], dims="quantile")
    return values.where(enough).transpose("quantile", *kept)


def pooled_quantiles(values: np.ndarray, quantiles: Sequence[float] = QUANTILES) -> np.ndarray:
    """Quantiles of values (time, cell), all together; NaN where fewer than 10 values lie above."""
    pooled = values[:: -(-values.size // int(MOST_VALUES))].astype(np.float64)
    enough = [pooled.size * (1 - q) >= FEWEST_ABOVE for q in quantiles]
    return np.where(enough, np.quantile(pooled, quantiles), np.nan)


def check_quantiles(quantiles: Sequence[float]) -> None:
    if not quantiles or not all(0.5 < q < 1 for q in quantiles):
        raise UserError(f"quantiles of extremes lie between 0.5 and 1, found {list(quantiles)}: for low extremes negate the variable")


def read_thresholds(path: str | Path, quantiles: Sequence[float], views: Sequence[View], truth: str | Path | None = None) -> xr.Dataset:
    """Thresholds from a file: a training dataset, a dataset with a dimension ``quantile``, or JSON; or from a model directory.

    JSON is ``{variable: {"0.99": value}}``, in the variable's units. A model directory holds the quantiles of its training data.

    Raises:
        UserError: not such a file, or the very data that are scored.
    """
    path = Path(path)
    if (path / STORED).is_file():
        return _stored(path / STORED)
    if truth is not None and path.exists() and Path(truth).exists() and digest(path) == digest(truth):
        raise UserError(f"thresholds={path} is the truth itself: give the training data, whose climatology is known before the test period")
    if path.suffix != ".json":
        dataset = open_dataset(path)
        if "quantile" not in dataset.dims:
            return climatological_quantiles(dataset, quantiles, views)
        return standardise(dataset) if plane(dataset) else dataset
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        arrays = {n: xr.DataArray(list(q.values()), {"quantile": [float(k) for k in q]}, "quantile") for n, q in table.items()}
    except OSError as error:
        raise UserError(f"there is no file {path}") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f'{path} is no table of thresholds: expected {{"variable": {{"0.99": value}}}}') from error
    return xr.Dataset(arrays)


def _stored(path: Path) -> xr.Dataset:
    """Those that the training left beside the climatology, ``<variable>_quantile``, of variables, not of views."""
    climatology = open_dataset(path)
    found = {str(n).removesuffix("_quantile"): a for n, a in climatology.data_vars.items() if a.dims == ("quantile",)}
    if not found:
        raise UserError(f"{path} holds no quantiles, as models that were trained before they were stored: give thresholds=TRAINING_DATA")
    return xr.Dataset(found)


def thresholds_of(thresholds: xr.Dataset | Mapping | None, variable: str) -> tuple[Threshold, ...]:
    """The thresholds of a variable or view, by rising quantile; none where none are known."""
    if thresholds is None or variable not in thresholds:
        return ()
    array = thresholds[variable].dropna("quantile", how="all").sortby("quantile")
    values = array.drop_vars([c for c in array.coords if c != "quantile"])  # cells pair by place: coordinates agree to rounding
    return tuple(Threshold(label(float(q)), values.sel(quantile=q, drop=True)) for q in array["quantile"].values)


def label(quantile: float) -> str:
    """``q99.9`` of 0.999."""
    return f"q{100 * quantile:.6g}"
