"""Helpers of the suites of the data: counts held to a law, batches to each other, and arrays with
one bad value.
"""

import jax
import numpy as np
from scipy.stats import chi2

LABELS = np.zeros(4, np.int32)


def assert_uniform(counts, expected=None):
    """Chi-square; the seeds are fixed, so that a passing test stays one."""
    counts = np.asarray(counts, np.float64).ravel()
    expected = np.full_like(counts, counts.mean()) if expected is None else expected
    statistic = ((counts - expected) ** 2 / expected).sum()
    p = chi2.sf(statistic, counts.size - 1)
    assert p > 1e-4, (
        f"chi-square {statistic:.1f} for {counts.size - 1} degrees of freedom, p = {p:.2g}"
    )


def assert_same(a, b):
    """Bitwise equality of two batches, dtypes included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def rows_at(source, arrays, batch_size, seed, step):
    """The stored rows of one batch, gathered with numpy, as `host_feed` does."""
    index = source.order(len(arrays.x), batch_size, seed, step)
    return jax.tree.map(lambda array: array[index], arrays)


def with_value(value, dtype=np.float32):
    x = np.zeros((4, 3), dtype)
    x[2, 1] = value
    return x
