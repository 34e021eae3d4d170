"""A network over sequences as a generative model, p(x | c) = Π_t p(x_t | x_<t, c): once, for every
family of such models.

A family describes its network as a `SequenceNet`, functions of parameters p, and `autoregressive`
makes the `Model`: the loss, scores of whole sequences and of their steps, generation, dropout of
conditions, windows of long streams. Data that are no sequences, such as images, are modelled as one
by their `steps`, and a network without a cache is computed anew for every step (`recomputed`).
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax.checks import check_batch, check_cond, check_events, checked
from genjax.errors import ConfigError
from genjax.parts.decoding import check_position, in_room, make_generate
from genjax.parts.likelihoods import Emission
from genjax.protocol import (
    Array,
    Autoregressive,
    Aux,
    Batch,
    DataSpec,
    Key,
    Metrics,
    Model,
    Params,
    PyTree,
    State,
    step_mask,
    without_padding,
)
from genjax.settings import guided_by


class Windows(NamedTuple):
    """A network over windows of n long streams, each going on from the one before it.

    Attributes:
        start: (p, n, dtype) -> what is carried before the first window; `dtype` is that of x.
        outputs: (p, carry, x, c, dropped, key) -> outputs as those of `SequenceNet`, and the carry
            after the window.
    """

    start: Callable[..., PyTree]
    outputs: Callable[..., tuple[Array, PyTree]]


class SequenceNet(NamedTuple):
    """A causal network over sequences x [B, T, *event] as functions of its parameters p: outputs t
    depend on the events before t only.

    Conditions c [B, E] are vectors (`DataSpec.embed`) or None; `dropped` bool [B] says which
    examples go without theirs, None that none does.

    Attributes:
        init: (key) -> p.
        outputs: (p, x, c, dropped, key) -> outputs for every step, [B, T, n_outputs]. With a key in
            training mode, with None in evaluation mode.
        begin: (p, n, c, dropped) -> outputs for the first step, [n, n_outputs], and a carry, whose
            leaves have n as their first axis or are scalars.
        advance: (p, carry, x [n, *event], c, dropped) -> outputs for the step after x, and a carry.
        context: the longest sequence that it can see; None for any.
        windows: the same over windows of long streams; None where it cannot go on from another.
        labels: what its parameters are, as in `Model.labels`.
    """

    init: Callable[[Key], Any]
    outputs: Callable[..., Array]
    begin: Callable[..., tuple[Array, PyTree]]
    advance: Callable[..., tuple[Array, PyTree]]
    context: int | None = None
    windows: Windows | None = None
    labels: tuple[tuple[str, str], ...] = ()


class SequenceModel(NamedTuple):
    """What an autoregressive model consists of; the arguments of `autoregressive`.

    Attributes:
        spec: the data, as they come and go.
        steps: the same data as sequences.
        emit: the distribution of an event that the network's outputs describe.
        net: the network.
        player: its name in `params`.
        cond_dropout: how often training leaves out the condition.
        guided: whether it ever does.
        lanes: how many streams are carried from batch to batch; 0 for none.
        restart: how often one of them begins afresh.
    """

    spec: DataSpec
    steps: DataSpec
    emit: Emission
    net: SequenceNet
    player: str
    cond_dropout: Any
    guided: bool
    lanes: int
    restart: Any


class SequenceNoise(NamedTuple):
    """What the loss of an autoregressive model draws for a batch.

    Attributes:
        net: the key that the network gets, for its dropout.
        dropped: which examples go without their condition, bool [B]; None if none ever does.
        restart: which streams begin afresh, bool [B]; None without lanes.
    """

    net: Key
    dropped: Array | None
    restart: Array | None


def recomputed(spec: DataSpec, outputs: Callable[..., Array]) -> tuple[Callable, Callable]:
    """The `begin` and `advance` of a network that keeps nothing from step to step: all outputs are
    computed at every step, of which there are at most spec.shape[0] (its context).
    """

    def begin(p: Any, n: int, c: Array | None, dropped: Array | None) -> tuple[Array, PyTree]:
        x = jnp.zeros((n, *spec.shape), spec.dtype)
        carry = {"x": x, "position": jnp.zeros((), jnp.int32)}
        return outputs(p, x, c, dropped, None)[:, 0], carry

    def advance(
        p: Any, carry: PyTree, x: Array, c: Array | None, dropped: Array | None
    ) -> tuple[Array, PyTree]:
        at, seen = carry["position"], carry["x"]
        check_position(at + 1, spec.shape[0])
        seen = jax.lax.dynamic_update_index_in_dim(seen, x.astype(seen.dtype), at, axis=1)
        found = outputs(p, seen, c, dropped, None)
        here = jax.lax.dynamic_index_in_dim(found, at + 1, axis=1, keepdims=False)
        here = in_room(here, at + 1, spec.shape[0])
        return here, {"x": seen, "position": at + 1}

    return begin, advance


# --- checks ---------------------------------------------------------------------------------------


def check_sequences(spec: DataSpec, who: str) -> None:
    """Refuse data that are no sequences.

    Raises:
        ConfigError: naming the family, and what to do instead.
    """
    if spec.step is None:
        raise ConfigError(
            f"{who} models sequences, and {spec.name} has no steps: take a model of single events, "
            f"such as vae, or data with steps (in Python a DataSpec with `step`)."
        )


def check_streams(spec: DataSpec, net: SequenceNet, lanes: int) -> None:
    """Refuse lanes where there are no endless streams, or no windows of them.

    Raises:
        ConfigError: see the text.
    """
    if lanes and (spec.end is not None or spec.lengths):
        raise ConfigError(
            "lanes is how many endless streams there are, or 0 for sequences of their own; got "
            f"lanes={lanes} with sequences that end."
        )
    if lanes and net.windows is None:
        raise ConfigError(f"lanes={lanes} needs a network with `windows`; leave lanes at 0.")


def check_lanes(lanes: int, n: int) -> None:
    """Refuse a batch of n examples that does not fill the lanes.

    Raises:
        ConfigError: with both numbers.
    """
    if n != lanes:
        raise ConfigError(
            f"This model carries the state of {lanes} streams, so a batch must hold {lanes} "
            f"examples; got {n}. Set batch_size to lanes, and do not split batches (microbatches); "
            "or build the model with lanes=0."
        )


# --- the loss -------------------------------------------------------------------------------------


def draw(model: SequenceModel, key: Key, batch: Batch) -> SequenceNoise:
    """The randomness of the loss: the only place that splits its key."""
    n, dropped, restart = batch.x.shape[0], None, None
    key_net, key_cond, key_restart = jax.random.split(key, 3)
    if model.guided:
        dropped = jax.random.bernoulli(key_cond, model.cond_dropout, (n,))
    if model.lanes:
        restart = jax.random.bernoulli(key_restart, model.restart, (n,))
    return SequenceNoise(key_net, dropped, restart)


def check_room(model: SequenceModel, length: int) -> None:
    """Refuse sequences longer than the network can see.

    Raises:
        ConfigError: with both lengths.
    """
    if model.net.context is not None and length > model.net.context:
        raise ConfigError(
            f"This model of {model.spec.name} has room for {model.net.context} steps; got "
            f"sequences of {length}."
        )


def event_of(spec: DataSpec) -> DataSpec:
    """One step of a sequence as an event of its own."""
    return dataclasses.replace(spec, shape=spec.shape[1:], step=None, end=None, lengths=False)


def in_steps(model: SequenceModel, batch: Batch) -> Batch:
    """The batch with its data as sequences, x [B, T, *event]."""
    if model.steps is model.spec:
        return batch
    return batch._replace(x=batch.x.reshape(batch.x.shape[0], *model.steps.shape))


def step_nats(model: SequenceModel, batch: Batch, outputs: Array) -> Array:
    """ln p(x_t | x_<t, c) [B, T] of sequences, 0 where padded."""
    return jnp.where(step_mask(model.steps, batch), model.emit.log_prob(batch.x, outputs), 0)


def summed(model: SequenceModel, batch: Batch, nats: Array) -> tuple[Array, Metrics]:
    """-Σ_t ln p(x_t | x_<t, c) in nats, [B], and the same for each step that counts."""
    steps = step_mask(model.steps, batch).sum(1).astype(nats.dtype)
    return -nats.sum(1), {"nats_per_step": -nats.sum(1) / steps}


def restarted(again: Array | None, fresh: PyTree, carry: PyTree) -> PyTree:
    """The carry, replaced by a fresh one for the examples of `again`, bool [n]; None is none."""
    if again is None:
        return carry

    def one(new: Array, old: Array) -> Array:
        here = again.reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(here, new.astype(old.dtype), old)

    return jax.tree.map(one, fresh, carry)


def continued(
    windows: Windows, p: Any, carry: PyTree, x: Array, c: Array | None, noise: SequenceNoise
) -> tuple[Array, PyTree]:
    """Outputs for windows that go on from `carry`, and the carry after them.

    Values go through as in one long sequence, gradients stop at the windows' edges: truncated
    back-propagation through time (Williams & Peng 1990).
    """
    fresh = windows.start(p, x.shape[0], x.dtype)
    before = jax.lax.stop_gradient(restarted(noise.restart, fresh, carry))
    outputs, after = windows.outputs(p, before, x, c, noise.dropped, noise.net)
    return outputs, jax.lax.stop_gradient(after)


# --- the functions of a Model, and of its record --------------------------------------------------


def init(model: SequenceModel, key: Key) -> tuple[Params, State]:
    """New parameters, and what streams carry before the first batch."""
    p, windows = model.net.init(key), model.net.windows
    carry = {}
    if windows is not None and model.lanes:
        carry = windows.start(p, model.lanes, model.spec.dtype)
    return {model.player: p}, {model.player: carry}


def loss(
    model: SequenceModel, params: Params, state: State, batch: Batch, key: Key, step: Array
) -> tuple[Array, Aux]:
    """The negative log-likelihood of each example in training mode."""
    batch, net, p = in_steps(model, batch), model.net, params[model.player]
    c, noise = model.spec.embed(batch.cond, p), draw(model, key, batch)
    if net.windows is not None and model.lanes:
        check_lanes(model.lanes, batch.x.shape[0])
        before = state[model.player]
        found, carry = continued(net.windows, p, before, batch.x, c, noise)
        state = {model.player: carry}
    else:
        found = net.outputs(p, batch.x, c, noise.dropped, noise.net)
    value, metrics = summed(model, batch, step_nats(model, batch, found))
    return value, Aux(state, metrics)


def outputs(
    model: SequenceModel,
    params: Params,
    state: State,
    x: Array,
    cond: Any = None,
    dropped: Array | None = None,
) -> Array:
    """The parameters of p(x_t | x_<t, c), [B, T, n_outputs]."""
    check_events(model.spec, x, any_length=model.spec.step is not None)
    check_cond(model.spec, cond, x.shape[0])
    return outputs_of(model, params, Batch(x, cond), dropped)


def outputs_of(
    model: SequenceModel, params: Params, batch: Batch, dropped: Array | None = None
) -> Array:
    """The same of a batch that was looked at."""
    x, c = in_steps(model, batch).x, model.spec.embed(batch.cond, params)
    check_room(model, x.shape[1])
    return model.net.outputs(params[model.player], x, c, dropped, None)


def step_log_prob(model: SequenceModel, params: Params, state: State, batch: Batch) -> Array:
    """ln p(x_t | x_<t, c) [B, T] in nats, 0 where padded."""
    check_batch(model.spec, batch, any_length=model.spec.step is not None)
    batch = without_padding(model.spec, batch)
    found = outputs_of(model, params, batch)
    return step_nats(model, in_steps(model, batch), found)


def log_prob(model: SequenceModel, params: Params, state: State, batch: Batch, key: Key) -> Array:
    """ln p(x | c) [B] in nats."""
    return step_log_prob(model, params, state, batch).sum(1)


def stream(
    model: SequenceModel, params: Params, carry: PyTree | None, batch: Batch
) -> tuple[Array, PyTree]:
    """`step_log_prob` of windows that go on from `carry`, or begin where it is None; and the carry
    after them.
    """
    check_batch(model.spec, batch, any_length=model.spec.step is not None)
    batch = in_steps(model, without_padding(model.spec, batch))
    windows, p = model.net.windows, params[model.player]
    assert windows is not None, "the record has no `stream` without windows"
    if carry is None:
        carry = windows.start(p, batch.x.shape[0], batch.x.dtype)
    c = model.spec.embed(batch.cond, p)
    found, carry = windows.outputs(p, carry, batch.x, c, None, None)
    return step_nats(model, batch, found), carry


def begin(
    model: SequenceModel,
    params: Params,
    state: State,
    n: int,
    cond: Any = None,
    dropped: Array | None = None,
) -> tuple[Array, PyTree]:
    """Outputs for the first step of n sequences, and a carry."""
    check_cond(model.spec, cond, n)
    return model.net.begin(params[model.player], n, model.spec.embed(cond, params), dropped)


def advance(
    model: SequenceModel,
    params: Params,
    state: State,
    carry: PyTree,
    x: Array,
    cond: Any = None,
    dropped: Array | None = None,
) -> tuple[Array, PyTree]:
    """Outputs for the step after the events x, and a carry."""
    check_events(event_of(model.steps), x)
    check_cond(model.spec, cond, x.shape[0])
    c = model.spec.embed(cond, params)
    return model.net.advance(params[model.player], carry, x, c, dropped)


def in_events(spec: DataSpec, generate: Callable[..., Array]) -> Callable[..., Array]:
    """A `generate` of steps with results in the event's own shape, unless a length is asked for."""

    @functools.wraps(generate)
    def whole(*args: Any, length: int | None = None, **how: Any) -> Array:
        x = generate(*args, length=length, **how)
        return x.reshape(-1, *spec.shape) if length is None else x

    return whole


