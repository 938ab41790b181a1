"""Observations of decoded fields, seen from the space-time modes of the latents."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from appa_lite.core.blocks import Blocks
from appa_lite.guidance.base import LatentOperator, LinearModes, PosteriorCovariance
from appa_lite.observations.base import WeightedCells

BLOCK = 1024  # rows of a block of the preconditioner
KEPT = 2**27  # numbers in the preconditioners that are kept


class ModeResponses:
    """What each linear term of an observation operator sees of each spatial mode, at the latent frames around it.

        phi[p, s, k] = sum_j w_pj (L e_k at latent frame t_p + s - reach)[cell_pj]

    L is the linear part of the decoder (times the variables' scales); it is the same at every time, so that one
    impulse per mode tells all, and a solve needs no decoder at all.

    Args:
        operator: the observation operator, on ``frames`` decoded frames.
        decode_linear: latents (k, T, Z, h, w) to fields (k, T * stride, C, H, W) in physical units.
        basis: (D, K) spatial modes; latent_shape: (Z, h, w); stride: frames per latent frame;
        reach: latent frames on either side of an impulse that its decoded field touches.
    """

    def __init__(
        self,
        operator: WeightedCells,
        decode_linear: Callable[[Tensor], Tensor],
        basis: Tensor,
        latent_shape: tuple[int, int, int],
        stride: int,
        reach: int,
        chunk: int = 64,
    ):
        used = operator.weight != 0
        frame = torch.where(used, operator.index // operator.frame_size, torch.iinfo(torch.int64).max)
        self.first = frame.amin(1) // stride
        self.reach = reach
        self.offsets = 2 * reach + 2  # one more than an impulse's support: a term may fall between two latent frames
        cell = operator.index % operator.frame_size
        pieces = []
        for begin in range(0, basis.shape[1], chunk):
            modes = basis[:, begin : begin + chunk].T.reshape(-1, *latent_shape)
            impulse = modes.new_zeros(modes.shape[0], 2 * reach + 1, *latent_shape)
            impulse[:, reach] = modes
            seen = decode_linear(impulse).flatten(1)  # (k, (2 reach + 1) stride C H W)
            columns = []
            for s in range(self.offsets):
                relative = frame - (self.first[:, None] + s - reach - reach) * stride
                inside = used & (relative >= 0) & (relative < (2 * reach + 1) * stride)
                index = torch.where(inside, relative * operator.frame_size + cell, 0)
                weight = torch.where(inside, operator.weight, 0).to(seen)
                columns.append((seen[:, index.flatten()].reshape(-1, *index.shape) * weight).sum(-1))
            pieces.append(torch.stack(columns, dim=-1))  # (k, P, S)
        self.phi = torch.cat(pieces).permute(1, 2, 0).contiguous()


class DecodedCells(LatentOperator):
    """y = H(decode(z)) for a sparse H, its linearisation through the modes.

    Args:
        operator: H; frames: latent frames; decode: latents to physical fields; responses: of the modes;
        slope: derivative of the physical fields by the normalised ones over the one ``responses`` were made with,
        or None where it is constant.
    """

    def __init__(
        self,
        operator: WeightedCells,
        frames: int,
        decode: Callable[[Tensor], Tensor],
        responses: ModeResponses,
        slope: Callable[[Tensor], Tensor] | None = None,
    ):
        self.operator, self.frames, self.decode, self.responses, self.slope = operator, frames, decode, responses, slope
        self.linear = operator.linear and slope is None
        self.memory: dict[object, Any] = {}
        order = torch.argsort(responses.first, stable=True)
        frames, counts = torch.unique_consecutive(responses.first[order], return_counts=True)
        self.groups = [(f, rows, responses.phi[rows]) for f, rows in zip(frames.tolist(), order.split(counts.tolist()), strict=True)]

    def predict(self, latents: Tensor) -> Tensor:
        return torch.cat([self.operator(self.decode(z[None])) for z in latents])

    def kept(
        self, covariance: PosteriorCovariance, sigma: Tensor, variance: Tensor, make: Callable[[], list[tuple[Tensor, Tensor]]]
    ) -> list[tuple[Tensor, Tensor]]:
        """What ``make`` makes at a noise level: once, for all batches of members that come by."""
        if variance.ndim > 1:  # each member's own
            return make()
        before, level = self.memory.get("of"), float(sigma)
        if before is None or before[0] is not type(covariance) or not torch.equal(before[1], variance):
            self.memory = {"of": (type(covariance), variance)}
        if level not in self.memory:
            made = make()
            if sum(factor.numel() for _, factor in made) * len(self.memory) > KEPT:
                return made
            self.memory[level] = made
        return self.memory[level]

    def linearise(self, latents: Tensor) -> "CellModes":
        gains = None
        if not self.linear:
            gains = torch.cat([self.gains(z[None]) for z in latents])
        return CellModes(self, gains)

    def gains(self, latents: Tensor) -> Tensor:
        """dy_row / d term, (B, P): one for linear rows, term / |norm| for norms, 2 term for squares, times the slope of the transform."""
        operator, fields = self.operator, self.decode(latents)
        terms = _terms(operator, fields, operator.weight)
        size = torch.zeros(terms.shape[0], len(operator), dtype=terms.dtype).index_add(1, operator.row, terms**2).clamp(min=1e-12).sqrt()
        norm = operator.norm[operator.row]
        gains = torch.where(norm == 1, terms / size[:, operator.row], torch.where(norm == 2, 2 * terms, torch.ones_like(terms)))
        if self.slope is not None:
            gains = gains * _terms(operator, self.slope(latents), operator.weight.abs()) / operator.weight.abs().sum(1)
        return gains


def _terms(operator: WeightedCells, fields: Tensor, weight: Tensor) -> Tensor:
    cells = fields.flatten(1).index_select(1, operator.index.flatten()).unflatten(1, operator.index.shape)
    return (cells * weight.to(cells)).sum(-1)


class CellModes(LinearModes):
    """The linear map from components (B, T, K) to observations (B, M), one matrix product per observed latent frame."""

    def __init__(self, parent: DecodedCells, gains: Tensor | None):
        self.parent, self.gains = parent, gains
        operator = parent.operator
        self.plain = len(operator.row) == len(operator)

    def forward(self, components: Tensor) -> Tensor:
        r = self.parent.responses
        padded = torch.nn.functional.pad(components, (0, 0, r.reach, r.offsets))
        terms = components.new_empty(components.shape[0], r.phi.shape[0])
        for frame, rows, phi in self.parent.groups:
            terms[:, rows] = padded[:, frame : frame + r.offsets].flatten(1) @ phi.flatten(1).T
        if self.gains is not None:
            terms = terms * self.gains
        if self.plain:
            return terms
        return terms.new_zeros(terms.shape[0], len(self.parent.operator)).index_add(1, self.parent.operator.row, terms)

    def adjoint(self, values: Tensor) -> Tensor:
        r = self.parent.responses
        terms = values if self.plain else values[:, self.parent.operator.row]
        if self.gains is not None:
            terms = terms * self.gains
        frames = self.parent.frames
        padded = values.new_zeros(values.shape[0], frames + r.reach + r.offsets, r.phi.shape[2])
        for frame, rows, phi in self.parent.groups:
            part = terms[:, rows] @ phi.flatten(1)
            padded[:, frame : frame + r.offsets] += part.reshape(values.shape[0], r.offsets, -1)
        return padded[:, r.reach : r.reach + frames]

    def preconditioner(
        self, covariance: PosteriorCovariance, sigma: Tensor, variance: Tensor, correlation: Blocks | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Block Jacobi: the values that fall on one latent frame are solved for together (at most ``BLOCK`` of them).

        Where the derivative depends on the state, every member has its own: then the diagonal alone. With a ``correlation`` C
        of the errors it stands in the place of I.
        """
        if not self.plain or self.gains is not None:
            return self._diagonal(covariance.local(self.parent.responses.offsets, sigma), variance)
        factors = self.parent.kept(covariance, sigma, variance, lambda: self._factors(covariance, sigma, variance, correlation))

        def apply(residual: Tensor) -> Tensor:
            out = torch.empty_like(residual)
            for part, factor in factors:
                right = residual[:, part].to(factor)
                if factor.ndim == 2:  # one for all members
                    solved = torch.cholesky_solve(right.T, factor).T
                else:
                    solved = torch.cholesky_solve(right[..., None], factor)[..., 0]
                out[:, part] = solved.to(residual)
            return out

        return apply

    def _factors(
        self, covariance: PosteriorCovariance, sigma: Tensor, variance: Tensor, correlation: Blocks | None
    ) -> list[tuple[Tensor, Tensor]]:
        local, whiten, factors = covariance.local(self.parent.responses.offsets, sigma), variance.rsqrt(), []
        for _, rows, phi in self.parent.groups:
            for part, seen in zip(rows.split(BLOCK), phi.split(BLOCK), strict=True):
                spread = torch.einsum("psk,ksr->prk", seen, local).flatten(1) @ seen.flatten(1).T
                scale = whiten[..., part]
                unit = torch.eye(len(part)) if correlation is None else correlation.submatrix(part)
                factors.append((part, torch.linalg.cholesky(scale[..., None] * spread * scale[..., None, :] + unit.to(spread))))
        return factors

    def _diagonal(self, local: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
        """1 / (1 + diag(A C A^T) / R), the terms of a row counted as if they were independent."""
        rows = self.spread(local)
        return lambda residual: residual / (1 + rows / variance)

    def spread(self, local: Tensor) -> Tensor:
        """diag(A C A^T) (1 or B, M) for C (K, S, S) of neighbouring frames, the terms of a row counted as if they were independent."""
        parent, parts = self.parent, self.parent.responses.phi.split(BLOCK)
        terms = torch.cat([(torch.einsum("psk,ksr->prk", seen, local) * seen).sum((1, 2)) for seen in parts])[None]
        if self.gains is not None:
            terms = terms * self.gains**2
        return terms.new_zeros(terms.shape[0], len(parent.operator)).index_add(1, parent.operator.row, terms)
