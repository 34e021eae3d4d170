"""The train step against updates worked out by hand.

What is trained is the game of `toy.py`.
"""

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gates import assert_close, assert_same, differ
from toy import (
    RATES,
    STEPS,
    TIGHT,
    TRAIN,
    TURNS,
    B,
    batches,
    by_hand,
    jitted,
    run,
    sgd,
    start,
    toy,
)

from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.vae import vae
from genjax.learning.optim import track_ema
from genjax.learning.step import eval_params, training
from genjax.learning.transforms import (
    microbatch,
)
from genjax.protocol import Batch, DataSpec


@pytest.mark.parametrize(
    "weight", [None, np.asarray([1, 0, 2, 0.5, 0, 1, 3, 1], np.float32)], ids=["equal", "weighted"]
)
@pytest.mark.parametrize(
    "turns", [TURNS, (("gen", 1), ("disc", 2)), (("disc", 1), ("gen", 3), ("disc", 1)), ()]
)
def test_steps_equal_those_by_hand(turns, weight):
    t = training(toy(turns), sgd())
    data = batches(weight=None if weight is None else jnp.asarray(weight))
    order = turns or (("gen", 1), ("disc", 1))
    got, metrics = run(t, start(), data)
    params, losses = by_hand(start(), data, order)
    chex.assert_trees_all_close(
        {"gen": got.params["gen"]["w"], "disc": got.params["disc"]["a"]}, params, rtol=TIGHT
    )
    assert metrics[-1].keys() == {"gen/loss", "gen/first", "disc/loss"}
    for player, loss in losses.items():
        np.testing.assert_allclose(metrics[-1][f"{player}/loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(
        metrics[-1]["gen/first"], np.average(data[-1].x[:, 0], weights=weight), rtol=1e-4, atol=1e-6
    )
    assert int(got.step) == STEPS
    assert float(got.state["disc"]["evaluations"]) == STEPS * sum(
        times for player, times in order if player == "disc"
    )
    assert_same((got.params["frozen"], got.key), (start().params["frozen"], start().key))


def test_the_step_counts_from_where_the_state_is():
    """Steps 2 and 3 alone, from a state that says 2: the noise is that of steps 2 and 3."""
    data = batches(steps=4)
    half, _ = run(TRAIN, start(), data[:2])
    params, _ = by_hand(half, data[2:])
    got, _ = run(TRAIN, half, data[2:])
    chex.assert_trees_all_close(got.params["gen"]["w"], params["gen"], rtol=TIGHT)


@pytest.mark.slow
def test_only_the_ratio_of_weights_counts():
    one, ten = (run(TRAIN, start(), batches(weight=jnp.full(B, value))) for value in (1.0, 10.0))
    assert_close(ten, one, TIGHT)
    assert_close(one, run(TRAIN, start(), batches()), TIGHT)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8", "bool"])
def test_weights_of_few_bits_are_summed_in_float32(dtype):
    """Of which the sum has no room in their own type."""
    model = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
    t, batch = training(model, optax.sgd(0.1)), example_batch(model.spec, jax.random.key(1), 4)
    weight = jnp.asarray([6e4, 6e4, 0, 3e4] if dtype == "float16" else [200, 200, 0, 101])
    weight = weight.astype(dtype)
    ts, found = t.init(jax.random.key(0)), []
    for given in (weight, weight.astype(jnp.float32)):
        found.append(jax.jit(t.step)(ts, batch._replace(weight=given)))
    assert_same(*found)
    assert float(found[0][1]["vae/loss"]) > 0


@pytest.mark.parametrize("weight", [[1.0, 1.0], np.ones(2, np.complex64)])
def test_weights_that_are_no_real_numbers_are_refused(weight):
    model = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
    t = training(model, optax.sgd(0.1))
    ts = jax.eval_shape(t.init, jax.random.key(0))
    batch = example_batch(model.spec, jax.random.key(1), 2)._replace(weight=weight)
    with pytest.raises(TypeError, match=r"batch\.weight must be"):
        jax.eval_shape(lambda ts: t.step(ts, batch), ts)


def test_an_example_of_weight_zero_may_be_anything():
    weight = jnp.asarray([1.0] * (B - 1) + [0.0])
    data = batches(weight=weight)
    wanted = run(TRAIN, start(), data)
    for junk in (1e30, jnp.nan, jnp.inf):
        assert_same(
            run(TRAIN, start(), [one._replace(x=one.x.at[-1].set(junk)) for one in data]), wanted
        )
    assert differ(
        run(TRAIN, start(), [one._replace(x=one.x.at[0].set(5.0)) for one in data])[0].params,
        wanted[0].params,
    )


def test_one_optimiser_serves_all_players():
    got, _ = run(training(toy(), optax.sgd(0.1)), start(), batches())
    wanted, _ = run(
        training(toy(), {"gen": optax.sgd(0.1), "disc": optax.sgd(0.1)}), start(), batches()
    )
    assert_same(got, wanted)


@pytest.mark.parametrize(
    ("tx", "turns", "message"),
    [
        (
            {"gen": optax.sgd(0.1)},
            TURNS,
            "one optimiser for each player .gen, disc.; got them for: gen",
        ),
        ({}, TURNS, "got them for: none"),
        (sgd() | {"frozen": optax.sgd(0.1)}, TURNS, "got them for: gen, disc, frozen"),
        (sgd(), (("gen", 1), ("critic", 1)), "must name a player"),
        (sgd(), (("gen", 0), ("disc", 1)), "count >= 1"),
        (sgd(), (("gen", 1),), "'disc' has a loss but no turn"),
        (sgd(), (("gen", 1.5), ("disc", 1)), "a count >= 1; got .*1.5"),
    ],
)
def test_players_optimisers_and_turns_must_agree(tx, turns, message):
    with pytest.raises(ConfigError, match=message):
        training(toy(turns), tx)


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="typed PRNG key"):
        TRAIN.init(jax.random.key_data(jax.random.key(0)))
    with pytest.raises(ValueError, match="must have shape"):
        TRAIN.step(start(), Batch(jnp.zeros((B, 4))))
    with pytest.raises(TypeError, match="Batch"):
        TRAIN.step(start(), jnp.zeros((B, 3)))


