"""The training loop, on a linear denoiser. As a script (see `main`) this file trains it, for the tests that need processes."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from appa_lite.core.errors import UserError
from appa_lite.core.random import generator
from appa_lite.data.windows import WindowDataset
from appa_lite.training import checkpoints
from appa_lite.training.base import SampleNoise, Trainable
from appa_lite.training.ema import WeightAverage, power_exponent
from appa_lite.training.loop import Interrupted, TrainingConfig, train

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
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched but 1"):
        train(LinearDenoiser(), windows(), None, TrainingConfig(**BASE), tmp_path / "d")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP"):
        train(LinearDenoiser(), windows(), None, TrainingConfig(**BASE), tmp_path / "d")


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


# Processes


def command(run, processes=1, **options):
    """The command that trains in ``run``, and its environment."""
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = ROOT / "launch" / "accelerate" / "cpu2.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", str(port)]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return {"args": [*launcher, __file__, str(run), json.dumps(options)], "env": environment, "stderr": subprocess.PIPE, "text": True}


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


def test_two_processes_train_as_one(tmp_path):
    """1 x 8 and 2 x 2 x 2 samples, in float64."""
    train(LinearDenoiser(torch.float64), windows(), windows(2), TrainingConfig(**BASE), tmp_path / "one")
    two = subprocess.run(**command(tmp_path / "two", processes=2, accumulate=2))
    assert two.returncode == 0, two.stderr
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-12)
    for metric in ("loss", "mse"):
        np.testing.assert_allclose(rows(tmp_path / "two", metric), rows(tmp_path / "one", metric), rtol=1e-12)


@pytest.mark.slow
def test_the_number_of_processes_may_change(tmp_path):
    train(LinearDenoiser(torch.float64), windows(), windows(2), TrainingConfig(**BASE), tmp_path / "one")
    with pytest.raises(Stop):
        train(Dies(27, dtype=torch.float64), windows(), windows(2), TrainingConfig(**BASE), tmp_path / "change")
    change = subprocess.run(**command(tmp_path / "change", processes=2))
    assert change.returncode == 0, change.stderr
    assert_same(weights(tmp_path / "change"), weights(tmp_path / "one"), 1e-12)


@pytest.mark.slow
def test_sigterm_to_two_processes(tmp_path):
    with subprocess.Popen(**command(tmp_path, processes=2, pause=0.1)) as process:
        deadline = time.monotonic() + 90
        while len(rows(tmp_path, "loss")) < 7 if (tmp_path / "metrics.csv").exists() else True:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=60)
    assert "stopped by SIGTERM" in message
    assert checkpoints.find_last(tmp_path / "checkpoints") is not None
    assert not (tmp_path / "model").exists()


if __name__ == "__main__":
    main()
