"""Matrix-free solvers, batched over members: what one member gets does not depend on the others.

A ``matvec`` maps v (B, M) to A v. It may return a pair (A v, F v), with F any other linear map that A v has been
through: the solution then holds F x beside x, summed up on the way, which saves the product that would compute it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

CROOKED = 0.01  # cosine between successive residuals from which on a matrix is taken for asymmetric

Matvec = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


class Stop(IntEnum):
    """Why a member's iterations ended; conjugate gradients that stall or meet negative curvature go on with GMRES."""

    CONVERGED = 0
    EXHAUSTED = 1  #: the iterations allowed
    STALLED = 2
    NEGATIVE_CURVATURE = 3


@dataclass(frozen=True)
class Solution:
    """x (B, M), the relative residual |b - A x| / |b| that each member reached (B,), and how.

    Args:
        iterations: products with A, of the slowest member; one more was spent on a start.
        spent: the same by member (B,).
        stop: a ``Stop`` for each member (B,): why its first solver ended. Whether the solution is good is told by ``residual``.
        image: F x (B, ...), where ``matvec`` gives pairs.
    """

    x: Tensor
    residual: Tensor
    iterations: int
    spent: Tensor
    stop: Tensor
    image: Tensor | None = None


@dataclass
class _Iterate:
    """x with its residual r = b - A x and its image F x."""

    x: Tensor
    r: Tensor
    image: Tensor | None

    @classmethod
    def begin(cls, matvec: Matvec, b: Tensor, start: Tensor | None) -> "_Iterate":
        """The start; zero for members whose start is no better than zero."""
        if start is None:
            return cls(torch.zeros_like(b), b.clone(), None)
        product, image = _pair(matvec(start))
        here = cls(start.clone(), b - product, image)
        helps = here.r.norm(dim=-1) < b.norm(dim=-1)
        zero = cls(torch.zeros_like(b), b.clone(), None if image is None else torch.zeros_like(image))
        return zero.replaced(helps, here)

    def moved(self, amount: Tensor, step: Tensor, product: Tensor, image: Tensor | None) -> "_Iterate":
        """x + amount * step, where the step's product and image are known."""
        if image is not None:
            image = _rows(amount, image).to(image) * image
            image = image if self.image is None else self.image + image
        return _Iterate(self.x + amount[:, None] * step, self.r - amount[:, None] * product, image)

    def replaced(self, where: Tensor, other: "_Iterate") -> "_Iterate":
        """The other iterate for the members ``where`` (B,)."""
        image = other.image
        if image is not None:
            image = torch.where(_rows(where, image), image, torch.zeros_like(image) if self.image is None else self.image)
        return _Iterate(torch.where(where[:, None], other.x, self.x), torch.where(where[:, None], other.r, self.r), image)


