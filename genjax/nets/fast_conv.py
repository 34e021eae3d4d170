"""Convolutions of images that are as fast on a CPU as the matrix products they are. NHWC; padding
"SAME" unless told otherwise.

On a CPU, XLA computes some derivatives of a convolution 10 to 50 times slower than others: the
weight gradient of a transposed convolution always, and every weight gradient inside a loop, which
is where training steps are. So on a CPU a convolution becomes slices, one matrix product and
shifted sums. All of that is linear, so its derivatives of every order, and its batches over
kernels, are of the same form and as fast. Large images are faster by XLA's own convolution in the
one order of axes that it has a fast form for in loops. Both forms are in `nets.correlation`; here
are strides, grown images and layers. Other platforms get the native convolution.

The price is memory, as windows are laid side by side. The whole gradients of the zoo's rows took
1.04 to 5.8 times as long with native convolutions outside of a loop with jax 0.12, and 10 to 29
times inside (`python -m benchmarks convolution`).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.nets.correlation import NHWC, Padding, by_products, correlate, is_faster, padded
from genjax.protocol import Array

_LECUN = nnx.initializers.lecun_normal()


# Traced and differentiated once for each shape: two ways of computing, and the derivatives of both,
# are slow to trace.
@functools.partial(jax.jit, static_argnames=("stride", "padding"))
def convolve(x: Array, kernel: Array, stride: int = 1, padding: Padding | None = None) -> Array:
    """y[n, p, q] = Σ_ij x[n, stride p + i - above, stride q + j - left] K[i, j], where x is 0
    outside of the image.

    Args:
        x: images [N, H, W, C].
        kernel: K [height, width, C, D].
        stride: steps between windows.
        padding: ((above, below), (left, right)), negative to cut; None for what "SAME" of
            `jax.lax` needs, half of it before, rounded down.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), D] with the padding "SAME", as
        `jax.lax.conv_general_dilated` to rounding.
    """
    strides = (stride, stride)
    same = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, "SAME")
    pads = same if padding is None else padding

    def native(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=NHWC)

    def fast(x: Array, kernel: Array) -> Array:
        if is_faster(x, kernel, stride, pads):
            return correlate(x, kernel, (pads[0], pads[1]))
        return _convolve(x, kernel, stride, pads)

    return jax.lax.platform_dependent(x, kernel, cpu=fast, default=native)


@functools.partial(jax.jit, static_argnames="stride")
def convolve_transpose(x: Array, kernel: Array, stride: int = 1) -> Array:
    """A convolution of x with stride - 1 zeros between its pixels: `jax.lax.conv_transpose` to
    rounding.

    Args:
        x: images [N, H, W, C].
        kernel: [height, width, C, D], not flipped.
        stride: by how much images grow.

    Returns:
        [N, stride H, stride W, D].
    """

    def native(x: Array, kernel: Array) -> Array:
        strides = (stride, stride)
        return jax.lax.conv_transpose(x, kernel, strides, "SAME", dimension_numbers=NHWC)

    def products(x: Array, kernel: Array) -> Array:
        return _convolve_transpose(x, kernel, stride)

    return jax.lax.platform_dependent(x, kernel, cpu=products, default=native)


def double(x: Array) -> Array:
    """Images [N, H, W, C] -> [N, 2 H, 2 W, C], every pixel four times. Its derivative is a sum;
    that of a resize scatters.
    """
    n, height, width, depth = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, depth)).reshape(
        n, 2 * height, 2 * width, depth
    )


def halve(x: Array) -> Array:
    """Images [n, 2 H, 2 W, C] -> [n, H, W, C], the mean of every 2x2 pixels."""
    n, height, width, d = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, d).mean(axis=(2, 4))


def _convolve(x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]) -> Array:
    sides = [side + sum(pad) for side, pad in zip(x.shape[1:3], pads, strict=True)]
    if stride == 1 or any(size % stride for size in (*kernel.shape[:2], *sides)):
        return by_products(x, kernel, stride, pads)
    x = padded(x, pads)
    # A block of stride x stride pixels becomes one pixel with all their channels, and the stride is
    # gone.
    return by_products(_to_blocks(x, stride), _to_blocks(kernel[None], stride)[0], 1)


def _convolve_transpose(x: Array, kernel: Array, stride: int) -> Array:
    (height, width, depth, d_out), images = kernel.shape, x.shape[1:3]
    # Every pixel of x adds to one window of y, so to `rows` x `columns` blocks of stride x stride
    # pixels of y.
    rows, columns = -(-height // stride), -(-width // stride)
    flipped = jnp.pad(
        kernel[::-1, ::-1],
        ((0, rows * stride - height), (0, columns * stride - width), (0, 0), (0, 0)),
    )
    blocks = flipped.reshape(rows, stride, columns, stride, depth, d_out).transpose(
        0, 2, 4, 1, 3, 5
    )
    blocks = blocks.reshape(rows, columns, depth, stride * stride * d_out)[::-1, ::-1]
    around = ((rows - 1, rows - 1), (columns - 1, columns - 1))
    y = by_products(x, blocks, 1, around)
    n, down, across, _ = y.shape
    y = y.reshape(n, down, across, stride, stride, d_out).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(n, down * stride, across * stride, d_out)
    top, left = (_cut(size, stride) for size in (height, width))
    return y[:, top : top + images[0] * stride, left : left + images[1] * stride]


def _cut(size: int, stride: int) -> int:
    """How many of the first pixels "SAME" of `jax.lax.conv_transpose` leaves out, of all that the
    first window reaches.
    """
    return 0 if stride > size - 1 else size - 1 - -(-(size + stride - 2) // 2)


def _to_blocks(x: Array, size: int) -> Array:
    """[N, H, W, C, ...] -> [N, H / size, W / size, size² C, ...]"""
    n, height, width, depth, *rest = x.shape
    x = x.reshape(n, height // size, size, width // size, size, depth, *rest)
    return jnp.swapaxes(x, 2, 3).reshape(
        n, height // size, width // size, size * size * depth, *rest
    )


class Conv(nnx.Conv):
    """`nnx.Conv` of images [..., H, W, d_in] with padding "SAME", computed by `convolve`: the same
    variables and values.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        kernel_size: tuple[int, int],
        stride: int = 1,
        *,
        use_bias: bool = True,
        kernel_init: Any = _LECUN,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            d_in, d_out, kernel_size, stride, use_bias=use_bias, kernel_init=kernel_init, rngs=rngs
        )
        self.stride = stride

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        return _apply(self, convolve, inputs)


class ConvTranspose(nnx.ConvTranspose):
    """`nnx.ConvTranspose` of images with padding "SAME", computed by `convolve_transpose`: the same
    variables and values.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        kernel_size: tuple[int, int],
        stride: int = 1,
        *,
        use_bias: bool = True,
        kernel_init: Any = _LECUN,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            d_in, d_out, kernel_size, stride, use_bias=use_bias, kernel_init=kernel_init, rngs=rngs
        )
        self.stride = stride

    def __call__(self, inputs: Array) -> Array:
        return _apply(self, convolve_transpose, inputs)


def _apply(layer: Any, function: Any, inputs: Array) -> Array:
    bias = None if layer.bias is None else layer.bias[...]
    x, kernel, bias = layer.promote_dtype((inputs, layer.kernel[...], bias), dtype=None)
    y = function(x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]), kernel, layer.stride)
    y = y if bias is None else y + bias.reshape(1, 1, 1, -1)
    return y.reshape(*x.shape[:-3], *y.shape[1:])
