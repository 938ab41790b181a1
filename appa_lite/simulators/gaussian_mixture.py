"""A mixture of Gaussians on a lattice: a law of many modes whose posteriors are known."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable
from appa_lite.core.random import Streams
from appa_lite.simulators.base import Simulator, forcing_noise


class GaussianMixture(Simulator):
    """Equally likely components N(m_ij, I) with m_ij = spacing (i, j, i, j, ...), i and j from -side/2 to side/2.

    The benchmark of Cardoso et al. (2024, MCGDiff), 25 components for ``side`` = 5. It has no time: every frame is a
    draw of its own.

    A state is (B, size), dimensionless, float64.

    Arguments:
        size: numbers in a state, even.
        side: components along each side of the lattice, odd.
        spacing: distance of neighbouring components in each number, in standard deviations of a component.
        step: seconds between frames.

    Raises:
        UserError: an odd size or an even side.
    """

    def __init__(self, size: int = 8, side: int = 5, spacing: float = 8.0, step: float = 86400.0):
        if size < 2 or size % 2 or side < 1 or side % 2 == 0:
            raise UserError(f"a mixture needs an even size and an odd side, got {size} and {side}")
        self.size = size
        lattice = [spacing * (k - side // 2) for k in range(side)]
        self.means = torch.tensor(list(itertools.product(lattice, lattice)), dtype=torch.float64).repeat(1, size // 2)  # (side^2, size)
        grid = Grid(("x",), (0.0,), tuple(float(k) for k in range(size)))
        self.spec = FieldSpec((Variable("u", "1", long_name="draw of a Gaussian mixture"),), grid, step)

    @property
    def spinup_frames(self) -> int:
        return 0

    def initial(self, seed: int, members: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self._draw(Streams(seed, members, "gaussian_mixture", "initial").normal((self.size + 1,), torch.float64)).to(device)

    def advance(self, state: Tensor, frame: int, seed: int, members: Sequence[int]) -> Tensor:
        return self._draw(forcing_noise((self.size + 1,), seed, members, frame, "gaussian_mixture")).to(state)

    def _draw(self, noise: Tensor) -> Tensor:
        """A draw from normal numbers (B, size + 1), the last of which picks the component."""
        picks = (torch.special.ndtr(noise[:, -1]) * len(self.means)).long().clamp(max=len(self.means) - 1)
        return self.means[picks] + noise[:, :-1]

    def fields(self, state: Tensor) -> Tensor:
        return state[:, None, None]

    def budgets(self, state: Tensor) -> dict[str, Tensor]:
        """``mean`` and ``energy`` (mean of x^2 / 2) of each member."""
        return {"mean": state.mean(1), "energy": 0.5 * state.square().mean(1)}
