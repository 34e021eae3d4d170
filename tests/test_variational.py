"""Variational autoencoders against known answers.

The main oracle is the linear-Gaussian model: a VAE with linear networks is probabilistic PCA (Tipping & Bishop 1999), whose
likelihood, posterior and maximum are in closed form, and whose posterior lies in the mean-field family. Small discrete
models are enumerated. Statements about means hold within 4 standard errors under fixed seeds.
"""

import functools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.special
import scipy.stats

from genjax.distributions import bounded_log_scale
from genjax.errors import ConfigError
from genjax.families.variational import Prior, normal_prior, vae, vamp_prior
from genjax.nets.conv import ConvDecoder, ConvEncoder, check_image
from genjax.nets.functional import functional
from genjax.nets.mlp import MLP, flatten_with
from genjax.protocol import Batch, DataSpec
from genjax.train import compiled, scan_steps, training

RARE = 2 * scipy.stats.norm.sf(4.0)  # the p-value of 4 standard errors
LINE = DataSpec((6,), "continuous", name="pPCA data")
# These programs are small and run once or a few times: most of the time is the compiler's, and this takes a third of it.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def f64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), tree)


def keys(seed, n):
    return jax.random.split(jax.random.key(seed), n)


def assert_mean(values, want, *, slack=0.0):
    """The mean over the first axis is `want` within 4 standard errors (and a known remainder)."""
    values = np.asarray(values, np.float64)
    error = values.std(0, ddof=1) / math.sqrt(len(values))
    assert np.all(error > 0), "nothing random to average"
    off = np.abs(values.mean(0) - want)
    assert np.all(off <= 4 * error + slack), f"off by {np.max((off - slack) / error):.1f} standard errors"


def over_keys(function, seed, n):
    """function(key) for n keys, as one compiled program: [n, ...]."""
    return jax.tree.map(np.asarray, jit(jax.vmap(function))(keys(seed, n)))


def raw_scale(log_scale):
    """The inverse of `bounded_log_scale`, which the parameter goes through."""
    return -7 + np.log(np.expm1(log_scale + 7))


def random_params(model, seed=0, size=0.5):
    """Parameters that are all random, biases too, so that nothing is zero by accident."""
    params, state = jax.eval_shape(model.init, jax.random.key(seed))  # only shapes, which saves compiling initialisers
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype), params), state


# --- the linear-Gaussian oracle -----------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """x = W z + m + sigma eps: its data, maximum likelihood solution and exact posterior N(gain (x - m), diag(variance))."""

    x: np.ndarray
    weights: np.ndarray
    offset: np.ndarray
    noise: float
    gain: np.ndarray
    variance: np.ndarray
    optimum: float

    def log_prob(self, x):
        return log_marginal(x, self.weights, self.offset, self.noise)


def log_marginal(x, weights, offset, noise):
    covariance = weights @ weights.T + noise * np.eye(len(weights))
    return scipy.stats.multivariate_normal(offset, covariance).logpdf(x)


@functools.cache
def ppca(n=500, d=6, q=2):
    """Data from a pPCA model with a fixed seed, and the maximum likelihood solution for them."""
    rng = np.random.default_rng(1999)
    x = (
        rng.normal(size=(n, q)) @ rng.normal(size=(q, d)) * [2, 1, 1, 1, 1, 1]
        + rng.normal(size=d)
        + 0.5 * rng.normal(size=(n, d))
    )
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    noise = values[q:].mean()
    weights = vectors[:, :q] * np.sqrt(values[:q] - noise)
    m = weights.T @ weights + noise * np.eye(q)
    optimum = -n / 2 * (d * math.log(2 * math.pi) + np.log(values[:q]).sum() + (d - q) * math.log(noise) + d)
    return Linear(x, weights, x.mean(0), noise, np.linalg.solve(m, weights.T), noise / np.diag(m), optimum)


def linear_params(p: Linear, shift=0.0, widen=0.0, noise=None):
    """Parameters of a linear VAE that is `p` with its exact posterior, moved by `shift` deviations and widened by e^widen."""
    deviation = np.sqrt(p.variance)
    encoder = {
        "kernel": np.concatenate([p.gain.T, np.zeros_like(p.gain.T)], axis=1),
        "bias": np.concatenate(
            [-p.gain @ p.offset + shift * deviation, np.log(deviation) + np.broadcast_to(widen, deviation.shape)]
        ),
    }
    decoder = {"kernel": p.weights.T, "bias": p.offset}
    log_scale = raw_scale(0.5 * math.log(p.noise))
    own = {"encoder": {"layers": {0: encoder}}, "decoder": {"layers": {0: decoder}}, "log_scale": log_scale, "prior": {}}
    return f64({"vae": own}), {"vae": {}}


def linear_vae(**settings):
    return vae(LINE, **{"latent_dim": 2, "hidden": (), **settings})


def open_normal(latent_dim=2):
    """N(0, I) without its closed-form KL."""
    return normal_prior(latent_dim)._replace(kl=None)


def test_the_oracle_agrees_with_itself():
    p = ppca()
    assert p.log_prob(p.x).sum() == pytest.approx(p.optimum, rel=1e-12)
    m = p.weights.T @ p.weights + p.noise * np.eye(2)
    np.testing.assert_allclose(p.noise * np.linalg.inv(m), np.diag(p.variance), atol=1e-14)


@pytest.mark.parametrize(("k", "prior"), [(1, "open"), (2, "normal"), (7, "normal"), (128, "open"), (128, "normal")])
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


def test_the_loss_has_its_minimum_at_the_ppca_solution(x64):
    # The exact evidence gradient is 0 there, and with K equal weights the pathwise gradient of the decoder averages to it.
    p = ppca()
    params, state = linear_params(p)
    batch = Batch(jnp.asarray(p.x))
    model = linear_vae(gradient="stl")
    grads = over_keys(lambda key: jax.grad(lambda q: model.losses["vae"](q, state, batch, key)[0].mean())(params), 1, 400)
    for leaf in (*jax.tree.leaves(grads["vae"]["decoder"]), grads["vae"]["log_scale"]):
        assert_mean(leaf, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["pathwise", "stl"])
def test_a_trained_linear_vae_is_ppca(gradient):
    p, steps = ppca(), 10_000
    model = linear_vae(gradient=gradient, n_bound_samples=64)
    fit = compiled(scan_steps(training(model, optax.adam(optax.cosine_decay_schedule(0.1, steps))), steps))
    batch = Batch(jnp.asarray(p.x, jnp.float32))
    trained, _ = fit.step(fit.init(jax.random.key(3)), batch)
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), trained.params["vae"])
    weights, offset = own["decoder"]["layers"][0]["kernel"].T, own["decoder"]["layers"][0]["bias"]
    noise = float(np.exp(2 * np.asarray(bounded_log_scale(trained.params["vae"]["log_scale"]))))
    # The likelihood of what was learned, exactly: no more than the optimum, and within 1e-3 nats per example of it.
    gap = (p.optimum - log_marginal(p.x, weights, offset, noise).sum()) / len(p.x)
    assert 0 < gap < 1e-3
    assert scipy.linalg.subspace_angles(weights, p.weights).max() < 0.02
    assert noise == pytest.approx(p.noise, rel=0.01)
    # And the bound reaches it, so the encoder has found the posterior.
    value = over_keys(lambda key: model.bound(trained.params, trained.state, batch, key).mean(), 4, 20)
    assert_mean(value, p.optimum / len(p.x), slack=2e-3)
    mean, log_scale = model.extras["encode"](trained.params, trained.state, batch.x)
    # In a rotation of the latent space of its own, but with the same projection of the data.
    projected = (np.asarray(mean) @ weights.T + offset, (p.x - p.offset) @ p.gain.T @ p.weights.T + p.offset)
    assert np.abs(projected[0] - projected[1]).max() < 0.1
    assert np.all(np.asarray(log_scale) < 0)


