"""Training on two processes under every strategy. As a script (see `main`) this file is what the launcher starts.

One launch per strategy trains several runs, one after the other, and writes what it saw; the tests read it. They judge by
those files as well as by the exit status.
"""

import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.optim import Muon
from torch import nn

from appa_lite.core.random import generator
from appa_lite.data.windows import WindowDataset
from appa_lite.training import checkpoints, loop
from appa_lite.training.base import Trainable
from appa_lite.training.ema import WeightAverage
from appa_lite.training.loop import Interrupted, TrainingConfig, train
from appa_lite.training.muon import Range, ShardedMuon

ROOT = Path(__file__).parents[1]
STRATEGIES = {"cpu2": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}
QUICK, SLOW = ("cpu2", "zero2", "zero3", "fsdp2"), ("zero1", "zero2_offload", "zero3_offload")
BASE = {"steps": 24, "batch": 8, "learning_rate": 1e-2, "warmup": 5, "device": "cpu", "ema": 0.2}
SAVINGS = {"precision": "bf16", "checkpoint_activations": 1, "ema": [0.1, 0.2], "accumulate": 2, "steps": 8}
MUON = {"steps": 8, "optimizer": "muon", "weight_decay": 0.1}
BASE |= {"validate_every": 12, "checkpoint_every": 8, "log_every": 1}


class Block(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(nn.functional.silu(self.linear(self.norm(x))))


class Net(nn.Module):
    """Sizes that two processes do not divide, a frozen parameter and buffers that are saved, or not."""

    _repeated_blocks = ["Block"]

    def __init__(self, dropout=0.0):
        super().__init__()
        self.inputs, self.outputs = nn.Linear(4, 7), nn.Linear(7, 4)
        self.blocks = nn.ModuleList([Block(7, dropout) for _ in range(3)])
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("hidden", torch.tensor(1.0), persistent=False)

    def forward(self, x):
        x = self.inputs(x * self.hidden)
        for block in self.blocks:
            x = block(x)
        return self.outputs(x) * (self.frozen * self.scale).sum() / 3


class Denoising(Trainable):
    """E[x | x + n] of Gaussian x by a small network; ``action`` happens before step ``at``."""

    def __init__(self, dtype=torch.float32, dropout=0.0, at=-1, action=None, pause=0.0):
        self.dtype, self.at, self.action, self.pause = dtype, at, action, pause
        self.model, self.seen = Net(dropout), []
        with torch.no_grad():
            for i, p in enumerate(p for p in self.model.parameters() if p.requires_grad):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator(0, "weights", i)))
        self.model.to(dtype)

    def loss(self, model, batch, noise):
        if model.training:
            if len(self.seen) == self.at:
                self.action()
            self.seen.append(batch["index"].tolist())
            time.sleep(self.pause)
        x = batch["fields"][:, :, 0, 0].to(self.dtype)
        return {"loss": (model(x + noise.normal(x.shape[1:], self.dtype)) - x).square().mean()}

    def validate(self, batches):
        return {"mse": self.mean_loss(batches)["loss"]}

    def export(self, directory):
        assert not self.model.training and not list(directory.iterdir())
        save_file(self.model.state_dict(), directory / "model.safetensors")


def windows(trajectories=8):
    x = torch.randn(trajectories, 16, 1, 1, 4, generator=generator(1, "data")) * torch.tensor([0.5, 1.0, 1.0, 2.0])
    return WindowDataset(x, 60.0 * np.arange(16), frames=2)


def fit(run, trainable, **options):
    return train(trainable, windows(), windows(2), TrainingConfig(**{**BASE, **options}), run)


def exported(run):
    return load_file(Path(run) / "model" / "model.safetensors")


def rows(run, metric):
    if not (Path(run) / "metrics.csv").exists():
        return []
    with (Path(run) / "metrics.csv").open() as file:
        return [(int(r["step"]), float(r["value"])) for r in csv.DictReader(file) if r["metric"] == metric]


def everything(run):
    saved = checkpoints.find_last(Path(run) / "checkpoints")
    return {f"{kind}/{k}": v for kind in ("weights", "average", "optimizer", "buffers") for k, v in saved.tensors(kind).items()}


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


# In the launched processes


