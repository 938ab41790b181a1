"""A space-time covariance that can be applied, inverted with a ridge and sampled without ever being formed.

    C = E blockdiag_k(Toeplitz(c_k)) E^T + nu (I - E E^T)

with E the empirical orthogonal functions in space (D x K, orthonormal), c_k the temporal autocovariance of the
k-th principal component, and nu the mean variance of what the K functions leave. Each Toeplitz matrix is diagonalised
for the number of frames asked for (see ``temporal``), so that any function of C costs two projections:
f(C) = E U f(lambda) U^T E^T + f(nu) (I - E E^T). Lagged correlations *between* components are neglected.

Source: principal components with stationary time series, e.g. von Storch and Zwiers (1999), ch. 13.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from appa_lite.core.errors import UserError
from appa_lite.core.modes import blocks, leading_modes
from appa_lite.core.temporal import DenseModes, RingModes, TemporalModes

LARGEST_TAPER = 32768  #: rows; 9 GB
RING = 3  #: stretches longer than so many times the lags are taken as rings


class SpaceTimeCovariance(nn.Module):
    """Covariance of fields (B, T, D) with D numbers a frame.

    Args:
        basis: E, shape (D, K), orthonormal columns.
        autocovariance: c_k(tau), shape (K, L), for lags 0 .. L-1 in frames.
        remainder: nu, the variance of each direction outside the basis (0 when K = D).
    """

    def __init__(self, basis: Tensor, autocovariance: Tensor, remainder: Tensor):
        super().__init__()
        self.register_buffer("basis", basis)
        self.register_buffer("autocovariance", autocovariance)
        self.register_buffer("remainder", remainder)
        self._temporal: dict[int, TemporalModes] = {}

    @property
    def modes(self) -> int:
        return self.basis.shape[1]

    def seam(self, frames: int) -> int:
        """Frames to add to a stretch of so many, so that its ends are not neighbours: see ``temporal``."""
        lags = self.autocovariance.shape[1]
        return lags if frames > RING * lags else 0

    def temporal(self, frames: int) -> TemporalModes:
        """The temporal eigenvectors and eigenvalues of the K series.

        More than ``RING`` times the lags are frames of a ring, whose memory and time grow as the length: a stretch of T
        frames is then to be taken as part of T + ``seam(T)``.
        """
        cached = self._temporal.get(frames)
        if cached is None or cached.values.device != self.basis.device:
            lags = min(self.autocovariance.shape[1], frames)
            c = self.autocovariance[:, :lags].double()
            if frames > lags:  # the taper that keeps the extended sequence close to positive definite
                c = c * torch.cos(torch.linspace(0, torch.pi / 2, lags + 1, dtype=torch.float64, device=c.device)[:-1]) ** 2
            dtype = self.basis.dtype
            ring = frames > RING * lags
            cached = RingModes(c, frames, dtype) if ring else DenseModes(nn.functional.pad(c, (0, frames - lags)), dtype)
            self._temporal[frames] = cached
        return cached

    def clear(self) -> None:
        """Forget the eigenvectors, after a change of the buffers."""
        self._temporal.clear()

    def project(self, x: Tensor) -> Tensor:
        """Coordinates U^T E^T x in the eigenbasis: (B, T, D) to (B, K, T)."""
        return self.temporal(x.shape[1]).forward(x @ self.basis)

    def expand(self, coordinates: Tensor) -> Tensor:
        """E U a: (B, K, T) to (B, T, D)."""
        return self.temporal(coordinates.shape[-1]).inverse(coordinates) @ self.basis.T

    def function(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f(C) x for fields x (B, T, D); f acts on eigenvalues elementwise and may return one row a member: (B, 1, 1) or (B, K, T)."""
        values = self.temporal(x.shape[1]).values
        coordinates = self.project(x)
        gains, rest = f(values), f(self.remainder)
        if not self.has_remainder:
            return self.expand(gains * coordinates)
        return self.expand((gains - rest) * coordinates) + rest * x

    @property
    def has_remainder(self) -> bool:
        return self.basis.shape[0] > self.basis.shape[1]

    def spectrum(self, frames: int) -> Tensor:
        """All eigenvalues, those of the remainder as one number repeated: (T * D,)."""
        values = self.temporal(frames).values
        rest = self.remainder.expand(frames * (self.basis.shape[0] - self.modes))
        return torch.cat([values.flatten(), rest])

    def sample(self, noise: Tensor) -> Tensor:
        """C^{1/2} noise, for white noise (B, T, D)."""
        return self.function(noise, lambda v: v.clamp(min=0).sqrt())


def localisation(shape: tuple[int, int, int], periodic: tuple[bool, bool], length: float) -> Tensor:
    """Taper (D, D) of the covariance of latents (Z, h, w): Gaspari and Cohn (1999), eq. 4.10, zero beyond 2 ``length`` cells.

    Raises:
        UserError: so large a matrix does not fit.
    """
    z, h, w = shape
    if z * h * w > LARGEST_TAPER:
        raise UserError(
            f"localisation={length} needs a matrix of {z * h * w} rows, at most {LARGEST_TAPER} can be had: say localisation=null"
        )
    squares = []
    for n, wraps in ((h, periodic[0]), (w, periodic[1])):
        apart = (torch.arange(n)[:, None] - torch.arange(n)[None, :]).abs().double()
        squares.append((torch.minimum(apart, n - apart) if wraps else apart) ** 2)
    r = (squares[0][:, None, :, None] + squares[1][None, :, None, :]).sqrt().reshape(h * w, h * w) / length
    near = 1 - 5 / 3 * r**2 + 5 / 8 * r**3 + r**4 / 2 - r**5 / 4
    s = r.clamp(min=1)
    far = 4 - 5 * s + 5 / 3 * s**2 + 5 / 8 * s**3 - s**4 / 2 + s**5 / 12 - 2 / (3 * s)
    return torch.where(r <= 1, near, torch.where(r < 2, far, 0)).repeat(z, z)


def estimate_covariance(series: Tensor, modes: int, lags: int, taper: Tensor | None = None) -> SpaceTimeCovariance:
    """Fit the covariance to trajectories (N, T, D) of anomalies (mean zero), in float64.

    With a ``taper`` (D, D), the spatial covariance is multiplied by it entry by entry: fewer independent samples than
    numbers in a frame make chance correlations between distant places, and leave out directions that have variance.

    EOFs are the leading eigenvectors of the pooled spatial covariance; autocovariances are the biased estimates
    (1/(N T)) sum_t a_k(t) a_k(t + tau), which are positive semi-definite, pooled over trajectories.
    """
    n, t, d = series.shape
    if n * t < 2:
        raise ValueError("a covariance needs at least two frames")
    k = min(modes, d, n * t if taper is None else d)
    values, basis, left = leading_modes(series, k, taper)
    remainder = left / (d - k) if k < d else torch.zeros((), dtype=torch.float64)
    lags = min(lags, t)
    components = torch.cat([x @ basis for _, x in blocks(series)]).reshape(n, t, k)
    autocovariance = torch.stack([(components[:, : t - lag] * components[:, lag:]).sum((0, 1)) / (n * t) for lag in range(lags)], dim=1)
    if taper is not None:  # the shape of the projected series' autocovariance, the variance of the tapered covariance
        autocovariance *= (values.clamp(min=0) / autocovariance[:, 0].clamp(min=1e-12))[:, None]
    return SpaceTimeCovariance(basis.float(), autocovariance.float(), remainder.clamp(min=0).float())
