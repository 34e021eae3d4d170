"""What the suites of the variational autoencoder hold it against: the linear-Gaussian model, and
means within their error.
"""

import functools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from genjax.families.vae import vae
from genjax.parts.priors import normal_prior
from genjax.protocol import DataSpec

LINE = DataSpec((6,), "continuous", name="pPCA data")
# These programs are small and run once or a few times: most of the time is the compiler's, and this
# takes a third of it.
jit = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
# Shift and widening of a posterior that is not exact, in deviations and as the logarithm of a
# factor.
SHIFT, WIDEN = 0.3, 0.25


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
    assert np.all(off <= 4 * error + slack), (
        f"off by {np.max((off - slack) / error):.1f} standard errors"
    )


def over_keys(function, seed, n):
    """function(key) for n keys, as one compiled program: [n, ...]."""
    return jax.tree.map(np.asarray, jit(jax.vmap(function))(keys(seed, n)))


def raw_scale(log_scale):
    """The inverse of `bounded_log_scale`, which the parameter goes through."""
    return -7 + np.log(np.expm1(log_scale + 7))


def random_params(model, seed=0, size=0.5):
    """Parameters that are all random, biases too, so that nothing is zero by accident."""
    params, state = jax.eval_shape(
        model.init, jax.random.key(seed)
    )  # only shapes, which saves compiling initialisers
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype), params
    ), state


def check_moments(x, mean, covariance):
    """Mean and covariance of a Gaussian sample, entry by entry, within 4 standard errors."""
    n, variance = len(x), np.diag(covariance)
    assert np.all(np.abs(x.mean(0) - mean) < 4 * np.sqrt(variance / n))
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    assert np.all(np.abs(np.cov(x.T) - covariance) < 4 * error)


# --- the linear-Gaussian oracle -------------------------------------------------------------------


class Linear(NamedTuple):
    """x = W z + m + sigma eps: its data, maximum likelihood solution and exact posterior N(gain (x
    - m), diag(variance)).
    """

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
    optimum = (
        -n
        / 2
        * (d * math.log(2 * math.pi) + np.log(values[:q]).sum() + (d - q) * math.log(noise) + d)
    )
    return Linear(
        x, weights, x.mean(0), noise, np.linalg.solve(m, weights.T), noise / np.diag(m), optimum
    )


def linear_params(p: Linear, shift=0.0, widen=0.0, noise=None):
    """Parameters of a linear VAE that is `p` with its exact posterior, moved by `shift` deviations
    and widened by e^widen.
    """
    deviation = np.sqrt(p.variance)
    encoder = {
        "kernel": np.concatenate([p.gain.T, np.zeros_like(p.gain.T)], axis=1),
        "bias": np.concatenate(
            [
                -p.gain @ p.offset + shift * deviation,
                np.log(deviation) + np.broadcast_to(widen, deviation.shape),
            ]
        ),
    }
    decoder = {"kernel": p.weights.T, "bias": p.offset}
    log_scale = raw_scale(0.5 * math.log(p.noise))
    own = {
        "encoder": {"layers": {0: encoder}},
        "decoder": {"layers": {0: decoder}},
        "log_scale": log_scale,
        "prior": {},
    }
    return f64({"vae": own}), {"vae": {}}


def linear_vae(**settings):
    return vae(LINE, **{"latent_dim": 2, "hidden": (), **settings})


def open_normal(latent_dim=2):
    """N(0, I) without its closed-form KL."""
    return normal_prior(latent_dim)._replace(kl=None)
