"""Flax NNX modules without losses, and the one adapter that turns them into pure functions.

Families say `from genjax import nets` and `nets.mlp.MLP`: a file is imported when it is first used.
Flax takes nearly as long to import as jax, and what settings a family has is asked without it.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def __getattr__(name: str) -> Any:
    if name not in {file.name for file in iter_modules(__path__)}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    return import_module(f"{__name__}.{name}")
