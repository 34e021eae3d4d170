"""Guidance: a conditional and an unconditional prediction put together, as plain functions of arrays."""

import jax.numpy as jnp

from genjax.protocol import Array


def classifier_free(conditional: Array, unconditional: Array, scale: Array | float) -> Array:
    """(1 - s) u + s c: the conditional prediction c moved away from the unconditional one u, or towards it for s < 1.

    For logits it is the distribution proportional to p(x)^(1-s) p(x|c)^s; for predictions of noise or scores it is the score
    of that density. Scale 1 is c and scale 0 is u, bit for bit. Ho & Salimans 2022, equation 6, where s is written 1 + w.

    Args:
        conditional: c, any shape; the result has its shape and dtype.
        unconditional: u, the same shape.
        scale: s, one number (it may be traced) or an array of the same rank that broadcasts.
    """
    s = jnp.asarray(scale, conditional.dtype)
    mixed = (1 - s) * unconditional + s * conditional
    # At the ends the other prediction must not come in at all, be it infinite (a logit of -inf) or of another zero's sign.
    return jnp.where(s == 1, conditional, jnp.where(s == 0, unconditional, mixed))