class Watched(loop._Loop):
    """A training that also averages gathered weights, and notes what is sharded."""

    notes: dict = {}

    def resume(self):
        super().resume()
        self.gathered = WeightAverage(self.whole(self._trained()), BASE["ema"])
        weights = self.strategy.weights().values()
        self.notes["held"] = sum(piece.values.numel() for piece in weights)
        self.notes["total"] = sum(torch.Size(piece.shape).numel() for piece in weights)

    def whole(self, values):
        pieces = self.strategy.weights()
        return {name: self.strategy.gather(replace(pieces[name], values=value)).clone() for name, value in values.items()}

    def _average(self):
        super()._average()
        self.gathered.update(self.step, self.whole(self._trained()))

    def finish(self):
        local = self.whole(next(iter(self.averages.values())).average)
        self.notes["average"] = all(torch.equal(local[name], self.gathered.average[name]) for name in local)
        moments = self.strategy.moments().items()
        self.notes["moments"] = sum(piece.values.numel() for name, piece in moments if name.endswith("exp_avg"))
        return super().finish()


def muon_of_parts(rank):
    """Two processes hold ragged parts of matrices and of a kernel in one tensor, and take the steps of timm's Muon."""
    shapes, cuts = [(5, 7), (4, 3, 3, 3), (2, 6), (3, 2)], [16, 108, 0, 1]
    groups = [{"use_muon": True, "weight_decay": 0.1}, {"use_muon": False}]
    options = {"lr": 1e-2, "nesterov": True}
    whole = [torch.randn(shape, generator=generator(2, "muon", k)) for k, shape in enumerate((*shapes, (3,)))]
    parts, offset = [], 0
    for shape, cut in zip(shapes, cuts, strict=True):
        start, stop = ((0, cut), (cut, torch.Size(shape).numel()))[rank]
        parts.append(Range(shape, start, offset, stop - start))
        offset += stop - start

    def own(tensors):
        return torch.cat([t.reshape(-1)[r.start : r.start + r.count] for t, r in zip(tensors, parts, strict=False)])

    flat, vector = own(whole).clone(), whole[-1].clone()
    ours = ShardedMuon([groups[0] | {"params": [flat]}, groups[1] | {"params": [vector]}], options, lambda _: parts, torch.device("cpu"))
    theirs = Muon([groups[0] | {"params": whole[:-1]}, groups[1] | {"params": whole[-1:]}], **options)
    for step in range(3):
        for k, p in enumerate(whole):
            p.grad = torch.randn(p.shape, generator=generator(3, "muon", k, step))
        flat.grad, vector.grad = own([p.grad for p in whole]), whole[-1].grad.clone()
        ours.step()
        theirs.step()
    return torch.equal(flat, own(whole)) and torch.equal(vector, whole[-1])


def main():
    out, double = Path(sys.argv[1]), sys.argv[2] == "double"
    dtype = torch.float64 if double else torch.float32
    rank = int(os.environ.get("RANK", "0"))
    notes = Watched.notes
    plain, loop._Loop = loop._Loop, Watched
    whole = Denoising(dtype)
    fit(out / "plain", whole, accumulate=2)
    notes["seen"] = whole.seen
    loop._Loop = plain
    fit(out / "dropout", Denoising(dtype, 0.2))
    try:  # a signal to one process
        fit(out / "again", Denoising(dtype, 0.2, 13, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGTERM)))
    except Interrupted as stopped:
        notes["stopped"] = stopped.code
    if rank == 0:
        shutil.copytree(out / "again", out / "other")
    fit(out / "again", Denoising(dtype, 0.2))
    fit(out / "other", Denoising(dtype, 0.2), seed=1)  # negative control
    fit(out / "from_one", Denoising(dtype))
    fit(out / "savings", Denoising(), **SAVINGS)
    fit(out / "muon", Denoising(dtype), **MUON)
    with contextlib.suppress(Interrupted):
        fit(out / "muon_again", Denoising(dtype, at=5, action=lambda: rank == 1 and os.kill(os.getpid(), signal.SIGTERM)), **MUON)
    fit(out / "muon_again", Denoising(dtype), **MUON)
    notes["muon"] = muon_of_parts(rank)
    (out / f"rank{rank}.json").write_text(json.dumps(notes))


# In the tests


