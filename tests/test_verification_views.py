"""Views of fields: means over neighbours against brute force, what they see that cells do not; spectra of masked grids."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from appa_lite.core.errors import UserError
from appa_lite.verification import score_figures
from appa_lite.verification.metrics import CorrelationLength, FairCRPS, LogSpectralDistance, PowerRatio, SpreadSkill
from appa_lite.verification.spectra import Spectrum, correlation_length, power_spectrum, spectral_box
from appa_lite.verification.tables import format_table
from appa_lite.verification.verify import Verification
from appa_lite.verification.views import Energy, Gradient, Mean, parse, viewed, winds


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def times(n):
    return pd.date_range("2001-01-01", periods=n, freq="D").to_numpy().astype("datetime64[ns]")


def earth(values, name="t"):
    ny, nx = values.shape[-2:]
    coords = {"latitude": np.linspace(-40, 70, ny), "longitude": np.arange(nx) * 360.0 / nx}
    dims = ("time", "number", "latitude", "longitude") if values.ndim == 4 else ("time", "latitude", "longitude")
    return xr.DataArray(values, dims=dims, coords=coords | {"time": times(len(values))}, name=name)


# means over neighbours


@pytest.mark.parametrize("masked", [False, True])
def test_means_are_brute_force_with_mask_area_and_periodicity(rng, masked):
    field = earth(rng.standard_normal((2, 7, 9)))
    if masked:
        field = field.where(xr.DataArray(rng.random((7, 9)) > 0.4, dims=("latitude", "longitude")))
    means = Mean(3).apply(field, ("latitude", "longitude"), (False, True))
    assert means.shape == (2, 5, 9)
    w = np.cos(np.deg2rad(field.latitude.values))[:, None] * np.ones(9)
    for i in range(5):
        for j in range(9):
            rows, columns = np.ix_(np.arange(i, i + 3), np.arange(j, j + 3) % 9)
            x, a = field.values[0][rows, columns], w[rows, columns]
            known = np.isfinite(x)
            wanted = (a * np.nan_to_num(x)).sum() / (a * known).sum() if (a * known).sum() > 0.5 * a.sum() else np.nan
            assert means.values[0, i, j] == pytest.approx(wanted, nan_ok=True, abs=1e-12)
    assert np.allclose(means.latitude, field.latitude.rolling(latitude=3).mean()[2:])


def test_means_over_a_ring_and_sizes_that_do_not_fit(rng):
    ring = xr.DataArray(rng.standard_normal((4, 10)), dims=("case", "x"))
    assert np.allclose(Mean(10).apply(ring, ("x",), (True,)).T, ring.mean("x"))
    assert np.allclose(Mean(2).apply(ring, ("x",), (True,)), 0.5 * (ring + ring.roll(x=-1)))
    assert Mean(10).suits(ring.sizes, ("x",)) and not Mean(11).suits(ring.sizes, ("x",))
    for bad in ("mean1", "mean", "median5"):
        with pytest.raises(UserError, match="there is no view"):
            parse([bad])


def test_cells_may_be_calibrated_and_means_over_dispersed(rng):
    """The trap: members whose noise is the same in every cell are calibrated at each and far too wide in area means."""
    truth = xr.DataArray(rng.standard_normal((400, 40)), dims=("case", "x"))
    common = xr.DataArray(rng.standard_normal((400, 10, 1)) + np.zeros(40), dims=("case", "number", "x"))
    own = xr.DataArray(rng.standard_normal((400, 10, 40)), dims=("case", "number", "x"))
    view = Mean(20)
    for ensemble, wanted in ((common, np.sqrt(1.1 / (1 / 20 + 1 / 10))), (own, 1.0)):
        assert SpreadSkill()(ensemble, truth) == pytest.approx(1, abs=0.08)
        assert SpreadSkill()(*view.pair(ensemble, truth, (True,))) == pytest.approx(wanted, rel=0.1)
    assert FairCRPS()(*view.pair(common, truth, (True,))) > 1.5 * FairCRPS()(*view.pair(own, truth, (True,)))


def test_energy_and_gradient(rng):
    field = earth(rng.standard_normal((3, 6, 8)))
    w = np.cos(np.deg2rad(field.latitude.values))[:, None] * np.ones(8)
    energy = Energy().apply(field, ("latitude", "longitude"), (False, True))
    assert np.allclose(energy, [(w * f**2).sum() / w.sum() for f in field.values])
    gradient = Gradient().apply(field, ("latitude", "longitude"), (False, True))
    assert np.isnan(gradient.isel(direction=0)[:, -1]).all() and np.isfinite(gradient.isel(direction=1)).all()
    assert np.allclose(gradient.isel(direction=1).values, np.roll(field.values, -1, 2) - field.values)


def test_views_are_over_the_cells_that_both_have(rng):
    truth, forecast = earth(rng.standard_normal((3, 8, 8))), earth(rng.standard_normal((3, 4, 8, 8)))
    truth, forecast = truth.where(truth.latitude > 0), forecast.where(forecast.longitude < 200)
    known = (truth.latitude > 0) & (truth.longitude < 200)
    a, b = Energy().pair(forecast, truth, (False, True))
    c, d = Energy().pair(forecast.where(known), truth.where(known), (False, True))
    assert np.allclose(a, c) and np.allclose(b, d)


def test_views_and_kinetic_energy_stand_in_the_table(rng):
    coords = {"time": times(30), "y": np.arange(12.0), "x": np.arange(12.0)}
    truth = xr.Dataset({n: (("time", "y", "x"), rng.standard_normal((30, 12, 12))) for n in ("u", "v", "h")}, coords)
    forecast = xr.Dataset({n: (("time", "number", "y", "x"), rng.standard_normal((30, 5, 12, 12))) for n in ("u", "v", "h")}, coords)
    scorer = Verification(replicates=30, spectra=False, views=["mean2", "mean20", "energy", "gradient"])
    records = scorer.evaluate({"f": forecast}, truth).records
    names = {r["variable"] for r in records}
    plain = {"u", "v", "h"}
    assert names == plain | {f"{n}_{view}" for n in plain for view in ("mean2", "gradient")} | {"h_energy", "kinetic_energy"}
    energy = {r["metric"]: r for r in records if r["variable"] == "kinetic_energy"}
    bias = 0.5 * sum(float((forecast[n] ** 2).mean() - (truth[n] ** 2).mean()) for n in ("u", "v"))
    assert energy["bias"]["value"] == pytest.approx(bias) and energy["rmse"]["count"] == 30
    assert viewed("kinetic_energy") == ("kinetic_energy", "energy") and viewed("h_mean20") == ("h", "mean20") and viewed("h") == ("h", "")
    assert winds(["u10", "v10", "u_500", "v_500", "u"]) == {"kinetic_energy10": ("u10", "v10"), "kinetic_energy_500": ("u_500", "v_500")}
    assert "means over neighbours" in format_table(records)
    assert score_figures.pooled_calibration(records).count("<figure") == 3
    assert "_mean2" not in score_figures.score_table(records) and not {r["system"] for r in records if r["metric"] == "rmse_minus_f"}


# spectra


def test_log_spectral_distance_and_correlation_length(rng):
    x = np.arange(256)
    for length in (4.0, 9.0):
        power = np.exp(-((np.fft.rfftfreq(256) * 2 * np.pi * length) ** 2) / 2)  # C(r) = exp(-(r / l)^2 / 2)
        mean = np.sqrt(2 * np.pi) * length / 256  # the part of the variance that the mean over the ring has, which is removed
        wanted = length * np.sqrt(-2 * np.log((1 - mean) * np.exp(-1) + mean))
        assert correlation_length(power[1:], 1) * 256 == pytest.approx(wanted, rel=5e-3)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal((60, 256))) * np.sqrt(power), 256)
    truth = xr.DataArray(noise, dims=("case", "x"), coords={"x": x.astype(float)})
    same = truth.expand_dims(number=2)
    assert LogSpectralDistance((True,))(2 * same, truth) == pytest.approx(10 * np.log10(4))
    assert CorrelationLength((True,))(2 * same, truth) == pytest.approx(1)
    rough = same + xr.DataArray(0.2 * rng.standard_normal(same.shape), dims=same.dims)
    assert CorrelationLength((True,))(rough, truth) < 0.97 and PowerRatio((True,))(rough, truth) > 2


def test_plane_waves_have_the_correlation_length_of_a_disc(rng):
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    amplitude = np.exp(-((2 * np.pi * k * 4.0) ** 2) / 4)  # C(r) = exp(-(r / 4)^2 / 2)
    fields = np.fft.ifft2(np.fft.fft2(rng.standard_normal((40, 64, 64))) * amplitude).real
    _, power = power_spectrum(fields, (1.0, 1.0), (True, True))
    assert correlation_length(power.mean(0), 2) * 64 == pytest.approx(np.sqrt(2) * 4, rel=0.06)


def brute_rectangle(known):
    best, (h, w) = 0, known.shape
    for i in range(h):
        for j in range(w):
            for a in range(i + 1, h + 1):
                for b in range(j + 1, w + 1):
                    best = max(best, (a - i) * (b - j) * known[i:a, j:b].all())
    return best


def test_the_largest_rectangle_is_brute_force(rng, monkeypatch):
    monkeypatch.setattr("appa_lite.verification.spectra.SHORTEST", 1)
    for _ in range(10):
        known = rng.random((6, 9)) > 0.25
        box = spectral_box(known, (False, False))
        assert known[np.ix_(*box.part)].all() and np.prod([len(p) for p in box.part]) == brute_rectangle(known)


def test_spectra_of_masked_grids_say_where_they_are_of(rng):
    known = np.ones((20, 24), bool)
    known[:6, :], known[10:, 11:14] = False, False
    box = spectral_box(known, (False, True))
    assert [len(p) for p in box.part] == [14, 21] and box.periodic == (False, False) and "14 x 21 of 20 x 24" in box.note
    assert np.array_equal(box.part[1], (np.arange(21) + 14) % 24)  # across the periodic edge
    known[10:] = True
    assert spectral_box(known, (False, True)).periodic == (False, True)
    assert spectral_box(np.ones((20, 24), bool), (True, True)).part == ()
    none = spectral_box(rng.random((20, 24)) > 0.6, (False, False))
    assert none.periodic is None and "no spectra" in none.note
    truth = earth(rng.standard_normal((5, 20, 24)))
    truth = truth.where(xr.DataArray(known, dims=("latitude", "longitude")))
    spectrum = Spectrum("truth", box.periodic, box.part).compute(truth, truth)
    assert (spectrum.weight == 1).all() and (spectrum.total > 0).all()
    scores = Verification(replicates=20, views=()).evaluate({"f": truth.expand_dims(number=2).to_dataset()}, truth.to_dataset())
    assert {r["metric"]: r["value"] for r in scores.records}["log_spectral_distance"] == 0
    assert "spectra of the largest part" in scores.details["notes"][0]["note"]
