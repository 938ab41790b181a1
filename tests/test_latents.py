"""Latents made once and kept: the same for every training, however many processes made them and however often they were killed."""

import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from appa_lite import cli
from appa_lite.core import store as files
from appa_lite.core.fields import FieldSpec, Grid, Variable
from appa_lite.core.random import generator
from appa_lite.core.store import open_dataset, write_dataset
from appa_lite.data.windows import LazyFields
from appa_lite.models.autoencoder import SpatiotemporalAutoencoder
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.normalizer import Normalizer
from appa_lite.training import latents
from appa_lite.training.data import LatentWindows, Sample, TrainingData
from appa_lite.training.latents import LatentStore, encode

SPEC = FieldSpec((Variable("a"), Variable("b")), Grid(("y", "x"), tuple(range(8)), tuple(range(8))), 3600.0)
TIMES = 3600.0 * torch.arange(401, dtype=torch.float64)
CPU = torch.device("cpu")


@pytest.fixture
def space() -> Checkpoint:
    autoencoder = SpatiotemporalAutoencoder(SPEC.shape, (2, 4, 4), 3, 8, 1, 3, 3, (False, False))
    with torch.no_grad():
        for i, p in enumerate(autoencoder.parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator(0, "weights", i)))
    return Checkpoint(SPEC, Normalizer(SPEC.shape), autoencoder.eval().requires_grad_(False), None, {"forcing_periods": [86400.0]})


@pytest.fixture
def fields() -> torch.Tensor:
    return torch.randn(2, 401, *SPEC.shape, generator=generator(0, "fields"))


@pytest.fixture
def pieces(monkeypatch) -> None:
    """Chunks of 25 latent frames, shards of four: four pieces of a trajectory of 200."""
    monkeypatch.setattr(files, "CHUNK", 25 * 48)
    monkeypatch.setattr(files, "SHARD", 100 * 48)
    monkeypatch.setattr(files, "FEW_CHUNKS", 4)


def whole(space, fields):
    return torch.stack([encode(space, fields, TIMES, n) for n in range(2)])


@pytest.mark.usefixtures("pieces")
def test_made_once_and_read_again(tmp_path, space, fields, caplog):
    caplog.set_level(logging.WARNING)
    store = LatentStore(tmp_path / "latents", 1e9, CPU)
    expected = whole(space, fields)
    made = store.latents(space, fields, TIMES, "data")
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)  # in other pieces
    path = next((tmp_path / "latents").iterdir())
    assert [path] == list((tmp_path / "latents").iterdir()) and path.suffix == ".zarr"
    dataset = xr.open_dataset(path, engine="zarr")
    assert dataset["latents"].dims == ("trajectory", "time", "channel", "y", "x") and dataset["latents"].encoding["shards"][1] == 100
    assert (dataset["time"].values[1] - dataset["time"].values[0]) == np.timedelta64(2, "h")
    before = path.stat().st_mtime_ns
    assert "encoded once" in caplog.text and "used again" not in caplog.text
    assert torch.equal(store.latents(space, fields, TIMES, "data"), made)
    assert "used again" in caplog.text and path.stat().st_mtime_ns == before
    store.latents(space, fields, TIMES, "other data")
    store.latents(space, fields[:, :301], TIMES[:301], "data")
    space.autoencoder.requires_grad_(False)
    next(iter(space.autoencoder.parameters())).mul_(1.001)
    assert not torch.equal(store.latents(space, fields, TIMES, "data"), made)
    assert len(list((tmp_path / "latents").iterdir())) == 4


@pytest.mark.usefixtures("pieces")
def test_streamed_windows_are_those_in_memory(tmp_path, space, fields):
    made, streamed = (LatentStore(tmp_path, limit, CPU).latents(space, fields, TIMES, "data") for limit in (1e9, 0))
    assert isinstance(streamed, LazyFields) and streamed.block == 100
    forcing = space.forcing(TIMES[:400:2])
    ours, theirs = (LatentWindows(z, forcing, 6, 2) for z in (streamed, made))
    assert len(ours) == len(theirs) == 2 * 98 and (ours.block, theirs.block) == (50, 1)
    for i in (0, 47, 49, 98, 195):
        assert all(torch.equal(torch.as_tensor(ours[i][k]), torch.as_tensor(theirs[i][k])) for k in ("latents", "forcing", "index"))
    assert torch.equal(theirs.series(40), made)
    assert torch.equal(ours.series(100).reshape(2, 200, *made.shape[2:]), made)  # all there is
    some = ours.series(20, limit=4 * 20 * made[0, 0].numel() * 5)
    assert some.shape[:2] == (5, 20) and torch.equal(some[0], made[0, :20])


