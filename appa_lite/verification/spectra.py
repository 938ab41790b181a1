"""Power spectra: isotropic on a plane or the Earth, plain on a ring."""

import numpy as np
import xarray as xr

from appa_lite.verification.base import CASE_DIMS, Statistic, Sums, center
from appa_lite.verification.grid import MOMENT, NUMBER, grid_dims, spacing


def power_spectrum(fields: np.ndarray, steps: tuple[float, ...], periodic: tuple[bool, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Variance per wavenumber bin of fields (..., [H,] W): the bins sum to the (windowed) variance.

    E(k) = sum_{|k'| in bin k} |F(k')|^2 / N^2. Along bounded axes the mean and linear trend are removed and a Hann window,
    normalised to keep the variance, is applied (Errico 1985, https://doi.org/10.1175/1520-0493(1985)113<1554:SCFALA>2.0.CO;2).

    Args:
        fields: without missing values.
        steps: grid spacing per axis; its unit, inverted, is the unit of the wavenumbers (cycles per length).

    Returns:
        Wavenumbers (K,) and spectra (..., K).
    """
    axes = tuple(range(-len(steps), 0))
    fields = np.asarray(fields, dtype=np.float64)
    fields = fields - fields.mean(axes, keepdims=True)
    window = np.ones(())
    for axis, wraps in zip(axes, periodic, strict=True):
        size = fields.shape[axis]
        if wraps or size < 3:
            continue
        shape = [size if a == axis else 1 for a in axes]
        ramp = (np.arange(size) - (size - 1) / 2).reshape(shape)
        fields = fields - (fields * ramp).mean(axes, keepdims=True) / np.square(ramp).mean() * ramp
        hann = np.sin(np.pi * (np.arange(size) + 0.5) / size).reshape(shape) ** 2
        window = window * hann / np.sqrt(np.square(hann).mean())
    fields = fields * window
    power = np.abs(np.fft.fftn(fields, axes=axes)) ** 2 / np.prod([fields.shape[a] for a in axes]) ** 2
    frequencies = [np.fft.fftfreq(fields.shape[a], s) for a, s in zip(axes, steps, strict=True)]
    radius = np.sqrt(sum(f**2 for f in np.meshgrid(*frequencies, indexing="ij")))
    width = max(1 / (fields.shape[a] * s) for a, s in zip(axes, steps, strict=True))
    nyquist = min(0.5 / s for s in steps)
    bins = np.round(radius / width).astype(np.int64).ravel()
    count = max(int(np.floor(nyquist / width + 1e-9)), 1)
    one_hot = (bins[:, None] == np.arange(1, count + 1)).astype(np.float64)  # corners beyond Nyquist are left out
    return width * np.arange(1, count + 1), power.reshape(*power.shape[: -len(steps)], -1) @ one_hot


class Spectrum(Statistic):
    """The spectrum of the members, their mean, the truth or the mean's error; dimension ``wavenumber``.

    The mean of an ensemble is smoother than any state; its members should not be.
    Cases with a missing cell have weight zero, since a spectrum needs every cell.
    """

    def __init__(self, kind: str, periodic: tuple[bool, ...]):
        if kind not in ("members", "mean", "truth", "error"):
            raise ValueError(f"kind is members, mean, truth or error, not {kind!r}")
        self.kind, self.periodic, self.name = kind, tuple(periodic), f"spectrum_{kind}"

    def compute(self, forecast, truth):
        dims = grid_dims(truth)
        fields = {"truth": lambda: truth, "mean": lambda: center(forecast), "error": lambda: center(forecast) - truth}.get(
            self.kind, lambda: center(forecast) if MOMENT in forecast.dims else forecast
        )()
        steps, unit = spacing(truth)
        valid = np.isfinite(fields).all(dims)
        wavenumbers, values = power_spectrum(fields.transpose(..., *dims).fillna(0.0).values, steps, self.periodic)
        kept = [d for d in fields.dims if d not in dims]
        axis = ("wavenumber", wavenumbers, {"units": f"1/{unit}"})
        spectra = xr.DataArray(values, dims=(*kept, "wavenumber"), coords={"wavenumber": axis})
        spectra = spectra.where(valid.reset_coords(drop=True), 0.0)
        weight = valid.astype(np.float64).reset_coords(drop=True)
        if NUMBER in kept:
            spectra, weight = spectra.mean(NUMBER), weight.mean(NUMBER)
        coords = {n: c for n, c in truth.coords.items() if set(c.dims) <= set(CASE_DIMS) & set(weight.dims)}
        return Sums(spectra.assign_coords(coords), weight.assign_coords(coords))
