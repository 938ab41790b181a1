"""What the Lorenz systems share: the ring's FieldSpec, the length of a time unit, and the check of finiteness."""

from collections.abc import Sequence

from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable

TIME_UNIT = 5 * 86400.0  # seconds, by the error-doubling time of the atmosphere


def ring_spec(K: int, step: float) -> FieldSpec:
    """One dimensionless variable ``u`` at x = 0 .. K-1 on a ring."""
    grid = Grid(("x",), (0.0,), tuple(float(k) for k in range(K)), (False, True))
    return FieldSpec((Variable("u", "1", long_name="Lorenz-96 variable"),), grid, step)


def check_finite(state: Tensor, members: Sequence[int], model: str, dt: float) -> Tensor:
    """``state``, or an error that names the first member that is not finite."""
    bad = [m for m, ok in zip(members, state.isfinite().all(1).tolist(), strict=True) if not ok]
    if bad:
        raise UserError(f"member {bad[0]} of {model} is not finite: take a smaller dt (now {dt:g})")
    return state
