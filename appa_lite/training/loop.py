"""The one training loop, for any `Trainable`, on one process or many, through Accelerate: see `train`."""

import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from appa_lite.core.errors import UserError
from appa_lite.core.random import derive
from appa_lite.data.windows import GlobalSampler, collate
from appa_lite.training import checkpoints
from appa_lite.training.base import SampleNoise, Trainable
from appa_lite.training.ema import WeightAverage
from appa_lite.training.logs import RunLog
from appa_lite.training.schedule import TrainingConfig

__all__ = ["Interrupted", "TrainingConfig", "train"]
logger = logging.getLogger(__name__)


class Interrupted(SystemExit):
    """A signal stopped the training after it saved a checkpoint; the exit status is 128 plus the signal's number."""


def train(
    trainable: Trainable, dataset: Dataset, validation_dataset: Dataset | None, config: TrainingConfig, run: Path | str
) -> dict[str, float]:
    """Trains, or goes on training what is in ``run``; returns the validation scores of the averaged weights.

    ``train(trainable, WindowDataset(fields, times, frames=8), None, TrainingConfig(steps=1000), Path("runs/mine"))``

    The run directory holds ``config.json``, ``metrics.csv``, ``tensorboard/``, ``checkpoints/``, ``summary.json`` and, in
    the end, ``model/`` as written by ``trainable.export`` with the averaged weights, which the trainable's model then holds.

    Raises:
        UserError: settings that do not fit the data or the launcher, or a loss that is not finite.
        Interrupted: on SIGTERM or SIGINT, after a checkpoint was saved.
    """
    with torch.random.fork_rng(devices=[]), _signals() as caught:
        loop = _Loop(trainable, dataset, validation_dataset, config, Path(run))
        try:
            loop.resume()
            loop.run_steps(caught)
            return loop.finish()
        finally:
            loop.close()