def conjugate_gradients(
    matvec: Matvec,
    b: Tensor,
    start: Tensor | None = None,
    tolerance: float = 1e-2,
    max_iterations: int = 200,
    precondition: Callable[[Tensor], Tensor] | None = None,
    patience: int = 5,
    restart: int = 25,
) -> Solution:
    """Solve A x = b for A that should be symmetric positive definite (Hestenes and Stiefel 1952), all members at once.

    Members that have converged stand still. A member that meets negative curvature (p^T A p <= 0), or that stalls, goes
    back to its best iterate and on from there with GMRES, on what is left of its iterations. Stalled is who has found A
    asymmetric, by a residual that is not orthogonal to the one before, and whose residual has not fallen by a tenth in
    ``patience`` iterations or doubled: symmetric positive definite systems never are, those made of a learned Jacobian
    are. Nothing is raised; the residual tells whether the solution is good.

    Args:
        matvec: A, or A and F (see above); b: right-hand sides (B, M); start: first guess (B, M), ignored where zero is better.
        tolerance: of the relative residual |b - A x| / |b|, measured without the preconditioner.
        max_iterations: products with A, beyond the one that a start costs.
        precondition: applies a symmetric positive definite approximation of the inverse of A.
        patience: iterations without progress that count as a stall where A is asymmetric; restart: of GMRES.
    """
    precondition = precondition or (lambda r: r)
    norm = b.norm(dim=-1).clamp(min=torch.finfo(b.dtype).tiny)
    now = best = _Iterate.begin(matvec, b, start)
    residual = lowest = mark = now.r.norm(dim=-1) / norm
    idle, spent, stop = (torch.zeros(len(b), dtype=torch.long, device=b.device) for _ in range(3))
    crooked = torch.zeros_like(residual)
    z = precondition(now.r)
    p, rho = z, (now.r * z).sum(-1)
    active, iterations = residual > tolerance, 0
    while bool(active.any()) and iterations < max_iterations:
        product, image = _pair(matvec(p))
        iterations, spent = iterations + 1, spent + active
        curvature = (p * product).sum(-1)
        bent = active & ~((curvature > 0) & (rho > 0))  # also where they are not numbers
        stop[bent] = Stop.NEGATIVE_CURVATURE
        active = active & ~bent
        now = now.replaced(active, now.moved(_where(active, rho, curvature), p, product, image))
        residual = now.r.norm(dim=-1) / norm
        better = active & (residual < lowest)
        best, lowest = best.replaced(better, now), torch.where(better, residual, lowest)
        progress = lowest < 0.9 * mark
        mark, idle = torch.where(progress, lowest, mark), torch.where(progress, 0, idle + active)
        overlap, z = (now.r * z).sum(-1).abs(), precondition(now.r)
        after = (now.r * z).sum(-1)
        crooked = torch.maximum(crooked, _where(active, overlap, (rho * after).abs().sqrt()))
        lost = (idle >= patience) | (residual > 2 * lowest) | (spent >= max_iterations)
        stalled = active & (residual > tolerance) & (lost & (crooked > CROOKED) | ~torch.isfinite(residual))
        stop[stalled] = Stop.STALLED
        active = active & ~stalled & (residual > tolerance)
        p, rho = torch.where(active[:, None], z + _where(active, after, rho)[:, None] * p, p), torch.where(active, after, rho)
    stop[active] = Stop.EXHAUSTED
    fallen = stop >= Stop.STALLED
    now, residual = now.replaced(fallen, best), torch.where(fallen, lowest, residual)
    if bool(fallen.any()):
        rest = _Gmres(matvec, precondition, norm, tolerance, restart)
        now, residual, spent, extra, _ = rest(now, residual, fallen, spent, max_iterations)
        iterations += extra
    return Solution(now.x, residual, iterations, spent, stop, now.image)


def gmres(
    matvec: Matvec,
    b: Tensor,
    start: Tensor | None = None,
    tolerance: float = 1e-2,
    max_iterations: int = 200,
    precondition: Callable[[Tensor], Tensor] | None = None,
    restart: int = 25,
) -> Solution:
    """Solve A x = b for any A by the generalised minimal residual method (Saad and Schultz 1986), all members at once.

    Preconditioned from the right, A M^{-1} (M x) = b, so that the residual it minimises is the true one; restarted every
    ``restart`` products; given up where a whole cycle lowers the residual by less than a hundredth (``Stop.STALLED``).
    Arguments as for ``conjugate_gradients``; ``precondition`` need not be symmetric.
    """
    norm = b.norm(dim=-1).clamp(min=torch.finfo(b.dtype).tiny)
    now = _Iterate.begin(matvec, b, start)
    residual, spent = now.r.norm(dim=-1) / norm, torch.zeros(len(b), dtype=torch.long, device=b.device)
    solve = _Gmres(matvec, precondition or (lambda r: r), norm, tolerance, restart)
    now, residual, spent, iterations, stalled = solve(now, residual, residual > tolerance, spent, max_iterations)
    stop = torch.where(stalled, Stop.STALLED, torch.where(residual > tolerance, Stop.EXHAUSTED, Stop.CONVERGED))
    return Solution(now.x, residual, iterations, spent, stop, now.image)


