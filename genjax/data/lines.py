"""One item a line of a text: which lines there are, and how they become examples of one length."""

from collections.abc import Callable, Sequence, Sized
from typing import Any, TypeVar

import numpy as np

from genjax.data.order import permutation
from genjax.data.source import Source, Splits, cast, validate
from genjax.errors import DataError
from genjax.protocol import Batch, DataSpec

Text = TypeVar("Text", str, bytes)

FAR = 10  # a line of so many times the usual length is said, as all are padded to the longest


def without_long(text: Text, newline: Text, longest: int, where: str) -> tuple[Text, int]:
    """A text without its lines of more than `longest` characters or bytes, and how many these
    are.

    Raises:
        DataError: if that are all.
    """
    lines: Any = text.split(newline)
    kept = [line for line in lines if len(line) <= longest]
    if not any(kept):
        shortest = min(map(len, filter(None, lines)), default=0)
        raise DataError(
            f"{where}: every line is longer than max_length={longest:,}; the shortest has "
            f"{shortest:,}."
        )
    return newline.join(kept), len(lines) - len(kept)


def about_lengths(lengths: np.ndarray, unit: str, longest: int, left: int) -> list[str]:
    """What a user is to know of the lengths of lines.

    Args:
        longest: the length that lines were held to, where any were left out.
        left: how many longer ones were left out.
    """
    notes = []
    if left:
        notes.append(f"lines of more than {longest:,} {unit}s, which are left out: {left:,}")
    mean, most = float(lengths.mean()), int(lengths.max())
    if most > FAR * min(mean, float(np.median(lengths))):
        notes.append(
            f"the longest line has {most:,} {unit}s, {mean:,.0f} on average, and all are padded to "
            "the longest: --max-length N leaves longer ones out"
        )
    return notes


def split_rows(n: int, held: int) -> list[np.ndarray]:
    """The rows of train, valid and test in a fixed random order, `held` of them for each of the
    last two.
    """
    return np.split(permutation(n, seed=0), [n - 2 * held, n - held])


def sizes(parts: Sequence[Sized]) -> str:
    """How many examples train, valid and test have, in words: "80 train / 10 valid / 10 test"."""
    return " / ".join(
        f"{len(part):,} {split}" for part, split in zip(parts, Splits._fields, strict=True)
    )


def line_lengths(tokens: np.ndarray, end: int) -> np.ndarray:
    """Of the lines that are not empty, in tokens; the last one need not end in a newline."""
    ends = np.flatnonzero(np.concatenate([[end], tokens, [end]]) == end)
    lengths = np.diff(ends) - 1
    return lengths[lengths > 0]


def pad_lines(tokens: np.ndarray, spec: DataSpec) -> np.ndarray:
    """The lines of a text that are not empty, [n, *shape]: each filled up with the end token."""
    lengths = line_lengths(tokens, spec.end or 0)
    x = np.full((len(lengths), *spec.shape), spec.end, tokens.dtype)
    x[np.arange(spec.shape[0])[None] < lengths[:, None]] = tokens[tokens != spec.end]
    return x


def lines_source(
    spec: DataSpec, tokens: Callable[[], np.ndarray], n: int, held: int, where: str, about: str
) -> Source:
    """The source of a text with one item a line, its lines split in a fixed random order.

    Args:
        spec: of one line, [T] token ids, filled up with the end token.
        tokens: () -> the ids of the whole text; read when the splits are asked for.
        n: how many lines it has that are not empty.
        held: how many of them the validation and the test set have, each.
        where: the file, for messages.
        about: what the description says beside the sizes of the splits.
    """
    rows = split_rows(n, held)

    def load() -> Splits:
        x = pad_lines(tokens(), spec)
        return validate(Splits(*(Batch(x[part]) for part in rows)), spec, where)

    return Source(spec, load, cast(spec), description=f"{sizes(rows)} lines, {about}")
