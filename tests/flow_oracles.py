"""Gaussian data of which the velocity of the flow is known, and networks that know it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.families.flow_matching import PATHS, SOFTENING, flow_matching
from genjax.nets.functional import Net
from genjax.protocol import Batch, DataSpec

D = 3
POINTS = DataSpec((D,), "continuous", name="points")
CLASSES = DataSpec((2,), "continuous", n_classes=3, name="classes")
MEAN = np.asarray([0.5, -1.0, 0.2])
ROOT = np.asarray([[0.6, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.2, 0.1, 0.8]])
COVARIANCE = ROOT @ ROOT.T
# Of integrals over t from 0 to 1.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(80) / np.float64(2) + [[0.5], [0.0]]


def time_of(name, level):
    """t from what `noise_level` makes of it: alpha + δ = r (sigma + δ), solved for both paths."""
    r = jnp.exp(2 * level)
    if name == "conditional_ot":
        return (1 + SOFTENING - r * SOFTENING) / (1 + r)
    turn = jnp.arccos(jnp.clip(SOFTENING * (r - 1) / jnp.sqrt(1 + r * r), -1, 1)) - jnp.arctan(r)
    return turn * (2 / jnp.pi)


def closed_form(name, velocity, params=None):
    """A network that knows the velocity: velocity(params, path, x [n, d], t [n, 1])."""

    def apply(p, state, x, level, cond, dropped):
        assert level.shape == x.shape[:1]
        return velocity(p, PATHS[name](), x, time_of(name, level)[:, None]), state

    return Net(lambda key: ({} if params is None else params, {}), apply)


def gaussian_velocity(p, path, x, t, mean=MEAN, root=ROOT):
    """The velocity for data N(mean, Σ), as E[alpha' x0 + sigma' ε | x_t] of jointly normal
    vectors.
    """
    covariance = jnp.asarray(root @ root.T)
    (alpha, sigma), (da, ds) = (
        (path.alpha(t), path.sigma(t)),
        (jax.jvp(f, (t,), (jnp.ones_like(t),))[1] for f in path[:2]),
    )
    eye = jnp.eye(len(mean))[None]
    total = (alpha * alpha)[..., None] * covariance[None] + (sigma * sigma)[..., None] * eye
    cross = (da * alpha)[..., None] * covariance[None] + (ds * sigma)[..., None] * eye
    centred = x - alpha * jnp.asarray(mean)[None]
    return (
        da * jnp.asarray(mean)[None] + (cross @ jnp.linalg.solve(total, centred[..., None]))[..., 0]
    )


def gaussian(name, **settings):
    model = flow_matching(
        POINTS, probability_path=name, net=closed_form(name, gaussian_velocity), **settings
    )
    return model, *model.init(jax.random.key(0))


def normal_batch(n, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(jnp.asarray(MEAN + rng.normal(size=(n, D)) @ ROOT.T))


every_path = pytest.mark.parametrize("name", list(PATHS))


def conditional(cond_dropout=0.25, **settings):
    """A model of three classes with random parameters: model, params, state."""
    return _conditional(jax.config.jax_enable_x64, cond_dropout, **settings)


@functools.cache
def _conditional(x64, cond_dropout, **settings):
    del x64  # on which the precision of the parameters depends
    model = flow_matching(
        CLASSES, hidden=(8,), cond_dropout=cond_dropout, solver="euler", n_steps=4, **settings
    )
    params, state = model.init(jax.random.key(0))
    rng = np.random.default_rng(9)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), params
    )
    return model, params, state
