"""Recurrent networks: the vanilla cell, the LSTM and the GRU, in layers, over whole sequences or
one step at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.nets.cells import Carry, Cell, cell_of, check_step
from genjax.nets.platforms import at_each
from genjax.nets.remat import rematerialised
from genjax.nets.sequence import EventEmbed, dropout
from genjax.protocol import Array, DataSpec, Key


def _loop(step: Callable[[Array, Carry], Carry], given: Array, carry: Carry) -> tuple[Array, Carry]:
    """Steps (given_t, carry) -> carry over given [T, B, n] -> (h [T, B, d], the carry after the
    last).
    """

    def one(carry: Carry, given: Array) -> tuple[Carry, Array]:
        after = step(given, carry)
        return after, after[0]

    last, y = jax.lax.scan(one, carry, given)
    return y, last


def _with(cell: Cell, kernel: Array) -> Callable[[Array, Carry], Carry]:
    """The cell's step with u = h U."""
    return lambda a, carry: cell.step(a, carry[0] @ kernel, carry)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def over_time(cell: Cell, a: Array, carry: Carry, kernel: Array) -> tuple[Array, Carry]:
    """The loop of a `summed` cell over a [T, B, n_gates d], u_t = h_{t-1} U -> (h [T, B, d], the
    carry after the last).

    du_t = dh_{t-1} U + h_{t-1} dU. As the cell sees a + u only, the second term can join da before
    the loop, where it is one product for all steps. So is then its transpose, the gradient of U,
    Σ_t h_{t-1}ᵀ du_t; the way back of a plain loop has a product and a sum of U's size at each
    step. (The GRU would have to keep du beside da: on a CPU that took 115 ms for 104 with 256 units
    and 347 for 360 with 512.)
    """
    return _loop(_with(cell, kernel), a, carry)


@over_time.defjvp
def _over_time_jvp(cell: Cell, primals: Any, tangents: Any) -> Any:
    a, carry, kernel = primals
    a_dot, carry_dot, kernel_dot = tangents
    (y, last), push = jax.linearize(functools.partial(_loop, _with(cell, kernel)), a, carry)
    before = jnp.concatenate([carry[0][None], y[:-1]])
    u_dot = at_each(lambda h: h @ kernel_dot, before)
    return (y, last), push(a_dot + u_dot, carry_dot)


class RecurrentLayer(nnx.Module):
    """One layer; in its loop over time there is only h U. W is [d_in, n_gates d]; U is [d, n_gates
    d], orthogonal by gates.

    With `remat` a step keeps its input and its carry only (and what the policy names); x W, then a
    product of each step, and its gates are computed again on the way back.
    """

    def __init__(
        self, cell: Cell, d_in: int, d: int, remat: str = "none", *, rngs: nnx.Rngs
    ) -> None:
        check_step(cell, d)
        self.cell, self.remat = cell, remat
        self.inputs = nnx.Linear(d_in, cell.n_gates * d, rngs=rngs)
        bias = jnp.concatenate([jnp.full(d, value, jnp.float32) for value in cell.bias])
        self.inputs.bias = nnx.Param(bias)
        orthogonal = jax.nn.initializers.orthogonal()
        gates = [orthogonal(rngs.params(), (d, d), jnp.float32) for _ in range(cell.n_gates)]
        self.kernel = nnx.Param(jnp.concatenate(gates, axis=1))
        if cell.n_biased:
            self.bias = nnx.Param(jnp.zeros(cell.n_biased * d, jnp.float32))

    def _bias(self) -> Array:
        kernel = self.kernel[...]
        if not self.cell.n_biased:
            return jnp.zeros(kernel.shape[1], kernel.dtype)
        own = self.bias[...]
        return jnp.concatenate([jnp.zeros(kernel.shape[1] - own.shape[0], own.dtype), own])

    def __call__(self, x: Array, carry: Carry) -> tuple[Array, Carry]:
        """x [T, B, d_in] -> h [T, B, d]: time comes first, as the loop wants it."""
        if self.remat != "none":

            def step(x: Array, carry: Carry) -> Carry:
                return self.step(self.inputs(x), carry)

            return _loop(rematerialised(step, self.remat, loop=True), x, carry)
        a = at_each(self.inputs, x)
        if self.cell.summed:
            return over_time(self.cell, a, carry, self.kernel[...])
        return _loop(self.step, a, carry)

    def step(self, a: Array, carry: Carry) -> Carry:
        """The next carry for projected inputs a = x W + b [B, n_gates d]."""
        return self.cell.step(a, carry[0] @ self.kernel[...] + self._bias()[None], carry)


