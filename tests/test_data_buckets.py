"""Length buckets: the order is a function of (seed, step), and padding changes no likelihood."""

import jax
import numpy as np
import optax
import pytest

from genjax import DataSpec, rnn, training
from genjax.data import Source, Splits, cast
from genjax.data.buckets import make_buckets
from genjax.errors import ConfigError, DataError
from genjax.learning.bucket_feed import bucket_feed, buckets_for
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import fit
from genjax.protocol import Aux, Batch

LONGEST = 24
LENGTH = np.array([3, 4, 3, 5, 4, 3, 6, 5, 4, 3, 24, 20, 22, 9, 10, 3, 4, 3, 5, 4])
SPEC = DataSpec((LONGEST, 3), "binary", step="frame", lengths=True)


def rolls():
    x = np.random.default_rng(0).integers(0, 2, (len(LENGTH), LONGEST, 3)).astype(np.uint8)
    x[np.arange(LONGEST)[None] >= LENGTH[:, None]] = 0
    return Batch(x, length=LENGTH.astype(np.int32))


def source():
    rows = rolls()
    return Source(SPEC, lambda: Splits(rows, rows, rows), cast(SPEC))


def trainer(lr=1e-2):
    return training(rnn(SPEC, d_embed=4, d_hidden=4), optax.sgd(lr))


def test_bounds_have_the_fewest_padded_steps_of_all():
    found = make_buckets(LENGTH, LONGEST, n=2, batch_size=2)
    least = min(
        (bound >= LENGTH).sum() * bound + (bound < LENGTH).sum() * LONGEST
        for bound in set(LENGTH.tolist())
        if min((bound >= LENGTH).sum(), (bound < LENGTH).sum()) >= 2
    )
    assert sum(b * len(own) for b, own in zip(found.bounds, found.members, strict=True)) == least
    assert found.share == least / len(LENGTH) / LONGEST
    assert sorted(np.concatenate(found.members)) == list(range(len(LENGTH)))


def test_no_sequence_is_cut_and_each_bucket_has_a_batch():
    buckets = make_buckets(LENGTH, LONGEST, n=4, batch_size=3, group=2)
    assert len(buckets.bounds) > 2
    assert min(map(len, buckets.members)) >= 3
    for step in range(60):
        bound, index = buckets.batch(7, step)
        assert len(index) == 3
        assert LENGTH[index].max() <= bound


def test_every_example_comes_once_an_epoch_of_its_bucket_and_all_as_often():
    buckets = make_buckets(LENGTH, LONGEST, n=3, batch_size=1)
    # In n turns of one example each, bucket b has as many turns as it has examples.
    for seed, epoch in ((0, 0), (3, 0), (0, 1)):
        start = epoch * len(LENGTH)
        seen = [int(buckets.batch(seed, start + s)[1][0]) for s in range(len(LENGTH))]
        if seed == 0:
            assert sorted(seen) == list(range(len(LENGTH)))
        else:  # which begins within the cycle of turns
            counts = np.bincount(np.searchsorted(buckets.bounds, LENGTH[seen]))
            assert counts.tolist() == [len(own) for own in buckets.members]


def test_steps_of_a_group_have_one_shape_and_other_seeds_another_order():
    buckets = make_buckets(np.repeat(LENGTH, 4), LONGEST, n=3, batch_size=2, group=5)
    assert buckets.group == 5
    for group in range(20):
        assert len({buckets.batch(1, group * 5 + s)[0] for s in range(5)}) == 1
    order = [[buckets.batch(seed, s)[1].tolist() for s in range(10)] for seed in (0, 1)]
    assert order[0] != order[1]


def test_loss_and_gradient_are_those_of_the_fully_padded_batch():
    buckets, t, rows = make_buckets(LENGTH, LONGEST, n=3, batch_size=4), trainer(1.0), rolls()
    feed = bucket_feed(t, source(), rows, buckets, seed=0)
    widths, step = set(), jax.jit(t.step)
    state = jax.jit(t.init)(jax.random.key(0))
    for at in range(12):
        index = buckets.batch(0, at)[1]
        full = cast(SPEC)(jax.random.key(0), jax.tree.map(lambda leaf: leaf[index], rows))
        payload = feed.payload(at, 1)
        widths.add(payload.x.shape[2])
        short, new = feed.training(1).step(state, payload)
        long, expected = step(state, full)
        np.testing.assert_allclose(new["rnn/loss"][0], expected["rnn/loss"], rtol=1e-5)
        # With plain descent at rate 1 the difference of parameters is the gradient.
        for a, b in zip(jax.tree.leaves(short.params), jax.tree.leaves(long.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert len(widths) > 1
    assert min(widths) < LONGEST


def test_stopped_and_resumed_is_bitwise_equal(tmp_path):
    buckets = make_buckets(LENGTH, LONGEST, n=3, batch_size=1, group=2)
    t = trainer()

    def run(steps, folder):
        feed = bucket_feed(t, source(), rolls(), buckets, seed=5)
        return fit(
            feed,
            key=jax.random.key(0),
            steps=steps,
            steps_per_call=buckets.group,
            checkpoints=Checkpoints(folder, 2),
        )

    whole = run(12, tmp_path / "whole")
    run(6, tmp_path / "parts")
    again = run(12, tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [0, LONGEST + 1])
def test_lengths_that_are_zero_or_beyond_the_array_are_refused(bad):
    with pytest.raises(DataError, match=f"from 1 to {LONGEST}, .*found .*{bad}"):
        make_buckets(np.append(LENGTH, bad), LONGEST, n=2, batch_size=1)


def test_too_few_examples_and_no_buckets_are_refused():
    with pytest.raises(DataError, match="batch_size=21 is more than the 20"):
        make_buckets(LENGTH, LONGEST, n=2, batch_size=21)
    with pytest.raises(ConfigError, match="at least 1 bucket"):
        make_buckets(LENGTH, LONGEST, n=0, batch_size=1)


def test_equal_lengths_make_one_bucket():
    buckets = make_buckets(np.full(10, 7), 9, n=4, batch_size=2)
    assert buckets.bounds == (7,)
    assert buckets.batch(0, 3)[0] == 7


def test_a_model_of_whole_sequences_and_data_without_lengths_are_refused():
    plain = source()._replace(spec=DataSpec((LONGEST, 3), "binary", step="frame"))
    with pytest.raises(ConfigError, match=r"has none\. Leave --buckets out"):
        buckets_for(trainer(), plain, rolls()._replace(length=None), 2, 2, 1)

    def fixed(params, state, batch, key, step):
        return batch.x.reshape(-1, LONGEST * 3).sum(1), Aux(state, {})

    model = rnn(SPEC, d_embed=4, d_hidden=4)
    t = training(model._replace(losses={"rnn": fixed}), optax.sgd(1e-2))
    with pytest.raises(ConfigError, match="takes sequences of 24 steps only"):
        buckets_for(t, source(), rolls(), 3, 2, 1)
    assert len(buckets_for(trainer(), source(), rolls(), 3, 2, 1).bounds) == 3