def accelerator(precision: str = "fp32", device: str = "auto") -> Accelerator:
    """The processes and devices the launcher gives, checked: a wrong launch otherwise trains N unrelated models in silence."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where it is installed, warns that it found none
    for flag in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        if os.environ.get(flag, "false").lower() in ("1", "true"):
            raise UserError(f"{flag} is set, but this loop replicates the model: launch with a MULTI_GPU configuration")
    cpu = device == "cpu" or not torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and local > torch.cuda.device_count():
        raise UserError(f"{local} processes were launched for {torch.cuda.device_count()} GPUs: launch fewer, or say device=cpu")
    if precision == "auto":
        precision = "fp32" if cpu or not torch.cuda.is_bf16_supported() else "bf16"
    AcceleratorState._reset_state(reset_partial_state=False)  # a program may train several models, each in its precision
    GradientState._reset_state()
    made = Accelerator(cpu=cpu, mixed_precision="bf16" if precision == "bf16" else "no")
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if made.num_processes != expected:
        raise UserError(
            f"{expected} processes were launched but {made.num_processes} train together: use launch/accelerate/cpu2.yaml or gpu.yaml"
        )
    return made


class _Loop:
    """The state of a training: ``step`` and ``consumed`` count optimiser steps and samples, ``seconds`` earlier sessions too."""

    def __init__(self, trainable: Trainable, dataset: Dataset, validation_dataset: Dataset | None, config: TrainingConfig, run: Path):
        self.trainable, self.config, self.run = trainable, config, run
        self.accelerator = accelerator(config.precision, config.device)
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.dataset, self.validation_dataset = (self._place(d) for d in (dataset, validation_dataset))
        run.mkdir(parents=True, exist_ok=True)
        trainable.to(self.device)
        if config.compile:
            trainable.model.compile()
        optimizer = _optimizer(trainable.model, config)
        self.average = WeightAverage(trainable.model, config.ema, config.ema_decay)
        self.model, self.optimizer = self.accelerator.prepare(trainable.model, optimizer)
        world = self.accelerator.num_processes
        self.control = torch.distributed.new_group(backend="gloo") if world > 1 else None
        self.step, self.consumed, self.seconds = 0, 0, 0.0
        self.started = time.monotonic()
        self.scores: dict[str, float] = {}
        self.scored = self.saved = -1
        self.log: RunLog | None = None
        self.sums: dict[str, Tensor] = {}
        self.summed = 0

    def _place(self, dataset: Dataset | None) -> Dataset | None:
        resident = self.config.resident and self.device.type == "cuda" and hasattr(dataset, "to")
        return dataset.to(self.device) if resident else dataset

    # Before and after

    def resume(self) -> None:
        """Goes back to the last complete checkpoint of the run directory, if there is one."""
        found = checkpoints.load_last(self.run / "checkpoints")
        if found is not None:
            tensors, state = found
            try:
                self.trainable.model.load_state_dict(tensors["model"])
                self.average.load(tensors["average"])
                checkpoints.restore_optimizer(self.optimizer.optimizer, tensors["optimizer"])
            except (RuntimeError, KeyError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{self.run} holds a training of another model ({reason}): choose another run directory") from error
            self.step, self.consumed, self.seconds = state["step"], state["consumed"], state["seconds"]
            self.scores, self.scored, self.saved = state["scores"], state["scored"], state["step"]
            if self.main:
                logger.info("resumed %s at step %d", self.run, self.step)
        if self.main:
            self._note_config()
        self.accelerator.wait_for_everyone()
        self.started = time.monotonic() - self.seconds
        timed = self.config.time_limit is not None
        total = self.config.time_limit if timed else self.config.steps
        self.log = RunLog(self.run, self.step, total, self.seconds if timed else self.step, "s" if timed else "step", self.main)

    def _note_config(self) -> None:
        """Writes ``config.json``, and warns of settings that changed since the run was started."""
        path = self.run / "config.json"
        now = json.loads(json.dumps(dataclasses.asdict(self.config)))
        before = json.loads(path.read_text()) if path.exists() and self.step else now
        changed = [f"{key}: {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
        if changed:
            logger.warning("%s goes on with other settings: %s", self.run, ", ".join(changed))
        path.write_text(json.dumps(now, indent=1))

    def finish(self) -> dict[str, float]:
        """Last scores and checkpoint, then the model directory with the averaged weights."""
        if self.scored != self.step:
            self.validate()
        if self.saved != self.step:
            self.save()
        self.accelerator.wait_for_everyone()
        self._restore_forward()
        model = self.trainable.model
        averaged = self.average.state()
        model.load_state_dict({name: value.clone() for name, value in averaged.items()})
        model.eval()
        if self.main:
            _replace_directory(self.run / "model", self.trainable.export)
            summary = {"step": self.step, "samples": self.consumed, "seconds": round(self.seconds, 1), **self.scores}
            (self.run / "summary.json").write_text(json.dumps(summary, indent=1))
        self.accelerator.wait_for_everyone()
        return dict(self.scores)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        self._restore_forward()
        self.accelerator.free_memory()

    def _restore_forward(self) -> None:
        """The plain model again, without Accelerate's precision wrapper and without compilation."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        vars(self.trainable.model).pop("forward", None)  # what the wrapper leaves on the instance
        if self.config.compile:
            self.trainable.model._compiled_call_impl = None

    # The steps

    def run_steps(self, caught: list[int]) -> None:
        """Optimiser steps until the training is done."""
        config = self.config
        sampler = self._sampler(self.dataset)
        batches = zip(self._loader(self.dataset, sampler), sampler.positions(), strict=False)
        while True:
            progress, number = self._agree(caught)
            if number:
                self._stop(number)
            if progress >= 1:
                return
            self._optimize(batches, config.rate(self.step, progress))
            if self.step % config.log_every == 0:
                self._report(config.rate(self.step, progress))
            if config.validate_every and self.step % config.validate_every == 0:
                self.validate()
            if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                self.save()

    def _optimize(self, batches: Iterator, rate: float) -> None:
        config = self.config
        self.model.train()
        # Dropout and the like draw from torch's own generator: a function of the step, so nothing needs saving.
        torch.manual_seed(derive(config.seed, "step", self.step, self.accelerator.process_index))
        for part in range(config.accumulate):
            batch, positions = next(batches)
            last = part == config.accumulate - 1
            with torch.enable_grad(), nullcontext() if last else self.accelerator.no_sync(self.model):  # processes reduce once
                losses = self.trainable.loss(self.model, self._move(batch), SampleNoise(config.seed, positions, self.device))
                self.accelerator.backward(losses["loss"] / config.accumulate)
            self._add(losses, 1 / config.accumulate)
        if config.clip is not None:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
            self._add({"gradient_norm": norm}, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.summed += 1
        self.consumed += config.batch
        self.average.update(self.step)

    def _agree(self, caught: list[int]) -> tuple[float, int]:
        """Progress and caught signal, the same for all processes, which must leave the loop together."""
        self.seconds = time.monotonic() - self.started
        signal_number = caught[0] if caught else 0
        if self.control is not None:
            shared = torch.tensor([self.seconds, float(signal_number)], dtype=torch.float64)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=self.control)
            self.seconds, signal_number = float(shared[0]), int(shared[1])
        return self.config.progress(self.step, self.seconds), signal_number

    def _stop(self, number: int) -> None:
        if self.saved != self.step:
            self.save()
        self.accelerator.wait_for_everyone()
        if self.main:
            name = signal.Signals(number).name
            logger.warning("training stopped by %s at step %d: saved in %s; the same command goes on from there", name, self.step, self.run)
        raise Interrupted(128 + number)

    # Data

    def _sampler(self, dataset: Dataset) -> GlobalSampler:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        config = self.config
        return GlobalSampler(len(dataset), config.batch, config.seed, self.consumed, rank, world, config.accumulate)

    def _loader(self, dataset: Dataset, sampler: GlobalSampler | list[list[int]]) -> DataLoader:
        own = torch.Generator().manual_seed(derive(self.config.seed, "loader"))  # keeps the global generator out of it
        resident = self.config.resident and self.device.type == "cuda"
        workers, pin = 0 if resident else self.config.workers, self.device.type == "cuda" and not resident
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, generator=own, pin_memory=pin)

    def _move(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    # Logs, scores, checkpoints

    def _add(self, losses: dict[str, Tensor], weight: float) -> None:
        for name, value in losses.items():
            value = torch.as_tensor(value, device=self.device).detach().to(torch.float64) * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _means(self) -> dict[str, float]:
        """Means since the last call, over steps and processes."""
        if not self.sums:
            return {}
        sums = torch.stack([torch.as_tensor(v) for v in self.sums.values()]) / self.summed
        means = dict(zip(self.sums, self.accelerator.reduce(sums, "mean").tolist(), strict=True))
        self.sums, self.summed = {}, 0
        if not math.isfinite(means["loss"]):
            raise UserError(f"the loss is not finite near step {self.step}: lower learning_rate, or use precision=fp32")
        return means

    def _report(self, rate: float) -> None:
        means = self._means()
        self.log.write(self.step, self.consumed, self.seconds, "train", {**means, "learning_rate": rate})
        done = self.seconds if self.config.time_limit is not None else self.step
        self.log.progress(done, f"step {self.step}, loss {means['loss']:.4g}")

    def validate(self) -> dict[str, float]:
        """Scores of the averaged weights on the validation set; the main process computes them."""
        scores: dict[str, float] = {}
        if self.validation_dataset is not None and self.main:
            model = self.trainable.model
            model.eval()
            with self.average.applied(), torch.no_grad():
                scores = {name: float(value) for name, value in self.trainable.validate(self._validation_batches()).items()}
            model.train()
            self.log.write(self.step, self.consumed, self.seconds, "validation", scores)
        self.scores, self.scored = self._share(scores), self.step
        return self.scores

    def _share(self, scores: dict[str, float]) -> dict[str, float]:
        if self.control is None:
            return scores
        shared = [scores]
        torch.distributed.broadcast_object_list(shared, src=0, group=self.control)
        return shared[0]

    def _validation_batches(self) -> Iterator[tuple[dict[str, Tensor], SampleNoise]]:
        length = len(self.validation_dataset)
        count = min(length, self.config.validation_samples)
        indices = [i * length // count for i in range(count)]
        size = max(1, self.config.batch // (self.accelerator.num_processes * self.config.accumulate))
        chosen = Subset(self.validation_dataset, indices)
        pieces = [indices[i : i + size] for i in range(0, count, size)]
        for batch, piece in zip(self._loader(chosen.dataset, pieces), pieces, strict=True):
            yield self._move(batch), SampleNoise(derive(self.config.seed, "validation"), piece, self.device)

    def save(self) -> None:
        """A checkpoint, written by the main process; a model that is not finite is refused."""
        if self.sums:
            self.log.write(self.step, self.consumed, self.seconds, "train", self._means())
        if self.main:
            tensors = {
                "model": self.trainable.model.state_dict(),
                "average": self.average.state(),
                "optimizer": checkpoints.flatten_optimizer(self.optimizer.optimizer),
            }
            state = {"consumed": self.consumed, "seconds": self.seconds, "scores": self.scores, "scored": self.scored}
            checkpoints.save(self.run / "checkpoints", self.step, tensors, state, self.config.keep)
        self.saved = self.step
        self.accelerator.wait_for_everyone()


def _optimizer(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW or Muon, with weight decay on matrices and kernels only; Muon leaves to AdamW what is no layer's weight."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UserError("the model has no parameters to train")
    layers = [p for name, p in named if p.ndim >= 2 and name.endswith("weight")]
    others = [p for name, p in named if p.ndim >= 2 and not name.endswith("weight")]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": layers, "use_muon": True},
        {"params": others, "use_muon": False},
        {"params": vectors, "use_muon": False, "weight_decay": 0.0},
    ]
    groups, common = [g for g in groups if g["params"]], {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        from timm.optim import Muon

        return Muon(groups, betas=tuple(config.betas), nesterov=True, **common)
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for _, p in named)
    return torch.optim.AdamW(groups, betas=tuple(config.betas), fused=fused, **common)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within the context SIGTERM and SIGINT are only noted in the list; a second SIGINT interrupts at once."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _replace_directory(final: Path, write) -> None:
    """``write`` fills a directory that then takes the place of ``final``."""
    partial, old = (final.with_name(f".{final.name}.{word}") for word in ("partial", "old"))
    for path in (partial, old):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)
