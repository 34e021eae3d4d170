"""The priors of the variational autoencoder: the VampPrior against a mixture written out, and a
prior of one's own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from statistics_checks import RARE
from vae_oracles import (
    SHIFT,
    WIDEN,
    assert_mean,
    check_moments,
    f64,
    jit,
    linear_params,
    linear_vae,
    log_marginal,
    over_keys,
    ppca,
    random_params,
)

from genjax.errors import ConfigError
from genjax.families.vae import vae
from genjax.parts.priors import Prior, vamp_prior
from genjax.protocol import Batch, DataSpec


def mixture(x, condition):
    """A stand-in for the encoder: q's mean and log-scale as fixed functions of two numbers."""
    return 3 * x[..., :2], -1 + 0.3 * x[..., :2]


PSEUDO = np.array([[-1.5, 0.2], [0.1, 1.0], [1.2, -0.7]])


def density(prior, u, posterior, z):
    """ln p(z) of a VampPrior with these pseudo-inputs; what else a prior gets does not matter."""
    return prior.log_prob({"x": u}, {}, posterior, z, None, None)


def naive_mixture(z, mean, log_scale):
    parts = scipy.stats.norm.logpdf(z[..., None, :], mean, np.exp(log_scale)).sum(-1)
    return scipy.special.logsumexp(parts, axis=-1) - math.log(len(mean))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4)])
def test_the_vamp_prior_is_the_mixture_of_its_posteriors(x64, shape):
    prior = vamp_prior(DataSpec((2,), "continuous"), 3)
    z = np.random.default_rng(15).normal(size=(*shape, 2)) * 4
    got = jit(lambda z: density(prior, jnp.asarray(PSEUDO), mixture, z))(jnp.asarray(z))
    assert got.shape == shape
    np.testing.assert_allclose(got, naive_mixture(z, 3 * PSEUDO, -1 + 0.3 * PSEUDO), rtol=1e-10)


@pytest.mark.slow
# The sum over differences keeps all digits; the expansion into matrix products, taken where it may,
# loses some.
@pytest.mark.parametrize(("narrow", "loses"), [(-5.0, 1e-4), (-1.0, 1e-3)])
def test_the_vamp_prior_keeps_its_digits_in_float32(narrow, loses):
    # 16 dimensions, means of order 3 and deviations of e^-5: what a well trained encoder of images
    # gives.
    rng = np.random.default_rng(16)
    mean, log_scale = (
        (3 * rng.normal(size=(20, 16))).astype(np.float32),
        (narrow + 0.3 * rng.normal(size=(20, 16))).astype(np.float32),
    )
    z = (mean[:8] + np.exp(log_scale[:8]) * rng.normal(size=(8, 16))).astype(np.float32)
    prior = vamp_prior(DataSpec((1,), "continuous"), 20)
    q = (jnp.asarray(mean), jnp.asarray(log_scale))
    got = density(prior, jnp.zeros((20, 1)), lambda x, c: q, jnp.asarray(z))
    want = naive_mixture(*(a.astype(np.float64) for a in (z, mean, log_scale)))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=loses)


