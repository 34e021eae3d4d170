"""Log-probabilities, divergences and samplers as plain functions, elementwise unless they say
otherwise; all in nats. What goes in as float64 comes out as it.

`likelihoods.py` says which of them a net's outputs are for.
"""

import math

import jax
import jax.numpy as jnp

from genjax.protocol import Array, Key

LOG_2PI = math.log(2 * math.pi)

# --- sums and means -------------------------------------------------------------------------------


def sum_event(values: Array, event_ndim: int = 1) -> Array:
    """Sum over the last `event_ndim` axes: [..., *event] -> [...]."""
    return jnp.sum(values, axis=tuple(range(values.ndim - event_ndim, values.ndim)))


def log_mean_exp(values: Array, axis: int = 0) -> Array:
    """log (1/K) Σ_k exp(values_k) over one axis, without overflow."""
    return jax.nn.logsumexp(values, axis=axis) - math.log(values.shape[axis])


# --- normal ---------------------------------------------------------------------------------------


def normal_log_prob(x: Array, mean: Array | float, log_scale: Array | float) -> Array:
    """ln N(x; mean, exp(log_scale)²) = -½ ((x - mean) e^(-log_scale))² - log_scale - ½ ln 2π."""
    return -0.5 * jnp.square((x - mean) * jnp.exp(-log_scale)) - log_scale - 0.5 * LOG_2PI


def normal_sample(key: Key, mean: Array, log_scale: Array) -> Array:
    """mean + exp(log_scale) ε with ε ~ N(0, 1): differentiable with respect to both."""
    return mean + jnp.exp(log_scale) * jax.random.normal(key, jnp.shape(mean), mean.dtype)


def normal_kl(
    mean: Array, log_scale: Array, mean_2: Array | float = 0.0, log_scale_2: Array | float = 0.0
) -> Array:
    """KL(N(mean, e^2log_scale) || N(mean_2, e^2log_scale_2)); the second is N(0, 1) unless given.
    Kingma 2013, appendix B.
    """
    ratio = jnp.exp(2 * (log_scale - log_scale_2))
    square = jnp.square((mean - mean_2) * jnp.exp(-log_scale_2))
    return 0.5 * (ratio + square - 1) - (log_scale - log_scale_2)


# --- Bernoulli and categorical --------------------------------------------------------------------


@jax.custom_jvp
def softplus(x: Array) -> Array:
    """ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|), with derivative σ(x).

    The values of `jax.nn.softplus`, whose care for infinities in `logaddexp` makes it 2.5 times as
    slow on a CPU.
    """
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


softplus.defjvps(lambda tangent, value, x: tangent * jax.nn.sigmoid(x))


def bernoulli_log_prob(x: Array, logits: Array) -> Array:
    """ln Bernoulli(x; σ(logits)) = x logits - softplus(logits), for x in {0, 1}."""
    return x * logits - softplus(logits)


def bernoulli_sample(key: Key, logits: Array) -> Array:
    """0 or 1 with P(1) = σ(logits), in the dtype of the logits."""
    u = jax.random.uniform(key, logits.shape, logits.dtype)
    return (u < jax.nn.sigmoid(logits)).astype(logits.dtype)


def categorical_log_prob(x: Array, logits: Array) -> Array:
    """ln softmax(logits)[x] for whole numbers x [...] and logits [..., V]."""
    log_p = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_p, x[..., None].astype(jnp.int32), axis=-1)[..., 0]


# --- discretised logistic -------------------------------------------------------------------------


def discretized_logistic_log_prob(x: Array, mean: Array, log_scale: Array, levels: int) -> Array:
    """ln P(x) of a logistic distribution integrated over bins, for whole numbers x in 0 ..
    levels-1.

    With y = 2x/(levels-1) - 1 and bins of width w = 2/(levels-1): P(x) = σ((y + w/2 - mean)/s) -
    σ((y - w/2 - mean)/s), the outermost bins reaching to ±∞, so that Σ_x P(x) = 1. Salimans 2017
    (PixelCNN++), equation 2, with one component; here `mean` is on the scale of y, in [-1, 1].

    Instead of the paper's fall-back for small differences this uses σ(a) - σ(b) = σ(a) σ(-b) (1 -
    e^(b-a)), which is exact and does not cancel.
    """
    width = 2 / (levels - 1)
    centred = x * width - 1 - mean
    inverse_scale = jnp.exp(-log_scale)
    upper, lower = (centred + width / 2) * inverse_scale, (centred - width / 2) * inverse_scale
    below, above = jax.nn.log_sigmoid(upper), jax.nn.log_sigmoid(-lower)
    middle = below + above + jnp.log(-jnp.expm1(-width * inverse_scale))
    return jnp.where(x < 0.5, below, jnp.where(x > levels - 1.5, above, middle))


def discretized_logistic_sample(key: Key, mean: Array, log_scale: Array, levels: int) -> Array:
    """A whole number 0 .. levels-1 (in the dtype of `mean`) from the distribution above, by
    inversion.
    """
    tiny = jnp.finfo(mean.dtype).tiny
    u = jax.random.uniform(key, mean.shape, mean.dtype, minval=tiny)
    y = mean + jnp.exp(log_scale) * (jnp.log(u) - jnp.log1p(-u))
    return jnp.clip(jnp.round((y + 1) * ((levels - 1) / 2)), 0, levels - 1)
