"""Exponential Adams-Bashforth: multistep integrators of any order for the noise estimate."""

from collections.abc import Iterator

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.diffusion.base import Denoiser
from appa_lite.diffusion.samplers.stepped import Draw, SteppedSampler


class ExponentialAdamsBashforth(SteppedSampler):
    """Multistep exponential integrator with the noise estimate z = (x - D(x, sigma)) / sigma.

    In u = ln sigma the probability flow is dx/du = e^u z(u), hence

        x_{i+1} = x_i + int_{u_i}^{u_{i+1}} e^u z(u) du

    where z is replaced by the polynomial through its values at the last ``order`` levels (fewer at the start) and the
    integral is exact. Order 1 is DDIM. Zhang & Chen 2023 (DEIS), Coudière et al. 2018. On Gaussians with log-uniform
    levels that reach from far above to far below a mode's standard deviation, the third-order errors of both sides
    cancel, and the spread converges as h^4.

    Args:
        steps: noise levels; the denoiser is evaluated ``steps`` times.
        sigma_max, sigma_min: first and last noise level, in units of the latents.
        order: of convergence, 1 or more.
        schedule: 'log_uniform' or 'edm'.
    """

    def __init__(self, steps: int = 32, sigma_max: float = 1000.0, sigma_min: float = 0.01, order: int = 3, schedule: str = "log_uniform"):
        super().__init__(steps, sigma_max, sigma_min, schedule)
        if order < 1:
            raise UserError(f"the order of a multistep method is at least 1, found {order}")
        self.order = order

    def walk(self, x: Tensor, denoiser: Denoiser, draw: Draw) -> Iterator[Tensor]:
        known, estimates = [], []
        for sigma, after in self.transitions():
            known = [*known, sigma][-self.order :]
            estimates = [*estimates, (x - denoiser(x, sigma)) / sigma][-self.order :]
            x = x + sum(weight * z for weight, z in zip(weights(known, after), estimates, strict=True))
            yield x


def weights(known: list[Tensor], after: Tensor) -> Tensor:
    """(n,): int e^u l_j(u) du from the last of n levels to the level ``after``, for Lagrange's polynomials l_j in u = ln sigma.

    The weights w_j are those that integrate the powers of v = u - u_n exactly: sum_j w_j v_j^k = m_k, with the moments
    m_k = s_n int_0^V e^v v^k dv = s_n V^k e^V - k m_{k-1}, V = ln(after / s_n).
    """
    powers = torch.arange(len(known))
    last, end = known[-1], torch.log(after / known[-1])
    moments = [after - last]
    for k in range(1, len(known)):
        moments.append(after * end**k - k * moments[-1])
    return torch.linalg.solve(torch.log(torch.stack(known) / last) ** powers[:, None], torch.stack(moments))
