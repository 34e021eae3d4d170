"""Sequences of unequal length in buckets: each batch holds sequences of one bucket, padded to the
longest that the bucket may have.

Which bucket a step takes, and which examples, is a pure function of (seed, step). Each bucket is an
endless stream as `batch_indices` has it, in which every example comes once per epoch of the bucket.
Buckets take turns in proportion to their sizes: exactly so in every n turns, and nearly so in few,
so that every example is seen as often as any other.
"""

import math
from typing import NamedTuple

import numpy as np

from genjax.data.order import batch_indices
from genjax.errors import ConfigError, DataError

_CANDIDATES = 512  # lengths that the search for bounds looks at
_GOLDEN = (math.sqrt(5) - 1) / 2


class Buckets(NamedTuple):
    """Who is in which bucket, and who comes when.

    Attributes:
        bounds: the padded length of each bucket, in order.
        members: the examples of each bucket.
        group: steps that follow each other in one bucket; fewer than an epoch of the smallest.
        turns: the bucket of each turn, int [n]; they repeat.
        before: how many of the turns before each one are of each bucket, int [n + 1, buckets].
        batch_size: examples of a batch.
    """

    bounds: tuple[int, ...]
    members: tuple[np.ndarray, ...]
    group: int
    turns: np.ndarray
    before: np.ndarray
    batch_size: int

    def batch(self, seed: int, step: int) -> tuple[int, np.ndarray]:
        """The padded length of a step's batch, and its examples, int [batch_size]."""
        turn, within = divmod(step, self.group)
        cycle, place = divmod(turn + seed, len(self.turns))
        bucket = int(self.turns[place])
        earlier = cycle * int(self.before[-1, bucket]) + int(self.before[place, bucket])
        own = self.members[bucket]
        chosen = batch_indices(len(own), self.batch_size, seed, earlier * self.group + within)
        return self.bounds[bucket], own[np.asarray(chosen)]

    @property
    def share(self) -> float:
        """Mean padded length as a share of the longest: what a step costs, at least."""
        sizes = [len(own) for own in self.members]
        return float(np.average(self.bounds, weights=sizes)) / self.bounds[-1]


def make_buckets(
    length: np.ndarray, longest: int, n: int, batch_size: int, group: int = 1
) -> Buckets:
    """Up to n buckets with the fewest padded steps, each with at least one batch of examples.

    Args:
        length: [N], whole numbers from 1 to `longest`.
        longest: the length that the sequences are padded to now.
        n: how many buckets; fewer where the lengths do not give so many.
        batch_size: examples of a batch.
        group: how many steps at most follow each other in one bucket.

    Raises:
        DataError: for lengths that are 0 or more than `longest`, and for fewer examples than a
            batch takes.
        ConfigError: for an n or a group below 1.

    Example:
        >>> import numpy as np
        >>> make_buckets(np.array([2, 3, 3, 9]), longest=10, n=2, batch_size=1).bounds
        (3, 9)
    """
    if n < 1 or group < 1:
        raise ConfigError(f"There must be at least 1 bucket and 1 step; got {n} and {group}.")
    length = np.asarray(length).astype(np.int64)
    if len(length) < batch_size:
        raise DataError(
            f"batch_size={batch_size} is more than the {len(length)} examples there are; take a "
            f"batch_size of at most {len(length)}."
        )
    if length.min() < 1 or length.max() > longest:
        raise DataError(
            f"Lengths must be from 1 to {longest}, the length of the array; found {length.min()} "
            f"to {length.max()}."
        )
    bounds = _bounds(np.sort(length), n, batch_size)
    which = np.searchsorted(bounds, length)
    members = tuple(np.flatnonzero(which == bucket) for bucket in range(len(bounds)))
    group = min(group, *(len(own) // batch_size for own in members))
    # Steps of nearly the golden share of the way round meet each bucket in proportion to its size.
    count = len(length)
    stride = max(1, round(count * _GOLDEN))
    while math.gcd(stride, count) > 1:
        stride += 1
    turns = np.sort(which)[np.arange(count, dtype=np.int64) * stride % count]
    seen = np.cumsum(turns[:, None] == np.arange(len(bounds)), axis=0)
    before = np.concatenate([np.zeros((1, len(bounds)), np.int64), seen])
    return Buckets(tuple(int(b) for b in bounds), members, group, turns, before, batch_size)


def _bounds(length: np.ndarray, n: int, least: int) -> np.ndarray:
    """The bounds with the smallest sum of padded lengths, each bucket with `least` examples: by
    dynamic programming over where buckets end in the sorted lengths.
    """
    ends = np.flatnonzero(np.append(length[1:] != length[:-1], True)) + 1  # after equal lengths
    if len(ends) > _CANDIDATES:
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, _CANDIDATES).round().astype(int))]
    begins = np.append(0, ends)
    size = ends[None, :] - begins[:, None]  # [begin, end]
    cost = np.where(size >= least, size * length[ends - 1][None, :], np.inf).astype(np.float64)
    best, chosen = np.append(0.0, np.full(len(ends), np.inf)), []
    found = []
    for _ in range(n):
        total = best[:, None] + cost
        chosen.append(np.argmin(total, axis=0))
        best = np.append(np.inf, total.min(axis=0))
        found.append(best[-1])
    buckets = int(np.argmin(found)) + 1
    bounds, end = [], len(ends)
    for step in reversed(range(buckets)):
        bounds.append(int(length[ends[end - 1] - 1]))
        end = int(chosen[step][end - 1])
    return np.array(bounds[::-1])
