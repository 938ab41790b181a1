"""The settings of a training, and the learning rate they imply."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from appa_lite.core.errors import UserError


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a training.

    Args:
        steps: optimiser steps; None: as many as fit in ``time_limit``.
        batch: samples per step over all processes.
        optimizer: 'adamw', or 'muon': matrices and kernels follow their orthogonalised momentum (Jordan et al. 2024), scaled so that
            AdamW's learning rates serve, and the rest follows AdamW.
        learning_rate: its maximum.
        warmup: steps of linear increase.
        schedule: 'cosine' or 'linear' decay over the training, 'constant', or 'rsqrt' (EDM2: constant, then one over a square root).
        final: the learning rate at the end, as a fraction of the maximum (cosine and linear).
        weight_decay: decoupled, on parameters with two or more dimensions.
        betas: of AdamW.
        clip: maximum norm of the gradient; None: no clipping.
        ema: relative standard deviation of the power-function average of the weights (EDM2: 0.05 to 0.1), or a list of them: the
            first becomes the model, the others models beside it.
        ema_decay: a constant decay per step instead.
        device: 'auto' (the GPU where there is one) or 'cpu'.
        precision: 'fp32', 'bf16' (forward passes autocast to bfloat16), or 'auto': bf16 on a GPU that has it, else fp32.
        accumulate: pieces into which each process splits its share of the batch, to save memory.
        validate_every: steps between validations; 0: only at the end.
        validation_samples: samples of a validation, spread evenly over the validation set.
        checkpoint_every: steps between checkpoints; 0: only at the end or when interrupted.
        keep: checkpoints kept.
        log_every: steps between rows of the log.
        workers: processes that load data, per training process; 0: none, best for data in memory.
        prefetch: batches that each of them reads ahead.
        resident: keep data that is in memory on the GPU.
        time_limit: seconds of wall clock, over all resumptions. The schedule then follows the clock, so a training that the limit
            ends was annealed; without a limit it follows the steps and is deterministic.
        seed: of the data order and of all noise.
        compile: compile the model (its repeated blocks, where a strategy shards it).
        checkpoint_activations: recompute the activations of every n-th block of the model in the backward pass; 0: keep all.
        profile: measure where the time of the first steps goes, see ``training.profile``.
        grace: seconds after SIGTERM at which the process ends even if it could not save.
    """

    steps: int | None = 10_000
    batch: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 100
    schedule: str = "cosine"
    final: float = 0.01
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float | None = 1.0
    ema: float | Sequence[float] = 0.05
    ema_decay: float | None = None
    device: str = "auto"
    precision: str = "fp32"
    accumulate: int = 1
    validate_every: int = 1000
    validation_samples: int = 256
    checkpoint_every: int = 1000
    keep: int = 3
    log_every: int = 50
    workers: int = 0
    prefetch: int = 2
    resident: bool = False
    time_limit: float | None = None
    seed: int = 0
    compile: bool = False
    checkpoint_activations: int = 0
    profile: bool = False
    grace: float = 60.0

    def __post_init__(self):
        checks = (
            (self.steps is not None or self.time_limit is not None, "give steps, time_limit, or both"),
            (self.steps is None or self.steps >= 1, f"steps={self.steps} must be at least 1"),
            (self.time_limit is None or self.time_limit > 0, f"time_limit={self.time_limit} must be a positive number of seconds"),
            (self.batch >= 1 and self.accumulate >= 1, f"batch={self.batch} and accumulate={self.accumulate} must be at least 1"),
            (self.optimizer in ("adamw", "muon"), f"unknown optimizer '{self.optimizer}': choose adamw or muon"),
            (self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive"),
            (self.schedule in DECAYS, f"unknown schedule '{self.schedule}': choose from {', '.join(DECAYS)}"),
            (self.device in ("auto", "cpu"), f"unknown device '{self.device}': choose auto or cpu"),
            (self.precision in ("fp32", "bf16", "auto"), f"unknown precision '{self.precision}': choose from fp32, bf16, auto"),
            (self.keep >= 1 and self.log_every >= 1, f"keep={self.keep} and log_every={self.log_every} must be at least 1"),
            (self.lengths and all(0 < std < 12**-0.5 for std in self.lengths), f"ema={self.ema} must lie between 0 and 0.288"),
            (self.prefetch >= 1 and self.workers >= 0, f"prefetch={self.prefetch} must be at least 1, workers={self.workers} not negative"),
            (self.checkpoint_activations >= 0, f"checkpoint_activations={self.checkpoint_activations} must be 0, 1, 2, ..."),
            (self.grace > 0, f"grace={self.grace} must be a positive number of seconds"),
            (self.ema_decay is None or 0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay} must lie in [0, 1)"),
        )
        for holds, message in checks:
            if not holds:
                raise UserError(message)

    @property
    def lengths(self) -> tuple[float, ...]:
        """The averages of the weights that are kept."""
        return (float(self.ema),) if isinstance(self.ema, int | float) else tuple(float(std) for std in self.ema)

    def progress(self, step: int, seconds: float) -> float:
        """The part of the training that is done: 1 when it ends."""
        parts = [0.0]
        if self.steps is not None:
            parts.append(step / self.steps)
        if self.time_limit is not None:
            parts.append(seconds / self.time_limit)
        return min(1.0, max(parts))

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step (counted from zero)."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup > 0 else 1.0
        return self.learning_rate * rise * DECAYS[self.schedule](progress, self.final)


DECAYS = {
    "cosine": lambda p, final: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p, final: final + (1 - final) * (1 - p),
    "constant": lambda p, final: 1.0,
    "rsqrt": lambda p, final: 1 / math.sqrt(max(1.0, p / 0.2)),
}
