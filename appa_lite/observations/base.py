"""Observations: y = A(x) + e, e ~ N(0, R), with the frame, variance and provenance of each of the M values.

Fields are ``(..., T, C, H, W)`` in physical units, observations ``(..., M)``. A window is the half-open range of
frames ``[start, stop)``. **A row belongs to a window only if the window holds every frame it depends on.** So windows
that partition the frames partition the observations when each row depends on one frame (``time_interpolation=nearest``,
or times that fall on frames); a row interpolated between two frames is lost where a cut separates them, and windows
must then overlap by a frame.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from appa_lite.core.blocks import Blocks

NORM_FLOOR = 1e-12  # of a squared norm, as in FieldSpec.evaluate: the gradient is zero, not infinite, at rest


class ObservationOperator(ABC):
    """y = A(x): fields (..., T, C, H, W) in physical units to (..., M), differentiable by autograd.

    ``frame`` (M,) is the nearest frame of each row; ``first`` and ``last`` (M,) bound the frames the row depends on.
    ``linear`` is True when A is affine.
    """

    frame: Tensor
    first: Tensor
    last: Tensor

    @property
    @abstractmethod
    def linear(self) -> bool: ...

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def select(self, keep: Tensor) -> "ObservationOperator":
        """The operator of the rows where ``keep`` (M,) bool is True, in their order."""

    @abstractmethod
    def rebase(self, start: int) -> "ObservationOperator":
        """The same rows seen from fields whose first frame is ``start``."""

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype) -> "ObservationOperator": ...

    def __len__(self) -> int:
        return len(self.frame)

    def within(self, start: int, stop: int) -> Tensor:
        """Bool (M,): rows whose frames all fall in [start, stop)."""
        return (self.first >= start) & (self.last < stop)


@dataclass(frozen=True, eq=False)
class WeightedCells(ObservationOperator):
    """What every instrument that sums cells shares: a sparse matrix with J entries in each of its P rows.

        term_p = sum_j weight_pj x[index_pj],      y_m = offset_m + sum_{p in m} term_p          (linear rows)
                                                   y_m = offset_m + sqrt(sum_{p in m} term_p^2)  (norm 1, e.g. wind speed)
                                                   y_m = offset_m + sum_{p in m} term_p^2        (norm 2, e.g. an energy)

    ``index`` (P, J) int64 points into the flattened (T*C*H*W) and ``weight`` (P, J) is zero on padding; ``row`` (P,)
    tells which observation a term belongs to; ``norm`` (M,) is 0 where they are summed; ``offset`` (M,) in the observed units;
    ``frame_size`` is C*H*W.
    """

    index: Tensor
    weight: Tensor
    row: Tensor
    norm: Tensor
    offset: Tensor
    frame: Tensor
    first: Tensor
    last: Tensor
    frame_size: int

    @cached_property
    def linear(self) -> bool:
        return not bool(self.norm.any())

    def __call__(self, x: Tensor) -> Tensor:
        """Values (..., M) of fields (..., T, C, H, W)."""
        index, weight = self.index.to(x.device), self.weight.to(x)
        cells = x.flatten(-4).index_select(-1, index.flatten()).unflatten(-1, index.shape)
        terms = (cells * weight).sum(-1)
        return self._combine(terms) + self.offset.to(x)

    def _combine(self, terms: Tensor) -> Tensor:
        if len(self.row) == len(self) and self.linear:  # one term per row, in order
            return terms
        row, norm = self.row.to(terms.device), self.norm.to(terms.device)
        terms = torch.where(norm[row] > 0, terms.square(), terms)
        sums = terms.new_zeros((*terms.shape[:-1], len(self))).index_add(-1, row, terms)
        return torch.where(norm == 1, sums.clamp(min=NORM_FLOOR).sqrt(), sums)

    def select(self, keep: Tensor) -> "WeightedCells":
        terms = keep[self.row]
        return replace(
            self,
            index=self.index[terms],
            weight=self.weight[terms],
            row=(keep.cumsum(0) - 1)[self.row[terms]],
            **{name: getattr(self, name)[keep] for name in ("norm", "offset", "frame", "first", "last")},
        )

    def rebase(self, start: int) -> "WeightedCells":
        frames = {name: getattr(self, name) - start for name in ("frame", "first", "last")}
        return replace(self, index=self.index - start * self.frame_size, **frames)

    def shifted(self, offset: Tensor) -> "WeightedCells":
        """y = A(x) + offset (M,), such as a station's bias or the correction of its elevation."""
        return replace(self, offset=self.offset + offset)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "WeightedCells":
        integers = {name: getattr(self, name).to(device) for name in ("index", "row", "norm", "frame", "first", "last")}
        return replace(self, weight=self.weight.to(device, dtype), offset=self.offset.to(device, dtype), **integers)


