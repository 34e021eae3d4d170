"""Examples that stay on the disk: rows of a file that is too large to be read whole, which are read
as they are asked for, and in chunks where all of them are looked at.
"""

import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter, methodcaller
from typing import Any, NamedTuple

import numpy as np

from genjax.errors import DataError

LIMIT = 2**29  # bytes of an array beyond which it stays on the disk
CHUNK = 2**24  # so many bytes are looked at at a time
GAP = 2**12  # bytes between two rows that are read over rather than jumped


class Rows:
    """Examples [N, *shape] on the disk. `rows[index]`, index being numbers of rows of any shape,
    reads them; `rows[10:20]` and `take(index)` are `Rows` again and read nothing; `np.asarray`
    reads all.

    Args:
        read: (ascending numbers of rows [n]) -> array [n, *shape].
        shape, dtype: of all of it.
        index: which rows of `read` these are, and in which order; all unless given.
        change: what is done with rows that were read, [n, ...] -> [n, *shape].
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        shape: Sequence[int],
        dtype: Any,
        index: np.ndarray | None = None,
        change: tuple[Callable[[np.ndarray], np.ndarray], ...] = (),
    ) -> None:
        self.read, self.index, self.change = read, index, change
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            first, *rest = key
            every = isinstance(first, slice) and first == slice(None)
            return self.changed(itemgetter(key)) if every else self[first][(slice(None), *rest)]
        if isinstance(key, slice):
            return self.take(np.arange(len(self))[key])
        at = np.asarray(key)
        if at.dtype == bool:
            at = np.flatnonzero(at)
        found = self._at(at.reshape(-1))
        return found.reshape(*at.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for begin, end in self._spans():
            found[begin:end] = self._at(np.arange(begin, end))
        return found

    def take(self, index: np.ndarray) -> "Rows":
        """These rows, not read yet."""
        own = index if self.index is None else self.index[index]
        return Rows(self.read, (len(own), *self.shape[1:]), self.dtype, own, self.change)

    def changed(self, change: Callable[[np.ndarray], np.ndarray]) -> "Rows":
        """What a function of rows [n, ...] makes of them; one row is read to see what that is."""
        like = change(self._at(np.arange(1)))
        shape = (len(self), *like.shape[1:])
        return Rows(self.read, shape, like.dtype, self.index, (*self.change, change))

    def astype(self, dtype: Any) -> "Rows":
        if self.dtype == np.dtype(dtype):
            return self
        return self.changed(methodcaller("astype", dtype))

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All rows in the order of the file, so that it is read from its beginning to its end: the
        numbers that they have in it, and the rows.
        """
        index = None if self.index is None else np.sort(self.index)
        ordered = Rows(self.read, self.shape, self.dtype, index, self.change)
        for begin, end in self._spans():
            at = np.arange(begin, end)
            yield at if index is None else index[at], ordered._at(at)

    def in_order(self) -> Iterator[np.ndarray]:
        """All rows in their own order, in chunks."""
        for begin, end in self._spans():
            yield self._at(np.arange(begin, end))

    def _spans(self) -> Iterator[tuple[int, int]]:
        step = max(1, CHUNK // max(1, self.nbytes // max(1, len(self))))
        for begin in range(0, len(self), step):
            yield begin, min(begin + step, len(self))

    def _at(self, at: np.ndarray) -> np.ndarray:
        if at.size and (at.min() < -len(self) or at.max() >= len(self)):
            raise IndexError(f"rows {at.min()} to {at.max()} of {len(self)}")
        at = np.where(at < 0, at + len(self), at)
        wanted, back = np.unique(at if self.index is None else self.index[at], return_inverse=True)
        found = self.read(wanted)
        for change in self.change:
            found = change(found)
        return found[back.reshape(-1)]


class Chunks(NamedTuple):
    """Values that are looked at in chunks only: how many axes they have, and () -> the chunks."""

    ndim: int
    each: Callable[[], Iterator[np.ndarray]]


def on_rows(x: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """A function of examples [n, ...], of an array or of `Rows`."""
    return x.changed(change) if isinstance(x, Rows) else change(x)


def rows_at(x: Any, index: np.ndarray) -> Any:
    """Some rows of an array, or of `Rows` without reading them."""
    return x.take(index) if isinstance(x, Rows) else x[index]


def joined(parts: Sequence[Any]) -> Any:
    """Parts one after the other; those of one file are not read."""
    if not any(isinstance(part, Rows) for part in parts):
        return np.concatenate(parts)
    first = parts[0]
    together = all(isinstance(part, Rows) and part.read == first.read for part in parts)
    if not together or len({part.shape[1:] for part in parts}) > 1:
        return np.concatenate([np.asarray(part) for part in parts])
    index = [np.arange(len(p)) if p.index is None else p.index for p in parts]
    every = np.concatenate(index)
    return Rows(first.read, (len(every), *first.shape[1:]), first.dtype, every, first.change)


def numbered(x: Any) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    """An array whole, without numbers of rows, or `Rows` in chunks."""
    if isinstance(x, Rows):
        yield from x.chunks()
    elif isinstance(x, Chunks):
        yield from ((None, chunk) for chunk in x.each())
    else:
        yield None, x


def chunks(x: Any) -> Iterator[np.ndarray]:
    """The same without the numbers."""
    return map(itemgetter(1), numbered(x))


def moments(x: Any, each: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and largest absolute value, in float64: of each column of the last
    axis, or of all values [1]. Of several chunks they are put together as Chan, Golub & LeVeque
    (1979) do, which loses no digits to the square of the mean.
    """
    n, mean, square, largest = 0, np.zeros(1), np.zeros(1), np.zeros(1)
    for chunk in chunks(x):
        axes = tuple(range(chunk.ndim - 1)) if each else None
        own_mean = np.atleast_1d(chunk.mean(axis=axes, dtype=np.float64))
        own_sd = np.atleast_1d(chunk.std(axis=axes, dtype=np.float64))
        own_largest = np.atleast_1d(np.abs(chunk).max(axis=axes).astype(np.float64))
        m = chunk.size // (chunk.shape[-1] if each else 1)
        if n == 0 and not isinstance(x, Rows | Chunks):
            return own_mean, own_sd, own_largest
        total, gap = n + m, own_mean - mean
        square = square + own_sd**2 * m + gap**2 * (n * m / total)
        mean, largest = mean + gap * (m / total), np.maximum(largest, own_largest)
        n = total
    return mean, np.sqrt(square / max(1, n)), largest


def extent(x: Any, each: bool) -> np.ndarray:
    """Largest value less smallest, of each column of the last axis, or of all values [1]."""
    low, high = np.inf, -np.inf
    for chunk in chunks(x):
        axes = tuple(range(chunk.ndim - 1)) if each else None
        low, high = np.minimum(low, chunk.min(axis=axes)), np.maximum(high, chunk.max(axis=axes))
    return np.atleast_1d(high - low).astype(np.float64)


# --- files ----------------------------------------------------------------------------------------


class File:
    """(ascending rows) -> those rows of an array in a file.

    They are read, not mapped: to look at a mapped file that somebody cuts short kills the process,
    and while it waits for the disk no other thread goes on.
    """

    def __init__(self, path: str, offset: int, shape: Sequence[int], dtype: np.dtype) -> None:
        self.path, self.offset, self.shape, self.dtype = path, offset, tuple(shape), dtype
        self.row = math.prod(shape[1:]) * dtype.itemsize
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._about = self._now()
        if self._about[0] < offset + self.shape[0] * self.row:
            raise DataError(
                f"{path}: cut short: an array {list(shape)} of {dtype} needs "
                f"{offset + self.shape[0] * self.row:,} bytes; found {self._about[0]:,}. Write it "
                "again."
            )

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not len(rows):
            return found
        self._check()
        jumps = np.diff(rows) * self.row > max(GAP, self.row)
        pieces = np.diff((rows - rows[0]) * self.row // CHUNK) > 0
        edges = [0, *(np.flatnonzero(jumps | pieces) + 1).tolist(), len(rows)]
        for begin, end in itertools.pairwise(edges):
            first, last = int(rows[begin]), int(rows[end - 1])
            if last - first == end - begin - 1:
                self._fill(found[begin:end], first)
                continue
            span = np.empty((last - first + 1, *self.shape[1:]), self.dtype)
            self._fill(span, first)
            found[begin:end] = span[rows[begin:end] - first]
        return found

    def _fill(self, into: np.ndarray, first: int) -> None:
        raw = into.reshape(-1).view(np.uint8).data
        place, done = self.offset + first * self.row, 0
        while done < len(raw):
            try:
                got = os.preadv(self._file, [raw[done:]], place + done)
            except OSError as error:
                reason = error.strerror or error
                raise DataError(f"{self.path}: cannot be read: {reason}.") from error
            if got == 0:
                self._check()
                raise DataError(f"{self.path}: ends at byte {place + done:,}. Write it again.")
            done += got

    def _now(self) -> tuple[int, int]:
        about = os.fstat(self._file)
        return about.st_size, about.st_mtime_ns

    def _check(self) -> None:
        """Refuse rows of a file that is written to: some would be of the old file, some of the
        new.
        """
        now = self._now()
        if now != self._about:
            sizes = f"{self._about[0]:,} bytes before, {now[0]:,} now"
            what = sizes if now[0] != self._about[0] else "of the same size, but written to"
            raise DataError(
                f"{self.path} changed while it was being read ({what}). Leave it as it is, and "
                "start again."
            )


def in_npy(path: str) -> Any:
    """A .npy file, as `Rows` if it is larger than LIMIT and its rows lie one after the other, else
    as an array.

    Raises:
        ValueError, OSError: as `np.load` does, of a damaged file.
        DataError: for one that is cut short.
    """
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if mapped.nbytes <= LIMIT or mapped.ndim < 2 or not mapped.flags.c_contiguous:
        return np.load(path, allow_pickle=False)
    return Rows(File(path, mapped.offset, mapped.shape, mapped.dtype), mapped.shape, mapped.dtype)


def of_mapped(x: Any) -> Any:
    """An array that is mapped from a file as `Rows`, if it is larger than LIMIT; others as they
    are.
    """
    if not isinstance(x, np.memmap) or x.nbytes <= LIMIT or x.ndim < 2:
        return x
    return Rows(partial(_rows_of, np.asarray(x)), x.shape, x.dtype)


def _rows_of(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return x[rows]
