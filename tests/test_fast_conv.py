"""Convolutions as matrix products against XLA's own: values, derivatives of two orders, batches of
kernels, other platforms.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gates import assert_same
from vae_oracles import jit

from genjax.nets.conv import ConvDecoder, ConvEncoder
from genjax.nets.fast_conv import Conv, ConvTranspose, convolve, convolve_transpose, double
from genjax.nets.functional import functional
from genjax.nets.gan import DCGANFeatures, DCGANGenerator, ResidualFeatures, ResidualGenerator

NHWC = ("NHWC", "HWIO", "NHWC")
# Few channels in, few out, and about as many: each is computed in another way where the stride
# allows it.
CHANNELS = ((1, 5), (5, 1), (2, 3))
WINDOWS = (
    ((1, 1), 1),
    ((1, 1), 2),
    ((3, 3), 1),
    ((3, 3), 2),
    ((4, 4), 1),
    ((4, 4), 2),
    ((3, 4), 2),
)


def xla_convolve(x, kernel, stride):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=NHWC)


def xla_transpose(x, kernel, stride):
    return jax.lax.conv_transpose(x, kernel, (stride, stride), "SAME", dimension_numbers=NHWC)


PAIRS = {"convolve": (convolve, xla_convolve), "transpose": (convolve_transpose, xla_transpose)}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def derivatives(function, stride, x, kernel, dx, dkernel):
    """Values, gradients, and second derivatives both ways: along a direction, and of a gradient's
    squared norm.
    """

    def loss(x, kernel):
        return jnp.sum(jnp.sin(function(x, kernel, stride)))

    def penalty(x, kernel):
        return jnp.sum(jax.grad(loss)(x, kernel) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1))
    return {
        "values": function(x, kernel, stride),
        "gradients": gradients(x, kernel),
        "forward over reverse": jax.jvp(gradients, (x, kernel), (dx, dkernel))[1],
        "reverse over reverse": jax.grad(penalty, argnums=(0, 1))(x, kernel),
    }


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_of_no_images_there_is_no_result(name, stride):
    ours, xlas = PAIRS[name]
    x, kernel = jnp.zeros((0, 4, 4, 2)), jnp.ones((3, 3, 2, 3))
    found, wanted = (
        (f(x, kernel, stride), jax.grad(lambda k, f=f: f(x, k, stride).sum())(kernel))
        for f in (ours, xlas)
    )
    assert_same(found, wanted)
    layer = {"convolve": Conv, "transpose": ConvTranspose}[name]
    net = functional(lambda rngs: layer(2, 3, (3, 3), stride, rngs=rngs))
    y = net.apply(*net.init(jax.random.key(0)), jnp.zeros((2, 0, 4, 4, 2)))[0]
    assert y.shape == (2, *wanted[0].shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("size", "stride"), WINDOWS)
def test_values_and_derivatives_are_those_of_xla(x64, size, stride, name):
    ours, xlas = PAIRS[name]

    def both(inputs):
        return [[derivatives(f, stride, *one) for one in inputs] for f in (ours, xlas)]

    inputs = []
    for a, b in CHANNELS:
        shapes = (2, 6, 7, a), (*size, a, b)  # an even and an odd side
        inputs.append([normal(*shape, seed=seed) for seed, shape in enumerate(shapes * 2)])
    found, wanted = jit(both)(inputs)
    assert wanted[0]["values"].dtype == jnp.float64
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(wanted))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, wanted
    )


@pytest.mark.parametrize(("size", "stride"), [((3, 3), 1), ((4, 4), 2), ((7, 9), 1)])
@pytest.mark.parametrize("pads", [((2, 0), (1, 1)), ((3, -1), (0, 2)), ((-1, 4), (2, -2)), None])
def test_padding_may_be_of_any_side_and_cut(pads, size, stride, x64):
    strides = (stride, stride)
    if size == (7, 9):  # larger than the image, which has to have as much around it
        pads = pads and tuple((before + 2, after + 2) for before, after in pads)

    def xlas(x, kernel):
        around = "SAME" if pads is None else pads
        return jax.lax.conv_general_dilated(x, kernel, strides, around, dimension_numbers=NHWC)

    def both(inputs):
        functions = (partial(convolve, stride=stride, padding=pads), xlas)
        pairs = [[jax.vjp(function, *one) for one in inputs] for function in functions]
        return [[(y, back(jnp.cos(y))) for y, back in pair] for pair in pairs]

    inputs = [(normal(2, 6, 7, a), normal(*size, a, b, seed=1)) for a, b in CHANNELS]
    found, wanted = jit(both)(inputs)
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(wanted))
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    jax.tree.map(close, found, wanted)


def test_an_image_of_one_pixel_has_zeros_all_around_it(x64):
    for side in (1, 2):
        for a, b in CHANNELS:
            x, kernel = normal(2, side, 1, a), normal(3, 3, a, b, seed=1)
            found, wanted = (jax.vjp(partial(f, stride=1), x, kernel) for f in PAIRS["convolve"])
            np.testing.assert_allclose(found[0], wanted[0], rtol=1e-10)
            pairs = zip(found[1](found[0]), wanted[1](wanted[0]), strict=True)
            for one, other in pairs:
                np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_several_kernels_at_once_are_one_after_the_other(x64, name):
    ours, xlas = PAIRS[name]
    for shared in (True, False):
        x, kernels = (
            normal(2, 6, 6, 3) if shared else normal(3, 2, 6, 6, 3),
            normal(3, 4, 4, 3, 2, seed=1),
        )

        def gradient(f, x, k):
            return jax.grad(lambda x, k: jnp.sum(jnp.sin(f(x, k, 2))), argnums=(0, 1))(x, k)

        found = jit(jax.vmap(partial(gradient, ours), in_axes=(None if shared else 0, 0)))(
            x, kernels
        )
        one = jit(partial(gradient, xlas))
        for i in range(3):
            wanted = one(x if shared else x[i], kernels[i])
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "flaxs"),
    [
        (partial(Conv, 3, 4, (3, 3), 2), partial(nnx.Conv, 3, 4, (3, 3), strides=2)),
        (
            partial(Conv, 3, 4, (4, 4), use_bias=False),
            partial(nnx.Conv, 3, 4, (4, 4), use_bias=False),
        ),
        (
            partial(ConvTranspose, 3, 4, (4, 4), 2),
            partial(nnx.ConvTranspose, 3, 4, (4, 4), strides=2),
        ),
    ],
    ids=["stride", "no bias", "transpose"],
)
def test_a_layer_has_the_variables_and_the_values_of_flax(ours, flaxs):
    """So checkpoints written with the one are read with the other."""
    nets = [functional(build) for build in (ours, flaxs)]
    (params, state), (wanted, _) = (net.init(jax.random.key(3)) for net in nets)
    assert_same(params, wanted)
    assert state == {}
    params = jax.tree.map(lambda leaf: leaf + 0.5, params)  # a bias starts at 0
    x = jax.random.normal(jax.random.key(4), (2, 3, 6, 4, 3))
    found, wanted = (jit(net.apply)(params, state, x)[0] for net in nets)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    narrow = jit(functional(ours, "bfloat16").apply)
    assert "bf16" in narrow.lower(params, state, x).as_text()
    # Sums of up to 64 products of numbers about 1, each with 8 digits of a binary number.
    np.testing.assert_allclose(narrow(params, state, x)[0], wanted, rtol=0.03, atol=0.3)


def test_doubling_is_resizing_to_the_nearest(x64):
    x = normal(2, 3, 5, 2)

    def resize(x):
        return jax.image.resize(x, (2, 6, 10, 2), "nearest")

    np.testing.assert_array_equal(double(x), resize(x))
    y = normal(2, 6, 10, 2, seed=1)
    np.testing.assert_allclose(*(jax.vjp(f, x)[1](y)[0] for f in (double, resize)), rtol=1e-12)


NETS = {
    "encoder": (partial(ConvEncoder, (8, 8, 1), (2, 3), 4), (8, 8, 1)),
    "decoder": (partial(ConvDecoder, 5, (8, 8, 1), (3, 2), 2), (5,)),
    "DCGAN generator": (partial(DCGANGenerator, 5, (8, 8, 1), (3, 2)), (5,)),
    "DCGAN features": (partial(DCGANFeatures, (8, 8, 1), (2, 3)), (8, 8, 1)),
    "residual generator": (partial(ResidualGenerator, 5, (8, 8, 1), (3, 2)), (5,)),
    "residual features": (partial(ResidualFeatures, (8, 8, 1), (2, 3)), (8, 8, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_only_a_cpu_gets_products_and_every_platform_has_a_program(name):
    build, shape = NETS[name]
    net = functional(build)
    params, state = jax.eval_shape(net.init, jax.random.key(0))
    rest = () if name in ("encoder", "decoder") else (None, True)

    def gradient(params, state, x):
        def loss(params, x):
            return jnp.sum(net.apply(params, state, x, *rest)[0] ** 2)

        return jax.grad(loss, argnums=(0, 1))(params, x)

    args = params, state, jax.ShapeDtypeStruct((4, *shape), jnp.float32)
    counts = {}
    for platforms in (["cpu"], ["cuda"], ["tpu"], ["cpu", "cuda", "tpu"]):
        exported = jax.export.export(jax.jit(gradient), platforms=platforms)(*args)
        assert exported.platforms == tuple(platforms)
        counts[" ".join(platforms)] = convolutions(exported.mlir_module())
    n_kernels = sum(
        path.endswith("kernel") and leaf.ndim == 4 for path, leaf in named_shapes(params).items()
    )
    assert counts["cpu"] == 0
    # Forward, with respect to the input and with respect to the kernel; a program for several
    # platforms may repeat itself.
    assert counts["cuda"] == counts["tpu"] == 3 * n_kernels
    assert counts["cpu cuda tpu"] >= 3 * n_kernels


def convolutions(module):
    """How many one run does: a function that is traced once may be called more than once."""
    bodies = dict(
        re.findall(r"func\.func [^@]*@([\w.]+)(.*?)(?=func\.func |\Z)", module, re.DOTALL)
    )

    def within(name):
        return bodies[name].count("stablehlo.convolution") + sum(
            map(within, re.findall(r"call @([\w.]+)", bodies[name]))
        )

    return within("main")


def named_shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
