"""Samplers: on a Gaussian each is an affine map of its noises, so that the law of its output is known without sampling."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from appa_lite import cli
from appa_lite.core.errors import UserError
from appa_lite.diffusion.base import Sampler
from appa_lite.diffusion.samplers import DDIM, DPMSolverPP2M, DPMSolverPP2S, ExponentialAdamsBashforth, Heun, PredictorCorrector
from appa_lite.diffusion.samplers.exponential import weights
from appa_lite.diffusion.schedule import karras_levels, noise_levels

#: modes as different as those of a field: variances over six decades
HIGH, MIDDLE, LOW = 1000.0, 0.1, 0.003
VARIANCE = torch.logspace(math.log10(4e-4), math.log10(162), 7, dtype=torch.float64)
MEAN = torch.ones_like(VARIANCE)

#: by the number of denoiser evaluations, or one less
AT_EVALUATIONS: dict[str, Callable[[int, float, float], Sampler]] = {
    "DDPM": lambda n, high, low: DDIM(n, high, low, eta=1.0),
    "DDIM": lambda n, high, low: DDIM(n, high, low),
    "Heun": lambda n, high, low: Heun(n // 2, high, low),
    "DPM-Solver++ 2S": lambda n, high, low: DPMSolverPP2S(n // 2, high, low),
    "DPM-Solver++ 2S, churn 2.5": lambda n, high, low: DPMSolverPP2S(n // 2, high, low, churn=2.5),
    "DPM-Solver++ 2M": lambda n, high, low: DPMSolverPP2M(n, high, low, eta=0.0),
    "SDE-DPM-Solver++ 2M": lambda n, high, low: DPMSolverPP2M(n, high, low, eta=1.0),
    "exponential Adams-Bashforth 3": lambda n, high, low: ExponentialAdamsBashforth(n, high, low),
    "exponential Adams-Bashforth 4": lambda n, high, low: ExponentialAdamsBashforth(n, high, low, order=4),
    "predictor-corrector": lambda n, high, low: PredictorCorrector(n // 2, high, low),
}
ALL = [(make, name) for name, make in AT_EVALUATIONS.items()]


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x | x_t] for independent modes N(MEAN, VARIANCE)."""
    return MEAN + VARIANCE / (VARIANCE + sigma**2) * (x - MEAN)


def affine(sampler: Sampler, denoiser: Callable, start: Callable[[Tensor], Tensor] = lambda first: first) -> tuple[Tensor, Tensor]:
    """Mean and standard deviations of the output for independent modes: one member per noise gives its coefficients."""
    count = itertools.count()
    sampler(denoiser, lambda draw: next(count) * torch.zeros(1, len(VARIANCE), dtype=torch.float64))
    draws = next(count)

    def noise(draw: int) -> Tensor:
        members = torch.zeros(1 + draws, len(VARIANCE), dtype=torch.float64)
        members[1 + draw] = 1.0
        return start(members) if draw == 0 else members

    sample = sampler(denoiser, noise)
    return sample[0], (sample[1:] - sample[0]).square().sum(0).sqrt()


def spread_error(sampler: Sampler) -> float:
    """Largest relative error of a standard deviation, when the first level has the right law: of the steps alone."""
    high, low = sampler.levels[[0, -2]]
    mean, std = affine(sampler, gaussian, lambda first: first * (1 + VARIANCE / high**2).sqrt() + MEAN / high)
    torch.testing.assert_close(mean, MEAN, rtol=1e-9, atol=1e-9)
    return float((std / (VARIANCE / (VARIANCE + low**2).sqrt()) - 1).abs().max())


# Orders of convergence


