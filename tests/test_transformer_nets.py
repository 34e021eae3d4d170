"""The layers of the Transformer against their formulas: attention, rotary positions, normalisation,
shared keys and values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from gates import quick

from genjax.families.transformer import transformer
from genjax.nets.attention import (
    ACTIVATIONS,
    Attention,
    FeedForward,
    attend,
    causal,
    dense_attention,
    fused_attention,
    rotary,
)
from genjax.nets.functional import functional
from genjax.nets.layers import EPSILON, Dense, Norm, unit_rms
from genjax.protocol import Batch, DataSpec


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def by_hand(q, k, v, allowed):
    """Attention one query at a time, [B, G, R, T, h]."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, g, r, t in np.ndindex(*q.shape[:4]):
        seen = np.flatnonzero(allowed[t])
        weights = np.exp(k[b, g, seen] @ q[b, g, r, t] / np.sqrt(q.shape[-1]))
        out[b, g, r, t] = weights @ v[b, g, seen] / weights.sum()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("g", "r"), [(2, 1), (2, 3)])
def test_attention_is_the_formula(x64, window, g, r):
    q, k, v = normal(0, 2, g, r, 5, 4), normal(1, 2, g, 5, 4), normal(2, 2, g, 5, 4)
    allowed = np.asarray(
        [[j <= i and (window is None or i - j < window) for j in range(5)] for i in range(5)]
    )
    np.testing.assert_array_equal(causal(5, window), allowed)
    wanted = by_hand(q, k, v, allowed)
    np.testing.assert_allclose(
        quick(dense_attention, static_argnums=3)(q, k, v, window), wanted, atol=1e-14
    )
    narrow = (
        x.astype(jnp.float32) for x in (q, k, v)
    )  # that of jax computes its softmax in float32
    np.testing.assert_allclose(
        quick(fused_attention, static_argnums=3)(*narrow, window), wanted, atol=1e-5
    )
    one = quick(attend)(q[..., 3:4, :], k, v, jnp.asarray(allowed[3:4]))
    np.testing.assert_allclose(one, wanted[..., 3:4, :], atol=1e-14)


@pytest.mark.slow
def test_probabilities_that_are_left_out_are_those_of_the_softmax():
    """Each is 0 or p / (1 - rate), and gone from the sum of the values only."""
    q, k = (x.astype(jnp.float32) for x in (normal(0, 2, 1, 2, 4, 4), normal(1, 2, 1, 4, 4)))
    v = jnp.broadcast_to(jnp.eye(4), (2, 1, 4, 4))
    allowed, rate = causal(4, None), 0.4
    p = np.asarray(attend(q, k, v, allowed))  # by values that are unit vectors
    found = np.asarray(attend(q, k, v, allowed, jax.random.key(0), rate))
    kept = found != 0
    np.testing.assert_allclose(found[kept], (p / (1 - rate))[kept], rtol=1e-5)
    seen = np.broadcast_to(allowed, p.shape)
    assert 0.4 < kept[seen].mean() < 0.8
    assert not kept[~seen].any()
    other = attend(q, k, v, allowed, jax.random.key(1), rate)
    assert (np.asarray(other != 0) != kept).any()


def test_both_forms_of_attention_have_the_same_gradient():
    shapes = ((2, 2, 2, 6, 4), (2, 2, 6, 4), (2, 2, 6, 4), (2, 2, 2, 6, 4))
    q, k, v, weight = (
        normal(seed, *shape).astype(jnp.float32) for seed, shape in enumerate(shapes)
    )
    grads = [
        quick(jax.grad(lambda q, k, v, f=f: (f(q, k, v, 4) * weight).sum(), (0, 1, 2)))(q, k, v)
        for f in (dense_attention, fused_attention)
    ]
    for dense, fused in zip(*grads, strict=True):
        np.testing.assert_allclose(dense, fused, atol=2e-6)


@pytest.mark.slow
def test_scores_that_would_overflow_do_not():
    q = jnp.full((1, 1, 1, 2, 4), 1e3)
    k, v = (
        jnp.stack([q[0, 0, 0, 0], -q[0, 0, 0, 0]])[None, None],
        normal(0, 1, 1, 2, 4).astype(jnp.float32),
    )
    np.testing.assert_array_equal(
        dense_attention(q, k, v), jnp.broadcast_to(v[:, :, None, :1], q.shape)
    )


