"""The network of a NADE: hidden units that are summed up from the values before one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.nets.mlp import ACTIVATIONS
from genjax.protocol import Array

_LECUN = nnx.initializers.lecun_normal()


class Nade(nnx.Module):
    """Outputs [n, D, V] for D values y [n, D], those of the value i by the values before it, in an
    order that is an argument, rank [D], the place of each value:

        a_i = c + Σ_{j before i} W_j y_j + U cond,    outputs_i = b_i + V_i g(a_i) + T_i cond

    Larochelle & Murray 2011, section 3: one matrix W for all values, so that all outputs cost as
    much as one pass of a dense network. `empty`, `at` and `after` are as `MaskedMlp` has them.
    """

    def __init__(
        self,
        size: int,
        hidden: int,
        n_outputs: int,
        *,
        cond_size: int = 0,
        activation: str = "sigmoid",
        rngs: nnx.Rngs,
    ) -> None:
        self.size, self.hidden, self.n_outputs = size, hidden, n_outputs
        self.activation = ACTIVATIONS[activation]
        self.weight = nnx.Param(_LECUN(rngs.params(), (size, hidden), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(hidden, jnp.float32))
        shape = (size, hidden, n_outputs)
        self.readout = nnx.Param(
            jax.random.normal(rngs.params(), shape, jnp.float32) * hidden**-0.5
        )
        self.output_bias = nnx.Param(jnp.zeros((size, n_outputs), jnp.float32))
        added = hidden + size * n_outputs
        self.condition = (
            nnx.Linear(cond_size, added, use_bias=False, rngs=rngs) if cond_size else None
        )

    def _given(self, n: int, cond: Array | None) -> tuple[Array, Array]:
        """Sums before the first value, [n, H], and the biases of the outputs, [n, D, V]."""
        first, last = self.bias[...][None], self.output_bias[...][None]
        if self.condition is not None:
            added = self.condition(jnp.asarray(cond))
            first = first + added[:, : self.hidden]
            last = last + added[:, self.hidden :].reshape(-1, self.size, self.n_outputs)
        shape = (n, self.size, self.n_outputs)
        return jnp.broadcast_to(first, (n, self.hidden)), jnp.broadcast_to(last, shape)

    def __call__(self, y: Array, rank: Array, cond: Array | None = None) -> Array:
        order = jnp.argsort(rank)
        first, last = self._given(y.shape[0], cond)

        def one(a: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            value, weight, readout = at
            return a + value[:, None] * weight[None], self.activation(a) @ readout

        along = (y.T[order], self.weight[...][order], self.readout[...][order])
        found = jax.lax.scan(one, first, along)[1]  # [D, n, V], in the order
        return last + jnp.swapaxes(found[rank], 0, 1)

    def empty(self, n: int, dtype: Any) -> tuple[Array, Array]:
        """Values and sums of which nothing is known; what a condition adds comes in `at`."""
        return jnp.zeros((n, self.size), dtype), jnp.zeros((n, self.hidden), dtype)

    def at(self, y: Array, units: Array, place: Array, cond: Array | None) -> Array:
        """Outputs [n, V] of the value `place` [n] of each example, the next in its order."""
        first, last = self._given(y.shape[0], cond)
        h, rows = self.activation(first + units), jnp.arange(len(place))
        return last[rows, place] + jnp.einsum("nh,nhv->nv", h, self.readout[...][place])

    def after(self, y: Array, units: Array, step: Array, place: Array, cond: Array | None) -> Array:
        """The sums once the value at `place` [n] is in y."""
        value = y[jnp.arange(len(place)), place]
        return units + value[:, None] * self.weight[...][place]
