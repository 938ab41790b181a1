"""A deterministic next-state network: the mean of what comes next."""

from collections.abc import Mapping, Sequence

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from appa_lite.models.base import Emulator
from appa_lite.nn.backbone import CONDITION, Backbone


class DeterministicModel(Emulator, ModelMixin, ConfigMixin):
    """x_{t+1} = x_t + s f(x_t, x_{t-1}): a learned increment in units s of its standard deviation (as in GraphCast, Lam et al. 2023).

    Args:
        shape: (Z, h, w) of a state; history: states given; periodic: (rows, columns) wrap around;
        forcings: numbers per state known in advance (time of day, of year); backbone: keywords of ``Backbone``.
    """

    forecaster = "deterministic"

    _repeated_blocks = ["SpatialBlock"]  #: units of sharding, compilation and recomputation

    @register_to_config
    def __init__(
        self, shape: Sequence[int], history: int = 1, periodic: Sequence[bool] = (False, False), forcings: int = 0, backbone: Mapping = {}
    ):
        super().__init__()
        self.start(tuple(shape), history)
        z, h, w = shape
        self.forcing = nn.Linear(forcings, CONDITION, bias=False) if forcings else None
        self.network = Backbone(history * z, z, (h, w), tuple(periodic), CONDITION if forcings else 0, **backbone)

    def forward(self, known: Tensor, steps: int = 1, forcing: Tensor | None = None, through_time: bool = True) -> Tensor:
        """The next states (B, steps, Z, h, w) of known ones (B, history, Z, h, w).

        Args:
            forcing: (B, steps, P) at the last known state of each step; through_time: gradients flow from step to step.
        """

        def increment(known: Tensor, step: int) -> Tensor:
            condition = None if self.forcing is None else self.forcing(forcing[:, step])[:, None, None]
            return self.network(known.flatten(1, 2), condition)

        return self.roll(known, steps, increment, through_time)
