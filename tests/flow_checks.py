"""What the suites of the normalizing flows share: parameters in float64, and Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from known_losses import KEY
from vae_oracles import f64, jit

B = 4


def moved(tree, size=0.1, seed=0):
    """A tree in float64, every entry moved from where it begins, so that nothing is 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) + size * rng.normal(size=leaf.shape)), f64(tree)
    )


def events(shape, seed=0, size=2.0):
    return jnp.asarray(size * np.random.default_rng(seed).normal(size=(B, *shape)))


def log_det_of(forward, x):
    """ln |det| of the Jacobian of each example's map, [B]; `forward` maps [B, *event]."""

    def one(x):
        jacobian = jax.jacfwd(lambda x: forward(x[None])[0].reshape(-1))(x)
        return jnp.linalg.slogdet(jacobian.reshape(x.size, x.size))[1]

    return jit(jax.vmap(one))(x)


def assert_bijection(forward, inverse, x):
    """ln |det| is that of the Jacobian, and the inverse undoes the map, in float64."""
    z, log_det = jit(forward)(x)
    back, log_det_back = jit(inverse)(z)
    assert z.dtype == np.float64
    assert log_det.shape == (len(x),)
    each = log_det_of(lambda x: forward(x)[0], x)
    np.testing.assert_allclose(log_det, each, rtol=0, atol=1e-8)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-8)
    np.testing.assert_allclose(log_det_back, -log_det, rtol=0, atol=1e-8)
    return z, log_det


def normal_loss(row):
    """A new flow moves nothing: what an example costs is the density of N(0, I) where it is, on the
    normalised scale, with the noise that the loss draws.
    """

    def nats(batch):
        noise = row.model.noise["flow"](KEY, batch).dequantization
        added = 0.0 if noise is None else np.asarray(noise, np.float64)
        if row.recipe.model.get("dequantization") == "variational":
            added = scipy.stats.norm.cdf(added) - 0.5
        y = row.spec.normalize(np.asarray(batch.x, np.float64) + added).reshape(len(batch.x), -1)
        return -scipy.stats.norm.logpdf(y).sum(1) - row.spec.log_volume

    return row.params, {"flow": nats}
