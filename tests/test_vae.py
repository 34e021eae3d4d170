"""Variational autoencoders against known answers.

The main oracle is the linear-Gaussian model: a VAE with linear networks is probabilistic PCA
(Tipping & Bishop 1999), whose likelihood, posterior and maximum are in closed form, and whose
posterior lies in the mean-field family. Small discrete models are enumerated. Statements about
means hold within 4 standard errors under fixed seeds.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from gates import optimised
from statistics_checks import RARE
from vae_oracles import (
    SHIFT,
    WIDEN,
    assert_mean,
    f64,
    jit,
    linear_params,
    linear_vae,
    log_marginal,
    open_normal,
    over_keys,
    ppca,
    random_params,
)

from genjax.families.vae import vae
from genjax.learning.step import training
from genjax.learning.transforms import repeat_steps
from genjax.parts.likelihoods import bounded_log_scale
from genjax.protocol import Batch, DataSpec

# --- at the exact posterior -----------------------------------------------------------------------


def test_the_oracle_agrees_with_itself():
    p = ppca()
    assert p.log_prob(p.x).sum() == pytest.approx(p.optimum, rel=1e-12)
    m = p.weights.T @ p.weights + p.noise * np.eye(2)
    np.testing.assert_allclose(p.noise * np.linalg.inv(m), np.diag(p.variance), atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "prior"), [(1, "open"), (2, "normal"), (7, "normal"), (128, "open"), (128, "normal")]
)
def test_at_the_ppca_solution_every_importance_weight_is_the_evidence(x64, k, prior):
    # q(z|x) = p(z|x), so p(x, z) / q(z|x) = p(x) whatever z: no error that is random, for any key.
    p = ppca()
    model = linear_vae(n_bound_samples=k, prior=open_normal() if prior == "open" else "normal")
    params, state = linear_params(p)
    bound = jit(model.bound)
    for seed in range(3):
        value = np.asarray(bound(params, state, Batch(jnp.asarray(p.x)), jax.random.key(seed)))
        np.testing.assert_allclose(value, p.log_prob(p.x), rtol=0, atol=1e-8)
        assert value.sum() == pytest.approx(p.optimum, abs=1e-6)


def test_at_the_ppca_solution_the_elbo_with_closed_form_kl_is_the_evidence_in_expectation(x64):
    p = ppca()
    params, state = linear_params(p)
    batch = Batch(jnp.asarray(p.x[:8]))
    value = over_keys(lambda key: linear_vae().bound(params, state, batch, key), 0, 4000)
    assert_mean(value, p.log_prob(p.x[:8]))
    assert value.std(0).min() > 0.1  # one sample of ln p(x|z) is random, unlike the weight


@pytest.mark.slow
def test_the_loss_has_its_minimum_at_the_ppca_solution(x64):
    # The exact evidence gradient is 0 there, and with K equal weights the pathwise gradient of the
    # decoder averages to it.
    p = ppca()
    params, state = linear_params(p)
    batch = Batch(jnp.asarray(p.x))
    model = linear_vae(gradient="stl")
    grads = over_keys(
        lambda key: jax.grad(lambda q: model.losses["vae"](q, state, batch, key, 0)[0].mean())(
            params
        ),
        1,
        400,
    )
    for leaf in (*jax.tree.leaves(grads["vae"]["decoder"]), grads["vae"]["log_scale"]):
        assert_mean(leaf, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["pathwise", "stl"])
def test_a_trained_linear_vae_is_ppca(gradient):
    p, steps = ppca(), 10_000
    model = linear_vae(gradient=gradient, n_bound_samples=64)
    t = repeat_steps(training(model, optax.adam(optax.cosine_decay_schedule(0.1, steps))), steps)
    batch = Batch(jnp.asarray(p.x, jnp.float32))
    trained, _ = optimised(t.step)(jax.jit(t.init)(jax.random.key(3)), batch)
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), trained.params["vae"])
    weights, offset = own["decoder"]["layers"][0]["kernel"].T, own["decoder"]["layers"][0]["bias"]
    noise = float(np.exp(2 * np.asarray(bounded_log_scale(trained.params["vae"]["log_scale"]))))
    # The likelihood of what was learned, exactly: no more than the optimum, and within 1e-3 nats
    # per example of it.
    gap = (p.optimum - log_marginal(p.x, weights, offset, noise).sum()) / len(p.x)
    assert 0 < gap < 1e-3
    assert scipy.linalg.subspace_angles(weights, p.weights).max() < 0.02
    assert noise == pytest.approx(p.noise, rel=0.01)
    # And the bound reaches it, so the encoder has found the posterior.
    value = over_keys(
        lambda key: model.bound(trained.params, trained.state, batch, key).mean(), 4, 20
    )
    assert_mean(value, p.optimum / len(p.x), slack=2e-3)
    mean, log_scale = model.latent.encode(trained.params, trained.state, batch.x)
    # In a rotation of the latent space of its own, but with the same projection of the data.
    projected = (
        np.asarray(mean) @ weights.T + offset,
        (p.x - p.offset) @ p.gain.T @ p.weights.T + p.offset,
    )
    assert np.abs(projected[0] - projected[1]).max() < 0.1
    assert np.all(np.asarray(log_scale) < 0)


# --- bounds on a posterior that is not exact ------------------------------------------------------

# For q = N(m + shift s, (s e^widen)^2) against the posterior N(m, s^2), in each of 2 dimensions.
KL = 2 * (0.5 * (math.exp(2 * WIDEN) + SHIFT**2 - 1) - WIDEN)
# Var_q(p/q) = E_q (p/q)^2 - 1, of which one dimension is s1^2 / (s0 sqrt(2 s1^2 - s0^2))
# exp(shift^2 / (2 s1^2 - s0^2)).
SPREAD = (
    math.exp(2 * WIDEN)
    / math.sqrt(2 * math.exp(2 * WIDEN) - 1)
    * math.exp(SHIFT**2 / (2 * math.exp(2 * WIDEN) - 1))
) ** 2 - 1


@functools.cache
def bounds_off_the_optimum(k, prior="normal", n=1000):
    """bound - ln p(x) for 5 examples and n keys at the moved posterior: [n, 5]."""
    with jax.enable_x64(True):
        p = ppca()
        params, state = linear_params(p, SHIFT, WIDEN)
        model = linear_vae(n_bound_samples=k, prior=open_normal() if prior == "open" else prior)
        batch = Batch(jnp.asarray(p.x[:5]))
        return over_keys(lambda key: model.bound(params, state, batch, key), k, n) - p.log_prob(
            p.x[:5]
        )


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["normal", "open"])
def test_the_elbo_is_below_the_evidence_by_the_kl_to_the_posterior(prior):
    assert_mean(bounds_off_the_optimum(1, prior), -KL)


@pytest.mark.slow
def test_importance_weighted_bounds_rise_to_the_evidence():
    ks = (1, 2, 8, 64, 512)
    values = [
        bounds_off_the_optimum(k).mean(1) for k in ks
    ]  # over examples, which have the same law
    errors = [value.std(ddof=1) / math.sqrt(len(value)) for value in values]
    for i in range(len(ks)):
        assert values[i].mean() <= 4 * errors[i], f"K={ks[i]} is above ln p(x)"
    for i in range(len(ks) - 1):
        rise, error = values[i + 1].mean() - values[i].mean(), math.hypot(errors[i], errors[i + 1])
        # The gaps are about SPREAD / 2K: up to K=64 they stand out from the noise and must be seen.
        assert rise > (4 if ks[i + 1] <= 64 else -4) * error
    # To first order in 1/K the gap is Var(p/q) / 2K; the remainder is of the order of its square.
    assert_mean(values[-1], -SPREAD / 1024, slack=10 * (SPREAD / 512) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "prior"), [(1, "open"), (2, "normal"), (7, "normal"), (67, "normal"), (128, "normal")]
)
def test_the_estimate_of_the_evidence_is_unbiased_and_its_variance_falls_as_one_over_k(k, prior):
    # 7: one chunk. 67: a prime beyond the chunk size, so 67 chunks of 1. 128: two chunks of 64,
    # which must be independent: with one key for both the variance would be twice this.
    ratio = np.exp(bounds_off_the_optimum(k, prior))
    assert_mean(ratio, 1.0)
    assert_mean((ratio - 1) ** 2, SPREAD / k)


@pytest.mark.slow
def test_the_bound_is_the_log_mean_of_weights_made_from_what_is_encoded_and_decoded(x64):
    # An independent computation: q from `encode`, p(x|z) from `decode`, the densities from scipy,
    # other draws of z.
    p = ppca()
    params, state = linear_params(p, SHIFT, WIDEN)
    model = linear_vae(n_bound_samples=128)
    x = p.x[:5]
    mean, log_scale = map(np.asarray, model.latent.encode(params, state, jnp.asarray(x)))
    rng, k, n = np.random.default_rng(5), 128, 1000
    z = mean + np.exp(log_scale) * rng.normal(size=(n * k, 5, 2))
    decoded = np.asarray(
        jit(model.latent.decode)(params, state, jnp.asarray(z.reshape(-1, 2)))
    ).reshape(n * k, 5, 6)
    weight = (
        scipy.stats.norm.logpdf(x, decoded, math.sqrt(p.noise)).sum(-1)
        + scipy.stats.norm.logpdf(z).sum(-1)
        - scipy.stats.norm.logpdf(z, mean, np.exp(log_scale)).sum(-1)
    )
    direct = scipy.special.logsumexp(weight.reshape(n, k, 5), axis=1) - math.log(k) - p.log_prob(x)
    ours = bounds_off_the_optimum(128)
    for moment in (lambda v: v, lambda v: (v - v.mean(0)) ** 2):
        a, b = moment(direct), moment(ours)
        error = np.hypot(a.std(0, ddof=1), b.std(0, ddof=1)) / math.sqrt(n)
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4 * error)


@pytest.mark.slow
def test_the_gradient_of_the_bound_is_finite(x64):
    p = ppca()
    params, state = linear_params(p, SHIFT, WIDEN)
    batch = Batch(jnp.asarray(p.x[:5]))
    model = linear_vae(n_bound_samples=66)  # three chunks, and a running total that starts at -inf
    grads = jit(jax.grad(lambda q: model.bound(q, state, batch, jax.random.key(0)).sum()))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


# --- the parts of the objective -------------------------------------------------------------------


@pytest.mark.slow
def test_a_posterior_that_collapsed_to_a_point_has_a_finite_bound_and_finds_its_way_back():
    """A log-scale of -96, which a run once reached, ended in NaN; now it counts as -15 and its KL
    still pushes it up.
    """
    spec = DataSpec((6,), "binary")
    model = vae(spec, latent_dim=2, hidden=(), n_bound_samples=4)
    params, state = model.init(jax.random.key(0))
    bias = params["vae"]["encoder"]["layers"][0]["bias"]
    params["vae"]["encoder"]["layers"][0]["bias"] = bias.at[2:].set(-96.0)
    batch = Batch(jnp.ones((4, 6)))
    np.testing.assert_allclose(jit(model.latent.encode)(params, state, batch.x)[1], -15, rtol=1e-5)
    assert np.isfinite(np.asarray(jit(model.bound)(params, state, batch, jax.random.key(1)))).all()

    def loss(p):
        return model.losses["vae"](p, state, batch, jax.random.key(1), 0)[0].mean()

    gradient = jit(jax.grad(loss))(params)["vae"]["encoder"]["layers"][0]["bias"]
    np.testing.assert_allclose(gradient[2:], -1, atol=1e-3)  # d/ds (½ e^2s - s) far below 0


@pytest.mark.slow
def test_the_closed_form_kl_equals_the_monte_carlo_kl(x64):
    p = ppca()
    params, state = linear_params(p, SHIFT, WIDEN)
    batch = Batch(jnp.asarray(p.x[:5]))
    closed, sampled = linear_vae(), linear_vae(prior=open_normal())

    def both(key):
        return tuple(
            model.losses["vae"](params, state, batch, key, 0)[1].metrics
            for model in (closed, sampled)
        )

    one, other = over_keys(both, 6, 3000)
    exact = one["kl"][0]
    np.testing.assert_array_equal(one["kl"], np.broadcast_to(exact, one["kl"].shape))
    mean, log_scale = map(np.asarray, closed.latent.encode(params, state, batch.x))
    np.testing.assert_allclose(
        exact, 0.5 * (np.exp(2 * log_scale) + mean**2 - 1 - 2 * log_scale).sum(-1), rtol=1e-12
    )
    assert_mean(other["kl"], exact)
    # A prior of one's own with the same density draws the same z, and so has the same likelihood;
    # its ELBO has the same mean.
    np.testing.assert_allclose(one["log_likelihood"], other["log_likelihood"], rtol=1e-12)
    assert_mean(one["elbo"] - other["elbo"], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("n_samples", [1, 4])
def test_beta_weighs_the_kl_and_nothing_else(x64, n_samples):
    p = ppca()
    params, state = linear_params(p, SHIFT, WIDEN)
    batch, key = Batch(jnp.asarray(p.x[:5])), jax.random.key(7)
    loss, aux = {}, {}
    for beta in (0.0, 1.0, 4.0):
        loss[beta], aux[beta] = jit(linear_vae(beta=beta, n_samples=n_samples).losses["vae"])(
            params, state, batch, key, 0
        )
    metrics = aux[1.0].metrics
    for beta in (0.0, 4.0):  # what is reported does not depend on beta
        for name, value in metrics.items():
            np.testing.assert_allclose(aux[beta].metrics[name], value, rtol=1e-12)
    np.testing.assert_allclose(
        metrics["elbo"], metrics["log_likelihood"] - metrics["kl"], rtol=1e-10
    )
    if n_samples == 1:
        for beta, value in loss.items():
            np.testing.assert_allclose(
                value, beta * metrics["kl"] - metrics["log_likelihood"], rtol=1e-12
            )
        # beta = 1 is minus the bound, draw by draw.
        np.testing.assert_allclose(
            loss[1.0], -jit(linear_vae().bound)(params, state, batch, key), rtol=1e-12
        )
    else:
        np.testing.assert_allclose(loss[1.0], -metrics["iwae"], rtol=1e-12)
        assert np.all(metrics["iwae"] > metrics["elbo"])  # Jensen, on the same draws
        # The bound draws with a key split from the one it is given.
        ours = jit(linear_vae(n_bound_samples=4).bound)(params, state, batch, jax.random.key(8))
        inner = jax.random.split(jax.random.key(8), 1)[0]
        np.testing.assert_allclose(
            ours,
            -jit(linear_vae(n_samples=4).losses["vae"])(params, state, batch, inner, 0)[0],
            rtol=1e-12,
        )


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["shared", "element", 0.7])
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_a_decoder_that_ignores_z_has_the_likelihood_of_its_biases(x64, kind, scale):
    spec = DataSpec((2, 2), kind, levels=5 if kind == "discrete" else None)
    model = vae(spec, latent_dim=2, hidden=(3,), scale=scale)
    params, state = random_params(model)
    params = f64(params)
    last = params["vae"]["decoder"]["layers"][1]
    last["kernel"] = jnp.zeros_like(last["kernel"])
    mean = np.asarray(last["bias"]).reshape(2, 2, -1)[..., 0]
    if scale == "element":
        raw = np.asarray(last["bias"]).reshape(2, 2, -1)[..., 1]
        assert "log_scale" not in params["vae"]
    else:
        assert ("log_scale" in params["vae"]) == (scale == "shared")
        raw = np.asarray(params["vae"].get("log_scale", 0.0))
    deviation = 0.7 if scale == 0.7 else np.exp(-7 + np.logaddexp(0, raw + 7))
    rng = np.random.default_rng(8)
    if kind == "continuous":
        x = rng.normal(size=(3, 2, 2))
        want = scipy.stats.norm.logpdf(x, mean, deviation).sum((1, 2))
    else:
        x = rng.integers(0, 5, size=(3, 2, 2)).astype(np.float64)
        cdf, y = scipy.stats.logistic(mean, deviation).cdf, x / 2 - 1
        want = np.log(np.where(x == 4, 1, cdf(y + 0.25)) - np.where(x == 0, 0, cdf(y - 0.25))).sum(
            (1, 2)
        )
    _, aux = jit(model.losses["vae"])(params, state, Batch(jnp.asarray(x)), jax.random.key(9), 0)
    np.testing.assert_allclose(aux.metrics["log_likelihood"], want, rtol=1e-9)


def test_a_bernoulli_decoder_of_zeros_gives_each_pixel_ln_half():
    spec = DataSpec((3, 4, 1), "binary")
    model = vae(spec, latent_dim=2, hidden=(5,))
    params, state = random_params(model)
    last = params["vae"]["decoder"]["layers"][1]
    params["vae"]["decoder"]["layers"][1] = jax.tree.map(jnp.zeros_like, last)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, size=(4, 3, 4, 1)), jnp.float32)
    _, aux = jit(model.losses["vae"])(params, state, Batch(x), jax.random.key(0), 0)
    np.testing.assert_allclose(aux.metrics["log_likelihood"], -12 * math.log(2), rtol=1e-6)
    assert set(params["vae"]) == {"encoder", "decoder", "prior"}  # no scale to learn


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_a_categorical_decoder_of_zeros_gives_every_level_alike(net):
    spec = DataSpec((4, 4, 2), "discrete", levels=5)
    settings = {"latent_dim": 2, "net": net, "hidden": (5,), "channels": (3,)}
    model = vae(spec, likelihood="categorical", **settings)
    params, state = random_params(model)
    params["vae"]["decoder"] = jax.tree.map(jnp.zeros_like, params["vae"]["decoder"])
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, size=(4, 4, 4, 2)), jnp.float32)
    _, aux = jit(model.losses["vae"])(params, state, Batch(x), jax.random.key(0), 0)
    np.testing.assert_allclose(aux.metrics["log_likelihood"], -32 * math.log(5), rtol=1e-6)
    decoded = model.latent.decode(params, state, jnp.ones((3, 2)))
    np.testing.assert_allclose(decoded, 2.0, rtol=1e-6)  # the mean of 0 .. 4
    assert set(params["vae"]) == {"encoder", "decoder", "prior"}  # no scale to learn


@pytest.mark.slow
def test_auto_is_the_usual_likelihood_of_the_kind():
    spec, x = DataSpec((3,), "discrete", levels=4), Batch(jnp.asarray([[0.0, 3.0, 1.0]]))
    one, other = (
        vae(spec, latent_dim=2, hidden=(3,), likelihood=name)
        for name in ("auto", "discretized_logistic")
    )
    params, state = random_params(one)
    found, wanted = (jit(m.bound)(params, state, x, jax.random.key(0)) for m in (one, other))
    np.testing.assert_array_equal(found, wanted)


ENUMERATED = {
    "binary": DataSpec((3,), "binary"),
    "discrete": DataSpec((2,), "discrete", levels=3),
    "categorical": DataSpec((2,), "discrete", levels=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENUMERATED)
def test_a_tiny_model_is_a_proper_pmf_and_the_bound_finds_its_logarithm(x64, kind):
    spec = ENUMERATED[kind]
    levels = spec.levels or 2
    images = (
        np.stack(np.meshgrid(*[np.arange(levels)] * spec.size, indexing="ij"), -1)
        .reshape(-1, spec.size)
        .astype(float)
    )
    settings = {"latent_dim": 1, "hidden": (4,), "activation": "tanh", "n_bound_samples": 5000}
    model = vae(spec, likelihood=kind if kind == "categorical" else "auto", **settings)
    params, state = random_params(model, seed=1, size=1.0)
    params = f64(params)
    # q is wide, N(., 1.2^2) or so, which bounds the weights.
    encoder = params["vae"]["encoder"]["layers"][1]
    encoder["kernel"] = encoder["kernel"] * 0.2
    encoder["bias"] = jnp.asarray([0.2, 0.2])
    # p(x) = integral of N(z; 0, 1) prod p(x_i|z) by a sum over a fine grid, with the decoder
    # written out in numpy.
    z = np.linspace(-12, 12, 4801)[:, None]
    first, last = (jax.tree.map(np.asarray, params["vae"]["decoder"]["layers"][i]) for i in (0, 1))
    outputs = np.tanh(z @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]
    if kind == "binary":
        p_one = scipy.special.expit(outputs)[:, None]
        table = np.where(images[None] == 1, p_one, 1 - p_one)
    elif kind == "categorical":
        each = scipy.special.softmax(outputs.reshape(-1, 2, 3), axis=-1)
        table = each[:, [0, 1], images.astype(int)]
    else:
        scale = np.exp(np.asarray(bounded_log_scale(params["vae"]["log_scale"])))
        cdf, y = scipy.stats.logistic(outputs[:, None], scale).cdf, images[None] - 1
        table = np.where(images[None] == 2, 1, cdf(y + 0.5)) - np.where(
            images[None] == 0, 0, cdf(y - 0.5)
        )
    p = (scipy.stats.norm.pdf(z) * table.prod(-1)).sum(0) * (z[1] - z[0])
    assert p.sum() == pytest.approx(1.0, abs=1e-10)
    assert p.max() > 1.5 * p.min()  # the pixels do something
    batch = Batch(jnp.asarray(images))
    value = over_keys(lambda key: model.bound(params, state, batch, key), 10, 40)
    assert_mean(np.exp(value - np.log(p)), 1.0)
    # The gap in expectation is half the variance of the estimate, to first order.
    assert_mean(value - np.log(p), 0.0, slack=np.exp(value - np.log(p)).var(0))
    # And samples follow the same pmf.
    x = np.asarray(jit(model.sample, static_argnums=3)(params, state, jax.random.key(11), 20_000))
    index = (x @ levels ** np.arange(spec.size)[::-1]).astype(int)
    assert scipy.stats.chisquare(np.bincount(index, minlength=len(p)), p * 20_000).pvalue > RARE