@pytest.mark.parametrize(
    ("order", "sampler"),
    [
        (1, lambda n: DDIM(n, HIGH, MIDDLE, eta=1.0)),
        (1, lambda n: DDIM(n, HIGH, MIDDLE)),
        (1, lambda n: PredictorCorrector(n, HIGH, MIDDLE, delta=4 / n)),
        (2, lambda n: Heun(n, HIGH, MIDDLE)),
        (2, lambda n: DPMSolverPP2S(n, HIGH, MIDDLE)),
        (2, lambda n: DPMSolverPP2S(n, HIGH, MIDDLE, churn=2.5)),
        (2, lambda n: DPMSolverPP2M(n, HIGH, MIDDLE, eta=0.0)),
        (2, lambda n: DPMSolverPP2M(n, HIGH, MIDDLE, eta=0.0, schedule="edm")),
        (2, lambda n: DPMSolverPP2M(n, HIGH, MIDDLE, eta=1.0)),
        (2, lambda n: DPMSolverPP2M(n, HIGH, MIDDLE, eta=1.0, schedule="edm")),
        (2, lambda n: ExponentialAdamsBashforth(n, HIGH, MIDDLE, order=2)),
        (3, lambda n: ExponentialAdamsBashforth(n, HIGH, MIDDLE)),
        (3, lambda n: ExponentialAdamsBashforth(3 * n, HIGH, MIDDLE, schedule="edm")),
        (4, lambda n: ExponentialAdamsBashforth(n, HIGH, MIDDLE, order=4)),
    ],
)
def test_order_of_convergence(order, sampler):
    errors = [spread_error(sampler(1 + n)) for n in (64, 128, 256)]
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(order - 0.2 < found < order + 0.25 for found in measured), (measured, errors)


def test_third_order_errors_cancel_over_the_whole_range():
    """What is lost above sigma = std is gained below it, at equal ratios of the levels."""
    errors = [spread_error(ExponentialAdamsBashforth(1 + n, HIGH, LOW)) for n in (32, 64, 128)]
    assert all(3.7 < math.log2(a / b) < 4 for a, b in itertools.pairwise(errors)), errors


def test_spread_that_first_order_loses():
    """h/2 by DDPM, h/4 by DDIM, and 0.06 h^2 gained by 2M, for every mode."""
    steps = 200
    h = math.log(HIGH / LOW) / steps
    assert spread_error(DDIM(1 + steps, HIGH, LOW, eta=1.0)) == pytest.approx(h / 2, rel=0.1)
    assert spread_error(DDIM(1 + steps, HIGH, LOW)) == pytest.approx(h / 4, rel=0.1)
    assert spread_error(DPMSolverPP2M(1 + steps, HIGH, LOW, eta=0.0)) == pytest.approx(0.0625 * h**2, rel=0.1)


@pytest.mark.parametrize(("eta", "error"), [(0.0, 1 / HIGH), (1.0, 0.0)])
def test_the_first_level_costs_an_ode_the_mean_over_sigma_max(eta, error):
    """In standard deviations; a stochastic sampler forgets where it started."""
    mean, _ = affine(DPMSolverPP2M(200, HIGH, LOW, eta), gaussian)
    missing = (MEAN - mean) / VARIANCE.sqrt()
    torch.testing.assert_close(missing, torch.full_like(MEAN, error), rtol=0.05, atol=0.03 / HIGH)


def test_the_last_level_costs_spread():
    """(1 + sigma_min^2 / variance)^(-1/2) of it, which is the rule for sigma_min."""
    _, std = affine(DPMSolverPP2M(400, HIGH, LOW, eta=1.0), gaussian)
    assert LOW / float(VARIANCE[0].sqrt()) == pytest.approx(0.15)
    assert float(std[0] / VARIANCE[0].sqrt()) == pytest.approx((1 + 0.15**2) ** -0.5, abs=1e-3)


def test_correctors_alone_end_at_the_law_of_their_level():
    q, b = math.sqrt(1 - 0.2), 1 / (VARIANCE + 1)
    _, std = affine(PredictorCorrector(2, 40.0, 1.0, corrections=400, delta=0.2), gaussian)
    limit = ((1 + q) / (2 - b * (1 - q))).sqrt()
    assert 0.02 < 1 - limit.min() < 0.2 / 8 * 1.1
    soon = VARIANCE < 1  # larger modes take longer to forget
    torch.testing.assert_close((std / (VARIANCE / (VARIANCE + 1).sqrt()))[soon], limit[soon], rtol=1e-6, atol=0)


# A posterior: 40 points of a non-stationary Gaussian process, a tenth of them observed with an error of 0.1


