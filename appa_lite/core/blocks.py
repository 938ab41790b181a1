"""Block-diagonal matrices: numbers that belong together, a few at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """A block-diagonal matrix on M numbers, the identity where there is no block.

    Args:
        rows: which numbers each block couples, (n,) int64 each, no number twice; matrices: (n, n) float64 each.
    """

    rows: tuple[Tensor, ...]
    matrices: tuple[Tensor, ...]

    def __call__(self, values: Tensor) -> Tensor:
        """The product with values (..., M)."""
        out = values.clone()
        for rows, matrix in zip(self.rows, self.matrices, strict=True):
            out[..., rows] = values[..., rows] @ matrix.T.to(values)
        return out

    @property
    def mT(self) -> "Blocks":
        """The transpose."""
        return self.map(lambda rows, matrix: matrix.T)

    def map(self, function: Callable[[Tensor, Tensor], Tensor]) -> "Blocks":
        """Blocks of the same rows, each a function of its rows and its matrix."""
        return Blocks(self.rows, tuple(function(*block) for block in zip(self.rows, self.matrices, strict=True)))

    def cholesky(self) -> "Blocks":
        """The lower triangular factor."""
        return self.map(lambda rows, matrix: torch.linalg.cholesky(matrix))

    def inverse(self) -> "Blocks":
        """Of a lower triangular matrix."""
        return self.map(lambda rows, matrix: torch.linalg.solve_triangular(matrix, torch.eye(len(rows)).to(matrix), upper=False))

    def submatrix(self, rows: Tensor) -> Tensor:
        """The entries (n, n) between some of the numbers."""
        size = 1 + max(int(r.max()) for r in (rows, *self.rows))
        place = torch.full((size,), -1, device=rows.device).index_copy(0, rows, torch.arange(len(rows), device=rows.device))
        out = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
        for members, matrix in zip(self.rows, self.matrices, strict=True):
            inside = place[members] >= 0
            at = place[members[inside]]
            out[at[:, None], at] = matrix[inside][:, inside].to(out)
        return out

    def select(self, keep: Tensor) -> "Blocks":
        """The rows and columns where ``keep`` (M,) bool is True; of a covariance, that of the numbers kept."""
        place, found = keep.cumsum(0) - 1, []
        for rows, matrix in zip(self.rows, self.matrices, strict=True):
            inside = keep[rows]
            if bool(inside.any()):
                found.append((place[rows[inside]], matrix[inside][:, inside]))
        return Blocks(tuple(r for r, _ in found), tuple(m for _, m in found))

    def to(self, device: torch.device | str) -> "Blocks":
        return Blocks(tuple(r.to(device) for r in self.rows), tuple(m.to(device) for m in self.matrices))

    @classmethod
    def concatenate(cls, parts: Sequence["Blocks | None"], sizes: Sequence[int]) -> "Blocks | None":
        """Blocks of several sets of numbers, (M_i each), one after the other; None where nothing is coupled."""
        rows, matrices, begin = [], [], 0
        for part, size in zip(parts, sizes, strict=True):
            if part is not None:
                rows += [r + begin for r in part.rows]
                matrices += part.matrices
            begin += size
        return cls(tuple(rows), tuple(matrices)) if rows else None
