"""Mixtures of discretised logistics: probabilities that sum to one, and samples that follow
them.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from gates import quick
from test_autoregressive import p_value

from genjax.errors import ConfigError
from genjax.parts.logistics import mixture_log_prob, mixture_of, mixture_sample, n_outputs
from genjax.parts.pixels import likelihood_of, pixel_emission
from genjax.protocol import DataSpec

KEY = jax.random.key(0)


def outputs(seed, m, channels, scale=1.0):
    size = n_outputs(m, channels)
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=size), jnp.float32)


def at(raw, x, m):
    """The mixture that some outputs describe, the same for every x."""
    return mixture_of(jnp.broadcast_to(raw, (len(x), len(raw))), m, x.shape[-1])


def every(levels, channels):
    return jnp.asarray(list(itertools.product(range(levels), repeat=channels)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_probabilities_sum_to_one_in_float32_for_any_outputs(levels, scale):
    x = every(levels, 1)
    nats = quick(lambda raw: mixture_log_prob(x, at(raw, x, 3), levels))(outputs(1, 3, 1, scale))
    assert np.isfinite(nats).all()
    np.testing.assert_allclose(np.exp(np.float64(nats)).sum(), 1, atol=3e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_are_finite_for_any_outputs(scale):
    x = every(256, 1)

    def total(raw):
        return mixture_log_prob(x, at(raw, x, 3), 256).sum()

    assert np.isfinite(quick(jax.grad(total))(outputs(2, 3, 1, scale))).all()


@pytest.mark.slow
def test_a_mixture_is_the_logistic_integrated_over_bins(x64):
    mean, log_scale, weight = np.asarray([-0.6, 0.3]), np.asarray([-2.0, -1.0]), [0.3, 0.7]
    raw = log_scale + np.log1p(-np.exp(-7 - log_scale))  # the inverse of bounded_log_scale
    x = every(17, 1).astype(jnp.float64)
    found = at(jnp.asarray(np.concatenate([np.log(weight), mean, raw])), x, 2)
    edges = np.concatenate([[-np.inf], (np.arange(16) + 0.5) / 8 - 1, [np.inf]])
    cdf = scipy.stats.logistic.cdf(edges[:, None], mean, np.exp(log_scale))
    wanted = np.diff(cdf, axis=0) @ weight
    nats = mixture_log_prob(x, found, 17)
    np.testing.assert_allclose(np.exp(nats), wanted, rtol=1e-6)


def test_outputs_are_weights_means_scales_and_slopes_within_one():
    raw = jnp.asarray([[0.0, 1.0, 0.3, -0.4, 5.0, 6.0, -1.0, 2.0, 0.5, 50.0, -3.0, 0.2]])
    found = mixture_of(raw, n_components=2, channels=2)
    np.testing.assert_allclose(jnp.exp(found.log_weight).sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(found.mean, [[[0.3, -0.4], [5.0, 6.0]]], rtol=1e-6)
    assert found.log_scale[0, 1, 1] == 7  # the largest
    np.testing.assert_allclose(found.slopes, np.tanh([[[-3.0, 0.2]]]), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [2, 3])
def test_channels_given_each_other_sum_to_one_and_depend_on_each_other(channels):
    x = every(2, channels)
    p = np.exp(mixture_log_prob(x, at(outputs(3, 2, channels), x, 2), 2))
    np.testing.assert_allclose(p.sum(), 1, atol=1e-6)
    # p(last | first) is not the same for both values of the first.
    joint = [[p[(x[:, 0] == a) & (x[:, -1] == b)].sum() for b in (0, 1)] for a in (0, 1)]
    given = np.asarray(joint) / np.sum(joint, axis=1, keepdims=True)
    assert abs(given[0, 0] - given[1, 0]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "channels"), [(17, 1), (3, 3)])
def test_samples_follow_the_probabilities(levels, channels):
    raw, x, n = outputs(4, 3, channels), every(levels, channels), 5000
    p = np.exp(np.float64(mixture_log_prob(x, at(raw, x, 3), levels)))
    many = at(raw, jnp.zeros((n, channels)), 3)
    drawn = np.asarray(jax.jit(mixture_sample, static_argnums=2)(KEY, many, levels))
    counts = (drawn[None] == np.asarray(x)[:, None]).all(-1).sum(1)
    assert counts.sum() == n
    assert p_value(counts, n * p) > 1e-3
    assert p_value(counts, n * p[::-1]) < 1e-6  # it can tell


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "logistics"])
def test_the_channels_of_a_pixel_are_conditioned_on_each_other(likelihood):
    """p(r) p(g | r) p(b | r, g) over all colours of two levels, and the law of what is drawn."""
    binary = likelihood == "bernoulli"
    kind = {"kind": "binary"} if binary else {"kind": "discrete", "levels": 2}
    emit = pixel_emission(DataSpec((4, 3), step="pixel", **kind), likelihood, 2)
    raw = jnp.asarray(2 * np.random.default_rng(5).normal(size=emit.n_outputs), jnp.float32)
    x, n = every(2, 3), 4000
    p = np.exp(np.float64(emit.log_prob(x, jnp.broadcast_to(raw, (len(x), len(raw))))))
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    drawn = np.asarray(emit.sample(KEY, jnp.broadcast_to(raw, (n, len(raw)))))
    counts = (drawn[None] == np.asarray(x)[:, None]).all(-1).sum(1)
    assert p_value(counts, n * p) > 1e-3
    # In another order of the channels it would be another distribution.
    assert np.abs(p - p.reshape(2, 2, 2).transpose(2, 1, 0).reshape(-1)).max() > 0.01


def test_auto_is_logits_for_few_levels_and_logistics_for_many():
    def auto(levels):
        return likelihood_of(DataSpec((2, 2, 1), "discrete", levels=levels))

    assert (auto(17), auto(256)) == ("categorical", "logistics")
    assert likelihood_of(DataSpec((2, 2, 1), "binary")) == "bernoulli"


@pytest.mark.parametrize("name", ["categorical", "logistics"])
def test_a_mixture_of_levels_is_refused_for_binary_data(name):
    with pytest.raises(ConfigError, match="take bernoulli"):
        likelihood_of(DataSpec((2, 2, 1), "binary"), name)
