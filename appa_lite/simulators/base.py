"""Simulators: the truth of twin experiments. Equation, integrator and grid are separate things."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.core.random import Streams, generator


class Simulator(ABC):
    """A dynamical system, batched over members, on any device.

    A state is one tensor ``(B, *state_shape)``. Deterministic given the generators of its members.
    """

    spec: FieldSpec  #: what ``fields`` returns, and the seconds between frames
    gaussian: bool = False  #: whether states are a stationary Gaussian process of mean zero, so that posteriors are known

    @abstractmethod
    def initial(self, seed: int, members: list[int], device: torch.device | str = "cpu") -> Tensor:
        """States of the given members before spin-up; member m depends on (seed, m) alone."""

    @abstractmethod
    def advance(self, state: Tensor, frame: int, seed: int, members: list[int]) -> Tensor:
        """States one frame (``spec.step`` seconds) later. Random forcing is a function of (seed, member, frame)."""

    @abstractmethod
    def fields(self, state: Tensor) -> Tensor:
        """Physical fields (B, C, H, W) of states."""

    @abstractmethod
    def budgets(self, state: Tensor) -> dict[str, Tensor]:
        """Conserved or monitored integrals, each (B,)."""

    @property
    @abstractmethod
    def spinup_frames(self) -> int:
        """Frames to discard before a trajectory is on the climate."""

    @property
    def decorrelation_frames(self) -> int:
        """Frames after which two branches of one state (see ``perturb``) are as good as independent."""
        return self.spinup_frames

    def perturb(self, state: Tensor, seed: int, members: list[int]) -> Tensor:
        """States made distinct by (seed, member), so that branches of one state separate: x (1 + 0.01 noise)."""
        noise = Streams(seed, members, "perturb").normal(state.shape[1:], torch.float64)
        return state * (1 + 0.01 * noise).to(state)


def forcing_noise(shape: tuple[int, ...], seed: int, members: Sequence[int], frame: int, *names: str) -> Tensor:
    """Normal draws (B, *shape), float64 on the CPU, that drive ``frame``: a function of (seed, names, member, frame)."""
    return torch.stack([torch.randn(shape, generator=generator(seed, *names, m, frame), dtype=torch.float64) for m in members])


def states(
    simulator: Simulator,
    seed: int,
    members: Sequence[int],
    frames: int,
    spinup: int | None = None,
    device: torch.device | str = "cpu",
    start: Tensor | str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """The states (B, ...) of ``frames`` successive frames after a spin-up, one at a time; arguments as ``trajectories``.

    The random forcing of a frame is drawn under its number counted from the beginning of the spin-up.
    """
    members = list(members)
    if start is None:
        spinup = simulator.spinup_frames if spinup is None else spinup
        state = simulator.initial(seed, members, device)
    else:
        spinup = simulator.decorrelation_frames if spinup is None else spinup
        start = start if isinstance(start, Tensor) else load_states(start)
        shape = simulator.initial(seed, members[:1]).shape[1:]
        if start.shape[1:] != shape or not len(start):
            expected = f"(count, {', '.join(map(str, shape))})"
            raise UserError(f"start states must be {expected}, got {tuple(start.shape)}: they belong to another simulator")
        state = simulator.perturb(start[[m % len(start) for m in members]].to(device), seed, members)
    for frame in range(spinup + frames):
        if frame >= spinup:
            yield state
        if progress is not None:
            progress(frame + 1, spinup + frames)
        if frame + 1 < spinup + frames:
            state = simulator.advance(state, frame, seed, members)


@torch.no_grad()
def trajectories(
    simulator: Simulator,
    seed: int,
    members: int | Sequence[int],
    frames: int,
    spinup: int | None = None,
    device: torch.device | str = "cpu",
    start: Tensor | str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Trajectories (B, T, C, H, W) of physical fields on the CPU; member m depends on (seed, m), not on the batch.

    Arguments:
        seed: of initial states and random forcing.
        members: their number, or which ones.
        frames: T, ``spec.step`` seconds apart.
        spinup: frames to discard first; by default ``simulator.spinup_frames``, or with ``start``
            ``simulator.decorrelation_frames``.
        start: spun-up states (count, ...), or the safetensors file that ``save_states`` wrote. Member m starts from
            state m % count made distinct by ``simulator.perturb``. Members and seeds that share a start state are
            branches of one trajectory: they are independent only as far as the frames discarded allow, and fewer start
            states than members sample slow variability less well than as many spin-ups would.
        progress: called with (frames done, frames in all).

    Raises:
        UserError: start states of another simulator, no frames, or a member that blew up.
    """
    members = list(range(members)) if isinstance(members, int) else list(members)
    if frames < 1 or not members:
        raise UserError(f"need at least one member and one frame, got {len(members)} and {frames}")
    out = torch.empty(len(members), frames, *simulator.spec.shape)
    for t, state in enumerate(states(simulator, seed, members, frames, spinup, device, start, progress)):
        out[:, t] = simulator.fields(state).to(out)
    return out


def save_states(path: str | Path, state: Tensor) -> None:
    """Write states (count, ...) for ``trajectories(start=path)``, safetensors."""
    save_file({"states": state.detach().cpu().contiguous()}, str(path))


def load_states(path: str | Path) -> Tensor:
    """States (count, ...) written by ``save_states``."""
    try:
        return load_file(str(path))["states"]
    except (FileNotFoundError, KeyError, SafetensorError) as error:
        raise UserError(f"no start states in '{path}': expected a safetensors file with a tensor 'states'") from error
