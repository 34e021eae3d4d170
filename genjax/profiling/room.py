"""Whether there is room: what a training needs at least, before any of it is made, and what the
machine has.
"""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from genjax.checks import leaves_by_name
from genjax.data import example_batch
from genjax.errors import MemoryExhausted, in_words
from genjax.learning.memory import largest_array
from genjax.protocol import DataSpec, PyTree, Training

# Where Linux says how much of the machine's memory a container may have.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int | None:
    """The bytes of memory that this machine, or its container, has; None where nobody says."""
    found = []
    with suppress(AttributeError, ValueError, OSError):  # on Windows there is no such function
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            found.append(int(Path(path).read_text("utf-8")))
    return min((size for size in found if size > 0), default=None)


def capacity(devices: int | None = None) -> tuple[int | None, str]:
    """The bytes that arrays may take on so many devices together, all unless given, and what has
    them. Those of a CPU share one memory.
    """
    local = jax.local_devices()
    device, count = local[0], devices or len(local)
    if device.platform == "cpu":
        return machine_memory(), "this machine"
    with suppress(Exception):  # not every backend has it
        each = (device.memory_stats() or {}).get("bytes_limit")
        if each:
            several = f"{count} devices" if count > 1 else "the device"
            return each * count, f"{several} ({device.device_kind})"
    return None, "the device"


def bytes_of(leaf: Any) -> int:
    """The bytes of an array of such a shape; of a key as it is stored."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def check_memory(shapes: Mapping[str, PyTree], what: str) -> None:
    """Refuse arrays that cannot be there at once.

    Args:
        shapes: of the arrays, by what they are; nothing is allocated.
        what: whose they are, for the message.

    Raises:
        MemoryExhausted: with what is needed, what there is, and the largest array.
    """
    sizes = {name: (bytes_of(leaf), leaf) for name, leaf in leaves_by_name(dict(shapes)).items()}
    needed, (there, where) = sum(size for size, _ in sizes.values()), capacity()
    if there is None or needed <= there:
        return
    # Of equal ones the parameters, which come last.
    name, (size, leaf) = max(reversed(sizes.items()), key=lambda one: one[1][0])
    raise MemoryExhausted(
        f"{what} needs {in_words(needed)} of memory at least, and {where} has {in_words(there)}. "
        f"The largest array is {name}, {leaf.dtype.name}{list(leaf.shape)} of {in_words(size)}."
    )


def program_memory(program: Any) -> int:
    """The bytes that a compiled program needs while it runs: arguments, results that are not stored
    in them, and temporaries; 0 where the backend does not tell.
    """
    memory = program.memory_analysis()
    if memory is None:
        return 0
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return needed + memory.output_size_in_bytes - memory.alias_size_in_bytes


def check_program(program: Any, what: str) -> None:
    """Refuse a compiled program that does not fit on one of its devices.

    Raises:
        MemoryExhausted: with what it needs, and what there is.
    """
    needed, (there, where) = program_memory(program), capacity(devices=1)
    if there is not None and needed > there:
        raise MemoryExhausted(
            f"{what} needs {in_words(needed)} of memory, and {where} has {in_words(there)}."
        )


def check_training(
    t: Training, key: PyTree, spec: DataSpec, batch_size: int, batches: int = 1, widest: int = 1
) -> None:
    """Refuse a training that cannot fit: whose state, gradient and batch cannot be there at once,
    or whose step makes an array larger than all memory.

    The step is looked at only where it might: where an array of a batch, of an event, and of the
    largest number that is known of the model would take a good part of the memory.

    Args:
        t: the training; of members, all of them.
        key: what its `init` takes, or its shape.
        spec: of the batches.
        batch_size: examples in one.
        batches: how many of them are sent at once.
        widest: the largest whole number among the model's settings.

    Raises:
        MemoryExhausted: see `check_memory`.
    """
    what = "Training"
    try:
        state = jax.eval_shape(t.init, key)
        one = jax.eval_shape(partial(example_batch, spec, n=batch_size), jax.random.key(0))
    except (MemoryError, OverflowError) as error:
        raise MemoryExhausted(f"{what} needs arrays too large to be counted: {error}.") from error
    single = jnp.shape(key) == ()  # of members the gradients may be made one after the other
    players = {name: state.params[name] for name in state.opt} if single else {}
    largest = max(players, key=lambda name: _size(players[name]), default=None)
    gradient = {} if largest is None else {largest: players[largest]}
    sent = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batches, *leaf.shape), leaf.dtype), one)
    check_memory({"state": state._asdict(), "gradient": gradient, "batch": sent}, what)
    there, where = capacity()
    widths = [size for leaf in jax.tree.leaves(state) for size in leaf.shape]
    might = 4 * batch_size * spec.size * max(widest, spec.size, *widths)
    if there is None or might < there / 4:
        return
    size, array = largest_array(t.step, state, one)
    if size > 2 * there:  # a compiler may do without some of it
        raise MemoryExhausted(
            f"A step needs more memory than {where} has, which is {in_words(there)}. The largest "
            f"array is {array}."
        )


def _size(tree: PyTree) -> int:
    return sum(map(bytes_of, jax.tree.leaves(tree)))