def test_averages_are_taken_where_an_optimiser_tracks_them():
    t = training(
        toy(), {"gen": optax.chain(optax.sgd(0.1), track_ema(0.9)), "disc": optax.sgd(0.05)}
    )
    ts, _ = run(t, jitted(t.init)(jax.random.key(0)), batches())
    found = eval_params(ts)
    assert_same(found["gen"], ts.opt["gen"][-1].ema)
    assert differ(found["gen"], ts.params["gen"])
    assert_same([found["disc"], found["frozen"]], [ts.params["disc"], ts.params["frozen"]])


# --- What a loss must be --------------------------------------------------------------------------


def changed(change, player="gen"):
    """The game with a player's loss replaced, as a user may do."""
    model = toy()
    loss = change(model.losses[player])
    return training(model._replace(losses={**model.losses, player: loss}), sgd())


def averaged(loss):
    def mean(params, state, batch, key, step):
        value, aux = loss(params, state, batch, key, step)
        return value.mean(), aux

    return mean


def with_sums(loss):
    def sums(params, state, batch, key, step):
        value, aux = loss(params, state, batch, key, step)
        return value, aux._replace(metrics={"total": value.sum(keepdims=True)})

    return sums


@pytest.mark.slow
@pytest.mark.parametrize("weight", [None, jnp.ones(B)], ids=["", "weighted"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_that_returns_its_mean_is_refused(weight, parts):
    """It was divided by B once more, and its gradient with it, without a word."""
    t = microbatch(changed(averaged), parts)
    with pytest.raises(
        ConfigError, match=rf"The loss of 'gen' .* shape \[{B // parts}\]; got shape \[\]"
    ):
        t.step(start(), batches(weight=weight)[0])


@pytest.mark.slow
def test_a_metric_that_is_a_sum_is_refused():
    with pytest.raises(ConfigError, match=r"The metric 'total' of 'gen' .* \[8\]; got shape \[1\]"):
        changed(with_sums).step(start(), batches()[0])


def test_a_loss_that_takes_no_step_is_refused_before_anything_runs():
    def old(loss):
        return lambda params, state, batch, key: loss(params, state, batch, key, 0)

    with pytest.raises(
        ConfigError, match=r"loss of 'gen' takes \(params, state, batch, key\); .* Add `step`"
    ):
        changed(old)


def test_a_loss_whose_signature_cannot_be_seen_is_trained():
    class Unseen:
        __signature__ = "none"

        def __init__(self, loss):
            self.loss = loss

        def __call__(self, *args):
            return self.loss(*args)

    got, _ = run(changed(Unseen), start(), batches())
    assert_same(got, run(TRAIN, start(), batches())[0])


@pytest.mark.slow
def test_a_loss_sees_the_number_of_the_optimiser_step():
    """The same in every turn of a step and in every part of a batch."""

    def numbered(loss):
        def with_step(params, state, batch, key, step):
            value, aux = loss(params, state, batch, key, step)
            seen = jnp.broadcast_to(step.astype(jnp.float32), value.shape)
            return value, aux._replace(metrics={"step": seen})

        return with_step

    for player in RATES:
        for parts in (1, 2):
            _, metrics = run(microbatch(changed(numbered, player), parts), start(), batches())
            assert [float(one[f"{player}/step"]) for one in metrics] == list(range(STEPS))