class Recurrent(nnx.Module):
    """Layers of one cell, each fed with the h of the layer below; dropout between the layers
    (Zaremba 2014), not over time.

    The carry is a tuple with one entry for each layer.
    """

    def __init__(
        self,
        cell: str | Cell,
        d_in: int,
        d: int,
        n_layers: int = 1,
        remat: str = "none",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.d = d
        sizes = [d_in] + [d] * (n_layers - 1)
        self.layers = nnx.List(
            [RecurrentLayer(cell_of(cell), size, d, remat, rngs=rngs) for size in sizes]
        )

    def start(self, n: int) -> tuple[Carry, ...]:
        """The carry before the first step: zeros."""
        zeros = jnp.zeros((n, self.d), self.layers[0].kernel[...].dtype)
        return tuple((zeros,) * layer.cell.n_carry for layer in self.layers)

    def __call__(
        self, x: Array, carry: tuple[Carry, ...], key: Key | None = None, rate: Any = 0.0
    ) -> tuple[Array, tuple[Carry, ...]]:
        """Whole sequences x [B, T, d_in] -> h of the last layer [B, T, d], and the carry after
        them.
        """
        y, after = x.swapaxes(0, 1), []
        for index, (layer, before) in enumerate(zip(self.layers, carry, strict=True)):
            if index and key is not None:
                y = dropout(jax.random.fold_in(key, index), y, rate)
            y, last = layer(y, before)
            after.append(last)
        return y.swapaxes(0, 1), tuple(after)

    def one(self, x: Array, carry: tuple[Carry, ...]) -> tuple[Array, tuple[Carry, ...]]:
        """One step x [B, d_in] -> h of the last layer [B, d], and the carry after it."""
        after = []
        for layer, before in zip(self.layers, carry, strict=True):
            after.append(layer.step(layer.inputs(x), before))
            x = after[-1][0]
        return x, tuple(after)


class RecurrentNet(nnx.Module):
    """Events of a sequence -> the outputs that describe the distribution of the next one.

    `rate` is the dropout of the embedded events, between the layers and before the readout.
    """

    def __init__(
        self,
        spec: DataSpec,
        cell: str | Cell,
        d_embed: int,
        d_hidden: int,
        n_layers: int,
        n_outputs: int,
        droppable: bool = False,
        remat: str = "none",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.embed = EventEmbed(spec, d_embed, droppable, rngs=rngs)
        self.layers = Recurrent(cell, d_embed, d_hidden, n_layers, remat, rngs=rngs)
        self.readout = nnx.Linear(d_hidden, n_outputs, rngs=rngs)

    def start(self, n: int) -> tuple[Carry, ...]:
        return self.layers.start(n)

    def begin(
        self, n: int, c: Array | None, dropped: Array | None
    ) -> tuple[Array, tuple[Carry, ...]]:
        """Outputs for the first step [n, n_outputs], and the carry."""
        h, carry = self.layers.one(self.embed.initial(n, c, dropped), self.start(n))
        return self.readout(h), carry

    def one(
        self, x: Array, c: Array | None, dropped: Array | None, carry: tuple[Carry, ...]
    ) -> tuple[Array, tuple[Carry, ...]]:
        """Outputs for the step after event x [n, *event], and the carry."""
        h, carry = self.layers.one(self.embed.one(x, c, dropped), carry)
        return self.readout(h), carry

    def __call__(
        self,
        x: Array,
        c: Array | None,
        dropped: Array | None,
        carry: tuple[Carry, ...],
        last: Array,
        started: Array,
        key: Key | None = None,
        rate: Any = 0.0,
    ) -> tuple[Array, tuple[Carry, ...]]:
        """Outputs of all steps of x [B, T, *event], [B, T, n_outputs], and the carry after them.

        Where `started` [B], x goes on from an event `last` [B, *event], before which the carry was
        `carry`.
        """
        keys: Any = (None, None, None) if key is None else jax.random.split(key, 3)
        first = jnp.where(
            started[:, None],
            self.embed.one(last, c, dropped),
            self.embed.initial(x.shape[0], c, dropped),
        )
        inputs = self.embed(x, c, dropped).at[:, 0].set(first)
        h, carry = self.layers(dropout(keys[0], inputs, rate), carry, keys[1], rate)
        h = dropout(keys[2], h, rate)
        return self.readout(h.reshape(-1, h.shape[-1])).reshape(*h.shape[:2], -1), carry
