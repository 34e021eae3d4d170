"""Mixtures of discretised logistics: a distribution over whole numbers that have an order, such as
grey levels, of one value or of the channels of a pixel. Salimans 2017 (PixelCNN++), sections 2.1
and 2.2.

    p(x | outputs) = Σ_k π_k Π_c P(x_c; μ_kc + Σ_{e<c} α_kce y_e, s_kc),   y = 2x / (levels - 1) - 1

P is the logistic that `distributions.discretized_logistic_log_prob` integrates over bins, whose
outermost ones reach to ±∞, so that probabilities sum to 1 for any number of levels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax.parts.distributions import discretized_logistic_log_prob, discretized_logistic_sample
from genjax.parts.likelihoods import bounded_log_scale
from genjax.protocol import Array, Key

# The largest log-scale: a logistic that wide is flat from -1 to 1, and a wider one underflows.
MAX_LOG_SCALE = 7.0


class Mixture(NamedTuple):
    """M components over C channels.

    Attributes:
        log_weight: ln π [..., M].
        mean: μ [..., C, M] on the scale of y, in [-1, 1].
        log_scale: ln s [..., C, M].
        slopes: α [..., C (C - 1) / 2, M], in the order of `numpy.tril_indices(C, -1)`.
    """

    log_weight: Array
    mean: Array
    log_scale: Array
    slopes: Array


def n_outputs(n_components: int, channels: int) -> int:
    """How many numbers describe a mixture: weights, means, log-scales and slopes."""
    return n_components * (1 + 2 * channels + channels * (channels - 1) // 2)


def mixture_of(outputs: Array, n_components: int, channels: int) -> Mixture:
    """The mixture that the outputs of a network [..., n_outputs] describe: slopes are within ±1, by
    tanh, as in PixelCNN++'s code, and log-scales between -7 and 7.
    """
    each = outputs.reshape(*outputs.shape[:-1], -1, n_components)
    weight, mean, raw, slopes = jnp.split(each, [1, 1 + channels, 1 + 2 * channels], axis=-2)
    log_scale = jnp.minimum(bounded_log_scale(raw), MAX_LOG_SCALE)
    return Mixture(jax.nn.log_softmax(weight[..., 0, :]), mean, log_scale, jnp.tanh(slopes))


def given_earlier(base: Array, slopes: Array, y: Array) -> Array:
    """base_c + Σ_{e<c} slopes_ce y_e for every channel c: what a network says of a channel, made
    linear in the channels before it. [..., C, V], of base [..., C, V], slopes
    [..., C (C - 1) / 2, V] and y [..., C].
    """
    later, earlier = np.tril_indices(base.shape[-2], -1)
    if not len(later):
        return base
    return base.at[..., later, :].add(slopes * y[..., earlier, None])


def mixture_log_prob(x: Array, mixture: Mixture, levels: int) -> Array:
    """ln p(x) in nats [...] of whole numbers x [..., C] in 0 .. levels-1.

    Example:
        >>> import jax.numpy as jnp
        >>> from genjax.parts.logistics import mixture_log_prob, mixture_of
        >>> wide = mixture_of(jnp.zeros((17, 3 * 2)), n_components=2, channels=1)
        >>> p = jnp.exp(mixture_log_prob(jnp.arange(17.0)[:, None], wide, levels=17))
        >>> round(float(p.sum()), 4)
        1.0
    """
    mean = given_earlier(mixture.mean, mixture.slopes, x * (2 / (levels - 1)) - 1)
    each = discretized_logistic_log_prob(x[..., None], mean, mixture.log_scale, levels)
    return jax.nn.logsumexp(mixture.log_weight + each.sum(-2), axis=-1)


def mixture_sample(key: Key, mixture: Mixture, levels: int) -> Array:
    """x ~ p(x), [..., C] in the dtype of the means: a component, then one channel after another."""
    channels = mixture.mean.shape[-2]
    key_component, *keys = jax.random.split(key, channels + 1)
    chosen = jax.random.categorical(key_component, mixture.log_weight)[..., None, None]
    mean, log_scale, slopes = (
        jnp.take_along_axis(values, chosen, axis=-1)
        for values in (mixture.mean, mixture.log_scale, mixture.slopes)
    )
    x = jnp.zeros_like(mean[..., 0])
    for channel, key_channel in enumerate(keys):
        at = given_earlier(mean, slopes, x * (2 / (levels - 1)) - 1)[..., channel, 0]
        drawn = discretized_logistic_sample(key_channel, at, log_scale[..., channel, 0], levels)
        x = x.at[..., channel].set(drawn)
    return x
