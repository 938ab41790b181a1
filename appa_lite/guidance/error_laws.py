"""Errors that are not independent normal ones, seen from the operator: its rows recombined, or believed as far as they go."""

from collections.abc import Callable

from torch import Tensor

from appa_lite.core.blocks import Blocks
from appa_lite.core.student import matched_variance
from appa_lite.guidance.base import LatentOperator, LinearModes, PosteriorCovariance
from appa_lite.guidance.modes import CellModes, DecodedCells


class MixedRows(LatentOperator):
    """T A(z) for T = S L^{-1} S^{-1}: rows whose correlated errors, of covariance S L L^T S, are independent of variance S^2.

    Args:
        inner: A; mixing: T (``Observation.mixing``); correlation: C = L L^T.
    """

    def __init__(self, inner: DecodedCells, mixing: Blocks, correlation: Blocks):
        self.inner, self.mixing, self.correlation, self.linear = inner, mixing, correlation, inner.linear
        self.factor = correlation.cholesky()

    def predict(self, latents: Tensor) -> Tensor:
        return self.mixing(self.inner.predict(latents))

    def linearise(self, latents: Tensor) -> "MixedModes":
        return MixedModes(self.inner.linearise(latents), self)


class MixedModes(LinearModes):
    """The derivative of ``MixedRows``."""

    def __init__(self, inner: CellModes, parent: MixedRows):
        self.inner, self.parent = inner, parent

    def forward(self, components: Tensor) -> Tensor:
        return self.parent.mixing(self.inner.forward(components))

    def adjoint(self, values: Tensor) -> Tensor:
        return self.inner.adjoint(self.parent.mixing.mT(values))

    def preconditioner(self, covariance: PosteriorCovariance, sigma: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
        """L^T (C + S^{-1} A C_z A^T S^{-1})^{-1} L, the inverse by blocks of neighbouring rows as without correlation."""
        inverse = self.inner.preconditioner(covariance, sigma, variance, self.parent.correlation)
        factor = self.parent.factor
        return lambda residual: factor.mT(inverse(factor(residual)))


class HeavyTails(LatentOperator):
    """A(z) with Student-t errors: at each noise level every value is given the variance that its innovation asks for.

    The likelihood of a value meets the Gaussian that the denoiser and its covariance predict for it; the Gaussian likelihood
    that moves the mean as far stands for it (``core.student.matched_variance``). For values of independent unknowns that is
    the score of p(y | z_t) itself, at every noise level; where values speak of the same thing, each is judged by the
    denoiser's prediction alone, and the judgement sharpens as the noise falls.

    Args:
        inner: A; degrees: of freedom.
    """

    def __init__(self, inner: DecodedCells, degrees: float):
        self.inner, self.degrees, self.linear = inner, degrees, False  # the system's matrix is each member's own

    def predict(self, latents: Tensor) -> Tensor:
        return self.inner.predict(latents)

    def linearise(self, latents: Tensor) -> CellModes:
        return self.inner.linearise(latents)

    def sites(
        self, predicted: Tensor, linear: CellModes, covariance: PosteriorCovariance, sigma: Tensor, values: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        innovation = values - predicted
        spread = linear.spread(covariance.local(self.inner.responses.offsets, sigma))
        return innovation, matched_variance(innovation, spread.expand_as(innovation), variance.expand_as(innovation), self.degrees)
