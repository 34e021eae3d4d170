"""The U-Net against its formula, part by part, and the sizes that it takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoiser_net_oracles import KEY, array, linear, normal, random, silu
from flax import nnx
from gates import quick

from genjax.errors import ConfigError
from genjax.nets.conditioned import Embedding, SelfAttention, modulate
from genjax.nets.fast_conv import Conv
from genjax.nets.functional import functional
from genjax.nets.layers import EPSILON
from genjax.nets.patches import from_patches, to_patches
from genjax.nets.unet import AdaptiveGroupNorm, ResidualBlock, UNet, group_norm, n_groups


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


def test_group_normalisation_in_float32_is_right_for_any_mean_and_first_pixel():
    x = normal(0, 3, 8, 8, 4)
    x[1] += 1e4
    x[2, 0, 0] = 1e4
    slopes = normal(1, *x.shape)

    def both(dtype):
        """Values, and gradients along some slopes."""
        images, along = (jnp.asarray(np.float32(a), dtype) for a in (x, slopes))
        one, zero = jnp.ones((3, 4), dtype), jnp.zeros((3, 4), dtype)
        y, back = jax.vjp(lambda x: group_norm(x, 2, one, zero), images)
        return [np.asarray(y), np.asarray(back(along)[0])]

    found = both(jnp.float32)
    with jax.enable_x64(True):
        wanted = both(jnp.float64)
    np.testing.assert_allclose(wanted[0], standard(np.float64(np.float32(x)), 2), atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        for image, exact in zip(one, other, strict=True):
            usual = np.median(np.abs(exact))  # the first pixel of the last is no measure
            np.testing.assert_allclose(image, exact, rtol=1e-3, atol=1e-3 * usual)
    # The mean of 11 equal numbers is rounded, and var is below 0 by more than ε in some.
    for value in np.linspace(1e10, 1e12, 10):
        same = jnp.full((1, 3, 3, 11), value, jnp.float32)
        assert np.isfinite(group_norm(same, 1, jnp.ones((1, 11)), jnp.zeros((1, 11)))).all()


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
    def build(shape, n, patch=1):
        return functional(partial(UNet, shape, (4,) * n, patch=patch))

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

        def block(p, h):
            return part(
                partial(ResidualBlock, h.shape[-1], p["two"]["kernel"].shape[-1], d), p, h, e
            )

        def norm(p, h):
            return part(partial(AdaptiveGroupNorm, h.shape[-1], d), p, h, e)

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