@pytest.mark.slow
@pytest.mark.parametrize(
    "narrow", [0.0, -17.0]
)  # the expansion into matrix products, and the sum over differences
def test_the_vamp_prior_has_the_gradient_of_the_mixture(x64, narrow):
    rng = np.random.default_rng(17)
    mean, log_scale, z = (jnp.asarray(rng.normal(size=size)) for size in ((3, 2), (3, 2), (4, 2)))
    log_scale = log_scale + narrow
    prior = vamp_prior(DataSpec((1,), "continuous"), 3)

    def ours(mean, log_scale, z):
        return density(prior, jnp.zeros((3, 1)), lambda x, c: (mean, log_scale), z).sum()

    def naive(mean, log_scale, z):
        square = ((z[:, None] - mean[None]) / jnp.exp(log_scale)[None]) ** 2
        return jax.nn.logsumexp((-0.5 * square - log_scale[None]).sum(-1), axis=1).sum()

    for a, b in zip(
        *(jit(jax.grad(f, (0, 1, 2)))(mean, log_scale, z) for f in (ours, naive)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * float(jnp.abs(b).max()))


def test_samples_of_the_vamp_prior_follow_it():
    prior, n = vamp_prior(DataSpec((2,), "continuous"), 3), 20_000
    z = np.asarray(
        jit(
            lambda key: prior.sample(
                {"x": jnp.asarray(PSEUDO, jnp.float32)}, {}, mixture, key, n, None
            )
        )(jax.random.key(18))
    )
    mean, scale = 3 * PSEUDO, np.exp(-1 + 0.3 * PSEUDO)
    for axis in range(2):

        def cdf(t):
            return np.mean(
                [scipy.stats.norm.cdf(t, mean[m, axis], scale[m, axis]) for m in range(3)], 0
            )

        assert scipy.stats.kstest(z[:, axis], cdf).pvalue > RARE
    # The components lie many deviations apart, so the nearest one is the one that was drawn: equal
    # shares.
    nearest = np.argmin((((z[:, None] - mean) / scale) ** 2).sum(-1), axis=1)
    counts = np.bincount(nearest, minlength=3)
    assert scipy.stats.chisquare(counts).pvalue > RARE
    # And the two coordinates of one draw belong to the same component.
    for m in range(3):
        inside = z[nearest == m]
        assert np.all(np.abs(inside.mean(0) - mean[m]) < 4 * scale[m] / math.sqrt(len(inside)))
        assert abs(np.corrcoef(inside.T)[0, 1]) < 4 / math.sqrt(len(inside))


@pytest.mark.slow
def test_equal_pseudo_inputs_are_one_component(x64):
    z = jnp.asarray(np.random.default_rng(19).normal(size=(5, 2)))
    one, many = (vamp_prior(DataSpec((2,), "continuous"), m) for m in (1, 6))
    u = jnp.asarray(PSEUDO[:1])
    np.testing.assert_allclose(
        density(one, u, mixture, z),
        density(many, jnp.tile(u, (6, 1)), mixture, z),
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        density(one, u, mixture, z),
        scipy.stats.norm.logpdf(z, 3 * u, np.exp(-1 + 0.3 * u)).sum(-1),
        rtol=1e-12,
    )


@pytest.mark.slow
def test_a_vae_with_one_pseudo_input_has_the_evidence_of_a_shifted_gaussian(x64):
    # p(z) = q(z|u) = N(a, diag(s^2)), so p(x) = N(W a + m, W diag(s^2) W' + noise I).
    p = ppca()
    # Widened to s = 1 in both dimensions, so that q covers the posterior and the weights are
    # bounded.
    params, state = linear_params(p, SHIFT, -0.5 * np.log(p.variance))
    u = p.x[7:8]
    params["vae"]["prior"] = {"x": jnp.asarray(u)}
    model = linear_vae(prior="vamp", n_pseudo_inputs=1, n_bound_samples=64)
    mean, log_scale = (np.asarray(a)[0] for a in model.latent.encode(params, state, jnp.asarray(u)))
    weights = p.weights * np.exp(log_scale)
    want = log_marginal(p.x[:5], weights, p.offset + p.weights @ mean, p.noise)
    value = over_keys(
        lambda key: model.bound(params, state, Batch(jnp.asarray(p.x[:5])), key), 20, 2000
    )
    assert_mean(np.exp(value - want), 1.0)
    assert np.all(value.mean(0) < want)
    # Samples have that law too.
    x = np.asarray(jit(model.sample, static_argnums=3)(params, state, jax.random.key(21), 20_000))
    check_moments(x, p.offset + p.weights @ mean, weights @ weights.T + p.noise * np.eye(6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["continuous", "binary", "discrete"])
def test_pseudo_inputs_live_on_the_normalised_scale(x64, kind):
    spec = DataSpec((3,), kind, levels=5 if kind == "discrete" else None)
    model = vae(spec, latent_dim=2, hidden=(4,), prior="vamp", n_pseudo_inputs=3)
    params, state = random_params(model, seed=3)
    params = f64(params)
    assert params["vae"]["prior"]["x"].shape == (3, 3)
    raw = np.asarray(params["vae"]["prior"]["x"])
    u = raw if kind == "continuous" else np.tanh(raw)
    # `encode` takes events in the units of the data, and maps them to the scale that the
    # pseudo-inputs are on. Traced, because a pseudo-input need not be an event that data can have.
    encode = jit(model.latent.encode)
    seen = np.asarray(encode(params, state, spec.denormalize(jnp.asarray(u)))[0])
    prior = vamp_prior(spec, 3)
    inputs = []
    prior.sample(
        params["vae"]["prior"],
        {},
        lambda x, c: inputs.append(x) or (jnp.asarray(seen), jnp.zeros((3, 2))),
        jax.random.key(0),
        4,
        None,
    )
    np.testing.assert_allclose(inputs[0], u, rtol=1e-12)
    # As the prior is a mixture over these, tiny posteriors put every sample_mean on one of the
    # decoded pseudo-inputs.
    tiny = params["vae"]["encoder"]["layers"][1]
    tiny["kernel"], tiny["bias"] = tiny["kernel"].at[:, 2:].set(0.0), tiny["bias"].at[2:].set(-30.0)
    seen = encode(params, state, spec.denormalize(jnp.asarray(u)))[0]
    decoded = np.asarray(model.latent.decode(params, state, seen))
    drawn = np.asarray(
        jit(model.latent.sample_mean, static_argnums=3)(params, state, jax.random.key(22), 200)
    )
    distance = np.abs(drawn[:, None] - decoded).max(-1)
    assert distance.min(1).max() < 1e-5  # of the order of the floor of the scale, e^-15
    assert len(set(distance.argmin(1))) == 3


@pytest.mark.slow
def test_pseudo_inputs_and_their_conditions_are_learned():
    spec = DataSpec((3,), "binary", n_classes=2)
    model = vae(spec, latent_dim=2, hidden=(4,), prior="vamp", n_pseudo_inputs=5)
    np.testing.assert_allclose(vamp_prior(spec, 5).init(jax.random.key(23))[0]["cond"], 0.5)
    params, state = random_params(model)
    batch = Batch(
        jnp.ones((4, 3)), jnp.array([0, 1, 0, 1])
    )  # labels that are constants of the program are checked too
    grads = jit(
        jax.grad(lambda p: model.losses["vae"](p, state, batch, jax.random.key(0), 0)[0].sum())
    )(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_a_prior_of_ones_own_is_used_for_all_three_things(x64):
    # N(1, 2^2) with parameters of its own: the evidence of the linear model changes as it must.
    p = ppca()
    prior = Prior(
        init=lambda key: ({"mean": jnp.ones(2)}, {}),
        log_prob=lambda own, state, posterior, z, cond, key: jnp.sum(
            jax.scipy.stats.norm.logpdf(z, own["mean"][0], 2.0), -1
        ),
        sample=lambda own, state, posterior, key, n, cond: (
            own["mean"][None] + 2 * jax.random.normal(key, (n, 2))
        ),
    )
    params, state = linear_params(p, 0.0, WIDEN)
    model = linear_vae(prior=prior, n_bound_samples=16)
    assert jax.tree.structure(
        model.init(jax.random.key(0))[0]["vae"]["prior"]
    ) == jax.tree.structure({"mean": 0})
    params["vae"]["prior"] = {"mean": jnp.ones(2)}
    offset = p.offset + p.weights.sum(1)
    value = over_keys(
        lambda key: model.bound(params, state, Batch(jnp.asarray(p.x[:5])), key), 24, 2000
    )
    assert_mean(np.exp(value - log_marginal(p.x[:5], 2 * p.weights, offset, p.noise)), 1.0)
    x = np.asarray(jit(model.sample, static_argnums=3)(params, state, jax.random.key(25), 20_000))
    check_moments(x, offset, 4 * p.weights @ p.weights.T + p.noise * np.eye(6))


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2), (0, 2)])
def test_a_density_that_is_no_number_for_each_latent_is_refused(axes):
    """A sum over more than the last axis would be broadcast, without a word."""

    def log_prob(params, state, posterior, z, cond, key):
        return -jnp.square(z).sum(axes, keepdims=True)[..., 0]

    prior = Prior(
        init=lambda key: ({}, {}),
        log_prob=log_prob,
        sample=lambda params, state, posterior, key, n, cond: jax.random.normal(key, (n, 2)),
    )
    spec = DataSpec((3,), "continuous")
    model = vae(spec, latent_dim=2, hidden=(4,), prior=prior, n_samples=3)
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    batch, key = Batch(jnp.zeros((5, 3))), jax.random.key(1)
    with pytest.raises(ConfigError, match=r"nats of shape \[3, 5\] for z of shape \[3, 5, 2\]"):
        jax.eval_shape(lambda p, s: model.losses["vae"](p, s, batch, key, 0)[0], params, state)
