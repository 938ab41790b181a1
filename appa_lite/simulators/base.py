"""Simulators: the truth of twin experiments. Equation, integrator and grid are separate things."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from appa_lite.core.fields import FieldSpec


class Simulator(ABC):
    """A dynamical system, batched over members, on any device.

    A state is one tensor ``(B, *state_shape)``. Deterministic given the generators of its members.
    """

    spec: FieldSpec  #: what ``fields`` returns, and the seconds between frames

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
