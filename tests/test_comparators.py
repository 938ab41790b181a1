"""The families of forecast models: their scores, laws that are known, laws that they learn, and the command line."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import appa_lite
from appa_lite import cli
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable, to_datetime
from appa_lite.core.random import Streams
from appa_lite.core.store import open_dataset
from appa_lite.forecasters.climatology import Climatology
from appa_lite.forecasters.deterministic import Deterministic
from appa_lite.forecasters.fgn import FGN
from appa_lite.forecasters.flow_residual import FlowResidual, transport
from appa_lite.forecasters.next_state_diffusion import NextStateDiffusion
from appa_lite.forecasters.persistence import Persistence
from appa_lite.forecasters.simulator_ensemble import SimulatorEnsemble
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.deterministic import DeterministicModel
from appa_lite.models.fgn import FGNModel
from appa_lite.models.flow_residual import ResidualFlow
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.next_state_diffusion import NextStateDenoiser
from appa_lite.models.normalizer import Normalizer
from appa_lite.nn.backbone import parameters
from appa_lite.simulators.base import trajectories
from appa_lite.simulators.gaussian_process import GaussianProcess
from appa_lite.simulators.lorenz96 import Lorenz96
from appa_lite.training.base import SampleNoise
from appa_lite.training.data import Sample, TrainingData
from appa_lite.training.deterministic import DeterministicRecipe
from appa_lite.training.emulator import EmulatorTraining, Rollouts, States, of_size
from appa_lite.training.fgn import FGNRecipe, FGNTraining, almost_fair_crps
from appa_lite.training.flow_residual import FlowRecipe
from appa_lite.training.loop import TrainingConfig, train
from appa_lite.training.next_state_diffusion import NextStateRecipe

CELLS = 8
RING = FieldSpec((Variable("u", "m"),), Grid(("x",), (0.0,), tuple(map(float, range(CELLS))), (False, True)), 3600.0)
SMALL = {"width": 16, "depth": 1, "homogeneous": True}
FORECASTERS = {c.kind: c for c in (Deterministic, FGN, NextStateDiffusion, FlowResidual)}


def models(shape=(1, 1, CELLS), history=2, periodic=(False, True), forcings=0, **backbone) -> list[torch.nn.Module]:
    """One of each family, with weights that are not at their start."""
    common = (history, periodic, forcings)
    keywords = SMALL | backbone
    torch.manual_seed(0)
    made = [DeterministicModel(shape, *common, keywords)]
    made += [FGNModel(shape, *common, noise, 8, keywords) for noise in ("global", "local", "both")]
    made += [NextStateDenoiser(shape, *common, keywords), ResidualFlow(shape, dict(made[0].config), *common, keywords)]
    draw = torch.Generator().manual_seed(0)
    for model in made:
        for p in model.parameters():
            p.data.add_(0.3 * torch.randn(p.shape, generator=draw))
        model.eval().requires_grad_(False).scale.fill_(0.5)
    return made


def checkpoint(model: torch.nn.Module, spec: FieldSpec = RING, settings: dict | None = None) -> Checkpoint:
    return Checkpoint(spec, Normalizer(spec.shape), IdentityAutoencoder(spec.shape), None, settings or {}, None, model)


def forecaster(model: torch.nn.Module, **keywords):
    keywords = {"steps": 3} | keywords if isinstance(model, NextStateDenoiser | ResidualFlow) else keywords
    return FORECASTERS[type(model)](checkpoint(model), **keywords)


def hours(n: int) -> np.ndarray:
    return to_datetime(3600.0 * np.arange(n))


# The score


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("members", [2, 3, 8])
def test_fair_crps_is_that_of_scoringrules(members):
    peer = pytest.importorskip("scoringrules")
    x, y = draws(5, members, 4), draws(5, 4)
    for alpha, name in ((1.0, "fair"), (0.0, "nrg")):
        expected = peer.crps_ensemble(y.numpy(), x.movedim(1, -1).numpy(), estimator=name)
        np.testing.assert_allclose(almost_fair_crps(x, y, alpha).numpy(), expected, rtol=1e-10)
    between = 0.95 * almost_fair_crps(x, y, 1.0) + 0.05 * almost_fair_crps(x, y, 0.0)
    torch.testing.assert_close(almost_fair_crps(x, y, 0.95), between, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("members", [2, 3, 8])
def test_the_expected_fair_crps_does_not_depend_on_the_number_of_members(members):
    """For truth and members from N(0, 1) it is 1 / sqrt(pi); almost fair, (1 - alpha) / M of that more."""
    x, y = draws(100_000, members + 1).split([members, 1], dim=1)
    for alpha in (1.0, 0.95, 0.0):
        expected = (1 + (1 - alpha) / members) / math.sqrt(math.pi)
        assert abs(float(almost_fair_crps(x, y[:, 0], alpha).mean()) / expected - 1) < 0.01


# Networks


def test_fgn_starts_deterministic_and_is_not_when_its_norms_have_learned():
    known = torch.randn(3, 2, 1, 1, CELLS)
    for kind in ("global", "local", "both"):
        model = FGNModel((1, 1, CELLS), noise=kind, history=2, backbone={"width": 16, "depth": 2}).double()
        for p in (model.network.outputs.weight, *(b.modulation.bias for b in model.network.blocks)):
            torch.nn.init.normal_(p)
        one, other = (model(known.double(), torch.randn(3, 1, *model.noise_shape, dtype=torch.float64)) for _ in range(2))
        assert 0 < (one - other).abs().max() < 1e-5 * one.abs().max()
        torch.nn.init.normal_(model.network.blocks[0].modulation.linear.weight)
        one, other = (model(known.double(), torch.randn(3, 1, *model.noise_shape, dtype=torch.float64)) for _ in range(2))
        assert (one - other).abs().max() > 0.01 * one.abs().max()


def test_noise_is_global_or_local():
    """Global noise moves a homogeneous state everywhere alike, local noise does not."""
    alike = {}
    for model in models()[1:4]:
        noise = torch.randn(2, 1, *model.noise_shape)
        out = model(torch.ones(2, 2, 1, 1, CELLS), noise)[:, 0, 0, 0]
        alike[model.config.noise] = float(out.std(dim=-1).max() / out.std())
    assert alike["global"] < 1e-4 and min(alike["local"], alike["both"]) > 0.01


def evaluated(model: torch.nn.Module, known: Tensor, shift: int = 0, mask: Tensor | None = None) -> Tensor:
    """The model's output, with all its noise rolled along the ring by ``shift``."""
    draw = torch.Generator().manual_seed(3)
    if mask is not None:
        model.mask.copy_(mask)
    if isinstance(model, DeterministicModel):
        return model(known, 2)
    if isinstance(model, FGNModel):
        count = sum(h * w for h, w in model.places.values())
        noise = torch.randn(len(known), 2, count, 8, generator=draw)
        first = count - CELLS if count > 1 else 1
        return model(known, torch.cat([noise[:, :, :first], noise[:, :, first:].roll(shift, 2)], dim=2))
    x = torch.randn(known[:, 0].shape, generator=draw).roll(shift, -1)
    level = torch.full((len(known),), 0.7)
    if isinstance(model, NextStateDenoiser):
        return model(x, level, known)
    return model.velocity(x, level, known, model.forecast_mean(known))


