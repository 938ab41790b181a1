"""What the trainings of next-state models share: windows of states, scales, rollouts, sizes, export."""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.models.base import Emulator
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.nn.backbone import parameters
from appa_lite.training.base import Recipe, Trainable, fitting
from appa_lite.training.data import LatentWindows, TrainingData


@dataclass(frozen=True)
class Rollouts:
    """How many steps are rolled out as the training goes on: ``steps[i]`` during the share ``shares[i]`` of it.

    Raises:
        UserError: not one share to each number of steps, or numbers that cannot be.
    """

    steps: tuple[int, ...] = (1,)
    shares: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        fine = self.steps and len(self.steps) == len(self.shares) and min(self.steps) >= 1 and min(self.shares) >= 0 < sum(self.shares)
        if not fine:
            raise UserError(f"rollouts={list(self.steps)} needs as many shares of the training, found shares={list(self.shares)}")

    @property
    def longest(self) -> int:
        return max(self.steps)

    def at(self, progress: float) -> int:
        """Steps when a part ``progress`` (0 to 1) of the training is done."""
        done, total = 0.0, sum(self.shares)
        for steps, share in zip(self.steps, self.shares, strict=True):
            done += share / total
            if progress < done - 1e-9:
                return steps
        return self.steps[-1]


@dataclass(frozen=True)
class States:
    """What states are like: (Z, h, w), which axes wrap around, forcings of a state, and a trained model to build on, if any."""

    shape: tuple[int, int, int]
    periodic: tuple[bool, bool] = (False, False)
    forcings: int = 0
    emulator: Emulator | None = None

    @classmethod
    def of(cls, space: Checkpoint) -> "States":
        """The latents of a checkpoint."""
        forcings = 2 * len(space.settings.get("forcing_periods", ()))
        return cls(space.autoencoder.latent_shape, space.spec.grid.periodic, forcings, space.emulator)


@dataclass
class EmulatorTraining(Trainable):
    """A next-state model on windows of latents.

    Args:
        model: with its scales installed; space: the checkpoint of its latent space; settings: stored with the model;
        half: store in half precision.
    """

    model: Emulator
    space: Checkpoint
    settings: dict
    half: bool = False

    def split(self, batch: dict[str, Tensor], steps: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Known states (B, history, Z, h, w), the ``steps`` next ones, and the forcing (B, steps, P) of each step, if any."""
        n, z, forcing = self.model.history, batch["latents"], batch.get("forcing")
        return z[:, :n], z[:, n : n + steps], None if forcing is None else forcing[:, n - 1 : n - 1 + steps]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the cells (..., h, w) that exist."""
        mask = self.model.mask
        return (values * mask).sum() / (mask.sum() * values[..., 0, 0].numel())

    def export(self, directory: Path) -> None:
        emulator = self.model.cpu()
        dataclasses.replace(self.space, emulator=emulator, settings=self.space.settings | self.settings).save(directory, self.half)


@dataclass(frozen=True)
class EmulatorRecipe(Recipe):
    """A next-state model with the backbone that all of them share.

    Args:
        width, depth, hidden, kernel, patch, attention, heads, homogeneous: of ``Backbone``; history: states given;
        window_stride: latent frames between the starts of training windows; half: store in half precision.
    """

    width: int = 64
    depth: int = 4
    hidden: int | None = None
    kernel: int = 3
    patch: Sequence[int] = (1, 1)
    attention: bool = False
    heads: int = 4
    homogeneous: bool = False
    history: int = 2
    window_stride: int = 1
    half: bool = False

    @abstractmethod
    def network(self, states: States) -> Emulator:
        """The model, untrained."""

    @abstractmethod
    def training(self, model: Emulator, space: Checkpoint, settings: dict) -> EmulatorTraining:
        """How it is trained."""

    @property
    def horizon(self) -> int:
        """States to predict in a window."""
        return 1

    @property
    def backbone(self) -> dict:
        """The keywords of ``Backbone``."""
        names = ("width", "depth", "hidden", "kernel", "patch", "attention", "heads", "homogeneous")
        return {name: getattr(self, name) for name in names} | {"patch": list(self.patch)}

    def prepare(self, data: TrainingData) -> tuple[EmulatorTraining, LatentWindows, LatentWindows]:
        space, frames = data.space(), self.history + self.horizon
        name = f"a window of {frames} states (history and rollout)"
        with fitting():
            model = self.network(States.of(space))
        windows, held = data.latent_windows(space, frames, (self.window_stride, self.window_stride), name)
        if isinstance(space.autoencoder, IdentityAutoencoder):
            model.mask.copy_(space.spec.mask_tensor())
        self.measure(model, windows, held)
        record = data.record | {"train_windows": len(windows), "parameters": parameters(model), "history": self.history}
        return self.training(model, space, {"emulator": record}), windows, held

    def measure(self, model: Emulator, windows: LatentWindows, held: LatentWindows) -> None:
        """Set what is known before the training: the standard deviation of increments, per channel."""
        set_scale(model, windows.series(64).diff(dim=1))


def set_scale(model: Emulator, changes: Tensor) -> None:
    """Install the root mean square of changes (..., Z, h, w) per channel, over the cells that exist."""
    mask = model.mask.bool()
    power = torch.stack([changes[..., c, :, :][..., mask].double().square().mean() for c in range(changes.shape[-3])])
    model.scale.copy_(power.sqrt().clamp(min=1e-6).to(model.scale)[:, None, None])


def of_size(recipe: EmulatorRecipe, target: int, states: States) -> EmulatorRecipe:
    """The recipe with as many parameters as ``target``, to 2 %, by the size of its perceptrons.

    Raises:
        UserError: width and depth decide too much.
    """

    def count(hidden: int) -> int:
        return parameters(dataclasses.replace(recipe, hidden=hidden).network(states))

    one, two = count(1), count(2)
    hidden = max(1, 1 + round((target - one) / (two - one)))
    if abs(count(hidden) / target - 1) > 0.02:
        raise UserError(f"{type(recipe).__name__} of width {recipe.width} and depth {recipe.depth} cannot have {target} parameters")
    return dataclasses.replace(recipe, hidden=hidden)
