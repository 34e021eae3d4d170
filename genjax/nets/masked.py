"""Networks that look at some of their inputs only: masked dense and masked convolution layers, so
that what is said of a value depends on the values before it, exactly.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from genjax.nets.fast_conv import convolve
from genjax.nets.mlp import ACTIVATIONS
from genjax.protocol import Array

_HALF_SEEN = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")

# --- dense layers ---------------------------------------------------------------------------------


class MaskedDense(nnx.Module):
    """x (W ⊙ M) + b for x [n, d_in], where M [d_in, d_out] says which input an output may see."""

    def __init__(
        self, d_in: int, d_out: int, kernel_init: Any = _HALF_SEEN, *, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(kernel_init(rngs.params(), (d_in, d_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(d_out, jnp.float32))

    def __call__(self, x: Array, mask: Array) -> Array:
        kernel = self.kernel[...]
        return x @ (kernel * mask.astype(kernel.dtype)) + self.bias[...][None]

    def block(self, x: Array, start: Array, size: int) -> Array:
        """Some outputs that may see all of x that is not 0."""
        kernel = jax.lax.dynamic_slice_in_dim(self.kernel[...], start, size, axis=1)
        bias = jax.lax.dynamic_slice_in_dim(self.bias[...], start, size)
        return x @ kernel + bias[None]


def degrees(width: int, size: int) -> np.ndarray:
    """How many values in the order, after the first, each unit of a hidden layer may see: 0 to
    size - 2, in equal shares, ascending.
    """
    return (np.arange(width) * max(size - 1, 1)) // width


class MaskedMlp(nnx.Module):
    """Outputs [n, D, V] for D values y [n, D], those of a value depending on the values before it
    in an order only. Germain 2015 (MADE), section 3.

    The order is an argument: rank [D], int32, the place of each value. A unit of degree m sees
    values of rank <= m and units of degree <= m; the value of rank r sees units of degree < r, and
    directly the values of rank < r (`direct`). Weights belong to values, not to places, so that
    several orders share them (Uria 2014).

    A condition [n, cond_size] adds to the first hidden layer and to the outputs.
    """

    def __init__(
        self,
        size: int,
        hidden: Sequence[int],
        n_outputs: int,
        *,
        cond_size: int = 0,
        direct: bool = True,
        activation: str = "relu",
        rngs: nnx.Rngs,
    ) -> None:
        self.size, self.n_outputs = size, n_outputs
        self.activation = ACTIVATIONS[activation]
        self.degrees = tuple(tuple(degrees(width, size).tolist()) for width in hidden)
        widths = [size, *hidden]
        self.layers = nnx.List(
            [MaskedDense(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.bias = nnx.Param(jnp.zeros((size, n_outputs), jnp.float32))
        seen, first = bool(hidden), hidden[0] if hidden else 0
        self.last = self._columns(rngs, hidden[-1], hidden[-1]) if seen else None
        self.direct = self._columns(rngs, size, 10 * size) if direct or not seen else None
        added = partial(nnx.Linear, cond_size, first + size * n_outputs, use_bias=False, rngs=rngs)
        self.condition = added() if cond_size else None

    def _columns(self, rngs: nnx.Rngs, d_in: int, fan: int) -> nnx.Param:
        shape = (d_in, self.size, self.n_outputs)
        return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(fan))

    def _given(self, cond: Array | None) -> tuple[Array | None, Array | None]:
        """What a condition adds to the first layer and to the outputs."""
        if self.condition is None:
            return None, None
        added = self.condition(jnp.asarray(cond))
        first = added.shape[-1] - self.size * self.n_outputs
        return added[:, :first], added[:, first:].reshape(-1, self.size, self.n_outputs)

    def __call__(self, y: Array, rank: Array, cond: Array | None = None) -> Array:
        first, to_outputs = self._given(cond)
        h, sees = y, rank
        for index, layer in enumerate(self.layers):
            degree = jnp.asarray(self.degrees[index], jnp.int32)
            h = layer(h, sees[:, None] <= degree[None])
            h = self.activation(h if index or first is None else h + first)
            sees = degree
        found = self.bias[...][None]
        if self.last is not None:
            found = found + self._masked(h, self.last[...], sees[:, None] < rank[None])
        if self.direct is not None:
            found = found + self._masked(y, self.direct[...], rank[:, None] < rank[None])
        return found if to_outputs is None else found + to_outputs

    def _masked(self, h: Array, kernel: Array, mask: Array) -> Array:
        kernel = kernel * mask[..., None].astype(kernel.dtype)
        return (h @ kernel.reshape(h.shape[-1], -1)).reshape(-1, self.size, self.n_outputs)

    # One value at a time. What was not seen yet is 0, and so is a unit that may see some of it:
    # then no mask is needed, and each unit is computed once.

    def empty(self, n: int, dtype: Any) -> tuple[Array, list[Array]]:
        """Values and units of which nothing is known."""
        units = [jnp.zeros((n, len(degree)), dtype) for degree in self.degrees]
        return jnp.zeros((n, self.size), dtype), units

    def at(self, y: Array, units: Sequence[Array], place: Array, cond: Array | None) -> Array:
        """Outputs [n, V] of the value `place` [n] of each example, the next in its order."""
        found = self.bias[...][place]
        if self.last is not None:
            found = found + jnp.einsum("nj,jnv->nv", units[-1], self.last[...][:, place])
        if self.direct is not None:
            found = found + jnp.einsum("nj,jnv->nv", y, self.direct[...][:, place])
        to_outputs = self._given(cond)[1]
        if to_outputs is None:
            return found
        return found + to_outputs[jnp.arange(len(place)), place]

    def after(
        self, y: Array, units: Sequence[Array], step: Array, place: Array, cond: Array | None
    ) -> list[Array]:
        """The units once the values of rank <= step are in y, the last of them at `place` [n]:
        those of degree `step` are new, so that each is computed once.
        """
        first, found, h = self._given(cond)[0], [], y
        for index, layer in enumerate(self.layers):
            degree = np.asarray(self.degrees[index])
            size = int(np.bincount(degree).max())
            starts = np.searchsorted(degree, np.arange(self.size))
            start = jnp.asarray(np.minimum(starts, len(degree) - size), jnp.int32)[step]
            new = layer.block(h, start, size)
            if first is not None and not index:
                new = new + jax.lax.dynamic_slice_in_dim(first, start, size, axis=1)
            old = jax.lax.dynamic_slice_in_dim(units[index], start, size, axis=1)
            own = jax.lax.dynamic_slice_in_dim(jnp.asarray(degree, jnp.int32), start, size) == step
            new = jnp.where(own[None], self.activation(new), old).astype(old.dtype)
            h = jax.lax.dynamic_update_slice_in_dim(units[index], new, start, axis=1)
            found.append(h)
        return found


# --- convolutions ---------------------------------------------------------------------------------

# What a masked convolution sees of the row of the pixel that it is for, beside the rows above:
# nothing, the pixels before it, these and itself, or the whole row.
Sees = Literal["above", "before", "here", "row"]


def window(rows: int, columns: int, sees: Sees) -> np.ndarray:
    """Which of the last `rows` rows, up to the pixel's own, and of the `columns` around it are
    seen: [rows, columns] of 0 and 1. van den Oord 2016, figure 2: "before" is mask A, "here" B.
    """
    mask = np.ones((rows, columns))
    middle = columns // 2
    mask[-1] = {
        "above": np.zeros(columns),
        "before": np.arange(columns) < middle,
        "here": np.arange(columns) <= middle,
        "row": np.ones(columns),
    }[sees]
    return mask


class MaskedConv(nnx.Module):
    """A convolution of images [n, H, W, d_in] whose windows end with the pixel's own row; what they
    see of that row `sees` says. Outside of the image is 0.
    """

    def __init__(
        self, d_in: int, d_out: int, rows: int, columns: int, sees: Sees, *, rngs: nnx.Rngs
    ) -> None:
        mask = window(rows, columns, sees)
        self.shape = (rows, columns)
        self.sees: Sees = sees
        std = 1 / math.sqrt(max(mask.sum(), 1) * d_in)
        shape = (rows, columns, d_in, d_out)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(d_out, jnp.float32))

    def __call__(self, x: Array) -> Array:
        (rows, columns), kernel = self.shape, self.kernel[...]
        mask = window(rows, columns, self.sees)
        if not mask.any():
            y = jnp.zeros((*x.shape[:-1], kernel.shape[-1]), jnp.result_type(x, kernel))
            return y + self.bias[...].reshape(1, 1, 1, -1)
        # Rows and columns at the end that nothing is seen of cost as much as others: without them.
        tall, wide = (1 + np.argwhere(mask).max(axis=0)).tolist()
        kernel = kernel[:tall, :wide] * jnp.asarray(mask[:tall, :wide, None, None], kernel.dtype)
        left = columns // 2
        # The window ends with the pixel's own row; what was left out of it was below or right.
        y = convolve(x, kernel, padding=((rows - 1, tall - rows), (left, wide - 1 - left)))
        return y + self.bias[...].reshape(1, 1, 1, -1)

    def one(self, x: Array) -> Array:
        """The same of a single pixel, [n, d_out], from its window [n, rows, columns, d_in]."""
        kernel = self.kernel[...]
        mask = jnp.asarray(window(*self.shape, self.sees), kernel.dtype)[..., None, None]
        flat = (kernel * mask).reshape(-1, kernel.shape[-1])
        return x.reshape(x.shape[0], -1) @ flat + self.bias[...][None]
