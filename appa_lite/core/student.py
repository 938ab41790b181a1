"""Student-t errors as scale mixtures of Gaussians, and the Gaussian that stands for one given an innovation."""

import math

import torch
from torch import Tensor

NODES = 48  # of the mixture
REACH = (1e-5, 12.0)  # precisions that the nodes span, over that of the scale


def mixture(degrees: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Log weights and variances (K,), over the squared scale, of t = integral N(0, 1/u) Gamma(u; degrees/2, degrees/2) du.

    Trapezoidal rule in log u (Lange, Little and Taylor 1989, for the mixture).
    """
    low, high = (math.log(r) for r in REACH)
    u = torch.linspace(low, high, NODES, dtype=torch.float64, device=like.device).exp()
    logarithm = degrees / 2 * (u.log() - u)  # the density of log u
    return torch.log_softmax(logarithm, 0).to(like), (1 / u).to(like)


def matched_variance(innovation: Tensor, spread: Tensor, variance: Tensor, degrees: float) -> Tensor:
    """The error variance with which a Gaussian value moves its mean as far as the Student-t one does.

        1 / (spread + R) = sum_k p_k / (spread + R_k),     p_k ~ w_k N(innovation; 0, spread + R_k)

    the sum over the nodes of the mixture, R_k their variances: the score of y ~ N(m, spread) + t is matched exactly. So
    large innovations, beside what the prior leaves open, are believed less, the less so the larger they are.

    Args:
        innovation: y - m; spread: variance that the prior leaves; variance: squared scale of the errors; all broadcast.
    """
    weight, scales = mixture(degrees, innovation)
    errors = variance[..., None] * scales
    total = spread[..., None] + errors
    logarithm = weight - 0.5 * (innovation[..., None] ** 2 / total + total.log()) - total.log()
    return (torch.softmax(logarithm, -1) * errors).sum(-1)  # q_k ~ p_k / (spread + R_k): no cancellation where spread is large
