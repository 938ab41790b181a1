"""The one training loop, for any `Trainable`, on one process or many, whatever the launcher's strategy: see `train`."""

import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from appa_lite.core.errors import UserError
from appa_lite.core.random import derive
from appa_lite.data.windows import GlobalSampler, collate
from appa_lite.training import checkpoints, prepare
from appa_lite.training.base import SampleNoise, Trainable
from appa_lite.training.checkpoints import Piece
from appa_lite.training.ema import WeightAverage
from appa_lite.training.fully_shard import FullyShard
from appa_lite.training.logs import RunLog
from appa_lite.training.processes import Processes, join
from appa_lite.training.profile import Profile
from appa_lite.training.schedule import TrainingConfig
from appa_lite.training.signals import Interrupted, caught_signals
from appa_lite.training.strategy import Replicated, Strategy
from appa_lite.training.zero import Zero

__all__ = ["Interrupted", "TrainingConfig", "train"]
logger = logging.getLogger(__name__)


def train(
    trainable: Trainable, dataset: Dataset, validation_dataset: Dataset | None, config: TrainingConfig, run: Path | str
) -> dict[str, float]:
    """Trains, or goes on training what is in ``run``; returns the validation scores of the averaged weights.

    ``train(trainable, WindowDataset(fields, times, frames=8), None, TrainingConfig(steps=1000), Path("runs/mine"))``

    The run directory holds ``config.json``, ``metrics.csv``, ``tensorboard/``, ``checkpoints/``, ``summary.json`` and, in
    the end, ``model/`` as written by ``trainable.export`` with the averaged weights, which the trainable's model then holds
    (under a strategy that shards it: on the main process). Other averages asked for are written to ``averages/STD/``.

    Raises:
        UserError: settings that do not fit the data or the launcher, or a loss that is not finite.
        Interrupted: on SIGTERM or SIGINT, after a checkpoint was saved.
    """
    with torch.random.fork_rng(devices=[]), caught_signals(config.grace) as caught:
        loop = _Loop(trainable, dataset, validation_dataset, config, Path(run))
        try:
            loop.resume()
            if config.profile:
                Profile(loop, config)
            loop.run_steps(caught)
            return loop.finish()
        finally:
            loop.close()


def strategy(model: torch.nn.Module, config: TrainingConfig, processes: Processes) -> Strategy:
    """The model spread over the processes as the launcher asked, in the precision and with the savings of the settings."""
    blocks = prepare.repeated_blocks(model)
    if processes.strategy == "fsdp2":
        made: Strategy = FullyShard(model, config, processes, blocks)
    else:
        made = (Zero if processes.strategy == "zero" else Replicated)(model, config, processes)
    made.check()
    device, precision = processes.device, config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if config.checkpoint_activations:
        if not blocks:
            raise UserError(
                f"{type(model).__name__} declares no blocks whose activations could be recomputed: say checkpoint_activations=0"
            )
        prepare.recompute(blocks, config.checkpoint_activations)
    if precision == "bf16":
        prepare.autocast(model, device, cached=isinstance(made, Replicated))
    for module in ([model] if isinstance(made, Replicated) else blocks) if config.compile else ():
        module.compile()
    return made


