"""Latent-variable models of sequences, p(x, z) = Π_t p(z_t | h_{t-1}) p(x_t | z_t, h_{t-1}), and
lower bounds of their ln p(x) from paths of q(z | x) = Π_t q(z_t | x_t, h_{t-1}).

Chung 2015 (the ELBO of a recurrence), Burda 2015 (the importance-weighted bound), Maddison 2017
(the filtering bound), Kitagawa 1996 (resampling).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax.nets.platforms import at_each
from genjax.nets.remat import rematerialised
from genjax.parts.distributions import (
    log_mean_exp,
    normal_kl,
    normal_log_prob,
    normal_sample,
    sum_event,
)
from genjax.protocol import Array, Key

Normal = tuple[Array, Array]  # mean and log-scale
# (key, k, n) -> numbers in [0, 1), [k, n]: where the cumulated weights of n examples are cut to
# choose k particles.
Resampling = Callable[[Key, int, int], Array]


class Sequential(NamedTuple):
    """A latent-variable model of sequences with its parameters put in, as functions of one step of
    N examples.

    `carry` is a tuple whose first entry is h_{t-1} [N, d]; `observed` is anything that was computed
    from x, leading axis N.

    Attributes:
        prior: (h) -> p(z_t | h_{t-1}), [N, latent_dim] each.
        posterior: (observed, h) -> q(z_t | x_t, h_{t-1}).
        log_likelihood: (x, z, h) -> ln p(x_t | z_t, h_{t-1}) in nats, [N].
        recur: (observed, z, carry) -> carry.
    """

    prior: Callable[[Array], Normal]
    posterior: Callable[[Any, Array], Normal]
    log_likelihood: Callable[[Array, Array, Array], Array]
    recur: Callable[[Any, Array, Any], Any]


def _step_keys(key: Key, n_steps: int) -> Key:
    """The noise of a step depends on no other step, and so not on how much padding there is."""
    return jax.vmap(lambda t: jax.random.fold_in(key, t))(jnp.arange(n_steps))


def elbo_steps(
    model: Sequential, x: Array, observed: Any, carry: Any, key: Key, remat: str = "none"
) -> tuple[Array, Array]:
    """ln p(x_t | z_t, h_{t-1}) and KL(q(z_t | x_t, h_{t-1}) || p(z_t | h_{t-1})) in nats, each [T,
    N], for one path z ~ q.

    Their difference, summed over time, is the ELBO of Chung 2015, equation 11. x and `observed` are
    [T, N, ...].
    """

    def step(carry: Any, at: Any) -> tuple[Any, Any]:
        observed, key = at
        mean, log_scale = model.posterior(observed, carry[0])
        z = normal_sample(key, mean, log_scale)
        return model.recur(observed, z, carry), (carry[0], z, mean, log_scale)

    path = jax.lax.scan(
        rematerialised(step, remat, loop=True), carry, (observed, _step_keys(key, len(x)))
    )[1]

    def terms(x: Array, h: Array, z: Array, mean: Array, log_scale: Array) -> tuple[Array, Array]:
        kl = sum_event(normal_kl(mean, log_scale, *model.prior(h)))
        return model.log_likelihood(x, z, h), kl

    # Decoder and prior are not part of the recurrence: all steps at once.
    return at_each(terms, x, *path)


def systematic(key: Key, k: int, n: int) -> Array:
    """(i + u) / k with one u ~ U[0, 1) for each example. Kitagawa 1996."""
    u = jax.random.uniform(key, (1, n))
    return (jnp.arange(k, dtype=u.dtype)[:, None] + u) / k


def multinomial(key: Key, k: int, n: int) -> Array:
    """Independent u_i ~ U[0, 1)."""
    return jax.random.uniform(key, (k, n))


RESAMPLING: dict[str, Resampling] = {"systematic": systematic, "multinomial": multinomial}


def ancestors(cuts: Array, log_weight: Array) -> Array:
    """Which particle takes the place of each, int [K, N]: the one whose share of the cumulated
    weights holds the cut.
    """
    upper = jnp.cumsum(jax.nn.softmax(log_weight, axis=0), axis=0)
    below = upper[None] <= cuts.astype(upper.dtype)[:, None]
    return jnp.minimum(below.sum(1), len(log_weight) - 1)  # the last sum may round to less than 1


def effective_size(log_weight: Array) -> Array:
    """(Σ w)² / Σ w² of the particles' weights [K, B]: how many of them count."""
    both = 2 * jax.nn.logsumexp(log_weight, axis=0) - jax.nn.logsumexp(2 * log_weight, axis=0)
    return jnp.exp(both)


