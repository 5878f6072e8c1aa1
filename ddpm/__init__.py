"""Diffusion models that outlive their jobs. Importing this package loads no torch: the names below do, when used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm.api import Model as Model
    from ddpm.api import batches as batches
    from ddpm.api import build_diffusion as build_diffusion
    from ddpm.api import build_model as build_model
    from ddpm.api import load as load
    from ddpm.api import load_config as load_config
    from ddpm.api import save as save
    from ddpm.config.schema import Config as Config
    from ddpm.diffusion.forward import Diffusion as Diffusion
    from ddpm.network.ema import EMA as EMA
    from ddpm.network.unet import UNet as UNet
    from ddpm.sampling.pictures import grid as grid

__version__ = "0.1.0"

_MODULES = {
    "Config": "config.schema",
    "Diffusion": "diffusion.forward",
    "EMA": "network.ema",
    "Model": "api",
    "batches": "api",
    "build_diffusion": "api",
    "build_model": "api",
    "grid": "sampling.pictures",
    "load": "api",
    "load_config": "api",
    "save": "api",
    "UNet": "network.unet",
}
"""The library's names and the modules that define them."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ddpm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ddpm.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
