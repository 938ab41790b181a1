"""Localisation: how much an observation says about a place, and the analysis of each place (R-localisation)."""

import math

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import Grid
from appa_lite.forecasters.ensemble import square_root
from appa_lite.observations.base import ObservationOperator, Stacked, WeightedCells
from appa_lite.simulators.base import Simulator

CELLS_AT_ONCE = 512  #: local analyses in one batch


def gaspari_cohn(r: Tensor) -> Tensor:
    """The compactly supported correlation of Gaspari and Cohn (1999), eq. 4.10: one at r = 0, zero from r = 2 on."""
    near = 1 - 5 / 3 * r**2 + 5 / 8 * r**3 + r**4 / 2 - r**5 / 4
    s = r.clamp(min=1)
    far = 4 - 5 * s + 5 / 3 * s**2 + 5 / 8 * s**3 - s**4 / 2 + s**5 / 12 - 2 / (3 * s)
    return torch.where(r <= 1, near, torch.where(r < 2, far, torch.zeros_like(r)))


class Taper:
    """How much each observation says about each cell: Gaspari-Cohn of their distance, averaged over the cells it sums.

    Args:
        grid: a ring or plane; radius: where the taper reaches zero, in cells (columns).
    """

    def __init__(self, grid: Grid, radius: float):
        if not radius > 0:
            raise UserError(f"radius={radius:g} must be positive, in cells")
        if grid.dims[0] == "latitude":
            raise UserError("localisation measures distances on rings and planes: this grid is in degrees")
        self.grid, self.radius = grid, radius

    def _between(self, cells: Tensor) -> Tensor:
        """The taper (G, U) between all cells and some."""
        rows, columns = self.grid.shape
        every = torch.arange(rows * columns)
        squares = torch.zeros(len(every), len(cells), dtype=torch.float64)
        for axis, (count, divide) in enumerate(((rows, lambda c: c // columns), (columns, lambda c: c % columns))):
            apart = (divide(every)[:, None] - divide(cells)[None, :]).abs()
            apart = torch.minimum(apart, count - apart) if self.grid.periodic[axis] else apart
            squares += (apart * (self.grid.spacing[axis] / self.grid.spacing[1])).double().square()
        return gaspari_cohn(squares.sqrt() * (2 / self.radius))

    def cells(self, operator: ObservationOperator) -> Tensor:
        """Between all cells, then numbers without a place, and the observations: (G + 1, M), float64."""
        terms = _terms(operator)
        used, place = self._places(terms)
        near = self._between(used)
        placed = torch.zeros(len(near), len(terms), dtype=torch.float64)
        for j, share in enumerate(_shares(terms).T):
            placed.index_add_(1, terms.row.cpu(), near[:, place[:, j]] * share)
        return torch.cat([placed, placed.mean(0, keepdim=True)])

    def pairs(self, operator: ObservationOperator, cells: Tensor) -> Tensor:
        """Between observations: (M, M), given ``cells(operator)``."""
        terms = _terms(operator)
        used, place = self._places(terms)
        out = torch.zeros(len(terms), len(terms), dtype=torch.float64)
        for j, share in enumerate(_shares(terms).T):
            out.index_add_(0, terms.row.cpu(), cells[used[place[:, j]]] * share[:, None])
        return out

    def _places(self, terms: WeightedCells) -> tuple[Tensor, Tensor]:
        """The cells that observations use, and which of them each term does (P, J)."""
        return (terms.index.cpu() % math.prod(self.grid.shape)).unique(return_inverse=True)


def _terms(operator: ObservationOperator) -> WeightedCells:
    cells = operator.merged() if isinstance(operator, Stacked) else operator
    if not isinstance(cells, WeightedCells):
        raise TypeError("localisation needs observations of cells")
    return cells


def _shares(terms: WeightedCells) -> Tensor:
    """The share (P, J) of each cell in its observation; an observation's shares sum to one."""
    size = terms.weight.double().abs().cpu()
    total = torch.zeros(len(terms), dtype=torch.float64).index_add(0, terms.row.cpu(), size.sum(1))
    return size / total[terms.row.cpu()][:, None]


def local_square_root(taper: Tensor, whitened_anomalies: Tensor, innovation: Tensor, finite_size: float | None) -> tuple[Tensor, Tensor]:
    """``square_root`` for each row of the taper (P, M), R^{-1} multiplied by it: w (P, N), T (P, N, N), float64.

    G_p = sum_m taper_pm s_m s_m^T. Rows that see nothing keep their members.
    """
    members, device = len(whitened_anomalies), whitened_anomalies.device
    mean = torch.zeros(len(taper), members, dtype=torch.float64, device=device)
    transform = torch.eye(members, dtype=torch.float64, device=device).repeat(len(taper), 1, 1)
    for places in (taper > 0).any(1).nonzero()[:, 0].split(CELLS_AT_ONCE):
        seen = (taper[places] > 0).any(0)
        rho, s = taper[places][:, seen].to(device), whitened_anomalies[:, seen]
        gram = (rho @ (s.T[:, :, None] * s.T[:, None, :]).flatten(1)).unflatten(1, (members, members))
        mean[places], transform[places] = square_root(gram, rho @ (s * innovation[seen]).T, finite_size)
    return mean, transform


def placed_states(simulator: Simulator) -> None:
    """Raise UserError unless states (B, n) are fields, perhaps as many hidden ones, then numbers without a place (the
    ocean's winds), fewer than there are cells: of other layouts nobody knows what is where."""
    cells = math.prod(simulator.spec.grid.shape)
    state = simulator.initial(0, [0])
    visible = simulator.fields(state).flatten(1)
    hidden = state[0].numel() - visible.shape[1]
    ordered = state.ndim == 2 and torch.equal(visible, state[:, : visible.shape[1]])
    if not ordered or (hidden >= cells and hidden != visible.shape[1]):
        raise UserError(f"localisation does not know where the {hidden} hidden numbers of this simulator's state are: use a global method")