# --- bounds on a posterior that is not exact ----------------------------------------------------------------------------

SHIFT, WIDEN = 0.3, 0.25
# For q = N(m + shift s, (s e^widen)^2) against the posterior N(m, s^2), in each of 2 dimensions.
KL = 2 * (0.5 * (math.exp(2 * WIDEN) + SHIFT**2 - 1) - WIDEN)
# Var_q(p/q) = E_q (p/q)^2 - 1, of which one dimension is s1^2 / (s0 sqrt(2 s1^2 - s0^2)) exp(shift^2 / (2 s1^2 - s0^2)).
SPREAD = (
    math.exp(2 * WIDEN) / math.sqrt(2 * math.exp(2 * WIDEN) - 1) * math.exp(SHIFT**2 / (2 * math.exp(2 * WIDEN) - 1))
) ** 2 - 1


@functools.cache
def bounds_off_the_optimum(k, prior="normal", n=1000):
    """bound - ln p(x) for 5 examples and n keys at the moved posterior: [n, 5]."""
    with jax.enable_x64(True):
        p = ppca()
        params, state = linear_params(p, SHIFT, WIDEN)
        model = linear_vae(n_bound_samples=k, prior=open_normal() if prior == "open" else prior)
        batch = Batch(jnp.asarray(p.x[:5]))
        return over_keys(lambda key: model.bound(params, state, batch, key), k, n) - p.log_prob(p.x[:5])


@pytest.mark.parametrize("prior", ["normal", "open"])
def test_the_elbo_is_below_the_evidence_by_the_kl_to_the_posterior(prior):
    assert_mean(bounds_off_the_optimum(1, prior), -KL)


def test_importance_weighted_bounds_rise_to_the_evidence():
    ks = (1, 2, 8, 64, 512)
    values = [bounds_off_the_optimum(k).mean(1) for k in ks]  # over examples, which have the same law
    errors = [value.std(ddof=1) / math.sqrt(len(value)) for value in values]
    for i in range(len(ks)):
        assert values[i].mean() <= 4 * errors[i], f"K={ks[i]} is above ln p(x)"
    for i in range(len(ks) - 1):
        rise, error = values[i + 1].mean() - values[i].mean(), math.hypot(errors[i], errors[i + 1])
        # The gaps are about SPREAD / 2K: up to K=64 they stand out from the noise and must be seen.
        assert rise > (4 if ks[i + 1] <= 64 else -4) * error
    # To first order in 1/K the gap is Var(p/q) / 2K; the remainder is of the order of its square.
    assert_mean(values[-1], -SPREAD / 1024, slack=10 * (SPREAD / 512) ** 2)


@pytest.mark.parametrize(("k", "prior"), [(1, "open"), (2, "normal"), (7, "normal"), (67, "normal"), (128, "normal")])
def test_the_estimate_of_the_evidence_is_unbiased_and_its_variance_falls_as_one_over_k(k, prior):
    # 7: one chunk. 67: a prime beyond the chunk size, so 67 chunks of 1. 128: two chunks of 64, which must be independent:
    # with one key for both the variance would be twice this.
    ratio = np.exp(bounds_off_the_optimum(k, prior))
    assert_mean(ratio, 1.0)
    assert_mean((ratio - 1) ** 2, SPREAD / k)


def test_the_bound_is_the_log_mean_of_weights_made_from_the_extras(x64):
    # An independent computation: q from `encode`, p(x|z) from `decode`, the densities from scipy, other draws of z.
    p = ppca()
    params, state = linear_params(p, SHIFT, WIDEN)
    model = linear_vae(n_bound_samples=128)
    x = p.x[:5]
    mean, log_scale = map(np.asarray, model.extras["encode"](params, state, jnp.asarray(x)))
    rng, k, n = np.random.default_rng(5), 128, 1000
    z = mean + np.exp(log_scale) * rng.normal(size=(n * k, 5, 2))
    decoded = np.asarray(jit(model.extras["decode"])(params, state, jnp.asarray(z.reshape(-1, 2)))).reshape(n * k, 5, 6)
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


def test_the_gradient_of_the_bound_is_finite(x64):
    p = ppca()
    params, state = linear_params(p, SHIFT, WIDEN)
    batch = Batch(jnp.asarray(p.x[:5]))
    model = linear_vae(n_bound_samples=66)  # three chunks, and a running total that starts at -inf
    grads = jit(jax.grad(lambda q: model.bound(q, state, batch, jax.random.key(0)).sum()))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


# --- the parts of the objective -----------------------------------------------------------------------------------------


def test_a_posterior_that_collapsed_to_a_point_has_a_finite_bound_and_finds_its_way_back():
    """A log-scale of -96, which a run once reached, ended in NaN; now it counts as -15 and its KL still pushes it up."""
    spec = DataSpec((6,), "binary")
    model = vae(spec, latent_dim=2, hidden=(), n_bound_samples=4)
    params, state = model.init(jax.random.key(0))
    bias = params["vae"]["encoder"]["layers"][0]["bias"]
    params["vae"]["encoder"]["layers"][0]["bias"] = bias.at[2:].set(-96.0)
    batch = Batch(jnp.ones((4, 6)))
    np.testing.assert_allclose(model.extras["encode"](params, state, batch.x)[1], -15, rtol=1e-5)
    assert np.isfinite(np.asarray(model.bound(params, state, batch, jax.random.key(1)))).all()
    loss = lambda p: model.losses["vae"](p, state, batch, jax.random.key(1))[0].mean()  # noqa: E731
    gradient = jax.grad(loss)(params)["vae"]["encoder"]["layers"][0]["bias"]
    np.testing.assert_allclose(gradient[2:], -1, atol=1e-3)  # d/ds (½ e^2s - s) far below 0


def test_the_closed_form_kl_equals_the_monte_carlo_kl(x64):
    p = ppca()
    params, state = linear_params(p, SHIFT, WIDEN)
    batch = Batch(jnp.asarray(p.x[:5]))
    closed, sampled = linear_vae(), linear_vae(prior=open_normal())

    def both(key):
        return tuple(model.losses["vae"](params, state, batch, key)[1].metrics for model in (closed, sampled))

    one, other = over_keys(both, 6, 3000)
    exact = one["kl"][0]
    np.testing.assert_array_equal(one["kl"], np.broadcast_to(exact, one["kl"].shape))
    mean, log_scale = map(np.asarray, closed.extras["encode"](params, state, batch.x))
    np.testing.assert_allclose(exact, 0.5 * (np.exp(2 * log_scale) + mean**2 - 1 - 2 * log_scale).sum(-1), rtol=1e-12)
    assert_mean(other["kl"], exact)
    # A prior of one's own with the same density draws the same z, and so has the same likelihood; its ELBO has the same mean.
    np.testing.assert_allclose(one["log_likelihood"], other["log_likelihood"], rtol=1e-12)
    assert_mean(one["elbo"] - other["elbo"], 0.0)


