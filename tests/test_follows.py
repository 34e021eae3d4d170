"""Entries of the parameters that follow a player: d entry + (1 - d) player after each optimiser
step, against the formula and against solo runs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gates import assert_close, assert_same, differ, member, optimised, stack
from toy import (
    MEMBERS,
    STEPS,
    TIGHT,
    anchored,
    anchored_by_hand,
    batches,
    jitted,
    keys,
    run,
    swap,
    toy,
)

from genjax.checks import checked
from genjax.errors import ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.members import ensemble, sweep
from genjax.learning.optim import track_ema
from genjax.learning.sharding import make_mesh, shard
from genjax.learning.step import eval_params, training
from genjax.learning.transforms import (
    compiled,
    feed,
    microbatch,
    repeat_steps,
    scan_steps,
    skip_nonfinite,
)

RATE = 0.1


@functools.cache
def follower(decay=0.9):
    return training(anchored(decay), optax.sgd(RATE))


def begin(t, seed=0):
    """A start whose target is elsewhere than its player."""
    ts = jitted(t.init)(jax.random.key(seed))
    return ts._replace(params={**ts.params, "target": {"w": jnp.asarray([1.0, -2.0, 0.5])}})


def warming(step):
    """For steps by hand, which are Python's numbers, too."""
    return jnp.minimum(0.9, jnp.asarray(step, jnp.float32) / 2)


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0, warming])
def test_an_entry_follows_its_player_as_the_formula_says(decay):
    """The gradient in the formula is that of w alone: the entry is never differentiated."""
    t = follower(decay)
    ts, data = begin(t), batches()
    got, metrics = run(t, ts, data)
    wanted = anchored_by_hand(ts, data, RATE, decay)
    np.testing.assert_allclose(got.params["net"]["w"], wanted["net"]["w"], rtol=1e-5)
    np.testing.assert_allclose(got.params["target"]["w"], wanted["target"]["w"], rtol=1e-5)
    assert got.opt.keys() == {"net"}
    # A step sees the entry as the steps before have left it.
    apart = ts.params["net"]["w"] - ts.params["target"]["w"]
    np.testing.assert_allclose(metrics[0]["net/apart"], np.square(apart).sum(), rtol=1e-5)


def test_a_decay_of_0_is_the_player_and_of_1_is_frozen_bit_for_bit():
    ts = begin(follower(0.0))
    for decay in (0.0, 0, lambda step: jnp.zeros(())):
        got, _ = run(training(anchored(decay), optax.sgd(RATE)), ts, batches())
        assert_same(got.params["target"], got.params["net"])
    for decay in (1.0, 1, lambda step: jnp.ones(())):
        got, _ = run(training(anchored(decay), optax.sgd(RATE)), ts, batches())
        assert_same(got.params["target"], ts.params["target"])


def test_an_average_of_equal_values_stays_exactly_equal():
    t = training(anchored(0.999), optax.sgd(0.0))
    ts = jitted(t.init)(jax.random.key(0))
    assert_same(ts.params["target"], ts.params["net"])
    got, _ = run(t, ts, batches())
    assert_same(got.params, ts.params)


def test_it_moves_once_a_step_after_the_last_turn():
    """Of two turns of the player only what the second one leaves is averaged."""
    t = training(toy(follows={"slow": ("disc", 0.5)}), optax.sgd(RATE))
    ts = jitted(t.init)(jax.random.key(0))
    got, _ = run(t, ts, batches(steps=1))
    was, now = ts.params["disc"]["a"], got.params["disc"]["a"]
    np.testing.assert_allclose(got.params["slow"]["a"], 0.5 * was + 0.5 * now, rtol=1e-6)


def test_evaluation_sees_it_as_it_is():
    t = training(anchored(), optax.chain(optax.sgd(RATE), track_ema(0.9)))
    got, _ = run(t, begin(t), batches())
    found = eval_params(got)
    assert_same(found["target"], got.params["target"])
    assert_same(found["net"], got.opt["net"][-1].ema)


# --- every transform ------------------------------------------------------------------------------


def batch_at(arrays, step):
    return jax.tree.map(lambda leaf: leaf[step], arrays)


def wanted_of(ts, decay=0.9):
    return anchored_by_hand(ts, batches(), RATE, decay)