def making(directory: Path, space, fields, pause: float, made: str) -> None:
    """In a process of its own: slowly, and noting which pieces."""

    def slow(*arguments):
        time.sleep(pause)
        with open(made, "a") as file:
            file.write(json.dumps([os.getpid(), arguments[3], arguments[4]]) + "\n")
        return encode(*arguments)

    latents.encode = slow
    LatentStore(directory, 1e9, CPU).latents(space, fields, TIMES, "data")


@pytest.mark.usefixtures("pieces")
def test_processes_share_and_a_killed_one_is_replaced(tmp_path, space, fields):
    fork, notes = multiprocessing.get_context("fork"), tmp_path / "notes"
    first = fork.Process(target=making, args=(tmp_path / "z", space, fields, 0.2, str(notes)))
    first.start()
    while not list((tmp_path / "z").glob(".*.partial/*.done")) and first.is_alive():
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert not list((tmp_path / "z").glob("*.zarr"))
    finished = len(list((tmp_path / "z").glob(".*.partial/*.done")))
    assert 0 < finished < 4
    earlier = len(notes.read_text().splitlines())
    others = [fork.Process(target=making, args=(tmp_path / "z", space, fields, 0.2, str(notes))) for _ in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join()
        assert process.exitcode == 0
    rows = [json.loads(line) for line in notes.read_text().splitlines()][earlier:]
    assert len({tuple(row[1:]) for row in rows}) == len(rows) == 4 - finished  # nobody did what was done
    assert len({row[0] for row in rows}) == 2 or finished == 3
    assert not list((tmp_path / "z").glob(".*"))
    found = LatentStore(tmp_path / "z", 1e9, CPU).latents(space, fields, TIMES, "data")
    torch.testing.assert_close(found, whole(space, fields), rtol=1e-5, atol=1e-6)


def test_streamed_fields_are_encoded_as_those_in_memory(tmp_path, space, fields):
    coordinates = {"trajectory": np.arange(2), "time": np.datetime64("1970-01-01", "ns") + np.arange(401) * np.timedelta64(1, "h")}
    write_dataset(SPEC.to_dataset(fields, coordinates), tmp_path / "data.zarr")
    lazy = LazyFields(open_dataset(tmp_path / "data.zarr"), SPEC)
    normalizer = {"periods": [], "transforms": {}, "offsets": {}, "homogeneous": False}
    found = []
    for name, given in (("memory", fields), ("streamed", lazy)):
        store = LatentStore(tmp_path / name, 1e9, CPU)
        train = Sample(given, TIMES, "data")
        data = TrainingData(SPEC, train, train.part(1, slice(40)), space, normalizer, {}, {}, store)
        windows, held = data.latent_windows(space, 6, (1, 1))
        found.append(windows.latents)
        assert held.latents.shape[:2] == (1, 20)
    assert torch.equal(*found)


def test_the_next_denoiser_finds_them(tmp_path, fields, monkeypatch, caplog):
    """Through the command line: another width, the same latents; where there are none they are made, to the same model."""
    monkeypatch.chdir(tmp_path)
    coordinates = {"trajectory": np.arange(2), "time": np.datetime64("1970-01-01", "ns") + np.arange(401) * np.timedelta64(1, "h")}
    write_dataset(SPEC.to_dataset(fields, coordinates), tmp_path / "data.zarr")
    train = ["train", "size=debug", "device=cpu", "data=data.zarr", "training.steps=2", "training.batch=2"]
    small = ["trainable.width=8", "trainable.depth=1"]
    assert cli.main([*train, "trainable=autoencoder", *small, "trainable.stride=[2,4,4]", "run=runs/autoencoder"]) == 0
    denoiser = [*train, "trainable=denoiser", *small, "autoencoder=runs/autoencoder/model"]
    assert cli.main([*denoiser, "run=runs/one"]) == 0
    stores = sorted((tmp_path / "runs" / "latents").iterdir())
    assert len(stores) == 2 and "used again" not in caplog.text  # to train on, and to validate on
    assert cli.main([*denoiser, "run=runs/two", "trainable.width=16"]) == 0
    assert caplog.text.count("used again") == 2 and sorted((tmp_path / "runs" / "latents").iterdir()) == stores
    caplog.clear()
    assert cli.main([*denoiser, "run=elsewhere/three", "latents=runs/latents"]) == 0
    assert caplog.text.count("used again") == 2
    assert cli.main([*denoiser, "run=elsewhere/four"]) == 0
    models = [tmp_path / run / "model" / "denoiser" for run in ("elsewhere/three", "elsewhere/four")]
    weights = [next(model.glob("*.safetensors")).read_bytes() for model in models]
    assert weights[0] == weights[1]
