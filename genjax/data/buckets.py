"""Sequences of unequal length in buckets: each batch holds sequences of about one length, and is
padded to the longest of its bucket only.

Each bucket is an endless stream of batches of its own, in the order of `batch_indices`: it visits
every example of the bucket once in each of its epochs. The buckets take turns of a few steps, and
in epoch e bucket b has the turns from floor(e r_b) to floor((e + 1) r_b) - 1, with r_b the turns
that its examples fill, in an order drawn from (seed, e). So after e epochs every example has been
taken e times but for those of one unfinished turn of each bucket, and what a step takes is a pure
function of (seed, step).
"""

import functools
from typing import NamedTuple

import numpy as np

from genjax.data.order import batch_indices, permutation
from genjax.data.source import Source
from genjax.errors import ConfigError
from genjax.protocol import Batch, Model

DEFAULT = 8  # buckets, where nobody says how many
TURN = 8  # steps at most that a bucket has at a time: so many go in one dispatch
_WORTH = 3  # times the work, from which on there are buckets unless told otherwise
_CANDIDATES = 256  # lengths at which a bucket may end
_STREAM = 0x9E3779B9  # between the seeds of two buckets' streams


class Buckets(NamedTuple):
    """Examples in buckets by their length.

    Attributes:
        padded: how many steps the batches of each bucket have.
        members: the examples of each bucket, int [n_b], at least a batch in each.
        longest: how many steps the arrays have.
    """

    padded: tuple[int, ...]
    members: tuple[np.ndarray, ...]
    longest: int

    @property
    def gain(self) -> float:
        """The steps of all sequences padded to the arrays' length, over those padded to their
        bucket's.
        """
        sizes = [len(own) for own in self.members]
        return sum(sizes) * self.longest / float(np.dot(sizes, self.padded))

    @property
    def note(self) -> str:
        """What is done, in a line."""
        lengths = ", ".join(map(str, self.padded))
        return (
            f"sequences in {len(self.padded)} buckets, padded to {lengths} steps: {self.gain:.1f} "
            f"times fewer than at {self.longest} for all (--buckets 1)"
        )


def buckets_of(lengths: np.ndarray, longest: int, batch_size: int, most: int = DEFAULT) -> Buckets:
    """At most so many buckets, of a batch or more each, with the least padding that there can be: a
    pure function of its arguments.

    Args:
        lengths: how many steps of each sequence count, int [N].
        longest: how many steps the arrays have.

    Example:
        >>> import numpy as np
        >>> buckets_of(np.array([9, 2, 3, 8]), 10, batch_size=2).padded
        (3, 9)
    """
    order = np.argsort(lengths, kind="stable")
    ordered = np.asarray(lengths)[order].astype(np.int64)
    ends = _ends(ordered, batch_size, most)
    members = tuple(np.sort(own) for own in np.split(order, ends[:-1]))
    return Buckets(tuple(int(ordered[end - 1]) for end in ends), members, longest)


def _ends(ordered: np.ndarray, least: int, most: int) -> list[int]:
    """Where each bucket of sorted lengths ends: the sum of n_b times its longest is the least, by
    dynamic programming over the places where the length changes.
    """
    n = len(ordered)
    places = np.append(np.flatnonzero(np.diff(ordered)) + 1, n)
    if len(places) > _CANDIDATES:
        places = places[np.linspace(0, len(places) - 1, _CANDIDATES).round().astype(int)]
    places = np.append(0, places)
    sizes = places[None] - places[:, None]  # of a bucket from place i to place j
    cost = np.where(sizes >= max(1, least), sizes * ordered[places - 1][None], np.inf)
    totals, chosen = [cost[0]], []
    for _ in range(1, min(most, n)):
        with_one_more = totals[-1][:, None] + cost
        chosen.append(with_one_more.argmin(0))
        totals.append(with_one_more.min(0))
    count, at = int(np.argmin([total[-1] for total in totals])), len(places) - 1
    ends = [n]
    for before in reversed(chosen[:count]):
        at = int(before[at])
        ends.append(int(places[at]))
    return ends[::-1]


