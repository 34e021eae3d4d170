"""Muon, and optimisers that ask for the value of the loss or evaluate with other weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gates import quick, stack
from optax import contrib

from genjax import (
    DataSpec,
    ensemble,
    eval_params,
    example_batch,
    microbatch,
    rnn,
    scan_steps,
    skip_nonfinite,
    training,
    vae,
)
from genjax.errors import ConfigError
from genjax.learning.muon import RMS, kinds_of
from genjax.learning.optim import Optimizer

SPEC = DataSpec((3,), "continuous")
RNG = np.random.default_rng(0)


def small():
    return vae(SPEC, latent_dim=2, hidden=(5,))


# --- Muon -----------------------------------------------------------------------------------------


def test_what_muon_takes_and_what_is_adams():
    spec = DataSpec((4,), "tokens", levels=5, step="character")
    model = rnn(spec, d_hidden=6)
    params, _ = model.init(jax.random.key(0))
    kinds = jax.tree_util.tree_leaves_with_path(kinds_of(params["rnn"], model.labels, "rnn"))
    found = {jax.tree_util.keystr(p, simple=True, separator="/"): kind for p, kind in kinds}
    muon = {name for name, kind in found.items() if kind == "muon"}
    assert muon == {name for name in found if name.endswith("kernel") and "readout" not in name}
    assert muon
    assert any("table" in name for name in found)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 3, 2, 5)])
def test_the_first_step_is_an_orthogonal_matrix_of_adams_size(shape):
    """All singular values of five Newton-Schulz iterations lie near 1 (Jordan 2024: 0.7 to 1.2),
    and left and right vectors are the gradient's.
    """
    g = RNG.normal(size=shape).astype(np.float32)
    tx = Optimizer("muon", 1.0).build(10)
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(4)}
    grads = {"kernel": jnp.asarray(g), "bias": jnp.asarray([1.0, -2.0, 0.5, 3.0])}
    with jax.numpy_dtype_promotion("standard"):  # as a step has it: optax mixes kinds of numbers
        updates, _ = tx.update(grads, tx.init(params), params)
    matrix = -np.asarray(updates["kernel"]).reshape(-1, shape[-1])
    scale = RMS * np.sqrt(max(matrix.shape))
    u, _, vt = np.linalg.svd(g.reshape(-1, shape[-1]), full_matrices=False)
    core = u.T @ (matrix / scale) @ vt.T
    assert np.all((np.diag(core) > 0.6) & (np.diag(core) < 1.3))
    assert np.abs(core - np.diag(np.diag(core))).max() < 0.05
    # The rest is Adam's first step: the sign of the gradient.
    np.testing.assert_allclose(updates["bias"], -np.sign(grads["bias"]), rtol=1e-4)


def test_muon_decays_what_is_named_by_the_step_size():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = Optimizer("muon", 0.1, weight_decay=0.5).build(10)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05 * np.ones((3, 2)), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def trained(tx, steps=3, model=None, wrap=lambda t: t, key=0):
    model = small() if model is None else model
    t = wrap(training(model, tx))
    ts, step, metrics = quick(t.init)(jax.random.key(key)), quick(t.step), []
    for index in range(steps):
        batch = example_batch(SPEC, jax.random.key(100 + index), 8)
        ts, new = step(ts, batch)
        metrics.append(new)
    return ts, metrics


def test_muon_learns_with_everything_else_around_it():
    tx = Optimizer(
        "muon",
        0.02,
        weight_decay=0.1,
        clip_norm=1.0,
        ema_decay=0.5,
        warmup_steps=2,
        schedule="cosine",
        rates=("vector=0.5",),
    ).build(200)
    ts, metrics = trained(tx, 60)
    assert float(metrics[-1]["vae/loss"]) < float(metrics[0]["vae/loss"])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(ts.params))
    # Of members, each takes its own.
    alone = [trained(tx, 3, key=seed)[0].params for seed in (0, 1)]
    t = ensemble(training(small(), tx))
    together = quick(t.init)(jnp.stack([jax.random.key(0), jax.random.key(1)]))
    for index in range(3):
        together, _ = quick(t.step)(together, example_batch(SPEC, jax.random.key(100 + index), 8))
    for x, y in zip(*map(jax.tree.leaves, (together.params, stack(alone))), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


# --- the value of the loss ------------------------------------------------------------------------


def seeing():
    """An optimiser that keeps the values that it was given, and moves nothing."""

    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(jnp.zeros_like, updates), jnp.append(state[1:], value)

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(3), update)


@pytest.mark.parametrize("chained", [False, True])
def test_optimisers_that_ask_for_the_value_get_the_mean_loss(chained):
    tx = optax.chain(seeing(), optax.scale(1.0)) if chained else seeing()
    ts, metrics = trained(tx)
    state = ts.opt["vae"][0] if chained else ts.opt["vae"]
    np.testing.assert_array_equal(state, [one["vae/loss"] for one in metrics])


@pytest.mark.parametrize("wrap", [lambda t: microbatch(t, 2), skip_nonfinite, ensemble])
def test_the_value_is_there_under_every_transform(wrap):
    if wrap is ensemble:
        t = ensemble(training(small(), seeing()))
        ts = quick(t.init)(jax.random.split(jax.random.key(0), 2))
        ts, metrics = quick(t.step)(ts, example_batch(SPEC, jax.random.key(1), 8))
        np.testing.assert_array_equal(ts.opt["vae"][:, -1], metrics["vae/loss"])
        return
    ts, metrics = trained(seeing(), wrap=wrap)
    wanted = [one["vae/loss"] for one in metrics]
    np.testing.assert_allclose(ts.opt["vae"], wanted, rtol=1e-6)


def test_the_value_is_there_in_many_steps_of_one_dispatch():
    t = training(small(), seeing())
    batches = [example_batch(SPEC, jax.random.key(100 + index), 8) for index in range(3)]
    many = scan_steps(t)
    ts, _ = quick(many.step)(quick(many.init)(jax.random.key(0)), stack(batches))
    np.testing.assert_allclose(ts.opt["vae"], trained(seeing())[0].opt["vae"], rtol=1e-6)


def test_a_step_size_that_falls_on_a_plateau_falls():
    """With a loss that never gets better (the weights do not move), the step size is halved at
    each second step.
    """
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=1.0)
    tx = optax.chain(optax.sgd(0.0), plateau)
    ts, _ = trained(tx, 7)
    assert float(ts.opt["vae"][-1].scale) < 1


def test_polyaks_step_is_the_loss_over_the_squared_gradient():
    batch = example_batch(SPEC, jax.random.key(100), 8)
    t = training(small(), optax.polyak_sgd(max_learning_rate=1e9))
    ts = quick(t.init)(jax.random.key(0))
    new, metrics = quick(t.step)(ts, batch)
    by_sgd, _ = quick(training(small(), optax.sgd(1.0)).step)(
        ts._replace(opt={"vae": optax.sgd(1.0).init(ts.params["vae"])}), batch
    )
    grads = jax.tree.map(lambda a, b: a - b, ts.params, by_sgd.params)
    norm = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))
    rate = float(metrics["vae/loss"]) / norm
    for p, q, g in zip(*map(jax.tree.leaves, (ts.params, new.params, grads)), strict=True):
        np.testing.assert_allclose(q, p - rate * g, rtol=1e-4, atol=1e-5)


def test_what_a_step_cannot_give_is_said():
    t = training(small(), optax.lbfgs())
    ts = quick(t.init)(jax.random.key(0))
    with pytest.raises(ConfigError, match="asks for what a step does not have"):
        t.step(ts, example_batch(SPEC, jax.random.key(1), 8))


def test_schedule_free_evaluates_with_its_own_weights():
    tx = contrib.schedule_free_adamw(0.05, warmup_steps=1)
    ts, _ = trained(tx, 5)
    wanted = contrib.schedule_free_eval_params(ts.opt["vae"], ts.params["vae"])
    found = eval_params(ts)["vae"]
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_array_equal(x, y)
    pairs = zip(*map(jax.tree.leaves, (found, ts.params["vae"])), strict=True)
    assert any(not np.array_equal(x, y) for x, y in pairs)
