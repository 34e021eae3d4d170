"""Normalisations against their formulas: batch statistics, also conditional, and spectral norms."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gan_oracles import KEY, normal, random
from gates import assert_same, quick

from genjax.nets.functional import functional
from genjax.nets.norm import BatchNorm, Plain, Spectral

# --- batch normalisation --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 3), (5, 4, 2, 3)])
def test_batch_normalisation_is_its_formula(x64, shape):
    net = functional(partial(BatchNorm, 3))
    params, state = random(net)
    scale, shift = (np.asarray(params[name]) for name in ("scale", "shift"))
    x = normal(*shape, scale=[30.0, 10.0, 5.0], loc=[20.0, -10.0, 100.0])
    axes = tuple(range(x.ndim - 1))
    apply = quick(net.apply, static_argnames="train")
    y, after = apply(params, state, jnp.asarray(x), None, train=True)
    standard = (np.asarray(y) - shift) / scale
    np.testing.assert_allclose(
        standard.mean(axes), 0, atol=1e-12
    )  # and its variance is 1, by the next line
    np.testing.assert_allclose(standard * np.sqrt(x.var(axes) + 1e-5) + x.mean(axes), x, rtol=1e-9)
    np.testing.assert_allclose(
        after["mean"], 0.99 * state["mean"] + 0.01 * x.mean(axes), rtol=1e-12
    )
    np.testing.assert_allclose(after["var"], 0.99 * state["var"] + 0.01 * x.var(axes), rtol=1e-12)
    y, kept = apply(params, after, jnp.asarray(x), None, train=False)
    wanted = (
        scale * (x - np.asarray(after["mean"])) / np.sqrt(np.asarray(after["var"]) + 1e-5) + shift
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-12)
    assert_same(kept, after)

    # The mean and variance are functions of x: a change that only shifts or stretches a channel has
    # no effect (but for ε).
    def power(x):
        return jnp.sum(
            jnp.asarray(normal(*shape, seed=2)) * net.apply(params, state, x, None, train=True)[0]
        )

    slope = np.asarray(quick(jax.grad(power))(jnp.asarray(x)))
    np.testing.assert_allclose(slope.sum(axes), 0, atol=1e-12)
    np.testing.assert_allclose((slope * standard).sum(axes), 0, atol=1e-5)
    assert np.all(np.abs(slope).max(axes) > 1e-3)


def test_conditional_batch_normalisation_is_linear_in_the_condition(x64):
    net, plain = functional(partial(BatchNorm, 3, 4)), functional(partial(BatchNorm, 3))
    params, state = random(net)
    x, c = jnp.asarray(normal(6, 2, 2, 3)), normal(6, 4, seed=2)
    identity = {"scale": jnp.ones(3), "shift": jnp.zeros(3)}
    standard, wanted_state = plain.apply(identity, state, x, None, train=True)
    y, after = net.apply(params, state, x, jnp.asarray(c), train=True)
    scale, shift = (c @ np.asarray(params[name]["kernel"]) for name in ("scale", "shift"))
    np.testing.assert_allclose(
        y, np.asarray(standard) * (1 + scale[:, None, None]) + shift[:, None, None], rtol=1e-10
    )
    assert_same(after, wanted_state)
    # Labels of which each has the same row: the unconditional layer, whatever the label.
    row = {name: params[name]["kernel"][:1] for name in ("scale", "shift")}
    equal = {name: {"kernel": jnp.tile(value, (4, 1))} for name, value in row.items()}
    labels = jax.nn.one_hot(np.array([0, 3, 1, 1, 2, 0]), 4)
    own = {"scale": 1 + row["scale"][0], "shift": row["shift"][0]}
    for train in (True, False):
        found, wanted = (
            net.apply(equal, state, x, labels, train=train),
            plain.apply(own, state, x, None, train=train),
        )
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-12)
    assert not any(
        np.any(leaf) for leaf in jax.tree.leaves(net.init(KEY)[0])
    )  # all rows are 0 at first


# --- spectral normalisation -----------------------------------------------------------------------

LAYERS = {
    "dense": (lambda *, rngs: nnx.Linear(5, 4, rngs=rngs), (7, 5)),
    "wide": (lambda *, rngs: nnx.Linear(3, 6, rngs=rngs), (7, 3)),
    "conv": (lambda *, rngs: nnx.Conv(2, 4, (3, 3), rngs=rngs), (2, 5, 5, 2)),
}


@cache
def spectral(name):
    """A layer after 300 power iterations, with random weights: its net and the plain one,
    parameters, states and inputs.
    """
    make, shape = LAYERS[name]
    net, plain = (
        functional(lambda *, rngs, wrap=wrap: wrap(make(rngs=rngs), rngs=rngs))
        for wrap in (Spectral, Plain)
    )
    (params, first), x = random(net, size=2.0), jnp.asarray(normal(*shape))

    def more(state, _):
        return (net.apply(params, state, x, train=True)[1], None)

    return (
        net,
        plain,
        params,
        first,
        quick(lambda state: jax.lax.scan(more, state, length=300)[0])(first),
        x,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_spectral_normalisation_divides_by_the_largest_singular_value(x64, name):
    net, plain, params, first, state, x = spectral(name)
    layer = params["layer"]
    w = np.asarray(layer["kernel"]).reshape(-1, layer["kernel"].shape[-1])
    exact = np.linalg.svd(w, compute_uv=False)[0]
    wanted = plain.apply(
        {"layer": {**layer, "kernel": layer["kernel"] / exact}}, {}, x, train=False
    )[0]
    for train in (True, False):
        np.testing.assert_allclose(
            net.apply(params, state, x, train=train)[0], wanted, rtol=1e-4, atol=1e-10
        )
    # From the start by the formula, which takes one power iteration in training only, and leaves
    # the bias alone.
    offset = plain.apply({"layer": {**layer, "kernel": 0 * layer["kernel"]}}, {}, x, train=False)[0]
    full = plain.apply(params, {}, x, train=False)[0]

    def unit(v):
        return v / np.linalg.norm(v)

    v, u = unit(w @ first["u"]), unit(first["u"])
    for train in (False, True):
        u = unit(w.T @ v) if train else u
        y, after = net.apply(params, first, x, train=train)
        np.testing.assert_allclose((y - offset) * (v @ w @ u), full - offset, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(after["u"], u if train else first["u"], rtol=1e-9)
        assert v @ w @ u < exact


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_the_gradient_goes_through_the_singular_value(x64, name):
    net, plain, params, _, state, x = spectral(name)
    weights = jnp.asarray(normal(*net.apply(params, state, x, train=False)[0].shape, seed=3))

    def value(p, train):
        return jnp.sum(weights * net.apply(p, state, x, train=train)[0])

    def exact(p):
        kernel = p["layer"]["kernel"]
        size = jnp.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2)
        return jnp.sum(
            weights
            * plain.apply({"layer": {**p["layer"], "kernel": kernel / size}}, {}, x, train=False)[0]
        )

    wanted = quick(jax.grad(exact))(params)
    for train in (True, False):
        found = quick(jax.grad(partial(value, train=train)))(params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), found, wanted)