def tiled(leaf: Array, k: int) -> Array:
    """All examples k times over, [k, n, ...]."""
    return jnp.broadcast_to(leaf[None], (k, *leaf.shape))


def _taken(leaf: Array, parent: Array) -> Array:
    """leaf [K, N, ...] at parent [K, N] of each example's own particles."""
    return leaf[parent, jnp.arange(parent.shape[1])[None]]


def particle_bound(
    model: Sequential,
    x: Array,
    observed: Any,
    mask: Array,
    carry: Any,
    key: Key,
    k: int,
    resampling: Resampling | None = None,
    remat: str = "none",
) -> Array:
    """ln p̂(x) in nats [B] from K particles z_{1..T} ~ q with E p̂(x) = p(x), so that E ln p̂(x) <=
    ln p(x).

    With weights w_t = w_{t-1} p(x_t, z_t | h_{t-1}) / q(z_t | x_t, h_{t-1}): without resampling p̂
    = 1/K Σ_k w_T, the importance-weighted bound (Burda 2015, equation 8). With it, whenever the
    effective sample size (Σ w)² / Σ w² is below K/2 and steps are still to come, p̂ gains the
    factor 1/K Σ_k w_t, particles are drawn anew in proportion to their weights, and these return
    to 1: the filtering bound (Maddison 2017, algorithm 1). As there, gradients ignore how particles
    were chosen.

    x and `observed` are [T, B, ...], the mask is [T, B] and carries are [B, ...].
    """
    n_steps, b = x.shape[:2]
    tile = partial(tiled, k=k)

    def step(loop: Any, at: Any) -> tuple[Any, None]:
        carry, log_weight, total = loop
        x, observed, valid, more, key = at
        key_z, key_cuts = jax.random.split(key)
        x, observed, h = tile(x), jax.tree.map(tile, observed), carry[0]
        mean, log_scale = at_each(model.posterior, observed, h)
        z = normal_sample(key_z, mean, log_scale)
        log_ratio = sum_event(
            normal_log_prob(z, *at_each(model.prior, h)) - normal_log_prob(z, mean, log_scale)
        )
        gain = at_each(model.log_likelihood, x, z, h) + log_ratio
        log_weight = log_weight + jnp.where(valid[None], gain, 0)
        carry = at_each(model.recur, observed, z, carry)
        if resampling is not None:
            due = more & (effective_size(log_weight) < k / 2)
            chosen = ancestors(resampling(key_cuts, k, b), log_weight)
            parent = jnp.where(due[None], chosen, jnp.arange(k)[:, None])
            carry = jax.tree.map(lambda leaf: _taken(leaf, parent), carry)
            total = total + jnp.where(due, log_mean_exp(log_weight), 0)
            log_weight = jnp.where(due[None], 0, log_weight)
        return (carry, log_weight, total), None

    more = jnp.concatenate([mask[1:], jnp.zeros((1, b), bool)])
    dtype = carry[0].dtype
    start = (jax.tree.map(tile, carry), jnp.zeros((k, b), dtype), jnp.zeros(b, dtype))
    _, log_weight, total = jax.lax.scan(
        rematerialised(step, remat, loop=True),
        start,
        (x, observed, mask, more, _step_keys(key, n_steps)),
    )[0]
    return total + log_mean_exp(log_weight)
