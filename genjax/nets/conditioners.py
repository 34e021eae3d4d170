"""Networks that say how a normalizing flow moves some numbers, given others.

Each returns `n_outputs` numbers for every number that is moved, the last axis being those. The last
layer is 0 at first, so that a new flow moves nothing.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx

from genjax.nets.conditioned import zero_linear
from genjax.nets.fast_conv import Conv
from genjax.nets.masked import MaskedDense
from genjax.nets.mlp import ACTIVATIONS, flatten_with
from genjax.protocol import Array

_ZERO = nnx.initializers.zeros_init()
_LECUN = nnx.initializers.lecun_normal()


class ConditionerMLP(nnx.Module):
    """Vectors x [n, d_in] and conditions [n, cond_size] -> [n, d_out, n_outputs]: dense layers."""

    def __init__(
        self,
        d_in: int,
        hidden: Sequence[int],
        d_out: int,
        n_outputs: int,
        cond_size: int = 0,
        *,
        activation: str = "gelu",
        rngs: nnx.Rngs,
    ) -> None:
        sizes = [d_in + cond_size, *hidden]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.last = zero_linear(sizes[-1], d_out * n_outputs, rngs=rngs)
        self.activation = ACTIVATIONS[activation]
        self.n_outputs = n_outputs

    def __call__(self, x: Array, cond: Array | None = None) -> Array:
        h = flatten_with(x, 1, cond)
        for layer in self.layers:
            h = self.activation(layer(h))
        return self.last(h).reshape(x.shape[0], -1, self.n_outputs)


class ConditionerConv(nnx.Module):
    """Images x [n, H, W, d_in] and conditions [n, cond_size], the same for all pixels, ->
    [n, H, W, d_out, n_outputs]: convolutions of 3x3, 1x1 and 3x3. Kingma & Dhariwal 2018, 3.3.
    """

    def __init__(
        self,
        d_in: int,
        channels: int,
        d_out: int,
        n_outputs: int,
        cond_size: int = 0,
        *,
        activation: str = "relu",
        rngs: nnx.Rngs,
    ) -> None:
        self.first = Conv(d_in + cond_size, channels, (3, 3), rngs=rngs)
        self.middle = Conv(channels, channels, (1, 1), rngs=rngs)
        self.last = Conv(channels, d_out * n_outputs, (3, 3), kernel_init=_ZERO, rngs=rngs)
        self.activation = ACTIVATIONS[activation]
        self.n_outputs = n_outputs

    def __call__(self, x: Array, cond: Array | None = None) -> Array:
        if cond is not None:
            tiled = jnp.broadcast_to(cond[:, None, None], (*x.shape[:3], cond.shape[-1]))
            x = jnp.concatenate([x, tiled], axis=-1)
        h = self.activation(self.middle(self.activation(self.first(x))))
        h = self.last(h)
        return h.reshape(*h.shape[:3], -1, self.n_outputs)


def hidden_degrees(d: int, width: int, cond_size: int) -> list[int]:
    """How many of the d numbers each of `width` hidden units sees: 1 to d - 1, spread evenly; from
    0 on where there is a condition, which the first number's outputs are then a function of.
    """
    lowest = 0 if cond_size else min(1, d - 1)
    count = max(d - lowest, 1)
    return [lowest + unit * count // width for unit in range(width)]


class ConditionerMasked(nnx.Module):
    """Vectors x [n, d] and conditions [n, cond_size] -> [n, d, n_outputs], of which the i-th are a
    function of x_1 ... x_{i-1} and the condition. Germain 2015 (MADE).
    """

    def __init__(
        self,
        d: int,
        hidden: Sequence[int],
        n_outputs: int,
        cond_size: int = 0,
        *,
        activation: str = "gelu",
        rngs: nnx.Rngs,
    ) -> None:
        # A unit of degree m sees the first m numbers; the i-th outputs are of degree i - 1.
        inner = [hidden_degrees(d, width, cond_size) for width in hidden]
        outputs = [i for i in range(d) for _ in range(n_outputs)]
        degrees = [list(range(1, d + 1)), *inner, outputs]
        last = len(degrees) - 2
        # Tuples: an array of a module's own would be taken for a variable.
        self.degrees = tuple(map(tuple, degrees))
        self.layers = nnx.List(
            [
                MaskedDense(len(a), len(b), _ZERO if index == last else _LECUN, rngs=rngs)
                for index, (a, b) in enumerate(itertools.pairwise(degrees))
            ]
        )
        seen = partial(
            nnx.Linear,
            cond_size,
            len(degrees[1]),
            use_bias=False,
            kernel_init=_LECUN if hidden else _ZERO,
        )
        self.condition = seen(rngs=rngs) if cond_size else None
        self.activation = ACTIVATIONS[activation]
        self.n_outputs = n_outputs

    def __call__(self, x: Array, cond: Array | None = None) -> Array:
        # By jax: where only shapes are asked no mask is made, which may be too large for memory.
        degrees = [jnp.asarray(degree, jnp.int32) for degree in self.degrees]
        h = x
        for index, layer in enumerate(self.layers):
            h = self.activation(h) if index else h
            h = layer(h, degrees[index][:, None] <= degrees[index + 1][None])
            if not index and self.condition is not None:
                h = h + self.condition(jnp.asarray(cond))
        return h.reshape(*x.shape, self.n_outputs)