class _Loop:
    """The state of a training: ``step`` and ``consumed`` count optimiser steps and samples, ``seconds`` earlier sessions too."""

    def __init__(self, trainable: Trainable, dataset: Dataset, validation_dataset: Dataset | None, config: TrainingConfig, run: Path):
        self.trainable, self.config, self.run = trainable, config, run
        self.processes = processes = join(config.device)
        self.main, self.device = processes.main, processes.device
        self.dataset, self.validation_dataset = (self._place(d) for d in (dataset, validation_dataset))
        self.step, self.consumed, self.seconds = 0, 0, 0.0
        self.sampler = self._sampler()
        run.mkdir(parents=True, exist_ok=True)
        trainable.to(self.device)
        self.module = trainable.model
        self.names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        self.strategy = strategy(self.module, config, processes)
        trained = self._trained()
        self.averages = {std: WeightAverage(trained, std, config.ema_decay) for std in config.lengths}
        self.writer = checkpoints.Writer(run / "checkpoints", config.keep, processes)
        self.scores: dict[str, float] = {}
        self.scored = self.saved = -1
        self.log: RunLog | None = None
        self.started = self.reported = time.monotonic()
        self.waited = 0.0
        self.sums: dict[str, Tensor] = {}
        self.summed = 0

    def _place(self, dataset: Dataset | None) -> Dataset | None:
        resident = self.config.resident and self.device.type == "cuda" and hasattr(dataset, "to")
        return dataset.to(self.device) if resident else dataset

    def _trained(self) -> dict[str, Tensor]:
        """What this process holds of the weights that are trained."""
        weights = self.strategy.weights()
        return {name: weights[name].values for name in self.names}

    # Before and after

    def resume(self) -> None:
        """Goes back to the last complete checkpoint of the run directory, if there is one."""
        if self.main:
            checkpoints.clean(self.run / "checkpoints")
        saved = checkpoints.find_last(self.run / "checkpoints", self.processes)
        if saved is not None:
            self._restore(saved)
        if self.main:
            logger.info(
                "%s on %d x %s%s", self.strategy.name, self.processes.world, self.device.type, f", from step {self.step}" * bool(saved)
            )
            self._note_config()
            (self.run / "summary.json").unlink(missing_ok=True)  # it says that the training is done
        self.processes.wait()
        self.started = time.monotonic() - self.seconds
        timed = self.config.time_limit is not None
        total = self.config.time_limit if timed else self.config.steps
        self.log = RunLog(self.run, self.step, total, self.seconds if timed else self.step, "s" if timed else "step", self.main)

    def _restore(self, saved: checkpoints.Saved) -> None:
        try:
            self.strategy.make_moments({key.removeprefix("optimizer/") for key in saved.shapes if key.startswith("optimizer/")})
            saved.fill(self._pieces())
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.run} holds a training of another model ({reason}): choose another run directory") from error
        self.strategy.install({name: piece.values for name, piece in self.strategy.weights().items()})
        state = saved.state
        self.step, self.consumed, self.seconds = state["step"], state["consumed"], state["seconds"]
        self.scores, self.scored, self.saved = state["scores"], state["scored"], state["step"]

    def _pieces(self) -> dict[str, Piece]:
        """Everything that a checkpoint holds, as far as it is on this process."""
        weights = self.strategy.weights()
        pieces = {f"weights/{name}": piece for name, piece in weights.items()}
        for i, (std, average) in enumerate(self.averages.items()):
            label = f"average_{std:g}" if i else "average"
            pieces |= {f"{label}/{name}": dataclasses.replace(weights[name], values=value) for name, value in average.average.items()}
        pieces |= {f"optimizer/{name}": piece for name, piece in self.strategy.moments().items()}
        return pieces | {f"buffers/{name}": piece for name, piece in self.strategy.buffers().items()}

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
        """Last scores and checkpoint, then the model directories with the averaged weights."""
        if self.scored != self.step:
            self.validate()
        if self.saved != self.step:
            self.save()
        self.writer.settle()
        prepare.restore(self.module)
        for std, average in reversed(self.averages.items()):  # the first one last: the trainable keeps it
            plain = self.strategy.plain(average.average)
            directory = self.run / "model" if std == self.config.lengths[0] else self.run / "averages" / f"{std:g}"
            if plain is not None:
                self.trainable.model = plain.eval()
            if self.main:
                _replace_directory(directory, self.trainable.export)
            self.processes.wait()
        if self.main:
            summary = {"step": self.step, "samples": self.consumed, "seconds": round(self.seconds, 1), **self.scores}
            summary |= {"strategy": self.strategy.name, "processes": self.processes.world}
            (self.run / "summary.json").write_text(json.dumps(summary, indent=1))
        self.processes.wait()
        return dict(self.scores)

    def close(self) -> None:
        self.writer.cancel()
        if self.log is not None:
            self.log.close()
        prepare.restore(self.module)
        self.strategy.close()

    # The steps

    def run_steps(self, caught: list[int]) -> None:
        """Optimiser steps until the training is done."""
        config = self.config
        self.sampler = self._sampler()
        batches = zip(self._loader(self.dataset, self.sampler), self.sampler.positions(), strict=False)
        while True:
            progress, number = self._agree(caught)
            if number:
                self._stop(number)
            if progress >= 1:
                return
            self.trainable.progress = progress
            self._take_step(batches, config.rate(self.step, progress))
            if self.step % config.log_every == 0:
                self._report(config.rate(self.step, progress))
            if config.validate_every and self.step % config.validate_every == 0:
                self.validate()
            if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                self.save()

    def _take_step(self, batches: Iterator, rate: float) -> None:
        config = self.config
        self.strategy.model.train()
        # Dropout and the like draw from torch's own generator: a function of the step, so nothing needs saving.
        torch.manual_seed(derive(config.seed, "step", self.step, self.processes.rank))
        for part in range(config.accumulate):
            batch, noise = self._fetch(batches)
            last = part == config.accumulate - 1
            with torch.enable_grad(), self.strategy.reducing(last):
                losses = self._forward(batch, noise)
                self._backward(losses["loss"], last)
            self._add(losses, 1 / config.accumulate)
        self._update(rate)
        self.step += 1
        self.summed += 1
        self.consumed += config.batch
        self._average()

    def _fetch(self, batches: Iterator) -> tuple[dict[str, Tensor], SampleNoise]:
        """The next part of the batch, on the device; the seconds spent waiting for it are counted."""
        asked = time.monotonic()
        batch, positions = next(batches)
        self.waited += time.monotonic() - asked
        return self._move(batch), SampleNoise(self.config.seed, positions, self.device)

    def _forward(self, batch: dict[str, Tensor], noise: SampleNoise) -> dict[str, Tensor]:
        return self.trainable.loss(self.strategy.model, batch, noise)

    def _backward(self, loss: Tensor, last: bool) -> None:
        self.strategy.backward(loss, last)

    def _update(self, rate: float) -> None:
        norm = self.strategy.update(rate)
        if norm is not None:
            self._add({"gradient_norm": norm}, 1.0)

    def _average(self) -> None:
        weights = self._trained()
        for average in self.averages.values():
            average.update(self.step, weights)

    def _agree(self, caught: list[int]) -> tuple[float, int]:
        """Progress and caught signal, the same for all processes, which must leave the loop together."""
        own = [time.monotonic() - self.started, float(caught[0] if caught else 0), float(self.writer.error is not None)]
        self.seconds, number, failed = self.processes.largest(own)
        self.writer.check(failed)
        return self.config.progress(self.step, self.seconds), int(number)

    def _stop(self, number: int) -> None:
        if self.saved != self.step:
            self.save()
        self.writer.settle()
        if self.main:
            name = signal.Signals(number).name
            logger.warning("training stopped by %s at step %d: saved in %s; the same command goes on from there", name, self.step, self.run)
        raise Interrupted(128 + number)

    # Data

    def _sampler(self) -> GlobalSampler:
        config, processes = self.config, self.processes
        share = {"rank": processes.rank, "world": processes.world, "parts": config.accumulate}
        return GlobalSampler(len(self.dataset), config.batch, config.seed, self.consumed, **share, block=getattr(self.dataset, "block", 1))

    def _loader(self, dataset: Dataset, sampler: GlobalSampler | list[list[int]]) -> DataLoader:
        own = torch.Generator().manual_seed(derive(self.config.seed, "loader"))  # keeps the global generator out of it
        resident = self.config.resident and self.device.type == "cuda"
        workers, pin = 0 if resident else self.config.workers, self.device.type == "cuda" and not resident
        ahead = self.config.prefetch if workers else None
        return DataLoader(
            dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, prefetch_factor=ahead, generator=own, pin_memory=pin
        )

    def _move(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    # Logs, scores, checkpoints

    def _add(self, losses: dict[str, Tensor], weight: float) -> None:
        for name, value in losses.items():
            value = torch.as_tensor(value, device=self.device).detach().to(torch.float64) * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _means(self) -> dict[str, float]:
        """Means since the last call, over steps and processes; and the part of the time that this process waited for data."""
        if not self.sums:
            return {}
        sums = torch.stack([torch.as_tensor(v) for v in self.sums.values()]) / self.summed
        means = dict(zip(self.sums, self.processes.mean(sums).tolist(), strict=True))
        now = time.monotonic()
        means["data_wait"] = self.waited / max(now - self.reported, 1e-9)
        self.sums, self.summed, self.waited, self.reported = {}, 0, 0.0, now
        if not math.isfinite(means["loss"]):
            raise UserError(f"the loss is not finite near step {self.step}: lower learning_rate, or use precision=fp32")
        return means

    def _report(self, rate: float) -> None:
        means = self._means()
        self.log.write(self.step, self.consumed, self.seconds, "train", {**means, "learning_rate": rate})
        done = self.seconds if self.config.time_limit is not None else self.step
        self.log.progress(done, f"step {self.step}, loss {means['loss']:.4g}")

    def validate(self) -> dict[str, float]:
        """Scores of the averaged weights on the validation set; all processes compute the same, for they may share the weights."""
        scores: dict[str, float] = {}
        began = time.monotonic()
        if self.validation_dataset is not None:
            for i, (std, average) in enumerate(self.averages.items()):
                self.module.eval()
                with self.strategy.holding(average.average), torch.no_grad():
                    found = self.trainable.validate(self._validation_batches())
                scores |= {name + f"_ema_{std:g}" * (i > 0): float(value) for name, value in found.items()}
            self.module.train()
            scores = self.processes.share(scores)
            self.log.write(self.step, self.consumed, self.seconds, "validation", scores)
        self.scores, self.scored = scores, self.step
        self.reported += time.monotonic() - began
        return scores

    def _validation_batches(self) -> Iterator[tuple[dict[str, Tensor], SampleNoise]]:
        length = len(self.validation_dataset)
        count = min(length, self.config.validation_samples)
        indices = [i * length // count for i in range(count)]
        size = max(1, self.config.batch // (self.processes.world * self.config.accumulate))
        chosen = Subset(self.validation_dataset, indices)
        pieces = [indices[i : i + size] for i in range(0, count, size)]
        for batch, piece in zip(self._loader(chosen.dataset, pieces), pieces, strict=True):
            yield self._move(batch), SampleNoise(derive(self.config.seed, "validation"), piece, self.device)

    def save(self) -> None:
        """A checkpoint, written while the training goes on; a model that is not finite is refused."""
        if self.sums:
            self.log.write(self.step, self.consumed, self.seconds, "train", self._means())
        self.writer.settle()
        state = {"consumed": self.consumed, "seconds": self.seconds, "scores": self.scores, "scored": self.scored}
        self.writer.start(self.step, self._pieces(), state | {"strategy": self.strategy.name, "processes": self.processes.world})
        self.saved = self.step


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
