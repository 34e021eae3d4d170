"""Optimisers of one's own: that want the loss, or evaluate with weights of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import genjax
from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.gan import gan
from genjax.families.vae import vae
from genjax.learning.members import ensemble, sweep
from genjax.learning.optim import track_ema
from genjax.learning.step import eval_params, training
from genjax.learning.transforms import microbatch, scan_steps, skip_nonfinite
from genjax.protocol import DataSpec

MODEL = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
BATCH = example_batch(MODEL.spec, jax.random.key(1), 8)


def seen() -> optax.GradientTransformationExtraArgs:
    """A transform that stands still and keeps the value that it was given."""

    def update(updates, state, params=None, *, value, **more):
        return jax.tree.map(jnp.zeros_like, updates), value

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)


def wanting_value() -> dict[str, optax.GradientTransformation]:
    return {
        "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
        "polyak": optax.polyak_sgd(max_learning_rate=1e-2),
    }


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_the_value_is_the_mean_loss_of_the_whole_batch(parts):
    t = microbatch(training(MODEL, seen()), parts)
    ts, metrics = jax.jit(t.step)(jax.jit(t.init)(jax.random.key(0)), BATCH)
    assert float(ts.opt["vae"]) == float(metrics["vae/loss"]) != 0


@pytest.mark.slow
def test_every_member_is_given_its_own_loss():
    t = ensemble(training(MODEL, seen()))
    ts = jax.jit(t.init)(jax.random.split(jax.random.key(0), 3))
    ts, metrics = jax.jit(t.step)(ts, BATCH)
    np.testing.assert_array_equal(ts.opt["vae"], metrics["vae/loss"])
    assert len(set(np.asarray(ts.opt["vae"]).tolist())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plateau", "polyak"])
def test_optimisers_that_want_the_value_take_steps_in_a_scan(name):
    t = scan_steps(skip_nonfinite(microbatch(training(MODEL, wanting_value()[name]), 2)))
    ts = before = jax.jit(t.init)(jax.random.key(0))
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BATCH)
    ts, metrics = jax.jit(t.step)(ts, batches)
    assert int(ts.step) == 3
    assert not metrics["skipped"].any()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), ts.params, before.params)
    assert any(jax.tree.leaves(moved))


@pytest.mark.slow
def test_an_infinity_that_an_optimiser_begins_with_skips_nothing():
    """As the best value of a plateau over several steps."""
    plateau = optax.contrib.reduce_on_plateau(patience=1, accumulation_size=4)
    t = scan_steps(skip_nonfinite(training(MODEL, optax.chain(optax.adam(1e-2), plateau))))
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), BATCH)
    ts, metrics = jax.jit(t.step)(jax.jit(t.init)(jax.random.key(0)), batches)
    assert not metrics["skipped"].any()
    assert np.isfinite(ts.opt["vae"][-1].best_value)


@pytest.mark.slow
def test_a_skipped_step_keeps_its_nan_from_the_optimiser():
    t = skip_nonfinite(training(MODEL, seen()))
    bad = BATCH._replace(x=BATCH.x * jnp.nan)
    ts, metrics = jax.jit(t.step)(jax.jit(t.init)(jax.random.key(0)), bad)
    assert float(metrics["skipped"]) == 1
    assert float(ts.opt["vae"]) == 0


def trained(tx, steps):
    t = training(MODEL, tx)
    ts, step = jax.jit(t.init)(jax.random.key(0)), jax.jit(t.step)
    for index in range(steps):
        ts, _ = step(ts, example_batch(MODEL.spec, jax.random.key(100 + index), 8))
    return ts


@pytest.mark.slow
def test_what_a_step_cannot_give_is_said():
    t = training(MODEL, optax.lbfgs())
    ts = jax.eval_shape(t.init, jax.random.key(0))
    with pytest.raises(ConfigError, match="asks for what a step does not have"):
        jax.eval_shape(t.step, ts, BATCH)


@pytest.mark.parametrize(
    ("tx", "said"),
    [
        (optax.lookahead(optax.adam(1e-3), 5, 0.5), r"could not take a step \(AttributeError"),
        (contrib.differentially_private_aggregate(1.0, 0.1, 0), "could not take a step"),
        (optax.masked(optax.sgd(1e-3), {"encoder": True}), "a tree of encoder, decoder"),
        (optax.partition({"a": optax.sgd(1e-3)}, {"vae": "a"}), "does not take its parameters"),
    ],
)
def test_what_an_optimiser_raises_is_explained(tx, said):
    t = training(MODEL, tx)
    with pytest.raises(ConfigError, match=said):
        jax.eval_shape(t.step, jax.eval_shape(t.init, jax.random.key(0)), BATCH)


@pytest.mark.parametrize(
    ("made", "stepped", "said"),
    [
        ("sgd", "adam", "0/count: missing"),
        ("adam", "sgd", "0/count: not kept by this one"),  # SGD would pass it on without a word
        ("momentum", "sgd", "0/trace/decoder/layers/0/bias: not kept"),
    ],
)
def test_a_state_of_another_optimiser_is_refused_and_what_is_advised_works(made, stepped, said):
    tx = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.1), "momentum": optax.sgd(0.1, 0.9)}
    ts = jax.eval_shape(training(MODEL, tx[made]).init, jax.random.key(0))
    t, tx = training(MODEL, tx[stepped]), tx[stepped]
    with pytest.raises(ConfigError, match=f"(?s)another optimiser of 'vae'.*{said}") as raised:
        jax.eval_shape(t.step, ts, BATCH)
    advised = "ts._replace(opt={**ts.opt, 'vae': tx.init(ts.params['vae'])})"
    assert advised in str(raised.value)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), ts._replace(key=None))
    ts = zeros._replace(key=jax.random.key(0))
    jax.eval_shape(t.step, eval(advised), BATCH)


def test_a_state_of_another_model_is_refused():
    t = training(MODEL, optax.sgd(0.1))
    other = training(gan(MODEL.spec, hidden=(4,), latent_dim=1), optax.sgd(0.1))
    for one, stepped in ((t, other), (other, t)):
        ts = jax.eval_shape(one.init, jax.random.key(0))
        with pytest.raises(ConfigError, match=f"another model: it trains {', '.join(ts.opt)}"):
            jax.eval_shape(stepped.step, ts, BATCH)


def test_an_optimiser_that_begins_by_looking_at_values_takes_its_steps():
    looking = optax.GradientTransformation(
        lambda p: {"scale": jnp.asarray(float(jax.tree.leaves(p)[0].sum()))},
        lambda updates, state, params=None: (updates, state),
    )
    t = training(MODEL, optax.chain(looking, optax.sgd(0.1)))
    assert "vae/loss" in jax.eval_shape(t.step, t.init(jax.random.key(0)), BATCH)[1]


@pytest.mark.slow
def test_one_that_says_it_takes_the_loss_and_does_not_is_given_none():
    sam = contrib.sam(optax.sgd(0.1), optax.sgd(0.01), sync_period=2)
    ts = trained(sam, 4)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(ts.params))


@pytest.mark.parametrize("given", [optax.adam, "adam", None])
def test_what_is_no_optimiser_is_refused(given):
    with pytest.raises(ConfigError, match=r"such as optax\.adam\(1e-3\); got"):
        training(MODEL, given)


@pytest.mark.slow
def test_a_step_size_that_falls_on_a_plateau_falls():
    """With a loss that never gets better (the weights do not move), the step size is halved at
    each second step.
    """
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=1.0)
    tx = optax.chain(optax.sgd(0.0), plateau)
    ts = trained(tx, 7)
    assert float(ts.opt["vae"][-1].scale) == 0.5**3


@pytest.mark.slow
def test_polyaks_step_is_the_loss_over_the_squared_gradient():
    batch = example_batch(MODEL.spec, jax.random.key(100), 8)
    t = training(MODEL, optax.polyak_sgd(max_learning_rate=1e9))
    ts = jax.jit(t.init)(jax.random.key(0))
    new, metrics = jax.jit(t.step)(ts, batch)
    by_sgd, _ = jax.jit(training(MODEL, optax.sgd(1.0)).step)(
        ts._replace(opt={"vae": optax.sgd(1.0).init(ts.params["vae"])}), batch
    )
    grads = jax.tree.map(lambda a, b: a - b, ts.params, by_sgd.params)
    norm = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))
    rate = float(metrics["vae/loss"]) / norm
    for p, q, g in zip(*map(jax.tree.leaves, (ts.params, new.params, grads)), strict=True):
        np.testing.assert_allclose(q, p - rate * g, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_schedule_free_evaluates_with_its_own_weights():
    tx = contrib.schedule_free_adamw(0.05, warmup_steps=1)
    ts = trained(tx, 5)
    wanted = contrib.schedule_free_eval_params(ts.opt["vae"], ts.params["vae"])
    found = eval_params(ts)["vae"]
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_array_equal(x, y)
    pairs = zip(*map(jax.tree.leaves, (found, ts.params["vae"])), strict=True)
    assert any(not np.array_equal(x, y) for x, y in pairs)


def mapped(tree):
    """`eval_params` of each member by itself."""
    found = [eval_params(jax.tree.map(lambda leaf: leaf[i], tree)) for i in range(3)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


@pytest.mark.slow
def test_members_evaluate_each_with_its_own_weights():
    t = sweep(
        lambda b1: training(MODEL, contrib.schedule_free_sgd(0.05, b1=b1)), b1=[0.5, 0.9, 0.7]
    )
    ts = jax.jit(t.init)(jax.random.split(jax.random.key(0), 3))
    for index in range(3):
        ts, _ = jax.jit(t.step)(ts, example_batch(MODEL.spec, jax.random.key(100 + index), 8))
    found = eval_params(ts)
    wanted = mapped(ts._replace(step=jnp.repeat(ts.step, 3)))
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("average", ["schedule-free", "track_ema"])
def test_an_average_of_a_part_of_the_parameters_is_of_that_part(tmp_path, average):
    def labels(params):
        def label(path, leaf):
            return "a" if "encoder" in jax.tree_util.keystr(path) else "b"

        return jax.tree_util.tree_map_with_path(label, params)

    own = {
        "schedule-free": contrib.schedule_free_sgd(0.05),
        "track_ema": optax.chain(optax.sgd(0.05), track_ema(0.5)),
    }[average]
    tx = optax.partition({"a": own, "b": optax.sgd(0.05)}, labels)
    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    run = genjax.train(
        MODEL, x, steps=4, steps_per_call=2, batch_size=8, optimizer=tx, out=tmp_path / "run"
    )
    restored = genjax.restore(
        tmp_path / "run", jax.eval_shape(training(MODEL, tx).init, jax.random.key(0))
    )
    ours, newest = run.params["vae"], restored.params["vae"]
    assert not np.array_equal(*(jax.tree.leaves(one["encoder"])[-1] for one in (ours, newest)))
    for a, b in zip(*(jax.tree.leaves(one["decoder"]) for one in (ours, newest)), strict=True):
        np.testing.assert_array_equal(a, b)
    loaded = genjax.load(tmp_path / "run", model=MODEL)
    for a, b in zip(*map(jax.tree.leaves, (loaded.params, run.params)), strict=True):
        np.testing.assert_array_equal(a, b)