def condition() -> tuple[Tensor, Tensor]:
    """Mean and covariance of a Matern-3/2 process of lengths 0.03 to 0.3 and deviations 0.5 to 1.5, given four values."""
    place = torch.linspace(0, 1, 40, dtype=torch.float64)
    length, scale = 0.03 + 0.27 * place, 0.5 + place
    mixed = ((length[:, None] ** 2 + length**2) / 2).sqrt()
    distance = 3**0.5 * (place[:, None] - place).abs() / mixed
    prior = (length[:, None] * length).sqrt() / mixed * (1 + distance) * torch.exp(-distance) * scale[:, None] * scale
    seen = torch.arange(3, 40, 10)
    gain = torch.linalg.solve(prior[seen][:, seen] + 0.01 * torch.eye(4, dtype=torch.float64), prior[seen]).T
    return gain @ torch.tensor([0.8, -0.5, 0.3, 1.2], dtype=torch.float64), prior - gain @ prior[seen]


CENTRE, POSTERIOR = condition()
EIGENVALUES, AXES = torch.linalg.eigh(POSTERIOR)
SMALLEST = float(0.15 * EIGENVALUES[0].sqrt())


def posterior_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    return CENTRE + torch.linalg.solve(POSTERIOR + sigma**2 * torch.eye(40, dtype=torch.float64), (x - CENTRE).T).T @ POSTERIOR


def accuracy(sampler: Sampler) -> tuple[float, float, float]:
    """Mean error in standard deviations, ratio of spreads, and Bures-Wasserstein distance in rms standard deviations."""
    count = itertools.count()
    sampler(posterior_denoiser, lambda draw: next(count) * torch.zeros(1, 40, dtype=torch.float64))
    draws = next(count)

    def noise(draw: int) -> Tensor:
        members = torch.zeros(1 + draws, 40, 40, dtype=torch.float64)
        members[1 + draw] = torch.eye(40, dtype=torch.float64)
        return members.flatten(0, 1)

    sample = sampler(posterior_denoiser, noise)
    mean, factor = sample[0], sample[40:] - sample[0]
    covariance = factor.T @ factor
    root = (AXES * EIGENVALUES.sqrt()) @ AXES.T
    common = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    distance = (mean - CENTRE).square().sum() + covariance.trace() + POSTERIOR.trace() - 2 * common
    variance = POSTERIOR.diagonal()
    spread = (covariance.diagonal() / variance).mean().sqrt()
    error = ((mean - CENTRE).square() / variance).mean().sqrt()
    return float(error), float(spread), float((distance.clamp(min=0) / POSTERIOR.trace()).sqrt())


@pytest.mark.parametrize(
    ("sampler", "evaluations", "distance", "spread"),
    [
        ("exponential Adams-Bashforth 3", 16, 0.02, 0.015),
        ("exponential Adams-Bashforth 3", 32, 0.005, 0.003),
        ("DPM-Solver++ 2M", 16, 0.04, 0.04),
        ("DPM-Solver++ 2M", 32, 0.015, 0.012),
        ("SDE-DPM-Solver++ 2M", 32, 0.03, 0.03),
    ],
)
def test_accuracy_at_few_evaluations(sampler, evaluations, distance, spread):
    error, ratio, found = accuracy(AT_EVALUATIONS[sampler](evaluations, HIGH, SMALLEST))
    assert error < CENTRE.norm() / HIGH and found <= distance and abs(ratio - 1) <= spread


@pytest.mark.slow
def test_table_of_accuracy():
    """Prints, with ``pytest -s``, the table of distances and spreads against the number of evaluations."""
    budgets = (16, 32, 64, 128)
    print("\n| sampler | " + " | ".join(f"{n}" for n in budgets) + " |\n" + "|---" * 5 + "|")
    for name, make in AT_EVALUATIONS.items():
        found = [accuracy(make(n, HIGH, SMALLEST)) for n in budgets]
        print(f"| {name} | " + " | ".join(f"{distance:.4f} / {spread:.4f}" for _, spread, distance in found) + " |")
        distances = [distance for *_, distance in found]
        assert all(b < a for a, b in itertools.pairwise(distances)) or distances[-1] < 2e-3


