"""Initialisation from data: once, on the first batch before step 0, in transforms and in `fit`.

The model is `toy.whitening`, whose first batch gives its shift and its scale.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data_checks import rows_at
from gates import assert_close, assert_same, differ, member, stack, structure
from toy import (
    JITTER,
    MEMBERS,
    SPEC,
    STEPS,
    TIGHT,
    TRAIN,
    B,
    batches,
    jitted,
    keys,
    run,
    whitening,
)

from genjax.data import Source, Splits, cast
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import device_feed, fit, host_feed
from genjax.learning.members import ensemble, sweep
from genjax.learning.optim import track_ema
from genjax.learning.sharding import make_mesh, shard
from genjax.learning.step import PREPARATION, eval_params, training
from genjax.learning.transforms import (
    compiled,
    feed,
    microbatch,
    repeat_steps,
    scan_steps,
    skip_nonfinite,
)
from genjax.protocol import Batch

TX = optax.chain(optax.adam(0.05), track_ema(0.9))


@functools.cache
def prepared_by_data(scale=1.0):
    return training(whitening(scale), TX)


T = prepared_by_data()


def prepared(key=None, batch=None, t=T):
    key = jax.random.key(0) if key is None else key
    return jitted(t.prepare)(jitted(t.init)(key), batches()[0] if batch is None else batch)


def formula(ts, batch, scale=1.0):
    """Shift and scale of a batch, with the noise of the key that is kept for the preparation."""
    x, weight = np.asarray(batch.x, float), np.ones(B)
    if batch.weight is not None:
        weight = np.asarray(batch.weight, float)
    mean = np.average(x, axis=0, weights=weight)
    noise = np.asarray(jax.random.normal(jax.random.fold_in(ts.key, 2**32 - 1), (3,)), float)
    variance = np.average((x - mean) ** 2, axis=0, weights=weight)
    return {"shift": scale * (mean + JITTER * noise), "log_scale": 0.5 * np.log(variance)}


def close(own, wanted):
    for name, value in wanted.items():
        np.testing.assert_allclose(own[name], value, rtol=1e-5, atol=1e-6)


# --- what it does ---------------------------------------------------------------------------------


def test_parameters_are_those_of_the_batch_and_everything_begins_there():
    first, batch = jitted(T.init)(jax.random.key(0)), batches()[0]
    ts = jitted(T.prepare)(first, batch)
    close(ts.params["net"], formula(first, batch))
    assert_same(ts.params["slow"], ts.params["net"])  # what follows a player
    assert_same(ts.opt, {"net": TX.init(ts.params["net"])})  # and so the average
    assert_same(eval_params(ts), ts.params)
    assert int(ts.state["net"]["prepared"]) == 1
    assert_same((ts.step, ts.key), (first.step, first.key))
    assert structure(ts) == structure(first)


def test_optimisers_begin_anew_where_there_were_steps_before():
    ts, _ = run(T, prepared(), batches())
    again = jitted(T.prepare)(ts, batches()[1])
    assert_same(again.opt, {"net": TX.init(again.params["net"])})
    assert int(again.step) == STEPS


@pytest.mark.parametrize("junk", [1e30, np.nan, np.inf])
def test_examples_of_weight_zero_are_ignored(junk):
    weight = jnp.asarray([1.0, 2, 1, 0.5, 0, 3, 1, 0])
    (batch,) = batches(weight=weight, steps=1)
    spoiled = batch._replace(x=batch.x.at[jnp.asarray([4, 7])].set(junk))
    ts = prepared(batch=spoiled)
    assert_same(ts, prepared(batch=batch))
    close(ts.params["net"], formula(ts, batch))


def test_no_turn_of_a_step_draws_from_its_key():
    """A step's numbers begin at 0 and a run never reaches this one."""
    assert int(PREPARATION) == 2**32 - 1
    assert differ(prepared().params["net"], prepared(jax.random.key(1)).params["net"])


def test_a_batch_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="must have shape"):
        T.prepare(T.init(jax.random.key(0)), Batch(jnp.zeros((B, 4))))


# --- every transform ------------------------------------------------------------------------------


def batch_at(arrays, step):
    return jax.tree.map(lambda leaf: leaf[step], arrays)


def mesh():
    return make_mesh({"data": 2, "fsdp": 4})


