"""The networks that denoise, against their formulas: the embedding, adaptive norms, a perceptron, a
U-Net and a DiT.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gates import assert_close, member, quick, stack

from genjax.errors import ConfigError
from genjax.nets.conditioned import (
    FREQUENCIES,
    DenoiserMlp,
    Embedding,
    SelfAttention,
    from_patches,
    modulate,
    to_patches,
)
from genjax.nets.dit import Block, DiT, positions
from genjax.nets.fast_conv import Conv
from genjax.nets.functional import functional
from genjax.nets.layers import EPSILON
from genjax.nets.unet import AdaptiveGroupNorm, ResidualBlock, UNet, group_norm, n_groups

KEY = jax.random.key(0)
NETS = {
    "mlp": partial(DenoiserMlp, hidden=(12, 12, 8), d_embed=8),
    "unet": partial(UNet, channels=(4, 8)),
    "dit": partial(DiT, patch=2, d=8, n_layers=1, n_heads=2),
}
# A U-Net takes seconds to compile, however small it is.
every_net = pytest.mark.parametrize(
    "name", ["mlp", pytest.param("unet", marks=pytest.mark.slow), "dit"]
)
SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]


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
    step = lambda params: jax.value_and_grad(
        lambda p: jnp.sum(net.apply(p, {}, x, c, cond)[0] ** 2)
    )(params)  # noqa: E731
    together, alone = quick(jax.vmap(step))(stack(many)), quick(step)
    for index, params in enumerate(many):
        assert_close(member(together, index), alone(params), rtol=1e-9)


@pytest.mark.slow
@every_net
def test_bfloat16_keeps_parameters_and_outputs_in_float32(name):
    narrow = functional(partial(NETS[name], (8, 8, 1), cond_size=3, guided=True), "bfloat16")
    net, apply = guided_net(name)
    params, (x, c, cond) = random(net, size=0.2), inputs()
    c = jnp.round(4 * c) / 4  # a noise level that bfloat16 has
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(narrow.init, KEY))} == {
        jnp.dtype("float32")
    }
    loss = lambda p: jnp.sum(narrow.apply(p, {}, x, c, cond)[0] ** 2)  # noqa: E731
    y, grads = quick(lambda p: (narrow.apply(p, {}, x, c, cond)[0], jax.grad(loss)(p)))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, grads))} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    wanted = apply(params, x, c, cond, None)
    assert np.linalg.norm(y - wanted) < 0.05 * np.linalg.norm(wanted)  # eight bits


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


# --- the U-Net ------------------------------------------------------------------------------------


def standard(x, groups):
    """Group normalisation one example and group at a time."""
    y, size = np.array(x), x.shape[-1] // groups
    for image in y:
        for start in range(0, x.shape[-1], size):
            part = image[..., start : start + size]
            image[..., start : start + size] = (part - part.mean()) / np.sqrt(part.var() + EPSILON)
    return y


@pytest.mark.slow
def test_group_normalisation_is_its_formula(x64):
    x = 100 + 3 * normal(0, 4, 5, 3, 12) * np.arange(1, 13)
    normalised = quick(group_norm, static_argnums=1)
    for groups in (1, 3, 12):
        scale, shift = normal(1, 4, 12), normal(2, 4, 12)
        found = normalised(jnp.asarray(x), groups, jnp.asarray(scale), jnp.asarray(shift))
        wanted = standard(x, groups) * scale[:, None, None] + shift[:, None, None]
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    with jax.numpy_rank_promotion("allow"):
        flax = nnx.GroupNorm(
            12, num_groups=3, epsilon=EPSILON, use_fast_variance=False, rngs=nnx.Rngs(0)
        )
        wanted = flax(jnp.asarray(x, jnp.float32))
    found = normalised(
        jnp.asarray(x, jnp.float32),
        3,
        jnp.ones((4, 12), jnp.float32),
        jnp.zeros((4, 12), jnp.float32),
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert [n_groups(d) for d in (1, 3, 4, 7, 8, 24, 48, 128, 256)] == [
        1,
        1,
        1,
        1,
        2,
        6,
        12,
        32,
        32,
    ]
    assert np.isfinite(
        group_norm(jnp.zeros((1, 2, 2, 4)), 1, jnp.ones((1, 4)), jnp.zeros((1, 4)))
    ).all()


def test_group_normalisation_scaled_by_the_embedding_is_its_formula(x64):
    net = functional(partial(AdaptiveGroupNorm, 8, 3))
    p, x, e = random(net), normal(0, 4, 3, 2, 8), normal(1, 4, 3)
    scale, shift = np.split(linear(e, p["parameters"])[:, None, None], 2, -1)
    found = net.apply(p, {}, jnp.asarray(x), jnp.asarray(e))[0]
    np.testing.assert_allclose(found, (1 + scale) * standard(x, 2) + shift, rtol=1e-9)
    np.testing.assert_allclose(
        modulate(jnp.asarray(x), jnp.asarray(linear(e, p["parameters"]))), (1 + scale) * x + shift
    )
    at_first = net.apply(jax.tree.map(jnp.zeros_like, p), {}, jnp.asarray(x), jnp.asarray(e))[0]
    np.testing.assert_allclose(at_first, standard(x, 2), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("d_out", [8, 4])
def test_a_residual_block_is_its_formula(x64, d_out):
    net = functional(partial(ResidualBlock, 8, d_out, 3))
    p, x, e = random(net), normal(0, 2, 4, 4, 8), normal(1, 2, 3)

    def conv(x, p):
        names = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            jnp.asarray(x), p["kernel"], (1, 1), "SAME", dimension_numbers=names
        )
        return np.asarray(y) + np.asarray(p["bias"])

    def norm(x, p, groups):
        scale, shift = np.split(linear(e, p["parameters"])[:, None, None], 2, -1)
        return (1 + scale) * standard(x, groups) + shift

    h = conv(silu(norm(x, p["norms"][0], 2)), p["one"])
    h = conv(silu(norm(h, p["norms"][1], n_groups(d_out))), p["two"])
    wanted = h + (x if d_out == 8 else conv(x, p["short"]))
    assert ("short" in p) == (d_out != 8)
    np.testing.assert_allclose(
        net.apply(p, {}, jnp.asarray(x), jnp.asarray(e))[0], wanted, rtol=1e-8, atol=1e-8
    )


@pytest.mark.slow
def test_the_sizes_that_a_unet_takes_are_those_that_it_names():
    build = lambda shape, n, patch=1: functional(partial(UNet, shape, (4,) * n, patch=patch))  # noqa: E731
    for shape, patch, most in (
        ((28, 28, 1), 1, 3),
        ((32, 16, 3), 1, 5),
        ((8, 8, 1), 2, 3),
        ((28, 28, 1), 2, 2),
        ((7, 8, 1), 1, 1),
    ):
        net = build(shape, most, patch)
        params = jax.eval_shape(net.init, KEY)[0]
        y = jax.eval_shape(
            lambda p, net=net, shape=shape: net.apply(p, {}, jnp.ones((2, *shape)), jnp.ones(2))[0],
            params,
        )
        assert y.shape == (2, *shape)
        with pytest.raises(
            ConfigError, match=rf"multiples of {patch * 2**most}; got .*at most {most} entries"
        ):
            build(shape, most + 1, patch)
    with pytest.raises(ConfigError, match="Give another patch"):
        build((28, 28, 1), 1, 3)
    for options, message in (
        ({"shape": (64,)}, "height, width, channels"),
        ({"channels": ()}, "one width >= 1"),
        ({"channels": (4, 0)}, "one width >= 1"),
        ({"n_blocks": 0}, "n_blocks=0"),
        ({"patch": 0}, "patch=0"),
        ({"n_heads": 3}, "n_heads must divide the last of channels, 8"),
        ({"n_heads": -1}, "n_heads"),
    ):
        with pytest.raises(ConfigError, match=message):
            functional(partial(UNet, **{"shape": (8, 8, 1), "channels": (4, 8), **options}))


@pytest.mark.slow
def test_a_unet_is_its_parts_put_together(x64):
    """Two resolutions of patches: down, attention, up, and the sum with what was there on the way
    down.
    """
    shape, d = (8, 8, 1), 16
    net = functional(partial(UNet, shape, (4, 8), patch=2, n_blocks=2, n_heads=2))
    p, x, c = random(net), array(0, 2, *shape), array(1, 2)

    def part(build, p, *args):
        return functional(build).apply(p, {}, *args)[0]

    @quick
    def by_hand(p, x, c):
        e = part(partial(Embedding, d), p["embed"], c)
        block = lambda p, h: part(
            partial(ResidualBlock, h.shape[-1], p["two"]["kernel"].shape[-1], d), p, h, e
        )  # noqa: E731
        norm = lambda p, h: part(partial(AdaptiveGroupNorm, h.shape[-1], d), p, h, e)  # noqa: E731
        fine = part(partial(Conv, 4, 4, (3, 3)), p["first"], to_patches(x, 2))
        for index in (0, 1):
            fine = block(p["down"][0][index], fine)
        h = (fine[:, ::2, ::2] + fine[:, 1::2, ::2] + fine[:, ::2, 1::2] + fine[:, 1::2, 1::2]) / 4
        for index in (0, 1):
            h = block(p["down"][1][index], h)
        h = h + part(
            partial(SelfAttention, 8, 2), p["attention"], norm(p["norm"], h).reshape(2, 4, 8)
        ).reshape(h.shape)
        for index in (0, 1):
            h = block(p["up"][1][index], h)
        h = fine + jnp.repeat(
            jnp.repeat(part(partial(Conv, 8, 4, (1, 1)), p["narrow"][0], h), 2, axis=1), 2, axis=2
        )
        for index in (0, 1):
            h = block(p["up"][0][index], h)
        return from_patches(
            part(partial(Conv, 4, 4, (3, 3)), p["last"], jax.nn.silu(norm(p["last_norm"], h))), 2
        )

    found = quick(lambda p, x, c: net.apply(p, {}, x, c)[0])(p, x, c)
    np.testing.assert_allclose(found, by_hand(p, x, c), rtol=1e-8, atol=1e-10)
    assert set(p) == {
        "embed",
        "first",
        "down",
        "norm",
        "attention",
        "narrow",
        "up",
        "last_norm",
        "last",
    }
    plain = jax.eval_shape(functional(partial(UNet, shape, (4,), n_heads=0)).init, KEY)[0]
    assert {"norm", "attention"}.isdisjoint(plain)


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
    norm = lambda h: (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + EPSILON)  # noqa: E731
    attend = quick(lambda h: attention.apply(p["attention"], {}, h)[0])
    wanted = h + gate_1 * np.asarray(attend(jnp.asarray((1 + scale_1) * norm(h) + shift_1)))
    y = dense((1 + scale_2) * norm(wanted) + shift_2, p["up"])
    wanted = wanted + gate_2 * dense(np.asarray(jax.nn.gelu(jnp.asarray(y))), p["down"])
    apply = quick(lambda p: net.apply(p, {}, jnp.asarray(h), jnp.asarray(e))[0])
    np.testing.assert_allclose(apply(p), wanted, rtol=1e-9)
    new = {**p, "parameters": jax.tree.map(jnp.zeros_like, p["parameters"])}
    np.testing.assert_array_equal(apply(new), h)  # at first the identity


def test_a_dit_knows_where_its_patches_are():
    """Patches in another order come out in that order only if the network does not know of
    positions.
    """
    net, apply = guided_net("dit")
    params, (x, c, cond) = random(net), inputs()
    swap = lambda y: jnp.roll(y, 2, axis=1)  # noqa: E731
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