def launch(name, *arguments, processes=2):
    """Starts this file's `main`, or a module, as a user would who has no compiler."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "CXX": "false"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{name}.yaml"]
    command += ["--main_process_port", str(port), "--num_processes", str(processes), *(str(a) for a in arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, seconds=300):
    """Its output; none of its children may be left."""
    output, _ = process.communicate(timeout=seconds)
    left = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("MASTER_PORT") == process.args[6]]
    assert not left, left
    return output


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, in float64 and float32: to the end, and stopped after 13 steps."""
    out = tmp_path_factory.mktemp("alone")
    for name, dtype in (("double", torch.float64), ("single", torch.float32)):
        trainable = Denoising(dtype)
        fit(out / name, trainable)
        (out / f"{name}.json").write_text(json.dumps(trainable.seen))
        fit(out / f"muon_{name}", Denoising(dtype), **MUON)
        with pytest.raises(Interrupted):
            fit(out / f"{name}_13", Denoising(dtype, at=12, action=lambda: os.kill(os.getpid(), signal.SIGTERM)))
    fit(out / "savings", Denoising(), **SAVINGS)
    return out


@pytest.fixture(scope="module", params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def pair(request, alone, tmp_path_factory):
    """What two processes did under a strategy: its name, its directory, the notes of both, and the precision."""
    name = request.param
    if "zero" in name:
        pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp(name)
    precision = "single" if "zero" in name else "double"
    shutil.copytree(alone / f"{precision}_13", out / "from_one")
    output = finish(process := launch(name, __file__, out, precision))
    assert all((out / f"rank{rank}.json").exists() for rank in (0, 1)), output
    assert process.returncode == 0 or "zero3" in name, output  # see docs/scale.md: its processes may abort after their end
    return name.split("_")[0], out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)], precision


def test_the_world_and_the_strategy_are_those_asked_for(pair):
    name, out, notes, _ = pair
    summary = json.loads((out / "plain" / "summary.json").read_text())
    assert (summary["processes"], summary["strategy"]) == (2, STRATEGIES[name])
    held, moments, total = sum(n["held"] for n in notes), sum(n["moments"] for n in notes), notes[0]["total"]
    if name == "cpu2":
        assert held == 2 * total and moments == 2 * (total - 3)
    else:  # stages 1 and 2 leave the three frozen weights on both
        assert held == total + 3 * (name in ("zero1", "zero2")) and moments == total - 3
        assert all(0.3 * total < n["held"] < 0.7 * total for n in notes)


def test_two_processes_train_as_one(pair, alone):
    _, out, notes, precision = pair
    tolerance = {"double": 1e-12, "single": 1e-4}[precision]
    assert_same(exported(out / "plain"), exported(alone / precision), tolerance)
    for metric in ("loss", "mse", "gradient_norm", "learning_rate"):
        np.testing.assert_allclose(rows(out / "plain", metric), rows(alone / precision, metric), rtol=tolerance)
    parts = [n["seen"] for n in notes]  # two parts of a step, of each process
    steps = [[i for part in parts for piece in part[2 * k : 2 * k + 2] for i in piece] for k in range(BASE["steps"])]
    assert steps == json.loads((alone / f"{precision}.json").read_text())


def test_averages_of_shards_are_shards_of_averages(pair):
    assert all(n["average"] for n in pair[2])


def test_resumed_is_bitwise_uninterrupted(pair):
    """With dropout, in the middle of an epoch, after a signal to one process; another seed would have shown."""
    _, out, notes, _ = pair
    assert [n["stopped"] for n in notes] == [143, 143]
    assert_same(everything(out / "again"), everything(out / "dropout"))
    assert_same(exported(out / "again"), exported(out / "dropout"))
    for metric in ("loss", "mse", "gradient_norm"):
        assert rows(out / "again", metric) == rows(out / "dropout", metric)
    with pytest.raises(AssertionError):
        assert_same(exported(out / "other"), exported(out / "dropout"), 1e-6)


