"""A model directory: what was trained, the fields it is for, and how to load it without executing anything."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import xarray as xr
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec
from appa_lite.core.store import open_dataset, write_dataset
from appa_lite.models.autoencoder import SpatiotemporalAutoencoder
from appa_lite.models.base import Autoencoder, Emulator
from appa_lite.models.denoiser import LatentDenoiser
from appa_lite.models.deterministic import DeterministicModel
from appa_lite.models.fgn import FGNModel
from appa_lite.models.flow_residual import ResidualFlow
from appa_lite.models.identity import IdentityAutoencoder
from appa_lite.models.next_state_diffusion import NextStateDenoiser
from appa_lite.models.normalizer import Normalizer

AUTOENCODERS = {c.__name__: c for c in (SpatiotemporalAutoencoder, IdentityAutoencoder)}
EMULATORS = {c.__name__: c for c in (DeterministicModel, FGNModel, NextStateDenoiser, ResidualFlow)}
FILE, CLIMATOLOGY = "model.json", "climatology.nc"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a trained model needs: an autoencoder, and a prior over windows (``denoiser``), a next-state model
    (``emulator``) or neither, on its latents.

    ``settings`` is JSON: experiment, forcing periods, what the trainings measured (``autoencoder``, ``denoiser``);
    ``climatology`` holds the mean ``<name>`` and standard deviation ``<name>_std`` of every cell over the training data.
    """

    spec: FieldSpec
    normalizer: Normalizer
    autoencoder: Autoencoder
    denoiser: LatentDenoiser | None
    settings: dict
    climatology: xr.Dataset | None = None
    emulator: Emulator | None = None

    @property
    def forecaster(self) -> str | None:
        """The option of configs/forecaster that forecasts with this model; None for an autoencoder alone."""
        if self.emulator is not None:
            return self.emulator.forecaster
        return None if self.denoiser is None else "latent_diffusion"

    def forcing(self, times: Tensor) -> Tensor | None:
        """Cosines and sines of the P forcing periods of the settings at times (T,), seconds: (T, 2 P); None without any."""
        periods = self.settings.get("forcing_periods", ())
        if not periods:
            return None
        angle = 2 * torch.pi * torch.stack([torch.remainder(times, p) / p for p in periods], dim=-1)
        return torch.cat([angle.cos(), angle.sin()], dim=-1).float()

    def save(self, directory: Path, half: bool = False) -> None:
        """Write model.json and one folder a part; the weights of denoiser and emulator in half precision if asked."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("normalizer", "autoencoder", "denoiser", "emulator"):
            part = getattr(self, name)
            if part is not None:
                (_halved(part) if half and name in ("denoiser", "emulator") else part).save_pretrained(directory / name)
                _forget_origin(directory / name / "config.json")
        record = {"format": 1, "spec": self.spec.to_dict(), "autoencoder": type(self.autoencoder).__name__, "settings": self.settings}
        if self.emulator is not None:
            record["emulator"] = type(self.emulator).__name__
        if self.climatology is not None:
            write_dataset(self.climatology, directory / CLIMATOLOGY)
        (directory / FILE).write_text(json.dumps(record))

    @classmethod
    def load(cls, directory: str | Path, device: torch.device | str = "cpu") -> "Checkpoint":
        """Read a model directory onto a device, in float32 and evaluation mode.

        Raises:
            UserError: the directory is missing, incomplete or not one of ours.
        """
        directory = Path(directory)
        if not (directory / FILE).is_file():
            raise UserError(f"no model at '{directory}': expected a directory with {FILE}, as `appa-lite train` writes in RUN/model")
        try:
            record = json.loads((directory / FILE).read_text())
            spec = FieldSpec.from_dict(record["spec"])
            autoencoder_class = AUTOENCODERS[record["autoencoder"]]
            emulator_class = EMULATORS[record["emulator"]] if "emulator" in record else None
            settings = record["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{directory / FILE}' is not a model description of this version: {error!r}") from None
        parts = {"normalizer": Normalizer, "autoencoder": autoencoder_class}
        if (directory / "denoiser").is_dir():
            parts["denoiser"] = LatentDenoiser
        if emulator_class is not None:
            parts["emulator"] = emulator_class
        climatology = open_dataset(directory / CLIMATOLOGY).load() if (directory / CLIMATOLOGY).is_file() else None
        loaded = {name: _load(kind, directory / name, device) for name, kind in parts.items()}
        return cls(spec, loaded["normalizer"], loaded["autoencoder"], loaded.get("denoiser"), settings, climatology, loaded.get("emulator"))


def _forget_origin(config: Path) -> None:
    """Drop the path that diffusers notes of a part that was loaded: it is the business of whoever trained the model."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _halved(model: LatentDenoiser | Emulator) -> LatentDenoiser | Emulator:
    """A copy with weights and spatial modes in half precision. Autocovariances stay: the small eigenvalues of their
    Toeplitz matrices are differences far below half precision."""
    fresh = type(model)(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    fresh.load_state_dict(model.state_dict())
    for parameter in fresh.parameters():
        parameter.data = parameter.data.half()
    if isinstance(fresh, LatentDenoiser):
        fresh.covariance.basis = fresh.covariance.basis.half()
    return fresh


def _load(kind: type, directory: Path, device: torch.device | str) -> torch.nn.Module:
    try:
        model = kind.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load '{directory}': {str(error).splitlines()[0]}") from None
    return model.float().to(device).eval().requires_grad_(False)
