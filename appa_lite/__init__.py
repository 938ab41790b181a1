"""Reanalysis and ensemble forecasts from sparse observations, with one latent video diffusion prior."""

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name -> the module that defines it, imported when first used
_NAMES = {
    "load": "appa_lite.api",
    "Model": "appa_lite.api",
    "UserError": "appa_lite.core.errors",
    "Variable": "appa_lite.core.fields",
    "Derived": "appa_lite.core.fields",
    "Grid": "appa_lite.core.fields",
    "FieldSpec": "appa_lite.core.fields",
    "open_dataset": "appa_lite.core.store",
    "write_dataset": "appa_lite.core.store",
    "open_fields": "appa_lite.data.open",
    "compose": "appa_lite.config",
    "build": "appa_lite.config",
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'appa_lite' has no attribute '{name}'")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
