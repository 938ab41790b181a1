"""A GenCast-style diffusion model of the next state."""

from collections.abc import Mapping, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from appa_lite.models.base import Emulator
from appa_lite.nn.backbone import CONDITION, Backbone, Level


class NextStateDenoiser(Emulator, ModelMixin, ConfigMixin):
    """E[r | r + sigma n, x_t, x_{t-1}] for the scaled increment r = (x_{t+1} - x_t) / s (GenCast, Price et al. 2023, arXiv:2312.15796).

        D(r_t, sigma) = c_skip r_t + c_out F(c_in r_t, x_t, x_{t-1}; ln(sigma) / 4)
        c_skip = 1 / (1 + sigma^2),   c_out = sigma / sqrt(1 + sigma^2),   c_in = 1 / sqrt(1 + sigma^2)

    the preconditioning of EDM (Karras et al. 2022, table 1) for data of variance one. The noise is white over cells.

    Args:
        shape: (Z, h, w) of a state; history: states given; periodic: (rows, columns) wrap around;
        forcings: numbers per state known in advance; backbone: keywords of ``Backbone``.
    """

    forecaster = "next_state_diffusion"

    _repeated_blocks = ["SpatialBlock"]  #: units of sharding, compilation and recomputation

    @register_to_config
    def __init__(
        self, shape: Sequence[int], history: int = 2, periodic: Sequence[bool] = (False, False), forcings: int = 0, backbone: Mapping = {}
    ):
        super().__init__()
        self.start(tuple(shape), history)
        z, h, w = shape
        self.level = Level()
        self.forcing = nn.Linear(forcings, CONDITION, bias=False) if forcings else None
        self.network = Backbone((1 + history) * z, z, (h, w), tuple(periodic), CONDITION, **backbone)

    def forward(self, noised: Tensor, sigma: Tensor, known: Tensor, forcing: Tensor | None = None) -> Tensor:
        """D, (B, Z, h, w), of noised scaled increments at levels (B,), given states (B, history, Z, h, w) and forcing (B, P)."""
        variance = sigma[:, None, None, None] ** 2
        condition = self.level(torch.log(sigma) / 4)
        if self.forcing is not None:
            condition = condition + self.forcing(forcing)[:, None, None]
        seen = torch.cat([self.mask * noised * (1 + variance).rsqrt(), known.flatten(1, 2)], dim=1)
        correction = self.network(seen, condition)
        return self.mask * (noised / (1 + variance) + correction * (variance / (1 + variance)).sqrt())
