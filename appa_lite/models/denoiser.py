"""The latent video diffusion model: a denoiser whose linear part is exact and whose nonlinear part is learned."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from appa_lite.core.covariance import SpaceTimeCovariance
from appa_lite.nn.blocks import ConvolutionBlock, SpaceTimeBlock


class LatentDenoiser(ModelMixin, ConfigMixin):
    """E[z | z + sigma n] for windows of latents (B, T, Z, h, w).

        D(z_t, sigma) = G(z_t, sigma) + c_out(sigma) F(c_in z_t, G, sigma, forcing)
        G(z_t, sigma) = m + C (C + sigma^2)^{-1} (z_t - m),     c_out^2 = tr(C sigma^2 (C + sigma^2)^{-1}) / n

    G is the exact denoiser of the Gaussian with the climatological space-time covariance C of the training latents:
    the preconditioning of EDM (Karras et al. 2022, table 1), whose c_skip and c_out this is for C = sigma_data^2,
    with a covariance where EDM has one number. F learns the rest: of blocks with attention over space and time, or of joint
    space-time convolutions. With F = 0 the prior is the Gaussian of optimal interpolation.

    Args:
        latent_shape: (Z, h, w); frames: T of a training window; width, depth, heads: of F; kernel: of its convolutions;
        patch: latent rows and columns that one token of F holds; periodic: (rows, columns) wrap around;
        block: ``attention`` or ``convolution``; spatial_attention: over space too, in every second block with attention;
        homogeneous: True where every place is alike (a ring), else F knows where it is;
        forcings: numbers per frame known in advance (time of day, of year); modes, lags: of C;
        noise_levels: levels at which ``residual_ratio`` is measured.
    """

    _repeated_blocks = ["SpaceTimeBlock", "ConvolutionBlock"]  #: units of sharding, compilation and recomputation

    @register_to_config
    def __init__(
        self,
        latent_shape: Sequence[int],
        frames: int,
        width: int = 96,
        depth: int = 6,
        heads: int = 4,
        kernel: int = 3,
        patch: Sequence[int] = (1, 1),
        periodic: Sequence[bool] = (False, False),
        spatial_attention: bool = True,
        homogeneous: bool = False,
        forcings: int = 0,
        modes: int = 1024,
        lags: int = 64,
        noise_levels: Sequence[float] = (),
        block: str = "attention",
    ):
        super().__init__()
        z, h, w = latent_shape
        d, size = width, z * h * w
        modes = min(modes, size)
        self.register_buffer("mean", torch.zeros(size))
        self.covariance = SpaceTimeCovariance(torch.zeros(size, modes), torch.zeros(modes, lags), torch.ones(()))
        self.register_buffer("residual_ratio", torch.ones(max(len(noise_levels), 1), modes, frames))
        self.register_buffer("residual_ratio_rest", torch.ones(max(len(noise_levels), 1)))
        self.patch = q, r = tuple(patch)
        if h % q or w % r:
            raise ValueError(f"latents of {h} x {w} cells are not a multiple of the patch {q} x {r}")
        self.inputs = nn.Linear(2 * z * q * r, d)
        self.place = None if homogeneous else nn.Parameter(torch.zeros(h // q, w // r, d))
        self.frequencies = Timesteps(d, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedding = TimestepEmbedding(d, d)
        self.forcing = nn.Linear(forcings, d) if forcings else None
        kernels, wraps = (kernel if h // q > 1 else 1, kernel), tuple(periodic)
        if block == "convolution":
            blocks: list[nn.Module] = [ConvolutionBlock(d, kernels, wraps) for _ in range(depth)]
        else:
            blocks = [SpaceTimeBlock(d, heads, kernels, wraps, frames, spatial_attention and i % 2 == 1) for i in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(d)
        self.outputs = nn.Linear(d, z * q * r)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    def flat(self, x: Tensor) -> Tensor:
        return x.flatten(2)

    def gaussian(self, x: Tensor, sigma: Tensor) -> Tensor:
        """G for noise levels (B,) or a scalar, in the parameters' precision whatever autocast says."""
        variance = sigma.reshape(-1, 1, 1).to(self.mean) ** 2
        with torch.autocast(x.device.type, enabled=False):
            y = self.flat(x.to(self.mean)) - self.mean
            y = self.covariance.function(y, lambda v: v / (v + variance)) + self.mean
        return y.reshape(x.shape)

    def residual_scale(self, sigma: Tensor, frames: int) -> Tensor:
        """c_out for noise levels (B,)."""
        variance = sigma.reshape(-1, 1).to(self.mean) ** 2
        values = self.covariance.temporal(frames).values
        values = values.reshape(1, -1)
        rest = self.covariance.basis.shape[0] - self.covariance.modes
        total = (values * variance / (values + variance)).sum(1) + frames * rest * (
            self.covariance.remainder * variance / (self.covariance.remainder + variance)
        ).squeeze(1)
        return (total / (frames * self.covariance.basis.shape[0])).sqrt()

    def forward(self, x: Tensor, sigma: Tensor, forcing: Tensor | None = None) -> Tensor:
        """Denoise x (B, T, Z, h, w) at noise levels sigma (B,), with forcings (B, T, P) if the model has any."""
        sigma = sigma.to(self.mean).expand(x.shape[0])
        prior = self.gaussian(x, sigma)
        return prior + self._correct(x, prior, sigma, forcing)

    def correction(self, x: Tensor, sigma: Tensor, forcing: Tensor | None = None) -> Tensor:
        """D - G: what the network adds to the linear denoiser of a window, for composing windows."""
        sigma = sigma.to(self.mean).expand(x.shape[0])
        return self._correct(x, self.gaussian(x, sigma), sigma, forcing)

    def _correct(self, x: Tensor, prior: Tensor, sigma: Tensor, forcing: Tensor | None) -> Tensor:
        scale = self.residual_scale(sigma, x.shape[1])[:, None, None, None, None]
        return scale * self.network(x, prior, sigma, forcing).to(prior)

    def network(self, x: Tensor, prior: Tensor, sigma: Tensor, forcing: Tensor | None) -> Tensor:
        """F, of order one. It sees the noised window, scaled to order one, and what G makes of it."""
        c_in = (1 + sigma**2).rsqrt()[:, None, None, None, None]
        q, r = self.patch
        both = torch.cat([c_in * x, prior], dim=2)
        tokens = self.inputs(rearrange(both, "b t z (h q) (w r) -> b t h w (z q r)", q=q, r=r))
        if self.place is not None:
            tokens = tokens + self.place
        level = 100 * torch.log(sigma)
        condition = self.embedding(self.frequencies(level).to(tokens))[:, None]
        if self.forcing is not None:
            if forcing is None:
                raise ValueError("this model needs its forcings")
            condition = condition + self.forcing(forcing.to(tokens))
        for block in self.blocks:
            tokens = block(tokens, condition)
        return rearrange(self.outputs(self.norm(tokens)), "b t h w (z q r) -> b t z (h q) (w r)", q=q, r=r)

    @torch.no_grad()
    def set_climatology(self, mean: Tensor, covariance: SpaceTimeCovariance) -> None:
        """Install m (D,) and C; sizes must be those of the configuration."""
        self.mean.copy_(mean)
        self.covariance.basis.copy_(covariance.basis)
        lags = covariance.autocovariance.shape[1]
        self.covariance.autocovariance[:, :lags].copy_(covariance.autocovariance)
        self.covariance.remainder.copy_(covariance.remainder)
        self.covariance.clear()

    def posterior_variance(self, sigma: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues (K, T) and remainder of the measured covariance of z - D(z_t) in the eigenbasis of C.

        It is r lambda sigma^2 / (lambda + sigma^2), with the ratio r measured on windows never trained on, interpolated
        in log sigma and in the relative index of the temporal eigenvectors. r = 1 where the law is Gaussian.
        """
        values = self.covariance.temporal(frames).values
        variance = sigma.to(self.mean) ** 2
        ratio, rest = self._ratio(sigma)
        if frames != ratio.shape[1]:
            ratio = nn.functional.interpolate(ratio[None], size=frames, mode="linear", align_corners=True)[0]
        remainder = self.covariance.remainder
        return ratio * values * variance / (values + variance), rest * remainder * variance / (remainder + variance)

    def _ratio(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        levels = torch.tensor(list(self.config.noise_levels) or [1.0], dtype=self.mean.dtype, device=self.mean.device).log()
        place = torch.log(sigma.to(self.mean)).clamp(levels[0], levels[-1])
        upper = int(torch.searchsorted(levels, place).clamp(1, max(len(levels) - 1, 1))) if len(levels) > 1 else 0
        if upper == 0:
            return self.residual_ratio[0], self.residual_ratio_rest[0]
        a = (place - levels[upper - 1]) / (levels[upper] - levels[upper - 1])
        return torch.lerp(self.residual_ratio[upper - 1], self.residual_ratio[upper], a), torch.lerp(
            self.residual_ratio_rest[upper - 1], self.residual_ratio_rest[upper], a
        )
