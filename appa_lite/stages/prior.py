"""What the inference commands share: the competitor a configuration describes, progress bars, lengths of time."""

import inspect

import pandas as pd
from omegaconf import DictConfig
from tqdm import tqdm

from appa_lite.config import build, resolve
from appa_lite.core.errors import UserError
from appa_lite.diffusion.base import Sampler
from appa_lite.forecasters.base import Assimilator, Forecaster
from appa_lite.guidance.base import Guidance
from appa_lite.models.checkpoint import Checkpoint
from appa_lite.stages.device import device


def competitor(cfg: DictConfig, kind: type[Assimilator] | type[Forecaster]) -> tuple[Assimilator | Forecaster, Checkpoint]:
    """The forecaster or assimilator ``cfg.forecaster`` describes, on the prior in ``cfg.checkpoint``."""
    checkpoint = Checkpoint.load(cfg.checkpoint, device(cfg.device))
    if checkpoint.denoiser is None:
        raise UserError(f"'{cfg.checkpoint}' holds an autoencoder only: train the denoiser on it, and give that run's model directory")
    cls, _ = resolve(cfg.forecaster, kind)
    wanted = inspect.signature(cls).parameters
    given = {"checkpoint": checkpoint}
    if "guidance" in wanted:
        given |= {"guidance": build(cfg.guidance, Guidance), "sampler": build(cfg.sampler, Sampler), "batch": cfg.batch}
    return build(cfg.forecaster, kind, **given), checkpoint


class Bar:
    """A progress bar fed by (what, done, all)."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.what or self.bar is None or done < self.bar.n:
            self.close()
            self.bar, self.what = tqdm(total=total, desc=what, unit="step", leave=False), what
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def duration(text: object, key: str) -> float:
    """Seconds in a length of time such as ``20d``, ``36h`` or ``90min``."""
    try:
        seconds = pd.Timedelta(str(text)).total_seconds()
    except ValueError:
        raise UserError(f"{key}={text} is not a length of time: expected such as 20d, 36h or 90min") from None
    if not seconds > 0:
        raise UserError(f"{key}={text} must be positive")
    return seconds
