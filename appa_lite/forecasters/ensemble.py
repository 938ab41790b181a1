"""What methods that cycle a simulator share: its members, observations frame by frame, square-root weights, the cycle.

Notation: N members x_i with mean x and anomalies a_i = x_i - x; predicted observations A(x_i), whitened by R^{-1/2};
S (N, M) = their anomalies / sqrt(N - 1), d (M,) = the mean's innovation. Weights X (N, N) make the analysis members
x + sum_j X_ji a_j.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.blocks import Blocks
from appa_lite.core.errors import DivergedError, UserError
from appa_lite.core.fields import to_seconds
from appa_lite.core.random import derive, generator
from appa_lite.core.student import matched_variance
from appa_lite.forecasters.base import Assimilator, Progress, silent
from appa_lite.guidance.base import SolverReport
from appa_lite.observations.base import Observation, ObservationOperator
from appa_lite.simulators.base import Simulator
from appa_lite.simulators.base import states as spun_up

NEGLIGIBLE = 0.01  # correlation of errors that cycling methods may leave out


class Ensemble:
    """Members of a simulator, drawn from its climate by a spin-up of their own that shares no draw with any truth.

    Args:
        seed: of initial states and random forcing; members: their numbers, member m depends on (seed, m) alone.
        start: spun-up states (safetensors) to branch from instead of the simulator's own initial states.
        spinup: frames to discard first; None: as many as the simulator needs, or with ``start`` until branches are independent.
    """

    def __init__(
        self,
        simulator: Simulator,
        seed: int,
        members: Sequence[int],
        start: str | Path | None = None,
        spinup: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.simulator, self.seed, self.members, self.start, self.device = simulator, derive(seed, "ensemble"), list(members), start, device
        default = simulator.spinup_frames if start is None else simulator.decorrelation_frames
        self.spinup = default if spinup is None else spinup

    def initial(self) -> Tensor:
        """States (N, ...) drawn from the climate."""
        (state,) = spun_up(self.simulator, self.seed, self.members, 1, self.spinup, self.device, self.start)
        return state

    def advance(self, state: Tensor, frame: int) -> Tensor:
        """States at ``frame + 1``, counted from the first frame after the spin-up."""
        try:
            return self.simulator.advance(state, self.spinup + frame, self.seed, self.members)
        except UserError as error:
            hint = "the analyses have diverged if a free run does not do this: more members, more inflation or a smaller radius"
            raise DivergedError(f"after frame {frame}: {error} ({hint})") from error


def check_period(simulator: Simulator, times: np.ndarray) -> None:
    """Raise UserError unless ``times`` are the simulator's frames."""
    apart = np.diff(to_seconds(times))
    if len(apart) and not np.allclose(apart, simulator.spec.step, rtol=0, atol=1e-3):
        raise UserError(f"the frames are {apart[0]:g} s apart, those of the simulator {simulator.spec.step:g} s: choose that of the model")


def check_members(members: Sequence[int]) -> None:
    """Raise UserError unless there are at least two members."""
    if len(members) < 2:
        raise UserError(f"members={len(members)}: the covariance is that of the ensemble, which needs at least 2 members")


# Observations


class FrameObservations:
    """An observation cut at its frames: each row is taken in at the last frame that it depends on.

    ``span`` frames end there, so that a row interpolated between two frames (or a mean over several) meets the members'
    own past: asynchronous assimilation (Sakov, Evensen and Bertino 2010).
    """

    def __init__(self, observation: Observation | None, frames: int, device: torch.device | str = "cpu"):
        self.parts: dict[int, Observation] = {}
        self.span = 1
        if observation is not None and len(observation):
            first, last = observation.operator.first, observation.operator.last
            self.span = int((last - first).max()) + 1
            _check_blocks(observation)
            bare = replace(observation, provenance=None)
            cut = _cut(bare.select((first >= 0) & (last < frames)), 0, frames)
            for frame, part in cut.items():
                operator = part.operator.rebase(frame - self.span + 1)
                self.parts[frame] = replace(part, operator=operator).to(device, part.values.dtype)

    def recent(self, fields: Tensor, frame: int) -> Tensor:
        """The ``span`` frames of fields (N, T, C, H, W) up to ``frame``; before the first one, which no row sees, the first."""
        index = torch.arange(frame - self.span + 1, frame + 1).clamp(min=0)
        return fields[:, index]


def _cut(observation: Observation, first: int, stop: int) -> dict[int, Observation]:
    """Rows by their last frame, found by halving."""
    if not len(observation):
        return {}
    if stop - first == 1:
        return {first: observation}
    middle = (first + stop) // 2
    early = observation.operator.last < middle
    return _cut(observation.select(early), first, middle) | _cut(observation.select(~early), middle, stop)


def _check_blocks(observation: Observation) -> None:
    """Raise UserError where errors of rows that are taken in at different frames are correlated."""
    correlation = observation.correlation or Blocks((), ())
    for rows, matrix in zip(correlation.rows, correlation.matrices, strict=True):
        last = observation.operator.last[rows]
        if bool(((last[:, None] != last) & (matrix.abs() > NEGLIGIBLE)).any()):
            raise UserError(
                "methods that take observations in frame by frame cannot use errors correlated from one frame to the next: "
                "choose a shorter error_correlation time, or forecaster=latent_diffusion or optimal_interpolation"
            )