def test_the_model_loads_in_a_plain_process(pair):
    """It holds the averages, what is frozen and the buffers."""
    _, out, _, precision = pair
    model = Net().double() if precision == "double" else Net()
    model.load_state_dict(exported(out / "plain"))
    saved = checkpoints.find_last(out / "plain" / "checkpoints")
    average = saved.tensors("average")
    assert_same({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, average)
    assert torch.equal(model.frozen.detach(), saved.tensors("weights")["frozen"]) and torch.equal(model.scale, Net().scale.to(model.scale))


def test_the_number_of_processes_and_the_strategy_may_change(pair, alone, tmp_path):
    """From two processes to one, without a strategy; and from there to two."""
    _, out, _, precision = pair
    dtype, tolerance = {"double": (torch.float64, 1e-12), "single": (torch.float32, 1e-4)}[precision]
    shutil.copytree(out / "plain", tmp_path / "one")
    for name in ("step_0000024", "step_0000016"):
        shutil.rmtree(tmp_path / "one" / "checkpoints" / name)
    fit(tmp_path / "one", Denoising(dtype))
    for run in (tmp_path / "one", out / "from_one"):
        assert_same(exported(run), exported(alone / precision), tolerance)


def test_bfloat16_recomputed_activations_and_several_averages(pair, alone):
    _, out, _, _ = pair
    for path in ("model", "averages/0.2"):
        ours, theirs = (load_file(run / "savings" / path / "model.safetensors") for run in (out, alone))
        assert_same(ours, theirs, 0.02)
    np.testing.assert_allclose(rows(out / "savings", "loss"), rows(alone / "savings", "loss"), rtol=0.01)


def test_muon_of_shards_is_muon(pair, alone):
    """The steps of timm's Muon to the last bit, whatever part of a matrix a process holds; and resumed in the same bits."""
    _, out, notes, precision = pair
    assert all(n["muon"] for n in notes)
    assert_same(exported(out / "muon"), exported(alone / f"muon_{precision}"), 1e-2)  # it orthogonalises in bfloat16
    assert "blocks.0.linear.weight/momentum_buffer" in checkpoints.find_last(out / "muon" / "checkpoints").tensors("optimizer")
    assert_same(everything(out / "muon_again"), everything(out / "muon"))
    assert rows(out / "muon_again", "loss") == rows(out / "muon", "loss")


@pytest.mark.parametrize("name", ["cpu2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3", "fsdp2"))])
def test_sigterm_to_the_launcher(name, tmp_path):
    """All save the same step and leave in time, none stays behind, and the same command goes on."""
    if "zero" in name:
        pytest.importorskip("deepspeed")
    process = launch(name, __file__, tmp_path, "slowly")
    deadline = time.monotonic() + 120
    while len(rows(tmp_path, "loss")) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 60)
    assert "stopped by SIGTERM" in output
    saved = checkpoints.find_last(tmp_path / "checkpoints").state
    assert (saved["processes"], saved["strategy"]) == (2, STRATEGIES[name])
    assert not (tmp_path / "model").exists()
    if name != "cpu2":
        output = finish(launch(name, __file__, tmp_path, "slowly"))
        assert f"from step {saved['step']}" in output or (tmp_path / "summary.json").exists(), output


