"""XLA's convolution in one order of axes, whatever is asked of it: values, derivatives of two
orders both ways, batches, meshes; and the order of axes itself.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import assert_same
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from vae_oracles import jit

from genjax.nets import correlation
from genjax.nets.correlation import correlate
from genjax.nets.fast_conv import convolve
from genjax.nets.remat import rematerialised

NHWC = ("NHWC", "HWIO", "NHWC")
PADS = [((1, 1), (1, 0)), ((2, 0), (0, 1)), ((0, 0), (0, 0))]


def xlas(x, kernel, pads):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=NHWC)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def loss(f, x, kernel):
    return jnp.sum(jnp.sin(f(x, kernel)))


def gradients(f, x, kernel):
    return jax.grad(partial(loss, f), (0, 1))(x, kernel)


def penalty(f, x, kernel):
    return sum(jnp.sum(leaf**2) for leaf in gradients(f, x, kernel))


def everything(f, x, kernel, dx, dkernel):
    """All that can be asked of a convolution f of 3 images and of 2 kernels."""
    xs, kernels = jnp.stack([x, dx]), jnp.stack([kernel, dkernel], 2)
    return {
        "values": f(x, kernel),
        "forward": jax.jvp(f, (x, kernel), (dx, dkernel))[1],
        "reverse": gradients(f, x, kernel),
        "forward over reverse": jax.jvp(partial(gradients, f), (x, kernel), (dx, dkernel))[1],
        "reverse over reverse": jax.grad(partial(penalty, f), (0, 1))(x, kernel),
        "images": jax.vmap(partial(gradients, f), (0, None))(xs, kernel),
        "kernels": jax.vmap(partial(gradients, f), (None, 2))(x, kernels),
        "both": jax.vmap(partial(gradients, f), (0, 2), out_axes=1)(xs, kernels),
    }


@pytest.mark.parametrize("window", [(3, 3), (4, 4)])
def test_of_no_images_there_is_no_result(window):
    pads = PADS[2]  # with the larger window, a product for each of few results
    x, kernels = jnp.zeros((2, 0, 5, 5, 2)), jnp.ones((2, *window, 2, 3))

    def all_of(f):
        one = partial(f, pads=pads)
        return {
            "images": jax.vmap(partial(gradients, one), (0, None))(x, kernels[0]),
            "batches": jax.vmap(one, (0, None))(x.swapaxes(0, 1), kernels[0]),
            "both": jax.vmap(one)(x, kernels),
        }

    assert_same(all_of(correlate), all_of(xlas))


@pytest.mark.parametrize("pads", PADS)
def test_values_derivatives_and_batches_are_those_of_xla(pads, x64):
    given = [normal(*shape, seed=i) for i, shape in enumerate([(3, 5, 6, 2), (3, 2, 2, 4)] * 2)]

    def both(given):
        return [everything(lambda x, k: f(x, k, pads), *given) for f in (correlate, xlas)]

    found, wanted = jit(both)(given)
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(wanted))
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    jax.tree.map(close, found, wanted)


def test_within_a_loop_every_convolution_has_the_one_order_of_axes():
    """The order that XLA on a CPU has a fast form for, which it brings others into outside of loops
    only.
    """

    def trained(kernel, xs):
        def step(kernel, x):
            by_x, by_kernel = gradients(lambda x, k: correlate(x, k, PADS[0]), x, kernel)
            return kernel - by_kernel, by_x

        return jax.lax.scan(step, kernel, xs)

    def orders(function, *given):
        text = jax.jit(function).lower(*given).compile().as_text()
        return re.findall(r" convolution\(.*dim_labels=(\S+?),? ", text)

    found = orders(trained, normal(3, 2, 3, 4), normal(2, 2, 9, 9, 3))
    assert len(found) == 3
    assert set(found) == {"b01f_01io->b01f"}


def test_large_images_take_it_and_others_products(monkeypatch):
    monkeypatch.setattr(correlation, "_IS_FAST", True)

    def takes(x, kernel, stride=1, dtype=jnp.float32, padding=None):
        given = (jax.ShapeDtypeStruct(shape, dtype) for shape in (x, kernel))
        f = partial(convolve, stride=stride, padding=padding)
        return "correlate[" in str(jax.make_jaxpr(f)(*given))

    # An odd number of images, which nothing else here has: traces are kept by shape.
    large, window = (3, 29, 28, 32), (3, 3, 32, 64)
    assert takes(large, window)
    assert takes(large, (3, 5, 32, 64), padding=((2, 0), (2, 2)))
    assert not takes(large, window, padding=((3, 0), (1, 1)))  # a derivative's would cut
    assert not takes(large, window, padding=((-1, 0), (1, 1)))
    assert not takes(large, window, stride=2)
    assert not takes(large, window, dtype=jnp.bfloat16)
    assert not takes(large, (1, 3, 32, 64))
    assert not takes((3, 14, 14, 32), window)
    assert not takes((3, 29, 28, 8), (3, 3, 8, 64))
    assert not takes((3, 29, 28, 48), (3, 3, 48, 64))
    monkeypatch.setattr(correlation, "_IS_FAST", False)
    assert not takes((5, 29, 28, 32), window)


def test_it_stands_in_a_convolution_for_every_platform(monkeypatch):
    """Of a shape that nothing else here has, as traces are kept by shape."""
    monkeypatch.setattr(correlation, "_IS_FAST", True)
    x, kernel = normal(2, 31, 18, 32), normal(2, 2, 32, 64, seed=1)
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    pads = ((0, 1), (0, 1))  # of an even window, "SAME"

    def both(x, kernel):
        kernels = jnp.stack([kernel, -kernel])
        return [
            (gradients(f, x, kernel), jax.vmap(partial(gradients, f), (None, 0))(x, kernels))
            for f in (convolve, partial(xlas, pads=pads))
        ]

    assert "correlate[" in str(jax.make_jaxpr(convolve)(x, kernel))
    found, wanted = jit(both)(x, kernel)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), found, wanted)
    exported = jax.export.export(jax.jit(convolve), platforms=("cpu", "cuda", "tpu"))(x, kernel)
    np.testing.assert_allclose(exported.call(x, kernel), xlas(x, kernel, pads), atol=1e-3)


def test_what_is_computed_again_leaves_out_its_results_where_products_stay():
    x, kernel = jnp.ones((2, 5, 5, 2)), jnp.ones((3, 3, 2, 2))

    def convolutions(remat):
        def twice(x):
            for _ in range(2):
                x = jnp.sin(correlate(x, kernel, ((1, 1), (1, 1))))
            return x.sum()

        return str(jax.make_jaxpr(jax.grad(rematerialised(twice, remat)))(x)).count("correlate[")

    assert convolutions("none") == convolutions("dots") == convolutions("dots_no_batch") == 4
    assert convolutions("full") > 4


def test_devices_that_share_kernels_do_not_speak():
    """As where each has members of its own."""
    mesh = jax.make_mesh((2,), ("member",), axis_types=(AxisType.Auto,))
    shared = NamedSharding(mesh, PartitionSpec("member"))
    given = normal(4, 3, 9, 9, 2), normal(4, 3, 3, 2, 2)
    put = [jax.device_put(leaf.astype(jnp.float32), shared) for leaf in given]
    f = jax.vmap(partial(gradients, lambda x, k: correlate(x, k, PADS[2])))
    text = jax.jit(f, out_shardings=shared).lower(*put).compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|collective-permute|all-to-all", text)


def test_devices_that_share_a_batch_find_the_gradient_of_all():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, kernel = normal(4, 5, 5, 2).astype(jnp.float32), normal(3, 3, 2, 2).astype(jnp.float32)
    spec = PartitionSpec("data")

    def gradient(kernel, x):
        return jax.grad(lambda k: jnp.sum(jnp.sin(correlate(x, k, ((1, 1), (1, 1))))))(kernel)

    wanted = jax.jit(gradient)(kernel, x)
    shared = jax.device_put(x, NamedSharding(mesh, spec))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(jax.jit(gradient)(kernel, shared), wanted)
    mapped = jax.shard_map(
        gradient, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec()
    )
    close(jax.jit(mapped)(kernel, x), wanted)