@pytest.mark.parametrize("n_samples", [1, 4])
def test_beta_weighs_the_kl_and_nothing_else(x64, n_samples):
    p = ppca()
    params, state = linear_params(p, SHIFT, WIDEN)
    batch, key = Batch(jnp.asarray(p.x[:5])), jax.random.key(7)
    loss, aux = {}, {}
    for beta in (0.0, 1.0, 4.0):
        loss[beta], aux[beta] = jit(linear_vae(beta=beta, n_samples=n_samples).losses["vae"])(params, state, batch, key)
    metrics = aux[1.0].metrics
    for beta in (0.0, 4.0):  # what is reported does not depend on beta
        for name, value in metrics.items():
            np.testing.assert_allclose(aux[beta].metrics[name], value, rtol=1e-12)
    np.testing.assert_allclose(metrics["elbo"], metrics["log_likelihood"] - metrics["kl"], rtol=1e-10)
    if n_samples == 1:
        for beta, value in loss.items():
            np.testing.assert_allclose(value, beta * metrics["kl"] - metrics["log_likelihood"], rtol=1e-12)
        # beta = 1 is minus the bound, draw by draw.
        np.testing.assert_allclose(loss[1.0], -jit(linear_vae().bound)(params, state, batch, key), rtol=1e-12)
    else:
        np.testing.assert_allclose(loss[1.0], -metrics["iwae"], rtol=1e-12)
        assert np.all(metrics["iwae"] > metrics["elbo"])  # Jensen, on the same draws
        # The bound draws with a key split from the one it is given.
        ours = jit(linear_vae(n_bound_samples=4).bound)(params, state, batch, jax.random.key(8))
        inner = jax.random.split(jax.random.key(8), 1)[0]
        np.testing.assert_allclose(
            ours, -jit(linear_vae(n_samples=4).losses["vae"])(params, state, batch, inner)[0], rtol=1e-12
        )


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
        want = np.log(np.where(x == 4, 1, cdf(y + 0.25)) - np.where(x == 0, 0, cdf(y - 0.25))).sum((1, 2))
    _, aux = jit(model.losses["vae"])(params, state, Batch(jnp.asarray(x)), jax.random.key(9))
    np.testing.assert_allclose(aux.metrics["log_likelihood"], want, rtol=1e-9)


def test_a_bernoulli_decoder_of_zeros_gives_each_pixel_ln_half():
    spec = DataSpec((3, 4, 1), "binary")
    model = vae(spec, latent_dim=2, hidden=(5,))
    params, state = random_params(model)
    last = params["vae"]["decoder"]["layers"][1]
    params["vae"]["decoder"]["layers"][1] = jax.tree.map(jnp.zeros_like, last)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, size=(4, 3, 4, 1)), jnp.float32)
    _, aux = jit(model.losses["vae"])(params, state, Batch(x), jax.random.key(0))
    np.testing.assert_allclose(aux.metrics["log_likelihood"], -12 * math.log(2), rtol=1e-6)
    assert set(params["vae"]) == {"encoder", "decoder", "prior"}  # no scale to learn


ENUMERATED = {
    "binary": DataSpec((3,), "binary"),
    "discrete": DataSpec((2,), "discrete", levels=3),
}


@pytest.mark.parametrize("kind", ENUMERATED)
def test_a_tiny_model_is_a_proper_pmf_and_the_bound_finds_its_logarithm(x64, kind):
    spec = ENUMERATED[kind]
    levels = spec.levels or 2
    images = np.stack(np.meshgrid(*[np.arange(levels)] * spec.size, indexing="ij"), -1).reshape(-1, spec.size).astype(float)
    model = vae(spec, latent_dim=1, hidden=(4,), activation="tanh", n_bound_samples=5000)
    params, state = random_params(model, seed=1, size=1.0)
    params = f64(params)
    # q is wide, N(., 1.2^2) or so, which bounds the weights.
    encoder = params["vae"]["encoder"]["layers"][1]
    encoder["kernel"] = encoder["kernel"] * 0.2
    encoder["bias"] = jnp.asarray([0.2, 0.2])
    # p(x) = integral of N(z; 0, 1) prod p(x_i|z) by a sum over a fine grid, with the decoder written out in numpy.
    z = np.linspace(-12, 12, 4801)[:, None]
    first, last = (jax.tree.map(np.asarray, params["vae"]["decoder"]["layers"][i]) for i in (0, 1))
    outputs = np.tanh(z @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]
    if kind == "binary":
        p_one = scipy.special.expit(outputs)[:, None]
        table = np.where(images[None] == 1, p_one, 1 - p_one)
    else:
        scale = np.exp(np.asarray(bounded_log_scale(params["vae"]["log_scale"])))
        cdf, y = scipy.stats.logistic(outputs[:, None], scale).cdf, images[None] - 1
        table = np.where(images[None] == 2, 1, cdf(y + 0.5)) - np.where(images[None] == 0, 0, cdf(y - 0.5))
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


# --- gradients ----------------------------------------------------------------------------------------------------------

POINT = DataSpec((3,), "continuous")
POINTS = np.random.default_rng(12).normal(size=(2, 3)) * 2


@functools.cache
def gradients(gradient, k, beta=1.0, prior="normal", n=20_000):
    """The gradient of the summed loss for n keys, flattened over all parameters: [n, P], and which are the encoder's."""
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
        flatten = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])  # noqa: E731
        grad = jax.grad(lambda p, key: model.losses["vae"](p, state, batch, key)[0].sum())
        mine = flatten(
            {
                "vae": {
                    name: jax.tree.map(lambda a: jnp.full(a.shape, name == "encoder"), p) for name, p in params["vae"].items()
                }
            }
        )
        return over_keys(lambda key: flatten(grad(params, key)), 13, n), np.asarray(mine)


def deviations(one, other):
    """By how many standard errors the means of two gradients differ, parameter by parameter, on the same keys."""
    difference = one - other
    error = difference.std(0, ddof=1) / math.sqrt(len(difference))
    scale = np.abs(one).mean(0)
    assert np.all(error < 0.05 * scale + 1e-12), "too noisy to say anything"
    # Where the two do not differ but for rounding there is nothing to standardise.
    return np.abs(difference.mean(0)) / np.maximum(error, 1e-12 * scale + 1e-300)


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
    # In a VampPrior the encoder's parameters are the prior's too, and must not be treated as q's there.
    ours, encoder = gradients(gradient, k, beta, prior)
    pathwise, _ = gradients("pathwise", k, beta, prior)
    assert 20 < encoder.sum() < len(encoder)
    assert deviations(ours, pathwise).max() < 4.5
    # They are not the same estimator; where the prior is fixed only the encoder's part differs, the decoder's is the same.
    assert np.abs(ours - pathwise)[:, encoder].max() > 1e-3
    if prior == "normal" and k > 1:
        np.testing.assert_allclose(ours[:, ~encoder], pathwise[:, ~encoder], rtol=1e-9, atol=1e-12)


