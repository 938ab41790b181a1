"""What can be trained: a model, its loss, its score, and how it is saved; and the recipes that make them from data."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from appa_lite.core.errors import UserError
from appa_lite.core.random import derive
from appa_lite.training.data import TrainingData

_MASK = (1 << 64) - 1


class SampleNoise:
    """The random numbers of a batch: row i of every draw is a function of (seed, position i, number of the draw) alone.

    So the noise of a sample does not depend on the batch or the process that computes it, and a stopped training needs
    no generator state to go on. Draws are made on ``device``; the CPU's and the GPU's numbers differ.
    """

    def __init__(self, seed: int, positions: Sequence[int] | Tensor, device: torch.device | str = "cpu"):
        self.seed = seed
        self.positions = [int(p) for p in positions]
        self.device = torch.device(device)
        self.draws = 0
        self._key = derive(seed, "noise")
        self._generator = torch.Generator(self.device)

    def __len__(self) -> int:
        return len(self.positions)

    def normal(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal draws, (B, *shape)."""
        return self._draw("normal_", shape, dtype)

    def uniform(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform draws in [0, 1), (B, *shape)."""
        return self._draw("uniform_", shape, dtype)

    def stratified(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draws (B,) in [0, 1), uniform over the training and well spread within any batch: a golden-ratio sequence in the
        position (a low-discrepancy choice of noise levels, as in Kingma et al. 2021, arXiv:2107.00630, appendix I.1)."""
        self.draws += 1
        offset = derive(self.seed, "stratified", self.draws) & _MASK
        values = [((p * 0x9E3779B97F4A7C15 + offset) & _MASK) >> 11 for p in self.positions]
        return (torch.tensor(values, dtype=torch.float64) / 2**53).clamp(max=1 - 2**-24).to(self.device, dtype)

    def _draw(self, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.draws += 1
        out = torch.empty((len(self), *shape), dtype=dtype, device=self.device)
        for row, position in zip(out, self.positions, strict=True):
            self._generator.manual_seed(_mix(self._key + position * 0x9E3779B97F4A7C15 + self.draws * 0xD1B54A32D192ED03) >> 1)
            getattr(row, kind)(generator=self._generator)
        return out


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014): neighbouring integers to unrelated ones."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Trainable(ABC):
    """A model with its loss, its validation score and its form on disk; `appa_lite.training.loop.train` trains any of them.

    ``model`` is what is optimised and averaged. Its dtype and everything else that is not trained (frozen networks,
    constants) are the trainable's own affair.
    """

    model: nn.Module
    progress: float = 0.0  #: the part of the training that is done, 0 to 1; the loop keeps it

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        """Scalars: 'loss', a mean over the samples of the batch, is minimised; all are logged.

        Args:
            model: ``self.model`` as the launcher wrapped it; gradients need its forward call, so call this one.
            batch: tensors on the device of the model; 'index' (B,) are the samples' places in the dataset.
            noise: all randomness of the loss comes from here.
        """

    @abstractmethod
    def validate(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        """Scores of ``self.model`` (holding the averaged weights, in evaluation mode, without gradients) on held-out samples.

        The samples and their noise are the same at every call, so that scores of different steps compare.
        """

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Writes the model directory from ``self.model`` (holding the averaged weights); ``directory`` exists and is empty."""

    def to(self, device: torch.device) -> None:
        """Moves everything that the loss needs to the device of the training."""
        self.model.to(device)

    def mean_loss(self, batches: Iterable[tuple[dict[str, Tensor], SampleNoise]]) -> dict[str, float]:
        """The means over the samples of what `loss` returns; a start for `validate`."""
        sums: dict[str, float] = {}
        count = 0
        for batch, noise in batches:
            for name, value in self.loss(self.model, batch, noise).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(noise)
            count += len(noise)
        return {name: value / count for name, value in sums.items()}


class Recipe(ABC):
    """How something to train is made from data: one file in ``training/`` and one YAML in ``configs/trainable``.

    The constructor's signature is the schema of the YAML. A parameter that the YAML leaves out and that is called like a
    key of ``train`` (``window``, ``noise``, ``half``, ...) is given the value of that key.
    """

    @abstractmethod
    def prepare(self, data: TrainingData) -> tuple[Trainable, Dataset, Dataset]:
        """The trainable, and its windows to train and to validate on. A model without parameters is only exported.

        Raises:
            UserError: settings that do not fit the data.
        """


@contextmanager
def fitting() -> Iterator[None]:
    """Within the context a ValueError of a model's constructor becomes one line for the user."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{error}: change the keys of trainable, or the grid of the data") from error
