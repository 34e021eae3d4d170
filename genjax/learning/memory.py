"""Which array it was, where there is not enough memory."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from genjax.checks import leaves_by_name
from genjax.errors import MemoryExhausted, in_words, out_of_memory

PACKAGE = str(Path(__file__).parent.parent)


@contextmanager
def explained(
    doing: Callable[[], str], program: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
) -> Iterator[None]:
    """Say of a lack of memory in here what asked for it.

    Args:
        doing: what is going on, "at step 3".
        program: what runs, with its arguments, to look for its largest array.

    Raises:
        MemoryExhausted: in the place of what numpy, jax or Python raise.
    """
    try:
        yield
    except Exception as error:
        found = out_of_memory(error)
        if found is None or isinstance(error, MemoryExhausted):
            raise
        text = f"Out of memory {doing()}: {found}."
        with suppress(Exception):  # what is said of the largest array must not hide the error
            if "with shape" not in found:  # as numpy says
                run, args = program()
                text += f" The largest array is {largest(run, *args)}."
        raise MemoryExhausted(text) from error


def fetched(array: Any) -> np.ndarray:
    """An array of a device, on the host. `np.asarray` alone ends the process, without an error that
    could be caught, where a CPU had no room for the array.
    """
    return np.asarray(jax.block_until_ready(array))


def largest(program: Callable[..., Any], *args: Any) -> str:
    """The largest array that a program takes or makes as it is written: its type, size, and name or
    place in the code. (A compiler may do without it.)
    """
    return largest_array(program, *args)[1]


def largest_array(program: Callable[..., Any], *args: Any) -> tuple[int, str]:
    """The bytes of that array, and the same text."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    traced = jax.make_jaxpr(program)(*shapes)
    found = [(_size(leaf), leaf, name) for name, leaf in _named(shapes)]
    found += [
        (_size(made.aval), made.aval, _place(equation))
        for equation in _equations(traced.jaxpr)
        for made in equation.outvars
        if hasattr(made.aval, "shape")
    ]
    size, array, what = max(found, key=lambda one: one[0])
    return size, f"{array.dtype.name}{list(array.shape)} of {in_words(size)}, {what}"


def _named(shapes: tuple[Any, ...]) -> list[tuple[str, Any]]:
    return [one for tree in shapes for one in leaves_by_name(tree).items()]


def _size(array: Any) -> int:
    return math.prod(array.shape) * getattr(array.dtype, "itemsize", 8)


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for param in equation.params.values():
            for inner in param if isinstance(param, (tuple, list)) else (param,):
                if isinstance(inner, ClosedJaxpr):
                    inner = inner.jaxpr
                if isinstance(inner, Jaxpr):
                    yield from _equations(inner)


def _place(equation: Any) -> str:
    """Where in this package an array is made, in words."""
    for frame in equation.source_info.traceback.frames:
        if (
            frame.file_name.startswith(PACKAGE)
            and Path(frame.file_name).name != Path(__file__).name
        ):
            line = getattr(frame, "start_line", None) or frame.line_num
            return f"made in genjax{frame.file_name[len(PACKAGE) :]}:{line}"
    return "a value on the way"