# Against another implementation, and identities


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (lambda n, *range: DDIM(n, *range), "DDIMSampler", {}),
        (lambda n, *range: DDIM(n, *range, eta=1.0), "DDPMSampler", {}),
        (lambda n, *range: Heun(n, *range), "HeunSampler", {}),
        *[(lambda n, *range, k=k: ExponentialAdamsBashforth(n, *range, order=k), "zEABSampler", {"order": k}) for k in (1, 2, 3, 4)],
    ],
)
def test_azula_agrees(ours, theirs, options):
    """On a denoiser that is not linear. Its samplers stop at sigma_min, where ours denoise once more."""
    sample = pytest.importorskip("azula.sample")
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VESchedule

    def mean(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x / (1 + sigma)) + x.roll(1, -1) / (2 + sigma**2)

    class Nonlinear(Denoiser):
        schedule = VESchedule(0.01, 100.0)

        def forward(self, x_t: Tensor, t: Tensor) -> DiracPosterior:
            return DiracPosterior(mean(x_t, self.schedule.sigma(t)))

    steps, shape = 12, (5, 7)
    torch.manual_seed(0)
    start = torch.randn(shape, dtype=torch.float64)
    reference = getattr(sample, theirs)(Nonlinear(), steps=steps, silent=True, dtype=torch.float64, **options)(100.0 * start)
    torch.manual_seed(0)
    found = ours(1 + steps, 100.0, 0.01)(mean, lambda draw: torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(found, mean(reference, torch.tensor(0.01, dtype=torch.float64)), rtol=1e-6, atol=1e-6)


def test_first_order_adams_bashforth_is_ddim():
    start = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = ExponentialAdamsBashforth(9, HIGH, LOW, order=1)(gaussian, lambda draw: start)
    torch.testing.assert_close(first, DDIM(9, HIGH, LOW)(gaussian, lambda draw: start), rtol=1e-10, atol=1e-10)


def test_weights_integrate_polynomials_of_the_log_level():
    known, after = [torch.tensor(s, dtype=torch.float64) for s in (5.0, 2.0, 1.5)], torch.tensor(0.7, dtype=torch.float64)
    u = torch.linspace(math.log(1.5), math.log(0.7), 20001, dtype=torch.float64)
    for power in range(3):
        found = sum(w * s.log() ** power for w, s in zip(weights(known, after), known, strict=True))
        assert float(found) == pytest.approx(float(torch.trapezoid(u.exp() * u**power, u)), abs=1e-8)


# What all share


@pytest.mark.parametrize(("sampler", "name"), ALL, ids=AT_EVALUATIONS)
def test_the_law_of_a_point_is_reached_in_any_number_of_steps(sampler, name):
    for evaluations in (4, 11):
        sample = sampler(evaluations, HIGH, LOW)(lambda x, sigma: torch.full_like(x, 3.0), lambda draw: torch.ones(4, 1))
        assert torch.equal(sample, torch.full((4, 1), 3.0))


@pytest.mark.parametrize(("sampler", "name"), ALL, ids=AT_EVALUATIONS)
def test_evaluations_draws_and_progress(sampler, name):
    made, seen, drawn, told = sampler(14, HIGH, LOW), [], [], []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.dtype == x.dtype == torch.float32
        seen.append(float(sigma))
        return x / (1 + sigma**2)

    made(denoiser, lambda draw: drawn.append(draw) or torch.ones(1, 1), lambda *now: told.append(now))
    assert len(seen) == (14 if made.steps == 14 else 13)
    assert seen[0] == pytest.approx(HIGH * getattr(made, "growth", 1)) and seen[-1] == pytest.approx(LOW)
    assert told == [(i + 1, made.steps) for i in range(made.steps)]
    noisy = any(word in name for word in ("DDPM", "SDE", "churn", "corrector"))
    assert drawn == list(range(made.steps if noisy else 1))  # every draw has a number of its own


def test_churn_is_added_within_its_levels_only():
    made, seen = DPMSolverPP2S(9, 100.0, 0.01, churn=1.8, churn_min=0.5, churn_max=20.0), []
    made(lambda x, sigma: seen.append(float(sigma)) or x / (1 + sigma**2), lambda draw: torch.ones(1, 1, dtype=torch.float64))
    expected = [float(s) * (1.2 if 0.5 <= s <= 20 else 1) for s in made.levels[:-2]]
    assert seen[:-1:2] == pytest.approx(expected)


def test_a_sample_that_diverged_is_an_error():
    with pytest.raises(FloatingPointError, match="diverged"):
        DPMSolverPP2M(4, HIGH, LOW)(lambda x, sigma: x * torch.nan, lambda draw: torch.ones(1, 1))
    with pytest.raises(FloatingPointError, match=r"diverged \(largest value .*choose another guidance"):  # finite, and nonsense
        DPMSolverPP2M(4, HIGH, LOW)(lambda x, sigma: 1000 * HIGH + x, lambda draw: torch.ones(1, 1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ExponentialAdamsBashforth(order=0), "at least 1, found 0"),
        (lambda: PredictorCorrector(delta=1.5), r"within \[0, 1\], found 1 and 1.5"),
        (lambda: DDIM(schedule="linear"), "unknown schedule 'linear' .* log_uniform, edm"),
        (lambda: DDIM(eta=2.0), "eta within"),
        (lambda: DPMSolverPP2S(churn=-1.0), "churn"),
    ],
)
def test_mistakes_of_a_user(make, reason):
    with pytest.raises(UserError, match=reason):
        make()


