"""Multilayer perceptrons."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.protocol import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}


class MLP(nnx.Module):
    """A stack of dense layers with an activation between them; no hidden layer makes it linear.

    Any leading axes: they are flattened to one, because the weight gradient of a product with three
    axes is about twice as slow on a CPU as that of the same product with two.
    """

    def __init__(
        self,
        d_in: int,
        hidden: Sequence[int],
        d_out: int,
        *,
        activation: str = "gelu",
        rngs: nnx.Rngs,
    ) -> None:
        sizes = [d_in, *hidden, d_out]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Array) -> Array:
        h = x.reshape(-1, x.shape[-1])
        for layer in self.layers[:-1]:
            h = self.activation(layer(h))
        return self.layers[-1](h).reshape(*x.shape[:-1], -1)


def flatten_with(x: Array, event_ndim: int, cond: Array | None) -> Array:
    """Flatten the last `event_ndim` axes of x and append a condition [..., E] where there is
    one.
    """
    flat = x.reshape(*x.shape[: x.ndim - event_ndim], -1)
    return flat if cond is None else jnp.concatenate([flat, cond], axis=-1)
