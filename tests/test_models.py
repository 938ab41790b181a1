"""What is trained and saved: normaliser, autoencoder, denoiser and their directory, as theorems where there is one."""

import dataclasses
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from appa_lite.core.covariance import SpaceTimeCovariance
from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec, Grid, Variable
from appa_lite.models.autoencoder import SpatiotemporalAutoencoder
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.normalizer import Normalizer

DAY = 86400.0


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# Normalizer


@pytest.fixture
def normalizer() -> Normalizer:
    """Two variables with a daily harmonic, the second an amount."""
    model = Normalizer((2, 3, 4), periods=[DAY], transforms=["identity", "log1p"], offsets=[1.0, 0.2]).double()
    model.coefficients.copy_(torch.randn(3, 2, 3, 4))
    model.coefficients[:, 1] *= 0.1
    model.coefficients[0, 1] += 2.0
    model.scale.copy_(torch.tensor([3.0, 0.4]))
    return model


def amounts(*shape: int) -> torch.Tensor:
    fields = torch.randn(*shape, 2, 3, 4, dtype=torch.float64)
    fields[..., 1, :, :] = fields[..., 1, :, :].exp()
    return fields


TIMES = torch.arange(5, dtype=torch.float64) * 3 * 3600 + 1.5e9


def test_normalizer_and_its_inverse(normalizer):
    fields = amounts(2, 5)
    torch.testing.assert_close(normalizer.inverse(normalizer(fields, TIMES), TIMES), fields)
    assert (normalizer.inverse(torch.randn(1, 5, 2, 3, 4).double() * 20, TIMES)[:, :, 1] >= 0).all()


def test_normalizer_is_zero_outside_the_mask(normalizer):
    normalizer.mask[1, 2] = 0
    normal = normalizer(amounts(2, 5), TIMES)
    assert not normal[..., 1, 2].any() and (normal[..., 0, 0] != 0).all()


def test_normalizer_derivative_is_autograds(normalizer):
    z = torch.randn(2, 5, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(normalizer.inverse(z, TIMES).sum(), z)
    normalizer.requires_grad_(False)
    amount = normalizer.untransform(z.detach() * normalizer.scale[:, None, None] + normalizer.climatology(TIMES))
    positive = (amount > 0) | (torch.arange(2)[:, None, None] == 0)
    assert positive.double().mean() > 0.9
    torch.testing.assert_close(normalizer.derivative(z.detach(), TIMES)[positive], gradient[positive])


def test_normalizer_finds_a_known_harmonic():
    times = torch.arange(80, dtype=torch.float64) * 3 * 3600
    mean, cosine, sine = torch.randn(3, 1, 2, 3, dtype=torch.float64)
    angle = 2 * math.pi * times[:, None, None, None] / DAY
    noise = torch.randn(4, 80, 1, 2, 3, dtype=torch.float64)
    noise -= noise.mean((0, 1))
    fields = 280 + mean + 5 * cosine * angle.cos() + 5 * sine * angle.sin() + 0.01 * noise
    model = Normalizer((1, 2, 3), periods=[DAY]).double().fit(fields, times, torch.ones(2, 3))
    torch.testing.assert_close(model.coefficients[1], 5 * cosine, atol=5e-3, rtol=0)
    torch.testing.assert_close(model.coefficients[2], 5 * sine, atol=5e-3, rtol=0)
    torch.testing.assert_close(model.coefficients[0], 280 + mean, atol=5e-3, rtol=0)
    assert abs(float(model.scale) / 0.01 - 1) < 0.05
    again = model(fields, times)
    assert abs(float(again.std()) - 1) < 1e-3


def test_a_homogeneous_climatology_is_that_of_all_cells_pooled():
    torch.manual_seed(0)
    fields, times = torch.randn(4, 60, 1, 2, 5, dtype=torch.float64), torch.arange(60.0, dtype=torch.float64) * DAY / 7
    mask = torch.ones(2, 5)
    mask[0, 1] = 0
    model = Normalizer((1, 2, 5), periods=[DAY]).double().fit(fields, times, mask, homogeneous=True)
    pooled = Normalizer((1, 1, 1), periods=[DAY]).double()
    pooled.fit(fields[..., mask.bool()].permute(3, 0, 1, 2).reshape(-1, 60, 1, 1, 1), times, torch.ones(1, 1))
    torch.testing.assert_close(model.coefficients, pooled.coefficients.expand_as(model.coefficients))
    torch.testing.assert_close(model.scale, pooled.scale)


def test_normalizer_ignores_cells_outside_the_mask_in_its_scale():
    mask = torch.tensor([[1.0, 0.0]])
    fields = torch.randn(3, 50, 1, 1, 2, dtype=torch.float64) * torch.tensor([2.0, 100.0])
    model = Normalizer((1, 1, 2)).double().fit(fields, torch.arange(50.0, dtype=torch.float64), mask)
    assert abs(float(model.scale) - float(fields[..., 0].std(correction=0))) < 1e-6


def test_transforms_that_cannot_be():
    with pytest.raises(ValueError, match="transforms must be 2 of"):
        Normalizer((2, 3, 4), transforms=["identity", "log2"])
    with pytest.raises(ValueError, match="transforms must be 2 of"):
        Normalizer((2, 3, 4), transforms=["identity"])


# Autoencoder


def autoencoder(periodic: tuple[bool, bool] = (False, False), **settings) -> SpatiotemporalAutoencoder:
    defaults = {"shape": (2, 8, 12), "stride": (2, 4, 4), "channels": 5, "width": 8, "depth": 1, "lap": 3}
    return SpatiotemporalAutoencoder(**defaults | settings, periodic=periodic).double().requires_grad_(False)


def scramble(*layers: torch.nn.Module) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)


