"""Moment-matching posterior sampling with the denoiser's own Jacobian."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.linalg import conjugate_gradients, gmres
from appa_lite.guidance.base import Correction, Local, check_on_failure
from appa_lite.guidance.gaussian import dense

SOLVERS = {"cg": conjugate_gradients, "gmres": gmres}


class MMPS(Correction):
    """Moment matching posterior sampling: V[z | z_t] = sigma^2 J^T by Tweedie's formula, J the denoiser's Jacobian.

        (R + A sigma^2 J^T A^T) v = y - A(D(z_t)),    E[z | z_t, y] = D(z_t) + sigma^2 J^T A^T v

    Rozet et al. 2024, 'Learning diffusion priors from observations by expectation maximization', eq. 19 to 23. Each
    iteration costs one vector-Jacobian product, and the correction none: it is the sum of products already made (k
    products cold, k + 1 with a warm start). A is linearised once a step. The system is whitened by R, started from
    the solution at the last noise level and preconditioned by the climatological covariance, which costs no network
    call. Conjugate gradients need a symmetric positive J, which a learned one is not: see ``conjugate_gradients``.
    ``solver=gmres max_iterations=1 warm=false whiten=false precondition=false`` is what the azula library does.

    Args:
        solver: ``cg`` (with GMRES to fall back on) or ``gmres``.
        tolerance: relative residual, in the R-whitened norm.
        max_iterations: products a step, beyond the one of a warm start.
        warm: start from the last noise level; whiten: by R; precondition: by the climatological covariance.
        on_failure: ``warn`` or ``error`` where the tolerance is not reached.
    """

    exact = True

    def __init__(
        self,
        solver: str = "cg",
        tolerance: float = 0.03,
        max_iterations: int = 16,
        warm: bool = True,
        whiten: bool = True,
        precondition: bool = True,
        on_failure: str = "warn",
    ):
        if solver not in SOLVERS:
            raise UserError(f"guidance.solver={solver}: expected one of {', '.join(SOLVERS)}")
        self.solver, self.tolerance, self.max_iterations = solver, tolerance, max_iterations
        self.warm, self.whiten, self.precondition = warm, whiten, precondition
        self.on_failure = check_on_failure(on_failure)

    def correct(self, here: Local, twist: bool) -> tuple[Tensor, Tensor | None]:
        return self._dense(here) if twist else (self._iterate(here), None)

    def _iterate(self, here: Local) -> Tensor:
        variance, innovation = here.variance.double(), here.innovation.double()
        root = variance.rsqrt()
        scale = root if self.whiten else torch.ones_like(root)

        def matvec(v: Tensor) -> tuple[Tensor, Tensor]:
            image = here.pull(v * scale)
            return v * variance * scale**2 + here.observe(image) * scale, image

        solution = SOLVERS[self.solver](
            matvec,
            innovation * scale,
            here.memory.get("v") if self.warm else None,
            self.tolerance,
            self.max_iterations,
            self._preconditioner(here, root / scale),
        )
        here.memory["v"] = solution.x
        correction = torch.zeros_like(here.mean) if solution.image is None else solution.image
        if self.whiten:
            here.solved(solution, self.tolerance, self.on_failure)
        else:
            left = root * (innovation - variance * scale * solution.x - here.observe(correction))
            whitened = left.norm(dim=-1) / (root * innovation).norm(dim=-1).clamp(min=torch.finfo(left.dtype).tiny)
            here.solved(replace(solution, residual=whitened), self.tolerance, self.on_failure)
        return correction

    def _preconditioner(self, here: Local, rest: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The inverse for the whitened system, moved to the one that is solved: ``rest`` is what whitening is left."""
        inverse = here.linear.preconditioner(here.covariance, here.sigma, here.variance) if self.precondition else None
        return None if inverse is None else lambda residual: rest * inverse(rest * residual)

    def _dense(self, here: Local) -> tuple[Tensor, Tensor]:
        """With the determinant: the matrix column by column, as many products as values; its images make the correction."""
        root, images = here.variance.double().rsqrt(), []

        def matvec(v: Tensor) -> Tensor:
            images.append(here.pull(v * root))
            return here.observe(images[-1]) * root

        v, logarithm = dense(here.innovation.double() * root, matvec)
        correction = torch.einsum("bm,mb...->b...", v.to(here.mean), torch.stack(images))
        here.direct()
        return correction, logarithm
