"""Power spectra: isotropic on a plane or the Earth, plain on a ring; on masked grids, of the largest part without a hole."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy.special import j0

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


def correlation_length(spectrum: np.ndarray, dimensions: int, resolution: int = 200) -> np.ndarray:
    """The distance at which the correlation falls to 1 / e, in units of the longest wavelength, of spectra (..., K).

    The correlation follows from the spectrum (Wiener and Khinchin): C(r) ~ sum_k E(k) cos(2 pi k r) on a ring, J_0 for the
    cosine on a plane. It has no mean: variance at scales beyond the domain is not seen. NaN if it never falls so far.
    """
    distance = np.linspace(0.0, 0.5, resolution + 1)
    phase = 2 * np.pi * np.arange(1, spectrum.shape[-1] + 1)[:, None] * distance
    correlation = spectrum @ (np.cos(phase) if dimensions == 1 else j0(phase))
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = correlation / correlation[..., :1]
    below = correlation < np.exp(-1)
    after = np.maximum(below.argmax(-1), 1)[..., None]
    c1, c0 = (np.take_along_axis(correlation, i, -1)[..., 0] for i in (after, after - 1))
    step = distance[1]
    length = distance[after[..., 0]] - step * (np.exp(-1) - c1) / np.where(c0 == c1, np.inf, c0 - c1)
    return np.where(below.any(-1), length, np.nan)


@dataclass(frozen=True)
class Box:
    """The cells that spectra are computed on: whether they wrap around along every grid dimension, rows first; None: no spectra.

    ``part`` holds indices along every dimension where it is not the whole grid; ``note`` says so, or why there is none.
    """

    periodic: tuple[bool, ...] | None
    part: tuple[np.ndarray, ...] = ()
    note: str = ""


SHORTEST = 8  #: cells along the longer axis of a grid that has a spectrum, and along both of a rectangle cut out of a mask


def spectral_box(known: np.ndarray, periodic: tuple[bool, ...]) -> Box:
    """Where spectra are computed: the whole grid if no cell is missing, else the largest rectangle (or arc) of known cells.

    A rectangle that spans a periodic axis stays periodic along it; along others the tapered spectrum is that of a bounded axis.
    """
    if known.shape[-1] < SHORTEST:
        return Box(None, (), f"no spectra: the grid has {known.shape[-1]} cells along its last axis, fewer than {SHORTEST}")
    if known.all():
        return Box(periodic)
    wraps = periodic if known.ndim == 2 else (False, *periodic)
    cells = np.atleast_2d(known)
    for axis, around in enumerate(wraps):
        cells = np.concatenate([cells, cells], axis) if around else cells
    top, left, height, width = _largest_rectangle(cells, np.atleast_2d(known).shape)
    found, shape = ((top, height), (left, width)), np.atleast_2d(known).shape
    ranges = [(np.arange(n) + start) % size for (start, n), size in zip(found, shape, strict=True)][-known.ndim :]
    extent = " x ".join(str(len(r)) for r in ranges)
    if min(len(r) for r, size in zip(ranges, known.shape, strict=True) if size > 1) < SHORTEST:
        return Box(None, (), f"no spectra: the largest part without a missing cell has {extent} cells, fewer than {SHORTEST} along an axis")
    kept = tuple(p and len(r) == size for p, r, size in zip(periodic, ranges, known.shape, strict=True))
    return Box(
        kept, tuple(ranges), f"spectra of the largest part without a missing cell: {extent} of {' x '.join(map(str, known.shape))} cells"
    )


def _largest_rectangle(known: np.ndarray, most: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the all-true rectangle of largest area, of at most ``most`` cells along the axes.

    Row by row, with the stack of rising column heights (the largest rectangle under a histogram).
    """
    best, area = (0, 0, 0, 0), 0
    heights = np.zeros(known.shape[1] + 1, dtype=int)  # the last stays zero and closes every rectangle
    for row in range(known.shape[0]):
        heights[:-1] = np.where(known[row], np.minimum(heights[:-1] + 1, most[0]), 0)
        stack: list[tuple[int, int]] = []  # (first column, height)
        for column, height in enumerate(heights.tolist()):
            start = column
            while stack and stack[-1][1] >= height:
                start, tall = stack.pop()
                width = min(column - start, most[1])
                if tall * width > area:
                    best, area = (row - tall + 1, start, tall, width), tall * width
            stack.append((start, height))
    return best


class Spectrum(Statistic):
    """The spectrum of the members, their mean, the truth or the mean's error; dimension ``wavenumber``.

    The mean of an ensemble is smoother than any state; its members should not be.
    Cases with a missing cell have weight zero, since a spectrum needs every cell.

    Args:
        kind: ``members, mean, truth`` or ``error``.
        periodic: whether each grid dimension wraps around.
        part: indices along every grid dimension of the rectangle it is computed on; all cells if empty.
    """

    def __init__(self, kind: str, periodic: tuple[bool, ...], part: tuple[np.ndarray, ...] = ()):
        if kind not in ("members", "mean", "truth", "error"):
            raise ValueError(f"kind is members, mean, truth or error, not {kind!r}")
        self.kind, self.periodic, self.part, self.name = kind, tuple(periodic), part, f"spectrum_{kind}"

    def compute(self, forecast, truth):
        dims = grid_dims(truth)
        if self.part:
            part = dict(zip(dims, self.part, strict=True))
            axes = _unwrapped(truth, part)
            forecast, truth = (a.isel(part).assign_coords(axes) for a in (forecast, truth))
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


def _unwrapped(array: xr.DataArray, part: dict[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    """Coordinates of a rectangle that may cross a periodic edge, evenly spaced as those of the grid."""
    out = {}
    for dim, index in part.items():
        if dim in array.coords and array.sizes[dim] > 1:
            values = array[dim].values
            out[dim] = (dim, values[index[0]] + (values[-1] - values[0]) / (len(values) - 1) * np.arange(len(index)), array[dim].attrs)
    return out
