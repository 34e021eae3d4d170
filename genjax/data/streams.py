"""Tokens of one long stream, cut into windows: the split by position, and the order in which the
places of a batch read on.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data.order import batch_indices
from genjax.data.source import Source, Splits, cast
from genjax.errors import ConfigError, DataError, unknown_name
from genjax.protocol import Array, Batch, DataSpec

Layout = Literal["stream", "lines"]
Order = Literal["shuffle", "stream"]
Unit = Literal["character", "byte"]
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # train, valid and test


def stream_order(
    context: int,
) -> Callable[[int, int, int | Array, int | Array], Array | np.ndarray]:
    """An order of windows, see `Source.order`, in which place b of the batch reads on: at step s it
    has the window (b ⌊n/B⌋ + s T) mod n, with n windows in all, B places and T = `context`. The
    seed changes nothing.

    For truncated back-propagation through time with a carried state. The places share out the text
    and read on into each other's share; whoever comes to the end of the text goes back to its
    start. It is exact in 32-bit arithmetic.

    Raises, when called:
        DataError: if there are fewer windows than places.
        ConfigError: for a batch_size below 1, or n · context >= 2**32.
    """

    def order(n: int, batch_size: int, seed: int | Array, step: int | Array) -> Array | np.ndarray:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1; got {batch_size}.")
        if batch_size > n:
            raise DataError(
                f"batch_size={batch_size} is more than the {n} windows there are; take at most {n}."
            )
        if n * max(context, 2) >= 2**32:
            raise ConfigError(
                f"The order 'stream' needs windows * context < 2**32; got {n} * {context}. Split "
                "the text."
            )
        size = np.uint32(n)
        # step mod n first, so that the product stays below n T.
        turn = (
            step.astype(jnp.uint32) % size
            if isinstance(step, jax.Array)
            else np.uint32(operator.index(step) % n)
        )
        lanes = np.arange(batch_size, dtype=np.uint32) * np.uint32(n // batch_size)
        return ((lanes + turn * np.uint32(context) % size) % size).astype(np.int32)

    return order


def text_spec(
    name: str,
    vocabulary: tuple[str, ...],
    length: int,
    end: str | None = None,
    classes: tuple[str, ...] | None = None,
    step: str = "character",
) -> DataSpec:
    """The spec of text of one length.

    Raises:
        ConfigError: for a length below 1.
    """
    if length < 1:
        raise ConfigError(f"context must be at least 1; got {length}.")
    number = None if end is None else vocabulary.index(end)
    return DataSpec(
        (length,),
        "tokens",
        levels=len(vocabulary),
        n_classes=None if classes is None else len(classes),
        class_names=classes,
        vocabulary=vocabulary,
        step=step,
        end=number,
        name=name,
    )


def by_position(tokens: np.ndarray) -> Parts:
    """The first 85 % for training, 5 % for validation, and the last 10 % for the test."""
    n = len(tokens)
    train, valid, test = np.split(tokens, [n * 85 // 100, n * 90 // 100])
    return train, valid, test


def stream_windows(parts: Parts, spec: DataSpec, where: str) -> Splits:
    """Every window of the training part, as a view; those of the others one after the other,
    without what is left over.

    The tokens are in range by construction, so that nothing looks at all of the windows, which
    overlap `context` times.
    """
    context = spec.shape[0]
    shortest = min(map(len, parts))
    if shortest < context:
        total = sum(map(len, parts))
        advice = (
            f"Take a context of at most {shortest}, or a longer text."
            if shortest
            else "Take a longer text."
        )
        raise DataError(
            f"{where}: a text of {total:,} {spec.step}s is too short for a context of {context}: "
            "its smallest split has "
            f"{shortest}. {advice}"
        )
    train = np.lib.stride_tricks.sliding_window_view(parts[0], context)
    rest = [part[: len(part) // context * context].reshape(-1, context) for part in parts[1:]]
    return Splits(Batch(train), Batch(rest[0]), Batch(rest[1]))


def stream_source(
    spec: DataSpec, parts: Callable[[], Parts], order: str, about: str, where: str
) -> Source:
    """The source of a stream of tokens. Windows of the training part that begin `context` tokens
    apart share none, see `Source.apart`.

    Args:
        spec: see `text_spec`.
        parts: () -> the tokens of train, valid and test; called when the source is loaded.
        order: "shuffle" or "stream", see `stream_order`.
        about: `Source.description`.
        where: the file or data set, for messages.

    Raises:
        DataError, by `load`: for a part that is shorter than a window.
    """
    orders = {"shuffle": batch_indices, "stream": stream_order(spec.shape[0])}
    return Source(
        spec,
        lambda: stream_windows(parts(), spec, where),
        cast(spec),
        description=about,
        order=orders[order],
        apart=spec.shape[0],
    )


def check_name(what: str, name: str, names: Sequence[str]) -> None:
    """Refuse a name that is none of these.

    Raises:
        ConfigError: with the nearest.
    """
    if name not in names:
        raise unknown_name(what, name, names)


def check_layout(layout: str, order: str) -> None:
    """Refuse an unknown layout or order, and an order that the layout does not allow.

    Raises:
        ConfigError: with what is expected.
    """
    check_name("layout", layout, ("stream", "lines"))
    check_name("order", order, ("shuffle", "stream"))
    if layout == "lines" and order == "stream":
        raise ConfigError(
            "Lines do not go on from each other: order='stream' needs layout='stream'."
        )
