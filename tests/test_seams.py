"""Where windows meet, a free run of the shipped ocean looks as it does elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch

from appa_lite.core.fields import to_datetime
from appa_lite.diffusion.samplers import DPMSolverPP2M
from appa_lite.diffusion.windows import WindowLayout
from appa_lite.forecasters.latent_diffusion import LatentDiffusion
from appa_lite.guidance.moment_matching import MomentMatching
from appa_lite.models.checkpoint import Checkpoint

MODEL = Path(__file__).parents[1] / "checkpoints" / "ocean"


def boundaries(layout: WindowLayout) -> np.ndarray:
    """Bool (frames - 1,): whether a window begins or ends between a frame and the next."""
    cut = np.zeros(layout.frames - 1, bool)
    for start in layout.starts():
        cut[[i for i in (start - 1, start + layout.window - 1) if 0 <= i < len(cut)]] = True
    return cut


def test_boundaries_of_a_layout():
    assert boundaries(WindowLayout(10, 6, 2)).nonzero()[0].tolist() == [3, 5]


@pytest.mark.slow
@torch.no_grad()
def test_seams_of_the_ocean_do_not_show(capsys):
    """Increments in time, their innovations (the part that the increment before does not foretell) and spectra across
    columns, at the boundaries of windows over those elsewhere; variances, all variables in units of their own."""
    checkpoint = Checkpoint.load(MODEL)
    sampler = DPMSolverPP2M(24, 60.0, 0.01)
    model = LatentDiffusion(checkpoint, MomentMatching(), sampler, overlap=6, batch=4)
    frames = 3 * checkpoint.denoiser.config.frames * checkpoint.autoencoder.stride[0]
    times = to_datetime(checkpoint.settings.get("phase", 0.0) + checkpoint.spec.step * np.arange(frames))
    period, stride = model.period(times), checkpoint.autoencoder.stride[0]
    members = 4
    fields = model.assimilate(None, times, range(members), seed=0)
    fields = fields / fields.std((0, 1, 3, 4), keepdim=True)
    cut = boundaries(WindowLayout(period.latent_frames, checkpoint.denoiser.config.frames, 6)).repeat(stride)
    cut = cut[period.before - stride // 2 :][: frames - 1]  # a boundary of latent frames, over the frames that they stand for
    increments = fields.diff(dim=1)
    slope = (increments[:, 1:] * increments[:, :-1]).sum() / increments[:, :-1].square().sum()
    innovations = increments[:, 1:] - slope * increments[:, :-1]
    power = torch.fft.rfft(fields[:, 1:], dim=-1).abs().square().mean((0, 2, 3))
    found = {
        "increments": _ratio(increments.square().mean((0, 2, 3, 4)), cut),
        "innovations": _ratio(innovations.square().mean((0, 2, 3, 4)), cut[1:]),
        "large scales": _ratio(power[:, 1:5].sum(1), cut),
        "small scales": _ratio(power[:, 16:].sum(1), cut),
    }
    with capsys.disabled():
        print("at boundaries / elsewhere:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    assert all(abs(value - 1) < 0.1 for value in found.values()), found


def _ratio(values: torch.Tensor, cut: np.ndarray) -> float:
    return float(values[torch.from_numpy(cut)].mean() / values[torch.from_numpy(~cut)].mean())
