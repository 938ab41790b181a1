"""What forecasts with next-state models share: known frames to states, states to states, states to frames."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import to_seconds
from appa_lite.core.random import Streams
from appa_lite.forecasters.base import Forecaster, Progress, silent
from appa_lite.models.base import Emulator
from appa_lite.models.checkpoint import Checkpoint


class Rollout(Forecaster):
    """A next-state model of one kind, rolled out in the space of its autoencoder, and decoded at the end.

    With several checkpoints (models that were trained with different seeds) member m takes number m modulo their count.
    The known frames are those of each member, so initial states that differ make forecasts that differ.

    Args:
        checkpoint: with a next-state model, or several of them; batch: members computed at once.
    """

    kind: type[Emulator]  #: the model that this forecaster knows how to draw from

    def __init__(self, checkpoint: Checkpoint | Sequence[Checkpoint], batch: int = 8):
        self.checkpoints = [checkpoint] if isinstance(checkpoint, Checkpoint) else list(checkpoint)
        self.batch = batch
        for one in self.checkpoints:
            if not isinstance(one.emulator, self.kind):
                found = "none" if one.emulator is None else type(one.emulator).__name__
                raise UserError(f"{type(self).__name__} needs a model directory with a {self.kind.__name__}, found {found}")
            if one.spec != self.checkpoints[0].spec:
                raise UserError("the models of an ensemble must be of the same variables and grid")

    def start(self, model: Emulator, known: Tensor, streams: Streams) -> Tensor:
        """The states (B, n, Z, h, w) that members start from, given the known ones."""
        return known

    @abstractmethod
    def advance(self, model: Emulator, known: Tensor, forcing: Tensor | None, streams: Streams) -> Tensor:
        """The next states (B, Z, h, w) given (B, history, Z, h, w) and forcing (P,); all chance comes from ``streams``."""

    def forecast(
        self, initial: Tensor, times: np.ndarray, frames: int, members: Sequence[int], seed: int, progress: Progress = silent
    ) -> Tensor:
        out = torch.empty(len(members), frames, *self.checkpoints[0].spec.shape)
        done = 0
        for number, checkpoint in enumerate(self.checkpoints):
            mine = [i for i, m in enumerate(members) if m % len(self.checkpoints) == number]
            for begin in range(0, len(mine), self.batch):
                rows = mine[begin : begin + self.batch]
                streams = Streams(seed, [members[i] for i in rows], "forecast")
                out[rows] = self._roll(checkpoint, initial[[i % len(initial) for i in rows]], times, frames, streams)
                done += len(rows)
                progress("members", done, len(members))
        return out

    @torch.no_grad()
    def _roll(self, checkpoint: Checkpoint, initial: Tensor, times: np.ndarray, frames: int, streams: Streams) -> Tensor:
        """Fields (B, frames, C, H, W) on the CPU. Where a decoder sees its neighbours, more is rolled out than asked for: the
        last frames are decoded like those before."""
        model, autoencoder, step = checkpoint.emulator, checkpoint.autoencoder, checkpoint.spec.step
        stride, device = autoencoder.stride[0], model.scale.device
        needed = model.history * stride
        if initial.shape[1] < needed:
            raise UserError(
                f"this model forecasts from {needed} frames up to the initial time, found {initial.shape[1]}: "
                f"give history={needed} (or more), and an initial file that holds them"
            )
        begin = float(to_seconds(times)[-needed])
        steps = -(-frames // stride) + autoencoder.reach
        clock = begin + step * torch.arange((model.history + steps) * stride, dtype=torch.float64, device=device)
        normal = checkpoint.normalizer(initial[:, -needed:].to(device), clock[:needed])
        states = list(self.start(model, autoencoder.encode(normal), streams).unbind(1))
        forcing = checkpoint.forcing(clock[::stride])
        for k in range(len(states) - 1, len(states) - 1 + steps):
            known = torch.stack(states[-model.history :], dim=1)
            states.append(self.advance(model, known, None if forcing is None else forcing[k], streams))
        decoded = autoencoder.decode(torch.stack(states, dim=1))
        return checkpoint.normalizer.inverse(decoded, clock)[:, needed : needed + frames].cpu()
