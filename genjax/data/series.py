"""Sequences in a user's own arrays: examples [N, T, *event] with their lengths, and windows of one
long series [T, *event].
"""

import numpy as np

from genjax.errors import ConfigError, DataError
from genjax.protocol import Batch

STEP = "frame"  # what a step is called where nobody says


OVERLAP = 4  # windows of training begin so many times in a context, the others once


def windows_of(
    x: np.ndarray, context: int, where: str, valid_fraction: float = 0.1, test_fraction: float = 0.1
) -> dict[str, Batch]:
    """Windows [N, context, *event] of a series [T, *event], split by position: 80 % training, 10 %
    validation, and the last 10 % test unless told otherwise. Those of training overlap by three
    quarters, the others do not.

    Raises:
        DataError: for a series that is too short.
    """
    at = round(len(x) * (1 - valid_fraction - test_fraction)), round(len(x) * (1 - test_fraction))
    parts = np.split(x, at)
    strides = _stride(context), context, context
    found = {}
    for split, part, stride in zip(("train", "valid", "test"), parts, strides, strict=True):
        if len(part) < context:
            most = min(map(len, parts))
            advice = f"Take a --context of at most {most}." if most else "Hold out a larger part."
            raise DataError(
                f"{where}: the {split} part of the series has {len(part)} steps, and a window has "
                f"{context}. {advice}"
            )
        starts = range(0, len(part) - context + 1, stride)
        found[split] = Batch(np.stack([part[begin : begin + context] for begin in starts]))
    return found


def windows_apart(context: int) -> int:
    """How many windows apart two windows of training share no step, see `Source.apart`."""
    return -(-context // _stride(context))


def _stride(context: int) -> int:
    return max(1, context // OVERLAP)


def as_sequences(read: dict[str, Batch], step: str | None, where: str) -> None:
    """Refuse lengths that do not fit the sequences.

    Raises:
        DataError, ConfigError: see the text.
    """
    for batch in read.values():
        if batch.length is None:
            continue
        if step is None:
            raise ConfigError(
                f"{where} has lengths, which are for sequences: say what a step is called "
                "(--step frame)."
            )
        whole = batch.length.dtype.kind in "iu" and batch.length.shape == (len(batch.x),)
        if not whole:
            raise DataError(
                f"{where}: lengths must be a whole number for each of {len(batch.x)} sequences; "
                f"found {batch.length.dtype}{list(batch.length.shape)}."
            )
        low, high, most = batch.length.min(), batch.length.max(), batch.x.shape[1]
        if low < 1 or high > most:
            raise DataError(f"{where}: lengths must be from 1 to {most}; found {low} to {high}.")
