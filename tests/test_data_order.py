"""The order of examples: every epoch visits each once, every order is equally likely, on the host
as on the device.
"""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_checks import assert_uniform

import genjax
from genjax import data
from genjax.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("n", "batch_size"),
    [(1, 1), (2, 1), (3, 2), (5, 5), (7, 3), (10, 4), (64, 64), (65, 17), (1257, 100)],
)
def test_every_epoch_visits_every_example_once(n, batch_size):
    epochs = 3
    steps = math.ceil(epochs * n / batch_size)
    stream = np.concatenate([data.batch_indices(n, batch_size, 5, step) for step in range(steps)])
    assert stream.dtype == np.int32
    orders = stream[: epochs * n].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(n), (epochs, 1)))
    if n >= 10:
        assert len({tuple(order) for order in orders}) == epochs


@pytest.mark.slow
@pytest.mark.parametrize(("n", "batch_size"), [(3, 2), (60_000, 64)])
def test_order_is_the_same_on_host_and_device(n, batch_size):
    steps = [0, 1, 2, 999, 123_456_789, 2**31 - 1]
    host = np.stack([data.batch_indices(n, batch_size, 7, step) for step in steps])
    assert isinstance(host, np.ndarray)
    traced = jnp.array(steps, jnp.int32)

    @jax.jit
    def everywhere(seed, steps):
        def indices(step):
            return data.batch_indices(n, batch_size, seed, step)

        return (
            jax.vmap(indices)(steps),
            jax.lax.scan(lambda carry, step: (carry, indices(step)), 0, steps)[1],
            jax.vmap(lambda step: data.batch_indices(n, batch_size, 7, step))(steps),
        )

    for device in everywhere(jnp.int32(7), traced):
        assert device.dtype == jnp.int32
        np.testing.assert_array_equal(np.asarray(device), host)


def test_seeds_of_any_sign_agree_on_host_and_device():
    seeds = np.array([0, -1, 2**31, 2**32 - 1])
    device = jax.jit(jax.vmap(lambda seed: data.batch_indices(20, 9, seed, 4)))(
        seeds.astype(np.uint32)
    )
    np.testing.assert_array_equal(
        np.asarray(device), np.stack([data.batch_indices(20, 9, int(seed), 4) for seed in seeds])
    )


@pytest.mark.parametrize("step", [0, 6, 3**19, 2**31 - 1, 2**31 + 5])
def test_large_steps_do_not_overflow(step):
    # The same stream taken one by one, at positions that Python counts exactly.
    n, batch_size = 1013, 1000
    batch = data.batch_indices(n, batch_size, 3, step)
    for i in (0, 1, 500, 999):
        assert batch[i] == data.batch_indices(n, 1, 3, step * batch_size + i)[0]


@functools.cache
def _orders(n, seeds, epochs):
    """[seeds, epochs, n]."""
    order = jax.vmap(
        jax.vmap(lambda seed, epoch: data.batch_indices(n, n, seed, epoch), (None, 0)), (0, None)
    )
    return np.asarray(jax.jit(order)(jnp.arange(seeds), jnp.arange(epochs)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 10, 33])
def test_every_example_is_equally_likely_at_every_position(n):
    orders = _orders(n, 200, 50)
    counts = np.stack([np.bincount(orders[..., i].ravel(), minlength=n) for i in range(n)])
    if n == 1:
        assert counts[0, 0] == 10_000
        return
    for i in range(n):
        assert_uniform(counts[i])
    # Neighbours within an epoch, and the same position in neighbouring epochs and seeds, are
    # independent.
    pairs = np.bincount((orders[..., 0] * n + orders[..., 1]).ravel(), minlength=n * n).reshape(
        n, n
    )
    assert_uniform(pairs[~np.eye(n, dtype=bool)])
    assert_uniform(np.bincount((orders[:, :-1, 0] * n + orders[:, 1:, 0]).ravel(), minlength=n * n))
    assert_uniform(np.bincount((orders[:-1, :, 0] * n + orders[1:, :, 0]).ravel(), minlength=n * n))


@pytest.mark.parametrize("n", [3, 5])
def test_every_permutation_is_equally_likely(n):
    number = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    found = [number[tuple(order)] for order in _orders(n, 200, 50).reshape(-1, n).tolist()]
    assert_uniform(np.bincount(found, minlength=len(number)))


def test_permutation_is_fixed():
    # The splits of user data hang on this order: it must not change from one version to the next.
    assert data.permutation(10, seed=0).tolist() == [9, 6, 4, 1, 2, 5, 3, 8, 0, 7]
    np.testing.assert_array_equal(np.sort(data.permutation(5000, seed=1)), np.arange(5000))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 11, 0, 0), DataError, "batch_size=11 is more than the 10 examples"),
        ((0, 1, 0, 0), DataError, "the 0 examples"),
        ((10, 0, 0, 0), ConfigError, "batch_size must be at least 1; got 0"),
        ((10, 2, 0, -1), ConfigError, "counts from 0; got -1"),
        (
            (2**20, 2**12, 0, 0),
            ConfigError,
            re.escape("examples * batch_size < 2**32; got 1048576 * 4096"),
        ),
        ((2**31, 1, 0, 0), ConfigError, "2147483648"),
    ],
)
def test_order_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        data.batch_indices(*arguments)


def test_batches_are_taken_of_a_split():
    source = genjax.from_arrays(np.ones((20, 2)) * np.arange(20)[:, None])
    with pytest.raises(TypeError, match=r"such as source\.load\(\)\.train; got a Splits"):
        genjax.batch_at(source, 4, 0)(source.load(), 0)
