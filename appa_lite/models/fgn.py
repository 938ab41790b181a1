"""An FGN-style network: the ensemble comes from noise in its conditional layer norms."""

from collections.abc import Mapping, Sequence

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from appa_lite.models.base import Emulator
from appa_lite.nn.backbone import CONDITION, Backbone

NOISES = ("global", "local", "both")


class FGNModel(Emulator, ModelMixin, ConfigMixin):
    """x_{t+1} = x_t + s f(x_t, x_{t-1}; A n), n ~ N(0, I): one function, perturbed as a whole (Alet et al. 2025, arXiv:2506.10772).

    The noise n of a member and step passes a linear map without bias into every layer norm. ``noise``: 'global', one
    vector for the whole state (FGN); 'local', one vector a token (AIFS-CRPS, Lang et al. 2024, arXiv:2412.15832); or 'both'.

    Args:
        shape: (Z, h, w) of a state; history: states given; periodic: (rows, columns) wrap around;
        forcings: numbers per state known in advance; noise: its kind; noise_size: numbers in a vector;
        backbone: keywords of ``Backbone``.
    """

    forecaster = "fgn"

    _repeated_blocks = ["SpatialBlock"]  #: units of sharding, compilation and recomputation

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        history: int = 1,
        periodic: Sequence[bool] = (False, False),
        forcings: int = 0,
        noise: str = "global",
        noise_size: int = 32,
        backbone: Mapping = {},
    ):
        super().__init__()
        if noise not in NOISES:
            raise ValueError(f"noise={noise} is not known: expected one of {', '.join(NOISES)}")
        self.start(tuple(shape), history)
        z, h, w = shape
        self.network = Backbone(history * z, z, (h, w), tuple(periodic), CONDITION, **backbone)
        self.forcing = nn.Linear(forcings, CONDITION, bias=False) if forcings else None
        places = {"global": (1, 1), "local": self.network.tokens}
        self.places = {kind: place for kind, place in places.items() if noise in (kind, "both")}
        self.maps = nn.ModuleDict({kind: nn.Linear(noise_size, CONDITION, bias=False) for kind in self.places})

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Of the noise of one member and step: (vectors, numbers in each)."""
        return sum(h * w for h, w in self.places.values()), self.config.noise_size

    def forward(self, known: Tensor, noise: Tensor, forcing: Tensor | None = None, through_time: bool = True) -> Tensor:
        """The next states (B, steps, Z, h, w) of known ones (B, history, Z, h, w).

        Args:
            noise: (B, steps, *noise_shape), standard normal; forcing: (B, steps, P) at the last known state of each step.
        """

        def increment(known: Tensor, step: int) -> Tensor:
            parts = noise[:, step].split([h * w for h, w in self.places.values()], dim=1)
            condition = sum(self.maps[kind](part.unflatten(1, self.places[kind])) for kind, part in zip(self.places, parts, strict=True))
            if self.forcing is not None:
                condition = condition + self.forcing(forcing[:, step])[:, None, None]
            return self.network(known.flatten(1, 2), condition)

        return self.roll(known, noise.shape[1], increment, through_time)