def close(params, wanted):
    # The mean over a batch has other roundings where it is split; by hand it is in float64.
    for name in ("net", "target"):
        np.testing.assert_allclose(params[name]["w"], wanted[name]["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_batch_move_it_once(parts):
    ts = begin(follower())
    close(run(microbatch(follower(), parts), ts, batches())[0].params, wanted_of(ts))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["scan_steps", "feed", "skip_nonfinite", "shard", "compiled", "all at once"]
)
def test_under_every_transform_it_follows_as_before(name):
    t, ts, arrays = follower(), begin(follower()), stack(batches())
    wanted = wanted_of(ts)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    if name == "scan_steps":
        got, _ = jitted(scan_steps(t).step)(ts, arrays)
    elif name == "feed":
        got, _ = jitted(repeat_steps(feed(t, batch_at), STEPS).step)(ts, arrays)
    elif name == "skip_nonfinite":
        got, _ = run(skip_nonfinite(t), ts, batches())
    elif name == "shard":
        got, _ = run(shard(t, mesh), ts, batches())
    elif name == "compiled":
        got, step = jax.tree.map(jnp.copy, ts), compiled(t).step
        for batch in batches():
            got, _ = step(got, batch)
    else:
        t = microbatch(skip_nonfinite(scan_steps(shard(t, mesh))), 2)
        got, _ = jitted(t.step)(ts, arrays)
    close(got.params, wanted)


def test_the_state_of_a_new_run_can_be_donated():
    """The entry is a copy of its player and no alias."""
    t = compiled(follower())
    ts, _ = t.step(t.init(jax.random.key(0)), batches()[0])
    assert np.isfinite(ts.params["target"]["w"]).all()


def test_a_step_that_is_left_out_leaves_it():
    t, ts = skip_nonfinite(follower(0.5)), begin(follower())
    bad = batches()[0]._replace(x=batches()[0].x.at[0, 0].set(jnp.inf))
    got, metrics = run(t, ts, [bad])
    assert float(metrics[0]["skipped"]) == 1
    assert_same(got.params, ts.params)


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_members_have_each_its_own(mode):
    t = ensemble(follower(), mode)
    got, metrics = run(t, jitted(t.init)(keys()), batches())
    runs = [run(follower(), jitted(follower().init)(key), batches()) for key in keys()]
    solo = stack([ts for ts, _ in runs])
    assert_close(got, solo._replace(step=solo.step[0]), TIGHT)
    assert_close(swap(stack(metrics)), stack([stack(one) for _, one in runs]), TIGHT)
    assert differ(member(got.params["target"], 0), member(got.params["target"], 1))


def test_its_decay_can_be_swept():
    decays = np.asarray([0.0, 0.5, 1.0], np.float32)
    t = sweep(lambda decay: training(anchored(decay), optax.sgd(RATE)), decay=decays)
    first = jitted(t.init)(keys())
    got, _ = run(t, first, batches())
    for index in range(MEMBERS):
        start = member(first._replace(step=jnp.zeros(MEMBERS, jnp.int32)), index)
        close(member(got.params, index), wanted_of(start, float(decays[index])))
    assert_same(member(got.params["target"], 0), member(got.params["net"], 0))
    assert_same(member(got.params["target"], 2), member(first.params["target"], 2))


def test_going_on_from_a_checkpoint_is_bitwise_equal(tmp_path):
    t = follower(warming)
    step = optimised(t.step)
    ts = begin(t)
    for index, batch in enumerate(batches()):
        if index == 1:
            Checkpoints(tmp_path).save(ts)
        ts, _ = step(ts, batch)
    again = Checkpoints(tmp_path).restore(jax.eval_shape(t.init, jax.random.key(0))).state
    for batch in batches()[1:]:
        again, _ = step(again, batch)
    assert_same(again, ts)


# --- models that are built by hand, and what is refused -------------------------------------------


def unchecked(**changes):
    """A model that did not pass `checked`."""
    model = anchored()

    def init(key):
        params, state = model.init(key)
        return {"net": params["net"]}, state

    return model._replace(init=init, **changes)


def test_a_model_that_was_not_checked_follows_too():
    t = training(unchecked(), optax.sgd(RATE))
    ts = jitted(t.init)(jax.random.key(0))
    assert_same(ts.params["target"], ts.params["net"])
    close(run(t, ts, batches())[0].params, wanted_of(ts))


def test_an_entry_that_init_makes_begins_as_it_was_made():
    def init(key):
        params, state = unchecked().init(key)
        return {**params, "target": {"w": jnp.ones((3,))}}, state

    model = unchecked()._replace(init=init)
    for one in (model, checked(model)):
        ts = jitted(training(one, optax.sgd(RATE)).init)(jax.random.key(0))
        np.testing.assert_array_equal(ts.params["target"]["w"], 1.0)


def test_an_entry_that_is_not_like_its_player_is_refused():
    def init(key):
        params, state = unchecked().init(key)
        return {**params, "target": {"v": jnp.ones((3,)), "w": jnp.ones((2,))}}, state

    t = training(unchecked()._replace(init=init), optax.sgd(RATE))
    with pytest.raises(ConfigError) as caught:
        t.init(jax.random.key(0))
    text = str(caught.value)
    assert "params['target'], which follows 'net', does not fit" in text
    assert "v: not of this model" in text
    assert "w: expected shape [3]; found [2]" in text


@pytest.mark.slow
def test_a_state_without_the_entry_is_refused():
    def loss(params, state, batch, key, step):
        return anchored().losses["net"](
            {**params, "target": params["net"]}, state, batch, key, step
        )

    t = training(unchecked(losses={"net": loss}), optax.sgd(RATE))
    ts = t.init(jax.random.key(0))
    with pytest.raises(ConfigError, match=r"no entry 'target', which follows 'net'\."):
        t.step(ts._replace(params={"net": ts.params["net"]}), batches()[0])


@pytest.mark.parametrize(
    ("follows", "text"),
    [
        ({"target": ("student", 0.9)}, "names the player 'student'; those with a loss are: net"),
        ({"net": ("net", 0.9)}, "'net' has a loss and cannot follow"),
        ({"target": ("net", 1.5)}, r"must be in \[0, 1\]; got 1.5"),
    ],
)
def test_what_names_no_player_is_refused_by_the_model_and_by_the_training(follows, text):
    model = anchored()._replace(follows=follows)
    for use in (checked, lambda model: training(model, optax.sgd(RATE))):
        with pytest.raises(ConfigError, match=text):
            use(model)
