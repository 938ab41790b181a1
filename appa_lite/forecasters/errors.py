"""Errors of observations that nobody stated right, from innovations under the model's own Gaussian climatology.

    d = y - H(m) ~ N(b, S),      S = H C H^T + R,      R = diag(f_g r_i) for a value i of kind g

with m and C the climatological mean and space-time covariance of the prior. Nothing is sampled and no network is
called. Everything is said with the whitened inverse W = R^{1/2} S^{-1} R^{1/2} = (I + R^{-1/2} H C H^T R^{-1/2})^{-1},
applied by conjugate gradients: the misfit of the linear analysis is R^{1/2} W R^{-1/2} d, and its variance over the
value's own, A_ii / R_ii, is 1 - W_ii.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.linalg import conjugate_gradients
from appa_lite.core.random import generator
from appa_lite.forecasters.posterior import ModeCovariance, Period, Prior, later
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.observations.base import Observation

WINDOWS = 4  #: training windows in a piece of a long period; pieces count as independent
GROSS = 10.0  #: standard deviation of a gross error over that of an ordinary one
LARGEST_STEP = float(np.log(4.0))


class Innovations:
    """d and W of the observations of one stretch of time.

    Args:
        rows: which rows of the whole observation these are (M,).
        observation: of fields at ``times``; tolerance, max_iterations: of the solver.
    """

    def __init__(
        self, checkpoint: Checkpoint, observation: Observation, times: np.ndarray, rows: Tensor, tolerance: float = 1e-3,
        max_iterations: int = 500,
    ):  # fmt: skip
        period = Period.around(times, checkpoint)
        prior = Prior(checkpoint, period, 0, 1)
        self.covariance = ModeCovariance(prior, prior_only=True)
        self.rows, self.tolerance, self.max_iterations = rows, tolerance, max_iterations
        latent = prior.observe_once(later(observation, period.before))
        mean = checkpoint.denoiser.mean.expand(1, prior.shape[0], -1).unflatten(2, prior.shape[1:])
        self.linear = latent.operator.linearise(mean)
        self.values = latent.values - latent.operator.predict(mean)[0]  #: d (M,)
        self.variance = latent.variance  #: r (M,), as stated

    def solve(self, variance: Tensor, right: Tensor, start: Tensor | None = None) -> Tensor:
        """W right (B, M), for error variances (M,)."""
        whiten, sigma = variance.rsqrt(), torch.ones((), device=variance.device)

        def matvec(v: Tensor) -> Tensor:
            return v + self.linear.forward(self.covariance.apply(self.linear.adjoint(v * whiten), sigma)) * whiten

        precondition = self.linear.preconditioner(self.covariance, sigma, variance)
        return conjugate_gradients(matvec, right, start, self.tolerance, self.max_iterations, precondition).x

    def probes(self, count: int, seed: int, *names: object) -> Tensor:
        """Signs (count, M), the same for any run."""
        draws = torch.randint(0, 2, (count, len(self.values)), generator=generator(seed, "probes", *names))
        return (2.0 * draws - 1.0).to(self.values)


def innovations(checkpoint: Checkpoint, observation: Observation, times: np.ndarray) -> list[Innovations]:
    """The innovations of a period, in pieces of a few training windows; every row belongs to one of them."""
    length = WINDOWS * checkpoint.denoiser.config.frames * checkpoint.autoencoder.stride[0]
    left, found = torch.ones(len(observation), dtype=torch.bool, device=observation.variance.device), []
    for first in range(0, max(len(times) - 1, 1), length):
        stop = min(first + length + 1, len(times))  # a frame beyond the cut, for rows between the two
        chosen = left & observation.operator.within(first, stop)
        left &= ~chosen
        if bool(chosen.any()):
            piece = observation.select(chosen).window(first, stop)
            found.append(Innovations(checkpoint, piece, times[first:stop], chosen.nonzero()[:, 0]))
    return found


# How large errors are


@dataclass(frozen=True)
class ErrorEstimate:
    """What innovations say of one kind of observation.

    ``factor`` on the stated standard deviation, and the standard error of its logarithm; ``bias`` in the units of the
    values, and its standard error.
    """

    factor: float
    uncertainty: float
    bias: float
    bias_error: float


def estimate_errors(
    pieces: Sequence[Innovations], kinds: np.ndarray, bias: bool = False, seed: int = 0, probes: int = 16, iterations: int = 20
) -> dict[str, ErrorEstimate]:
    """The most likely error variances and biases, kind by kind: restricted to one factor and one bias each.

        d log p / d log f_g = (|(W d~)_g|^2 - tr W_gg) / 2,      Fisher information F_gh = tr(W_gh W_hg) / 2

    by Fisher scoring, traces with Rademacher probes (Hutchinson 1990) that stay the same through the iterations; the
    bias is the generalised least-squares mean of d. At the solution the Desroziers et al. (2005) relation for R holds
    kind by kind in the weighted mean; see Dee and da Silva (1999) for maximum likelihood in data assimilation. What C
    does not hold (scales below the model's) counts as error of the observations, as it must in an analysis with this C.

    Args:
        kinds: (rows of the whole observation,); bias: whether to estimate biases (else they are zero).
    """
    names = sorted(set(kinds[np.concatenate([p.rows.cpu().numpy() for p in pieces])]))
    index = {name: g for g, name in enumerate(names)}
    groups = [torch.tensor([index[k] for k in kinds[p.rows.cpu().numpy()]], device=p.values.device) for p in pieces]
    signs = [torch.nn.functional.one_hot(g, len(names)).T.to(p.values) for p, g in zip(pieces, groups, strict=True)]
    draws = [p.probes(probes, seed, i) for i, p in enumerate(pieces)]
    log, offset, warm = torch.zeros(len(names), dtype=torch.float64), torch.zeros(len(names), dtype=torch.float64), [None] * len(pieces)
    for _ in range(iterations):
        gradient, information = torch.zeros_like(log), torch.zeros(len(names), len(names), dtype=torch.float64)
        normal, right = torch.zeros_like(information), torch.zeros_like(log)
        for i, (piece, group, member, draw) in enumerate(zip(pieces, groups, signs, draws, strict=True)):
            variance = piece.variance * log.exp().to(piece.values)[group]
            ones = member / variance.sqrt()
            data = (piece.values - offset.to(piece.values)[group]) / variance.sqrt()
            grouped = (member[:, None] * draw[None]).flatten(0, 1)  # each probe, one kind at a time
            warm[i] = piece.solve(variance, torch.cat([data[None], ones, grouped]), warm[i])
            solved, level, probed = warm[i].double().split([1, len(names), len(grouped)])
            member, probed = member.double(), probed.unflatten(0, (len(names), -1))
            gradient += ((solved**2) @ member.T)[0] / 2 - torch.einsum(
                "gkm,gkm->g", probed, grouped.double().unflatten(0, (-1, probes))
            ) / (2 * probes)
            information += torch.einsum("hkm,gm->gh", probed**2, member) / (2 * probes)
            normal += ones.double() @ level.T
            right += level @ data.double()
        step = torch.linalg.solve(information, gradient).clamp(-LARGEST_STEP, LARGEST_STEP)
        log = log + step
        move = torch.linalg.solve(normal, right) if bias else torch.zeros_like(log)
        offset = offset + move
        if step.abs().max() < 0.005 and (move * normal.diagonal().sqrt()).abs().max() < 0.05:
            break
    spread, error = torch.linalg.inv(information).diagonal().sqrt() / 2, torch.linalg.inv(normal).diagonal().sqrt()
    columns = ((log / 2).exp(), spread, offset, error)
    return {name: ErrorEstimate(*(float(c[g]) for c in columns)) for name, g in index.items()}


# Which values are wrong altogether


def gross_errors(
    pieces: Sequence[Innovations], rows: int, probability: float, seed: int = 0, probes: int = 64, iterations: int = 12
) -> tuple[Tensor, Tensor]:
    """The probability of each value (rows,) that its error is gross, given all others, and the weight this leaves it.

        e_i ~ (1 - P) N(0, R_i) + P N(0, (10)^2 R_i),     d_i | others ~ N(0, A_i + R_i) or N(0, A_i + 10^2 R_i)

    The contaminated normal of Box and Tiao (1968) in the quality control of Lorenc and Hammon (1988) and Ingleby and
    Lorenc (1993), all values at once: with the analysis that leaves value i out, whose misfit is R^{1/2} (W d~)_i / W_ii
    and whose variance A_i is R_i (1 / W_ii - 1). Values are then analysed with R / weight, such that each moves the
    analysis as far as the mean over the two classes would (assumed-density filtering: Opper 1998), 1 / (A + R / weight) =
    (1 - p) / (A + R) + p / (A + 10^2 R), and the probabilities are computed again. The first pass takes all errors for
    ten times larger than stated in variance, so that a gross one does not pull its neighbours into doubt.

    Args:
        probability: P, of a gross error, before anything is known.
    """
    found, weights = torch.full((rows,), float(probability)), torch.ones(rows)
    for i, piece in enumerate(pieces):
        stated, draw = piece.variance.double(), piece.probes(probes, seed, i)
        weight, warm = torch.full_like(stated, 1 / GROSS), None
        for _ in range(iterations):
            used = stated / weight
            warm = piece.solve(used.to(piece.values), torch.cat([(piece.values / used.sqrt())[None].to(draw), draw]), warm)
            own = (warm[1:] * draw).mean(0).double().clamp(0.02, 1.0)  # W_ii, within sqrt(W_ii / probes)
            misfit, others = used.sqrt() * warm[0].double() / own, used * (1 / own - 1)
            good, bad = (_log_normal(misfit, others + k * stated) for k in (1.0, GROSS**2))
            p = torch.sigmoid(bad - good + float(np.log(probability / (1 - probability))))
            matched = 1 / ((1 - p) / (others + stated) + p / (others + GROSS**2 * stated)) - others
            before, weight = weight, stated / matched
            if (weight - before).abs().max() < 0.01:
                break
        found[piece.rows.cpu()], weights[piece.rows.cpu()] = p.float().cpu(), weight.float().cpu()
    return found, weights


def _log_normal(x: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (x**2 / variance + variance.log())