# Noise levels


@pytest.mark.parametrize("schedule", ["log_uniform", "edm"])
def test_levels_fall_from_the_highest_to_the_lowest_to_zero(schedule):
    values = noise_levels(schedule, 9, 80.0, 0.01)
    assert values.shape == (10,) and values.dtype == torch.float64
    torch.testing.assert_close(values[[0, 8, 9]], torch.tensor([80.0, 0.01, 0.0], dtype=torch.float64))
    assert (values.diff() < 0).all()


def test_log_uniform_levels_have_equal_ratios():
    values = noise_levels("log_uniform", 6, 80.0, 0.01)[:-1]
    torch.testing.assert_close(values[1:] / values[:-1], torch.full((5,), (0.01 / 80) ** 0.2, dtype=torch.float64))


def test_karras_levels_are_equally_spaced_in_their_root():
    roots = karras_levels(6, 80.0, 0.01, rho=5.0)[:-1] ** 0.2
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(5))


@pytest.mark.parametrize("schedule", ["log_uniform", "edm"])
@pytest.mark.parametrize("arguments", [(1, 80.0, 0.01), (8, 0.01, 80.0), (8, 80.0, 0.0), (8, 1.0, 1.0)])
def test_impossible_levels(schedule, arguments):
    with pytest.raises(UserError, match="at least two steps"):
        noise_levels(schedule, *arguments)


# Through the command line


def test_a_reanalysis_with_another_sampler(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ring = ["experiment=lorenz96", "size=debug"]
    assert cli.main(["simulate", *ring, "trajectories=1", "frames=12", "spinup=20", "start=2010-01-01", "out=truth.zarr"]) == 0
    assert cli.main(["observe", *ring, "truth=truth.zarr", "out=observations.parquet"]) == 0
    prior = Path(__file__).parents[1] / "checkpoints" / "lorenz96"
    reanalysis = ["reanalysis", *ring, f"checkpoint={prior}", "observations=observations.parquet", "sampler.steps=4"]
    for sampler in ("eab3", "heun"):
        assert cli.main([*reanalysis, f"sampler={sampler}", "sampler.schedule=edm", f"out={sampler}.nc"]) == 0
    with xr.open_dataset("eab3.nc", engine="h5netcdf") as one, xr.open_dataset("heun.nc", engine="h5netcdf") as other:
        name = next(iter(one.data_vars))
        assert np.isfinite(one[name]).all() and not np.array_equal(one[name], other[name])
    capsys.readouterr()
    assert cli.main([*reanalysis, "sampler=ddim", "sampler.schedule=linear", "out=none.nc"]) == 2
    assert "unknown schedule 'linear'" in capsys.readouterr().err and not Path("none.nc").exists()