def test_a_launcher_that_would_train_once_is_refused(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process, and says nothing."""
    output = finish(process := launch("cpu", "--cpu", __file__, tmp_path, "slowly"))
    assert process.returncode and "2 processes were launched but 1 train together" in output
    assert not (tmp_path / "checkpoints").exists()


# Long ones


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """Data to train on, for the command line."""
    out = tmp_path_factory.mktemp("ring")
    command, data = [sys.executable, "-m", "appa_lite"], out / "train.zarr"
    for verb in (
        ("simulate", "frames=60", "spinup=20", f"out={data}"),
        ("train", "trainable=identity", f"data={data}", f"run={out / 'identity'}"),
    ):
        subprocess.run([*command, verb[0], "experiment=lorenz96", "size=debug", *verb[1:]], cwd=ROOT, check=True)
    return f"data={data}", f"autoencoder={out / 'identity' / 'model'}"


RECIPE = ("-m", "appa_lite", "train", "experiment=lorenz96", "size=debug", "trainable=denoiser", "training.optimizer=adamw")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "launch" / "accelerate").glob("*.yaml")))
def test_every_launch_configuration_trains(name, ring, tmp_path):
    """Through the command line; several nodes as several launchers on this machine."""
    if "zero" in name:
        pytest.importorskip("deepspeed")
    arguments = [*RECIPE, *ring, f"run={tmp_path}"]
    processes = 1 if name in ("cpu", "gpu") else 2
    if name == "multi_node":
        first = launch(name, "--machine_rank", 0, *arguments)
        second = launch(name, "--main_process_port", first.args[6], "--machine_rank", 1, *arguments)
        assert "error" not in second.communicate(timeout=200)[0]
        output = finish(first)
    else:
        output = finish(launch(name, *arguments, processes=processes))
    assert (tmp_path / "summary.json").exists(), output
    summary = json.loads((tmp_path / "summary.json").read_text())
    strategy = {"cpu": "one process", "gpu": "one process"}.get(name, STRATEGIES.get(name.split("_")[0], "ddp"))
    assert (summary["strategy"], summary["processes"]) == (strategy, processes)
    assert (tmp_path / "model").is_dir() and not list(tmp_path.rglob(".*"))


KILLED = {"steps": 1200, "checkpoint_every": 7, "validate_every": 300}


def trained_again(run):
    fit(run, Denoising(dropout=0.2, pause=0.01), **KILLED)


@pytest.mark.slow
def test_fifty_random_kills_leave_the_same_model(tmp_path):
    """SIGKILL at any time of a training, also while it starts, saves, or ends; the same call goes on, to the same bits."""
    fit(tmp_path / "whole", Denoising(dropout=0.2), **KILLED)
    draw, fork, kills = np.random.default_rng(0), multiprocessing.get_context("fork"), 0
    while not (tmp_path / "cut" / "summary.json").exists():
        child = fork.Process(target=trained_again, args=(tmp_path / "cut",))
        child.start()
        child.join(draw.exponential(0.4) if kills < 50 else 300)
        kills += child.is_alive()
        child.kill()
        child.join()
    assert kills == 50
    assert_same(everything(tmp_path / "cut"), everything(tmp_path / "whole"))
    assert_same(exported(tmp_path / "cut"), exported(tmp_path / "whole"))
    for metric in ("loss", "mse"):
        assert rows(tmp_path / "cut", metric) == rows(tmp_path / "whole", metric)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu2", "fsdp2"])
def test_random_kills_of_one_of_two_processes(name, tmp_path):
    """The launcher ends the other; the same command goes on, to the same bits."""
    finish(launch(name, __file__, tmp_path / "whole", "killed"))
    draw, killed = np.random.default_rng(0), 0
    while not (tmp_path / "cut" / "summary.json").exists():
        process, began = launch(name, __file__, tmp_path / "cut", "killed"), len(rows(tmp_path / "cut", "loss"))
        while killed < 4 and process.poll() is None and len(rows(tmp_path / "cut", "loss")) <= began:
            time.sleep(0.01)
        if killed < 4:
            time.sleep(draw.exponential(0.4))
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
                workers = [p for p in psutil.Process(process.pid).children() if __file__ in " ".join(p.cmdline())]
                workers[draw.integers(2)].kill()
                killed += 1
        finish(process)
    assert killed == 4
    assert_same(everything(tmp_path / "cut"), everything(tmp_path / "whole"))
    assert_same(exported(tmp_path / "cut"), exported(tmp_path / "whole"))


@pytest.mark.slow
def test_slurm(ring, tmp_path):
    """The job's script with stand-ins for Slurm's commands: a time limit, a queue, and the rest of the training."""
    commands = {
        "srun": f'echo $$ > {tmp_path}/pid\nSLURM_NODEID=0 exec "$@"',
        "scancel": f"kill -TERM $(cat {tmp_path}/pid)",
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/queue',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "17", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    run = tmp_path / "run"
    arguments = ["bash", "launch/slurm.sh", "cpu2", f"run={run}", *RECIPE[3:], *ring, "training.steps=150", "training.log_every=1"]
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(arguments, **options) as job:
        while len(rows(run, "loss")) < 3:
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=100)
    assert "stopped by SIGTERM" in output and (tmp_path / "queue").read_text() == "requeue 17\n", output
    assert not (run / "summary.json").exists()
    again = subprocess.run(arguments, **options)
    assert again.returncode == 0, again.stdout
    assert json.loads((run / "summary.json").read_text())["processes"] == 2


if __name__ == "__main__":
    if sys.argv[2] == "killed":
        trained_again(Path(sys.argv[1]))
    elif sys.argv[2] == "slowly":
        fit(Path(sys.argv[1]), Denoising(pause=0.3))
    else:
        main()
