"""Ensemble Kalman methods and 3D-Var: closed forms on linear models, DAPPER as oracle, Lorenz-96, the command line."""

import contextlib
import json
import math
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from appa_lite import cli
from appa_lite.core import covariance
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.core.random import Streams
from appa_lite.core.store import open_dataset
from appa_lite.forecasters import ensemble as tools
from appa_lite.forecasters import localisation
from appa_lite.forecasters.enkf import EnKF
from appa_lite.forecasters.enks import EnKS
from appa_lite.forecasters.ensemble import Ensemble
from appa_lite.forecasters.ienks import IEnKS
from appa_lite.forecasters.letkf import LETKF
from appa_lite.forecasters.localisation import Taper, gaspari_cohn
from appa_lite.forecasters.var3d import ThreeDVar
from appa_lite.observations.base import Observation, WeightedCells
from appa_lite.simulators.base import Simulator, forcing_noise, save_states, trajectories
from appa_lite.simulators.lorenz96 import Lorenz96
from appa_lite.simulators.lorenz96_two_scale import Lorenz96TwoScale

N, FRAMES, MEMBERS = 5, 7, 12
TIMES = to_datetime(3600.0 * np.arange(FRAMES))
PLAIN = {"inflation": 1.0, "finite_size": None}


class Linear(Simulator):
    """x <- M x + noise e on a ring of five cells, float64."""

    spinup_frames = 0

    def __init__(self, noise: float = 0.0):
        self.spec = FieldSpec((Variable("u"),), Grid(("x",), (0.0,), tuple(map(float, range(N))), (False, True)), 3600.0)
        rng = torch.Generator().manual_seed(5)
        self.matrix = 0.97 * torch.linalg.qr(torch.randn(N, N, generator=rng, dtype=torch.float64))[0]
        self.noise = noise

    def initial(self, seed, members, device="cpu"):
        return 2 * Streams(seed, members, "linear").normal((N,), torch.float64) + 1

    def advance(self, state, frame, seed, members):
        kick = self.noise * forcing_noise((N,), seed, members, frame, "linear") if self.noise else 0
        return state @ self.matrix.T + kick

    def fields(self, state):
        return state[:, None, None]

    def budgets(self, state):
        return {}


def observe(rows: list[tuple[dict[tuple[int, int], float], float, float]], cells: int = N) -> Observation:
    """Rows ({(frame, cell): weight}, value, variance)."""
    most = max(len(terms) for terms, _, _ in rows)
    index, weight = torch.zeros(len(rows), most, dtype=torch.int64), torch.zeros(len(rows), most, dtype=torch.float64)
    for r, (terms, _, _) in enumerate(rows):
        for j, ((frame, cell), w) in enumerate(terms.items()):
            index[r, j], weight[r, j] = frame * cells + cell, w
        index[r, len(terms) :] = index[r, 0]
    frames = [sorted(frame for frame, _ in terms) for terms, _, _ in rows]
    first, last = torch.tensor([f[0] for f in frames]), torch.tensor([f[-1] for f in frames])
    zero = torch.zeros(len(rows), dtype=torch.float64)
    operator = WeightedCells(index, weight, torch.arange(len(rows)), zero.bool(), zero, first, first, last, cells)
    values, variance = (torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in (1, 2))
    return Observation(values, variance, operator)


@pytest.fixture(scope="module")
def simple() -> Observation:
    """Two or three cells at most frames, one of them a sum of two."""
    rows = []
    for frame in (0, 1, 2, 4, 5):
        rows += [
            ({(frame, frame % N): 1.0}, 0.7 * frame - 1, 0.3),
            ({(frame, (frame + 2) % N): 0.5, (frame, (frame + 3) % N): 1.5}, 1.0, 0.8),
        ]
    return observe(rows)


def dense(observation: Observation) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """H, y and R of each frame."""
    operator, out = observation.operator, {}
    for frame in range(FRAMES):
        keep = operator.last == frame
        if keep.any():
            part = operator.select(keep)
            h = part(torch.eye(FRAMES * N, dtype=torch.float64).view(-1, FRAMES, 1, 1, N)).T[:, frame * N : (frame + 1) * N]
            out[frame] = h, observation.values[keep], torch.diag(observation.variance[keep])
    return out


