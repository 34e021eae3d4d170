"""What a net's outputs say of data: likelihoods of images and vectors, emissions of sequences."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError
from genjax.parts.distributions import (
    bernoulli_log_prob,
    bernoulli_sample,
    categorical_log_prob,
    discretized_logistic_log_prob,
    discretized_logistic_sample,
    normal_log_prob,
    normal_sample,
    sum_event,
)
from genjax.protocol import Array, DataSpec, Key

# --- likelihoods of a decoder ---------------------------------------------------------------------


class Likelihood(NamedTuple):
    """p(x | outputs) for the outputs of a decoder, [..., *event, n_outputs]; elementwise over the
    event.

    Attributes:
        n_outputs: how many numbers the decoder gives per element.
        log_prob: (x, outputs, log_scale) -> nats per element, [..., *event]; of elements with
            scales of their own (`DataSpec.scale`) only the sum over an event is meant.
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
    if outputs.shape[-1] == 2:
        return mean, bounded_log_scale(outputs[..., 1])
    return mean, jnp.asarray(log_scale, mean.dtype)


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
    """Normal likelihood of continuous data; mean and scale are those of standardised values, the
    log-density is that of x.
    """
    volume = spec.log_volume / spec.size  # of one element; their sum is exact

    def log_prob(x: Array, outputs: Array, log_scale: Array | float) -> Array:
        return normal_log_prob(spec.normalize(x), *_split_scale(outputs, log_scale)) + volume

    def sample(key: Key, outputs: Array, log_scale: Array | float) -> Array:
        return spec.denormalize(normal_sample(key, *_split_scale(outputs, log_scale)))

    return Likelihood(
        n_outputs=2 if per_element_scale else 1,
        log_prob=log_prob,
        sample=sample,
        mean=lambda outputs, log_scale: spec.denormalize(outputs[..., 0]),
        scaled=True,
    )


def discretized_logistic(spec: DataSpec, per_element_scale: bool) -> Likelihood:
    """Discretised logistic likelihood of discrete data; mean and scale are on the normalised range
    [-1, 1].
    """
    top = spec.top or 1

    def log_prob(x: Array, outputs: Array, log_scale: Array | float) -> Array:
        return discretized_logistic_log_prob(x, *_split_scale(outputs, log_scale), top + 1)

    def sample(key: Key, outputs: Array, log_scale: Array | float) -> Array:
        return discretized_logistic_sample(key, *_split_scale(outputs, log_scale), top + 1)

    return Likelihood(
        n_outputs=2 if per_element_scale else 1,
        log_prob=log_prob,
        sample=sample,
        mean=lambda outputs, log_scale: jnp.clip(spec.denormalize(outputs[..., 0]), 0, top),
        scaled=True,
    )


def categorical(spec: DataSpec, per_element_scale: bool) -> Likelihood:
    """Categorical likelihood of discrete data, `levels` logits for each element; it has no scale
    and knows of no order among the levels.
    """
    levels = spec.levels or 2

    def sample(key: Key, outputs: Array, log_scale: Array | float) -> Array:
        return jax.random.categorical(key, outputs).astype(outputs.dtype)

    def mean(outputs: Array, log_scale: Array | float) -> Array:
        return jnp.matmul(jax.nn.softmax(outputs), jnp.arange(levels, dtype=outputs.dtype))

    return Likelihood(
        n_outputs=levels,
        log_prob=lambda x, outputs, log_scale: categorical_log_prob(x, outputs),
        sample=sample,
        mean=mean,
        scaled=False,
    )


LIKELIHOODS: dict[str, Callable[[DataSpec, bool], Likelihood]] = {
    "bernoulli": bernoulli,
    "gaussian": gaussian,
    "discretized_logistic": discretized_logistic,
    "categorical": categorical,
}


# Those that make sense for each kind of data, the usual one first; another one would compare
# densities with probabilities.
LIKELIHOODS_OF_KIND = {
    "binary": ("bernoulli",),
    "continuous": ("gaussian",),
    "discrete": ("discretized_logistic", "categorical"),
}


def likelihood_of(
    spec: DataSpec, name: str = "auto", per_element_scale: bool = False
) -> Likelihood:
    """The likelihood called `name`, or with "auto" the usual one of the kind of data.

    Raises:
        ConfigError: for data without a likelihood here (tokens), and for one that does not fit.
    """
    fit = LIKELIHOODS_OF_KIND.get(spec.kind, ())
    if not fit:
        raise ConfigError(f"{spec.name} is {spec.kind}, which no likelihood of events is for.")
    name = fit[0] if name == "auto" else name
    if name not in fit:
        raise ConfigError(
            f"{spec.name} is {spec.kind}, whose likelihood is {' or '.join(fit)}; got {name}. "
            "Take that; if data of your own are of another kind, say so with kind= (--kind)."
        )
    return LIKELIHOODS[name](spec, per_element_scale)


