"""Simulators: convergence order, conservation, agreement with an independent kernel, chaos, determinism."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from appa_lite.core.errors import UserError
from appa_lite.simulators.base import load_states, save_states, states, trajectories
from appa_lite.simulators.lorenz96 import Lorenz96
from appa_lite.simulators.lorenz96_two_scale import Lorenz96TwoScale
from appa_lite.simulators.shallow_water import WINDS, ShallowWaterOcean
from appa_lite.simulators.stepping import euler, rk4, ssp_rk3

DAY = 86400.0
CHECK = np.load(Path(__file__).parent / "data" / "ocean_check.npz")
SMALL = {"n": 16, "dx": 64e3, "A4": 2e11, "compiled": False}  # a basin of the same size, coarse and quick


def ocean(**settings) -> ShallowWaterOcean:
    return ShallowWaterOcean(**{**SMALL, **settings})


def conservative(**settings) -> ShallowWaterOcean:
    """No wind, no damping: energy and mass are conserved by the scheme in space."""
    return ocean(wind_stress=0.0, A4=0.0, drag_lower=0.0, relaxation=0.0, **settings)


# Steppers


@pytest.mark.parametrize(("stepper", "order"), [(euler, 1), (ssp_rk3, 3), (rk4, 4)])
def test_order_of_steppers(stepper, order):
    """Halving dt divides the error by 2^order, on the nonlinear Lorenz-96 equations."""
    model = Lorenz96(K=8)
    start = Lorenz96(K=8).initial(0, [0]).double() + torch.sin(torch.arange(8.0, dtype=torch.float64))

    def integrate(scheme, steps):
        x = start
        for _ in range(steps):
            x = scheme(model.tendency, x, 0.4 / steps)
        return x

    exact = integrate(rk4, 2000)
    errors = [(integrate(stepper, n) - exact).norm().item() for n in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_ssp_rk3_does_not_scale_a_resting_state_in_float32():
    x = torch.rand(10000, generator=torch.Generator().manual_seed(0)) + 500
    y = x
    for _ in range(100):
        y = ssp_rk3(lambda s: torch.zeros_like(s), y, 1.0)
    assert torch.equal(x, y)


# Ocean


def test_ocean_agrees_with_an_independent_kernel():
    """One and eighty steps in float64 under the steady wind, to rounding."""
    sim = ShallowWaterOcean(wind_std=0.0, compiled=False)
    x = sim._to_flat(torch.from_numpy(CHECK["start"])[None])
    constants, stress = sim.constants(x), sim.stress(torch.zeros(1, WINDS, dtype=torch.float64))
    for step in range(1, 81):
        x = sim.step(x, stress, constants)
        if step in (1, 80):
            difference = (sim._from_flat(x)[0] - torch.from_numpy(CHECK[f"after_{step}"])).abs()
            assert difference[0::3].max() < (1e-12 if step == 1 else 3e-12)  # m, of about 100
            assert difference[1::3].max() < 1e-13 and difference[2::3].max() < 1e-13  # m/s, of about 1


def test_ocean_advance_is_its_steps():
    """A frame of one day under the steady wind is the eighty steps of the check file."""
    sim = ShallowWaterOcean(wind_std=0.0, frame_step=DAY, compiled=False)
    state = sim.advance(sim.from_fields(torch.from_numpy(CHECK["start"])[None]), 0, 0, [0])
    assert (sim.fields(state)[0] - torch.from_numpy(CHECK["after_80"])).abs().max() < 3e-12


@pytest.mark.parametrize("layers", [1, 2])
def test_ocean_spatial_order_is_two(layers):
    """The tendency of smooth fields that respect the walls converges to the equations', differentiated exactly."""
    errors = torch.stack([_tendency_error(n, layers) for n in (32, 64)])
    assert (torch.log2(errors[0] / errors[1]) > 1.9).all(), errors
    assert (torch.log2(errors[0] / errors[1]) < 2.2).all(), errors