@dataclass(frozen=True)
class _Gmres:
    """Restarted GMRES from a given iterate, for some of the members, each with its own allowance of products."""

    matvec: Matvec
    precondition: Callable[[Tensor], Tensor]
    norm: Tensor
    tolerance: float
    restart: int

    def __call__(
        self, now: _Iterate, residual: Tensor, active: Tensor, spent: Tensor, allowed: int
    ) -> tuple[_Iterate, Tensor, Tensor, int, Tensor]:
        """The iterate, its residual (B,), products spent (B,), products made, and who stalled (B,)."""
        made, stalled = 0, torch.zeros_like(active)
        active = active & (residual > self.tolerance) & (spent < allowed)
        while bool(active.any()):
            after, length, count = self._cycle(now, active, allowed - spent)
            spent, made = spent + length, made + count
            reached = after.r.norm(dim=-1) / self.norm
            better = active & (reached < residual)  # false where not a number
            stalled = stalled | (active & ~(reached < 0.99 * residual) & (reached > self.tolerance))
            now, residual = now.replaced(better, after), torch.where(better, reached, residual)
            active = active & ~stalled & (residual > self.tolerance) & (spent < allowed)
        return now, residual, spent, made, stalled

    def _cycle(self, now: _Iterate, active: Tensor, allowed: Tensor) -> tuple[_Iterate, Tensor, int]:
        """Up to ``restart`` Arnoldi steps (modified Gram-Schmidt), and the least-squares step of each member."""
        size = now.r.norm(dim=-1)
        tiny = torch.finfo(now.r.dtype).tiny
        basis = [torch.where(active, 1 / size.clamp(min=tiny), 0)[:, None] * now.r]
        triangle = _Rotations(size.double())
        running, length = active, torch.zeros_like(allowed)
        steps: list[tuple[Tensor, Tensor, Tensor | None]] = []
        while bool(running.any()):
            z = self.precondition(basis[-1])
            product, image = _pair(self.matvec(z))
            steps.append((z, product, image))
            length = length + running
            w, column = product, []
            for v in basis:
                column.append((w * v).sum(-1))
                w = w - column[-1][:, None] * v
            left = w.norm(dim=-1)
            basis.append(torch.where(left > 0, 1 / left.clamp(min=tiny), 0)[:, None] * w)
            misfit = triangle.add(torch.stack([*column, left], dim=-1).double())
            running = running & (misfit.to(size) > self.tolerance * self.norm) & (length < allowed)
            running = running & (len(steps) < self.restart) & (left > 0)
        for amount, (z, product, image) in zip(triangle.solve(length).to(now.x).unbind(-1), steps, strict=True):
            now = now.moved(amount, z, product, image)
        return now, length, len(steps)


class _Rotations:
    """The Hessenberg least-squares problem min |beta e_1 - H y| of each member, kept triangular by Givens rotations, in float64."""

    def __init__(self, beta: Tensor):
        self.columns: list[Tensor] = []
        self.right = [beta]
        self.turns: list[tuple[Tensor, Tensor]] = []

    def add(self, column: Tensor) -> Tensor:
        """Take the next column of H, (B, k + 2), and return the residual's norm (B,)."""
        entries = list(column.unbind(-1))
        for i, (c, s) in enumerate(self.turns):
            entries[i], entries[i + 1] = c * entries[i] + s * entries[i + 1], c * entries[i + 1] - s * entries[i]
        size = torch.hypot(entries[-2], entries[-1])
        safe = size.clamp(min=torch.finfo(size.dtype).tiny)
        c, s = torch.where(size > 0, entries[-2] / safe, 1), entries[-1] / safe
        self.turns.append((c, s))
        self.columns.append(torch.stack([*entries[:-2], size], dim=-1))
        last = self.right.pop()
        self.right += [c * last, -s * last]
        return self.right[-1].abs()

    def solve(self, length: Tensor) -> Tensor:
        """y (B, k), for each member from its own first ``length`` (B,) columns, zero beyond."""
        k = len(self.columns)
        upper = torch.stack([torch.nn.functional.pad(c, (0, k - c.shape[-1])) for c in self.columns], dim=-1)
        inside = torch.arange(k, device=length.device) < length[:, None]
        diagonal = upper.diagonal(dim1=-2, dim2=-1)
        inside = inside & (diagonal > 1e-14 * diagonal.amax(-1, keepdim=True))  # a singular direction tells nothing
        eye = torch.eye(k, dtype=upper.dtype, device=upper.device)
        upper = torch.where(inside[:, :, None] & inside[:, None, :], upper, eye)
        right = torch.where(inside, torch.stack(self.right[:k], dim=-1), 0)
        return torch.linalg.solve_triangular(upper, right[..., None], upper=True)[..., 0]


def _pair(product: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return product if isinstance(product, tuple) else (product, None)


def _rows(numbers: Tensor, like: Tensor) -> Tensor:
    """One number a member, (B,), shaped to multiply ``like`` (B, ...)."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def _where(active: Tensor, over: Tensor, under: Tensor) -> Tensor:
    """over / under for active members, zero for the others."""
    return torch.where(active, over / torch.where(active, under, 1), 0)
