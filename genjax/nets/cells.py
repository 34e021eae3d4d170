"""Recurrent cells: one step of the vanilla network, the LSTM and the GRU, without its products."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError, unknown_name
from genjax.protocol import Array

# What a layer carries from step to step, each [B, d]; the first entry is h, the output.
Carry = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One step of a recurrent layer without its matrix products, which is elementwise.

    Attributes:
        step: (a, u, carry) -> carry, where a = x W + b and u = h U (+ c for the last gates), each
            [B, n_gates d].
        n_gates: how many vectors of d the products give.
        n_carry: how many vectors of d are carried; the first is h.
        n_biased: how many of the last gates have a bias of their own in u.
        summed: whether `step` sees a and u as their sum a + u only, which has a faster way back
            (see `over_time`).
        bias: the initial b of each gate; (b,) is for all.
        keeper: which gate keeps the past when it is open, of those that `bias` lists; None where
            there is none.

    Raises:
        ConfigError: for a `summed` cell with gates that have a bias of their own in u, and for
            another number of biases than gates.
    """

    step: Callable[[Array, Array, Carry], Carry]
    n_gates: int
    n_carry: int = 1
    n_biased: int = 0
    summed: bool = False
    # What is traced, as a sweep does, cannot be compared, and no program depends on it.
    bias: tuple[float, ...] = dataclasses.field(default=(0.0,), compare=False)
    keeper: int | None = None

    def __post_init__(self) -> None:
        if self.summed and self.n_biased:
            raise ConfigError(
                "a cell that sees a + u has one bias: with summed, n_biased must be 0; got "
                f"{self.n_biased}."
            )
        if len(self.bias) == 1:
            object.__setattr__(self, "bias", self.bias * self.n_gates)
        if len(self.bias) != self.n_gates:
            raise ConfigError(
                f"a cell of {self.n_gates} gates has as many biases, or one for all; got "
                f"{len(self.bias)}."
            )


def vanilla_step(a: Array, u: Array, carry: Carry) -> Carry:
    """h' = tanh(x W + h U + b). Elman 1990."""
    return (jnp.tanh(a + u),)


def lstm_step(a: Array, u: Array, carry: Carry) -> Carry:
    """(i, f, g, o) = x W + h U + b;  c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c').

    Hochreiter & Schmidhuber 1997 with the forget gate of Gers 2000, without peepholes. b of f
    starts at 1 (Jozefowicz 2015).
    """
    i, f, g, o = jnp.split(a + u, 4, axis=-1)
    c = jax.nn.sigmoid(f) * carry[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru_step(a: Array, u: Array, carry: Carry) -> Carry:
    """r, z = σ(x W + h U + b);  n = tanh(x W_n + b_n + r (h U_n + c_n));  h' = (1 - z) n + z h.

    Cho 2014 resets h before its product, (r h) U_n; this is the form of cuDNN (and, without c_n, of
    Flax), which resets after it, so that one product serves all three gates.
    """
    a_gates, a_n = jnp.split(a, [2 * (a.shape[-1] // 3)], axis=-1)
    u_gates, u_n = jnp.split(u, [2 * (u.shape[-1] // 3)], axis=-1)
    r, z = jnp.split(jax.nn.sigmoid(a_gates + u_gates), 2, axis=-1)
    n = jnp.tanh(a_n + r * u_n)
    return (n + z * (carry[0] - n),)


CELLS = {
    "vanilla": Cell(vanilla_step, 1, summed=True),
    "lstm": Cell(lstm_step, 4, n_carry=2, summed=True, bias=(0.0, 1.0, 0.0, 0.0), keeper=1),
    "gru": Cell(gru_step, 3, n_biased=1, bias=(0.0, 0.0, 0.0), keeper=1),
}


def check_step(cell: Cell, d: int) -> None:
    """Try the step of a cell of one's own on shapes of d units.

    Raises:
        ConfigError: if it does not take and give what the cell says.
    """
    if any(cell.step is own.step for own in CELLS.values()):
        return
    one = jax.ShapeDtypeStruct((1, d), jnp.float32)
    gates = jax.ShapeDtypeStruct((1, cell.n_gates * d), jnp.float32)
    wanted = (
        f"The step of a cell of n_gates={cell.n_gates} and n_carry={cell.n_carry} must make of "
        f"a, u [B, {cell.n_gates} d] and a carry, {cell.n_carry} x [B, d], such a carry"
    )
    try:
        found = jax.eval_shape(cell.step, gates, gates, (one,) * cell.n_carry)
    except Exception as error:  # whatever somebody's function raises
        raise ConfigError(f"{wanted}; it raised {error!r:.200}") from error
    shapes = [jnp.shape(leaf) for leaf in found] if isinstance(found, tuple) else found
    if shapes != [one.shape] * cell.n_carry:
        raise ConfigError(f"{wanted}; for B = 1, d = {d} it gave {shapes!r:.200}.")


def cell_of(cell: str | Cell, forget_bias: float | None = None) -> Cell:
    """A cell by name, or the one that is given; with `forget_bias` as the initial bias of the gate
    that keeps the past.

    Raises:
        ConfigError: for an unknown name, and for a bias of a gate that the cell does not have.
    """
    if not isinstance(cell, Cell):
        if cell not in CELLS:
            raise unknown_name("cell", cell, CELLS)
        cell = CELLS[cell]
    if forget_bias is None:
        return cell
    if cell.keeper is None:
        raise ConfigError(
            "forget_bias is for a cell with a gate that keeps the past, as lstm and gru have; got "
            f"{forget_bias}."
        )
    bias = (forget_bias if i == cell.keeper else b for i, b in enumerate(cell.bias))
    return dataclasses.replace(cell, bias=tuple(bias))


def gate_labels(pattern: str, cell: Cell) -> tuple[tuple[str, str], ...]:
    """`Model.labels` of the matrices that a pattern finds, which hold those of all gates."""
    return ((pattern, f"matrix:{','.join('1' * cell.n_gates)}"),)
