"""Gradient estimators of the variational autoencoder: those of low variance have the mean of the
pathwise one.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_oracles import (
    f64,
    jit,
    linear_params,
    linear_vae,
    open_normal,
    over_keys,
    ppca,
    random_params,
)

from genjax.families.vae import vae
from genjax.protocol import Batch, DataSpec

POINT = DataSpec((3,), "continuous")
POINTS = np.random.default_rng(12).normal(size=(2, 3)) * 2


@functools.cache
def gradients(gradient, k, beta=1.0, prior="normal", n=20_000):
    """The gradient of the summed loss for n keys, flattened over all parameters: [n, P], and which
    are the encoder's.
    """
    with jax.enable_x64(True):
        model = vae(
            POINT,
            latent_dim=2,
            hidden=(3,),
            activation="tanh",
            gradient=gradient,
            n_samples=k,
            beta=beta,
            prior=open_normal() if prior == "open" else prior,
            n_pseudo_inputs=2,
        )
        params, state = random_params(model, seed=2)
        params = f64(params)
        batch = Batch(jnp.asarray(POINTS))

        def flatten(tree):
            return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])

        grad = jax.grad(lambda p, key: model.losses["vae"](p, state, batch, key, 0)[0].sum())
        mine = flatten(
            {
                "vae": {
                    name: jax.tree.map(lambda a: jnp.full(a.shape, name == "encoder"), p)
                    for name, p in params["vae"].items()
                }
            }
        )
        return over_keys(lambda key: flatten(grad(params, key)), 13, n), np.asarray(mine)


def deviations(one, other):
    """By how many standard errors the means of two gradients differ, parameter by parameter, on the
    same keys.
    """
    difference = one - other
    error = difference.std(0, ddof=1) / math.sqrt(len(difference))
    scale = np.abs(one).mean(0)
    assert np.all(error < 0.05 * scale + 1e-12), "too noisy to say anything"
    # Where the two do not differ but for rounding there is nothing to standardise.
    return np.abs(difference.mean(0)) / np.maximum(error, 1e-12 * scale + 1e-300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gradient", "k", "beta", "prior"),
    [
        ("stl", 1, 1.0, "normal"),
        pytest.param("stl", 1, 2.0, "normal", marks=pytest.mark.slow),
        pytest.param("stl", 1, 1.0, "vamp", marks=pytest.mark.slow),
        ("dreg", 4, 1.0, "normal"),
        pytest.param("dreg", 4, 1.0, "vamp", marks=pytest.mark.slow),
        ("dreg", 4, 0.5, "normal"),
        pytest.param("dreg", 4, 3.0, "normal", marks=pytest.mark.slow),
    ],
)
def test_low_variance_gradients_have_the_mean_of_the_pathwise_gradient(gradient, k, beta, prior):
    # In a VampPrior the encoder's parameters are the prior's too, and must not be treated as q's
    # there.
    ours, encoder = gradients(gradient, k, beta, prior)
    pathwise, _ = gradients("pathwise", k, beta, prior)
    assert 20 < encoder.sum() < len(encoder)
    assert deviations(ours, pathwise).max() < 4.5
    # They are not the same estimator; where the prior is fixed only the encoder's part differs, the
    # decoder's is the same.
    assert np.abs(ours - pathwise)[:, encoder].max() > 1e-3
    if prior == "normal" and k > 1:
        np.testing.assert_allclose(ours[:, ~encoder], pathwise[:, ~encoder], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_comparison_of_gradients_sees_a_biased_one():
    # With K > 1 stopping the score term alone is biased (Tucker 2018, section 3).
    ours, encoder = gradients("stl", 4)
    pathwise, _ = gradients("pathwise", 4)
    assert deviations(ours, pathwise)[encoder].max() > 8


@pytest.mark.slow
def test_the_closed_form_kl_gives_the_same_gradient_in_the_mean():
    # "pathwise" with K = 1 uses the closed form where there is one.
    assert (
        deviations(
            gradients("pathwise", 1, 1.0, "normal")[0], gradients("pathwise", 1, 1.0, "open")[0]
        ).max()
        < 4.5
    )


@pytest.mark.slow
def test_for_one_sample_dreg_is_stl():
    np.testing.assert_allclose(
        gradients("dreg", 1)[0], gradients("stl", 1)[0], rtol=1e-9, atol=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize(("gradient", "k"), [("stl", 1), ("stl", 4), ("dreg", 1), ("dreg", 4)])
def test_at_the_exact_posterior_the_low_variance_gradients_of_the_encoder_vanish(x64, gradient, k):
    p = ppca()
    params, state = linear_params(p)
    batch, key = Batch(jnp.asarray(p.x[:8])), jax.random.key(14)

    def encoder_gradient(model):
        return jit(jax.grad(lambda q: model.losses["vae"](q, state, batch, key, 0)[0].mean()))(
            params
        )["vae"]["encoder"]

    for leaf in jax.tree.leaves(encoder_gradient(linear_vae(gradient=gradient, n_samples=k))):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-10)
    # While the pathwise gradient, whose mean is 0 as well, is noise.
    assert (
        max(
            np.abs(leaf).max()
            for leaf in jax.tree.leaves(encoder_gradient(linear_vae(n_samples=k)))
        )
        > 1e-2
    )
