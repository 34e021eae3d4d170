"""What the best discriminator of two densities is, and its loss, for every objective in closed
form; and a pair of normals.
"""

import math

import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from genjax.families.gan import OBJECTIVES

DATA, MODEL = scipy.stats.norm(0.5, 1.2), scipy.stats.norm(-0.7, 0.8)
# The coefficients of 1, x, x² in ln p/q.
RATIO = np.array(
    [
        math.log(0.8 / 1.2) - 0.5**2 / (2 * 1.2**2) + 0.7**2 / (2 * 0.8**2),
        0.5 / 1.2**2 + 0.7 / 0.8**2,
        1 / (2 * 0.8**2) - 1 / (2 * 1.2**2),
    ]
)


def expected(name, logits, p, q):
    """The discriminator's expected loss for logits on a grid with masses p and q: over all pairs,
    as the loss is of pairs.
    """
    loss = OBJECTIVES[name].discriminator(logits[:, None], logits[None, :])
    return jnp.sum(jnp.asarray(p)[:, None] * jnp.asarray(q)[None, :] * loss)


def divergence(p, q):
    """Jensen and Shannon's: ½ KL(p, m) + ½ KL(q, m) with m = (p + q) / 2."""
    m = (p + q) / 2
    return 0.5 * np.sum(scipy.special.rel_entr(p, m) + scipy.special.rel_entr(q, m))


def optimum(name, p, q):
    """The best logits for masses p and q, and the value there."""
    if name in ("minimax", "nonsaturating"):
        return np.log(p / q), 2 * math.log(2) - 2 * divergence(p, q)
    if name == "least_squares":
        return p / (p + q), 0.5 * np.sum(p * q / (p + q))
    if name == "hinge":
        return np.sign(p - q), 2 - np.sum(np.abs(p - q))
    # Only differences matter. That of a pair is ln p(x) q(y) / (q(x) p(y)), so D is ln p/q up to a
    # constant, and the value is half of what the cross entropy has for telling (x, y) ~ p q from
    # (x, y) ~ q p.
    assert name == "relativistic"
    return np.log(p / q), math.log(2) - divergence(np.outer(p, q), np.outer(q, p))
