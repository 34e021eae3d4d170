"""What the suites of adversarial models hold them against: the best discriminator of two densities
and its loss, in closed form; and models of which all is known.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from genjax.families.gan import gan
from genjax.parts.adversarial import OBJECTIVES
from genjax.protocol import DataSpec

KEY = jax.random.key(0)
PLANE = DataSpec((2,), "continuous", name="plane")
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
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


# --- models ---------------------------------------------------------------------------------------


def random(net, seed=0, size=0.5):
    """Parameters and state (positive, as variances are) of a net or model, all random; float64
    where that is switched on.
    """
    rng = np.random.default_rng(seed)
    params, state = jax.eval_shape(net.init, KEY)
    params = jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape)), params)
    return params, jax.tree.map(
        lambda leaf: jnp.asarray(np.abs(rng.normal(size=leaf.shape)) + 0.5), state
    )


def linear(offset, slope=None, bias=0.0, kernel=0.0, **settings):
    """A GAN with G(z) = kernel z + offset and D(x) = slope·x + bias: its model, parameters and
    (empty) state.
    """
    offset = np.atleast_1d(np.asarray(offset, float))
    model = gan(DataSpec(offset.shape, "continuous"), latent_dim=len(offset), hidden=(), **settings)
    params, state = random(model)
    dtype = params["generator"]["last"]["bias"].dtype
    own = {
        "kernel": jnp.asarray(kernel * np.eye(len(offset)), dtype),
        "bias": jnp.asarray(offset, dtype),
    }
    params["generator"] = {**params["generator"], "last": own}
    if slope is not None:
        layer = {
            "kernel": jnp.asarray(np.reshape(slope, (-1, 1)), dtype),
            "bias": jnp.full((1,), bias, dtype),
        }
        layer = {
            leaf: layer[leaf] for leaf in params["discriminator"]["logit"]["layer"]
        }  # no bias where it has no effect
        params["discriminator"] = {**params["discriminator"], "logit": {"layer": layer}}
    return model, params, state


def normal(*shape, seed=1, scale=1.0, loc=0.0):
    return np.random.default_rng(seed).normal(loc, scale, shape)


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def standardised(x, norm):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * np.asarray(
        norm["scale"]
    ) + np.asarray(norm["shift"])