@pytest.mark.slow
def test_rotary_scores_depend_on_the_difference_of_positions_only(x64):
    q, k = normal(0, 1, 1, 8), normal(1, 1, 1, 8)

    def score(m, n):
        return float((rotary(q, jnp.asarray([m])) * rotary(k, jnp.asarray([n]))).sum())

    for difference in (0, 1, 7):
        values = [score(n + difference, n) for n in (0, 1, 50, 1000)]
        np.testing.assert_allclose(values, values[0], atol=1e-11)
    assert len({round(score(m, 0), 6) for m in range(6)}) == 6
    x = normal(2, 3, 5, 8)
    turned = rotary(x, jnp.arange(5))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), atol=1e-14
    )
    # The slowest pair of eight dimensions turns by 10000^(-3/4) a step, the fastest by 1.
    unit = rotary(jnp.eye(8)[:, None], jnp.asarray([1]))[:, 0]
    np.testing.assert_allclose(
        jnp.diag(unit)[:4], np.cos(10000.0 ** (-np.arange(4) / 4)), atol=1e-15
    )


def test_angles_of_known_positions_are_known_and_those_of_others_the_same():
    """A step of a whole sequence holds no sine: XLA would compute it for every head anew."""
    x = jnp.asarray(normal(2, 3, 5, 8), jnp.float32)
    known, places = range(1000, 1005), jnp.arange(1000, 1005)
    np.testing.assert_allclose(rotary(x, known), jax.jit(rotary)(x, places), atol=1e-6)
    swept = jax.jit(lambda base: rotary(x, known, base))(jnp.asarray(500.0))
    np.testing.assert_allclose(rotary(x, known, 500.0), swept, atol=2e-4)
    assert (rotary(x, known, np.array(500.0)) == rotary(x, known, 500)).all()
    layer = Attention(12, 2, 1, "layer", True, None, True, 0.3, rngs=nnx.Rngs(0))
    assert " sin " not in str(jax.make_jaxpr(layer)(jnp.ones((2, 5, 12))))
    of_one = jax.make_jaxpr(lambda place: layer.heads(jnp.ones((2, 1, 12)), place[None]))
    assert " sin " in str(of_one(jnp.asarray(3)))


def attention(heads, groups, window=None, turned=False, d=12):
    net = functional(
        lambda *, rngs: Attention(d, heads, groups, "layer", True, window, turned, 0.3, rngs=rngs)
    )
    return net._replace(init=quick(net.init), apply=quick(net.apply))


def grown(params):
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(
        tree,
        [leaf + 0.5 * normal(i, *leaf.shape).astype(leaf.dtype) for i, leaf in enumerate(leaves)],
    )


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_grouped_queries_are_multi_head_attention_with_repeated_keys_and_values(turned):
    """Each of 2 groups shared by 2 of 4 heads: copy the rows of W_qkv that make its keys and
    values.
    """
    d, h = 16, 4
    grouped, full = (attention(4, groups, turned=turned, d=d) for groups in (2, 4))
    params = grown(grouped.init(jax.random.key(0))[0])

    def spread(w):
        q, k, v = w[..., :d], w[..., d : d + 2 * h], w[..., d + 2 * h :]

        def twice(y):
            each = jnp.repeat(y.reshape(*y.shape[:-1], 2, h), 2, axis=-2)
            return each.reshape(*y.shape[:-1], 4 * h)

        return jnp.concatenate([q, twice(k), twice(v)], axis=-1)

    copied = {**params, "qkv": jax.tree.map(spread, params["qkv"])}
    x = normal(9, 2, 5, d).astype(jnp.float32)
    np.testing.assert_allclose(
        grouped.apply(params, {}, x)[0], full.apply(copied, {}, x)[0], atol=1e-5
    )


@pytest.mark.slow
def test_a_window_as_long_as_the_sequence_is_none():
    params = grown(attention(2, 2).init(jax.random.key(0))[0])
    x = normal(9, 2, 5, 12).astype(jnp.float32)
    whole, wide, narrow = (
        attention(2, 2, window).apply(params, {}, x)[0] for window in (None, 5, 4)
    )
    np.testing.assert_array_equal(whole, wide)
    np.testing.assert_array_equal(whole[:, :4], narrow[:, :4])
    assert (np.asarray(whole[:, 4]) != np.asarray(narrow[:, 4])).any()


@pytest.mark.slow
def test_without_positions_attention_does_not_know_the_order_of_the_past():
    """The last step sees the same whatever the order of those before it; with rotary positions it
    does not.
    """
    x = normal(9, 2, 5, 12).astype(jnp.float32)
    mixed = x[:, jnp.asarray([2, 0, 3, 1, 4])]
    for turned, same in ((False, True), (True, False)):
        net = attention(2, 2, turned=turned)
        params = grown(net.init(jax.random.key(0))[0])
        one, other = net.apply(params, {}, x)[0][:, -1], net.apply(params, {}, mixed)[0][:, -1]
        assert np.allclose(one, other, atol=1e-5) is same


