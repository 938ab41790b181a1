"""Flow matching on what a deterministic mean forecast leaves over."""

from collections.abc import Mapping, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from appa_lite.models.base import Emulator
from appa_lite.models.deterministic import DeterministicModel
from appa_lite.nn.backbone import CONDITION, Backbone, Level


class ResidualFlow(Emulator, ModelMixin, ConfigMixin):
    """x_{t+1} = m + s r, with the mean m = f(x_t, x_{t-1}) of a trained network, and r carried from noise by a learned velocity.

        dr/du = v(r, u; x_t, x_{t-1}, m) from u = 0, where r is white noise, to u = 1, where it is the scaled residual

    ArchesWeatherGen (Couairon et al. 2024, arXiv:2412.12971), with the straight paths of flow matching (Lipman et al.
    2023): v = E[r_1 - r_0 | (1 - u) r_0 + u r_1]. Here ``scale`` is the residual's standard deviation per channel.

    Args:
        shape: (Z, h, w) of a state; mean: configuration of the ``DeterministicModel``, which is kept fixed;
        history: states given; periodic: (rows, columns) wrap around; forcings: numbers per state known in advance;
        backbone: keywords of ``Backbone``.
    """

    forecaster = "flow_residual"

    _repeated_blocks = ["SpatialBlock"]  #: units of sharding, compilation and recomputation

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        mean: Mapping,
        history: int = 1,
        periodic: Sequence[bool] = (False, False),
        forcings: int = 0,
        backbone: Mapping = {},
    ):
        super().__init__()
        self.start(tuple(shape), history)
        z, h, w = shape
        self.mean_model = DeterministicModel(**{k: v for k, v in mean.items() if not k.startswith("_")}).requires_grad_(False)
        self.level = Level()
        self.forcing = nn.Linear(forcings, CONDITION, bias=False) if forcings else None
        self.network = Backbone((2 + history) * z, z, (h, w), tuple(periodic), CONDITION, **backbone)

    @torch.no_grad()
    def forecast_mean(self, known: Tensor, forcing: Tensor | None = None) -> Tensor:
        """m, (B, Z, h, w), of states (B, history, Z, h, w) and forcing (B, P)."""
        return self.mean_model(known[:, -self.mean_model.history :], 1, None if forcing is None else forcing[:, None])[:, 0]

    def velocity(self, residual: Tensor, time: Tensor, known: Tensor, mean: Tensor, forcing: Tensor | None = None) -> Tensor:
        """v, (B, Z, h, w), at times u (B,) of scaled residuals on their way, given known states and their mean forecast."""
        condition = self.level(time)
        if self.forcing is not None:
            condition = condition + self.forcing(forcing)[:, None, None]
        return self.mask * self.network(torch.cat([self.mask * residual, known.flatten(1, 2), mean], dim=1), condition)

    def forward(self, known: Tensor, target: Tensor, begin: Tensor, time: Tensor, forcing: Tensor | None = None) -> Tensor:
        """v - (r_1 - r_0), what the training makes small: (B, Z, h, w) for next states and noise r_0 of that shape at times u (B,)."""
        mean = self.forecast_mean(known, forcing)
        end = (target - mean) / self.scale
        on_the_way = torch.lerp(begin, end, time[:, None, None, None])
        return self.velocity(on_the_way, time, known, mean, forcing) - (end - begin)
