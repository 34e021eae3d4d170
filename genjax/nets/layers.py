"""Layers that several nets share: dense ones and normalisation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.protocol import Array

EPSILON = 1e-5


def wide(dtype: Any) -> Any:
    """The dtype of sums over many values: float32 for narrower ones."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


@jax.custom_jvp
def unit_rms(x: Array, epsilon: Any = EPSILON) -> Array:
    """y = x / sqrt(mean(x²) + ε) over the last axis.

    With a derivative of its own, (dx - y mean(y dx)) / sqrt(mean(x²) + ε), which takes fewer passes
    over x than what the chain rule makes of the formula: 4 % of a small GPT's gradient.
    """
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


@unit_rms.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, epsilon), (dx, _) = primals, tangents  # nobody learns ε
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    y = x * inverse
    return y, inverse * (dx - y * jnp.mean(y * dx, axis=-1, keepdims=True))


class Norm(nnx.Module):
    """Layer normalisation, scale (x - mean) / sqrt(var + ε) + shift, or with kind="rms" scale x /
    sqrt(mean(x²) + ε).
    """

    def __init__(
        self, d: int, kind: str, bias: bool, epsilon: Any = EPSILON, *, rngs: nnx.Rngs
    ) -> None:
        self.centred = kind == "layer"
        # In a function: a number of its own that is traced would be a variable of the module.
        self.unit = functools.partial(unit_rms, epsilon=epsilon)
        self.scale = nnx.Param(jnp.ones(d, jnp.float32))
        self.shift = nnx.Param(jnp.zeros(d, jnp.float32)) if bias and self.centred else None

    def __call__(self, x: Array) -> Array:
        y, leading = x.astype(wide(x.dtype)), [1] * (x.ndim - 1)
        if self.centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = self.unit(y).astype(x.dtype) * self.scale[...].reshape(*leading, -1)
        return y if self.shift is None else y + self.shift[...].reshape(*leading, -1)


class Dense(nnx.Module):
    """x W + b for x [N, d_in]: two axes only, because a weight gradient that contracts three takes
    twice as long on a CPU.

    For the same reason W is kept with its longer axis last, transposed where there are more inputs
    than outputs: 0.67 ms against 1.03 for the gradient of a matrix of 512 x 128 and 768 rows.
    """

    def __init__(
        self, d_in: int, d_out: int, bias: bool, std: float = 0.02, *, rngs: nnx.Rngs
    ) -> None:
        self.transposed = d_in > d_out
        shape = (d_out, d_in) if self.transposed else (d_in, d_out)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(d_out, jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...]
        y = x @ (kernel.T if self.transposed else kernel)
        return y if self.bias is None else y + self.bias[...][None]