def test_the_derivative_of_normalisation_is_that_of_the_formula(x64):
    x, w, dx = normal(0, 3, 7), normal(1, 3, 7), normal(2, 3, 7)

    def plain(x):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON)

    @functools.partial(quick, static_argnums=0)
    def everything(f, x):
        def loss(x):
            return jnp.sum(jnp.sin(f(x)) * w)

        gradient, twice = jax.jvp(jax.grad(loss), (x,), (dx,))
        return f(x), gradient, jax.jvp(loss, (x,), (dx,))[1], twice

    for mine, wanted in zip(everything(unit_rms, x), everything(plain, x), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-12)
    assert np.isfinite(everything(unit_rms, jnp.zeros((3, 7)))[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bias", "epsilon"),
    [("layer", True, EPSILON), ("layer", False, 0.3), ("rms", True, 0.3)],
)
def test_norms_are_those_of_flax(kind, bias, epsilon):
    flax = (
        nnx.LayerNorm(6, epsilon=epsilon, use_bias=bias, rngs=nnx.Rngs(0))
        if kind == "layer"
        else None
    )
    flax = flax or nnx.RMSNorm(6, epsilon=epsilon, rngs=nnx.Rngs(0))
    net = functional(lambda *, rngs: Norm(6, kind, bias, epsilon, rngs=rngs))
    params = grown(net.init(jax.random.key(0))[0])
    assert set(params) == ({"scale", "shift"} if kind == "layer" and bias else {"scale"})
    flax.scale[...] = params["scale"]
    if "shift" in params:
        flax.bias[...] = params["shift"]
    x = normal(0, 4, 3, 6).astype(jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        wanted = flax(x)
    np.testing.assert_allclose(net.apply(params, {}, x)[0], wanted, atol=1e-5)


@pytest.mark.slow
def test_a_dense_layer_keeps_its_longer_axis_last():
    for d_in, d_out in ((3, 5), (5, 3)):
        net = functional(lambda *, rngs, a=d_in, b=d_out: Dense(a, b, True, rngs=rngs))
        params = grown(net.init(jax.random.key(0))[0])
        kernel = params["kernel"]
        assert kernel.shape == (3, 5)
        x = normal(0, 4, d_in).astype(jnp.float32)
        wanted = x @ (kernel.T if d_in > d_out else kernel) + params["bias"][None]
        np.testing.assert_allclose(net.apply(params, {}, x)[0], wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["gelu", "gelu_exact"])
def test_gelu_is_by_tanh_or_by_the_error_function(x64, name):
    x = np.linspace(-4, 4, 33)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    exact = 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))
    wanted = {"gelu": 0.5 * x * (1 + np.tanh(inner)), "gelu_exact": exact}
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), wanted[name], atol=1e-14)
    assert np.abs(wanted["gelu"] - exact).max() > 1e-4


def test_swiglu_is_its_formula():
    net = functional(lambda *, rngs: FeedForward(4, 6, "swiglu", "rms", False, 0.3, rngs=rngs))
    params = grown(net.init(jax.random.key(0))[0])
    x = normal(0, 2, 3, 4).astype(jnp.float32)
    y = (
        np.asarray(x)
        / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + EPSILON)
        * np.asarray(params["norm"]["scale"])
    )
    up, down = (np.asarray(params[name]["kernel"]) for name in ("up", "down"))
    a, b = np.split(y @ up, 2, -1)
    np.testing.assert_allclose(
        net.apply(params, {}, x)[0], (a / (1 + np.exp(-a)) * b) @ down.T, rtol=2e-4, atol=1e-5
    )


def test_learned_positions_take_the_beginning_of_a_sequence():
    """As padded batches of shorter sequences are cut."""
    spec = DataSpec((6,), "tokens", levels=5, step="token", lengths=True)
    model = transformer(spec, d_model=8, n_layers=1, n_heads=2, position="learned")
    params, state = model.init(jax.random.key(0))
    x, length = jax.random.randint(jax.random.key(1), (3, 6), 0, 5), jnp.array([2, 4, 1])
    whole = model.log_prob(params, state, Batch(x, length=length), jax.random.key(2))
    cut = model.log_prob(params, state, Batch(x[:, :4], length=length), jax.random.key(2))
    np.testing.assert_allclose(cut, whole, rtol=1e-5)
    with pytest.raises(ValueError, match="steps"):
        model.log_prob(params, state, Batch(jnp.tile(x, 2), length=length), jax.random.key(2))
