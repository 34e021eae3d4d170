"""Log-probabilities, divergences and samplers as plain functions, elementwise unless they say
otherwise; all in nats.

A `Likelihood` bundles the four functions that a decoder's outputs need. Code is dtype-generic:
float64 in, float64 out.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genjax.protocol import Array, DataSpec, Key

LOG_2PI = math.log(2 * math.pi)


def sum_event(values: Array, event_ndim: int = 1) -> Array:
    """Sum over the last `event_ndim` axes: [..., *event] -> [...]."""
    return jnp.sum(values, axis=tuple(range(values.ndim - event_ndim, values.ndim)))


def log_mean_exp(values: Array, axis: int = 0) -> Array:
    """log (1/K) Σ_k exp(values_k) over one axis, without overflow."""
    return jax.nn.logsumexp(values, axis=axis) - math.log(values.shape[axis])


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
    return 0.5 * (ratio + jnp.square((mean - mean_2) * jnp.exp(-log_scale_2)) - 1) - (
        log_scale - log_scale_2
    )


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
    return (jax.random.uniform(key, logits.shape, logits.dtype) < jax.nn.sigmoid(logits)).astype(
        logits.dtype
    )


def categorical_log_prob(x: Array, logits: Array) -> Array:
    """ln softmax(logits)[x] for whole numbers x [...] and logits [..., V]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None].astype(jnp.int32), axis=-1)[
        ..., 0
    ]


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
    middle = (
        jax.nn.log_sigmoid(upper)
        + jax.nn.log_sigmoid(-lower)
        + jnp.log(-jnp.expm1(-width * inverse_scale))
    )
    return jnp.where(
        x < 0.5,
        jax.nn.log_sigmoid(upper),
        jnp.where(x > levels - 1.5, jax.nn.log_sigmoid(-lower), middle),
    )


def discretized_logistic_sample(key: Key, mean: Array, log_scale: Array, levels: int) -> Array:
    """A whole number 0 .. levels-1 (in the dtype of `mean`) from the distribution above, by
    inversion.
    """
    tiny = jnp.finfo(mean.dtype).tiny
    u = jax.random.uniform(key, mean.shape, mean.dtype, minval=tiny)
    y = mean + jnp.exp(log_scale) * (jnp.log(u) - jnp.log1p(-u))
    return jnp.clip(jnp.round((y + 1) * ((levels - 1) / 2)), 0, levels - 1)


class Likelihood(NamedTuple):
    """p(x | outputs) for the outputs of a decoder, [..., *event, n_outputs]; elementwise over the
    event.

    Attributes:
        n_outputs: how many numbers the decoder gives per element.
        log_prob: (x, outputs, log_scale) -> nats per element, [..., *event].
        sample: (key, outputs, log_scale) -> x.
        mean: (outputs, log_scale) -> the expectation of x (for the logistic its location), in the
            units of x.
        scaled: whether it uses a scale; where n_outputs is 2 the second output is the log-scale and
            `log_scale` is ignored.
    """

    n_outputs: int
    log_prob: Callable[[Array, Array, Array | float], Array]
    sample: Callable[[Key, Array, Array | float], Array]
    mean: Callable[[Array, Array | float], Array]
    scaled: bool


def bounded_log_scale(raw: Array, min_log_scale: float = -7.0) -> Array:
    """min + softplus(raw - min): a log-scale that never falls below a floor and keeps a gradient, ≈
    raw far above it.

    Without the floor a Gaussian likelihood is unbounded, and one bad step is enough for
    exp(-log_scale) to overflow.
    """
    return min_log_scale + jax.nn.softplus(raw - min_log_scale)


def _split_scale(outputs: Array, log_scale: Array | float) -> tuple[Array, Array]:
    mean = outputs[..., 0]
    return mean, bounded_log_scale(outputs[..., 1]) if outputs.shape[-1] == 2 else jnp.asarray(
        log_scale, mean.dtype
    )


def bernoulli(spec: DataSpec, per_element_scale: bool) -> Likelihood:
    """Bernoulli likelihood of binary data; it has no scale."""
    return Likelihood(
        n_outputs=1,
        log_prob=lambda x, outputs, log_scale: bernoulli_log_prob(x, outputs[..., 0]),
        sample=lambda key, outputs, log_scale: bernoulli_sample(key, outputs[..., 0]),
        mean=lambda outputs, log_scale: jax.nn.sigmoid(outputs[..., 0]),
        scaled=False,
    )