def buckets_for(
    model: Model,
    source: Source,
    arrays: Batch,
    batch_size: int,
    most: int | None = None,
    place: str = "auto",
) -> Buckets | None:
    """The buckets that a training split is to have; None where all is padded to one length.

    Args:
        most: how many at most; None means 8 if that saves two thirds of the steps, else none.
        place: where the data are to live, see `choose_feed`; buckets are sent from the host.

    Raises:
        ConfigError: for buckets that were asked for and cannot be.
    """
    if most == 1:
        return None
    why = _why_not(model, source, arrays, place)
    if why is not None:
        if most is None:
            return None
        raise ConfigError(f"--buckets {most} cannot be: {why}. Leave it out, or say --buckets 1.")
    if len(arrays.x) < batch_size:
        return None  # which is refused elsewhere
    longest = arrays.x.shape[1]
    found = buckets_of(np.asarray(arrays.length), longest, batch_size, most or DEFAULT)
    return found if most is not None or found.gain >= _WORTH else None


def _why_not(model: Model, source: Source, arrays: Batch, place: str) -> str | None:
    if arrays.length is None:
        return f"{source.spec.name} has no lengths, so all its examples are of one length"
    if not model.any_length:
        return "this model takes examples of one shape only"
    if source.order is not batch_indices:
        return f"the batches of {source.spec.name} go on from each other"
    if place == "device":
        return "buckets are sent from the host, and --place device keeps the data on the device"
    return None


class BucketOrder:
    """The batches of buckets: `at(step)` is the bucket of a step, and the step of that bucket's own
    stream; calling it gives the examples, int32 [batch_size].
    """

    def __init__(self, buckets: Buckets, batch_size: int, seed: int) -> None:
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self._sizes = [len(own) for own in buckets.members]
        # A bucket has no more steps at a time than one of its epochs fills.
        self._turns = [max(1, min(TURN, size // batch_size)) for size in self._sizes]
        self._epoch = functools.lru_cache(8)(self._epoch_of)

    def __call__(self, step: int) -> np.ndarray:
        bucket, own_step, _ = self.at(step)
        members, seed = self.buckets.members[bucket], self.seed + _STREAM * (bucket + 1)
        return members[batch_indices(len(members), self.batch_size, seed, own_step)]

    def at(self, step: int) -> tuple[int, int, int]:
        """The bucket of a step, the step of its own stream, and how many steps are left of its
        turn, this one included.
        """
        epoch = step * self.batch_size // sum(self._sizes)
        while self._steps_before(epoch) > step:
            epoch -= 1
        while self._steps_before(epoch + 1) <= step:
            epoch += 1
        order, starts, numbers = self._epoch(epoch)
        offset = step - self._steps_before(epoch)
        turn = int(np.searchsorted(starts, offset, side="right")) - 1
        bucket = int(order[turn])
        done, length = offset - int(starts[turn]), self._turns[bucket]
        return bucket, int(numbers[turn]) * length + done, length - done

    def padded(self, step: int) -> int:
        """How many steps the sequences of a batch have."""
        return self.buckets.padded[self.at(step)[0]]

    def alike(self, step: int) -> int:
        """How many steps from one on have batches of its shape."""
        return self.at(step)[2]

    def _turns_before(self, epoch: int) -> list[int]:
        """How many turns each bucket had before an epoch."""
        pairs = zip(self._sizes, self._turns, strict=True)
        return [epoch * size // (turn * self.batch_size) for size, turn in pairs]

    def _steps_before(self, epoch: int) -> int:
        return int(np.dot(self._turns_before(epoch), self._turns))

    def _epoch_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of an epoch's turns: their buckets, the step of the epoch that each begins with, and the
        number of each in its bucket's stream.
        """
        before = np.array(self._turns_before(epoch))
        counts = np.array(self._turns_before(epoch + 1)) - before
        buckets = np.repeat(np.arange(len(counts)), counts)
        numbers = np.concatenate(
            [start + np.arange(count) for start, count in zip(before, counts, strict=True)]
        )
        drawn = permutation(len(buckets), self.seed, epoch)
        order, lengths = buckets[drawn], np.array(self._turns)[buckets[drawn]]
        # The turns of one bucket come in the order of its stream.
        for bucket in range(len(counts)):
            mine = order == bucket
            drawn[mine] = np.sort(drawn[mine])
        return order, np.cumsum(lengths) - lengths, numbers[drawn]
