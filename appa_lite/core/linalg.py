"""Matrix-free solvers, batched over members."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """x (B, M), the relative residual |b - A x| / |b| reached by each member (B,), and the iterations taken."""

    x: Tensor
    residual: Tensor
    iterations: int


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    start: Tensor | None = None,
    tolerance: float = 1e-2,
    max_iterations: int = 200,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Solve A x = b for symmetric positive definite A, all members at once (Hestenes and Stiefel 1952).

    Members that have converged stand still, so that the answer of one does not depend on the others.
    ``precondition`` applies a symmetric positive definite approximation of the inverse of A; the residual is measured
    without it. Raises ``FloatingPointError`` where A shows negative curvature.
    """
    tiny = torch.finfo(b.dtype).tiny
    precondition = precondition or (lambda r: r)
    norm = b.norm(dim=-1).clamp(min=tiny)
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b.clone() if start is None else b - matvec(x)
    z = precondition(r)
    p, rho = z.clone(), (r * z).sum(-1)
    iterations = 0
    active = r.norm(dim=-1) / norm > tolerance
    while bool(active.any()) and iterations < max_iterations:
        q = matvec(p)
        curvature = (p * q).sum(-1)
        if bool((curvature[active] <= 0).any()):
            raise FloatingPointError("conjugate gradients met negative curvature: the operator is not positive definite")
        alpha = torch.where(active, rho / curvature.clamp(min=tiny), torch.zeros_like(rho))
        x = x + alpha[:, None] * p
        r = r - alpha[:, None] * q
        z = precondition(r)
        after = (r * z).sum(-1)
        beta = torch.where(active, after / rho.clamp(min=tiny), torch.zeros_like(rho))
        p = torch.where(active[:, None], z + beta[:, None] * p, p)
        rho = torch.where(active, after, rho)
        active = r.norm(dim=-1) / norm > tolerance
        iterations += 1
    return Solution(x, r.norm(dim=-1) / norm, iterations)
