"""The training loop, on a linear denoiser. As a script (see `main`) this file trains it, for the test that needs a process."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from appa_lite import cli
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.core.random import generator
from appa_lite.core.store import open_dataset, write_dataset
from appa_lite.data.windows import WindowDataset
from appa_lite.training import checkpoints, zero
from appa_lite.training.base import SampleNoise, Trainable
from appa_lite.training.checkpoints import Piece
from appa_lite.training.ema import WeightAverage, power_exponent
from appa_lite.training.loop import Interrupted, TrainingConfig, train
from appa_lite.training.processes import ALONE

ROOT = Path(__file__).parents[1]
BASE = {"steps": 40, "batch": 8, "learning_rate": 1e-2, "warmup": 5, "device": "cpu"}
BASE |= {"validate_every": 20, "checkpoint_every": 20, "log_every": 1}


class Layers(nn.Sequential):
    """A module of our own: torch.compile leaves torch's as they are."""

    def forward(self, x):
        return super().forward(x)


class LinearDenoiser(Trainable):
    """E[x | x + n] of Gaussian x by a linear layer; the best one is known."""

    def __init__(self, dtype=torch.float32, dropout=0.0, pause=0.0):
        self.dtype, self.pause, self.seen = dtype, pause, []
        self.model = Layers(nn.Linear(4, 4), nn.Dropout(dropout)).to(dtype)
        with torch.no_grad():
            for i, p in enumerate(self.model.parameters()):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator(0, "weights", i)))

    def loss(self, model, batch, noise):
        time.sleep(self.pause)
        self.seen.append(batch["index"].tolist())
        x = batch["fields"][:, :, 0, 0].to(self.dtype)
        return {"loss": (model(x + noise.normal(x.shape[1:], self.dtype)) - x).square().mean(), "variance": x.square().mean()}

    def validate(self, batches):
        return {"mse": self.mean_loss(batches)["loss"]}

    def export(self, directory):
        assert not self.model.training and not list(directory.iterdir())
        save_file(self.model.state_dict(), directory / "model.safetensors")


def windows(trajectories=8):
    x = torch.randn(trajectories, 16, 1, 1, 4, generator=generator(1, "data")) * torch.tensor([0.5, 1.0, 1.0, 2.0])
    return WindowDataset(x, 60.0 * np.arange(16), frames=2)


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def rows(run, metric):
    with (run / "metrics.csv").open() as file:
        return [(int(r["step"]), float(r["value"])) for r in csv.DictReader(file) if r["metric"] == metric]


class Stop(Exception):
    """Ends a training as a power cut would."""


class Dies(LinearDenoiser):
    def __init__(self, calls, **options):
        super().__init__(**options)
        self.calls = calls

    def loss(self, model, batch, noise):
        if self.calls == 0:
            raise Stop
        self.calls -= model.training
        return super().loss(model, batch, noise)


# One process


