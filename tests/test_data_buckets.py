"""Sequences of unequal length in buckets: which buckets, the order of their batches, equal losses
and gradients, resume bit for bit, and runs from before there were any.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import optax
import pytest
import scipy.io

from genjax.cli import main
from genjax.data import Source, Splits
from genjax.data.buckets import TURN, BucketOrder, buckets_for, buckets_of
from genjax.data.source import cast
from genjax.errors import ConfigError, Interrupted
from genjax.families.rnn import rnn
from genjax.families.vae import vae
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import Hook, choose_feed, fit, host_feed
from genjax.learning.members import ensemble
from genjax.learning.sharding import make_mesh, shard
from genjax.learning.step import training
from genjax.protocol import Batch, DataSpec

SPEC = DataSpec((40, 3), "binary", step="frame", lengths=True, name="rolls")
BATCH, SEED = 4, 3


def lengths_of(n=50, seed=0):
    found = np.random.default_rng(seed).geometric(0.15, n).clip(1, 40).astype(np.int32)
    found[0] = 40
    return found


@functools.cache
def rolls():
    rng, lengths = np.random.default_rng(1), lengths_of()
    x = (rng.random((50, 40, 3)) < 0.3).astype(np.uint8)
    x[np.arange(40)[None] >= lengths[:, None]] = 0
    length: Any = lengths
    arrays = Batch(x, length=length)
    return Source(SPEC, lambda: Splits(arrays, arrays, arrays), cast(SPEC)), arrays


@functools.cache
def model():
    return rnn(SPEC, d_embed=4, d_hidden=5)


def buckets(most=4):
    found = buckets_for(model(), *rolls(), BATCH, most)
    assert found is not None
    return found


def feed(make=lambda t: t, **kwargs):
    t = make(training(model(), optax.adam(0.01)))
    return choose_feed(t, *rolls(), BATCH, SEED, buckets=buckets(), **kwargs)


def bits(state):
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def test_buckets_are_those_with_the_least_padding():
    lengths = np.array([5, 1, 2, 9, 9, 2, 6, 1])
    least = min(  # of all ways to cut the sorted lengths twice, two in a bucket at least
        a * np.sort(lengths)[a - 1] + (b - a) * np.sort(lengths)[b - 1] + (8 - b) * 9
        for a in range(2, 5)
        for b in range(a + 2, 7)
    )
    found = buckets_of(lengths, 12, 2, 3)
    assert sum(len(m) * p for m, p in zip(found.members, found.padded, strict=True)) == least
    assert found.gain == 8 * 12 / least
    for own, padded in zip(found.members, found.padded, strict=True):
        assert lengths[own].max() == padded
        assert len(own) >= 2
    assert sorted(np.concatenate(found.members)) == list(range(8))
    assert buckets_of(np.full(9, 7), 7, 2).padded == (7,)  # nothing to gain
    assert buckets_of(lengths, 12, 5).padded == (9,)  # no second batch


@pytest.mark.slow
@pytest.mark.parametrize("most", [2, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_every_example_once_an_epoch_but_for_one_turn_of_a_bucket(most, batch_size):
    found = buckets_of(lengths_of(), 40, batch_size, most)
    order, counts, step = BucketOrder(found, batch_size, SEED), np.zeros(50, int), 0
    for epoch in range(1, 9):
        while (step + 1) * batch_size <= epoch * 50:
            index = order(step)
            bucket, _, left = order.at(step)
            assert np.isin(index, found.members[bucket]).all()
            assert 1 <= left <= TURN
            if left > 1:  # one shape to the end of a turn
                assert order.at(step + 1)[::2] == (bucket, left - 1)
            counts += np.bincount(index, minlength=50)
            step += 1
        assert (abs(counts - epoch) <= 2).all()
    # Within a bucket no example is a turn ahead of another.
    assert all(np.ptp(counts[own]) <= 1 for own in found.members)
    again = BucketOrder(found, batch_size, SEED)
    assert all((again(step) == order(step)).all() for step in (40, 3, 17, 99_999))
    other = BucketOrder(found, batch_size, SEED + 1)
    assert any((other(step) != order(step)).any() for step in range(5))


@pytest.mark.slow
def test_loss_and_gradient_are_those_of_the_fully_padded_batch():
    source, arrays = rolls()
    params, state = model().init(jax.random.key(0))
    order = BucketOrder(buckets(), BATCH, SEED)

    def of(params, steps, index):
        raw = jax.tree.map(lambda leaf: leaf[index], arrays)
        raw = raw._replace(x=raw.x[:, :steps])
        batch = source.prepare(jax.random.key(0), raw)
        return model().losses["rnn"](params, state, batch, jax.random.key(1), 0)[0].mean()

    shapes = set()
    for step in range(20):
        index = order(step)
        short, full = (
            jax.value_and_grad(of)(params, steps, index) for steps in (order.padded(step), 40)
        )
        shapes.add(order.padded(step))
        for one, other in zip(jax.tree.leaves(short), jax.tree.leaves(full), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    assert len(shapes) == 4


def test_dispatches_have_one_shape_and_programs_are_few():
    own, shapes, step = feed(), set(), 0
    while step < 200:
        k = own.steps_at(step, min(50, 200 - step))
        payload = own.payload(step, k)
        assert payload.x.shape[:2] == (k, BATCH)
        assert payload.length.max() <= payload.x.shape[2]
        shapes.add(payload.x.shape)
        step += k
    assert len(shapes) <= 5  # one for each bucket, and the last short dispatch


@pytest.mark.slow
def test_resume_is_bitwise_and_members_share_buckets(tmp_path):
    run = functools.partial(fit, key=jax.random.key(0), steps=21)
    whole = run(feed(), steps_per_call=50)
    assert bits(run(feed(), steps_per_call=2)) == bits(whole)

    def stop(step, state):
        if step >= 9:
            raise Interrupted("stopped", 15)

    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(Interrupted):
        run(feed(), checkpoints=checkpoints, checkpoint_every=3, hooks=[Hook(1, stop)])
    begun = checkpoints.steps()[-1]
    assert 0 < begun < 21
    assert bits(run(feed(), checkpoints=checkpoints)) == bits(whole)
    keys = jax.random.split(jax.random.key(5), 2)
    both = run(feed(ensemble), key=keys)
    alone = run(feed(), key=keys[1])
    for one, two in zip(jax.tree.leaves(alone.params), jax.tree.leaves(both.params), strict=True):
        np.testing.assert_allclose(one, two[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_device_of_a_mesh_is_as_no_mesh():
    mesh = make_mesh({"data": 1})
    run = functools.partial(fit, key=jax.random.key(0), steps=9)
    sharded = run(feed(functools.partial(shard, mesh=mesh), mesh=mesh))
    assert bits(sharded) == bits(run(feed()))


@pytest.mark.slow
def test_one_bucket_is_todays_order():
    t = training(model(), optax.adam(0.01))
    run = functools.partial(fit, key=jax.random.key(0), steps=9)
    assert buckets_for(model(), *rolls(), BATCH, 1) is None
    old = run(choose_feed(t, *rolls(), BATCH, SEED))
    assert bits(run(host_feed(t, *rolls(), BATCH, SEED))) == bits(old)


def test_who_gets_buckets_and_who_is_told_why_not():
    source, arrays = rolls()
    assert buckets_for(model(), source, arrays, BATCH) is not None  # mean 7 of 40
    alike = arrays._replace(length=np.full(50, 40, np.int32))
    assert buckets_for(model(), source, alike, BATCH) is None
    assert buckets_for(model(), source, arrays, BATCH, place="device") is None
    shapes = vae(dataclasses.replace(SPEC, lengths=False), hidden=(4,), latent_dim=2)
    assert buckets_for(shapes, source, arrays, BATCH) is None
    with pytest.raises(ConfigError, match=r"--buckets 4 cannot be: this model takes examples of"):
        buckets_for(shapes, source, arrays, BATCH, 4)
    with pytest.raises(ConfigError, match=r"--place device keeps the data on the device"):
        buckets_for(model(), source, arrays, BATCH, 4, "device")
    with pytest.raises(ConfigError, match=r"has no lengths, so all its examples are of one length"):
        buckets_for(model(), source, arrays._replace(length=None), BATCH, 4)


def written(tmp_path):
    """A .mat file of pieces of which most are short."""
    rng, content = np.random.default_rng(0), {}
    for name, n in (("traindata", 30), ("validdata", 2), ("testdata", 2)):
        content[name] = np.empty((1, n), object)
        for i in range(n):
            length = 60 if i == 0 else 3 + i % 5
            content[name][0, i] = (rng.random((length, 88)) < 0.1).astype(np.uint8)
    scipy.io.savemat(tmp_path / "mine.mat", content)
    return str(tmp_path / "mine.mat")


def train(path, out, *more):
    small = "--batch-size 2 --d-embed 4 --d-hidden 4 --evaluate-every 0 --sample-every 0 --plain"
    main(["train", "lstm-jsb", "--data", path, "--out", str(out), *small.split(), *more])


@pytest.mark.slow
def test_a_run_says_its_buckets_and_an_old_run_goes_on_without(tmp_path, capsys):
    path, out = written(tmp_path), tmp_path / "run"
    train(path, out, "--steps", "3")
    said = capsys.readouterr().out
    assert "sequences in" in said
    assert "times fewer than at 60 for all (--buckets 1)" in said
    old = tmp_path / "old"
    train(path, old, "--steps", "3", "--buckets", "1")
    assert "sequences in" not in capsys.readouterr().out
    config = json.loads((old / "config.json").read_text())
    del config["schedule"]["buckets"]
    (old / "config.json").write_text(json.dumps(config))
    train(path, old, "--steps", "3")
    said = capsys.readouterr().out
    assert "sequences in" not in said
    assert "nothing is left to train" in said