def _tendency_error(n: int, layers: int) -> torch.Tensor:
    """Root mean square error of d(eta, u, v)/dt in each layer (3, layers), away from the corners' one-sided values."""
    length = 1024e3
    sim = ShallowWaterOcean(n=n, dx=length / n, layers=layers, A4=1e13, drag=1e-7, drag_lower=1e-7, compiled=False)
    k = math.pi / length

    def exact(name, x, y):
        """Analytic (eta, u, v) of every layer."""
        out = []
        for layer in range(layers):
            a = 1.0 + 0.5 * layer
            eta = a * 60 * torch.cos(k * x) * torch.cos(2 * k * y)
            u = 0.5 / a * torch.sin(k * x) * torch.cos(2 * k * y)
            v = -0.3 * a * torch.cos(2 * k * x) * torch.sin(k * y)
            out.append((eta, u, v))
        return out if name is None else [layer["euv".index(name)] for layer in out]

    grid = torch.arange(n, dtype=torch.float64) * (length / n)
    places = {"e": (0.5, 0.5), "u": (0.0, 0.5), "v": (0.5, 0.0)}  # offsets in x and y
    fields = torch.empty(1, 3 * layers, n, n, dtype=torch.float64)
    want = torch.empty(3, layers, n, n, dtype=torch.float64)
    for i, (name, (ox, oy)) in enumerate(places.items()):
        x = (grid + ox * length / n)[None, :].expand(n, n).clone().requires_grad_()
        y = (grid + oy * length / n)[:, None].expand(n, n).clone().requires_grad_()
        for layer, values in enumerate(exact(name, x, y)):
            fields[0, 3 * layer + i] = values.detach()
        want[i] = _exact_tendency(sim, exact(None, x, y), x, y, k)[i].detach()
    flat = sim._to_flat(fields)
    got = sim.tendency(flat, sim.stress(torch.zeros(1, WINDS, dtype=torch.float64)), sim.constants(flat))[0].unflatten(-1, (n, n))
    want[1, :, :, 0], want[2, :, 0, :] = 0, 0
    return (got - want).square().mean((-1, -2)).sqrt()


