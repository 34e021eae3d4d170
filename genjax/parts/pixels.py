"""What a network's outputs say of one pixel: its channels one after the other, p(x) = Π_c
p(x_c | x_<c). What a network gives for a channel is linear in the channels before it, so that one
pass of it is enough for all.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from genjax.errors import ConfigError
from genjax.parts import logistics
from genjax.parts.distributions import (
    bernoulli_log_prob,
    bernoulli_sample,
    categorical_log_prob,
    sum_event,
)
from genjax.parts.likelihoods import Emission
from genjax.protocol import Array, DataSpec, Key

# Above so many levels a logit for each costs more than it tells.
MOST_LOGITS = 32
_OF_KIND = {"binary": ("bernoulli",), "discrete": ("categorical", "logistics")}


def check_pixels(spec: DataSpec, who: str) -> None:
    """Refuse data that are no values of a few levels each, or come as a sequence.

    Raises:
        ConfigError: naming the family, and what to take instead.
    """
    if spec.step is not None:
        raise ConfigError(
            f"{who} models single events, such as images, and {spec.name} is a sequence of steps, "
            f"each a {spec.step}: take rnn or transformer."
        )
    if spec.kind not in _OF_KIND:
        raise ConfigError(
            f"{who} models binary or discrete data, and {spec.name} is {spec.kind}: take vae, "
            "flow_matching or diffusion for continuous data, rnn or transformer for tokens. Whole "
            "numbers that are stored as floats are levels with --kind discrete."
        )


def likelihood_of(spec: DataSpec, name: str = "auto") -> str:
    """The likelihood of a value that is meant: with "auto" "bernoulli" for binary data, and for
    discrete data "categorical" up to 32 levels, "logistics" beyond.

    Raises:
        ConfigError: for one that does not fit the kind of data.
    """
    fit = _OF_KIND[spec.kind]
    if name == "auto":
        return "logistics" if (spec.levels or 2) > MOST_LOGITS else fit[0]
    if name not in fit:
        raise ConfigError(
            f"likelihood={name!r} is not for {spec.kind} data, and {spec.name} is {spec.kind}: "
            f"take {' or '.join(fit)}."
        )
    return name


def pixel_emission(spec: DataSpec, likelihood: str, n_components: int = 1) -> Emission:
    """The distribution of the C channels of one pixel, an event of `spec.shape[1:]`, one value or
    [C].

    With y the normalised values, channel c has the parameters base_c + Σ_{e<c} slopes_ce y_e:
    logits for "bernoulli" and "categorical", means for "logistics", a mixture of `n_components`
    (`parts/logistics.py`).
    """
    event, channels = spec.shape[1:], math.prod(spec.shape[1:])
    make = _logistics if likelihood == "logistics" else _logits
    found = make(spec, channels, n_components)

    def log_prob(x: Array, outputs: Array) -> Array:
        return found.log_prob(x.reshape(*outputs.shape[:-1], channels), outputs)

    def sample(key: Key, outputs: Array) -> Array:
        return found.sample(key, outputs).reshape(*outputs.shape[:-1], *event)

    return Emission(found.n_outputs, log_prob, sample)


def channel_logits(spec: DataSpec, channels: int, outputs: Array, x: Array) -> Array:
    """The logits of every channel of x [..., C], each given the channels before it,
    [..., C, levels], or [..., C, 1] of binary data.
    """
    each = outputs.reshape(*outputs.shape[:-1], -1, spec.levels or 1)
    base, slopes = jnp.split(each, [channels], axis=-2)
    return logistics.given_earlier(base, slopes, spec.normalize(x))


def _logits(spec: DataSpec, channels: int, n_components: int) -> Emission:
    pairs = len(np.tril_indices(channels, -1)[0])

    def log_prob(x: Array, outputs: Array) -> Array:
        logits = channel_logits(spec, channels, outputs, x)
        if spec.kind == "binary":
            return sum_event(bernoulli_log_prob(x, logits[..., 0]))
        return sum_event(categorical_log_prob(x, logits))

    def one(key: Key, logits: Array) -> Array:
        if spec.kind == "binary":
            return bernoulli_sample(key, logits[..., 0])
        return jax.random.categorical(key, logits).astype(spec.dtype)

    def sample(key: Key, outputs: Array) -> Array:
        x = jnp.zeros((*outputs.shape[:-1], channels), spec.dtype)
        for channel, own in enumerate(jax.random.split(key, channels)):
            logits = channel_logits(spec, channels, outputs, x)[..., channel, :]
            x = x.at[..., channel].set(one(own, logits))
        return x

    return Emission((channels + pairs) * (spec.levels or 1), log_prob, sample)


def _logistics(spec: DataSpec, channels: int, n_components: int) -> Emission:
    levels = spec.levels or 2

    def log_prob(x: Array, outputs: Array) -> Array:
        mixture = logistics.mixture_of(outputs, n_components, channels)
        return logistics.mixture_log_prob(x, mixture, levels)

    def sample(key: Key, outputs: Array) -> Array:
        mixture = logistics.mixture_of(outputs, n_components, channels)
        return logistics.mixture_sample(key, mixture, levels)

    return Emission(logistics.n_outputs(n_components, channels), log_prob, sample)