def whitened(observation: Observation, fields: Tensor) -> tuple[Tensor, Tensor]:
    """S (N, M) and d (M,), float64, of members' fields (N, T, C, H, W)."""
    values, predicted = independent(observation, observation.operator(fields).double())
    mean = predicted.mean(0)
    scale = error_variance(observation, values - mean, predicted.var(0)).rsqrt()
    return (predicted - mean) * (scale / math.sqrt(len(predicted) - 1)), (values - mean) * scale


def independent(observation: Observation, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Values (M,) and predictions (N, M), float64, recombined where that makes errors independent (``Observation.mixing``)."""
    mixing = observation.mixing()
    return tuple(v if mixing is None else mixing(v) for v in (observation.values.double(), predicted))


def error_variance(observation: Observation, innovation: Tensor, spread: Tensor) -> Tensor:
    """R (M,), float64; of Student-t errors that which the innovations (M,) ask for, given the variance that members leave."""
    variance = observation.variance.double()
    return variance if observation.degrees is None else matched_variance(innovation, spread, variance, observation.degrees)


# Weights


def square_root(gram: Tensor, projected: Tensor, finite_size: float | None = None) -> tuple[Tensor, Tensor]:
    """Weights of the mean w (..., N) and the symmetric square root T (..., N, N) of the ensemble transform Kalman filter.

        w = (I/l^2 + G)^{-1} S d / sqrt(N - 1),   T = (I/l^2 + G)^{-1/2},   G = S S^T      (Hunt, Kostelich and Szunyogh 2007)

    The prior inflation l is 1, or with ``finite_size`` the most likely one given d (``finite_size_inflation``).

    Args:
        gram: G (..., N, N); projected: S d (..., N).
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    turned = (vectors.mT @ projected[..., None])[..., 0]
    inverse = 1 if finite_size is None else 1 / finite_size_inflation(values, turned, finite_size)[..., None]
    values = values + inverse
    mean = (vectors @ (turned / values)[..., None])[..., 0]
    return mean / math.sqrt(gram.shape[-1] - 1), (vectors * values.rsqrt()[..., None, :]) @ vectors.mT


def hyperprior(values: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Coefficients (e, c) of the finite-size prior of the weights, (N - 1) c log(e + |w|^2), given the eigenvalues of G.

    It is what is left of the Gaussian when the N members are all that is known of mean and covariance (Bocquet 2011),
    its mode moved so that a converged filter is not inflated (Bocquet, Raanes and Hannart 2015, sec. 5); ``strength``
    multiplies it: 1 as derived, more where members are better than independent draws, less inflation.
    """
    size = values.shape[-1]
    e, c = (size + 1) / size, size / (size - 1)
    mode = (e / c) ** (0.5 / (1 + values)).mean(-1)
    return strength * e / mode, strength * c * mode


def finite_size_inflation(values: Tensor, turned: Tensor, strength: float) -> Tensor:
    """l^2 (...) that minimises the dual cost of the finite-size filter (EnKF-N), by bisection on log l^2.

        J(l) = sum_i u_i^2 / ((N - 1)(1 + l^2 g_i)) + e / l^2 + c log l^2

    with eigenvalues g_i of G (..., N) and innovations u_i along them; ``turned`` (..., N) is u_i sqrt(g_i).
    """
    e, c = hyperprior(values, strength)
    tiny = 1e-12
    energy = torch.where(values > tiny, turned.square(), 0) / (values.shape[-1] - 1)  # u_i^2 g_i / (N - 1)
    low, high = torch.full_like(c, -2.0), torch.full_like(c, 3.0)  # l within 0.37 and 4.5
    for _ in range(20):
        middle = (low + high) / 2
        square = middle.exp()
        slope = c - e / square - square * (energy / (1 + square[..., None] * values).square()).sum(-1)
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return ((low + high) / 2).exp()


def rotation(size: int, seed: int, *names: object) -> Tensor:
    """A random orthogonal matrix (N, N), float64, that leaves the mean of the members as it is (Sakov and Oke 2008)."""
    draws = torch.randn(size - 1, size - 1, generator=generator(seed, "rotation", *names), dtype=torch.float64)
    q, r = torch.linalg.qr(draws)
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = q * r.diagonal().sign()
    mirror = torch.full((size,), -1 / math.sqrt(size), dtype=torch.float64)  # exchanges e_1 and the constant vector
    mirror[0] += 1
    reflect = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(mirror, mirror) / mirror.square().sum()
    return reflect @ inner @ reflect


def combine(values: Tensor, weights: Tensor, cells: int) -> Tensor:
    """x + sum_j X_ji a_j for the numbers (N, n) of members.

    Args:
        weights: X (1, N, N) for all numbers, or (G + 1, N, N): for each of the G cells, and for numbers without a place.
        cells: G. The numbers are whole fields of G cells, then at most G - 1 without a place.
    """
    mean = values.mean(0)
    anomalies, weights = values - mean, weights.to(values)
    if len(weights) == 1:
        return mean + weights[0].T @ anomalies
    placed = anomalies.shape[1] // cells * cells
    fields = anomalies[:, :placed].unflatten(1, (-1, cells)).permute(2, 1, 0)
    local = (fields @ weights[:-1]).permute(2, 1, 0).flatten(1)
    return mean + torch.cat([local, weights[-1].T @ anomalies[:, placed:]], dim=1)


def relax_spread(analysis: Tensor, background: Tensor, strength: float) -> Tensor:
    """Members (N, n) whose standard deviations go back to those of the background by a share ``strength``.

    a_i <- a_i (1 + strength (s_b - s_a) / s_a): relaxation to prior spread (Whitaker and Hamill 2012).
    """
    mean, after = analysis.mean(0), analysis.std(0)
    factor = 1 + strength * (background.std(0) - after) / after.clamp(min=torch.finfo(after.dtype).tiny)
    return mean + (analysis - mean) * factor


# The cycle


class SquareRootFilter(Assimilator):
    """Forecast, then transform: deterministic ensemble filters and smoothers, which differ in their weights alone.

        x_i <- x + sum_j (w_j + inflation (T Omega)_ji) a_j,        Omega a mean-preserving rotation

    The frames within ``lag`` before an analysis take the same weights, without the inflation: that is the ensemble
    Kalman smoother (Evensen and van Leeuwen 2000). Fields are taken to be linear in the state.

    Args:
        simulator: the model; its random forcing is drawn for each member.
        inflation: factor on the analysis anomalies; finite_size: strength of the hyperprior that inflates the prior by what
            innovations show (EnKF-N), None for none; relaxation: share of the spread lost that is given back (0 to 1).
        rotate: mix the members at random after each analysis.
        lag: frames that later observations still change; 0 is the filter, None the whole period.
        states, spinup: where members come from, see ``Ensemble``; device: where they are advanced.
    """

    coupled = True

    def __init__(
        self,
        simulator: Simulator,
        inflation: float,
        finite_size: float | None,
        relaxation: float,
        rotate: bool,
        lag: int | None,
        states: str | None,
        spinup: int | None,
        device: torch.device | str,
    ):
        if inflation <= 0 or not 0 <= relaxation <= 1 or (lag is not None and lag < 0) or (finite_size is not None and finite_size <= 0):
            found = f"{inflation:g}, {finite_size}, {relaxation:g}, {lag}"
            raise UserError(f"expected inflation > 0, finite_size > 0 or null, relaxation in 0..1, lag >= 0; found {found}")
        self.simulator, self.inflation, self.finite_size, self.relaxation = simulator, inflation, finite_size, relaxation
        self.rotate, self.lag = rotate, lag
        self.states, self.spinup, self.device = states, spinup, device
        self.cells = math.prod(simulator.spec.grid.shape)
        self.report = SolverReport()

    @abstractmethod
    def transform(self, s: Tensor, d: Tensor, operator: ObservationOperator) -> tuple[Tensor, Tensor]:
        """Weights w (P, N) and T (P, N, N): P is 1, or the number of cells and 1 (see ``combine``)."""

    @torch.no_grad()
    def assimilate(
        self, observation: Observation | None, times: np.ndarray, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        check_period(self.simulator, times)
        check_members(members)
        ensemble = Ensemble(self.simulator, seed, members, self.states, self.spinup, self.device)
        observed = FrameObservations(observation, len(times), self.device)
        state = ensemble.initial()
        fields = state.new_empty(len(members), len(times), *self.simulator.spec.shape)
        for frame in range(len(times)):
            state = ensemble.advance(state, frame - 1) if frame else state
            fields[:, frame] = self.simulator.fields(state)
            if frame in observed.parts:
                state = self._analyse(state, fields, frame, observed, seed)
            progress("analyses", frame + 1, len(times))
        return fields.cpu()

    def _analyse(self, state: Tensor, fields: Tensor, frame: int, observed: FrameObservations, seed: int) -> Tensor:
        """The analysis state; ``fields`` of this frame and of those within the lag follow, in place."""
        part = observed.parts[frame]
        s, d = whitened(part, observed.recent(fields, frame))
        mean, transform = self.transform(s, d, part.operator)
        if self.rotate:
            transform = transform @ rotation(len(s), seed, frame).to(transform)
        first = 0 if self.lag is None else max(0, frame - max(self.lag, observed.span - 2))  # later rows see the past as it is now
        past = mean[..., None] + transform
        for earlier in range(first, frame):
            fields[:, earlier] = combine(fields[:, earlier].flatten(1), past, self.cells).view_as(fields[:, earlier])
        analysis = combine(state.flatten(1), mean[..., None] + self.inflation * transform, self.cells)
        if self.relaxation:
            analysis = relax_spread(analysis, state.flatten(1), self.relaxation)
        analysis = analysis.view_as(state)
        fields[:, frame] = self.simulator.fields(analysis)
        return analysis