ALONE = {
    "microbatch": (lambda t: microbatch(t, 4), lambda data: data[0]),
    "scan_steps": (scan_steps, stack),
    "repeat_steps": (lambda t: repeat_steps(t, 2), lambda data: data[0]),
    "feed": (lambda t: feed(t, batch_at), stack),
    "repeat_steps(feed)": (lambda t: repeat_steps(feed(t, batch_at), 2), stack),
    "skip_nonfinite": (skip_nonfinite, lambda data: data[0]),
    "shard": (lambda t: shard(t, mesh()), lambda data: data[0]),
    "scan_steps(microbatch(skip_nonfinite(shard)))": (
        lambda t: scan_steps(microbatch(skip_nonfinite(shard(t, mesh())), 2)),
        stack,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_transforms_pass_it_on_with_the_batch_of_the_first_step(name):
    wrap, given = ALONE[name]
    t = wrap(T)
    got = jitted(t.prepare)(jitted(t.init)(jax.random.key(0)), given(batches()))
    assert_close(got, prepared(), TIGHT)


@pytest.mark.parametrize("name", [*ALONE, "compiled", "ensemble", "sweep"])
def test_a_model_without_it_has_none_after_any_transform(name):
    others = {
        "compiled": compiled,
        "ensemble": ensemble,
        "sweep": lambda t: sweep(lambda s: t, s=[1.0]),
    }
    wrap = others[name] if name in others else ALONE[name][0]
    assert TRAIN.prepare is None
    assert wrap(TRAIN).prepare is None


def test_compiled_it_is_one_program_that_takes_the_state_over():
    t = compiled(T)
    first = t.init(jax.random.key(0))
    ts = t.prepare(first, batches()[0])
    assert_close(ts, prepared(), TIGHT)
    assert first.state["net"]["prepared"].is_deleted()  # what it does not read is not given away
    ts, _ = t.step(ts, batches()[1])  # nothing is shared that could not be donated
    assert np.isfinite(ts.params["slow"]["shift"]).all()


SCALES = [1.0, 0.5, 2.0]
MEMBERS_OF = {
    "ensemble": lambda mode: ensemble(T, mode),
    "sweep": lambda mode: sweep(
        lambda scale: training(whitening(scale), TX), mode=mode, scale=SCALES
    ),
    "skip_nonfinite(ensemble)": lambda mode: skip_nonfinite(ensemble(T, mode)),
    "microbatch(ensemble)": lambda mode: microbatch(ensemble(T, mode), 2),
    "shard(ensemble)": lambda mode: shard(ensemble(T, mode), mesh()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS_OF)
@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_members_are_prepared_each_with_its_own_noise_as_solo_runs_are(name, mode):
    t, (batch,) = MEMBERS_OF[name](mode), batches(steps=1)
    first = jitted(t.init)(keys())
    got = jitted(t.prepare)(first, batch)
    scales = SCALES if name == "sweep" else [1.0] * MEMBERS
    for index, (key, scale) in enumerate(zip(keys(), scales, strict=True)):
        wanted = prepared(key, batch, prepared_by_data(scale))
        assert_close(member(got._replace(step=np.zeros(MEMBERS, np.int32)), index), wanted, TIGHT)
    assert differ(member(got.params, 0), member(got.params, 1))
    assert got.step.shape == ()
    assert structure(got) == structure(first)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["vmap", "map"])
@pytest.mark.parametrize("axis", [0, 1])
def test_members_with_batches_of_their_own_are_prepared_from_them(mode, axis):
    own = [batches(seed)[0] for seed in range(MEMBERS)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *own)
    t = ensemble(T, mode, batch_axis=axis)
    for one, given in (
        (t, together),
        (scan_steps(t), jax.tree.map(lambda leaf: leaf[None], together)),
    ):
        got = jitted(one.prepare)(jitted(t.init)(keys()), given)
        for index, key in enumerate(keys()):
            wanted = prepared(key, own[index])
            assert_close(member(got.params, index), wanted.params, TIGHT)


def test_auto_prepares_without_timing_anything(monkeypatch):
    monkeypatch.setattr("genjax.learning.members.fastest_mode", None)
    t = ensemble(T, "auto")
    got = jitted(t.prepare)(jitted(t.init)(keys()), batches()[0])
    assert_close(member(got.params, 2), prepared(keys()[2]).params, TIGHT)


# --- in `fit` -------------------------------------------------------------------------------------

N, SEED, LENGTH = 40, 3, 8


def data():
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(N, 3)).astype(np.float32)
    arrays = Batch(x)
    return Source(SPEC, lambda: Splits(arrays, arrays, arrays), cast(SPEC)), arrays


@functools.cache
def fed(make=device_feed, wrap=lambda t: t):
    feed = make(wrap(T), *data(), B, SEED)
    return feed._replace(training=functools.cache(feed.training))


def trained(feed, **settings):
    settings = {"key": jax.random.key(0), "steps": LENGTH, "steps_per_call": 4, **settings}
    return fit(feed, **settings)


@functools.cache
def reference(seed=0):
    """The loop that `fit` is: prepared once from the batch of step 0, then trained."""
    source, arrays = data()
    rows = [Batch(jnp.asarray(rows_at(source, arrays, B, SEED, step).x)) for step in range(LENGTH)]
    ts = prepared(jax.random.key(seed), rows[0])
    return run(T, ts, rows)[0]


@pytest.mark.slow
@pytest.mark.parametrize("make", [device_feed, host_feed])
def test_fit_prepares_a_new_run_once_from_the_batch_of_step_0(make):
    ts = trained(fed(make))
    assert int(ts.state["net"]["prepared"]) == 1
    assert_close(ts, reference(), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [device_feed, host_feed])
def test_going_on_never_repeats_it_and_is_bitwise_equal(tmp_path, make):
    """From every step that was saved, the first one among them."""
    wanted = trained(fed(make), checkpoints=Checkpoints(tmp_path, keep=9), checkpoint_every=1)
    for step in Checkpoints(tmp_path).steps():
        folder = tmp_path / f"from{step}"
        folder.mkdir()
        (tmp_path / str(step)).rename(folder / str(step))
        assert_same(trained(fed(make), checkpoints=Checkpoints(folder)), wanted)


def test_a_run_that_saved_nothing_begins_again_bit_for_bit(tmp_path):
    assert_same(trained(fed()), trained(fed(), checkpoints=Checkpoints(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_members_in_fit_equal_solo_runs(mode):
    feed = device_feed(ensemble(T, mode), *data(), B, SEED)
    members = jax.vmap(jax.random.key)(np.arange(2, dtype=np.uint32))
    got = trained(feed, key=members)
    for seed in range(2):
        assert_close(member(got.params, seed), reference(seed).params, 1e-4)
    np.testing.assert_array_equal(got.state["net"]["prepared"], 1)
