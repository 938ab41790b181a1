"""DPM-Solver++: exponential integrators of second order for the denoised estimate (Lu et al. 2022, arXiv 2211.01095).

In lambda = -ln sigma the probability flow is dx/dlambda = D - x, whose linear part is solved exactly. Over a step
h = lambda_{i+1} - lambda_i with an estimate D' of D,

    x_{i+1} = e^{-h} x_i + (1 - e^{-h}) D'

and the solvers differ in D': extrapolated from the last step (2M), or evaluated half-way (2S).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.diffusion.base import Denoiser
from appa_lite.diffusion.samplers.stepped import Draw, SteppedSampler


class DPMSolverPP2M(SteppedSampler):
    """Second-order multistep exponential integrator: DPM-Solver++(2M) and its stochastic form SDE-DPM-Solver++(2M).

    With lambda = -ln sigma, h = lambda_{i+1} - lambda_i and D' the denoiser extrapolated from the last two steps,

        x_{i+1} = (s_{i+1}/s_i) e^{-eta h} x_i + (1 - e^{-(1 + eta) h}) D' + s_{i+1} sqrt(1 - e^{-2 eta h}) n

    with eta = 0 (an ordinary differential equation) or 1 (stochastic). Lu et al. 2022, eq. 8 and appendix on SDE solvers.

    Args:
        steps: noise levels; the denoiser is evaluated ``steps`` times.
        sigma_max, sigma_min: first and last noise level, in units of the latents.
        eta: 0 deterministic, 1 stochastic.
        schedule: 'log_uniform' or 'edm'.
    """

    def __init__(self, steps: int = 32, sigma_max: float = 300.0, sigma_min: float = 0.01, eta: float = 1.0, schedule: str = "log_uniform"):
        super().__init__(steps, sigma_max, sigma_min, schedule)
        self.eta = eta

    def walk(self, x: Tensor, denoiser: Denoiser, draw: Draw) -> Iterator[Tensor]:
        previous, last_h = None, None
        for sigma, after in self.transitions():
            mean, h = denoiser(x, sigma), torch.log(sigma / after)
            estimate = mean if previous is None else mean + h / (2 * last_h) * (mean - previous)
            x = after / sigma * torch.exp(-self.eta * h) * x + (1 - torch.exp(-(1 + self.eta) * h)) * estimate
            if self.eta > 0:
                x = x + after * torch.sqrt(1 - torch.exp(-2 * self.eta * h)) * draw()
            previous, last_h = mean, h
            yield x


class DPMSolverPP2S(SteppedSampler):
    """Second-order singlestep exponential integrator, DPM-Solver++(2S), with the optional churn of EDM.

    The denoiser is evaluated once more half-way in lambda, at s' = sqrt(s_i s_{i+1}):

        x' = (s'/s_i) x_i + (1 - s'/s_i) D(x_i, s_i),  x_{i+1} = (s_{i+1}/s_i) x_i + (1 - s_{i+1}/s_i) D(x', s')

    Lu et al. 2022, algorithm 1 with r = 1/2. With churn, a step from a level within [churn_min, churn_max] first
    adds noise of standard deviation ``churn_std`` sqrt(g^2 - 1) s_i, which raises the level by the factor
    g = 1 + min(churn / steps, sqrt(2) - 1), and starts from there (Karras et al. 2022, algorithm 2; GenCast, Price
    et al. 2024, has steps 20, churn 2.5 within [0.75, 80] and churn_std 1.05).

    Args:
        steps: noise levels; the denoiser is evaluated ``2 steps - 1`` times.
        sigma_max, sigma_min: first and last noise level, in units of the latents.
        churn: noise added in all, in units of ln sigma; 0 deterministic.
        churn_min, churn_max: levels between which it is added.
        churn_std: standard deviation of that noise; 1 keeps the law, more makes up for spread that a denoiser loses.
        schedule: 'log_uniform' or 'edm'.
    """

    def __init__(
        self,
        steps: int = 32,
        sigma_max: float = 1000.0,
        sigma_min: float = 0.01,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = float("inf"),
        churn_std: float = 1.0,
        schedule: str = "log_uniform",
    ):
        super().__init__(steps, sigma_max, sigma_min, schedule)
        if churn < 0 or churn_std < 0:
            raise UserError(f"churn and churn_std are at least 0, found {churn} and {churn_std}")
        self.growth = 1 + min(churn / steps, 2**0.5 - 1)
        self.churn_min, self.churn_max, self.churn_std = churn_min, churn_max, churn_std

    def walk(self, x: Tensor, denoiser: Denoiser, draw: Draw) -> Iterator[Tensor]:
        for sigma, after in self.transitions():
            if self.growth > 1 and self.churn_min <= sigma <= self.churn_max:
                x = x + self.churn_std * (self.growth**2 - 1) ** 0.5 * sigma * draw()
                sigma = self.growth * sigma
            middle = torch.sqrt(sigma * after)
            half = middle / sigma * x + (1 - middle / sigma) * denoiser(x, sigma)
            x = after / sigma * x + (1 - after / sigma) * denoiser(half, middle)
            yield x