def test_it_learns_and_leaves_a_complete_run(tmp_path):
    config = TrainingConfig(**{**BASE, "steps": 600, "learning_rate": 3e-2, "batch": 32, "validate_every": 300, "ema": 0.1})
    trainable = LinearDenoiser()
    scores = train(trainable, windows(64), windows(32), config, tmp_path)
    variance = np.array([0.25, 1.0, 1.0, 4.0])
    gain = torch.tensor(variance / (1 + variance), dtype=torch.float32)
    assert scores["mse"] == pytest.approx(gain.mean().item(), rel=0.1)  # the variance of x given the noisy x
    torch.testing.assert_close(trainable.model[0].weight.detach(), torch.diag(gain), rtol=0, atol=0.06)
    assert_same(weights(tmp_path), trainable.model.state_dict())
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_0000560", "step_0000580", "step_0000600"]
    assert [s for s, _ in rows(tmp_path, "mse")] == [300, 600]
    assert len(rows(tmp_path, "loss")) == 600 and list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "config.json").read_text())["batch"] == 32
    assert json.loads((tmp_path / "summary.json").read_text())["mse"] == scores["mse"]
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_is_bitwise_uninterrupted(tmp_path, optimizer):
    """With dropout, in the middle of an epoch, and with the log as if nothing had happened."""
    config = TrainingConfig(**BASE, optimizer=optimizer)
    whole = train(LinearDenoiser(dropout=0.2), windows(), windows(2), config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(Dies(27, dropout=0.2), windows(), windows(2), config, tmp_path / "cut")
    assert not (tmp_path / "cut" / "model").exists()
    again = LinearDenoiser(dropout=0.2)
    resumed = train(again, windows(), windows(2), config, tmp_path / "cut")
    assert resumed == whole
    assert_same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    for metric in ("loss", "mse", "gradient_norm", "learning_rate"):
        assert rows(tmp_path / "cut", metric) == rows(tmp_path / "whole", metric)
    last = [checkpoints.find_last(tmp_path / name / "checkpoints") for name in ("cut", "whole")]
    for kind in ("weights", "average", "optimizer"):
        assert_same(*(saved.tensors(kind) for saved in last))
    finished = train(LinearDenoiser(), windows(), windows(2), config, tmp_path / "cut")  # nothing left to do
    assert finished == whole


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    train(LinearDenoiser(), windows(), None, TrainingConfig(**{**BASE, "steps": 20}), tmp_path)

    def full(tensors, path):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        train(LinearDenoiser(), windows(), None, TrainingConfig(**BASE), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_0000020"]


def test_a_longer_training_goes_on(tmp_path, caplog):
    train(LinearDenoiser(), windows(), None, TrainingConfig(**BASE), tmp_path)
    train(LinearDenoiser(), windows(), None, TrainingConfig(**{**BASE, "steps": 60}), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["samples"] == 60 * 8
    assert "steps: 40 -> 60" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "state"])
def test_a_torn_checkpoint_is_skipped(tmp_path, caplog, damage):
    config = TrainingConfig(**BASE)
    train(LinearDenoiser(), windows(), windows(2), config, tmp_path)
    whole = weights(tmp_path)
    torn = tmp_path / "checkpoints" / "step_0000040"
    path = torn / ("state.json" if damage == "state" else "part_00000.safetensors")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if damage != "flipped" else content[:-1] + bytes([content[-1] ^ 1]))
    train(LinearDenoiser(), windows(), windows(2), config, tmp_path)
    assert "step_0000040 is incomplete" in caplog.text
    assert_same(weights(tmp_path), whole)


def test_samples_and_noise_are_functions_of_the_position(tmp_path):
    whole, parts = LinearDenoiser(torch.float64), LinearDenoiser(torch.float64)
    data = windows()
    train(whole, data, None, TrainingConfig(**BASE), tmp_path / "whole")
    train(parts, data, None, TrainingConfig(**BASE, accumulate=4, workers=1), tmp_path / "parts")
    assert [i for b in whole.seen for i in b] == [i for b in parts.seen for i in b]
    assert sorted(i for b in whole.seen[:15] for i in b) == list(range(len(data)))
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"), 1e-12)


def test_sample_noise():
    whole, part = SampleNoise(0, range(2000)), SampleNoise(0, [1500, 3])
    for draw in (lambda n: n.normal((5,)), lambda n: n.uniform((2, 3)), lambda n: n.stratified(torch.float64)):
        assert torch.equal(draw(whole)[[1500, 3]], draw(part))
    x = whole.normal((20,))
    assert abs(x.mean()) < 0.02 and abs(x.var() - 1) < 0.03
    correlation = torch.corrcoef(torch.cat([x.T, whole.normal((20,)).T])) - torch.eye(40)
    assert correlation.abs().max() < 0.12
    u = torch.sort(SampleNoise(5, range(777, 777 + 64)).stratified(torch.float64)).values
    assert u.diff().max() < 3 / 64 and u.min() >= 0 and u.max() < 1
    assert not torch.equal(SampleNoise(0, [1]).normal((3,)), SampleNoise(1, [1]).normal((3,)))


def test_power_function_average():
    """The weights of the past under beta = (1 - 1/t)^(gamma + 1) are t^gamma, with the relative deviation asked for."""
    for std in (0.05, 0.1, 0.2):
        gamma = power_exponent(std)
        assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(std, rel=1e-9)
    model = nn.Linear(1, 1, bias=False).double()
    average = WeightAverage(dict(model.named_parameters()), std=0.1)
    values = torch.randn(2000, generator=generator(0), dtype=torch.float64)
    for step, value in enumerate(values, 1):
        nn.init.constant_(model.weight, value.item())
        average.update(step, dict(model.named_parameters()))
    t = torch.arange(1, 2001, dtype=torch.float64)
    profile = t ** (gamma := power_exponent(0.1) + 1) - (t - 1) ** gamma
    expected = (profile * values).sum() / profile.sum()
    assert average.average["weight"].item() == pytest.approx(expected.item(), rel=1e-9)


