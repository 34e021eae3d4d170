"""The order of the data: a pure function of (seed, step), so that resume is exact and nothing needs
to be saved.

Think of an endless stream of positions p = step · B + i. Epoch e = p // n visits every example
exactly once, in the order of a permutation of 0..n-1 that is computed per index: no sort, no table
of n entries, so a batch costs O(B) however large the data are. Batches straddle epochs, and there
is no partial batch.
"""

import operator
from types import ModuleType
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from genjax.errors import ConfigError, DataError
from genjax.protocol import Array
from genjax.settings import Within

Examples = Annotated[int, Within(1, 2**24)]  # of data that are made, as many as one may ask for
ROUNDS = 8
_MASK = 0xFFFFFFFF
_GOLDEN = np.uint32(0x9E3779B9)


def batch_indices(
    n: int, batch_size: int, seed: int | Array, step: int | Array
) -> Array | np.ndarray:
    """The examples of one batch: permutation_{seed, epoch}(offset) for the positions step · B ..
    step · B + B-1, int32 [B].

    With whole numbers for `seed` and `step` all of it is numpy on the host; with a JAX array for
    either it is traced, and the results are equal bit for bit. `seed` and `step` count modulo
    2**32.

    Raises:
        DataError: if there are fewer examples than one batch takes.
        ConfigError: for a batch_size below 1, a negative step, or n · batch_size >= 2**32, where
            uint32 arithmetic ends.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {batch_size}.")
    if batch_size > n:
        raise DataError(
            f"batch_size={batch_size} is more than the {n} examples there are; take a batch_size "
            f"of at most {n}."
        )
    if n * batch_size > _MASK or n >= 2**31:
        raise ConfigError(
            "The order of the data is computed in 32 bits and needs examples * batch_size < "
            f"2**32; got {n} * {batch_size}. "
            "Take a smaller batch_size, or split the data into shards."
        )
    size = np.uint32(n)
    # Splitting off whole turns of n steps (= B epochs) first keeps step * B from overflowing:
    # remainder * B < n * B.
    if isinstance(step, jax.Array):
        word = step.astype(np.uint32).reshape(1)
        turns, remainder = word // size, word % size
    else:
        if operator.index(step) < 0:
            raise ConfigError(f"A step counts from 0; got {step}.")
        turns, remainder = (_word(part) for part in divmod(operator.index(step), n))
    width = np.uint32(batch_size)
    position = remainder * width + np.arange(batch_size, dtype=np.uint32)
    epoch, offset = turns * width + position // size, position % size
    xp = jnp if isinstance(step, jax.Array) or isinstance(seed, jax.Array) else np
    return _permute(offset, n, _word(seed), epoch, xp).astype(np.int32)


def permutation(n: int, seed: int, epoch: int = 0) -> np.ndarray:
    """A fixed order of n examples on the host, int32 [n]: the same on every platform and version,
    for splits of data.
    """
    everything = np.arange(n, dtype=np.uint32)
    epochs = np.full_like(everything, epoch & _MASK)
    return np.asarray(_permute(everything, n, _word(seed), epochs, np), np.int32)


def _word(value: int | Array) -> Array | np.ndarray:
    """A whole number as uint32 [1], modulo 2**32: one axis, because numpy warns when *scalars* wrap
    round.
    """
    if isinstance(value, jax.Array):
        return value.astype(np.uint32).reshape(1)
    return np.array([operator.index(value) & _MASK], np.uint32)


def _mix(word):
    """The finaliser of MurmurHash3 (Appleby): a bijection of 32 bits in which every input bit
    changes every output bit.
    """
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))


def _permute(index, n: int, seed, epoch, xp: ModuleType):
    """permutation_{seed, epoch}(index), uint32 [B]: a Feistel network over a power of two >= n (and
    64), cycle-walked.

    A keyed Feistel network permutes 0 .. 2**bits - 1 (Luby & Rackoff 1988). Applying it again to
    whatever falls outside 0 .. n-1 gives a permutation of those (cycle walking; Black & Rogaway
    2002), in fewer than 2 applications on average (for n > 32).
    """
    # A round mixes as well as its half has values: on 3 bits, 8 rounds left some pairs of
    # neighbours 20 % too frequent.
    bits = max(6, (n - 1).bit_length())
    # The halves are updated in turn and need not be of one size, so odd `bits` will do: fewer walks
    # than even ones.
    low_bits, low, high = (
        np.uint32(bits - bits // 2),
        np.uint32((1 << (bits - bits // 2)) - 1),
        np.uint32((1 << bits // 2) - 1),
    )
    size = np.uint32(n)
    rounds = np.arange(ROUNDS, dtype=np.uint32) * _GOLDEN
    # Seed and epoch enter as two words, so that no two (seed, epoch) share a key schedule.
    keys = _mix(
        _mix(_mix(seed ^ _GOLDEN) + rounds)[:, None] ^ _mix(epoch + _GOLDEN)[None, :]
    )  # [rounds, B]

    def feistel(index, keys):
        left, right = index >> low_bits, index & low
        for turn in range(0, ROUNDS, 2):
            left = left ^ (_mix(right ^ keys[turn]) & high)
            right = right ^ (_mix(left ^ keys[turn + 1]) & low)
        return (left << low_bits) | right

    index = feistel(index, keys)
    if xp is np:
        while (outside := np.flatnonzero(index >= size)).size:
            index[outside] = feistel(index[outside], keys[:, outside])
        return index
    return jax.lax.while_loop(
        lambda index: jnp.any(index >= size),
        lambda index: jnp.where(index >= size, feistel(index, keys), index),
        index,
    )