def _exact_tendency(sim, layers, x, y, k):
    """d(eta, u, v)/dt (3, layers, n, n) of the equations at the points x, y."""

    def d(a, z):
        return torch.autograd.grad(a.sum(), z, create_graph=True)[0]

    length = sim.n * sim.dx
    coriolis = sim.f0 + sim.beta * (y - length / 2)
    rows = []
    for i, (eta, u, v) in enumerate(layers):
        h = sim.H + eta
        head = sum(g * other[0] for g, other in zip(sim.gravity[i], layers, strict=True)) + (u**2 + v**2) / 2
        absolute = coriolis + d(v, x) - d(u, y)
        wind = -sim.wind_stress * torch.cos(2 * math.pi * y / length) / (1025.0 * h) if i == 0 else 0
        biharmonic_u, biharmonic_v = (5 * k**2) ** 2 * u, (5 * k**2) ** 2 * v
        rows.append(
            torch.stack(
                [
                    -(d(h * u, x) + d(h * v, y)) - eta / sim.relaxation,
                    absolute * v - d(head, x) + wind - sim.drags[i] * u - sim.A4 * biharmonic_u,
                    -absolute * u - d(head, y) - sim.drags[i] * v - sim.A4 * biharmonic_v,
                ]
            )
        )
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("layers", [1, 2])
def test_ocean_conserves_energy_in_space(layers):
    """dE/dt of the discrete tendency vanishes to rounding, for rough fields (Sadourny, 1975)."""
    sim = conservative(layers=layers)
    fields = torch.randn(2, *sim.spec.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fields[:, 0::3] *= 20
    state = sim.from_fields(fields).requires_grad_()
    flat = sim._to_flat(sim.fields(state)).detach()
    tendency = sim._from_flat(sim.tendency(flat, sim.stress(state.detach()[:, -WINDS:]), sim.constants(flat))).flatten(1)
    (slope,) = torch.autograd.grad(sim.budgets(state)["energy"].sum(), state)
    terms = slope[:, :-WINDS] * tendency
    assert (terms.sum(1).abs() < 1e-12 * terms.abs().sum(1)).all()


def test_ocean_energy_drift_is_of_third_order_in_dt():
    drifts = []
    for dt in (1080.0, 540.0):
        sim = conservative(dt=dt, noise=60.0, frame_step=5 * DAY)
        state = sim.initial(0, [0, 1]).double()
        energy = sim.budgets(state)["energy"]
        drifts.append((sim.budgets(sim.advance(state, 0, 0, [0, 1]))["energy"] / energy - 1).abs().mean().item())
    assert 2.5 < math.log2(drifts[0] / drifts[1]) < 3.5, drifts
    assert drifts[0] < 1e-4


@pytest.mark.parametrize("layers", [1, 2])
def test_ocean_conserves_mass(layers):
    """Wind, drag and viscosity do not touch the mean thickness; relaxation makes it decay at its rate."""
    sim = ocean(layers=layers, relaxation=0.0)
    state = sim.initial(0, [0, 1]).double()
    state[:, : sim.n**2] += 3.0
    after = sim.budgets(sim.advance(state, 0, 0, [0, 1]))
    for name, mass in sim.budgets(state).items():
        if name.startswith("mass"):
            assert (after[name] - mass).abs().max() < 1e-12
    relaxed = ocean(layers=layers, relaxation=100 * DAY)
    ratio = relaxed.budgets(relaxed.advance(state, 0, 0, [0, 1]))["mass1"] / sim.budgets(state)["mass1"]
    assert ratio.tolist() == pytest.approx(2 * [math.exp(-0.02)], rel=1e-8)


def test_ocean_starts_balanced():
    """The first day of the start moves the interface far less than it would without its geostrophic velocities."""
    sim = conservative(frame_step=DAY, f0=1e-4, beta=0.0)
    state = sim.initial(0, [0])
    moved = (sim.fields(sim.advance(state, 0, 0, [0]))[:, 0] - sim.fields(state)[:, 0]).std()
    eta = sim.fields(state).clone()
    assert eta[:, 0].std().item() == pytest.approx(20.0, rel=0.15)
    eta[:, 1:3] = 0
    rest = sim.from_fields(eta)
    assert 3 * moved < (sim.fields(sim.advance(rest, 0, 0, [0]))[:, 0] - eta[:, 0]).std()


def test_ocean_walls_spec_and_restart():
    sim = ocean()
    state = sim.advance(sim.initial(3, [0, 1]), 0, 3, [0, 1])
    fields = sim.fields(state)
    assert fields.shape == (2, *sim.spec.shape) == (2, 6, 16, 16)
    assert sim.spec.names == ("eta1", "u1", "v1", "eta2", "u2", "v2") and sim.spec.step == 172800.0
    assert [v.shift for v in sim.spec.variables] == 2 * [(0.0, 0.0), (0.0, -0.5), (-0.5, 0.0)]
    assert fields[:, 1::3, :, 0].abs().max() == 0 == fields[:, 2::3, 0].abs().max()
    assert fields[:, 1::3, :, 1].abs().max() > 0 and fields[:, 2::3, 1].abs().max() > 0
    assert torch.equal(sim.from_fields(fields, sim.winds(state)), state)
    ssh = sim.spec.evaluate(fields, "ssh")
    assert torch.allclose(ssh, (0.07 * fields[:, 0] + 0.03 * fields[:, 3]) / 9.81, atol=1e-6)


def test_ocean_winds_are_stationary_with_their_memory():
    """Variance and autocorrelation of the amplitudes over frames, 400 members; four standard errors."""
    sim = ocean(n=4, dx=256e3, dt=5400.0, wind_stress=0.0, noise=1e-3)
    members = list(range(400))
    winds = torch.stack([sim.winds(s) for s in states(sim, 0, members, frames=11, spinup=0)])
    count = 400 * WINDS
    for frame in (0, 10):
        assert winds[frame].var().item() == pytest.approx(0.0625, rel=4 * math.sqrt(2 / count))
    for lag in (1, 5, 10):
        correlation = (winds[0] * winds[lag]).mean() / 0.0625
        assert correlation.item() == pytest.approx(math.exp(-2 * lag / 10), abs=4 * math.sqrt(2 / count))
    across = torch.corrcoef(winds[10].T) - torch.eye(WINDS)
    assert across.abs().max() < 4 / math.sqrt(400)


def test_ocean_refuses_bad_settings_and_dead_members():
    for wrong in ({"layers": 3}, {"dt": 1000.0}, {"frame_step": 5000.0}):
        with pytest.raises(UserError):
            ocean(**wrong)
    sim = ocean()
    good = sim.initial(0, [4, 5])
    broken = good.clone()
    broken[1, 7] = torch.nan
    with pytest.raises(UserError, match=r"member 5 .*not finite"):
        sim.advance(broken, 0, 0, [4, 5])
    fields = sim.fields(good).clone()
    fields[0, 0] = -490.0
    with pytest.raises(UserError, match=r"member 4 .*floor"):
        sim.advance(sim.from_fields(fields), 0, 0, [4, 5])
    with pytest.raises(UserError):
        sim.from_fields(fields[:, :3])


@pytest.mark.slow
def test_ocean_compiled_agrees_with_eager():
    eager, fast = ocean(), ocean(compiled=True)
    if not fast._compiles(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    members = list(range(11))  # more than one batch
    a, b = eager.initial(0, members), fast.initial(0, members)
    for frame in range(2):
        a, b = eager.advance(a, frame, 0, members), fast.advance(b, frame, 0, members)
    assert a.shape == b.shape and torch.allclose(a, b, atol=2e-3, rtol=1e-4)  # m, of 20: rounding of 320 steps


@pytest.mark.slow
def test_ocean_climate():
    """A coarse ocean under the wind gains energy from its start, then keeps it between bounds: neither dying nor running away."""
    sim = ocean(n=24, dx=128e3 / 3, A4=5e11, dt=2700.0)
    budgets = [sim.budgets(s) for s in states(sim, 0, range(4), frames=300, spinup=0)]
    energy = torch.stack([b["energy"].mean() for b in budgets])
    assert 0.5 < energy[225:].mean() / energy[150:225].mean() < 2.0
    assert energy[150:].min() > 3 * energy[0]
    assert min(b["thinnest"].min() for b in budgets) > 100 and max(b["fastest"].max() for b in budgets) < 5


# Lorenz systems


def test_lorenz96_quadratic_term_conserves_energy():
    x = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Lorenz96()
    terms = x * model.advection(x)
    assert (terms.sum(1).abs() < 1e-13 * terms.abs().sum(1)).all()
    by_hand = torch.tensor([[(x[b, (k + 1) % 40] - x[b, k - 2]) * x[b, k - 1] - x[b, k] + 8.0 for k in range(40)] for b in range(5)])
    assert torch.allclose(model.tendency(x), by_hand, atol=1e-13)
    assert model.spec.step == 21600.0 and model.spec.grid.periodic == (False, True)


def test_lorenz96_error_doubling():
    """The leading Lyapunov exponent at F = 8, K = 40 is 1.67 per time unit (0.415 units or 2.1 days to double): +-6 %."""
    model = Lorenz96()
    members = list(range(64))
    x = next(states(model, 0, members, frames=1)).double()
    y = x + 1e-7 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    growth = []
    for frame in range(400):
        x, y = model.advance(x, frame, 0, members), model.advance(y, frame, 0, members)
        size = (y - x).norm(dim=1, keepdim=True)
        growth.append((size / 1e-6).log().mean().item())
        y = x + (y - x) * (1e-6 / size)
    exponent = sum(growth[100:]) / (300 * 0.05)
    assert exponent == pytest.approx(1.67, rel=0.06)


def test_lorenz96_is_stationary_after_spinup():
    """Mean 2.34 and standard deviation 3.64 (F = 8), the same in both halves."""
    fields = trajectories(Lorenz96(), 0, 32, 400)
    for half in (fields[:, :200], fields[:, 200:]):
        assert half.mean().item() == pytest.approx(2.34, abs=0.08)
        assert half.std().item() == pytest.approx(3.64, abs=0.08)


def test_lorenz96_random_forcing():
    """The forcing has its variance and memory; members differ; without it the model is the deterministic one."""
    model = Lorenz96(forcing_std=2.0, forcing_memory=0.2, spinup=0)
    forcing = torch.stack([s[:, 40:] for s in states(model, 0, list(range(50)), frames=9)])
    assert forcing[8].std().item() == pytest.approx(2.0, rel=0.06)
    correlation = (forcing[0] * forcing[4]).mean() / 4
    assert correlation.item() == pytest.approx(math.exp(-1), abs=4 * math.sqrt(1.2 / 2000))
    start = torch.full((2, 40), 8.0)
    start[:, 0] += 1
    noisy = model.advance(torch.cat([start, torch.zeros_like(start)], dim=1), 0, 0, [0, 1])
    plain = Lorenz96().advance(start, 0, 0, [0, 1])
    assert not torch.equal(noisy[0], noisy[1]) and torch.equal(plain[0], plain[1])
    assert (noisy[:, :40] - plain).std().item() == pytest.approx(0.05 * 2 * math.sqrt(1 - math.exp(-0.5)), rel=0.4)


@pytest.mark.parametrize("c", [4.0, 10.0])
def test_two_scale_budget(c):
    """d/dt (sum X^2 + sum Y^2) / 2 = F sum X - sum X^2 - c sum Y^2: advection and coupling only exchange energy."""
    model = Lorenz96TwoScale(c=c)
    state = torch.randn(3, 8 * 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    x, y = state[:, :8], state[:, 8:]
    rate = (state * model.tendency(state)).sum(1)
    assert torch.allclose(rate, 20 * x.sum(1) - x.square().sum(1) - c * y.square().sum(1), rtol=1e-12)
    for j in (0, 1, 31, 32, 254, 255):
        advection = 10 * c * y[0, (j + 1) % 256] * (y[0, j - 1] - y[0, (j + 2) % 256])
        by_hand = advection - c * y[0, j] + c / 10 * x[0, j // 32]
        assert model.tendency(state)[0, 8 + j].item() == pytest.approx(by_hand.item(), abs=1e-10)


def test_two_scale_lives_on_its_climate():
    model = Lorenz96TwoScale(spinup=100)
    fields = trajectories(model, 0, 8, 200)
    assert fields.shape == (8, 200, 1, 1, 8)
    assert 1.5 < fields.mean() < 5.0 and 3.0 < fields.std() < 8.0
    assert fields[:, :100].std().item() == pytest.approx(fields[:, 100:].std().item(), rel=0.15)


# All of them

SIMULATORS = {
    "lorenz96": lambda: Lorenz96(spinup=20),
    "stochastic": lambda: Lorenz96(spinup=20, forcing_std=1.0),
    "two_scale": lambda: Lorenz96TwoScale(spinup=5),
    "ocean": lambda: ocean(spinup_days=1.0, frame_step=DAY / 4),
    "one_layer": lambda: ocean(layers=1, spinup_days=1.0, frame_step=DAY / 4),
}


@pytest.mark.parametrize("name", SIMULATORS)
def test_members_depend_on_seed_and_number_alone(name):
    sim = SIMULATORS[name]()
    three = trajectories(sim, 7, 3, 2)
    assert torch.equal(trajectories(sim, 7, 1, 2)[0], three[0])
    assert torch.equal(trajectories(sim, 7, [2], 2)[0], three[2])
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(trajectories(sim, 8, 1, 2)[0], three[0])


@pytest.mark.parametrize("name", SIMULATORS)
def test_start_states(name, tmp_path):
    """Members that share a start state separate, by seed and number; the file is read back exactly."""
    sim = SIMULATORS[name]()
    spun = torch.cat([next(states(sim, 0, [m], 1)) for m in (0, 1)])
    save_states(tmp_path / "start.safetensors", spun)
    assert torch.equal(load_states(tmp_path / "start.safetensors"), spun)
    fields = trajectories(sim, 1, 3, 3, spinup=0, start=tmp_path / "start.safetensors")
    spread = [(fields[2, t] - fields[0, t]).abs().max().item() for t in (0, 2)]
    apart = (fields[1, 0] - fields[0, 0]).abs().max().item()
    assert spread[0] < 0.5 * apart and spread[1] > 0
    assert torch.equal(fields[2], trajectories(sim, 1, [2], 3, spinup=0, start=spun)[0])
    other = trajectories(sim, 2, 1, 3, spinup=0, start=spun)
    assert not torch.equal(other[0, 2], fields[0, 2])
    with pytest.raises(UserError, match="another simulator"):
        trajectories(sim, 1, 1, 1, start=spun[:, :-1])
    with pytest.raises(UserError, match="no start states"):
        trajectories(sim, 1, 1, 1, start=tmp_path / "missing.safetensors")


def test_spinup_and_frames_are_one_trajectory():
    sim = Lorenz96(forcing_std=1.0)
    whole = trajectories(sim, 0, 2, 6, spinup=0)
    assert torch.equal(trajectories(sim, 0, 2, 2, spinup=4), whole[:, 4:])
    with pytest.raises(UserError):
        trajectories(sim, 0, 0, 5)


@pytest.mark.parametrize("name", SIMULATORS)
def test_from_fields_restarts(name):
    sim = SIMULATORS[name]()
    fields = sim.fields(next(states(sim, 0, [0, 1], 1)))
    restarted = sim.from_fields(fields)
    assert torch.equal(sim.fields(restarted), fields)
    assert all(value.shape == (2,) for value in sim.budgets(restarted).values())
    assert sim.advance(restarted, 0, 0, [0, 1]).isfinite().all()