def test_bfloat16_leaves_a_plain_model(tmp_path):
    fine, coarse = LinearDenoiser(), LinearDenoiser()
    train(fine, windows(), windows(2), TrainingConfig(**BASE), tmp_path / "fine")
    train(coarse, windows(), windows(2), TrainingConfig(**BASE, precision="bf16"), tmp_path / "coarse")
    assert_same(weights(tmp_path / "fine"), weights(tmp_path / "coarse"), 0.05)
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "fine"), weights(tmp_path / "coarse"))
    x = torch.randn(3, 4, generator=generator(0))
    assert "forward" not in vars(coarse.model)
    assert torch.equal(coarse.model(x), nn.functional.linear(x, coarse.model[0].weight, coarse.model[0].bias))


@pytest.mark.slow
def test_streaming_keeps_up(tmp_path, capsys):
    """From a zarr store through two workers, steps of 50 ms wait for data at most 5 % of their time."""
    spec = FieldSpec((Variable("a"), Variable("b")), Grid(("y", "x"), tuple(range(64)), tuple(range(64))), 3600.0)
    fields = torch.randn(1, 2000, *spec.shape, generator=generator(0))
    coordinates = {"trajectory": np.arange(1), "time": to_datetime(3600.0 * np.arange(2000))}
    write_dataset(spec.to_dataset(fields, coordinates), tmp_path / "data.zarr")

    class Reads(LinearDenoiser):
        def loss(self, model, batch, noise):
            return super().loss(model, {"fields": batch["fields"][..., :1, :1, :4], "index": batch["index"]}, noise)

    data = WindowDataset.from_xarray(open_dataset(tmp_path / "data.zarr"), spec, frames=8, memory_limit=0)
    config = TrainingConfig(**{**BASE, "steps": 100, "batch": 16, "log_every": 10, "checkpoint_every": 0}, workers=2, prefetch=4)
    train(Reads(pause=0.05), data, None, config, tmp_path / "run")
    waits = [value for _, value in rows(tmp_path / "run", "data_wait")]
    with capsys.disabled():
        print("\ndata_wait", " ".join(f"{w:.3f}" for w in waits))
    assert np.median(waits[1:]) < 0.05


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(tmp_path):
    plain, compiled = LinearDenoiser(), LinearDenoiser()
    train(plain, windows(), windows(2), TrainingConfig(**BASE), tmp_path / "plain")
    torch._dynamo.utils.counters.clear()
    train(compiled, windows(), windows(2), TrainingConfig(**BASE, compile=True), tmp_path / "compiled")
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "compiled"), 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.model._compiled_call_impl is None


def test_the_clock_ends_an_annealed_training(tmp_path):
    config = TrainingConfig(**{**BASE, "steps": None, "validate_every": 0, "checkpoint_every": 0}, time_limit=1.5)
    start = time.monotonic()
    train(LinearDenoiser(pause=0.02), windows(), windows(2), config, tmp_path)
    assert time.monotonic() - start < 6
    rates = [rate for _, rate in rows(tmp_path, "learning_rate")]
    assert max(rates) > 0.9e-2 and rates[-1] < 0.05e-2
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_schedules():
    for name in ("cosine", "linear", "constant", "rsqrt"):
        config = TrainingConfig(steps=100, warmup=10, schedule=name, learning_rate=2.0, final=0.1)
        assert config.rate(0, 0.0) == pytest.approx(0.2) and config.rate(9, 0.0) == pytest.approx(2.0)
        assert config.rate(99, 1.0) == pytest.approx({"constant": 2.0, "rsqrt": 2.0 / 5**0.5}.get(name, 0.2))
    assert TrainingConfig(steps=100, time_limit=10).progress(20, 5.0) == 0.5


def test_mistakes_are_named(tmp_path, monkeypatch):
    for wrong in ({"steps": None}, {"schedule": "cosin"}, {"precision": "fp8"}, {"batch": 0}, {"ema": 0.5}, {"learning_rate": 0.0}):
        with pytest.raises(UserError):
            TrainingConfig(**wrong)
    with pytest.raises(UserError, match="not a multiple"):
        train(LinearDenoiser(), windows(), None, TrainingConfig(**{**BASE, "batch": 9}, accumulate=2), tmp_path / "a")
    with pytest.raises(UserError, match="not finite"):
        train(LinearDenoiser(), windows(), None, TrainingConfig(**{**BASE, "learning_rate": 1e38, "clip": None}), tmp_path / "b")
    train(LinearDenoiser(), windows(), None, TrainingConfig(**BASE), tmp_path / "c")
    other = LinearDenoiser()
    other.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(UserError, match="another model"):
        train(other, windows(), None, TrainingConfig(**BASE), tmp_path / "c")


