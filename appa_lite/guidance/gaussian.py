"""Gaussian likelihoods of what is observed, p~(y | x_t) = N(y; A D(x_t), R + A C A^T): their systems and their logarithms."""

from collections.abc import Callable

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.linalg import Solution, conjugate_gradients
from appa_lite.guidance.base import Local

LARGEST = 128  # values whose determinant is computed
PRECISE = 1e-4  # relative residual of a solution that weighs particles


def diagonal(innovation: Tensor, variance: Tensor) -> Tensor:
    """log N(innovation; 0, diag(variance)) up to a constant: (B,), for (B, M) and (M,) or (B, M)."""
    return -0.5 * (innovation**2 / variance + variance.log()).sum(-1)


def dense(innovation: Tensor, matvec: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(I + G)^{-1} d (B, M) and log N(d; 0, I + G) up to a constant (B,), for whitened innovations d (B, M).

    G = R^{-1/2} A C A^T R^{-1/2} is formed column by column, M products, and made the covariance that it stands for:
    symmetric, its negative eigenvalues (those of a learned Jacobian) set to zero.

    Args:
        matvec: G v for values v (B, M).

    Raises:
        UserError: more than ``LARGEST`` values.
    """
    count = innovation.shape[1]
    if count > LARGEST:
        raise UserError(
            f"particles of {count} observed values need the determinant of a {count} x {count} matrix each, at most {LARGEST}: "
            "choose guidance=moment_matching with linear observations, or give fewer"
        )
    eye = torch.eye(count, dtype=innovation.dtype, device=innovation.device)
    columns = torch.stack([matvec(e.expand_as(innovation)) for e in eye], dim=-1).double()
    values, vectors = torch.linalg.eigh((columns + columns.mT) / 2)
    values = 1 + values.clamp(min=0)
    rotated = (vectors.mT @ innovation.double()[..., None])[..., 0]
    return (vectors @ (rotated / values)[..., None])[..., 0].to(innovation), diagonal(rotated, values)


def solve_known(
    here: Local,
    spread: Callable[[Tensor], Tensor],
    tolerance: float,
    max_iterations: int,
    precondition: Callable[[Tensor], Tensor] | None,
    twist: bool,
    values: Tensor | None = None,
) -> tuple[Solution | None, Tensor, Tensor | None]:
    """v = (R + A C A^T)^{-1} (y - A D), for a C that costs no network call: symmetric positive definite.

    Args:
        spread: C a for components a of the modes; twist: also log p~(y | x_t); values: (B, M) in the place of y - A D.

    Returns:
        what the solver did (None where the system was small and solved at once), v (B, M), log p~ (B,) or None. With a
        linear operator the determinant is the same for all members, and left out.
    """
    whiten, linear = here.variance.rsqrt(), here.linear
    innovation, name = (here.innovation if values is None else values) * whiten, "v" if values is None else "values"

    def matvec(v: Tensor) -> Tensor:
        return linear.forward(spread(linear.adjoint(v * whiten))) * whiten

    if twist and not here.operator.linear:
        solution, logarithm = dense(innovation, matvec)
        return None, solution * whiten, logarithm
    tolerance = min(tolerance, PRECISE) if twist else tolerance
    start = here.memory.get(name)
    solution = conjugate_gradients(lambda v: v + matvec(v), innovation, start, tolerance, max_iterations, precondition)
    here.memory[name] = solution.x
    return solution, solution.x * whiten, -0.5 * (innovation * solution.x).sum(-1) if twist else None