@dataclass(frozen=True, eq=False)
class Stacked(ObservationOperator):
    """The rows of several operators on the same fields, one after the other."""

    parts: tuple[ObservationOperator, ...]

    def __post_init__(self):
        for name in ("frame", "first", "last"):
            object.__setattr__(self, name, torch.cat([getattr(part, name) for part in self.parts]))

    @property
    def linear(self) -> bool:
        return all(part.linear for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def select(self, keep: Tensor) -> "Stacked":
        pieces = keep.split([len(part) for part in self.parts])
        return Stacked(tuple(part.select(piece) for part, piece in zip(self.parts, pieces, strict=True)))

    def rebase(self, start: int) -> "Stacked":
        return Stacked(tuple(part.rebase(start) for part in self.parts))

    def merged(self) -> "WeightedCells":
        """The same rows as one sparse matrix, its terms padded to the longest."""
        parts, most = self.parts, max(part.index.shape[1] for part in self.parts)
        widen = {
            name: [torch.nn.functional.pad(getattr(p, name), (0, most - p.index.shape[1])) for p in parts] for name in ("index", "weight")
        }
        offsets = torch.tensor([0] + [len(p) for p in parts[:-1]]).cumsum(0)
        same = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("norm", "offset", "frame", "first", "last")}
        row = torch.cat([p.row + int(o) for p, o in zip(parts, offsets, strict=True)])
        return WeightedCells(row=row, frame_size=parts[0].frame_size, **same, **{name: torch.cat(v) for name, v in widen.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Stacked":
        return Stacked(tuple(part.to(device, dtype) for part in self.parts))


@dataclass(frozen=True, eq=False)
class Composed(ObservationOperator):
    """A o decode: observes what ``decode`` makes of a latent. Frames are those of the decoded fields."""

    operator: ObservationOperator
    decode: Callable[[Tensor], Tensor]

    def __post_init__(self):
        for name in ("frame", "first", "last"):
            object.__setattr__(self, name, getattr(self.operator, name))

    @property
    def linear(self) -> bool:
        return False

    def __call__(self, x: Tensor) -> Tensor:
        return self.operator(self.decode(x))

    def select(self, keep: Tensor) -> "Composed":
        return Composed(self.operator.select(keep), self.decode)

    def rebase(self, start: int) -> "Composed":
        raise TypeError("take the window of an observation before moving it through a decoder: the decoder fixes the frames")

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Composed":
        return Composed(self.operator.to(device, dtype), self.decode)


@dataclass(frozen=True, eq=False)
class Observation:
    """Values y of A(x) with errors e ~ N(0, S C S), S = diag(variance)^{1/2}; C = I, independent errors, unless said otherwise.

    Args:
        values: (M,), or (B, M) when they differ by member, in the units of what is observed.
        variance: (M,), error variance, in squared units.
        operator: A, with M rows.
        provenance: the M rows of the table the values came from, if any.
        correlation: C, ones on its diagonal; None where errors are independent.
        degrees: of freedom of independent Student-t errors of scale variance^{1/2}; None where errors are normal.
    """

    values: Tensor
    variance: Tensor
    operator: ObservationOperator
    provenance: pd.DataFrame | None = None
    correlation: Blocks | None = None
    degrees: float | None = None

    def __post_init__(self):
        sizes = {self.values.shape[-1], len(self.variance), len(self.operator)}
        if self.provenance is not None:
            sizes.add(len(self.provenance))
        if len(sizes) > 1:
            raise ValueError(f"values, variance, operator and provenance must have as many rows, got {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.variance)

    @property
    def frame(self) -> Tensor:
        """Nearest frame (M,) of each row."""
        return self.operator.frame

    def select(self, keep: Tensor) -> "Observation":
        """The rows where ``keep`` (M,) bool is True."""
        provenance = None if self.provenance is None else self.provenance[keep.cpu().numpy()].reset_index(drop=True)
        correlation = None if self.correlation is None else self.correlation.select(keep)
        operator = self.operator.select(keep)
        return Observation(self.values[..., keep], self.variance[keep], operator, provenance, correlation, self.degrees)

    def window(self, start: int, stop: int) -> "Observation":
        """The rows whose frames all fall in [start, stop), for fields whose first frame is ``start``."""
        inside = self.select(self.operator.within(start, stop))
        return replace(inside, operator=inside.operator.rebase(start))

    def through(self, decode: Callable[[Tensor], Tensor]) -> "Observation":
        """The same values as an observation of z, x = decode(z). Take the window first."""
        return replace(self, operator=Composed(self.operator, decode))

    def mixing(self) -> Blocks | None:
        """T = S L^{-1} S^{-1}, C = L L^T, or None for the identity.

        T y = T A(x) + T e are observations with *independent* errors of the same ``variance``: T S C S T^T = S S. Whatever
        takes a diagonal R, guidance, samplers, Kalman methods and evidence alike, is given T y and T A.
        """
        if self.correlation is None:
            return None
        scale = self.variance.double().sqrt()
        factors = self.correlation.cholesky().inverse()
        return factors.map(lambda rows, matrix: scale[rows, None] * matrix.to(scale) / scale[rows])

    def inflated(self, weight: Tensor) -> "Observation":
        """The errors of doubtful rows enlarged by independent ones: variance / weight (M,), the correlated part as it is."""
        variance, correlation = self.variance / weight.to(self.variance), self.correlation
        if correlation is not None:
            root = weight.double().sqrt()

            def damped(rows: Tensor, matrix: Tensor) -> Tensor:
                inner = root[rows, None] * matrix * root[rows]
                return inner - inner.diagonal().diag() + matrix.diagonal().diag()

            correlation = correlation.map(damped)
        return replace(self, variance=variance, correlation=correlation)

    def residual(self, x: Tensor) -> Tensor:
        """y - A(x), (..., M)."""
        predicted = self.operator(x)
        return self.values.to(predicted) - predicted

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Observation":
        """Everything on a device, real numbers in a dtype."""
        moved = self.values.to(device, dtype), self.variance.to(device, dtype), self.operator.to(device, dtype)
        correlation = None if self.correlation is None else self.correlation.to(device)
        return Observation(*moved, self.provenance, correlation, self.degrees)

    @classmethod
    def concatenate(cls, observations: Sequence["Observation"]) -> "Observation":
        """Several observations of the same fields as one; provenance is kept when all have it."""
        if len(observations) == 1:
            return observations[0]
        tables = [o.provenance for o in observations]
        provenance = None if any(t is None for t in tables) else pd.concat(tables, ignore_index=True)
        batch = torch.broadcast_shapes(*[o.values.shape[:-1] for o in observations])
        values = torch.cat([o.values.expand(*batch, len(o)) for o in observations], dim=-1)
        variance = torch.cat([o.variance for o in observations])
        if len({o.degrees for o in observations}) > 1:
            raise ValueError("observations with errors of several laws cannot be one")
        correlation = Blocks.concatenate([o.correlation for o in observations], [len(o) for o in observations])
        operator = Stacked(tuple(o.operator for o in observations))
        return cls(values, variance, operator, provenance, correlation, observations[0].degrees)
