"""Recurrent networks: p(x) = Π_t p(x_t | x_<t), the past being summed up in a vector h.

Elman 1990 (the vanilla cell), Hochreiter & Schmidhuber 1997 (LSTM), Cho 2014 (GRU), Graves 2013
(sequences of tokens and, by mixtures of Gaussians, of vectors), Williams & Peng 1990 (truncated
back-propagation through time). The network is in `nets/recurrent.py`, and what makes a model of it
in `parts/autoregressive.py`.
"""

from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from genjax import nets
from genjax.nets.cells import Cell, cell_of, gate_labels
from genjax.nets.functional import Net, functional
from genjax.parts.autoregressive import SequenceNet, Windows, autoregressive, check_sequences
from genjax.parts.likelihoods import emission
from genjax.protocol import Array, DataSpec, Key, Model, PyTree
from genjax.settings import (
    CondDropout,
    Count,
    Depth,
    Dtype,
    Finite,
    Rate,
    Remat,
    Whole,
    builder,
    guided_by,
)


def start(spec: DataSpec, net: Net, p: Any, n: int, dtype: Any) -> PyTree:
    """What n streams carry before their first window: the layers' carry, the last event, and
    whether there is one.
    """
    return {
        "layers": net.apply(p, {}, n, method="start")[0],
        "last": jnp.zeros((n, *spec.shape[1:]), dtype),
        "started": jnp.zeros(n, bool),
    }


def window(
    net: Net,
    dropout: Any,
    p: Any,
    carry: PyTree,
    x: Array,
    c: Array | None,
    dropped: Array | None,
    key: Key | None,
) -> tuple[Array, PyTree]:
    """Outputs [B, T, n_outputs] for windows x [B, T, *event], and what is carried after them."""
    before = (carry["layers"], carry["last"], carry["started"])
    outputs, layers = net.apply(p, {}, x, c, dropped, *before, key, dropout)[0]
    last = x[:, -1].astype(carry["last"].dtype)
    return outputs, {"layers": layers, "last": last, "started": jnp.ones(x.shape[0], bool)}


def sequence_net(spec: DataSpec, net: Net, cell: Cell, dropout: Any) -> SequenceNet:
    """A `RecurrentNet` as `autoregressive` wants it."""
    windows = Windows(partial(start, spec, net), partial(window, net, dropout))

    def init(key: Key) -> Any:
        return net.init(key)[0]

    def outputs(p: Any, x: Array, *given: Any) -> Array:
        fresh = windows.start(p, x.shape[0], x.dtype)
        return windows.outputs(p, fresh, x, *given)[0]

    def begin(p: Any, n: int, c: Array | None, dropped: Array | None) -> tuple[Array, PyTree]:
        return net.apply(p, {}, n, c, dropped, method="begin")[0]

    def advance(
        p: Any, carry: PyTree, x: Array, c: Array | None, dropped: Array | None
    ) -> tuple[Array, PyTree]:
        return net.apply(p, {}, x, c, dropped, carry, method="one")[0]

    of_gates = gate_labels(r"/layers/layers/\d+/(inputs/)?kernel$", cell)
    labels = (*nets.sequence.embedding_labels(spec), *of_gates)
    return SequenceNet(init, outputs, begin, advance, windows=windows, labels=labels)


@builder
def rnn(
    spec: DataSpec,
    *,
    cell: Literal["vanilla", "lstm", "gru"] | Cell = "lstm",
    d_embed: Count = 64,
    d_hidden: Count = 128,
    n_layers: Depth = 1,
    dropout: Rate = 0.0,
    forget_bias: Finite | None = None,
    n_components: Count = 1,
    lanes: Whole = 0,
    restart: Rate = 0.0,
    remat: Remat = "none",
    cond_dropout: CondDropout = 0.0,
    dtype: Dtype = "float32",
) -> Model:
    """A recurrent network over the events of a sequence; conditional if the spec has a condition.

    With h_t = cell(W e(x_{t-1}) + V c, h_{t-1}) and e(x_0) a learned start, p(x_t | x_<t, c) is the
    distribution that fits the data (`likelihoods.emission`) with parameters linear in the last
    layer's h_t. The loss per example is -Σ_t ln p(x_t | x_<t, c) in nats over the steps that count
    (`protocol.step_mask`). `log_prob` is the same, negated, without dropout, and exact. Shapes: x
    [B, T, *event], h [B, d_hidden].

    Truncated back-propagation through time: with `lanes` = L > 0 the batches must hold L examples,
    the windows of L streams, each going on from the window that the batch before had in the same
    place (a source's `order` sees to it). The carry and the last event of each stream are kept in
    `state`; values go through as in one long sequence, gradients stop at the window's edge.
    `log_prob` and `sample` always begin afresh.

    `autoregressive` has all that `protocol.Autoregressive` says, `stream` too. The cost of a step
    of `advance` does not depend on how many came before. `noise` gives a
    `parts.autoregressive.SequenceNoise`.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, rnn
        >>> spec = DataSpec((5,), "tokens", levels=3, step="symbol")
        >>> model = rnn(spec, cell="gru", d_embed=4, d_hidden=8)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 2).shape
        (2, 5)

    Args:
        spec: the data; a sequence of any kind.
        cell: of every layer; in Python any `Cell`.
        d_embed: the size of an event as a vector.
        d_hidden: the size d of h.
        n_layers: how many layers, one on top of the other.
        dropout: rate, applied to the embedded events, between the layers and before the readout
            (Zaremba 2014).
        forget_bias: the initial bias of the gate that keeps the past, for memories that are long
            from the start: the LSTM's forget gate (1 unless given, Jozefowicz 2015) or the GRU's
            update gate (0 unless given).
        n_components: Gaussians in the mixture that continuous events have.
        lanes: L; 0 means that every example begins with h_0 = 0.
        restart: for lanes: how likely a stream begins a window as if it were its first, so that
            beginnings are learned too.
        remat: "full" keeps only the input and the carry of each step and computes its products and
            gates again on the way back, for less memory where sequences are long; "dots" keeps the
            products. The inputs' product is then one of each step, which takes longer.
        cond_dropout: how often training leaves out the condition, which guidance needs (Ho &
            Salimans 2022).
        dtype: of the network's arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data, and for a batch that
            does not fill the lanes.
    """
    check_sequences(spec, "A recurrent network")
    emit = emission(spec, n_components)
    guided = guided_by(spec, cond_dropout)
    sizes = (d_embed, d_hidden, n_layers, emit.n_outputs)
    net, chosen = nets.recurrent.RecurrentNet, cell_of(cell, forget_bias)
    module = partial(net, spec, chosen, *sizes, guided, remat)
    return autoregressive(
        spec,
        emit,
        sequence_net(spec, functional(module, dtype, nets.sequence.EVENTS), chosen, dropout),
        player="rnn",
        cond_dropout=cond_dropout,
        lanes=lanes,
        restart=restart,
    )
