"""Random parameters and plain formulas that the suites of the denoising networks share."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from gates import quick

from genjax.nets.conditioned import DenoiserMlp
from genjax.nets.dit import DiT
from genjax.nets.functional import functional
from genjax.nets.unet import UNet

KEY = jax.random.key(0)
NETS = {
    "mlp": partial(DenoiserMlp, hidden=(12, 12, 8), d_embed=8),
    "unet": partial(UNet, channels=(4, 8)),
    "dit": partial(DiT, patch=2, d=8, n_layers=1, n_heads=2),
}


def normal(seed, *shape, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def array(seed, *shape, scale=1.0):
    return jnp.asarray(normal(seed, *shape, scale=scale))


def random(net, seed=0, size=0.5):
    """Random parameters in place of the initial ones; float64 where that is switched on."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(net.init, KEY)[0])
    return jax.tree.unflatten(
        tree, [array(seed + i, *leaf.shape, scale=size) for i, leaf in enumerate(leaves)]
    )


def silu(x):
    return x / (1 + np.exp(-x))


def linear(x, p):
    return x @ np.asarray(p["kernel"]) + (np.asarray(p["bias"]) if "bias" in p else 0)


def dense(x, p):
    """`nets.attention.Dense`, which keeps its longer axis last."""
    kernel = np.asarray(p["kernel"])
    return x @ (kernel if kernel.shape[0] == x.shape[-1] else kernel.T) + np.asarray(p["bias"])


@cache
def guided_net(name):
    """A net of 8x8 images with three classes, and its apply, compiled."""
    net = functional(partial(NETS[name], (8, 8, 1), cond_size=3, guided=True))
    return net, quick(lambda params, *args: net.apply(params, {}, *args)[0])


def inputs(n=4):
    return (
        array(100, n, 8, 8, 1),
        array(101, n),
        jax.nn.one_hot(np.arange(n) % 3, 3, dtype=array(0).dtype),
    )