def test_the_comparison_of_gradients_sees_a_biased_one():
    # With K > 1 stopping the score term alone is biased (Tucker 2018, section 3).
    ours, encoder = gradients("stl", 4)
    pathwise, _ = gradients("pathwise", 4)
    assert deviations(ours, pathwise)[encoder].max() > 8


def test_the_closed_form_kl_gives_the_same_gradient_in_the_mean():
    # "pathwise" with K = 1 uses the closed form where there is one.
    assert deviations(gradients("pathwise", 1, 1.0, "normal")[0], gradients("pathwise", 1, 1.0, "open")[0]).max() < 4.5


def test_for_one_sample_dreg_is_stl():
    np.testing.assert_allclose(gradients("dreg", 1)[0], gradients("stl", 1)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("gradient", "k"), [("stl", 1), ("stl", 4), ("dreg", 1), ("dreg", 4)])
def test_at_the_exact_posterior_the_low_variance_gradients_of_the_encoder_vanish(x64, gradient, k):
    p = ppca()
    params, state = linear_params(p)
    batch, key = Batch(jnp.asarray(p.x[:8])), jax.random.key(14)

    def encoder_gradient(model):
        return jit(jax.grad(lambda q: model.losses["vae"](q, state, batch, key)[0].mean()))(params)["vae"]["encoder"]

    for leaf in jax.tree.leaves(encoder_gradient(linear_vae(gradient=gradient, n_samples=k))):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-10)
    # While the pathwise gradient, whose mean is 0 as well, is noise.
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(encoder_gradient(linear_vae(n_samples=k)))) > 1e-2


# --- priors -------------------------------------------------------------------------------------------------------------


def mixture(x, condition):
    """A stand-in for the encoder: q's mean and log-scale as fixed functions of two numbers."""
    return 3 * x[..., :2], -1 + 0.3 * x[..., :2]


PSEUDO = np.array([[-1.5, 0.2], [0.1, 1.0], [1.2, -0.7]])


def naive_mixture(z, mean, log_scale):
    parts = scipy.stats.norm.logpdf(z[..., None, :], mean, np.exp(log_scale)).sum(-1)
    return scipy.special.logsumexp(parts, axis=-1) - math.log(len(mean))


@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4)])
def test_the_vamp_prior_is_the_mixture_of_its_posteriors(x64, shape):
    prior = vamp_prior(DataSpec((2,), "continuous"), 3)
    z = np.random.default_rng(15).normal(size=(*shape, 2)) * 4
    got = jit(lambda z: prior.log_prob({"x": jnp.asarray(PSEUDO)}, mixture, z))(jnp.asarray(z))
    assert got.shape == shape
    np.testing.assert_allclose(got, naive_mixture(z, 3 * PSEUDO, -1 + 0.3 * PSEUDO), rtol=1e-10)