@pytest.mark.parametrize("number", range(6))
def test_every_network_commutes_with_shifts_of_a_ring(number):
    model, known = models(kernel=5, depth=2, attention=True)[number], torch.randn(2, 2, 1, 1, CELLS)
    torch.testing.assert_close(evaluated(model, known.roll(3, -1), 3), evaluated(model, known).roll(3, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", range(6))
def test_cells_that_do_not_exist_stay_zero(number):
    model = models((2, 4, 6), periodic=(False, False), homogeneous=False)[number]
    mask = torch.ones(4, 6)
    mask[1:3, 2] = 0
    known = torch.randn(2, 2, 2, 4, 6) * mask
    out = evaluated(model, known, mask=mask) if not isinstance(model, FGNModel) else None
    if out is None:
        model.mask.copy_(mask)
        out = model(known, torch.randn(2, 2, *model.noise_shape))
    assert (out[..., mask == 0] == 0).all() and (out[..., mask == 1] != 0).all()


def test_parameter_counts_are_made_equal():
    states = States((1, 1, CELLS), (False, True), 2, DeterministicModel((1, 1, CELLS), 2, (False, True), 2, SMALL | {"width": 32}))
    for recipe in (DeterministicRecipe, FGNRecipe, NextStateRecipe, FlowRecipe):
        made = of_size(recipe(width=32, depth=3, homogeneous=True), 60_000, states).network(states)
        assert abs(parameters(made) / 60_000 - 1) < 0.02
    with pytest.raises(UserError, match="cannot have 100 parameters"):
        of_size(FGNRecipe(width=32), 100, states)


@pytest.mark.parametrize("through_time", [True, False])
def test_gradients_of_a_rollout(through_time):
    """Through time: those of the composed map. Else: each step's with its input held fixed."""
    model = models()[1].double().requires_grad_(True)
    known, noise = torch.randn(2, 2, 1, 1, CELLS).double(), torch.randn(2, 3, *model.noise_shape).double()
    torch.testing.assert_close(model(known, noise), model(known, noise, None, False))
    states, total = list(known.unbind(1)), 0.0
    for step in range(3):
        given = torch.stack(states[-2:], 1)
        states.append(model(given if through_time else given.detach(), noise[:, step : step + 1])[:, 0])
        total = total + states[-1].square().sum()
    expected = torch.autograd.grad(total, list(model.parameters()))
    found = torch.autograd.grad(model(known, noise, None, through_time).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected)


# Laws that are known


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_flow_transports_noise_to_a_gaussian(method, order):
    """On straight paths to N(m, s^2), v = m + (u s^2 - (1 - u)) (x - u m) / ((1 - u)^2 + u^2 s^2) carries x to m + s x."""
    m, s, start = 0.7, 0.4, torch.linspace(-2, 2, 9, dtype=torch.float64)

    def velocity(x: Tensor, u: Tensor) -> Tensor:
        return m + (u * s**2 - (1 - u)) * (x - u * m) / ((1 - u) ** 2 + u**2 * s**2)

    errors = [(transport(velocity, start, n, method) - (m + s * start)).abs().max() for n in (32, 64)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.25 and errors[1] < 0.03


def test_an_untrained_denoiser_is_the_exact_one_of_increments_of_variance_one():
    """F = 0 leaves E[r | r + sigma n] = r_t / (1 + sigma^2); the sampler then draws increments N(0, scale^2)."""
    model = NextStateDenoiser((1, 1, CELLS), 2, (False, True), backbone=SMALL).double()
    x, sigma = torch.randn(5, 1, 1, CELLS).double(), torch.logspace(-2, 2, 5).double()
    expected = x / (1 + sigma**2)[:, None, None, None]
    torch.testing.assert_close(model(x, sigma, torch.randn(5, 2, 1, 1, CELLS).double()), expected)
    model.float().eval().scale.fill_(0.3)
    known = torch.zeros(1, 2, 1, 1, CELLS)
    for keywords, low, high in (({"churn": 0.0}, 0.97, 1.03), ({"churn_std": 1.0}, 0.97, 1.03), ({}, 1.0, 1.1)):
        out = NextStateDiffusion(checkpoint(model), batch=1000, **keywords).forecast(known, hours(2), 1, range(1000), 0)
        assert low < float(out.std()) / 0.3 < high and abs(float(out.mean())) < 0.02


class Autoregression:
    """x' = A x + e on the ring: half a step of rotation and damping, errors with a part that all cells share."""

    shared, own = 0.3, 0.4

    def __init__(self):
        eye = torch.eye(CELLS)
        self.matrix = 0.45 * (eye.roll(1, 0) + eye)

    def innovations(self, count: int, draw: torch.Generator) -> Tensor:
        return self.own * torch.randn(count, CELLS, generator=draw) + self.shared * torch.randn(count, 1, generator=draw)

    def sample(self, count: int, frames: int, seed: int) -> Tensor:
        draw, x, out = torch.Generator().manual_seed(seed), torch.zeros(count, CELLS), []
        for _ in range(frames + 40):
            x = x @ self.matrix.T + self.innovations(count, draw)
            out.append(x)
        return torch.stack(out[40:], 1)[:, :, None, None]


FAST = TrainingConfig(steps=240, batch=32, learning_rate=0.01, warmup=10, validate_every=0, checkpoint_every=0, validation_samples=64)


def data(fields: Tensor, held: Tensor, base: Checkpoint | None = None, spec: FieldSpec = RING) -> TrainingData:
    samples = [Sample(f, spec.step * torch.arange(f.shape[1], dtype=torch.float64)) for f in (fields, held)]
    normalizer = {"periods": [], "transforms": {}, "offsets": {}, "homogeneous": False}
    return TrainingData(spec, *samples, base, normalizer, {"experiment": None, "forcing_periods": []}, {"seed": 0})


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> dict[str, Checkpoint]:
    """Each family, trained for seconds on the autoregression."""
    law, here, found = Autoregression(), tmp_path_factory.mktemp("learned"), {}
    samples = law.sample(64, 60, 0), law.sample(16, 30, 1)
    common = {"width": 32, "depth": 1, "kernel": 7, "homogeneous": True, "history": 1}
    recipes = {
        "deterministic": DeterministicRecipe(**common),
        "fgn": FGNRecipe(**common, noise="both", rollouts=(1, 2), shares=(0.9, 0.1)),
        "next_state_diffusion": NextStateRecipe(**common),
        "flow_residual": FlowRecipe(**common),
    }
    for name, recipe in recipes.items():
        torch.manual_seed(0)
        prepared = recipe.prepare(data(*samples, found["deterministic"] if name == "flow_residual" else None))
        train(*prepared, FAST, here / name)
        found[name] = Checkpoint.load(here / name / "model")
    return found


@pytest.mark.parametrize("name", ["deterministic", "fgn", "next_state_diffusion", "flow_residual"])
def test_every_family_learns_a_linear_gaussian_law(learned, name):
    """Mean and spread of one step, and of a mean over the ring for those that draw whole states, against A x and the covariance."""
    law, one = Autoregression(), learned[name]
    starts = law.sample(12, 1, 2)
    keywords = {"churn_std": 1.0} if name == "next_state_diffusion" else {"noise_scale": 1.0} if name == "flow_residual" else {}
    runner = FORECASTERS[type(one.emulator)](one, batch=600, **keywords)
    out = runner.forecast(starts.repeat_interleave(50, 0), hours(1), 1, range(600), 0)[:, 0, 0, 0].unflatten(0, (12, 50))
    error = out.mean(1) - starts[:, 0, 0, 0] @ law.matrix.T
    deviation = math.hypot(law.own, law.shared)
    missed = float(error.square().mean().sqrt()) / deviation  # a mean over 50 members misses by 0.14 of itself
    assert missed < (0.45 if name == "fgn" else 0.3)
    if name == "deterministic":
        assert float(out.std(1).max()) == 0
        return
    assert abs(float(out.var(1).mean().sqrt()) / deviation - 1) < (0.25 if name == "fgn" else 0.12)
    if name != "fgn":  # trained by marginals, it need not know how cells go together
        shared = math.hypot(law.own / math.sqrt(CELLS), law.shared)
        assert abs(float(out.mean(2).var(1).mean().sqrt()) / shared - 1) < 0.2


def test_the_loop_tells_how_far_the_training_is(tmp_path):
    law, seen = Autoregression(), []
    recipe = DeterministicRecipe(width=8, depth=1, homogeneous=True, rollouts=(1, 3), shares=(0.5, 0.5))
    trainable, windows, held = recipe.prepare(data(law.sample(4, 20, 0), law.sample(2, 20, 1)))
    errors = trainable.errors

    def noted(model, batch, steps):
        seen.append(steps)
        return errors(model, batch, steps)

    trainable.errors = noted
    scores = train(trainable, windows, held, dataclasses.replace(FAST, steps=6, batch=2, validation_samples=2), tmp_path)
    assert seen[:6] == [1, 1, 1, 3, 3, 3] and set(scores) == {"rmse_1", "rmse_3"}


def test_rollouts():
    plan = Rollouts((1, 2, 4), (0.8, 0.1, 0.1))
    assert [plan.at(p) for p in (0.0, 0.79, 0.8, 0.89, 0.9, 1.0)] == [1, 1, 2, 2, 4, 4] and plan.longest == 4
    for steps, shares in (((), ()), ((1,), (0.5, 0.5)), ((0,), (1.0,)), ((1,), (0.0,))):
        with pytest.raises(UserError, match="rollouts"):
            Rollouts(steps, shares)


def test_losses_see_only_cells_that_exist():
    mask = torch.ones(4, 6)
    mask[1, 2] = 0
    spec = FieldSpec(
        (Variable("a"), Variable("b")), Grid(("y", "x"), tuple(range(4)), tuple(range(6))), 3600.0, tuple(map(tuple, mask.bool().tolist()))
    )
    fields = torch.randn(3, 12, 2, 4, 6, generator=torch.Generator().manual_seed(0)) * mask
    for recipe in (DeterministicRecipe(width=8), FGNRecipe(width=8), NextStateRecipe(width=8)):
        trainable, windows, _ = recipe.prepare(data(fields, fields, spec=spec))
        assert isinstance(trainable, EmulatorTraining) and torch.equal(trainable.model.mask, mask)
        batch = {"latents": torch.stack([windows[i]["latents"] for i in range(2)])}
        torch.nn.init.normal_(trainable.model.network.outputs.weight)
        before = trainable.loss(trainable.model, batch, SampleNoise(0, [0, 1]))["loss"]
        batch["latents"][:, trainable.model.history :, :, 1, 2] += 5.0
        torch.testing.assert_close(trainable.loss(trainable.model, batch, SampleNoise(0, [0, 1]))["loss"], before)
        batch["latents"][:, trainable.model.history :, :, 1, 3] += 5.0
        assert abs(trainable.loss(trainable.model, batch, SampleNoise(0, [0, 1]))["loss"] - before) > 0.001


# Forecasters


@pytest.mark.parametrize("number", range(6))
def test_saved_models_are_the_same_to_the_bit(number, tmp_path):
    model = models()[number]
    checkpoint(model).save(tmp_path / "model")
    loaded = Checkpoint.load(tmp_path / "model")
    assert type(loaded.emulator) is type(model) and loaded.forecaster == model.forecaster
    known = torch.randn(2, 2, 1, 1, CELLS)
    assert torch.equal(evaluated(loaded.emulator, known), evaluated(model, known))
    assert {p.suffix for p in (tmp_path / "model").rglob("*") if p.is_file()} == {".json", ".safetensors"}
    checkpoint(model).save(tmp_path / "half", half=True)
    torch.testing.assert_close(evaluated(Checkpoint.load(tmp_path / "half").emulator, known), evaluated(model, known), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("number", range(6))
def test_members_and_leads_are_prefixes(number):
    """A member does not depend on how many there are, nor on how far is forecast, nor on the batch."""
    runner, initial = forecaster(models()[number]), torch.randn(1, 2, 1, 1, CELLS)
    many = runner.forecast(initial, hours(2), 5, range(4), 7)
    few = forecaster(models()[number], batch=1).forecast(initial, hours(2), 3, range(2), 7)
    torch.testing.assert_close(many[:2, :3], few, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(runner.forecast(initial, hours(2), 5, [3], 7), many[3:], rtol=1e-4, atol=1e-4)
    same = bool((many[0] == many[1]).all())
    assert same == (runner.kind is DeterministicModel)


def test_members_cycle_over_models():
    first, second = models()[1], models(width=24)[1]
    initial = torch.randn(3, 2, 1, 1, CELLS)
    both = FGN([checkpoint(first), checkpoint(second)]).forecast(initial, hours(2), 2, range(3), 0)
    alone = [FGN(checkpoint(m)).forecast(initial, hours(2), 2, range(3), 0) for m in (first, second)]
    torch.testing.assert_close(both, torch.stack([alone[0][0], alone[1][1], alone[0][2]]))
    with pytest.raises(UserError, match="needs a model directory with a FGNModel, found DeterministicModel"):
        FGN(checkpoint(models()[0]))
    with pytest.raises(UserError, match="needs a model directory with a DeterministicModel, found none"):
        Deterministic(checkpoint(None))
    with pytest.raises(UserError, match="2 frames up to the initial time, found 1"):
        FGN(checkpoint(first)).forecast(initial[:, :1], hours(1), 2, range(3), 0)


def test_forcings_reach_every_network():
    settings = {"forcing_periods": [86400.0]}
    for model in models(forcings=2):
        if model.forcing is not None:
            torch.nn.init.normal_(model.network.blocks[0].modulation.linear.weight)
        keywords = {"steps": 3} if isinstance(model, NextStateDenoiser | ResidualFlow) else {}
        runner, initial = FORECASTERS[type(model)](checkpoint(model, settings=settings), **keywords), torch.randn(1, 2, 1, 1, CELLS)
        morning, evening = (runner.forecast(initial, hours(2) + np.timedelta64(h, "h"), 2, [0], 0) for h in (0, 12))
        assert not torch.allclose(morning, evening, atol=1e-3)


def test_persistence_and_climatology():
    initial, past = torch.randn(2, 3, 1, 1, CELLS), torch.randn(3, 48, 1, 1, CELLS)
    kept = Persistence().forecast(initial, hours(3), 4, range(3), 0)
    assert torch.equal(kept, initial[[0, 1, 0], -1:].expand(-1, 4, -1, -1, -1))
    dataset = RING.to_dataset(past, {"trajectory": range(3), "time": hours(48)})
    drawn = Climatology(dataset).forecast(initial, hours(3), 4, range(40), 0)
    pieces = past.unfold(1, 4, 1).movedim(-1, 2)
    assert all((pieces == row).all(dim=(2, 3, 4, 5)).any() for row in drawn) and len(torch.unique(drawn[:, 0, 0, 0, 0])) > 20
    assert torch.equal(Climatology(dataset).forecast(initial, hours(3), 4, [7], 0)[0], drawn[7])
    at_three = Climatology(dataset, cycle=86400.0, within=0.01).forecast(initial, hours(3), 4, range(20), 0)  # the first frame is at 3 h
    assert all((past[:, [3, 27], 0, 0] == row[0, 0, 0]).all(-1).any() for row in at_three)
    with pytest.raises(UserError, match="no stretch of 60"):
        Climatology(dataset).forecast(initial, hours(3), 60, range(2), 0)


def test_the_simulator_goes_on_as_the_truth_did():
    simulator = Lorenz96()
    truth = trajectories(simulator, 0, 2, 8, spinup=20)
    runner = SimulatorEnsemble(simulator)
    torch.testing.assert_close(runner.forecast(truth[:, :2], hours(2), 6, range(2), 0), truth[:, 2:])
    by_states = SimulatorEnsemble(simulator, truth[:, 1, 0, 0]).forecast(truth[:1, :1], hours(1), 6, range(2), 0)
    torch.testing.assert_close(by_states, truth[:, 2:])
    noisy = SimulatorEnsemble(Lorenz96(forcing_std=1.0, forcing_memory=0.5)).forecast(truth[:1], hours(8), 3, range(3), 0)
    assert (noisy[0] - noisy[1]).abs().max() > 0.01
    with pytest.raises(UserError, match="does not start from fields"):
        SimulatorEnsemble(GaussianProcess(n=8)).forecast(torch.zeros(1, 1, 1, 8, 8), hours(1), 2, range(2), 0)


# The command line


def run(directory: Path, *arguments: str) -> int:
    with contextlib.chdir(directory):
        return cli.main(list(arguments))


def command(directory: Path, *arguments: str) -> None:
    assert run(directory, *arguments) == 0, arguments


def refused(directory: Path, capsys, arguments: tuple[str, ...], message: str) -> None:
    capsys.readouterr()
    assert run(directory, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().count("appa-lite: error") == 1, error


SYSTEM = ("simulator=lorenz96", "size=debug")
TRAIN = ("train", "size=debug", "data=train.zarr", "training.steps=2", "training.batch=2")
TINY = ("trainable.width=8", "trainable.depth=1", "trainable.heads=2")
FORECAST = ("forecast", "size=debug", "initial=truth.zarr", "initial_time=2000-01-03", "lead=2d")


@pytest.fixture(scope="module")
def ring(tmp_path_factory) -> Path:
    """Lorenz-96, one model of each family in state space, and of one in latent space."""
    here = tmp_path_factory.mktemp("ring")
    command(here, "simulate", *SYSTEM, "frames=160", "spinup=20", "out=train.zarr")
    command(here, "simulate", *SYSTEM, "trajectories=1", "frames=12", "spinup=20", "seed=7", "out=truth.zarr")
    for name in ("deterministic", "fgn", "next_state_diffusion"):
        command(here, *TRAIN, *TINY, f"trainable={name}", f"run={name}")
    command(here, *TRAIN, *TINY, "trainable=flow_residual", "autoencoder=deterministic/model", "run=flow_residual")
    small = ("trainable.stride=[2,1,4]", "trainable.width=8", "trainable.depth=1")
    command(here, *TRAIN, *small, "trainable=autoencoder", "window=2", "run=autoencoder")
    command(here, *TRAIN, *TINY, "trainable=fgn", "trainable.noise=both", "autoencoder=autoencoder/model", "run=latent")
    return here


@pytest.mark.parametrize("name", ["deterministic", "fgn", "next_state_diffusion", "flow_residual", "latent"])
def test_the_command_line_forecasts_with_whatever_was_trained(ring, name, tmp_path):
    words = (*FORECAST, f"checkpoint={name}/model", "history=4")
    command(ring, *words, f"out={tmp_path / 'few.nc'}")
    command(ring, *words, "members=5", "batch=3", f"out={tmp_path / 'many.nc'}")
    few, many = (open_dataset(tmp_path / f"{n}.nc").load() for n in ("few", "many"))
    assert few.sizes == {"time": 1, "prediction_timedelta": 9, "number": 1 if "members" in FORECAST else few.sizes["number"], "x": 40}
    assert np.isfinite(many.u.values).all()
    np.testing.assert_allclose(many.u.values[:, :, : few.sizes["number"]], few.u.values, rtol=1e-3, atol=1e-3)
    truth = open_dataset(ring / "truth.zarr").load().u.sel(trajectory=0, time="2000-01-03T00")
    np.testing.assert_allclose(few.u.values[0, 0, 0], truth, rtol=1e-6)
    assert json.loads(few.attrs["configuration"])["command"] == "forecast"
    model = Checkpoint.load(ring / name / "model")
    assert model.settings["emulator"]["parameters"] == parameters(model.emulator) and model.climatology is not None


def test_other_forecasters_at_the_command_line(ring, tmp_path):
    both = f"checkpoint=[{ring / 'fgn/model'},{ring / 'fgn/model'}]"
    command(ring, *FORECAST, both, f"out={tmp_path / 'both.nc'}")
    command(ring, *FORECAST, "forecaster=persistence", f"out={tmp_path / 'kept.nc'}")
    command(ring, *FORECAST, "forecaster=climatology", "forecaster.data=train.zarr", f"out={tmp_path / 'past.nc'}")
    command(ring, *FORECAST, "forecaster=simulator_ensemble", "simulator=lorenz96", f"out={tmp_path / 'oracle.nc'}")
    command(ring, *FORECAST, "checkpoint=next_state_diffusion/model", "forecaster.steps=3", f"out={tmp_path / 'quick.nc'}")
    oracle, truth = open_dataset(tmp_path / "oracle.nc").load(), open_dataset(ring / "truth.zarr").load()
    known = truth.u.isel(trajectory=0).sel(time=slice("2000-01-03", None)).values[:4]
    np.testing.assert_allclose(oracle.u.values[0, : len(known), 0], known, rtol=1e-3, atol=1e-3)
    kept = open_dataset(tmp_path / "kept.nc").load()
    assert (kept.u.values == kept.u.values[:, :1]).all()
    assert isinstance(open_dataset(tmp_path / "both.nc"), xr.Dataset)


def test_from_python(ring, tmp_path):
    command(ring, *FORECAST, "checkpoint=fgn/model", "members=2", f"out={tmp_path / 'file.nc'}")
    truth = open_dataset(ring / "truth.zarr").load()
    out = appa_lite.load(ring / "fgn/model").forecast(truth, "initial_time=2000-01-03", lead="2d", members=2)
    np.testing.assert_array_equal(out.u.values, open_dataset(tmp_path / "file.nc").load().u.values)


def test_mistakes_at_the_command_line(ring, capsys):
    out = ("out=n.nc",)
    refused(ring, capsys, (*FORECAST, *out), "forecast needs checkpoint=")
    refused(ring, capsys, (*FORECAST, *out, "checkpoint=autoencoder/model"), "autoencoder only")
    refused(ring, capsys, (*FORECAST, *out, "checkpoint=fgn/model", "forecaster=latent_diffusion"), "needs one model directory")
    refused(ring, capsys, (*FORECAST, *out, "checkpoint=fgn/model", "forecaster=deterministic"), "found FGNModel")
    refused(ring, capsys, (*FORECAST, *out, "checkpoint=fgn/model", "history=1"), "give history=2")
    refused(ring, capsys, (*FORECAST, *out, "checkpoint=fgn/model", "forecaster.steps=3"), "unknown keyword of FGN 'steps'")
    refused(ring, capsys, (*TRAIN, "trainable=flow_residual", "run=n"), "needs autoencoder=DIR")
    refused(ring, capsys, (*TRAIN, "trainable=fgn", "trainable.noise=loud", "run=n"), "noise=loud is not known")
    refused(ring, capsys, (*TRAIN, "trainable=fgn", "trainable.members=1", "run=n"), "members=1 must be at least 2")
    refused(ring, capsys, (*TRAIN, "trainable=fgn", "trainable.rollouts=[90]", "trainable.shares=[1]", "run=n"), "longer than the data")
    refused(ring, capsys, (*TRAIN, "trainable=deterministic", "trainable.patch=[1,3]", "run=n"), "not a multiple of the patch")
    assert not (ring / "n.nc").exists() and not (ring / "n" / "model").exists()


def test_streams_and_members_agree():
    """What a forecaster draws for a member is the stream of that member."""
    model = models()[1]
    noise = Streams(5, [2], "forecast").normal((1, *model.noise_shape))
    known = torch.randn(1, 2, 1, 1, CELLS)
    expected = model(known, noise)[:, 0]
    torch.testing.assert_close(FGN(checkpoint(model)).forecast(known, hours(2), 1, [2], 5)[:, 0], expected)
    assert isinstance(FGNRecipe().training(model, checkpoint(model), {}), FGNTraining)
