"""Windows of trajectories, the one data order, streaming statistics."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch.utils.data import DataLoader

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.core.store import open_dataset
from appa_lite.data.statistics import DAY, Statistics, chunks, statistics
from appa_lite.data.windows import GlobalSampler, LazyFields, WindowDataset, collate


@pytest.fixture
def spec():
    grid = Grid(("y", "x"), (0.0, 1.0, 2.0), (0.0, 1.0, 2.0, 3.0))
    mask = ((True,) * 4, (True, False, True, True), (True,) * 4)
    return FieldSpec((Variable("a"), Variable("b", "m")), grid, 3600.0, mask)


@pytest.fixture
def dataset(spec):
    fields = torch.randn(3, 20, *spec.shape, generator=torch.Generator().manual_seed(0))
    return spec.to_dataset(fields, {"trajectory": np.arange(3), "time": to_datetime(3600.0 * np.arange(20))})


def test_every_window_once(spec, dataset):
    windows = WindowDataset.from_xarray(dataset, spec, frames=5, stride=2)
    fields = spec.to_tensor(dataset)
    assert len(windows) == 3 * 8
    item = windows[9]  # trajectory 1, second window
    assert torch.equal(item["fields"], fields[1, 2:7]) and item["fields"].dtype == torch.float32
    assert torch.equal(item["time"], 3600.0 * torch.arange(2, 7, dtype=torch.float64))
    assert item["index"] == 9


def test_in_memory_lazy_and_memory_map_agree(spec, dataset, tmp_path):
    dataset.to_zarr(tmp_path / "data.zarr", zarr_format=3)
    fields = spec.to_tensor(dataset).numpy()
    np.save(tmp_path / "fields.npy", fields)
    times = dataset["time"].values
    with xr.open_dataset(tmp_path / "data.zarr", engine="zarr", chunks=None) as opened:
        lazy = WindowDataset.from_xarray(opened, spec, frames=4, memory_limit=0)
        assert not isinstance(lazy.fields, torch.Tensor)
        mapped = WindowDataset(np.load(tmp_path / "fields.npy", mmap_mode="r"), times, frames=4)
        loaded = WindowDataset.from_xarray(opened, spec, frames=4)
        order = [[0, 50, 7], [33, 2, 2]]
        batches = [list(DataLoader(d, batch_sampler=order, collate_fn=collate)) for d in (lazy, mapped, loaded)]
        batches.append(list(DataLoader(lazy, batch_sampler=order, collate_fn=collate, num_workers=1)))
    for other in batches[1:]:
        for x, y in zip(batches[0], other, strict=True):
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def test_a_single_trajectory_needs_no_dimension(spec, dataset):
    windows = WindowDataset.from_xarray(dataset.isel(trajectory=0, drop=True), spec, frames=5)
    assert len(windows) == 16
    lazy = WindowDataset.from_xarray(dataset.isel(trajectory=0, drop=True), spec, frames=5, memory_limit=0)
    assert torch.equal(lazy[3]["fields"], windows[3]["fields"])


def test_streaming_reads_each_block_about_once(spec, tmp_path):
    """From a zarr store in chunks, in an order that one and two processes share; every sample once in an epoch."""
    fields = torch.randn(2, 400, *spec.shape, generator=torch.Generator().manual_seed(0))
    dataset = spec.to_dataset(fields, {"trajectory": np.arange(2), "time": to_datetime(3600.0 * np.arange(400))})
    encoding = {name: {"chunks": (1, 5, 3, 4), "shards": (1, 20, 3, 4)} for name in spec.names}
    dataset.to_zarr(tmp_path / "data.zarr", zarr_format=3, encoding=encoding)
    with xr.open_dataset(tmp_path / "data.zarr", engine="zarr", chunks=None) as opened:
        windows = WindowDataset.from_xarray(opened, spec, frames=4, memory_limit=0)
        assert windows.fields.block == windows.block == 20
        reads = []
        windows.fields.spec = type("Counting", (), {"to_tensor": lambda _, part: reads.append(1) or spec.to_tensor(part)})()
        order = iter(GlobalSampler(len(windows), 8, seed=1, block=windows.block))
        seen = []
        for _ in range(len(windows) // 8):
            for i in (indices := next(order)):
                n, a = windows.windows[i].tolist()
                expected = torch.where(spec.mask_tensor(), fields[n, a : a + 4], 0.0)
                assert torch.equal(windows[i]["fields"], expected)
            seen += indices
    assert len(set(seen)) == len(seen) and len(reads) < 2.5 * 2 * 400 / 20  # in random order: about one read per sample
    samplers = [iter(GlobalSampler(len(windows), 8, 1, 0, rank, 2, block=20)) for rank in range(2)]
    assert seen[:16] == [i for _ in range(2) for s in samplers for i in next(s)]


def test_remote_stores_are_streamed(spec, dataset, tmp_path):
    """Through fsspec; a worker process reads what the main process opened."""
    dataset.to_zarr(tmp_path / "data.zarr", zarr_format=3)
    near, far = open_dataset(tmp_path / "data.zarr"), open_dataset(f"local://{tmp_path}/data.zarr")
    windows = [WindowDataset.from_xarray(d, spec, frames=4, memory_limit=0) for d in (near, far)]
    for items in zip(*(DataLoader(w, batch_size=8, collate_fn=collate, num_workers=i) for i, w in enumerate(windows)), strict=True):
        assert all(torch.equal(items[0][k], items[1][k]) for k in items[0])
    with pytest.raises(UserError, match="cannot be read as a zarr store"):
        open_dataset(f"local://{tmp_path}/absent.zarr")
    with pytest.raises(UserError, match="only names that end in .zarr"):
        open_dataset("https://example.org/data.nc")
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset("nowhere://somewhere/data.zarr")


def test_a_part_of_what_is_streamed(spec, dataset):
    """Views stay lazy; a sample is of whole blocks, evenly spread, and everything where it fits."""
    fields = spec.to_tensor(dataset)
    lazy = LazyFields(dataset, spec)
    lazy.block = 4
    assert lazy.nbytes == fields.nbytes
    view = lazy[:2, 3:15]
    assert view.shape == (2, 12, *spec.shape) and torch.equal(view[1, 2:9], fields[1, 5:12])
    whole, places = lazy.sample(1e9)
    assert torch.equal(whole, fields) and torch.equal(places, torch.arange(20))
    part, places = lazy.sample(0.45 * lazy.nbytes)
    assert places.tolist() == [0, 1, 2, 3, 8, 9, 10, 11] and torch.equal(part, fields[:, places])


def test_windows_do_not_straddle_gaps():
    times = np.array([0, 1, 2, 3, 10, 11, 12], dtype=float)
    windows = WindowDataset(torch.zeros(1, 7, 1, 1, 1), times, frames=3)
    assert windows.windows[:, 1].tolist() == [0, 1, 4]
    assert len(WindowDataset(torch.zeros(1, 7, 1, 1, 1), times, frames=1)) == 7


def test_too_long_a_window_is_refused(spec, dataset):
    with pytest.raises(UserError, match="no window of 21 frames"):
        WindowDataset.from_xarray(dataset, spec, frames=21)
    with pytest.raises(UserError, match="missing"):
        WindowDataset.from_xarray(dataset.drop_vars("a"), spec, frames=2)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_order_does_not_depend_on_the_processes(parts):
    def steps(world, start=0):
        samplers = [iter(GlobalSampler(10, 8, 3, start, rank, world, parts)) for rank in range(world)]
        return [[i for s in samplers for _ in range(parts) for i in next(s)] for _ in range(5)]

    assert steps(1) == steps(2) == steps(4)
    assert steps(1)[2:] == steps(2, start=16)[:-2]
    order = [i for batch in steps(1) for i in batch]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]


def test_an_indivisible_batch_is_refused():
    with pytest.raises(UserError, match="not a multiple"):
        GlobalSampler(10, 7, world=2)


def test_merged_statistics_are_those_of_the_whole():
    draw = torch.Generator().manual_seed(0)
    fields = 1e4 + torch.randn(4, 30, 2, 3, 4, generator=draw, dtype=torch.float64)
    fields[torch.rand(fields.shape, generator=draw) < 0.1] = torch.nan
    times = 3600.0 * torch.arange(30.0)
    parts = [Statistics((2, 3, 4), [DAY], seed=i) for i in range(3)]
    for i, (chunk, time) in enumerate(chunks(fields, times, 7)):
        parts[i % 2].update(chunk, time)
    merged = parts[0].merge(parts[1]).merge(parts[2]).result()
    whole = statistics([(fields, times)], (2, 3, 4), periods=[DAY])
    for name in ("coefficients", "std", "cell_std", "minimum", "maximum", "count"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


def test_statistics_are_numpys():
    fields = 5 + 2 * torch.randn(2, 50, 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 1] = False
    found = statistics(chunks(fields, torch.arange(50.0)), (2, 3, 4), mask=mask)
    flat = fields.flatten(0, 1).numpy()
    inside = flat[..., mask.numpy()]
    np.testing.assert_allclose(found.constant[:, mask], inside.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, (inside - inside.mean(0)).std((0, 2)), rtol=1e-10)
    np.testing.assert_allclose(found.minimum, inside.min((0, 2)))
    np.testing.assert_allclose(found.maximum, inside.max((0, 2)))
    np.testing.assert_allclose(found.quantiles, np.quantile(inside, found.levels.numpy(), axis=(0, 2)).T)
    assert found.count.tolist() == [1100, 1100] and not found.constant[:, 1, 1].any()


def test_harmonics_are_recovered():
    times = 1800.0 * torch.arange(400, dtype=torch.float64)
    wave = 3 + 2 * torch.cos(2 * torch.pi * times / DAY) - 0.5 * torch.sin(4 * torch.pi * times / DAY)
    fields = wave[:, None, None, None].expand(400, 1, 2, 2)
    found = statistics([(fields[:150], times[:150]), (fields[150:], times[150:])], (1, 2, 2), periods=[DAY, DAY / 2])
    expected = torch.tensor([3.0, 2.0, 0.0, 0.0, -0.5], dtype=torch.float64)
    torch.testing.assert_close(found.coefficients[:, 0, 1, 1], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.mean(times), fields.contiguous(), rtol=0, atol=1e-8)
    assert found.std.item() < 1e-4


def test_the_quantile_sample_is_bounded_and_fair():
    uniform = torch.rand(200, 1, 10, 10, generator=torch.Generator().manual_seed(2))
    accumulator = Statistics((1, 10, 10), sample=2000)
    for part in uniform.split(10):
        accumulator.update(part, torch.arange(10.0))
    assert len(accumulator.values[0]) == 2000
    levels = [0.1, 0.5, 0.9]
    torch.testing.assert_close(accumulator.result(levels).quantiles[0], torch.tensor(levels, dtype=torch.float64), rtol=0, atol=0.04)