def test_the_vamp_prior_keeps_its_digits_in_float32():
    # 16 dimensions, means of order 3 and deviations of e^-5: what a well trained encoder of images gives.
    rng = np.random.default_rng(16)
    mean, log_scale = (
        (3 * rng.normal(size=(20, 16))).astype(np.float32),
        (-5 + 0.3 * rng.normal(size=(20, 16))).astype(np.float32),
    )
    z = (mean[:8] + np.exp(log_scale[:8]) * rng.normal(size=(8, 16))).astype(np.float32)
    prior = vamp_prior(DataSpec((1,), "continuous"), 20)
    got = prior.log_prob({"x": jnp.zeros((20, 1))}, lambda x, c: (jnp.asarray(mean), jnp.asarray(log_scale)), jnp.asarray(z))
    want = naive_mixture(*(a.astype(np.float64) for a in (z, mean, log_scale)))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_vamp_prior_has_the_gradient_of_the_mixture(x64):
    rng = np.random.default_rng(17)
    mean, log_scale, z = (jnp.asarray(rng.normal(size=size)) for size in ((3, 2), (3, 2), (4, 2)))
    prior = vamp_prior(DataSpec((1,), "continuous"), 3)

    def ours(mean, log_scale, z):
        return prior.log_prob({"x": jnp.zeros((3, 1))}, lambda x, c: (mean, log_scale), z).sum()

    def naive(mean, log_scale, z):
        square = ((z[:, None] - mean[None]) / jnp.exp(log_scale)[None]) ** 2
        return jax.nn.logsumexp((-0.5 * square - log_scale[None]).sum(-1), axis=1).sum()

    for a, b in zip(*(jit(jax.grad(f, (0, 1, 2)))(mean, log_scale, z) for f in (ours, naive)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_samples_of_the_vamp_prior_follow_it():
    prior, n = vamp_prior(DataSpec((2,), "continuous"), 3), 20_000
    z = np.asarray(jit(lambda key: prior.sample({"x": jnp.asarray(PSEUDO, jnp.float32)}, mixture, key, n))(jax.random.key(18)))
    mean, scale = 3 * PSEUDO, np.exp(-1 + 0.3 * PSEUDO)
    for axis in range(2):
        cdf = lambda t: np.mean([scipy.stats.norm.cdf(t, mean[m, axis], scale[m, axis]) for m in range(3)], 0)  # noqa: E731
        assert scipy.stats.kstest(z[:, axis], cdf).pvalue > RARE
    # The components lie many deviations apart, so the nearest one is the one that was drawn: equal shares.
    nearest = np.argmin((((z[:, None] - mean) / scale) ** 2).sum(-1), axis=1)
    counts = np.bincount(nearest, minlength=3)
    assert scipy.stats.chisquare(counts).pvalue > RARE
    # And the two coordinates of one draw belong to the same component.
    for m in range(3):
        inside = z[nearest == m]
        assert np.all(np.abs(inside.mean(0) - mean[m]) < 4 * scale[m] / math.sqrt(len(inside)))
        assert abs(np.corrcoef(inside.T)[0, 1]) < 4 / math.sqrt(len(inside))


def test_equal_pseudo_inputs_are_one_component(x64):
    z = jnp.asarray(np.random.default_rng(19).normal(size=(5, 2)))
    one, many = (vamp_prior(DataSpec((2,), "continuous"), m) for m in (1, 6))
    u = jnp.asarray(PSEUDO[:1])
    np.testing.assert_allclose(
        one.log_prob({"x": u}, mixture, z), many.log_prob({"x": jnp.tile(u, (6, 1))}, mixture, z), rtol=1e-12
    )
    np.testing.assert_allclose(
        one.log_prob({"x": u}, mixture, z), scipy.stats.norm.logpdf(z, 3 * u, np.exp(-1 + 0.3 * u)).sum(-1), rtol=1e-12
    )


def test_a_vae_with_one_pseudo_input_has_the_evidence_of_a_shifted_gaussian(x64):
    # p(z) = q(z|u) = N(a, diag(s^2)), so p(x) = N(W a + m, W diag(s^2) W' + noise I).
    p = ppca()
    # Widened to s = 1 in both dimensions, so that q covers the posterior and the weights are bounded.
    params, state = linear_params(p, SHIFT, -0.5 * np.log(p.variance))
    u = p.x[7:8]
    params["vae"]["prior"] = {"x": jnp.asarray(u)}
    model = linear_vae(prior="vamp", n_pseudo_inputs=1, n_bound_samples=64)
    mean, log_scale = (np.asarray(a)[0] for a in model.extras["encode"](params, state, jnp.asarray(u)))
    weights = p.weights * np.exp(log_scale)
    want = log_marginal(p.x[:5], weights, p.offset + p.weights @ mean, p.noise)
    value = over_keys(lambda key: model.bound(params, state, Batch(jnp.asarray(p.x[:5])), key), 20, 2000)
    assert_mean(np.exp(value - want), 1.0)
    assert np.all(value.mean(0) < want)
    # Samples have that law too.
    x = np.asarray(jit(model.sample, static_argnums=3)(params, state, jax.random.key(21), 20_000))
    check_moments(x, p.offset + p.weights @ mean, weights @ weights.T + p.noise * np.eye(6))


@pytest.mark.parametrize("kind", ["continuous", "binary", "discrete"])
def test_pseudo_inputs_live_on_the_normalised_scale(x64, kind):
    spec = DataSpec((3,), kind, levels=5 if kind == "discrete" else None)
    model = vae(spec, latent_dim=2, hidden=(4,), prior="vamp", n_pseudo_inputs=3)
    params, state = random_params(model, seed=3)
    params = f64(params)
    assert params["vae"]["prior"]["x"].shape == (3, 3)
    raw = np.asarray(params["vae"]["prior"]["x"])
    u = raw if kind == "continuous" else np.tanh(raw)
    # `encode` takes events in the units of the data, and maps them to the scale that the pseudo-inputs are on.
    seen = np.asarray(model.extras["encode"](params, state, spec.denormalize(jnp.asarray(u)))[0])
    prior = vamp_prior(spec, 3)
    inputs = []
    prior.sample(
        params["vae"]["prior"], lambda x, c: inputs.append(x) or (jnp.asarray(seen), jnp.zeros((3, 2))), jax.random.key(0), 4
    )
    np.testing.assert_allclose(inputs[0], u, rtol=1e-12)
    # As the prior is a mixture over these, tiny posteriors put every sample_mean on one of the decoded pseudo-inputs.
    tiny = params["vae"]["encoder"]["layers"][1]
    tiny["kernel"], tiny["bias"] = tiny["kernel"].at[:, 2:].set(0.0), tiny["bias"].at[2:].set(-30.0)
    seen = model.extras["encode"](params, state, spec.denormalize(jnp.asarray(u)))[0]
    decoded = np.asarray(model.extras["decode"](params, state, seen))
    drawn = np.asarray(jit(model.extras["sample_mean"], static_argnums=3)(params, state, jax.random.key(22), 200))
    distance = np.abs(drawn[:, None] - decoded).max(-1)
    assert distance.min(1).max() < 1e-5  # of the order of the floor of the scale, e^-15
    assert len(set(distance.argmin(1))) == 3


def test_pseudo_inputs_and_their_conditions_are_learned():
    spec = DataSpec((3,), "binary", n_classes=2)
    model = vae(spec, latent_dim=2, hidden=(4,), prior="vamp", n_pseudo_inputs=5)
    np.testing.assert_allclose(vamp_prior(spec, 5).init(jax.random.key(23))["cond"], 0.5)
    params, state = random_params(model)
    batch = Batch(jnp.ones((4, 3)), jnp.array([0, 1, 0, 1]))  # labels that are constants of the program are checked too
    grads = jit(jax.grad(lambda p: model.losses["vae"](p, state, batch, jax.random.key(0))[0].sum()))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_a_prior_of_ones_own_is_used_for_all_three_things(x64):
    # N(1, 2^2) with parameters of its own: the evidence of the linear model changes as it must.
    p = ppca()
    prior = Prior(
        init=lambda key: {"mean": jnp.ones(2)},
        log_prob=lambda own, posterior, z: jnp.sum(jax.scipy.stats.norm.logpdf(z, own["mean"][0], 2.0), -1),
        sample=lambda own, posterior, key, n: own["mean"][None] + 2 * jax.random.normal(key, (n, 2)),
    )
    params, state = linear_params(p, 0.0, WIDEN)
    model = linear_vae(prior=prior, n_bound_samples=16)
    assert jax.tree.structure(model.init(jax.random.key(0))[0]["vae"]["prior"]) == jax.tree.structure({"mean": 0})
    params["vae"]["prior"] = {"mean": jnp.ones(2)}
    offset = p.offset + p.weights.sum(1)
    value = over_keys(lambda key: model.bound(params, state, Batch(jnp.asarray(p.x[:5])), key), 24, 2000)
    assert_mean(np.exp(value - log_marginal(p.x[:5], 2 * p.weights, offset, p.noise)), 1.0)
    x = np.asarray(jit(model.sample, static_argnums=3)(params, state, jax.random.key(25), 20_000))
    check_moments(x, offset, 4 * p.weights @ p.weights.T + p.noise * np.eye(6))


# --- conditions ---------------------------------------------------------------------------------------------------------


def conditional(params, net, effect):
    """The parameters of a VAE with rows added for a condition: what the condition adds to the first features."""
    own = jax.tree.map(np.asarray, params["vae"])
    first = {"mlp": (("encoder", "layers", 0), ("decoder", "layers", 0)), "conv": (("encoder", "last"), ("decoder", "first"))}
    for path in first[net]:
        layer = functools.reduce(lambda node, name: node[name], path, own)
        rows = effect((3, layer["kernel"].shape[1]))
        layer["kernel"] = np.concatenate([layer["kernel"], rows])
        layer["rows"] = rows
    return own


def split_rows(own):
    """Take the added rows out of the tree again: (parameters, rows by path)."""
    rows = {}

    def walk(node, path):
        if not isinstance(node, dict):
            return node
        if "rows" in node:
            rows[path] = node["rows"]
        return {name: walk(child, (*path, name)) for name, child in node.items() if name != "rows"}

    return walk(own, ()), rows


@pytest.mark.parametrize(
    ("net", "effect", "form"),
    [
        ("mlp", "none", "label"),
        pytest.param("mlp", "constant", "vector", marks=pytest.mark.slow),
        pytest.param("conv", "none", "vector", marks=pytest.mark.slow),
        ("conv", "constant", "label"),
    ],
)
def test_a_condition_without_effect_or_without_change_is_no_condition(x64, net, effect, form):
    shape = (4, 4, 1)
    settings = {"latent_dim": 2, "net": net, "hidden": (5,), "channels": (3,), "n_bound_samples": 3}
    plain = vae(DataSpec(shape, "binary"), **settings)
    given = vae(DataSpec(shape, "binary", **({"n_classes": 3} if form == "label" else {"cond_dim": 3})), **settings)
    params, state = random_params(plain, seed=4)
    params = f64(params)
    rng = np.random.default_rng(26)
    make = np.zeros if effect == "none" else lambda size: rng.normal(size=size)
    own, rows = split_rows(conditional(params, net, make))
    labels = np.array([0, 2, 1, 1]) if effect == "none" else np.full(4, 2)
    cond = jnp.asarray(labels) if form == "label" else jnp.asarray(np.eye(3)[labels])
    if effect == "constant":  # in the plain model it is part of the bias
        plain_own = jax.tree.map(np.asarray, params["vae"])
        for path, extra in rows.items():
            layer = functools.reduce(lambda node, name: node[name], path, plain_own)
            layer["bias"] = layer["bias"] + extra[2]
        params = f64({"vae": plain_own})
    given_params = f64({"vae": own})
    expected_tree = jax.eval_shape(given.init, jax.random.key(0))[0]
    assert jax.tree.map(jnp.shape, given_params) == jax.tree.map(lambda leaf: leaf.shape, expected_tree)

    x = jnp.asarray(rng.integers(0, 2, size=(4, *shape)), jnp.float64)
    z, key = jnp.asarray(rng.normal(size=(4, 2))), jax.random.key(27)

    def everything(model, params, cond):
        batch = Batch(x, cond)
        return (
            model.losses["vae"](params, state, batch, key)[0],
            model.bound(params, state, batch, key),
            model.sample(params, state, key, 4, cond),
            model.extras["encode"](params, state, x, cond),
            model.extras["decode"](params, state, z, cond),
        )

    one = jit(partial(everything, plain, cond=None))(params)
    other = jit(partial(everything, given))(given_params, cond=cond)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_labels_are_one_hot_vectors_and_make_a_difference():
    settings = {"latent_dim": 2, "hidden": (5,)}
    by_label = vae(DataSpec((4,), "binary", n_classes=3), **settings)
    by_vector = vae(DataSpec((4,), "binary", cond_dim=3), **settings)
    params, state = random_params(by_label)
    labels = jnp.array([0, 1, 2])
    x, z = jnp.ones((3, 4)), jnp.ones((3, 2))
    for name, argument in (("decode", z), ("encode", x), ("reconstruct", x)):
        one = jit(by_label.extras[name])(params, state, argument, labels)
        np.testing.assert_array_equal(
            jax.tree.leaves(one), jax.tree.leaves(jit(by_vector.extras[name])(params, state, argument, jnp.eye(3)))
        )
        rows = np.asarray(jax.tree.leaves(one)[0])
        assert min(np.abs(rows[i] - rows[j]).max() for i in range(3) for j in range(i)) > 1e-2
    one, other = (
        jit(m.bound)(params, state, Batch(x, c), jax.random.key(0)) for m, c in ((by_label, labels), (by_vector, jnp.eye(3)))
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("k", [3, 128])
def test_a_linear_cvae_has_the_evidence_of_its_class(x64, k):
    # x | c = W z + m + b_c + noise. The posterior mean is gain (x - m - b_c): the encoder's rows for c are -gain b_c.
    p = ppca()
    params, state = linear_params(p)
    shift = np.random.default_rng(29).normal(size=(3, 6)) * 2
    own = params["vae"]
    encoder, decoder = own["encoder"]["layers"][0], own["decoder"]["layers"][0]
    encoder["kernel"] = jnp.concatenate(
        [encoder["kernel"], jnp.asarray(np.concatenate([-shift @ p.gain.T, np.zeros((3, 2))], 1))]
    )
    decoder["kernel"] = jnp.concatenate([decoder["kernel"], jnp.asarray(shift)])
    model = vae(DataSpec((6,), "continuous", n_classes=3), latent_dim=2, hidden=(), n_bound_samples=k)
    labels = np.arange(12) % 3
    value = jit(model.bound)(params, state, Batch(jnp.asarray(p.x[:12]), jnp.asarray(labels)), jax.random.key(30))
    np.testing.assert_allclose(value, p.log_prob(p.x[:12] - shift[labels]), atol=1e-8, rtol=0)
    # Samples of a class have its mean.
    x = np.asarray(jit(model.sample, static_argnums=3)(params, state, jax.random.key(31), 6000, jnp.full(6000, 1)))
    check_moments(x, p.offset + shift[1], p.weights @ p.weights.T + p.noise * np.eye(6))


# --- decoding, sampling, units ------------------------------------------------------------------------------------------


def check_moments(x, mean, covariance):
    """Mean and covariance of a Gaussian sample, entry by entry, within 4 standard errors."""
    n, variance = len(x), np.diag(covariance)
    assert np.all(np.abs(x.mean(0) - mean) < 4 * np.sqrt(variance / n))
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    assert np.all(np.abs(np.cov(x.T) - covariance) < 4 * error)


def test_a_linear_decoder_samples_its_gaussian(x64):
    p, n = ppca(), 20_000
    params, state = linear_params(p)
    model = linear_vae()
    x = np.asarray(jit(model.sample, static_argnums=3)(params, state, jax.random.key(32), n))
    check_moments(x, p.offset, p.weights @ p.weights.T + p.noise * np.eye(6))
    whitened = np.linalg.solve(np.linalg.cholesky(p.weights @ p.weights.T + p.noise * np.eye(6)), (x - p.offset).T)
    assert scipy.stats.kstest(whitened.ravel(), scipy.stats.norm.cdf).pvalue > RARE
    # Without the noise of p(x|z) only the span of W is left.
    means = np.asarray(jit(model.extras["sample_mean"], static_argnums=3)(params, state, jax.random.key(33), n))
    check_moments(means, p.offset, p.weights @ p.weights.T)
    outside = scipy.linalg.null_space(p.weights.T)
    assert np.abs((means - p.offset) @ outside).max() < 1e-10


def test_encode_decode_and_reconstruct_are_the_linear_maps_of_the_model(x64):
    p = ppca()
    params, state = linear_params(p)
    extras = linear_vae().extras
    mean, log_scale = extras["encode"](params, state, jnp.asarray(p.x))
    np.testing.assert_allclose(mean, (p.x - p.offset) @ p.gain.T, atol=1e-12)
    np.testing.assert_allclose(log_scale, np.broadcast_to(0.5 * np.log(p.variance), mean.shape), atol=1e-12)
    z = np.random.default_rng(34).normal(size=(3, 2))
    np.testing.assert_allclose(extras["decode"](params, state, jnp.asarray(z)), z @ p.weights.T + p.offset, atol=1e-12)
    want = (p.x - p.offset) @ p.gain.T @ p.weights.T + p.offset
    np.testing.assert_allclose(extras["reconstruct"](params, state, jnp.asarray(p.x)), want, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "net"), [("binary", "conv"), ("discrete", "conv"), ("discrete", "mlp"), ("continuous", "mlp")]
)
def test_shapes_kinds_and_ranges(kind, net):
    spec = DataSpec((4, 4, 2), kind, levels=5 if kind == "discrete" else None)
    scale = "element" if net == "conv" else "shared"  # one of each, with a decoder of two outputs for conv
    model = vae(spec, latent_dim=3, net=net, hidden=(6,), channels=(4, 3), scale=scale)
    params, state = random_params(model, seed=5, size=2.0)  # wild, so that the ends of the range are reached
    x = jnp.asarray(np.random.default_rng(35).integers(0, 2, size=(6, 4, 4, 2)), jnp.float32)

    @jit
    def everything(params, key):
        extras = model.extras
        return (
            extras["encode"](params, state, x),
            extras["decode"](params, state, jnp.ones((7, 3))),
            extras["reconstruct"](params, state, x),
            extras["sample_mean"](params, state, key, 300),
            model.sample(params, state, key, 300),
            extras["decode"](params, state, extras["encode"](params, state, x)[0]),
        )

    (mean, log_scale), decoded, rebuilt, means, samples, twice = everything(params, jax.random.key(36))
    np.testing.assert_array_equal(rebuilt, twice)
    assert mean.shape == log_scale.shape == (6, 3)
    assert decoded.shape == (7, 4, 4, 2)
    assert rebuilt.shape == (6, 4, 4, 2)
    assert means.shape == samples.shape == (300, 4, 4, 2)
    assert all(a.dtype == jnp.float32 for a in (mean, log_scale, decoded, rebuilt, means, samples))
    top = {"binary": 1, "discrete": 4}.get(kind)
    if top is None:
        assert float(jnp.abs(samples).max()) > 1
        return
    for values in (decoded, rebuilt, means, samples):
        assert float(values.min()) >= 0
        assert float(values.max()) <= top
    assert set(np.unique(samples)) == set(range(top + 1))
    assert not np.all(np.asarray(means) == np.round(means))


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_bfloat16_arithmetic_keeps_float32_parameters_and_losses(net):
    spec = DataSpec((4, 4, 1), "binary")
    narrow, wide = (vae(spec, latent_dim=2, net=net, hidden=(8,), channels=(4,), dtype=d) for d in ("bfloat16", "float32"))
    params, state = random_params(narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    batch = Batch(jnp.ones((4, 4, 4, 1)))
    value = lambda p, m: (lambda loss, aux: (loss.sum(), (loss, aux)))(*m.losses["vae"](p, state, batch, jax.random.key(38)))  # noqa: E731
    (_, (one, aux)), grads = jit(jax.value_and_grad(partial(value, m=narrow), has_aux=True))(params)
    other, _ = jit(wide.losses["vae"])(params, state, batch, jax.random.key(38))
    assert {one.dtype, *(m.dtype for m in aux.metrics.values())} == {jnp.dtype("float32")}
    np.testing.assert_allclose(one, other, rtol=0.02)
    assert np.any(np.asarray(one) != np.asarray(other))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_what_a_report_is_told():
    assert linear_vae().estimator == "ELBO, 1 sample"
    assert linear_vae(n_bound_samples=50).estimator == "importance-weighted bound, K=50"
    assert linear_vae().log_prob is None
    assert list(linear_vae().losses) == ["vae"]


# --- networks -----------------------------------------------------------------------------------------------------------


def test_an_mlp_is_its_formula_and_does_not_care_how_rows_are_arranged(x64):
    net = functional(partial(MLP, 3, (5, 4), 2, activation="tanh"))
    params, state = random_params(net)
    params = f64(params)
    x = np.random.default_rng(41).normal(size=(6, 7, 3))
    layers = [jax.tree.map(np.asarray, params["layers"][i]) for i in range(3)]
    assert [layer["kernel"].shape for layer in layers] == [(3, 5), (5, 4), (4, 2)]
    h = x
    for i, layer in enumerate(layers):
        h = h @ layer["kernel"] + layer["bias"]
        h = np.tanh(h) if i < 2 else h
    call = lambda *inputs: [net.apply(params, state, jnp.asarray(a))[0] for a in inputs]  # noqa: E731
    stacked, flat, one = jit(call)(x, x.reshape(42, 3), x[0, 0])
    np.testing.assert_allclose(stacked, h, rtol=1e-10)
    np.testing.assert_array_equal(stacked.reshape(42, 2), flat)
    np.testing.assert_allclose(one, h[0, 0], rtol=1e-10)


def test_flatten_with_appends_the_condition_last():
    x, cond = jnp.arange(12.0).reshape(2, 3, 2), jnp.full((2, 1), 9.0)
    np.testing.assert_array_equal(flatten_with(x, 2, None), x.reshape(2, 6))
    np.testing.assert_array_equal(flatten_with(x, 2, cond), np.concatenate([x.reshape(2, 6), cond], 1))
    np.testing.assert_array_equal(flatten_with(x[..., 0], 1, None), x[..., 0])


@pytest.mark.parametrize(("shape", "channels"), [((8, 8, 1), (2,)), ((8, 4, 3), (4, 3)), ((8, 8, 2), (2, 3, 4))])
def test_convolutional_nets_halve_and_double_once_per_entry(shape, channels):
    encoder = functional(partial(ConvEncoder, shape, channels, 5, cond_size=2))
    decoder = functional(partial(ConvDecoder, 6, shape, channels[::-1], 7))
    (ep, es), (dp, ds) = (jax.eval_shape(net.init, jax.random.key(0)) for net in (encoder, decoder))
    side = [size // 2 ** len(channels) for size in shape[:2]]
    assert ep["last"]["kernel"].shape == (side[0] * side[1] * channels[-1] + 2, 5)
    assert dp["first"]["kernel"].shape == (6, side[0] * side[1] * channels[-1])
    assert jax.eval_shape(encoder.apply, ep, es, jnp.ones((3, *shape)), jnp.ones((3, 2)))[0].shape == (3, 5)
    assert jax.eval_shape(decoder.apply, dp, ds, jnp.ones((3, 6)))[0].shape == (3, *shape[:2], 7)


def test_a_decoder_with_unit_kernels_repeats_and_an_encoder_with_them_picks_every_other_pixel():
    unit = np.zeros((3, 3, 1, 1), np.float32)
    unit[1, 1] = 1
    decoder = functional(partial(ConvDecoder, 4, (8, 8, 1), (1, 1), 1, activation="relu"))
    params = {
        "first": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
        "convs": {i: {"kernel": jnp.asarray(unit), "bias": jnp.zeros(1)} for i in range(2)},
    }
    image = decoder.apply(params, {}, jnp.array([[1.0, 2.0, 3.0, -4.0]]))[0]
    np.testing.assert_array_equal(image[0, ..., 0], np.kron([[1, 2], [3, 0]], np.ones((4, 4))))
    encoder = functional(partial(ConvEncoder, (4, 4, 1), (1,), 4, activation="relu"))
    params = {
        "convs": {0: {"kernel": jnp.asarray(unit), "bias": jnp.zeros(1)}},
        "last": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
    }
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    features = encoder.apply(params, {}, x)[0]
    # "SAME" padding of an even side with stride 2 adds nothing before and one row after, so kernels centre on odd pixels.
    np.testing.assert_array_equal(features[0], x[0, 1::2, 1::2, 0].ravel())


# --- bad input ----------------------------------------------------------------------------------------------------------

IMAGE = DataSpec((8, 8, 1), "binary", name="pictures")


@pytest.mark.parametrize(
    ("spec", "settings", "match"),
    [
        (IMAGE, {"likelihood": "bernouli"}, "no likelihood called 'bernouli'. Did you mean bernoulli"),
        (IMAGE, {"likelihood": "gaussian"}, "pictures is binary, whose likelihood is bernoulli; got gaussian"),
        (LINE, {"likelihood": "discretized_logistic"}, "pPCA data is continuous, whose likelihood is gaussian"),
        (IMAGE, {"prior": "vampp"}, "no prior called 'vampp'. Did you mean vamp"),
        (IMAGE, {"gradient": "reinforce"}, "no gradient called 'reinforce'. There are: pathwise, stl, dreg"),
        (IMAGE, {"net": "cnv"}, "no net called 'cnv'. Did you mean conv"),
        (IMAGE, {"activation": "rellu"}, "no activation called 'rellu'. Did you mean relu"),
        (IMAGE, {"dtype": "float8"}, "no dtype called 'float8'"),
        (LINE, {"scale": "per-pixel"}, "no scale called 'per-pixel'. There are: shared, element"),
        (LINE, {"scale": 0.0}, "scale must be positive, 'shared' or 'element'; got 0.0"),
        (LINE, {"scale": -1}, "scale must be positive"),
        (LINE, {"latent_dim": 0}, "latent_dim must be at least 1; got 0"),
        (LINE, {"n_samples": 0}, "n_samples must be at least 1; got 0"),
        (LINE, {"n_bound_samples": -3}, "n_bound_samples must be at least 1; got -3"),
        (LINE, {"prior": "vamp", "n_pseudo_inputs": 0}, "n_pseudo_inputs must be at least 1; got 0"),
        (DataSpec((5,), "tokens", levels=9), {}, "got tokens. Use a sequence family"),
        (IMAGE, {"net": "conv", "channels": (2, 2, 2, 2)}, "4 halvings need sides that are multiples of 16; got 8 x 8"),
        (IMAGE, {"net": "conv", "channels": ()}, "at least one entry of channels"),
        (LINE, {"net": "conv"}, r"events of shape \(height, width, channels\); got \(6,\). Use net='mlp'"),
    ],
)
def test_settings_that_do_not_exist_or_do_not_fit(spec, settings, match):
    with pytest.raises(ConfigError, match=match):
        vae(spec, **settings)


def test_images_that_do_not_halve():
    check_image((8, 4, 1), 2)
    with pytest.raises(ConfigError, match="3 halvings need sides that are multiples of 8; got 8 x 4"):
        check_image((8, 4, 1), 3)
    with pytest.raises(ConfigError, match="got 6 x 8"):
        check_image((6, 8, 1), 2)


@functools.cache
def small(**condition):
    model = vae(DataSpec((2, 2), "binary", name="squares", **condition), latent_dim=2, hidden=())
    return model, *random_params(model)


X = np.ones((3, 2, 2), np.float32)


@pytest.mark.parametrize(
    ("condition", "batch", "error", "match"),
    [
        ({}, Batch(X[:, :1]), ValueError, r"batch.x of squares must have shape \[B, 2, 2\]; got \[3, 1, 2\]"),
        ({}, Batch(X[0]), ValueError, r"must have shape \[B, 2, 2\]; got \[2, 2\]"),
        ({}, Batch(X.astype(np.uint8)), TypeError, "is binary and must be floating point; got uint8"),
        ({}, X, TypeError, r"Expected a genjax.Batch\(x, cond, weight\); got ndarray"),
        ({}, Batch(X, weight=np.ones((2,), np.float32)), ValueError, r"batch.weight must have shape \[3\]; got \[2\]"),
        ({}, Batch(X, np.zeros(3, np.int32)), ValueError, "this model of squares is unconditional: leave `cond` out"),
        ({"n_classes": 4}, Batch(X), ValueError, r"is conditional: give `cond` \(labels 0..3, int \[3\]\)"),
        ({"n_classes": 4}, Batch(X, np.array([0, 4, 1])), ValueError, "got labels from 0 to 4"),
        ({"n_classes": 4}, Batch(X, np.array([0, -1, 1])), ValueError, "got labels from -1 to 1"),
        ({"n_classes": 4}, Batch(X, np.zeros(3, np.float32)), TypeError, r"labels 0..3, int \[3\]; got dtype float32"),
        ({"n_classes": 4}, Batch(X, np.zeros(2, np.int32)), ValueError, r"got shape \[2\]"),
        ({"cond_dim": 4}, Batch(X, np.zeros((3, 2), np.float32)), ValueError, r"vectors, float \[3, 4\]; got shape \[3, 2\]"),
        ({"cond_dim": 4}, Batch(X, np.zeros((3, 4), np.int32)), TypeError, "got dtype int32"),
    ],
)
def test_batches_that_do_not_fit(condition, batch, error, match):
    model, params, state = small(**condition)
    for function in (model.losses["vae"], model.bound):
        with pytest.raises(error, match=match):
            function(params, state, batch, jax.random.key(0))


def test_keys_and_numbers_that_do_not_fit():
    model, params, state = small()
    old = jax.random.PRNGKey(0)
    for call in (
        lambda: model.init(old),
        lambda: model.sample(params, state, old, 2),
        lambda: model.bound(params, state, Batch(X), old),
        lambda: model.losses["vae"](params, state, Batch(X), old),
    ):
        with pytest.raises(TypeError, match=r"typed PRNG key; got an array of uint32\[2\]. Make one with jax.random.key"):
            call()
    with pytest.raises(TypeError, match="typed PRNG key; got a int"):
        model.sample(params, state, 0, 2)
    for n in (0, -1, 2.0):
        with pytest.raises(ValueError, match="whole number n >= 1 of samples"):
            model.sample(params, state, jax.random.key(0), n)
    with pytest.raises(ValueError, match="it is a shape, so not traced"):
        jax.jit(lambda n: model.sample(params, state, jax.random.key(0), n))(3)


def test_conditions_of_samples_and_extras_that_do_not_fit():
    plain, labelled = small(), small(n_classes=4)
    key = jax.random.key(0)
    for (model, params, state), cond, match in (
        (plain, np.zeros(3, np.int32), "unconditional: leave `cond` out"),
        (labelled, None, "is conditional: give `cond`"),
        (labelled, np.array([0, 1, 7]), "got labels from 0 to 7"),
    ):
        for call in (
            lambda: model.sample(params, state, key, 3, cond),
            lambda: model.extras["sample_mean"](params, state, key, 3, cond),
            lambda: model.extras["encode"](params, state, jnp.asarray(X), cond),
            lambda: model.extras["decode"](params, state, jnp.ones((3, 2)), cond),
            lambda: model.extras["reconstruct"](params, state, jnp.asarray(X), cond),
        ):
            with pytest.raises(ValueError, match=match):
                call()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "images"}, "kind must be one of binary, discrete, continuous, tokens; got 'images'"),
        ({"kind": "binary", "shape": (0, 2)}, r"positive sizes; got \(0, 2\)"),
        ({"kind": "discrete"}, r"discrete data need levels >= 2 \(256 for bytes\); got levels=None"),
        ({"kind": "tokens", "levels": 1}, "tokens data need levels >= 2"),
        ({"kind": "binary", "levels": 2}, "levels is for discrete or token data; got levels=2 with kind='binary'"),
        ({"kind": "binary", "n_classes": 2, "cond_dim": 3}, "a label .n_classes. or a vector .cond_dim., not both"),
        ({"kind": "binary", "n_classes": 0}, "n_classes must be at least 1; got 0"),
        ({"kind": "binary", "cond_dim": -1}, "cond_dim must be at least 1; got -1"),
    ],
)
def test_specs_that_make_no_sense(settings, match):
    with pytest.raises(ValueError, match=match):
        DataSpec(**{"shape": (2, 2), **settings})


@pytest.mark.parametrize(("kind", "levels"), [("binary", None), ("discrete", 17), ("continuous", None)])
def test_normalize_maps_the_range_of_the_data_to_minus_one_and_one(x64, kind, levels):
    spec = DataSpec((2,), kind, levels=levels)
    x = np.arange(levels or 2, dtype=np.float64)
    y = np.asarray(spec.normalize(jnp.asarray(x)))
    np.testing.assert_allclose(y, x if kind == "continuous" else np.linspace(-1, 1, len(x)), atol=1e-15)
    np.testing.assert_allclose(spec.denormalize(jnp.asarray(y)), x, atol=1e-14)
