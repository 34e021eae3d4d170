"""Convolutions of images in the two forms that are fast on a CPU, wherever they stand: as one
matrix product, and as XLA's own operation in one order of axes. NHWC, kernels HWIO.

XLA turns a convolution's axes into the order that its fast forms want, (N, H, W, C) with a kernel
(height, width, C, D), only outside of loops, and training steps are in loops. The derivatives that
`jax.lax` makes have other orders: there they took 30 times as long. All three of

    y[n, p, q, d] = Σ_ijc x[n, p + i, q + j, c] K[i, j, c, d],    dx,    dK

are such a sum again, of turned arrays: dx of dy and K with rows, columns, C and D reversed, dK of x
and dy with examples in the place of channels. So they are one operation here, closed under
derivatives of every order, which always has that order of axes.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from genjax.nets.platforms import once
from genjax.protocol import Array

NHWC = ("NHWC", "HWIO", "NHWC")

# Zeros before and after the rows, and the columns, of an image.
Padding = tuple[tuple[int, int], tuple[int, int]]

# With jax 0.10 they took as long as matrix products, or up to 0.3 longer.
_IS_FAST = jax.__version_info__ >= (0, 12)


def is_faster(x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]) -> bool:
    """Whether this is for a CPU faster than matrix products, derivatives included: it was for
    windows of several rows over large images of 32, 64 or 128 channels, in float32 (0.64 to 1.0 of
    the time; 1.1 to 1.4 with 40, 48, 56, 80 or 96).
    """
    sizes, depths = kernel.shape[:2], kernel.shape[2:]
    return (
        _IS_FAST
        and stride == 1
        and min(sizes) > 1
        and all(side >= size for side, size in zip(x.shape[1:3], sizes, strict=True))
        and all(0 <= pad < size for size, sides in zip(sizes, pads, strict=True) for pad in sides)
        and all(depth in (32, 64, 128) for depth in depths)
        and x.shape[1] * x.shape[2] >= 500
        and x.dtype == kernel.dtype == jnp.float32
    )


def correlate(x: Array, kernel: Array, pads: Padding) -> Array:
    """y[n, p, q, d] = Σ_ijc x[n, p + i - above, q + j - left, c] K[i, j, c, d], with x = 0 outside.

    Args:
        x: images [N, H, W, C].
        kernel: K [height, width, C, D].
        pads: ((above, below), (left, right)), each at least 0 and less than the window; then those
            of all derivatives are, too, of images no smaller than the window.

    Returns:
        [N, H + above + below - height + 1, W + left + right - width + 1, D].
    """
    # Within `jax.shard_map`, what is the same on all devices joins what is not, as in `jax.lax`.
    axes = _varies(x) | _varies(kernel)
    x, kernel = (
        jax.lax.pcast(leaf, tuple(axes - _varies(leaf)), to="varying") for leaf in (x, kernel)
    )
    return correlate_p.bind(x, kernel, pads=pads)


def _varies(x: Array) -> frozenset[str]:
    """The axes of a mesh, within `jax.shard_map`, along which x is not the same."""
    return jax.typeof(x).manual_axis_type.varying


def _lax(x: Array, kernel: Array, *, pads: Padding) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=NHWC)


def _to_x(dy: Array, x: Any, kernel: Array, *, pads: Padding) -> Array:
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    # Every pixel of x is seen by the windows that end or begin with it.
    sides = [
        (size - 1 - before, size - 1 - after)
        for size, (before, after) in zip(kernel.shape[:2], pads, strict=True)
    ]
    return correlate(dy, turned, (sides[0], sides[1]))


def _to_kernel(dy: Array, x: Array, kernel: Any, *, pads: Padding) -> Array:
    # Examples are summed over, and so stand where channels do; channels stand for examples.
    by_channel, weights = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    return correlate(by_channel, weights, pads).transpose(1, 2, 0, 3)


def _batched(args: Any, axes: Any, *, pads: Padding) -> tuple[Array, int]:
    (x, kernel), (of_x, of_kernel) = args, axes
    if of_kernel is None:
        x = jnp.moveaxis(x, of_x, 0)
        flat = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        y = correlate(flat, kernel, pads)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    # Several kernels are products with one more axis, which devices can share.
    return jax.vmap(partial(_products, pads=pads), axes)(x, kernel), 0


def _products(x: Array, kernel: Array, *, pads: Padding) -> Array:
    height, width = kernel.shape[:2]
    (top, bottom), (left, right) = pads
    rows = x.shape[1] + top + bottom - height + 1
    columns = x.shape[2] + left + right - width + 1
    if height * width <= rows * columns:
        return by_products(x, kernel, 1, pads)
    # In a kernel's gradient the windows are as large as images, and the results few.
    x = padded(x, pads)
    flat = kernel.reshape(-1, kernel.shape[-1])
    found = [
        x[:, i : i + height, j : j + width].reshape(x.shape[0], len(flat)) @ flat
        for i in range(rows)
        for j in range(columns)
    ]
    return jnp.stack(found, axis=1).reshape(x.shape[0], rows, columns, flat.shape[1])


def _shape(x: Any, kernel: Any, *, pads: Padding) -> Any:
    rows, columns = (
        size + sum(sides) - window + 1
        for size, sides, window in zip(x.shape[1:3], pads, kernel.shape[:2], strict=True)
    )
    shape = (x.shape[0], rows, columns, kernel.shape[3])
    return x.update(shape=shape, weak_type=x.weak_type and kernel.weak_type)


correlate_p = Primitive("correlate")
correlate_p.def_impl(jax.jit(_lax, static_argnames="pads"))
correlate_p.def_abstract_eval(_shape)
ad.defbilinear(correlate_p, _to_x, _to_kernel)
batching.primitive_batchers[correlate_p] = _batched
mlir.register_lowering(correlate_p, mlir.lower_fun(_lax, multiple_results=False))


# --- by products ----------------------------------------------------------------------------------


def by_products(
    x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]] = ((0, 0), (0, 0))
) -> Array:
    """The convolution of x as one matrix product.

    Along each axis the pixels of a window can be laid side by side before the product (both axes:
    "im2col"), or the products of single pixels can be shifted and summed after it. Memory traffic
    decides: the way that makes the fewest numbers. Zeros along an axis that is summed after the
    product come after it, too, so that it has no rows of zeros: a step of a U-Net takes 0.91 of the
    time.

    Args:
        x, kernel, stride: see `fast_conv.convolve`.
        pads: zeros before and after the rows, and the columns; negative to cut.
    """
    height, width, depth, d_out = kernel.shape
    # Axes of the kernel that come before the product, and numbers for each pixel on both sides of
    # it.
    ways = {
        (0, 1): height * width * depth + d_out,
        (1,): width * depth + height * d_out,
        (): depth + height * width * d_out,
    }
    # With a stride, a sum after the product would need products that nobody asks for.
    early = (0, 1) if stride > 1 else min(ways, key=lambda way: ways[way])
    late = tuple(axis for axis in (0, 1) if axis not in early)
    down, across = (
        (side + sum(pad) - size) // stride + 1
        for side, pad, size in zip(x.shape[1:3], pads, (height, width), strict=True)
    )
    x = padded(x, [pads[axis] if axis in early else (0, 0) for axis in (0, 1)])
    n, rows, columns, _ = x.shape
    tall, wide = down if 0 in early else rows, across if 1 in early else columns
    end, last = (tall - 1) * stride + 1, (wide - 1) * stride + 1
    sides = [x[:, i : i + end : stride, j : j + last : stride] for i, j in _offsets(kernel, early)]
    # No -1 stands for a size: without images, all others fit, too.
    left = jnp.concatenate(sides, axis=-1)
    left = left.reshape(n * tall * wide, left.shape[-1])
    after = math.prod(kernel.shape[axis] for axis in late) * d_out
    right = kernel.transpose(*early, 2, *late, 3).reshape(left.shape[1], after)
    product = (left @ right).reshape(n, tall, wide, after)
    # The derivative of a split is one concatenation; that of slices is a sum of as many arrays as
    # there are slices.
    offsets = list(_offsets(kernel, late))
    parts = jnp.split(product, len(offsets), axis=-1)
    terms = []
    for part, offset in zip(parts, offsets, strict=True):
        # Shifted by its offset, and as large as the result.
        shifts = [pads[axis][0] - offset[axis] if axis in late else 0 for axis in (0, 1)]
        rest = [down - tall - shifts[0], across - wide - shifts[1]]
        terms.append(padded(part, list(zip(shifts, rest, strict=True))))
    y = sum(terms[1:], start=terms[0])
    # What reads this sum would compute it again from the product, which is several times as large
    # and would be kept for the way back (and is where `remat` keeps products): 0.91 of a U-Net's
    # time.
    return once(y) if late else y


def padded(x: Array, sides: Sequence[tuple[int, int]]) -> Array:
    """x with zeros before and after its rows, and its columns; a negative number cuts."""
    if not any(map(any, sides)):
        return x
    whole = [(0, 0, 0), *((before, after, 0) for before, after in sides), (0, 0, 0)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), whole)


def _offsets(kernel: Array, axes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Pixels of a window along some of its axes, in the order of a reshape."""
    rows, columns = (range(kernel.shape[axis]) if axis in axes else range(1) for axis in (0, 1))
    return itertools.product(rows, columns)
