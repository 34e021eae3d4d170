"""Velocity fields of continuous flows: networks of x and of one time for the whole batch."""

import itertools
from collections.abc import Sequence

from flax import nnx

from genjax.nets.conditioned import FREQUENCIES, modulate, waves, zero_linear
from genjax.nets.mlp import ACTIVATIONS, flatten_with
from genjax.protocol import Array


class FieldMLP(nnx.Module):
    """Vectors x [n, d], time t [] and conditions [n, cond_size] -> dx/dt [n, d]: dense layers
    h ← act((1 + s(t)) (W h + b) + m(t)), after those of Grathwohl 2019.

    A time in [0, 1] becomes waves first. The last layer is 0 at first, so that nothing moves, and
    so is what t adds. The activation should be smooth: the divergence is a derivative, and training
    takes one of it.
    """

    def __init__(
        self,
        d: int,
        hidden: Sequence[int],
        cond_size: int = 0,
        *,
        activation: str = "silu",
        rngs: nnx.Rngs,
    ) -> None:
        sizes = list(itertools.pairwise([d + cond_size, *hidden]))
        n_waves = 2 * len(FREQUENCIES)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in sizes])
        self.modulations = nnx.List([zero_linear(n_waves, 2 * b, rngs=rngs) for _, b in sizes])
        self.last = zero_linear(hidden[-1] if hidden else d + cond_size, d, rngs=rngs)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Array, t: Array, cond: Array | None = None) -> Array:
        # The waves tell times of a range of 6 apart.
        seen = waves(6 * t.reshape(1) - 3, x.dtype)
        h = flatten_with(x, 1, cond)
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            h = self.activation(modulate(layer(h), modulation(seen)))
        return self.last(h)