def record(model: SequenceModel) -> Autoregressive:
    """What the model offers beside scores and samples."""
    first, further = partial(begin, model), partial(advance, model)
    draw_event, context = model.emit.sample, model.net.context
    generate = make_generate(model.steps, first, further, draw_event, context, model.guided)
    if model.steps is not model.spec:
        generate = in_events(model.spec, generate)
    return Autoregressive(
        generate=generate,
        begin=first,
        advance=further,
        step_log_prob=partial(step_log_prob, model),
        outputs=partial(outputs, model),
        stream=None if model.net.windows is None else partial(stream, model),
        context=context,
        guided=model.guided and model.spec.kind != "continuous",
    )


def autoregressive(
    spec: DataSpec,
    emit: Emission,
    net: SequenceNet,
    *,
    player: str,
    cond_dropout: Any = 0.0,
    lanes: int = 0,
    restart: Any = 0.0,
    steps: DataSpec | None = None,
) -> Model:
    """The model that a network over sequences is, with exact likelihoods.

    The loss per example is -Σ_t ln p(x_t | x_<t, c) in nats over the steps that count
    (`protocol.step_mask`), in training mode; `log_prob` is the same, negated, in evaluation mode.
    `Model.autoregressive` has `generate` (`decoding.make_generate`), `begin`, `advance`, `outputs`,
    `step_log_prob` and, where the network has windows, `stream`; `noise` gives a `SequenceNoise`.

    With `lanes` = L > 0 the batches must hold L examples, the windows of L streams, each going on
    from the window that the batch before had in the same place (a source's `order` sees to it).
    What the windows carry is the model's `state`; scores and samples always begin afresh.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from genjax import DataSpec
        >>> from genjax.parts.autoregressive import SequenceNet, autoregressive, recomputed
        >>> from genjax.parts.likelihoods import emission
        >>> spec = DataSpec((4,), "tokens", levels=3, step="symbol")
        >>> def outputs(p, x, c, dropped, key):  # logits that depend on the position alone
        ...     return jnp.broadcast_to(p, (len(x), 4, 3))
        >>> net = SequenceNet(lambda key: jnp.zeros((4, 3)), outputs, *recomputed(spec, outputs), 4)
        >>> model = autoregressive(spec, emission(spec), net, player="toy")
        >>> model.sample(*model.init(jax.random.key(0)), jax.random.key(1), 2).shape
        (2, 4)

    Args:
        spec: the data.
        emit: the distribution of an event that outputs describe, such as `emission(steps)`.
        net: the network.
        player: its name in `params`.
        cond_dropout: how often training leaves out the condition, which guidance needs.
        lanes: L; 0 means that every example begins afresh.
        restart: for lanes: how often a stream begins a window as if it were its first.
        steps: the same data as sequences, for data that are none: a spec of the same values in the
            same order, such as pixels [H W, C] of images [H, W, C]. Prompts and everything per step
            have that shape; data go in and samples come out in their own.

    Raises:
        ConfigError: for lanes of sequences that end or of a network without windows, and for a
            batch that does not fill them.
    """
    check_streams(spec, net, lanes)
    model = SequenceModel(
        spec=spec,
        steps=steps or spec,
        emit=emit,
        net=net,
        player=player,
        cond_dropout=cond_dropout,
        guided=guided_by(spec, cond_dropout),
        lanes=lanes,
        restart=restart,
    )
    own = record(model)

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        return own.generate(params, state, key, n, cond)

    return checked(
        Model(
            spec=spec,
            init=partial(init, model),
            losses={player: partial(loss, model)},
            sample=sample,
            log_prob=partial(log_prob, model),
            estimator="exact",
            labels=net.labels,
            noise={player: partial(draw, model)},
            autoregressive=own,
        )
    )
