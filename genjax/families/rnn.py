"""Recurrent networks: p(x) = Π_t p(x_t | x_<t), the past being summed up in a vector h.

Elman 1990 (the vanilla cell), Hochreiter & Schmidhuber 1997 (LSTM), Cho 2014 (GRU), Graves 2013
(sequences of tokens and, by mixtures of Gaussians, of vectors), Williams & Peng 1990 (truncated
back-propagation through time).
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from genjax.checks import check_cond, checked
from genjax.errors import ConfigError, unknown_name
from genjax.nets.functional import functional
from genjax.nets.recurrent import Cell, RecurrentNet, cell_of
from genjax.parts.decoding import generator
from genjax.parts.likelihoods import emission
from genjax.protocol import (
    Array,
    Aux,
    Batch,
    DataSpec,
    Key,
    Model,
    Params,
    PyTree,
    State,
    step_mask,
)


def rnn(
    spec: DataSpec,
    *,
    cell: Literal["vanilla", "lstm", "gru"] | Cell = "lstm",
    d_embed: int = 64,
    d_hidden: int = 128,
    n_layers: int = 1,
    dropout: float = 0.0,
    forget_bias: float | None = None,
    n_components: int = 1,
    lanes: int = 0,
    restart: float = 0.0,
    remat: bool = False,
    cond_dropout: float = 0.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Model:
    """A recurrent network over the events of a sequence; conditional if the spec has a condition.

    With h_t = cell(W e(x_{t-1}) + V c, h_{t-1}) and e(x_0) a learned start, p(x_t | x_<t, c) is the
    distribution that fits the data (`distributions.emission`) with parameters linear in the last
    layer's h_t. The loss per example is -Σ_t ln p(x_t | x_<t, c) in nats over the steps that count
    (`protocol.step_mask`). `log_prob` is the same, negated, without
    dropout, and exact. Shapes: x [B, T, *event], h [B, d_hidden].

    Truncated back-propagation through time: with `lanes` = L > 0 the batches must hold L examples,
    the windows of L streams, each going on from the window that the batch before had in the same
    place (a source's `order` sees to it). The carry and the last event of each stream are kept in
    `state`; values go through as in one long sequence, gradients stop at the window's edge.
    `log_prob` and `sample` always begin afresh.

    Extras:
        step_log_prob: (params, state, batch) -> ln p(x_t | x_<t) [B, T], 0 where padded.
        stream: (params, carry, batch) -> the same, and the carry: windows that go on from each
            other; `carry` None at first.
        begin: (params, state, n, cond=None, dropped=None) -> outputs [n, n_outputs] for the first
            step, and a carry.
        advance: (params, state, carry, x [n, *event], cond=None, dropped=None) -> outputs for the
            step after x, and a carry.
        generate: see `decoding.generator`; the cost of a step does not depend on how many came
            before.
    In these, `dropped` bool [n] says which examples go without their condition.

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
        remat: keep only the input and the carry of each step and compute its products and gates
            again on the way back, for less memory where sequences are long; the inputs' product is
            then one of each step, which takes longer.
        cond_dropout: how often training leaves out the condition, which guidance needs (Ho &
            Salimans 2022).
        dtype: of the network's arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data, and for a batch that
            does not fill the lanes.
    """
    if spec.step is None:
        raise ConfigError(
            f"A recurrent network models sequences; {spec.name} has no steps. Give its DataSpec "
            "`step`."
        )
    if dtype not in ("float32", "bfloat16"):
        raise unknown_name("dtype", dtype, ("float32", "bfloat16"))
    sizes = {
        "d_embed": d_embed,
        "d_hidden": d_hidden,
        "n_layers": n_layers,
        "n_components": n_components,
    }
    for label, number in sizes.items():
        if number < 1:
            raise ConfigError(f"{label} must be at least 1; got {number}.")
    for label, rate in {
        "dropout": dropout,
        "restart": restart,
        "cond_dropout": cond_dropout,
    }.items():
        if isinstance(rate, int | float) and not 0 <= rate < 1:
            raise ConfigError(f"{label} must be in [0, 1); got {rate}.")
    if lanes < 0 or (lanes and (spec.end is not None or spec.lengths)):
        found = f"lanes={lanes}" if lanes < 0 else f"lanes={lanes} with sequences that end"
        raise ConfigError(
            "lanes is how many endless streams there are, or 0 for sequences of their own; got "
            f"{found}."
        )
    emit = emission(spec, n_components)
    guided = isinstance(cond_dropout, Tracer) or cond_dropout > 0
    sizes_of = (d_embed, d_hidden, n_layers, emit.n_outputs)
    net = functional(
        partial(RecurrentNet, spec, cell_of(cell, forget_bias), *sizes_of, guided, remat), dtype
    )

    def fresh(p: Any, n: int, dtype: Any = spec.dtype) -> State:
        """What goes from window to window, before the first: the layers' carry, the last event, and
        whether there is one.
        """
        last = jnp.zeros((n, *spec.shape[1:]), dtype)
        return {
            "layers": net.apply(p, {}, n, method="start")[0],
            "last": last,
            "started": jnp.zeros(n, bool),
        }

    def init(key: Key) -> tuple[Params, State]:
        params = net.init(key)[0]
        return {"rnn": params}, {"rnn": fresh(params, lanes) if lanes else {}}

    def condition(cond: Any) -> Array | None:
        return jax.nn.one_hot(cond, spec.n_classes) if spec.n_classes else cond

    def window(
        p: Any, carry: State, batch: Batch, dropped: Array | None = None, key: Key | None = None
    ) -> tuple[Array, State]:
        """ln p(x_t | x_<t, c) in nats [B, T], 0 where padded, and the carry after the window."""
        x, c, before = (
            batch.x,
            condition(batch.cond),
            (carry["layers"], carry["last"], carry["started"]),
        )
        outputs, layers = net.apply(p, {}, x, c, dropped, *before, key, dropout)[0]
        nats = jnp.where(step_mask(spec, batch), emit.log_prob(x, outputs), 0)
        return nats, {
            "layers": layers,
            "last": x[:, -1].astype(carry["last"].dtype),
            "started": jnp.ones(len(x), bool),
        }

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        p, n = params["rnn"], batch.x.shape[0]
        key_net, key_cond, key_restart = jax.random.split(key, 3)
        carry = fresh(p, n, batch.x.dtype)
        if lanes:
            if n != lanes:
                raise ConfigError(
                    f"This model carries the state of {lanes} streams, so a batch must hold "
                    f"{lanes} examples; got {n}. Set "
                    "batch_size to lanes, and do not split batches (microbatches); or build the "
                    "model with lanes=0."
                )
            again = jax.random.bernoulli(key_restart, restart, (n,))
            choose = lambda new, old: jnp.where(
                again.reshape(n, *[1] * (old.ndim - 1)), new.astype(old.dtype), old
            )  # noqa: E731
            carry = jax.lax.stop_gradient(jax.tree.map(choose, carry, state["rnn"]))
        dropped = jax.random.bernoulli(key_cond, cond_dropout, (n,)) if spec.conditional else None
        nats, carry = window(p, carry, batch, dropped, key_net)
        steps = step_mask(spec, batch).sum(1).astype(nats.dtype)
        after = {"rnn": jax.lax.stop_gradient(carry)} if lanes else state
        return -nats.sum(1), Aux(after, {"nats_per_step": -nats.sum(1) / steps})

    def stream(params: Params, carry: State | None, batch: Batch) -> tuple[Array, State]:
        p = params["rnn"]
        return window(
            p, fresh(p, batch.x.shape[0], batch.x.dtype) if carry is None else carry, batch
        )

    def step_log_prob(params: Params, state: State, batch: Batch) -> Array:
        return stream(params, None, batch)[0]

    def log_prob(params: Params, state: State, batch: Batch, key: Key) -> Array:
        return step_log_prob(params, state, batch).sum(1)

    def begin(
        params: Params, state: State, n: int, cond: Any = None, dropped: Array | None = None
    ) -> tuple[Array, PyTree]:
        check_cond(spec, cond, n)
        return net.apply(params["rnn"], {}, n, condition(cond), dropped, method="begin")[0]

    def advance(
        params: Params,
        state: State,
        carry: PyTree,
        x: Array,
        cond: Any = None,
        dropped: Array | None = None,
    ) -> tuple[Array, PyTree]:
        return net.apply(params["rnn"], {}, x, condition(cond), dropped, carry, method="one")[0]

    generate = generator(spec, begin, advance, emit.sample, guided=guided)

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        return generate(params, state, key, n, cond)

    return checked(
        Model(
            spec=spec,
            init=init,
            losses={"rnn": loss},
            sample=sample,
            log_prob=log_prob,
            estimator="exact",
            extras={
                "step_log_prob": step_log_prob,
                "stream": stream,
                "begin": begin,
                "advance": advance,
                "generate": generate,
            },
        )
    )
