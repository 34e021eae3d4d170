"""Normalisation: batch statistics, also conditional, and spectral norms. Both keep what they carry
in the state.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.protocol import Array


class BatchNorm(nnx.Module):
    """y = scale (x - mean) / sqrt(var + ε) + shift over all axes but the last. Ioffe & Szegedy
    2015.

    Scale and shift are learned vectors [D] or, with `cond_size`, 1 + W c and V c with learned
    matrices [cond_size, D] that start at 0 (de Vries 2017), so that equal rows give the
    unconditional layer. With train=True mean and var are those of the batch, and the running ones
    in the state move 1 % towards them; with train=False they are the running ones.
    """

    scale: Any  # a vector, or a layer that makes one of the condition
    shift: Any

    def __init__(self, d: int, cond_size: int = 0, *, rngs: nnx.Rngs) -> None:
        self.mean, self.var = (
            nnx.BatchStat(jnp.zeros(d, jnp.float32)),
            nnx.BatchStat(jnp.ones(d, jnp.float32)),
        )
        self.conditional = bool(cond_size)
        if cond_size:
            make = partial(
                nnx.Linear,
                cond_size,
                d,
                use_bias=False,
                kernel_init=nnx.initializers.zeros_init(),
                rngs=rngs,
            )
            self.scale, self.shift = make(), make()
        else:
            self.scale, self.shift = (
                nnx.Param(jnp.ones(d, jnp.float32)),
                nnx.Param(jnp.zeros(d, jnp.float32)),
            )

    def __call__(self, x: Array, cond: Array | None, train: bool) -> Array:
        def wide_as(v: Array) -> Array:  # of channels
            return v.reshape(*[1] * (x.ndim - 1), -1)

        # Statistics in float32 at least: in bfloat16 a mean over thousands of values has two
        # digits.
        wide = x.astype(jnp.promote_types(x.dtype, self.mean[...].dtype))
        if train:
            axes = tuple(range(x.ndim - 1))
            mean, var = jnp.mean(wide, axis=axes), jnp.var(wide, axis=axes)
            for running, new in ((self.mean, mean), (self.var, var)):
                running[...] += 0.01 * (
                    jax.lax.stop_gradient(new).astype(running[...].dtype) - running[...]
                )
        else:
            mean, var = self.mean[...], self.var[...]
        y = ((wide - wide_as(mean)) * wide_as(jax.lax.rsqrt(var + 1e-5))).astype(x.dtype)
        if not self.conditional:
            return y * wide_as(self.scale[...]) + wide_as(self.shift[...])

        def spread(v: Array) -> Array:  # of channels for each example
            return v.reshape(v.shape[0], *[1] * (x.ndim - 2), v.shape[-1])

        return y * (1 + spread(self.scale(cond))) + spread(self.shift(cond))


class Spectral(nnx.Module):
    """A dense or convolutional layer whose kernel W is divided by its largest singular value σ.
    Miyato 2018, algorithm 1.

    The kernel counts as a matrix [everything else, outputs]. One power iteration for each call with
    train=True: v ← W u / |W u|, u ← Wᵀ v / |Wᵀ v|, σ = vᵀ W u, where u [outputs] is in the state
    and the gradient takes u and v as constants. With train=False u is used as it is.
    """

    def __init__(self, layer: Any, *, rngs: nnx.Rngs) -> None:
        self.layer = layer
        self.u = nnx.BatchStat(
            jax.random.normal(rngs.params(), (layer.kernel.shape[-1],), jnp.float32)
        )

    def __call__(self, x: Array, train: bool) -> Array:
        kernel = self.layer.kernel[...]
        matrix = kernel.reshape(-1, kernel.shape[-1])
        constant = jax.lax.stop_gradient(matrix)
        u = _unit(self.u[...].astype(matrix.dtype))
        v = _unit(constant @ u)
        if train:
            u = _unit(v @ constant)
            self.u[...] = u.astype(self.u[...].dtype)
        sigma = v @ (matrix @ u)
        # The module is a copy that lives for one call of `functional`, but may be called twice
        # within it.
        self.layer.kernel[...] = kernel / sigma
        y = self.layer(x)
        self.layer.kernel[...] = kernel
        return y


class Plain(nnx.Module):
    """A layer as it is, with the arguments of `Spectral`."""

    def __init__(self, layer: Any, *, rngs: nnx.Rngs) -> None:
        self.layer = layer

    def __call__(self, x: Array, train: bool) -> Array:
        return self.layer(x)


def _unit(v: Array) -> Array:
    return v / (jnp.linalg.norm(v) + 1e-12)
