"""Estimates with their standard error, the scores of a split, and the conversions between units."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from genjax.errors import DataError
from genjax.learning.memory import explained, fetched
from genjax.protocol import Batch, DataSpec, Key, Params, PyTree, ScoreFn, State


class Estimate(NamedTuple):
    """The mean of n per-example values and its standard error, sd / √n; see `estimate` for those
    with weights.
    """

    mean: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f} (n={self.n})"


def estimate(values: np.ndarray, weight: Any = None) -> Estimate:
    """The mean and standard error of per-example values [n], in float64.

    With weights [n] the mean is Σ w v / Σ w, as a loss in training has it, with the error of such a
    ratio (see `per_step`); values of weight 0 are left out, NaN or not, and n is without them.

    Raises:
        DataError: if all weights are 0.
    """
    if weight is not None:
        values, weight = _weighty(weight, values, np.ones(len(values)))
        return per_step(values, weight)._replace(n=len(weight))
    values = np.asarray(values, np.float64)
    n = len(values)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else float("nan")
    return Estimate(float(values.mean()), error, n)


def bits_per_dim(nats: float, spec: DataSpec) -> float:
    """-nats / (D ln 2): the code length in bits per dimension of an event whose log-probability is
    `nats`.
    """
    return -nats / (spec.size * math.log(2))


def _weighty(weight: Any, *columns: np.ndarray) -> list[np.ndarray]:
    """Columns [n] in float64 times their weights [n], without the rows of weight 0."""
    weight = np.asarray(weight, np.float64)
    kept = weight > 0
    if not kept.any():
        raise DataError(
            "There is nothing to take the mean of: all examples have weight 0. Give some of them "
            "a positive weight."
        )
    return [np.asarray(column, np.float64)[kept] * weight[kept] for column in columns]


def counted(arrays: Batch) -> int:
    """How many examples of a split count: those of weight 0 do not."""
    return len(arrays.x) if arrays.weight is None else int(np.sum(np.asarray(arrays.weight) > 0))


def counting(arrays: Batch) -> Batch:
    """The examples that count: those whose weight is not 0."""
    if arrays.weight is None:
        return arrays
    kept = np.flatnonzero(np.asarray(arrays.weight) > 0)
    return jax.tree.map(lambda leaf: leaf[kept], arrays)


def per_step(values: np.ndarray, steps: np.ndarray, weight: Any = None) -> Estimate:
    """Σ values / Σ steps of sequences with values [n] and numbers of steps [n], and its standard
    error.

    A ratio of two sums, whose error is √(Σ (value_i - ratio · steps_i)² n / (n - 1)) / Σ steps
    (Cochran 1977, equation 2.46); n is the number of steps. For log-probabilities in nats, minus
    the ratio is the code length in nats per step, e to that the perplexity, and that over ln 2 the
    bits per step.

    With weights [n] the sums are Σ w value and Σ w steps, and sequences of weight 0 are left out.

    Raises:
        DataError: if all weights are 0.
    """
    if weight is not None:
        n_steps = int(np.asarray(steps)[np.asarray(weight) > 0].sum())
        return per_step(*_weighty(weight, values, steps))._replace(n=n_steps)
    values, steps = np.asarray(values, np.float64), np.asarray(steps, np.float64)
    n, total = len(values), steps.sum()
    ratio = float(values.sum() / total)
    error = float("nan")
    if n > 1:
        error = float(math.sqrt(np.square(values - ratio * steps).sum() * n / (n - 1)) / total)
    return Estimate(ratio, error, int(total))


def padded(arrays: Batch, start: int, size: int) -> Batch:
    """Rows start .. start+size of host arrays as a batch of exactly `size`: missing rows repeat row
    0 with weight 0.
    """
    n = min(size, len(arrays.x) - start)
    rows = np.concatenate([np.arange(start, start + n), np.zeros(size - n, np.int64)])
    x, cond, length = jax.tree.map(lambda leaf: leaf[rows], (arrays.x, arrays.cond, arrays.length))
    weight: Any = (np.arange(size) < n).astype(np.float32)
    return Batch(x, cond, weight, length)


def scorer(score: ScoreFn, prepare: Callable[[Key, Batch], Batch]) -> Callable[..., Any]:
    """A compiled (params, state, raw batch, key) -> nats [B], for `score_examples`; make it once,
    so it compiles once.
    """

    @jax.jit
    def run(params: Params, state: State, batch: Batch, key: Key) -> jax.Array:
        key_data, key_score = jax.random.split(key)
        return score(params, state, prepare(key_data, batch), key_score)

    return run


def score_examples(
    run: Callable[..., Any],
    params: Params,
    state: State,
    arrays: Batch,
    key: Key,
    batch_size: int = 500,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """A log-probability or bound of every example of a split, in nats [n]; the last, partial batch
    is padded and cut.

    Args:
        run: from `scorer`.
        arrays: the split on the host, as its loader gave it.
        key: batch i uses fold_in(key, i), so the result is a pure function of (key, batch_size).
        progress: called with (examples done, examples in all) after each batch.
    """
    n, values = len(arrays.x), []
    size = min(batch_size, n)

    def called(start: int, index: int) -> tuple[Any, ...]:
        return params, state, padded(arrays, start, size), jax.random.fold_in(key, index)

    with explained(lambda: f"for {size} examples at a time", lambda: (run, called(0, 0))):
        for index, start in enumerate(range(0, n, size)):
            values.append(fetched(run(*called(start, index)))[: n - start])
            progress(min(start + size, n), n)
    return np.concatenate(values)


def count(tree: PyTree) -> int:
    """The number of numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
