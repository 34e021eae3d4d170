"""Optimisers of one's own: optax transforms that want the loss beside the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.vae import vae
from genjax.learning.members import ensemble
from genjax.learning.step import training
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


@pytest.mark.parametrize("parts", [1, 2])
def test_the_value_is_the_mean_loss_of_the_whole_batch(parts):
    t = microbatch(training(MODEL, seen()), parts)
    ts, metrics = jax.jit(t.step)(jax.jit(t.init)(jax.random.key(0)), BATCH)
    assert float(ts.opt["vae"]) == float(metrics["vae/loss"]) != 0


def test_every_member_is_given_its_own_loss():
    t = ensemble(training(MODEL, seen()))
    ts = jax.jit(t.init)(jax.random.split(jax.random.key(0), 3))
    ts, metrics = jax.jit(t.step)(ts, BATCH)
    np.testing.assert_array_equal(ts.opt["vae"], metrics["vae/loss"])
    assert len(set(np.asarray(ts.opt["vae"]).tolist())) == 3


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


def test_a_skipped_step_keeps_its_nan_from_the_optimiser():
    t = skip_nonfinite(training(MODEL, seen()))
    bad = BATCH._replace(x=BATCH.x * jnp.nan)
    ts, metrics = jax.jit(t.step)(jax.jit(t.init)(jax.random.key(0)), bad)
    assert float(metrics["skipped"]) == 1
    assert float(ts.opt["vae"]) == 0


def test_a_line_search_is_refused_with_what_to_do():
    t = training(MODEL, optax.lbfgs())
    with pytest.raises(ConfigError, match=r"'vae' wants more than the gradient.*optax.adam"):
        jax.eval_shape(t.step, jax.eval_shape(t.init, jax.random.key(0)), BATCH)
