"""Data sets: sources, their loaders, and the order in which they are visited.

`open_source("digits", conditional=True)` or `open_source("mine.npz")` gives a `Source`; `batch_at` takes batches from it.
"""

import inspect
import os
from collections.abc import Callable
from typing import Any

from genjax.data.arrays import arrays
from genjax.data.densities import checkerboard, grid, moons, pinwheel, ring, swiss_roll
from genjax.data.idx import read_idx, write_idx
from genjax.data.images import digits, fashion_mnist, mnist
from genjax.data.order import batch_indices, permutation
from genjax.data.source import Source, Splits, batch_at, cast, example_batch, host_batch, prepare_at, validate
from genjax.errors import ConfigError, unknown_name

SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "ring": ring,
    "grid": grid,
    "moons": moons,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
    "swiss_roll": swiss_roll,
}


def loader(name: str | os.PathLike[str]) -> Callable[..., Source]:
    """The function that makes the source: one of `SOURCES`, or `arrays` for a path that ends in .npz or .npy.

    Raises:
        ConfigError: for a name that is neither.
    """
    name = os.fspath(name)
    if _is_path(name):
        return arrays
    if name not in SOURCES:
        raise unknown_name("data set", name, [*SOURCES, "a path ending in .npz or .npy"])
    return SOURCES[name]


def open_source(name: str | os.PathLike[str], **options: Any) -> Source:
    """The source of that name (see `SOURCES`) or of a .npz or .npy file, made with the options that its loader takes.

    Raises:
        ConfigError: for an unknown name, or an option that the loader does not take.
        DataError: for a file of arrays that cannot be used; files of named data sets are read by `Source.load`.
    """
    name = os.fspath(name)
    make = loader(name)
    bound = {"path": name} if _is_path(name) else {}
    takes = [option for option in inspect.signature(make).parameters if option not in bound]
    for option in options:
        if option not in takes:
            raise ConfigError(f"The data set {name!r} does not take the option {option!r}. It takes: {', '.join(takes)}.")
    return make(**bound, **options)


def _is_path(name: str) -> bool:
    return name.endswith((".npz", ".npy"))


__all__ = [
    "SOURCES",
    "Source",
    "Splits",
    "arrays",
    "batch_at",
    "batch_indices",
    "cast",
    "checkerboard",
    "digits",
    "example_batch",
    "fashion_mnist",
    "grid",
    "host_batch",
    "loader",
    "mnist",
    "moons",
    "open_source",
    "permutation",
    "pinwheel",
    "prepare_at",
    "read_idx",
    "ring",
    "swiss_roll",
    "validate",
    "write_idx",
]
