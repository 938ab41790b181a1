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
    matvec: Callable[[Tensor], Tensor], b: Tensor, start: Tensor | None = None, tolerance: float = 1e-2, max_iterations: int = 200
) -> Solution:
    """Solve A x = b for symmetric positive definite A, all members at once (Hestenes and Stiefel 1952).

    Members that have converged stand still, so that the answer of one does not depend on the others. The best iterate
    of each member is returned. Raises ``FloatingPointError`` where A shows negative curvature.
    """
    norm = b.norm(dim=-1).clamp(min=torch.finfo(b.dtype).tiny)
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b.clone() if start is None else b - matvec(x)
    p, rho = r.clone(), (r * r).sum(-1)
    iterations = 0
    active = rho.sqrt() / norm > tolerance
    while bool(active.any()) and iterations < max_iterations:
        q = matvec(p)
        curvature = (p * q).sum(-1)
        if bool((curvature[active] <= 0).any()):
            raise FloatingPointError("conjugate gradients met negative curvature: the operator is not positive definite")
        alpha = torch.where(active, rho / curvature.clamp(min=torch.finfo(b.dtype).tiny), torch.zeros_like(rho))
        x = x + alpha[:, None] * p
        r = r - alpha[:, None] * q
        after = (r * r).sum(-1)
        beta = torch.where(active, after / rho.clamp(min=torch.finfo(b.dtype).tiny), torch.zeros_like(rho))
        p = torch.where(active[:, None], r + beta[:, None] * p, p)
        rho = torch.where(active, after, rho)
        active = rho.sqrt() / norm > tolerance
        iterations += 1
    return Solution(x, rho.sqrt() / norm, iterations)
