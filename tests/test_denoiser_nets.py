"""The networks that denoise, against their formulas: the embedding, adaptive norms, a perceptron, a
U-Net and a DiT.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoiser_net_oracles import (
    KEY,
    NETS,
    array,
    dense,
    guided_net,
    inputs,
    linear,
    normal,
    random,
    silu,
)
from gates import assert_close, member, quick, stack

from genjax.errors import ConfigError
from genjax.nets.conditioned import FREQUENCIES, DenoiserMlp, Embedding, SelfAttention
from genjax.nets.dit import Block, DiT, positions
from genjax.nets.functional import functional
from genjax.nets.layers import EPSILON
from genjax.nets.patches import from_patches, to_patches

# A U-Net takes seconds to compile, however small it is.
every_net = pytest.mark.parametrize(
    "name", ["mlp", pytest.param("unet", marks=pytest.mark.slow), "dit"]
)
LEVELS = (2.5, 2.507)  # ln SNR / 4
SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]


# --- what all share -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@every_net
def test_a_new_network_returns_zero_in_the_shape_of_the_event(name, shape):
    net = functional(partial(NETS[name], shape))
    args = (jnp.ones((2, *shape), jnp.float32), jnp.ones(2, jnp.float32))
    params = jax.eval_shape(net.init, KEY)[0]
    y = jax.eval_shape(lambda p, *args: net.apply(p, {}, *args)[0], params, *args)
    assert (y.shape, y.dtype) == ((2, *shape), jnp.float32)
    if shape == SHAPES[0]:
        params, state = net.init(KEY)
        assert state == {}
        np.testing.assert_array_equal(quick(net.apply)(params, {}, *args)[0], np.zeros((2, *shape)))


def test_the_embedding_is_its_formula(x64):
    net = functional(partial(Embedding, 6, 3, True))
    p, (c, cond) = random(net), (normal(50, 5, scale=2.0), normal(51, 5, 3))
    waves = np.concatenate([np.cos(c[:, None] * FREQUENCIES), np.sin(c[:, None] * FREQUENCIES)], 1)
    assert (FREQUENCIES[0], FREQUENCIES[-1]) == (0.25, 8)
    dropped = np.asarray([True, False, False, True, False])
    given = np.where(
        dropped[:, None], np.asarray(p["dropped"]), cond @ np.asarray(p["condition"]["kernel"])
    )
    wanted = silu(linear(silu(linear(waves, p["noise"]) + given), p["last"]))
    found = net.apply(p, {}, jnp.asarray(c), jnp.asarray(cond), jnp.asarray(dropped))[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    plain = functional(partial(Embedding, 6))
    assert set(jax.eval_shape(plain.init, KEY)[0]) == {"noise", "last"}
    unguided = functional(partial(Embedding, 6, 3))
    p = {key: value for key, value in p.items() if key != "dropped"}
    found = unguided.apply(p, {}, jnp.asarray(c), jnp.asarray(cond), jnp.ones(5, bool))[0]
    np.testing.assert_allclose(
        found, silu(linear(silu(linear(waves, p["noise"])), p["last"])), rtol=1e-10
    )


@every_net
@pytest.mark.slow
def test_a_dropped_condition_is_the_same_for_every_class(name):
    net, apply = guided_net(name)
    params, (x, c, cond) = random(net), inputs()
    drop = jnp.asarray([True, False, True, False])
    one, other = (apply(params, x, c, labels, drop) for labels in (cond, jnp.roll(cond, 1, axis=1)))
    np.testing.assert_array_equal(one[drop], other[drop])
    assert np.all(np.abs(np.asarray(one - other)).reshape(4, -1).max(1)[~np.asarray(drop)] > 1e-4)
    given = apply(params, x, c, cond, None)
    np.testing.assert_allclose(one[~drop], given[~drop], rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(np.asarray(one - given)).reshape(4, -1).max(1)[np.asarray(drop)] > 1e-4)
    # and it is the learned vector that stands for it
    moved = jax.tree.map(lambda leaf: leaf, params)
    moved["embed"]["dropped"] = params["embed"]["dropped"] + 1
    after = apply(moved, x, c, cond, drop)
    np.testing.assert_array_equal(after[~drop], one[~drop])
    assert np.all(np.abs(np.asarray(after - one)).reshape(4, -1).max(1)[np.asarray(drop)] > 1e-4)


@pytest.mark.slow
@every_net
def test_no_example_knows_of_another(name):
    net, apply = guided_net(name)
    params, (x, c, cond) = random(net), inputs()
    drop = jnp.asarray([True, False, True, False])
    y = apply(params, x, c, cond, drop)
    moved = apply(
        params, x.at[1:].multiply(100), c.at[1:].add(3), cond.at[1:].set(7), ~drop.at[0].set(False)
    )
    np.testing.assert_allclose(moved[0], y[0], rtol=1e-6, atol=1e-6)
    order = jnp.asarray([2, 0, 3, 1])
    mixed = apply(params, x[order], c[order], cond[order], drop[order])
    np.testing.assert_allclose(mixed, y[order], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@every_net
def test_gradients_reach_every_parameter_and_the_input_once_it_has_moved(name):
    net, _ = guided_net(name)
    params, (x, c, cond) = random(net), inputs()
    drop, weight = jnp.asarray([True, False, True, False]), array(7, 4, 8, 8, 1)

    def loss(params, x, c, cond):
        return jnp.sum(weight * net.apply(params, {}, x, c, cond, drop)[0])

    grads = quick(jax.grad(loss, argnums=(0, 1, 2, 3)))(params, x, c, cond)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-6, path
    assert (np.asarray(grads[1]) != 0).all()  # every pixel counts
    assert not np.asarray(grads[3])[np.asarray(drop)].any()
    new = quick(jax.grad(loss))(net.init(KEY)[0], x, c, cond)
    assert any(
        np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(new["last"])
    )  # and training can begin


@pytest.mark.slow
@every_net
def test_networks_under_vmap_are_networks_one_by_one(x64, name):
    net = functional(partial(NETS[name], (8, 8, 1), cond_size=3, guided=True))
    many, (x, c, cond) = [random(net, seed) for seed in (0, 50)], inputs()

    def step(params):
        return jax.value_and_grad(lambda p: jnp.sum(net.apply(p, {}, x, c, cond)[0] ** 2))(params)

    together, alone = quick(jax.vmap(step))(stack(many)), quick(step)
    for index, params in enumerate(many):
        assert_close(member(together, index), alone(params), rtol=1e-9)


@pytest.mark.slow
@every_net
def test_bfloat16_keeps_parameters_and_outputs_in_float32(name):
    build = partial(NETS[name], (8, 8, 1), cond_size=3, guided=True)
    narrow = functional(build, "bfloat16", wide=("noise_level",))
    net, apply = guided_net(name)
    params, (x, c, cond) = random(net, size=0.2), inputs()
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(narrow.init, KEY))} == {
        jnp.dtype("float32")
    }

    def loss(p):
        return jnp.sum(narrow.apply(p, {}, x, c, cond)[0] ** 2)

    y, grads = quick(lambda p: (narrow.apply(p, {}, x, c, cond)[0], jax.grad(loss)(p)))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, grads))} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    wanted = apply(params, x, c, cond, None)
    assert np.linalg.norm(y - wanted) < 0.05 * np.linalg.norm(wanted)  # eight bits
    # Levels that are one bfloat16 are two levels.
    near = [narrow.apply(params, {}, x, jnp.full_like(c, level), cond)[0] for level in LEVELS]
    assert (near[0] != near[1]).any()


# --- the perceptron -------------------------------------------------------------------------------


def test_the_perceptron_is_its_formula(x64):
    net = functional(partial(DenoiserMlp, (3, 2), (5, 5), 2, False, 4))
    p, x, c, cond = random(net), normal(60, 4, 3, 2), normal(61, 4), normal(62, 4, 2)
    e = np.asarray(
        functional(partial(Embedding, 4, 2)).apply(
            p["embed"], {}, jnp.asarray(c), jnp.asarray(cond)
        )[0]
    )
    h = x.reshape(4, 6)
    for index in (0, 1):
        scale, shift = np.split(linear(e, p["modulations"][index]), 2, -1)
        y = silu((1 + scale) * linear(h, p["layers"][index]) + shift)
        h = h + y if index else y  # from 6 to 5, then from 5 to 5
    found = net.apply(p, {}, jnp.asarray(x), jnp.asarray(c), jnp.asarray(cond))[0]
    np.testing.assert_allclose(found, linear(h, p["last"]).reshape(4, 3, 2), rtol=1e-10)


@pytest.mark.parametrize("hidden", [(), (0,), (8, -1)])
def test_a_perceptron_without_a_layer_is_refused(hidden):
    with pytest.raises(ConfigError, match="at least one hidden layer"):
        functional(partial(DenoiserMlp, (2,), hidden))


# --- patches, attention and the DiT ---------------------------------------------------------------


def test_patches_are_a_bijection_and_hold_neighbours():
    x = np.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
    for size in (1, 2):
        patches = to_patches(jnp.asarray(x), size)
        assert patches.shape == (2, 6 // size, 4 // size, 3 * size**2)
        np.testing.assert_array_equal(from_patches(patches, size), x)
        np.testing.assert_array_equal(to_patches(from_patches(patches, size), size), patches)
    for n, row, column in ((0, 0, 0), (1, 2, 1), (0, 1, 0)):
        wanted = x[n, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1)
        np.testing.assert_array_equal(patches[n, row, column], wanted)


def test_attention_to_all_positions_is_its_formula_and_blind_to_their_order(x64):
    net = functional(partial(SelfAttention, 6, 2))
    p, x = random(net), normal(0, 3, 5, 6)
    q, k, v = np.split(dense(x, p["qkv"]), 3, -1)
    heads = []
    for h in (slice(0, 3), slice(3, 6)):
        weights = np.exp(q[..., h] @ k[..., h].swapaxes(1, 2) / np.sqrt(3))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., h])
    apply = quick(lambda x: net.apply(p, {}, x)[0])
    found = apply(jnp.asarray(x))
    np.testing.assert_allclose(found, dense(np.concatenate(heads, -1), p["out"]), rtol=1e-9)
    order = np.asarray([3, 1, 4, 0, 2])
    np.testing.assert_allclose(apply(jnp.asarray(x[:, order])), found[:, order], rtol=1e-9)


def test_positions_tell_patches_apart_and_their_products_depend_on_the_distance_only():
    rows, columns, d = 4, 5, 16
    p = np.asarray(positions(rows, columns, d), np.float64).reshape(rows, columns, d)
    products = np.einsum("abd,efd->abef", p, p)
    frequency = 100.0 ** (-np.arange(4) / 4)
    for a, b, e, f in np.ndindex(products.shape):
        wanted = np.cos((a - e) * frequency).sum() + np.cos((b - f) * frequency).sum()
        np.testing.assert_allclose(products[a, b, e, f], wanted, atol=1e-5)
    assert np.unique(p.reshape(-1, d).round(4), axis=0).shape[0] == rows * columns


@pytest.mark.slow
def test_a_block_of_the_dit_is_its_formula(x64):
    net = functional(partial(Block, 8, 2, 12))
    p, h, e = random(net), normal(0, 2, 3, 8), normal(1, 2, 8)
    scale_1, shift_1, scale_2, shift_2, gate_1, gate_2 = np.split(
        linear(e, p["parameters"])[:, None], 6, -1
    )
    attention = functional(partial(SelfAttention, 8, 2))

    def norm(h):
        return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + EPSILON)

    attend = quick(lambda h: attention.apply(p["attention"], {}, h)[0])
    wanted = h + gate_1 * np.asarray(attend(jnp.asarray((1 + scale_1) * norm(h) + shift_1)))
    y = dense((1 + scale_2) * norm(wanted) + shift_2, p["up"])
    wanted = wanted + gate_2 * dense(np.asarray(jax.nn.gelu(jnp.asarray(y))), p["down"])
    apply = quick(lambda p: net.apply(p, {}, jnp.asarray(h), jnp.asarray(e))[0])
    np.testing.assert_allclose(apply(p), wanted, rtol=1e-9)
    new = {**p, "parameters": jax.tree.map(jnp.zeros_like, p["parameters"])}
    np.testing.assert_array_equal(apply(new), h)  # at first the identity


@pytest.mark.slow
def test_a_dit_knows_where_its_patches_are():
    """Patches in another order come out in that order only if the network does not know of
    positions.
    """
    net, apply = guided_net("dit")
    params, (x, c, cond) = random(net), inputs()

    def swap(y):
        return jnp.roll(y, 2, axis=1)

    y, moved = apply(params, x, c, cond, None), apply(params, swap(x), c, cond, None)
    assert np.abs(swap(y) - moved).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, r"patch must divide both sides.*patch=3 for 8 x 8"),
        ({"patch": 0}, "patch=0"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"d": 10}, "multiple of 4 and of n_heads; got 10"),
        ({"d": 8, "n_heads": 3}, "got 8 and 3 heads"),
        ({"shape": (64,)}, "height, width, channels"),
    ],
)
def test_a_dit_that_does_not_fit_is_refused(options, message):
    fits = {"shape": (8, 8, 1), "patch": 2, "d": 8, "n_layers": 1, "n_heads": 2}
    with pytest.raises(ConfigError, match=message):
        functional(partial(DiT, **{**fits, **options}))