def test_wrong_launches_are_named(tmp_path, monkeypatch):
    """What would otherwise train unrelated models, or not shard what was to be sharded, and print normal results."""

    def refused(message, **settings):
        with pytest.raises(UserError, match=message):
            train(LinearDenoiser(), windows(), None, TrainingConfig(**{**BASE, **settings}), tmp_path)

    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("2 processes were launched but 1")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("FSDP version 1")
    monkeypatch.setenv("FSDP_VERSION", "2")
    refused("no launcher started this process")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused("zero and fsdp2")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    refused("ZeRO needs DeepSpeed .*pip install")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    refused("megatron")


def test_deepspeed_settings(tmp_path, monkeypatch):
    def settings(**keys):
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | keys))
        return zero._settings(TrainingConfig(**BASE, accumulate=2, clip=0.5), 2)

    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    found = settings(gradient_clipping="auto", train_batch_size="auto")
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"], found["train_batch_size"]) == (2, 2, 8)
    assert found["gradient_clipping"] == 0.5
    for wrong, message in (
        ({"zero_optimization": {"stage": 0}}, "shards nothing"),
        ({"bf16": {"enabled": True}}, "training.precision"),
        ({"train_batch_size": 16}, "contradicts"),
    ):
        with pytest.raises(UserError, match=message):
            settings(**wrong)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match="cannot read"):
        zero._settings(TrainingConfig(**BASE), 2)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_pieces_are_read_by_any_number_of_processes(tmp_path, world):
    """Written in pieces by ``world`` processes, sharded or replicated; read whole, and in pieces of any other size."""
    x, y = torch.randn(7, 3, generator=generator(0)), torch.tensor(4.0)
    bounds = [x.numel() * r // world for r in range(world + 1)]
    for rank in range(world):
        writer = checkpoints.Writer(tmp_path, 1, dataclasses.replace(ALONE, rank=world - 1 - rank, world=world))
        low, high = bounds[writer.rank : writer.rank + 2]
        pieces = {"weights/x": Piece(x.flatten()[low:high], (7, 3), low), "weights/y": Piece.whole(x), "buffers/z": Piece.whole(y)}
        writer.start(3, pieces, {"consumed": 24})
        writer._join()  # the main process comes last, and completes it
    saved = checkpoints.find_last(tmp_path)
    assert saved.state["step"] == 3 and saved.state["consumed"] == 24 and len(saved.state["parts"]) == world
    assert_same(saved.tensors("weights"), {"x": x, "y": x})
    assert torch.equal(saved.tensors("buffers")["z"], y)
    for start, count in ((0, 21), (5, 9), (20, 1), (21, 0)):
        assert torch.equal(saved.read("weights/x", start, count), x.flatten()[start : start + count])
    with pytest.raises(ValueError, match="shape"):
        saved.fill({"weights/x": Piece.whole(torch.zeros(7, 4))})


def test_a_checkpoint_that_not_all_completed_is_none(tmp_path):
    writer = checkpoints.Writer(tmp_path, 3, dataclasses.replace(ALONE, world=2))
    writer.start(1, {"weights/x": Piece.whole(torch.ones(4))}, {})
    writer.cancel()
    assert checkpoints.find_last(tmp_path) is None and list(tmp_path.iterdir())
    checkpoints.clean(tmp_path)
    assert not list(tmp_path.iterdir())


def test_writing_does_not_stop_the_training(tmp_path, monkeypatch):
    """A slow disk delays the end, not the steps; what is saved is of the step that asked for it."""
    quick = LinearDenoiser()
    train(quick, windows(), None, TrainingConfig(**{**BASE, "steps": 39}), tmp_path / "quick")

    def slow(tensors, path):
        time.sleep(1.0)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", slow)
    train(LinearDenoiser(), windows(), None, TrainingConfig(**{**BASE, "steps": 39}), tmp_path / "slow")
    for step in (20, 39):
        saved = [checkpoints.Saved(tmp_path / name / "checkpoints" / f"step_{step:07d}") for name in ("quick", "slow")]
        assert_same(saved[0].tensors("weights"), saved[1].tensors("weights"))
    seconds = json.loads((tmp_path / "slow" / "summary.json").read_text())["seconds"]
    assert seconds < 1.0


class Block(nn.Linear):
    pass


class Blocks(nn.Sequential):
    _repeated_blocks = ["Block"]


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_change_nothing(tmp_path, every):
    """Bitwise, with dropout, and the model is plain again at the end."""
    models = []
    for n in (0, every):
        trainable = LinearDenoiser()
        trainable.model = Blocks(Block(4, 4), nn.Dropout(0.2), Block(4, 4))
        for i, p in enumerate(trainable.model.parameters()):
            nn.init.normal_(p, generator=generator(0, i))
        train(trainable, windows(), None, TrainingConfig(**BASE, checkpoint_activations=n), tmp_path / f"every{n}")
        assert "forward" not in vars(trainable.model[0])
        models.append(trainable.model.state_dict())
    assert_same(*models)
    with pytest.raises(UserError, match="declares no blocks"):
        train(LinearDenoiser(), windows(), None, TrainingConfig(**BASE, checkpoint_activations=1), tmp_path / "none")


def test_several_averages(tmp_path):
    """The first becomes the model, as if it were alone; the others lie beside it."""
    config = {**BASE, "validate_every": 20}
    single = {
        std: train(LinearDenoiser(), windows(), windows(2), TrainingConfig(**config, ema=std), tmp_path / str(std)) for std in (0.05, 0.2)
    }
    both = train(LinearDenoiser(), windows(), windows(2), TrainingConfig(**config, ema=[0.05, 0.2]), tmp_path / "both")
    assert both == {"mse": single[0.05]["mse"], "mse_ema_0.2": single[0.2]["mse"]}
    assert_same(weights(tmp_path / "both"), weights(tmp_path / "0.05"))
    other = load_file(tmp_path / "both" / "averages" / "0.2" / "model.safetensors")
    assert_same(other, weights(tmp_path / "0.2"))


def test_grace_ends_what_cannot_be_saved(tmp_path):
    """A process that waits for dead peers does not wait for ever."""
    start = time.monotonic()
    script = (
        "import os, signal, time\nfrom appa_lite.training.signals import caught_signals\n"
        "with caught_signals(0.3):\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 143 and "not saved within 0.3 s of SIGTERM" in done.stderr and time.monotonic() - start < 50


def test_a_signal_saves_and_restores_the_handlers(tmp_path):
    class Signals(LinearDenoiser):
        def loss(self, model, batch, noise):
            if len(self.seen) == 12:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(model, batch, noise)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        train(Signals(), windows(), None, TrainingConfig(**BASE), tmp_path)
    assert stopped.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "checkpoints" / "step_0000013").exists()


def test_a_dataset_larger_than_memory(tmp_path, monkeypatch):
    """Through the command line: a denoiser learns from streamed latents, to the same bits whether it finds or makes them."""
    monkeypatch.chdir(tmp_path)
    common = ("experiment=lorenz96", "size=debug")
    assert cli.main(["simulate", *common, "frames=60", "spinup=20", "out=data.zarr"]) == 0
    train = ["train", *common, "data=data.zarr", "memory=1"]
    assert cli.main([*train, "trainable=identity", "run=identity"]) == 0
    for run in ("makes", "finds"):
        assert cli.main([*train, "trainable=denoiser", "autoencoder=identity/model", f"run={run}"]) == 0
    files = [next((tmp_path / run / "model" / "denoiser").glob("*.safetensors")) for run in ("makes", "finds")]
    assert_same(*(load_file(file) for file in files))


# A process of its own; for several see test_distributed.py


def command(run, **options):
    """The command that trains in ``run``, and its environment."""
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    args = [sys.executable, __file__, str(run), json.dumps(options)]
    return {"args": args, "env": environment, "stderr": subprocess.PIPE, "text": True}


def main():
    run, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    trainable = LinearDenoiser(torch.float64, options.pop("dropout", 0.0), options.pop("pause", 0.0))
    train(trainable, windows(), windows(2), TrainingConfig(**{**BASE, **options}), run)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    train(LinearDenoiser(torch.float64, dropout=0.1), windows(), windows(2), TrainingConfig(**BASE), tmp_path / "whole")
    with subprocess.Popen(**command(tmp_path / "cut", dropout=0.1, pause=0.1)) as process:
        deadline = time.monotonic() + 60
        while len(rows(tmp_path / "cut", "loss")) < 7 if (tmp_path / "cut" / "metrics.csv").exists() else True:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "stopped by SIGTERM" in message and "Traceback" not in message
    assert len(list((tmp_path / "cut" / "checkpoints").iterdir())) == 1
    again = subprocess.run(**command(tmp_path / "cut", dropout=0.1))
    assert again.returncode == 0, again.stderr
    assert_same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


if __name__ == "__main__":
    main()