def gaussian(spec: DataSpec, per_element_scale: bool) -> Likelihood:
    """Normal likelihood of continuous data, in the units of the data."""
    return Likelihood(
        n_outputs=2 if per_element_scale else 1,
        log_prob=lambda x, outputs, log_scale: normal_log_prob(
            x, *_split_scale(outputs, log_scale)
        ),
        sample=lambda key, outputs, log_scale: normal_sample(
            key, *_split_scale(outputs, log_scale)
        ),
        mean=lambda outputs, log_scale: outputs[..., 0],
        scaled=True,
    )


def discretized_logistic(spec: DataSpec, per_element_scale: bool) -> Likelihood:
    """Discretised logistic likelihood of discrete data; mean and scale are on the normalised range
    [-1, 1].
    """
    levels = spec.levels or 2
    return Likelihood(
        n_outputs=2 if per_element_scale else 1,
        log_prob=lambda x, outputs, log_scale: discretized_logistic_log_prob(
            x, *_split_scale(outputs, log_scale), levels
        ),
        sample=lambda key, outputs, log_scale: discretized_logistic_sample(
            key, *_split_scale(outputs, log_scale), levels
        ),
        mean=lambda outputs, log_scale: jnp.clip(spec.denormalize(outputs[..., 0]), 0, levels - 1),
        scaled=True,
    )


LIKELIHOODS: dict[str, Callable[[DataSpec, bool], Likelihood]] = {
    "bernoulli": bernoulli,
    "gaussian": gaussian,
    "discretized_logistic": discretized_logistic,
}

# The likelihood that makes sense for each kind of data; another one would compare densities with
# probabilities.
LIKELIHOOD_OF_KIND = {
    "binary": "bernoulli",
    "continuous": "gaussian",
    "discrete": "discretized_logistic",
}


class Emission(NamedTuple):
    """p(event | outputs) for one step of a sequence, whose event has the shape `spec.shape[1:]`.

    Attributes:
        n_outputs: how many numbers a network gives per step.
        log_prob: (x [..., *event], outputs [..., n_outputs]) -> nats [...], summed over the event.
        sample: (key, outputs [..., n_outputs]) -> x [..., *event], in the dtype of the data.
    """

    n_outputs: int
    log_prob: Callable[[Array, Array], Array]
    sample: Callable[[Key, Array], Array]


def emission(spec: DataSpec, n_components: int = 1) -> Emission:
    """The distribution of one step that fits the kind of data.

    Tokens and discrete values are categorical (the outputs are logits, `levels` of them for each
    value), binary values Bernoulli, all independent within the step; continuous vectors are a
    mixture of `n_components` Gaussians with diagonal covariance (Graves 2013, section 4.1, without
    correlations), which need not be independent.
    """
    event = spec.shape[1:]
    size, ndim = math.prod(event), len(event)
    if spec.kind in ("tokens", "discrete"):
        levels = spec.levels or 2
        logits_of = lambda outputs: outputs.reshape(*outputs.shape[:-1], *event, levels)  # noqa: E731
        return Emission(
            size * levels,
            lambda x, outputs: sum_event(categorical_log_prob(x, logits_of(outputs)), ndim),
            lambda key, outputs: jax.random.categorical(key, logits_of(outputs)).astype(spec.dtype),
        )
    if spec.kind == "binary":
        logits_of = lambda outputs: outputs.reshape(*outputs.shape[:-1], *event)  # noqa: E731
        return Emission(
            size,
            lambda x, outputs: sum_event(bernoulli_log_prob(x, logits_of(outputs)), ndim),
            lambda key, outputs: bernoulli_sample(key, logits_of(outputs)),
        )
    m = n_components

    def parts(outputs: Array) -> tuple[Array, Array, Array]:
        """Log-weights [..., m], means and log-scales [..., m, size]."""
        mean, raw = jnp.split(
            outputs[..., m:].reshape(*outputs.shape[:-1], m, 2 * size), 2, axis=-1
        )
        return jax.nn.log_softmax(outputs[..., :m]), mean, bounded_log_scale(raw)

    def log_prob(x: Array, outputs: Array) -> Array:
        log_weight, mean, log_scale = parts(outputs)
        flat = x.reshape(*outputs.shape[:-1], 1, size)
        return jax.nn.logsumexp(
            log_weight + sum_event(normal_log_prob(flat, mean, log_scale)), axis=-1
        )

    def sample(key: Key, outputs: Array) -> Array:
        key_component, key_noise = jax.random.split(key)
        log_weight, mean, log_scale = parts(outputs)
        chosen = jax.random.categorical(key_component, log_weight)[..., None, None]
        take = lambda values: jnp.take_along_axis(values, chosen, axis=-2)[..., 0, :]  # noqa: E731
        return normal_sample(key_noise, take(mean), take(log_scale)).reshape(
            *outputs.shape[:-1], *event
        )

    return Emission(m * (1 + 2 * size), log_prob, sample)