def smooth_fields(n: int = 3, frames: int = 8) -> torch.Tensor:
    return torch.randn(n, frames, 2, 8, 12, dtype=torch.float64).cumsum(1).cumsum(-1)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (9.0, 1.0)])
def test_the_autoencoder_starts_as_the_principal_components_of_patches(weights):
    model, fields = autoencoder(), smooth_fields()
    model.start_from_components(fields, torch.tensor(weights))
    weight = torch.tensor(weights).double().sqrt().repeat_interleave(32)
    patches = model.patches(fields).reshape(-1, 64) * weight
    values, vectors = torch.linalg.eigh(patches.T @ patches)
    leading = vectors[:, -5:]
    error = (model.patches(model(fields)).reshape(-1, 64) * weight - patches).square().sum()
    torch.testing.assert_close(error, values[:-5].sum(), rtol=1e-5, atol=0)  # the weights of the transforms were rounded once
    expected = model.unpatch((patches @ leading @ leading.T / weight).reshape(3, 4, 2, 3, 64))
    torch.testing.assert_close(model(fields), expected, rtol=1e-4, atol=1e-4)


def test_decode_linear_is_the_linear_part():
    model = autoencoder()
    scramble(model.synthesis)
    model.latent_mean.copy_(torch.randn(5))
    model.latent_std.copy_(torch.rand(5) + 0.5)
    a, b = torch.randn(2, 2, 4, 5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(model.decode_linear(2 * a - 3 * b), 2 * model.decode_linear(a) - 3 * model.decode_linear(b))
    torch.testing.assert_close(model.decode(a) - model.decode(b), model.decode_linear(a - b))  # the correction is zero
    scramble(model.decoder)
    assert not torch.allclose(model.decode(a) - model.decode(b), model.decode_linear(a - b), atol=1e-3)


def test_one_latent_frame_reaches_its_neighbours_only():
    model = autoencoder()
    scramble(model.synthesis)
    impulse = torch.zeros(1, 7, 5, 2, 3, dtype=torch.float64)
    impulse[:, 3] = 1
    touched = model.decode_linear(impulse).abs().sum((0, 2, 3, 4)).reshape(7, 2).sum(1).nonzero().flatten().tolist()
    assert touched == list(range(3 - model.reach, 3 + model.reach + 1))


def test_frames_that_were_trained_alone_are_decoded_alone():
    """After windows of one latent frame neighbours are forgotten: nothing changes for one frame, and many are as each."""
    model = autoencoder(depth=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        fields = torch.randn(3, 2, 2, 8, 12)  # three windows of one latent frame
        before = model(fields)
        together = fields.reshape(1, 6, 2, 8, 12)
        assert not torch.allclose(model(together).reshape(before.shape), before, atol=1e-3)
        model.forget_neighbours()
        torch.testing.assert_close(model(fields), before, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(together).reshape(before.shape), before, atol=1e-4, rtol=1e-4)
        latents = model.encode(together)
        torch.testing.assert_close(model.decode_linear(latents)[:, 2:4], model.decode_linear(latents[:, 1:2]), atol=1e-4, rtol=1e-4)


def test_a_periodic_autoencoder_moves_with_its_input():
    model, fields = autoencoder((True, True), lap=3), smooth_fields()
    scramble(model.analysis, model.synthesis, model.encoder, model.decoder)
    latents = model.encode(fields)
    moved = fields.roll((4, 8), (-2, -1))
    torch.testing.assert_close(model.encode(moved), latents.roll((1, 2), (-2, -1)))
    torch.testing.assert_close(model(moved), model(fields).roll((4, 8), (-2, -1)))
    walled = autoencoder()
    walled.load_state_dict(model.state_dict())
    assert not torch.allclose(walled(moved), walled(fields).roll((4, 8), (-2, -1)), atol=1e-3)


def test_cells_outside_the_mask_are_neither_seen_nor_made():
    model, fields = autoencoder(), smooth_fields()
    scramble(model.analysis, model.synthesis, model.encoder, model.decoder)
    model.mask[2:5, 3:6] = 0
    other = fields.clone()
    other[..., 2:5, 3:6] = 1e3
    assert torch.equal(model.encode(fields), model.encode(other))
    assert not model(fields)[..., 2:5, 3:6].any()
    assert not model.decode_linear(model.encode(fields))[..., 2:5, 3:6].any()


def test_standardised_latents_and_an_unchanged_reconstruction():
    model, fields = autoencoder(), smooth_fields()
    scramble(model.encoder, model.decoder)
    model.start_from_components(fields, torch.ones(2))
    before = model(fields)
    model.standardise(fields)
    latents = model.encode(fields)
    torch.testing.assert_close(latents.mean((0, 1, 3, 4)), torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(latents.std((0, 1, 3, 4)), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(fields), before, rtol=1e-6, atol=1e-6)
    model.standardise(fields)
    torch.testing.assert_close(model.encode(fields), latents)


def test_shapes_of_an_autoencoder():
    model = autoencoder()
    assert model.latent_shape == (5, 2, 3) and model.stride == (2, 4, 4)
    assert model.encode(smooth_fields(2, 6)).shape == (2, 3, 5, 2, 3)
    torch.testing.assert_close(model.unpatch(model.patches(smooth_fields())).shape, smooth_fields().shape)
    with pytest.raises(ValueError, match="7 frames is not a multiple of the stride 2"):
        model.encode(smooth_fields(1, 7))
    with pytest.raises(ValueError, match="must be a multiple of the stride"):
        autoencoder(shape=(2, 9, 12))
    ring = SpatiotemporalAutoencoder((1, 1, 12), stride=(2, 1, 4), channels=2, width=4, depth=1, periodic=(False, True))
    assert ring(torch.randn(1, 4, 1, 1, 12)).shape == (1, 4, 1, 1, 12)


def test_the_identity_changes_nothing():
    x = torch.randn(1, 3, 2, 4, 5)
    model = IdentityAutoencoder((2, 4, 5))
    assert model.encode(x) is x and model.decode(x) is x and model.decode_linear(x) is x
    assert model.latent_shape == (2, 4, 5) and model.stride == (1, 1, 1) and model.reach == 0


# Denoiser

SHAPE, FRAMES = (2, 2, 3), 4


def install(model: LatentDenoiser, remainder: float = 0.3) -> torch.Tensor:
    """A covariance of known form, and the dense matrix of it over FRAMES frames, in float64."""
    size, modes = model.covariance.basis.shape
    basis = torch.linalg.qr(torch.randn(size, modes, dtype=torch.float64))[0]
    lags = model.covariance.autocovariance.shape[1]
    powers = torch.linspace(0.5, 0.9, modes, dtype=torch.float64)[:, None] ** torch.arange(lags, dtype=torch.float64)
    autocovariance = torch.linspace(4, 1, modes, dtype=torch.float64)[:, None] * powers
    rest = torch.tensor(remainder, dtype=torch.float64)
    model.set_climatology(torch.randn(size, dtype=torch.float64), SpaceTimeCovariance(basis, autocovariance, rest))
    lag = (torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)[None]).abs()
    dense = sum(torch.kron(autocovariance[k][lag], torch.outer(basis[:, k], basis[:, k])) for k in range(modes))
    outside = torch.eye(size, dtype=torch.float64) - basis @ basis.T
    return dense + rest * torch.kron(torch.eye(FRAMES, dtype=torch.float64), outside)


def denoiser(**settings) -> LatentDenoiser:
    defaults = {"latent_shape": SHAPE, "frames": FRAMES, "width": 8, "depth": 2, "heads": 2, "modes": 7, "lags": FRAMES}
    return LatentDenoiser(**defaults | settings).double().eval().requires_grad_(False)


def learned(model: LatentDenoiser) -> LatentDenoiser:
    """The model with random weights where it starts with zeros."""
    scramble(model.outputs, *(block.modulation for block in model.blocks))
    if model.place is not None:
        torch.nn.init.normal_(model.place)
    return model


@pytest.mark.parametrize("modes", [7, 12])
def test_an_untrained_denoiser_is_that_of_the_gaussian(modes):
    model = denoiser(modes=modes)
    dense = install(model)
    x = torch.randn(3, FRAMES, *SHAPE, dtype=torch.float64)
    mean = model.mean.repeat(FRAMES)
    for sigma in (0.01, 1.0, 30.0):
        gain = dense @ torch.linalg.inv(dense + sigma**2 * torch.eye(len(dense), dtype=torch.float64))
        expected = (mean + (x.flatten(1) - mean) @ gain.T).reshape(x.shape)
        torch.testing.assert_close(model(x, torch.tensor(sigma)), expected)
        assert not model.correction(x, torch.tensor(sigma)).any()


def test_noise_levels_of_a_batch_are_those_of_its_members():
    model = learned(denoiser())
    install(model)
    x, sigma = torch.randn(3, FRAMES, *SHAPE, dtype=torch.float64), torch.tensor([0.1, 1.0, 10.0])
    alone = torch.cat([model(x[i : i + 1], sigma[i]) for i in range(3)])
    torch.testing.assert_close(model(x, sigma), alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x, sigma), model.gaussian(x, sigma) + model.correction(x, sigma))


@pytest.mark.parametrize("modes", [7, 12])
def test_the_residual_scale_is_a_trace(modes):
    model = denoiser(modes=modes)
    dense = install(model)
    sigma = torch.tensor([0.05, 0.7, 20.0], dtype=torch.float64)
    eye = torch.eye(len(dense), dtype=torch.float64)
    traces = [torch.trace(dense @ torch.linalg.inv(dense + s**2 * eye)) * s**2 / len(dense) for s in sigma]
    torch.testing.assert_close(model.residual_scale(sigma, FRAMES), torch.stack(traces).sqrt())


def test_the_posterior_variance_of_a_gaussian():
    model = denoiser(noise_levels=(0.1, 1.0, 10.0))
    dense = install(model)
    vectors = model.covariance.temporal(FRAMES).vectors
    for sigma in (0.03, 0.5, 40.0):
        exact = dense - dense @ torch.linalg.inv(dense + sigma**2 * torch.eye(len(dense), dtype=torch.float64)) @ dense
        values, rest = model.posterior_variance(torch.tensor(sigma), FRAMES)
        directions = torch.einsum("dk,kts->kstd", model.covariance.basis, vectors).flatten(2).flatten(0, 1)
        torch.testing.assert_close((directions @ exact * directions).sum(1), values.flatten())
        total = values.sum() + rest * FRAMES * (model.mean.numel() - model.covariance.modes)
        torch.testing.assert_close(total, exact.trace())


def test_measured_ratios_are_interpolated_in_the_logarithm_of_the_noise():
    model = denoiser(noise_levels=(0.1, 10.0))
    install(model)
    model.residual_ratio[0], model.residual_ratio[1] = 0.5, 2.0
    model.residual_ratio_rest.copy_(torch.tensor([0.2, 0.4]))
    gaussian = denoiser()
    gaussian.set_climatology(model.mean, model.covariance)
    for sigma, factor, other in ((0.001, 0.5, 0.2), (0.1, 0.5, 0.2), (1.0, 1.25, 0.3), (10.0, 2.0, 0.4), (500.0, 2.0, 0.4)):
        measured, plain = (m.posterior_variance(torch.tensor(sigma, dtype=torch.float64), FRAMES) for m in (model, gaussian))
        torch.testing.assert_close(measured[0], factor * plain[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(measured[1], other * plain[1], rtol=1e-6, atol=0)
    longer, _ = model.posterior_variance(torch.tensor(1.0), 9)
    assert longer.shape == (7, 9) and (longer > 0).all()


def test_forcings_matter_once_something_was_learned():
    model = denoiser(forcings=2)
    install(model)
    x, sigma = torch.randn(2, FRAMES, *SHAPE, dtype=torch.float64), torch.tensor(0.5)
    day, night = torch.ones(2, FRAMES, 2, dtype=torch.float64), -torch.ones(2, FRAMES, 2, dtype=torch.float64)
    assert torch.equal(model(x, sigma, day), model(x, sigma, night))
    learned(model)
    assert not torch.allclose(model(x, sigma, day), model(x, sigma, night), atol=1e-3)
    with pytest.raises(ValueError, match="needs its forcings"):
        model(x, sigma)


def ring(**settings) -> tuple[LatentDenoiser, torch.Tensor]:
    """A homogeneous model on a ring of 8 places, its covariance in Fourier modes, and an input."""
    model = denoiser(latent_shape=(1, 1, 8), modes=8, periodic=(False, True), spatial_attention=True, **settings)
    angle = 2 * math.pi * torch.arange(8, dtype=torch.float64)[:, None] * torch.arange(5) / 8
    basis = torch.cat([angle.cos(), angle[:, 1:4].sin()], dim=1)
    power = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 2.0, 1.0, 0.5], dtype=torch.float64)
    autocovariance = power[:, None] * 0.8 ** torch.arange(FRAMES, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    model.set_climatology(torch.full((8,), 0.3), SpaceTimeCovariance(basis / basis.norm(dim=0), autocovariance, zero))
    return learned(model), torch.randn(2, FRAMES, 1, 1, 8, dtype=torch.float64)


def test_on_a_ring_every_place_is_alike():
    model, x = ring(homogeneous=True)
    for sigma in (0.1, 5.0):
        y = model(x, torch.tensor(sigma))
        torch.testing.assert_close(model(x.roll(3, -1), torch.tensor(sigma)), y.roll(3, -1), rtol=1e-6, atol=1e-6)
    placed, _ = ring(homogeneous=False)
    sigma = torch.tensor(1.0)
    assert not torch.allclose(placed(x.roll(3, -1), sigma), placed(x, sigma).roll(3, -1), atol=1e-3)


def test_tokens_may_hold_patches_of_latents():
    model = denoiser(latent_shape=(3, 4, 6), patch=(2, 3), modes=5)
    install(model)
    x = torch.randn(1, FRAMES, 3, 4, 6, dtype=torch.float64)
    assert model(x, torch.tensor(1.0)).shape == x.shape
    assert model.place.shape == (2, 2, 8) and model.inputs.in_features == 2 * 3 * 6
    scramble(model.outputs)
    assert model.correction(x, torch.tensor(1.0)).abs().amin() > 0
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        denoiser(latent_shape=(3, 4, 6), patch=(3, 3))


# The directory


@pytest.fixture
def checkpoint() -> Checkpoint:
    """A small model of everything, with random weights."""
    grid = Grid(("y", "x"), tuple(range(8)), tuple(range(12)))
    spec = FieldSpec((Variable("a", "m"), Variable("b", "kg m-2")), grid, 3600.0)
    normalizer = Normalizer(spec.shape, periods=[DAY], transforms=["identity", "log1p"], offsets=[1.0, 0.1])
    normalizer.coefficients.normal_()
    autoencoder = SpatiotemporalAutoencoder(spec.shape, channels=2, width=8, depth=1)
    scramble(autoencoder)
    denoiser = LatentDenoiser((2, 2, 3), 4, width=8, depth=1, heads=2, modes=6, lags=4, noise_levels=[0.1, 1.0])
    install(denoiser)
    learned(denoiser)
    return Checkpoint(spec, normalizer, autoencoder, denoiser, {"experiment": "none", "forcing_periods": []})


def parts(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for name in ("normalizer", "autoencoder", "denoiser"):
        yield name, getattr(checkpoint, name).state_dict()


def test_saved_and_loaded_bit_by_bit(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "model")
    loaded = Checkpoint.load(tmp_path / "model")
    assert loaded.spec == checkpoint.spec and loaded.settings == checkpoint.settings and loaded.climatology is None
    for (name, ours), (_, theirs) in zip(parts(checkpoint), parts(loaded), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}.{key}"
    assert loaded.normalizer.transforms == ("identity", "log1p")
    torch.testing.assert_close(loaded.normalizer.offsets, torch.tensor([1.0, 0.1]))
    assert not any(p.requires_grad for p in loaded.denoiser.parameters()) and not loaded.denoiser.training
    x = torch.randn(1, 4, 2, 2, 3)
    torch.testing.assert_close(loaded.denoiser(x, torch.tensor(0.5)), checkpoint.denoiser(x, torch.tensor(0.5)), rtol=1e-5, atol=1e-5)
    written = {p.suffix for p in (tmp_path / "model").rglob("*") if p.is_file()}
    assert written == {".json", ".safetensors"}
    loaded.save(tmp_path / "again")  # what was loaded forgets from where
    assert not any(str(tmp_path) in p.read_text() for p in (tmp_path / "again").rglob("*.json"))


@pytest.mark.parametrize("homogeneous", [True, False])
def test_half_precision_changes_little_and_only_the_denoiser(checkpoint, tmp_path, homogeneous):
    if homogeneous:
        model = LatentDenoiser((2, 2, 3), 4, width=8, depth=1, heads=2, modes=6, lags=4, homogeneous=True)
        install(model)
        checkpoint = dataclasses.replace(checkpoint, denoiser=learned(model))
    checkpoint.save(tmp_path / "model", half=True)
    assert checkpoint.denoiser.dtype == torch.float32
    stored = load_file(tmp_path / "model" / "denoiser" / "diffusion_pytorch_model.safetensors")
    assert all(stored[name].dtype == torch.float16 for name, _ in checkpoint.denoiser.named_parameters())
    assert stored["covariance.basis"].dtype == torch.float16 and stored["covariance.autocovariance"].dtype == torch.float32
    loaded = Checkpoint.load(tmp_path / "model")
    assert {t.dtype for t in loaded.denoiser.state_dict().values()} == {torch.float32}
    for (name, ours), (_, theirs) in zip(parts(checkpoint), parts(loaded), strict=True):
        for key in ours:
            if name == "denoiser":
                torch.testing.assert_close(theirs[key], ours[key], rtol=1e-3, atol=1e-3 * float(ours[key].abs().max() + 1e-6))
            else:
                assert torch.equal(ours[key], theirs[key]), f"{name}.{key}"
    x = torch.randn(1, 4, 2, 2, 3)
    torch.testing.assert_close(loaded.denoiser(x, torch.tensor(0.5)), checkpoint.denoiser(x, torch.tensor(0.5)), rtol=0.01, atol=0.01)


def test_an_autoencoder_alone(checkpoint, tmp_path):
    Checkpoint(checkpoint.spec, checkpoint.normalizer, checkpoint.autoencoder, None, {}).save(tmp_path / "model")
    assert Checkpoint.load(tmp_path / "model").denoiser is None


def rewrite(directory: Path, **changes: object) -> None:
    record = json.loads((directory / "model.json").read_text())
    (directory / "model.json").write_text(json.dumps({k: v for k, v in (record | changes).items() if v is not None}))


def test_directories_that_are_no_model(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no model at"):
        Checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no model at"):
        Checkpoint.load(tmp_path)
    model = tmp_path / "model"
    for change in ({"autoencoder": "os.system"}, {"autoencoder": "LatentDenoiser"}, {"spec": None}, {"spec": {}}, {"autoencoder": ["a"]}):
        checkpoint.save(model)
        rewrite(model, **change)
        with pytest.raises(UserError, match="is not a model description"):
            Checkpoint.load(model)
    for text in ("", "[]", "{", "\x00"):
        (model / "model.json").write_text(text)
        with pytest.raises(UserError, match="is not a model description"):
            Checkpoint.load(model)
    (model / "model.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a model description"):
        Checkpoint.load(model)


class Trap:
    """What a malicious pickle does when it is opened."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("part", ["normalizer", "autoencoder", "denoiser"])
def test_nothing_is_unpickled_and_a_damaged_part_is_told(checkpoint, tmp_path, part):
    checkpoint.save(tmp_path / "model")
    (weights,) = (tmp_path / "model" / part).glob("*.safetensors")
    whole = weights.read_bytes()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        (tmp_path / "model" / part / name).write_bytes(pickle.dumps(Trap()))
    Checkpoint.load(tmp_path / "model")
    for damaged in (None, whole[: len(whole) // 2], b"", pickle.dumps(Trap())):
        weights.unlink(missing_ok=True)
        if damaged is not None:
            weights.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot load"):
            Checkpoint.load(tmp_path / "model")


def test_weights_of_another_shape_are_refused(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "model")
    path = tmp_path / "model" / "denoiser" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"width": 16}))
    with pytest.raises(UserError, match="cannot load"):
        Checkpoint.load(tmp_path / "model")
    path.write_text("{")
    with pytest.raises(UserError, match="cannot load"):
        Checkpoint.load(tmp_path / "model")
