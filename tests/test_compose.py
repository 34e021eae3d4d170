"""Two stages: a density of a trained model's latents as its prior, with the bound joined."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gates import assert_same, by_hand, quick

import genjax
from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.compose import FIRST, latent_spec, two_stage
from genjax.families.flow_matching import flow_matching
from genjax.families.vae import vae
from genjax.parts.distributions import normal_log_prob, sum_event
from genjax.protocol import DataSpec, Trained

SPEC = DataSpec((3, 3, 1), "discrete", levels=5)
KEY = jax.random.key(3)


def grown(tree):
    rng = np.random.default_rng(0)
    return by_hand(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), tree)


@functools.cache
def first_stage(spec=SPEC):
    model = vae(spec, latent_dim=2, hidden=(8,))
    params, state = model.init(jax.random.key(0))
    return Trained(model, grown(params), state)


@functools.cache
def both_stages(spec=SPEC):
    """The second stage, both joined, and parameters and state of both."""
    first = first_stage(spec)
    second = flow_matching(latent_spec(first.model), hidden=(4,), n_steps=2, n_likelihood_steps=2)
    both = two_stage(first, second)
    return second, both, *both.init(jax.random.key(1))


@pytest.mark.slow
def test_with_an_identity_as_second_stage_the_joined_bound_is_that_of_the_vae():
    """A new flow says that nothing moves: its density is N(0, I), the prior that the VAE had."""
    first = first_stage()
    _, both, params, state = both_stages()
    batch = example_batch(SPEC, jax.random.key(2), 4)
    got = quick(both.bound)(params, state, batch, KEY)

    @quick
    def by_hand_bound(batch):
        key_z, _ = jax.random.split(KEY)
        mean, log_scale = first.model.latent.encode(first.params, first.state, batch.x)
        z = mean + jnp.exp(log_scale) * jax.random.normal(key_z, mean.shape)
        log_x = first.model.latent.log_likelihood(first.params, first.state, batch, z)
        log_ratio = normal_log_prob(z, 0.0, 0.0) - normal_log_prob(z, mean, log_scale)
        return log_x + sum_event(log_ratio)

    np.testing.assert_allclose(got, by_hand_bound(batch), rtol=1e-5)


@pytest.mark.slow
def test_its_mean_is_the_elbo_in_closed_form():
    first, n = first_stage(), 4000
    _, both, params, state = both_stages()
    batch = example_batch(SPEC, jax.random.key(2), 4)
    draws = quick(jax.vmap(lambda key: both.bound(params, state, batch, key)))(
        jax.random.split(KEY, n)
    )
    elbo = quick(jax.vmap(lambda key: first.model.bound(first.params, first.state, batch, key)))(
        jax.random.split(jax.random.key(4), n)
    )
    error = np.sqrt((draws.var(0) + elbo.var(0)) / n)
    assert (np.abs(draws.mean(0) - elbo.mean(0)) < 4 * error).all()


@pytest.mark.slow
def test_the_loss_is_that_of_the_second_stage_on_latents_that_it_draws():
    first = first_stage()
    second, both, params, state = both_stages()
    batch = example_batch(SPEC, jax.random.key(2), 4)
    noise = both.noise["flow"](KEY, batch)
    mean, log_scale = first.model.latent.encode(first.params, first.state, batch.x)
    codes = batch._replace(x=mean + jnp.exp(log_scale) * noise.epsilon)
    own = {"flow": params["flow"]}
    wanted = second.losses["flow"](own, {"flow": {}}, codes, noise.second, 0)[0]
    np.testing.assert_array_equal(both.losses["flow"](params, state, batch, KEY, 0)[0], wanted)


@pytest.mark.slow
def test_training_leaves_the_first_stage_as_it_is():
    _, both, *_ = both_stages()
    t = genjax.training(both, optax.adam(1e-2))
    ts = quick(t.init)(jax.random.key(1))
    assert set(ts.opt) == {"flow"}
    batch = example_batch(SPEC, jax.random.key(2), 4)
    step = quick(t.step)
    for _ in range(2):
        ts, _ = step(ts, batch)
    assert_same(ts.params[FIRST], first_stage().params)
    x = np.asarray(quick(both.sample, static_argnums=3)(ts.params, ts.state, KEY, 3))
    assert x.shape == (3, *SPEC.shape)
    assert ((x >= 0) & (x <= SPEC.top) & (x == np.round(x))).all()


@pytest.mark.slow
def test_its_ways_of_sampling_end_in_events():
    _, both, params, state = both_stages()
    film = both.denoiser.generate(params, state, KEY, 3, n_steps=2, every=True)
    assert film.shape == (3, 3, *SPEC.shape)
    means = both.latent.sample_mean(params, state, KEY, 3)
    assert means.shape == (3, *SPEC.shape)


@pytest.mark.slow
def test_a_condition_goes_to_both_stages():
    spec = dataclasses.replace(SPEC, n_classes=3, class_names=("a", "b", "c"))
    assert latent_spec(first_stage(spec).model).n_classes == 3
    second, both, params, state = both_stages(spec)
    params = params | {"flow": grown(params["flow"])}
    latent = first_stage(spec).model.latent
    batch = example_batch(spec, jax.random.key(2), 4)
    key_z, key_second = jax.random.split(KEY)

    @quick
    def by_hand_bound(cond_one, cond_two):
        """With a condition for each stage."""
        first = params[FIRST], state[FIRST]
        mean, log_scale = latent.encode(*first, batch.x, cond_one)
        z = mean + jnp.exp(log_scale) * jax.random.normal(key_z, mean.shape)
        log_x = latent.log_likelihood(*first, batch._replace(cond=cond_one), z)
        codes = batch._replace(x=z, cond=cond_two)
        log_z = second.score({"flow": params["flow"]}, {"flow": {}}, codes, key_second)
        return log_x + log_z - sum_event(normal_log_prob(z, mean, log_scale))

    found, other = quick(both.bound)(params, state, batch, KEY), (batch.cond + 1) % 3
    np.testing.assert_allclose(found, by_hand_bound(batch.cond, batch.cond), rtol=1e-5)
    for conds in ((other, batch.cond), (batch.cond, other)):
        assert (np.abs(found - by_hand_bound(*conds)) > 1e-3).all()

    @quick
    def sample_by_hand(cond_one, cond_two):
        key_z, key_x = jax.random.split(KEY)
        z = second.sample({"flow": params["flow"]}, {"flow": {}}, key_z, 32, cond_two)
        return latent.draw(params[FIRST], state[FIRST], key_x, z, cond_one)

    conds = [jnp.full(32, c, jnp.int32) for c in (0, 2)]
    sample = quick(both.sample, static_argnums=3)(params, state, KEY, 32, conds[1])
    assert sample.shape == (32, *SPEC.shape)
    np.testing.assert_array_equal(sample, sample_by_hand(conds[1], conds[1]))
    for pair in (conds, conds[::-1]):
        assert (sample != sample_by_hand(*pair)).any()


@pytest.mark.slow
def test_what_does_not_fit_is_refused():
    first = first_stage()
    points = DataSpec((2,), "continuous")
    flow = flow_matching(points, hidden=(4,))
    without = Trained(flow, *flow.init(jax.random.key(0)))
    with pytest.raises(ConfigError, match="latents of the first; this model of data has none"):
        two_stage(without, flow)
    with pytest.raises(ConfigError, match=r"whose shape is \(2,\); its spec has \(3,\)"):
        two_stage(first, flow_matching(DataSpec((3,), "continuous"), hidden=(4,)))
    conditional = flow_matching(dataclasses.replace(points, n_classes=2), hidden=(4,))
    with pytest.raises(ConfigError, match="whose n_classes is None; its spec has 2"):
        two_stage(first, conditional)


def test_a_second_stage_with_an_entry_of_that_name_is_refused():
    """One that has two stages itself, say."""
    first = first_stage()
    inner = vae(latent_spec(first.model), latent_dim=2, hidden=(4,))
    pair = two_stage(Trained(inner, *inner.init(KEY)), flow_matching(latent_spec(inner)))
    with pytest.raises(ConfigError, match="have an entry 'first' already"):
        two_stage(first, pair)
    # As the first of two it would have its own first stage's latents: the second's is left out.
    both = two_stage(first, inner)
    third = flow_matching(latent_spec(both), hidden=(4,), n_steps=2)
    with pytest.raises(ConfigError, match="stands on a first stage itself"):
        two_stage(Trained(both, *both.init(KEY)), third)
