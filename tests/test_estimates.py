"""Estimates, padding, and code lengths in bits and per step, against numpy and known numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.errors import DataError
from genjax.evaluation.estimates import (
    Estimate,
    bits_per_dim,
    count,
    estimate,
    padded,
    per_step,
    score_examples,
    scorer,
)
from genjax.protocol import Batch, DataSpec
from genjax.runs.evaluate import _code_length


def test_estimate_is_the_mean_and_the_sample_standard_deviation_over_root_n() -> None:
    values = np.asarray([1.0, 2.0, 4.0, 9.0], np.float32)
    found = estimate(values)
    assert found == Estimate(4.0, math.sqrt(((3**2 + 2**2 + 0 + 5**2) / 3) / 4), 4)
    assert str(found) == "4.000 ± 1.780 (n=4)"


def test_estimate_sums_in_float64() -> None:
    values = np.full(100_000, 1.1, np.float32)
    values[0] = 1e8
    found = estimate(values)
    exact = (1e8 + 99_999 * float(np.float32(1.1))) / 100_000
    assert found.mean == pytest.approx(exact, rel=1e-12)
    assert float(values.mean()) != pytest.approx(exact, rel=1e-9), "float32 would not do"


def test_one_value_has_no_standard_error() -> None:
    found = estimate(np.asarray([2.5]))
    assert found.mean == 2.5
    assert math.isnan(found.standard_error)


def test_the_standard_error_covers_the_truth_as_often_as_it_should() -> None:
    draws = np.random.default_rng(0).exponential(2.0, size=(2000, 400))
    covered = [
        abs(found.mean - 2.0) < 1.96 * found.standard_error for found in map(estimate, draws)
    ]
    # 0.005: a skewed mean.
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 2000) + 0.005)


@pytest.mark.parametrize("shape", [(8, 8, 1), (3,), ()])
def test_uniform_bytes_cost_eight_bits_per_dimension(shape: tuple[int, ...]) -> None:
    spec = DataSpec(shape, "discrete", levels=256)
    nats = -spec.size * math.log(256)
    assert bits_per_dim(nats, spec) == pytest.approx(8.0, rel=1e-15)


def test_a_fair_coin_costs_one_bit() -> None:
    assert bits_per_dim(-64 * math.log(2), DataSpec((8, 8, 1), "binary")) == pytest.approx(
        1.0, rel=1e-15
    )


def test_padded_repeats_row_0_with_weight_0() -> None:
    arrays = Batch(np.arange(10).reshape(5, 2), np.arange(5) * 10)
    last = padded(arrays, 4, 3)
    np.testing.assert_array_equal(last.x, [[8, 9], [0, 1], [0, 1]])
    np.testing.assert_array_equal(last.cond, [40, 0, 0])
    np.testing.assert_array_equal(last.weight, np.asarray([1, 0, 0], np.float32))
    assert last.weight.dtype == np.float32
    whole = padded(arrays._replace(cond=None), 0, 5)
    np.testing.assert_array_equal(whole.x, arrays.x)
    assert whole.cond is None
    assert whole.weight.tolist() == [1] * 5


def run_on(n: int, batch_size: int, seen: list | None = None) -> np.ndarray:
    """Score n examples with their own first number plus that of their condition; the weight must
    never be 0 for a real one.
    """

    def score(params, state, batch, key):
        return params * batch.x[:, 0] + batch.cond

    def prepare(key, batch):
        return batch._replace(x=batch.x.astype(jnp.float32), cond=batch.cond.astype(jnp.float32))

    run = scorer(score, prepare)
    arrays = Batch(
        np.stack([np.arange(n), np.zeros(n)], axis=1).astype(np.uint8),
        np.arange(n, dtype=np.int32) * 100,
    )

    def progress(done: int, total: int) -> None:
        if seen is not None:
            seen.append((done, total))

    values = score_examples(
        run, jnp.float32(2.0), {}, arrays, jax.random.key(0), batch_size, progress
    )
    assert run._cache_size() == 1, "a partial last batch must not compile again"
    return values


@pytest.mark.parametrize(
    ("n", "batch_size"), [(10, 5), (10, 4), (10, 3), (10, 10), (10, 64), (1, 8), (7, 1)]
)
def test_every_example_is_scored_exactly_once_and_in_order(n: int, batch_size: int) -> None:
    seen: list[tuple[int, int]] = []
    np.testing.assert_array_equal(run_on(n, batch_size, seen), np.arange(n) * 102.0)
    assert seen[-1] == (n, n)
    assert [done for done, _ in seen] == [
        min(n, end) for end in range(min(batch_size, n), n + min(batch_size, n), min(batch_size, n))
    ]


def test_noise_is_a_function_of_the_key_and_the_batch_size() -> None:
    def score(params, state, batch, key):
        return jax.random.normal(key, (batch.x.shape[0],))

    run = scorer(score, lambda key, batch: batch)
    arrays = Batch(np.zeros((9, 1), np.float32))
    one, two = (score_examples(run, {}, {}, arrays, jax.random.key(seed), 4) for seed in (0, 0))
    other = score_examples(run, {}, {}, arrays, jax.random.key(1), 4)
    np.testing.assert_array_equal(one, two)
    assert not np.isin(one, other).any()
    assert len(set(one.tolist())) == 9, "batches must not share their noise"


def test_members_of_a_sweep_are_scored_side_by_side() -> None:
    def score(params, state, batch, key):
        return batch.x[:, 0][:, None] * params[None, :]

    arrays = Batch(np.arange(5, dtype=np.float32)[:, None])
    values = score_examples(
        scorer(score, lambda key, batch: batch),
        jnp.asarray([1.0, 10.0]),
        {},
        arrays,
        jax.random.key(0),
        2,
    )
    np.testing.assert_array_equal(values, np.arange(5.0)[:, None] * [1, 10])


def test_count_takes_arrays_and_shapes() -> None:
    tree = {
        "a": jnp.zeros((2, 3)),
        "b": {"c": jax.ShapeDtypeStruct((4,), jnp.float32), "d": np.zeros(())},
        "e": {},
    }
    assert count(tree) == 11


def test_values_per_step_are_a_ratio_with_its_error() -> None:
    rng = np.random.default_rng(0)

    def once(n):
        steps = rng.integers(1, 20, n)
        return per_step(2.0 * steps + rng.normal(size=n) * np.sqrt(steps), steps)

    found = [once(200) for _ in range(400)]
    means, errors = (
        np.asarray([f.mean for f in found]),
        np.asarray([f.standard_error for f in found]),
    )
    assert abs(means.mean() - 2) < 4 * means.std() / 20
    assert abs(errors.mean() / means.std(ddof=1) - 1) < 0.15  # four of its own errors, 1/√(2 · 400)
    assert per_step(np.asarray([3.0, 5.0]), np.asarray([1, 3]))[::2] == (2.0, 4)


def test_a_perplexity_that_no_float_holds_is_none():
    assert _code_length("frame", Estimate(2.0, 0.1, 9))["perplexity"] == pytest.approx(math.e**2)
    assert _code_length("frame", Estimate(5000.0, 0.1, 9))["perplexity"] is None


def test_weights_count_as_copies_do_and_0_leaves_out() -> None:
    values = np.asarray([1.0, np.nan, 4.0, 9.0])
    found = estimate(values, np.asarray([2.0, 0.0, 2.0, 2.0], np.float32))
    assert found == pytest.approx(estimate(values[[0, 2, 3]]))
    assert estimate(values, [3, 0, 1, 0]).mean == (3 * 1 + 4) / 4
    steps = np.asarray([2, 9, 1, 3])
    assert per_step(values, steps, [1, 0, 1, 1]) == per_step(values[[0, 2, 3]], steps[[0, 2, 3]])
    assert per_step(values, steps, [3, 0, 1, 0])[::2] == ((3 * 1 + 4) / (3 * 2 + 1), 3)
    with pytest.raises(DataError, match="all examples have weight 0"):
        estimate(values, np.zeros(4))


def test_the_error_of_weighted_values_covers_the_truth() -> None:
    """Weights that grow with the spread: an error that does not know them is too small."""
    rng = np.random.default_rng(0)
    weight = np.repeat([1.0, 5.0], 100)
    found = [estimate(rng.normal(size=200) * weight, weight) for _ in range(400)]
    spread = np.std([one.mean for one in found], ddof=1)
    error = np.mean([one.standard_error for one in found])
    assert abs(error / spread - 1) < 0.15  # four of its own errors, 1/√(2 · 400)
    assert found[0].n == 200
