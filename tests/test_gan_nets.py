"""The networks of adversarial models against their formulas, and what they make of data."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gan_oracles import KEY, leaky, normal, random, standardised
from gates import quick

from genjax.checks import leaves_by_name
from genjax.families.gan import gan
from genjax.nets.functional import functional
from genjax.nets.gan import DCGANFeatures, DCGANGenerator, ResidualFeatures, ResidualGenerator
from genjax.protocol import Batch, DataSpec

# --- formulas -------------------------------------------------------------------------------------


def conv(x, layer, stride=1, before=1, after=1):
    """A convolution of images with zeros around them, written out."""
    kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer.get("bias", 0.0))
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    sides = [(size - kernel.shape[0]) // stride + 1 for size in x.shape[1:3]]

    def look(a, b):
        return x[:, a : a + stride * sides[0] : stride, b : b + stride * sides[1] : stride]

    return sum(look(a, b) @ kernel[a, b] for a, b in np.ndindex(*kernel.shape[:2])) + bias


def transposed(x, layer):
    """A 4x4 transposed convolution with stride 2: zeros between the pixels, and a convolution."""
    wide = np.zeros((x.shape[0], 2 * x.shape[1] - 1, 2 * x.shape[2] - 1, x.shape[3]))
    wide[:, ::2, ::2] = x
    return conv(wide, layer, 1, 2, 2)


def check(net, *args, wanted):
    np.testing.assert_allclose(
        quick(partial(net.apply, train=True))(*args)[0], wanted, rtol=1e-8, atol=1e-8
    )


def unwrapped(node):
    """Parameters without the level of `Plain` or `Spectral`."""
    if not isinstance(node, dict):
        return node
    return (
        node["layer"]
        if "layer" in node
        else {name: unwrapped(below) for name, below in node.items()}
    )


def test_dcgan_nets_are_their_formulas(x64):
    shape, x, z, c = (8, 4, 2), normal(3, 8, 4, 2), normal(3, 5), normal(3, 1, seed=4)
    net = functional(partial(DCGANFeatures, shape, (3, 4), concat=1, norm=True))
    params, state = random(net)
    plain = unwrapped(params)
    h = np.concatenate([x, np.broadcast_to(c[:, None, None], (3, 8, 4, 1))], axis=-1)
    h = leaky(conv(h, plain["convs"][0], 2))
    h = leaky(standardised(conv(h, plain["convs"][1], 2), plain["norms"][0]))
    check(net, params, state, x, c, wanted=h.reshape(3, -1))

    net = functional(partial(DCGANGenerator, 5, shape, (4, 3), concat=1, norm=True))
    params, state = random(net)
    first = params["first"]
    h = (
        np.concatenate([z, c], axis=1) @ np.asarray(first["kernel"]) + np.asarray(first["bias"])
    ).reshape(3, 2, 1, 4)
    for index in range(2):
        h = transposed(
            np.maximum(standardised(h, params["norms"][index]), 0), params["convs"][index]
        )
    check(net, params, state, z, c, wanted=h)


@pytest.mark.slow
def test_residual_nets_are_their_formulas(x64):
    def block(x, layer):
        h = conv(leaky(conv(leaky(x), layer["one"])), layer["two"])
        return (h + (conv(x, layer["short"], 1, 0, 0) if "short" in layer else x)) / math.sqrt(2)

    shape, x, z = (4, 8, 2), normal(3, 4, 8, 2), normal(3, 5)
    net = functional(partial(ResidualFeatures, shape, (3, 4)))
    params, state = random(net)
    plain = unwrapped(params)
    h = conv(x, plain["first"])
    for index in range(2):
        h = block(h, plain["blocks"][index])
        h = sum(h[:, a::2, b::2] for a, b in np.ndindex(2, 2)) / 4
    check(net, params, state, x, None, wanted=leaky(h).reshape(3, -1))

    net = functional(partial(ResidualGenerator, 5, shape, (4, 3)))
    params, state = random(net)
    plain = unwrapped(params)
    h = (z @ np.asarray(plain["first"]["kernel"]) + np.asarray(plain["first"]["bias"])).reshape(
        3, 1, 2, 4
    )
    for index in range(2):
        h = block(h, plain["blocks"][index]).repeat(2, axis=1).repeat(2, axis=2)
    check(net, params, state, z, None, wanted=conv(leaky(h), plain["last"]))


# --- what they make of data -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("net", ["dcgan", "resnet"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (8, 16, 3)])
def test_images_of_every_size_go_in_and_come_out(net, shape):
    spec = DataSpec(shape, "discrete", levels=256, n_classes=10)
    cond, x = jnp.zeros(4, jnp.int32), jnp.zeros((4, *shape))
    settings = {
        "generator_norm": "batch",
        "generator_cond": "batch_norm",
        "discriminator_cond": "projection",
    }
    model = gan(
        spec,
        net=net,
        latent_dim=5,
        channels=(4, 6),
        gradient_penalty=1.0,
        spectral_norm=True,
        **settings,
    )
    params, state = jax.eval_shape(model.init, KEY)
    for loss in model.losses.values():
        value, aux = jax.eval_shape(loss, params, state, Batch(x, cond), KEY, 0)
        assert value.shape == (4,)
        assert aux.state == state
    assert jax.eval_shape(lambda p, s: model.sample(p, s, KEY, 4, cond), params, state).shape == (
        4,
        *shape,
    )
    assert jax.eval_shape(lambda p, s: model.extras.logit(p, s, x, cond), params, state).shape == (
        4,
    )
    assert params["discriminator"]["logit"]["layer"]["kernel"].shape == (
        shape[0] * shape[1] // 16 * 6,
        1,
    )
    n_kernels = sum(path.endswith("kernel") for path in leaves_by_name(params["discriminator"]))
    assert len(leaves_by_name(state["discriminator"])) == n_kernels  # each has its singular vector


@pytest.mark.parametrize(("kind", "levels"), [("discrete", 5), ("binary", None)])
def test_samples_of_discrete_data_are_their_whole_numbers(kind, levels):
    model = gan(DataSpec((4, 4, 1), kind, levels=levels), latent_dim=3, net="dcgan", channels=(4,))
    params, state = random(model, size=1.0)

    def run(p, z):
        return (model.sample(p, state, KEY, 400), model.extras.generate(p, state, z))

    x, smooth = quick(run)(params, jax.random.normal(KEY, (400, 3)))
    assert set(np.unique(x)) == set(range(levels or 2))
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(np.round(smooth), x)
    assert np.any(smooth != x)


@pytest.mark.slow
def test_penalties_of_binary_data_are_on_the_scale_from_minus_one_to_one(x64):
    model = gan(DataSpec((2, 2), "binary"), hidden=(), r1=1.0, objective="wasserstein")
    params, state = random(model)
    slope = np.asarray(params["discriminator"]["logit"]["layer"]["kernel"]).reshape(2, 2)
    x = np.random.default_rng(7).integers(0, 2, size=(6, 2, 2)).astype(float)
    value, aux = model.losses["discriminator"](params, state, Batch(jnp.asarray(x)), KEY, 0)
    np.testing.assert_allclose(
        aux.metrics["real_logit"], ((2 * x - 1) * slope).sum((1, 2)), rtol=1e-10
    )
    penalty = value - aux.metrics["fake_logit"] + aux.metrics["real_logit"]
    np.testing.assert_allclose(penalty, 0.5 * (slope**2).sum(), rtol=1e-10)


@pytest.mark.slow
def test_bfloat16_arithmetic_keeps_float32_parameters_statistics_and_losses():
    make = partial(
        gan,
        DataSpec((4, 4, 1), "binary"),
        net="dcgan",
        generator_norm="batch",
        spectral_norm=True,
        r1=1.0,
    )
    narrow, wide = make(dtype="bfloat16", channels=(4,)), make(channels=(4,))
    params, state = random(narrow)
    batch = Batch(jnp.asarray(np.random.default_rng(8).integers(0, 2, (6, 4, 4, 1)), jnp.float32))

    def run(model):
        return quick(lambda p: [loss(p, state, batch, KEY, 0) for loss in model.losses.values()])(
            params
        )

    found, wanted = run(narrow), run(wide)
    assert {leaf.dtype for leaf in jax.tree.leaves((found, jax.eval_shape(narrow.init, KEY)))} == {
        jnp.dtype("float32")
    }
    for (one, _), (other, _) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.1, atol=0.05)
        assert np.any(np.asarray(one) != np.asarray(other))