def kalman(rows: dict, mean: Tensor, cov: Tensor, matrix: Tensor, q: float = 0.0) -> tuple[list, list]:
    """Means and covariances of the filter and of the Rauch-Tung-Striebel smoother, from a prior at the first frame."""
    filtered, predicted = [], []
    for frame in range(FRAMES):
        if frame:
            mean, cov = matrix @ mean, matrix @ cov @ matrix.T + q * torch.eye(N, dtype=torch.float64)
        predicted.append((mean, cov))
        if frame in rows:
            h, y, r = rows[frame]
            gain = torch.linalg.solve(h @ cov @ h.T + r, h @ cov).T
            mean, cov = mean + gain @ (y - h @ mean), cov - gain @ h @ cov
        filtered.append((mean, cov))
    smoothed = [filtered[-1]]
    for frame in range(FRAMES - 2, -1, -1):
        (m, p), (m_next, p_next) = filtered[frame], predicted[frame + 1]
        gain = torch.linalg.solve(p_next, matrix @ p).T
        smoothed.insert(0, (m + gain @ (smoothed[0][0] - m_next), p + gain @ (smoothed[0][1] - p_next) @ gain.T))
    return filtered, smoothed


def start(simulator: Simulator, members: int = MEMBERS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sample mean and covariance of the initial members."""
    state = Ensemble(simulator, seed, range(members)).initial()
    return state.mean(0), torch.cov(state.T)


def agree(fields: Tensor, expected: list[tuple[Tensor, Tensor]], **tolerance: float) -> None:
    for frame, (mean, cov) in enumerate(expected):
        x = fields[:, frame, 0, 0]
        torch.testing.assert_close(x.mean(0), mean, **tolerance)
        torch.testing.assert_close(torch.cov(x.T), cov, **tolerance)


EXACT = {"rtol": 1e-8, "atol": 1e-9}


# Closed forms


@pytest.mark.parametrize("rotate", [False, True])
def test_the_filter_has_the_moments_of_kalmans(simple, rotate):
    model = Linear()
    fields = EnKF(model, **PLAIN, rotate=rotate).assimilate(simple, TIMES, range(MEMBERS), 0)
    agree(fields, kalman(dense(simple), *start(model), model.matrix)[0], **EXACT)


@pytest.mark.parametrize("rotate", [False, True])
def test_the_smoother_has_the_moments_of_rauch_tung_and_striebel(simple, rotate):
    model = Linear()
    fields = EnKS(model, lag=None, **PLAIN, rotate=rotate).assimilate(simple, TIMES, range(MEMBERS), 0)
    agree(fields, kalman(dense(simple), *start(model), model.matrix)[1], **EXACT)


@pytest.mark.parametrize("method", [EnKS, IEnKS])
@pytest.mark.parametrize("lag", [0, 1, 3, 20])
def test_a_lag_is_the_smoother_of_the_frames_up_to_it(simple, method, lag):
    model = Linear()
    fields = method(model, lag=lag, **PLAIN).assimilate(simple, TIMES, range(MEMBERS), 0)
    expected = []
    for frame in range(FRAMES):
        seen = {k: v for k, v in dense(simple).items() if k <= frame + lag}
        expected.append(kalman(seen, *start(model), model.matrix)[1][frame])
    agree(fields, expected, **EXACT)


def test_a_linear_problem_takes_one_step(simple):
    smoother = IEnKS(Linear(), lag=3, iterations=9, tolerance=1e-6, **PLAIN)
    smoother.assimilate(simple, TIMES, range(MEMBERS), 0)
    assert max(smoother.report.iterations) == 2  # the second one finds that nothing is left to do


def test_large_ensembles_tend_to_kalman(simple):
    """Random forcing of each member; the error falls like one over the square root of their number."""
    model, prior = Linear(0.5), (torch.ones(N, dtype=torch.float64), 4 * torch.eye(N, dtype=torch.float64))
    filtered, smoothed = kalman(dense(simple), *prior, model.matrix, 0.25)
    for method, exact in ((EnKF(model, **PLAIN), filtered), (EnKS(model, lag=None, **PLAIN), smoothed)):
        errors = []
        for members in (20, 500):
            fields = method.assimilate(simple, TIMES, range(members), 1)
            errors.append(np.mean([float((fields[:, t, 0, 0].mean(0) - m).norm() / p.trace().sqrt()) for t, (m, p) in enumerate(exact)]))
        assert errors[1] < 0.15 and errors[1] < errors[0] / 2.5


def test_rows_between_frames_meet_the_members_past():
    """y = (x_t + x_{t+1}) / 2 = (M^{-1} + 1) x_{t+1} / 2."""
    model = Linear()
    rows = observe([({(2, 1): 0.5, (3, 1): 0.5}, 2.0, 0.1), ({(4, 0): 1.0}, -1.0, 0.2), ({(4, 3): 0.3, (5, 3): 0.7}, 0.0, 0.1)])
    exact, back = dense(rows), torch.linalg.inv(model.matrix)
    exact[3] = (0.5 * (back[1:2] + torch.eye(N, dtype=torch.float64)[1:2]), *exact[3][1:])
    exact[5] = (0.3 * back[3:4] + 0.7 * torch.eye(N, dtype=torch.float64)[3:4], *exact[5][1:])
    filtered, smoothed = kalman(exact, *start(model), model.matrix)
    agree(EnKF(model, **PLAIN).assimilate(rows, TIMES, range(MEMBERS), 0), filtered, **EXACT)
    agree(EnKS(model, lag=None, **PLAIN).assimilate(rows, TIMES, range(MEMBERS), 0), smoothed, **EXACT)
    agree(IEnKS(model, lag=20, **PLAIN).assimilate(rows, TIMES, range(MEMBERS), 0), smoothed, **EXACT)
    with pytest.raises(UserError, match="lag must be at least 1"):
        IEnKS(model, lag=0).assimilate(rows, TIMES, range(MEMBERS), 0)


def test_three_d_var_is_the_gain_of_the_climate(simple):
    model = Linear()
    method = ThreeDVar(model, scale=0.5, samples=40, perturb=False)
    fields = method.assimilate(simple, TIMES, range(2), 3)
    climate = Ensemble(model, tools.derive(3, "climate"), range(40)).initial()
    b, state = 0.5 * torch.cov(climate.T), Ensemble(model, 3, range(2)).initial()
    for frame in range(FRAMES):
        state = state @ model.matrix.T if frame else state
        if frame in dense(simple):
            h, y, r = dense(simple)[frame]
            state = state + (y - state @ h.T) @ torch.linalg.solve(h @ b @ h.T + r, h @ b)
        torch.testing.assert_close(fields[:, frame, 0, 0], state, **EXACT)


def test_no_observation_is_a_free_run():
    model = Linear(0.3)
    free = EnKF(model).assimilate(None, TIMES, range(3), 0)
    for other in (EnKS(model), LETKF(model, 3.0), ThreeDVar(model)):
        assert torch.equal(other.assimilate(None, TIMES, range(3), 0), free)


# Pieces


def test_rotations_keep_mean_and_covariance():
    omega = tools.rotation(9, 0, 3)
    torch.testing.assert_close(omega @ omega.T, torch.eye(9, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(omega.sum(0), torch.ones(9, dtype=torch.float64), **EXACT)
    assert (omega - torch.eye(9)).abs().max() > 0.1


def test_relaxation_gives_spread_back():
    before, after = torch.randn(2, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[[2.0]], [[1.0]]]
    )
    relaxed = tools.relax_spread(after, before, 0.25)
    torch.testing.assert_close(relaxed.std(0), 0.75 * after.std(0) + 0.25 * before.std(0), **EXACT)
    torch.testing.assert_close(relaxed.mean(0), after.mean(0), **EXACT)


def test_inflation_scales_the_analysis_alone(simple):
    plain, more = (EnKF(Linear(), i, None, rotate=False).assimilate(simple.window(0, 1), TIMES[:2], range(MEMBERS), 0) for i in (1.0, 1.5))
    torch.testing.assert_close(more.mean(0), plain.mean(0), **EXACT)
    torch.testing.assert_close(more.std(0), 1.5 * plain.std(0), **EXACT)


def test_the_finite_size_inflation_minimises_its_cost():
    rng = torch.Generator().manual_seed(2)
    values = torch.rand(6, 10, generator=rng, dtype=torch.float64) * 3
    values[:, 0] = 0
    u = torch.randn(6, 10, generator=rng, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 8, 15, 20])[:, None]
    found = tools.finite_size_inflation(values, u * values.sqrt(), 1.0)
    e, c = tools.hyperprior(values, 1.0)
    square = torch.linspace(-2, 3, 20001, dtype=torch.float64).exp()
    cost = (u[..., None].square() / (9 * (1 + square * values[..., None]))).sum(1) + e[:, None] / square + c[:, None] * square.log()
    torch.testing.assert_close(found, square[cost.argmin(1)], rtol=1e-3, atol=0)
    assert 0.9 < found[0] < 1.1 and (found.diff() > -1e-3).all() and found[-1] > 3


def test_the_taper_is_that_of_covariances():
    ring, plane = Linear().spec.grid, Grid(("y", "x"), tuple(range(6)), tuple(2.0 * i for i in range(4)))
    assert torch.equal(gaspari_cohn(torch.tensor([0.0, 2.0, 5.0])), torch.tensor([1.0, 0.0, 0.0]))
    every = observe([({(0, cell): 1.0}, 0.0, 1.0) for cell in range(N)])
    taper = Taper(ring, 3.0).cells(every.operator)
    torch.testing.assert_close(taper[:-1], covariance.localisation((1, 1, N), (False, True), 1.5), **EXACT)
    torch.testing.assert_close(taper[-1], taper[:-1].mean(0), **EXACT)
    one = observe([({(0, 4 * 2 + 1): 1.0}, 0.0, 1.0)], 24)
    distance = torch.tensor([[math.hypot((i - 2) / 2, j - 1) for j in range(4)] for i in range(6)], dtype=torch.float64)
    torch.testing.assert_close(Taper(plane, 4.0).cells(one.operator)[:-1, 0], gaspari_cohn(distance.flatten() / 2), **EXACT)
    pair = observe([({(0, 0): 1.0, (0, 1): 3.0}, 0.0, 1.0), ({(0, 3): 2.0}, 0.0, 1.0)])
    both = Taper(ring, 4.0)
    torch.testing.assert_close(
        both.cells(pair.operator)[:-1, 0], (both.cells(every.operator)[:-1] @ torch.tensor([1, 3, 0, 0, 0.0]).double()) / 4
    )
    pairs = both.pairs(pair.operator, both.cells(pair.operator))
    torch.testing.assert_close(pairs, pairs.T)
    torch.testing.assert_close(pairs[0, 1], (both.cells(every.operator)[3, :2] @ torch.tensor([0.25, 0.75]).double()))


@pytest.mark.parametrize("finite_size", [None, 1.0])
def test_without_localisation_the_local_filter_is_the_global_one(simple, finite_size):
    model, settings = Linear(), {"inflation": 1.1, "finite_size": finite_size, "relaxation": 0.2, "rotate": True}
    wide = LETKF(model, 1e9, **settings).assimilate(simple, TIMES, range(4), 0)
    torch.testing.assert_close(wide, EnKF(model, **settings).assimilate(simple, TIMES, range(4), 0), **EXACT)
    wide = LETKF(model, 1e9, **settings, lag=3).assimilate(simple, TIMES, range(4), 0)
    torch.testing.assert_close(wide, EnKS(model, 3, **settings).assimilate(simple, TIMES, range(4), 0), **EXACT)


def test_far_observations_say_nothing_and_batches_do_not_matter(monkeypatch):
    model, rows = Linear(), observe([({(0, 0): 1.0}, 3.0, 0.1)])
    free, local = (m.assimilate(rows if i else None, TIMES[:1], range(4), 0) for i, m in enumerate((EnKF(model), LETKF(model, 2.0))))
    assert torch.equal(local[..., 2:4], free[..., 2:4]) and (local[..., 0] - free[..., 0]).abs().max() > 0.5
    monkeypatch.setattr(localisation, "CELLS_AT_ONCE", 2)
    torch.testing.assert_close(LETKF(model, 2.0).assimilate(rows, TIMES[:1], range(4), 0), local, **EXACT)


def test_what_cannot_be_done_is_said(simple):
    with pytest.raises(UserError, match="at least 2 members"):
        EnKF(Linear()).assimilate(simple, TIMES, [0], 0)
    with pytest.raises(UserError, match="random forcing"):
        IEnKS(Linear(0.1)).assimilate(simple, TIMES, range(4), 0)
    with pytest.raises(UserError, match="3600 s apart, those of the simulator 21600"):
        EnKF(Lorenz96()).assimilate(simple, TIMES, range(4), 0)
    with pytest.raises(UserError, match="256 hidden numbers"):
        LETKF(Lorenz96TwoScale(), 3.0)
    with pytest.raises(UserError, match="diverged"):
        wild = observe([({(t, c): 1.0}, 1e4, 1e-6) for t in range(FRAMES) for c in range(40)], 40)
        EnKF(Lorenz96(spinup=5)).assimilate(wild, to_datetime(21600.0 * np.arange(FRAMES)), range(20), 0)
    LETKF(Lorenz96(forcing_std=1.0), 3.0)  # its forcing lies on the ring


# DAPPER


@pytest.fixture(scope="module")
def dapper():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("dapper.da_methods")


def test_one_analysis_is_dappers(dapper):
    from dapper.da_methods.ensemble import EnKF_analysis
    from dapper.tools.randvars import GaussRV

    rng = np.random.default_rng(0)
    state, h, r, y = rng.normal(size=(8, N)), rng.normal(size=(3, N)), np.array([0.3, 1.0, 2.0]), rng.normal(size=3)
    theirs = EnKF_analysis(state.copy(), state @ h.T, GaussRV(C=np.diag(r)), y, "Sqrt")
    ours = torch.from_numpy(state)
    predicted = ours @ torch.from_numpy(h).T
    scale = torch.from_numpy(r).rsqrt()
    s, d = (predicted - predicted.mean(0)) * scale / math.sqrt(7), (torch.from_numpy(y) - predicted.mean(0)) * scale
    mean, transform = tools.square_root((s @ s.T)[None], (s @ d)[None])
    torch.testing.assert_close(tools.combine(ours, mean[..., None] + transform, N), torch.from_numpy(theirs), **EXACT)
    rho = torch.tensor([[1.0, 0.5, 0.0]] * (N + 1)).double()  # R-localisation: their tapers are the roots of ours
    mean, transform = localisation.local_square_root(rho, s, d, None)
    root = rho[0].sqrt()
    identity = GaussRV(C=1, M=3)
    tapered = (s * math.sqrt(7) * root).numpy()
    theirs = EnKF_analysis(state.copy(), tapered, identity, (d * root).numpy(), "Sqrt")
    torch.testing.assert_close(tools.combine(ours, mean[..., None] + transform, N), torch.from_numpy(theirs), **EXACT)


def ring(frames: int, seed: int, sites: int = 40, error: float = 1.0) -> tuple[Lorenz96, Tensor, Observation, np.ndarray]:
    """Simulator, truth (T, 1, 1, 40), observations of some sites drawn anew at each frame, times."""
    simulator, rng = Lorenz96(), torch.Generator().manual_seed(seed)
    truth = trajectories(simulator, 1000 + seed, [0], frames)[0]
    cells = torch.stack([torch.randperm(40, generator=rng)[:sites].sort().values for _ in range(frames)])
    frame = torch.arange(frames).repeat_interleave(sites)
    index, zero = frame * 40 + cells.flatten(), torch.zeros(frames * sites)
    operator = WeightedCells(index[:, None], zero[:, None] + 1, torch.arange(len(zero)), zero.bool(), zero, frame, frame, frame, 40)
    values = truth.flatten()[index] + error * torch.randn(len(zero), generator=rng)
    return simulator, truth, Observation(values, zero + error**2, operator), to_datetime(simulator.spec.step * np.arange(frames))


def rmse(fields: Tensor, truth: Tensor, first: int, last: int = -20) -> float:
    """Mean in time of the root mean square error of the ensemble mean, as DAPPER has it."""
    return float((fields[:, first:last].mean(0) - truth[first:last]).square().mean((1, 2, 3)).sqrt().mean())


def contenders(simulator: Lorenz96, near: dict) -> dict[str, tuple[object, int, float]]:
    """Method, members and the RMSE that DAPPER's documentation or the literature gives: K = 40, F = 8, all sites, unit error."""
    return {
        "enkf": (EnKF(simulator, 1.02, None), 40, 0.18),
        "enks": (EnKS(simulator, 20, 1.02, None), 40, 0.087),
        "letkf": (LETKF(simulator, 14.56, 1.04, None), 8, 0.22),
        "ienks": (IEnKS(simulator, 20, inflation=1.0, finite_size=None, **near), 24, 0.064),
        "three_dvar": (ThreeDVar(simulator, 0.02, perturb=False, samples=1000), 2, 0.41),
    }


def near_truth(folder, truth: Tensor) -> dict:
    """Members from the truth with errors of one per cent, as DAPPER begins."""
    save_states(folder / "start.safetensors", truth[:1, 0, 0])
    return {"states": str(folder / "start.safetensors"), "spinup": 0}


def test_lorenz96(tmp_path):
    simulator, truth, observation, times = ring(200, 1)
    for name, (method, members, expected) in contenders(simulator, near_truth(tmp_path, truth)).items():
        if name == "ienks":
            continue
        error = rmse(method.assimilate(observation, times, range(members), 0), truth, 80)
        assert 0.75 * expected < error < 1.35 * expected, (name, error)


def test_lorenz96_sparse_and_few_members():
    """Eight sites anew at each frame, and 20 members that a fixed inflation loses: the finite-size inflation keeps both."""
    simulator, truth, observation, times = ring(300, 3, 8, 0.5)
    assert rmse(EnKF(simulator).assimilate(observation, times, range(40), 0), truth, 150) < 0.35
    simulator, truth, observation, times = ring(300, 3)
    assert rmse(EnKF(simulator).assimilate(observation, times, range(20), 0), truth, 100) < 0.32


def test_the_iterative_smoother_on_lorenz96(tmp_path):
    simulator, truth, observation, times = ring(130, 1)
    smoother = IEnKS(simulator, 10, inflation=1.0, finite_size=None, **near_truth(tmp_path, truth))
    fields = smoother.assimilate(observation, times, range(24), 0)
    assert rmse(fields, truth, 50, -12) < 0.13 and np.mean(smoother.report.iterations) < 4


@pytest.mark.slow
def test_beside_dapper(dapper, tmp_path, capsys):
    """The same truth and observations; ours is within 10 % of theirs, or better, and of the published figure."""
    import dapper.mods as modelling
    import dapper.mods.Lorenz96 as system
    from dapper.tools.localization import nd_Id_localization
    from dapper.tools.seeding import set_seed

    simulator, truth, observation, times = ring(2000, 2)
    states, values = truth[:, 0, 0].double().numpy(), observation.values.view(-1, 40).double().numpy()[1:]
    clock = modelling.Chronology(0.05, dko=1, Ko=len(states) - 2, BurnIn=10, Tplot=10)
    look = modelling.partial_Id_Obs(40, np.arange(40)) | {"noise": 1, "localizer": nd_Id_localization((40,), (2,))}
    dynamics = {"M": 40, "model": system.step, "linear": system.dstep_dx, "noise": 0}
    hmm = modelling.HiddenMarkovModel(dynamics, look, clock, modelling.GaussRV(mu=states[0], C=0.001))
    theirs = {
        "enkf": (dapper.EnKF("Sqrt", 40, infl=1.02, rot=True), "a"),
        "enks": (dapper.EnKS("Sqrt", 40, 20, infl=1.02), "s"),
        "letkf": (dapper.LETKF(8, loc_rad=4, infl=1.04), "a"),
        "ienks": (dapper.iEnKS("Sqrt", 24, Lag=20, nIter=10, wtol=1e-5, infl=1.01, rot=True), "s"),
        "three_dvar": (dapper.Var3D(xB=0.02), "a"),
    }
    table = []
    for name, (method, members, published) in contenders(simulator, near_truth(tmp_path, truth)).items():
        began = time.perf_counter()
        error = rmse(method.assimilate(observation, times, range(members), 0), truth, 200)
        seconds = time.perf_counter() - began
        other, kind = theirs[name]
        set_seed(3)
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.assimilate(hmm, states, values, liveplots=False)
        seconds_theirs = time.perf_counter() - began
        other.stats.average_in_time()
        table.append((name, error, float(getattr(other.avrgs.err.rms, kind).val), published, seconds, seconds_theirs))
    with capsys.disabled():
        print("\n" + pd.DataFrame(table, columns=["method", "ours", "DAPPER", "published", "seconds", "DAPPER's"]).to_string(index=False))
    for name, error, reference, published, _, _ in table:
        assert error < 1.1 * reference and error < 1.1 * published, name


# The command line


def run(folder, *arguments: str) -> int:
    with contextlib.chdir(folder):
        return cli.main(list(arguments))


RING = ("experiment=lorenz96", "size=debug")


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    assert run(folder, "simulate", *RING, "trajectories=1", "frames=24", "seed=9", "out=truth.zarr") == 0
    assert run(folder, "observe", *RING, "network=lorenz96_all", "truth=truth.zarr", "out=obs.parquet") == 0
    return folder


def test_reanalysis_without_a_checkpoint(twin):
    words = ("reanalysis", *RING, "forecaster=letkf", "observations=obs.parquet", "members=10", "out=a.nc")
    assert run(twin, *words) == 0
    with open_dataset(twin / "a.nc") as analysis, open_dataset(twin / "truth.zarr") as truth:
        assert analysis.sizes["number"] == 10 and (analysis["time"].values == truth["time"].values).all()
        error = analysis["u"].mean("number") - truth["u"].isel(trajectory=0)
        assert float((error[12:] ** 2).mean()) ** 0.5 < 0.7


def test_tune(twin, capsys):
    words = ("tune", *RING, "truth=truth.zarr", "observations=obs.parquet", "members=6", "burn_in=8")
    assert run(twin, *words, "forecaster=letkf", "grid={radius: [2.0, 20.0], finite_size: [1.0, null]}", "out=t.json") == 0
    table = pd.DataFrame(json.loads((twin / "t.json").read_text()))
    assert len(table) == 4 and set(table) >= {"radius", "finite_size", "variable", "rmse", "spread_skill", "seconds", "best"}
    (best,) = table[table.best].to_dict("records")
    assert best["rmse"] == table.rmse.min()
    assert f"best: forecaster.radius={best['radius']}" in capsys.readouterr().out
    assert run(twin, *words, "forecaster=three_dvar", "grid={scale: [0.02, 0.1], members: [2]}", "out=t.csv") == 0
    assert len(pd.read_csv(twin / "t.csv")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("reanalysis forecaster=letkf observations=obs.parquet out=n.nc", "give experiment=... or simulator="),
        ("reanalysis observations=obs.parquet out=n.nc", "needs checkpoint="),
        ("reanalysis experiment=lorenz96 forecaster=enkf members=1 observations=obs.parquet out=n.nc", "at least 2 members"),
        ("tune experiment=lorenz96 forecaster=letkf truth=truth.zarr observations=obs.parquet grid={radisu:[1]}", "unknown key 'radisu'"),
        ("tune experiment=lorenz96 forecaster=letkf truth=truth.zarr observations=obs.parquet grid={radius:3}", "lists of values"),
        (
            "tune experiment=lorenz96 forecaster=letkf truth=truth.zarr observations=obs.parquet grid={members:[1]}",
            "no setting of the grid",
        ),
    ],
)
def test_mistakes_of_a_user(twin, capsys, words, message):
    assert run(twin, *words.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("appa-lite: error:") and message in error
