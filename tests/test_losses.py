"""A term of one's own in a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gates import quick

from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.vae import vae
from genjax.learning.losses import add_loss
from genjax.learning.members import ensemble
from genjax.learning.step import training
from genjax.learning.transforms import microbatch
from genjax.protocol import DataSpec

MODEL = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
BATCH = example_batch(MODEL.spec, jax.random.key(1), 8)


def small(params, state, batch, key):
    return jnp.square(MODEL.latent.encode(params, state, batch.x)[0]).sum(-1)


def step(t, key):
    return jax.jit(t.step)(jax.jit(t.init)(key), BATCH)


@pytest.mark.slow
def test_loss_and_gradient_have_the_weighted_term_added():
    model = add_loss(MODEL, "vae", small, weight=0.5)
    key = jax.random.key(0)
    params, state = MODEL.init(key)

    def mean(loss, params):
        return loss(params, state, BATCH, key, jnp.int32(0))[0].mean()

    def both(params):
        return mean(MODEL.losses["vae"], params) + 0.5 * small(params, state, BATCH, key).mean()

    wanted = quick(jax.value_and_grad(both))(params)
    found = quick(jax.value_and_grad(lambda params: mean(model.losses["vae"], params)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), found, wanted)


@pytest.mark.slow
def test_the_term_is_a_metric_with_parts_and_members():
    model = add_loss(MODEL, "vae", small, weight=0.5)
    keys = jax.random.split(jax.random.key(0), 3)
    t = ensemble(microbatch(training(model, optax.sgd(0.0)), 2))
    ts, metrics = step(t, keys)
    for i in range(3):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], ts.params)
        wanted = small(params, {}, BATCH, None).mean()
        np.testing.assert_allclose(metrics["vae/small"][i], wanted, 1e-5)


@pytest.mark.slow
def test_a_term_that_is_no_value_for_each_example_is_refused():
    def mean(params, state, batch, key):
        return batch.x.mean()

    with pytest.raises(ConfigError, match="mean"):
        step(training(add_loss(MODEL, "vae", mean), optax.sgd(0.1)), jax.random.key(0))


def test_a_player_or_a_name_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="vea"):
        add_loss(MODEL, "vea", small)
    twice = add_loss(MODEL, "vae", small, name="kl")
    with pytest.raises(ConfigError, match="a metric 'kl' already"):
        step(training(twice, optax.sgd(0.1)), jax.random.key(0))


def test_a_term_that_takes_something_else_is_refused():
    with pytest.raises(ConfigError, match=r"takes \(params, state, batch, key, step\)"):
        add_loss(MODEL, "vae", lambda params, state, batch, key, step: batch.x[:, 0])