# --- emissions of a sequence ----------------------------------------------------------------------


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
    if spec.kind in ("tokens", "discrete"):
        return _categorical_emission(spec)
    if spec.kind == "binary":
        return _bernoulli_emission(spec)
    return _mixture_emission(spec, n_components)


def _categorical_emission(spec: DataSpec) -> Emission:
    event, levels = spec.shape[1:], spec.levels or 2

    def logits_of(outputs: Array) -> Array:
        return outputs.reshape(*outputs.shape[:-1], *event, levels)

    def log_prob(x: Array, outputs: Array) -> Array:
        return sum_event(categorical_log_prob(x, logits_of(outputs)), len(event))

    def sample(key: Key, outputs: Array) -> Array:
        return jax.random.categorical(key, logits_of(outputs)).astype(spec.dtype)

    return Emission(math.prod(event) * levels, log_prob, sample)


def _bernoulli_emission(spec: DataSpec) -> Emission:
    event = spec.shape[1:]

    def logits_of(outputs: Array) -> Array:
        return outputs.reshape(*outputs.shape[:-1], *event)

    def log_prob(x: Array, outputs: Array) -> Array:
        return sum_event(bernoulli_log_prob(x, logits_of(outputs)), len(event))

    def sample(key: Key, outputs: Array) -> Array:
        return bernoulli_sample(key, logits_of(outputs))

    return Emission(math.prod(event), log_prob, sample)


def _mixture_emission(spec: DataSpec, m: int) -> Emission:
    event = spec.shape[1:]
    size, volume = math.prod(event), spec.log_volume / spec.shape[0]

    def parts(outputs: Array) -> tuple[Array, Array, Array]:
        """Log-weights [..., m], means and log-scales [..., m, size]."""
        each = outputs[..., m:].reshape(*outputs.shape[:-1], m, 2 * size)
        mean, raw = jnp.split(each, 2, axis=-1)
        return jax.nn.log_softmax(outputs[..., :m]), mean, bounded_log_scale(raw)

    def log_prob(x: Array, outputs: Array) -> Array:
        log_weight, mean, log_scale = parts(outputs)
        flat = spec.normalize(x).reshape(*outputs.shape[:-1], 1, size)
        log_each = sum_event(normal_log_prob(flat, mean, log_scale))
        return jax.nn.logsumexp(log_weight + log_each, axis=-1) + volume

    def sample(key: Key, outputs: Array) -> Array:
        key_component, key_noise = jax.random.split(key)
        log_weight, mean, log_scale = parts(outputs)
        chosen = jax.random.categorical(key_component, log_weight)[..., None, None]
        mean, log_scale = (
            jnp.take_along_axis(values, chosen, axis=-2)[..., 0, :] for values in (mean, log_scale)
        )
        x = normal_sample(key_noise, mean, log_scale)
        return spec.denormalize(x.reshape(*outputs.shape[:-1], *event))

    return Emission(m * (1 + 2 * size), log_prob, sample)


# --- densities of discrete data -------------------------------------------------------------------


def dequantize(spec: DataSpec, x: Array, key: Key) -> Array:
    """Normalised events with which a density can be fitted: x + u, u uniform on [-½, ½), for binary
    and discrete data; x for continuous data.
    """
    if spec.kind == "continuous":
        return spec.normalize(x)
    return spec.normalize(x + jax.random.uniform(key, x.shape, x.dtype, -0.5, 0.5))


def dequantized_bound(
    spec: DataSpec, log_density: Callable[[Array], Array], x: Array, key: Key
) -> Array:
    """ln p(x + u) per level, [n] nats: in expectation at most ln P(x), P(x) = ∫ p(x + u) du. Theis
    2016. Of continuous data it is ln p(x), exactly.

    Args:
        spec: binary or discrete data, D dimensions.
        log_density: (normalised events [n, *shape]) -> ln p [n]; in those units a level has the
            volume (2 / (levels - 1))^D.
        x: events in the units of the data, [n, *shape].
        key: of u.
    """
    return log_density(dequantize(spec, x, key)) + spec.log_volume
