"""Rules on the logits of the next token: temperature, what is cut off, what is made less likely.

The number that a rule takes may be traced, so that one program serves them all, and it means the
same however it comes: as Python's, numpy's or jax's, traced, or one for each example of a `vmap`.
What has a meaning of its own (temperature 0, top-p 1) has it then, too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from genjax.errors import ConfigError
from genjax.protocol import Array

# (logits [n, V], counts int32 [n, V] of each token so far) -> logits [n, V].
Rule = Callable[[Array, Array], Array]


def _keep(kept: Array, logits: Array) -> Array:
    return jnp.where(kept, logits, -jnp.inf)


def require(valid: Callable[[Any], Any], name: str, wanted: str, value: Any) -> None:
    """Refuse a number, or any number of an array, that is not valid; a traced one cannot be seen.

    Raises:
        ConfigError: with what was wanted.
    """
    if isinstance(value, Tracer):
        return
    seen = np.asarray(value)  # of any library: np.float32(0) and jnp.zeros(()) are 0, too
    number = jnp.issubdtype(seen.dtype, jnp.number)
    if not number or not np.all(valid(seen.astype(np.float64))):
        raise ConfigError(f"{name} must be {wanted}; got {value}.")


def require_whole(name: str, value: Any) -> None:
    """Refuse what is no whole number from 1 on.

    Raises:
        ConfigError: with the value.
    """
    require(lambda k: (k >= 1) & (k == np.floor(k)), name, "at least 1 and whole", value)


def _number(value: Any) -> Any:
    """A number whose value is known as Python has it; a traced one as it is."""
    return value if isinstance(value, Tracer) else np.asarray(value).item()


def wide(logits: Array) -> Array:
    """The same in float32 at least."""
    return logits.astype(jnp.float32) if jnp.finfo(logits.dtype).bits < 32 else logits


def _of_rows(order: Array, kept: Array) -> Array:
    """What is kept of tokens in some order, as a mask of the tokens in their own."""
    return jnp.put_along_axis(jnp.zeros(order.shape, bool), order, kept, axis=-1, inplace=False)


def temperature(t: Array | float) -> Rule:
    """logits / t. A t of 0 means greedy: the first of the largest logits keeps its value, all
    others become -inf. So it is for a t that is traced, or too small for the logits' dtype.

    Raises:
        ConfigError: for t below 0 or not finite.
    """
    require(
        lambda t: (t >= 0) & (t < np.inf), "The temperature", "0 (greedy) or above and finite", t
    )
    t = _number(t)

    def rule(logits: Array, counts: Array) -> Array:
        here = jnp.asarray(t, logits.dtype)
        zero = here < jnp.finfo(logits.dtype).tiny
        here = jnp.where(zero, jnp.ones((), here.dtype), here)
        # So small that what it divides is past all numbers: then only differences tell.
        largest = logits.max(-1, keepdims=True)
        past = jnp.isfinite(largest) & ~jnp.isfinite(largest / here)
        divided = jnp.where(past, logits - largest, logits) / here
        return jnp.where(zero, greedy(logits, counts), divided)

    return greedy if not isinstance(t, Tracer) and t == 0 else rule


def greedy(logits: Array, counts: Array) -> Array:
    """The first of the largest logits keeps its value, all others become -inf."""
    return _keep(jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool), logits)


def top_k(k: Array | int) -> Rule:
    """Keeps the k largest logits (of equal ones the first) and makes the others -inf. Fan 2018.

    Raises:
        ConfigError: for k below 1, or not whole.
    """
    require_whole("k of top-k", k)
    k = _number(k)

    def rule(logits: Array, counts: Array) -> Array:
        if isinstance(k, Tracer):
            order = jnp.argsort(logits, axis=-1, descending=True)
            rank = jnp.arange(logits.shape[-1], dtype=k.dtype)
            return _keep(_of_rows(order, jnp.broadcast_to(rank < k, logits.shape)), logits)
        chosen = jax.lax.top_k(logits, min(int(k), logits.shape[-1]))[1]
        whole = jnp.zeros(logits.shape, bool)
        return _keep(jnp.put_along_axis(whole, chosen, True, axis=-1, inplace=False), logits)

    return rule


def top_p(p: Array | float) -> Rule:
    """Keeps the smallest set of most probable tokens whose probabilities add up to p or more (of
    equal ones the first). Holtzman 2019, equations 2 and 3.

    From the small end: a token is kept if it and all that are less probable have more than 1 - p.
    Near p = 1 a sum from the large end would have lost what it is about.

    Raises:
        ConfigError: for p outside (0, 1].
    """
    require(lambda p: (p > 0) & (p <= 1), "p of top-p", "in (0, 1]", p)
    p = _number(p)

    def rule(logits: Array, counts: Array) -> Array:
        order = jnp.argsort(logits, axis=-1, descending=True)
        ordered = wide(jnp.take_along_axis(logits, order, axis=-1))
        probabilities = jax.nn.softmax(ordered, axis=-1)
        whole, rest = (jnp.asarray(one, ordered.dtype) for one in (p, 1 - p))
        upwards = jax.lax.cumsum(probabilities, axis=logits.ndim - 1, reverse=True)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(whole > 0.5, upwards > rest, before < whole)
        # The most probable token is always in, and 1 changes nothing, be a probability 0 by
        # rounding or not.
        kept = (kept | (p >= 1)).at[..., 0].set(True)
        return _keep(_of_rows(order, kept), logits)

    return rule


def min_p(p: Array | float) -> Rule:
    """Keeps the tokens that are at least p times as probable as the most probable one. Nguyen 2024.

    Raises:
        ConfigError: for p outside (0, 1].
    """
    require(lambda p: (p > 0) & (p <= 1), "p of min-p", "in (0, 1]", p)
    p = _number(p)

    def rule(logits: Array, counts: Array) -> Array:
        values = wide(logits)
        least = jnp.log(jnp.asarray(p, values.dtype))
        return _keep(values - values.max(-1, keepdims=True) >= least, logits)

    return rule


def repetition_penalty(r: Array | float) -> Rule:
    """Makes tokens that came before less likely: logit / r where it is positive and logit r where
    it is negative.

    Keskar 2019 (CTRL), section 4.1, whose logits are divided whatever their sign, which would
    favour a repetition where they are negative.

    Raises:
        ConfigError: for r not above 0 or not finite; 1 changes nothing.
    """
    require(lambda r: (r > 0) & (r < np.inf), "The repetition penalty", "above 0 and finite", r)
    r = _number(r)

    def rule(logits: Array, counts: Array) -> Array:
        here = jnp.asarray(r, logits.dtype)
        penalised = jnp.where(logits > 0, logits / here, logits * here)
        return jnp.where(counts > 0, penalised, logits)

    return rule


def compose(*rules: Rule) -> Rule:
    """The rules one after the other, the first one first; without any, the logits as they are."""

    def rule(logits: Array, counts: Array) -> Array:
        for one in rules:
            logits = one(logits, counts)
        return logits

    return rule
