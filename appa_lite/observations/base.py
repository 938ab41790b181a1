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
                                                   y_m = offset_m + sqrt(sum_{p in m} term_p^2)  (norm rows, e.g. wind speed)

    ``index`` (P, J) int64 points into the flattened (T*C*H*W) and ``weight`` (P, J) is zero on padding; ``row`` (P,)
    tells which observation a term belongs to; ``norm`` (M,) bool; ``offset`` (M,) in the observed units;
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
        terms = torch.where(norm[row], terms.square(), terms)
        sums = terms.new_zeros((*terms.shape[:-1], len(self))).index_add(-1, row, terms)
        return torch.where(norm, sums.clamp(min=NORM_FLOOR).sqrt(), sums)

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
    """Values y of A(x) with independent errors: y_m ~ N(A(x)_m, variance_m).

    Args:
        values: (M,), or (B, M) when they differ by member, in the units of what is observed.
        variance: (M,), error variance R, in squared units.
        operator: A, with M rows.
        provenance: the M rows of the table the values came from, if any.
    """

    values: Tensor
    variance: Tensor
    operator: ObservationOperator
    provenance: pd.DataFrame | None = None

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
        return Observation(self.values[..., keep], self.variance[keep], self.operator.select(keep), provenance)

    def window(self, start: int, stop: int) -> "Observation":
        """The rows whose frames all fall in [start, stop), for fields whose first frame is ``start``."""
        inside = self.select(self.operator.within(start, stop))
        return replace(inside, operator=inside.operator.rebase(start))

    def through(self, decode: Callable[[Tensor], Tensor]) -> "Observation":
        """The same values as an observation of z, x = decode(z). Take the window first."""
        return replace(self, operator=Composed(self.operator, decode))

    def residual(self, x: Tensor) -> Tensor:
        """y - A(x), (..., M)."""
        predicted = self.operator(x)
        return self.values.to(predicted) - predicted

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Observation":
        """Everything on a device, real numbers in a dtype."""
        moved = self.values.to(device, dtype), self.variance.to(device, dtype), self.operator.to(device, dtype)
        return Observation(*moved, self.provenance)

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
        return cls(values, variance, Stacked(tuple(o.operator for o in observations)), provenance)
