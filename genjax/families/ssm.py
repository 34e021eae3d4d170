"""State space models and linear recurrent networks: p(x) = Π_t p(x_t | x_<t), the past being summed
up in a state that goes from step to step linearly, so that all steps of training are computed at
once.

Gu 2022 (S4D), Orvieto 2023 (LRU), Feng 2024 (minGRU), Dao & Gu 2024 (Mamba-2), Yang 2024 (gated
DeltaNet). One builder has them all, since they differ in the recurrence of a block only. The layers
are in `nets/ssm.py`, the recurrences in `nets/scans.py`, and what makes a model of them in
`parts/autoregressive.py`.
"""

from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from genjax import nets
from genjax.errors import ConfigError
from genjax.nets.functional import Net, functional
from genjax.nets.remat import rematerialised
from genjax.parts.autoregressive import SequenceNet, autoregressive, check_sequences
from genjax.parts.likelihoods import emission
from genjax.protocol import Array, DataSpec, Key, Model, PyTree
from genjax.settings import (
    CondDropout,
    Count,
    Depth,
    Dtype,
    Rate,
    Remat,
    Whole,
    Within,
    builder,
    guided_by,
    used,
)

CellName = Literal["s4d", "lru", "mingru", "mamba2", "deltanet"]
Share = Annotated[float, Within(1e-6, 1, below=True)]
# Which cell has which of the sizes, and what they are for a width of d unless given.
SIZES: dict[str, dict[str, Any]] = {
    "s4d": {"d_state": lambda d: 64},
    "lru": {"d_state": lambda d: 2 * d},
    "mingru": {"d_inner": lambda d: d, "conv": lambda d: 4},
    "mamba2": {
        "d_inner": lambda d: 2 * d,
        "d_state": lambda d: 64,
        "n_heads": lambda d: 4,
        "conv": lambda d: 4,
    },
    "deltanet": {
        "d_inner": lambda d: d,
        "d_state": lambda d: 32,
        "n_heads": lambda d: 4,
        "conv": lambda d: 4,
    },
}
WITH_FEED_FORWARD = ("mingru", "deltanet")


class Sizes(NamedTuple):
    """The sizes of a cell, 0 where it has none; see `ssm`."""

    d_inner: int = 0
    d_state: int = 0
    n_heads: int = 0
    conv: int = 0


class Layers(NamedTuple):
    """The networks of a state space model, and how they are put together. Its parameters p are
    {"inputs": ..., "blocks": {0: {"project": ..., "core": ..., "out": ..., "feed_forward": ...},
    1: ...}, "readout": ...}.

    Attributes:
        inputs, feed_forward, readout: networks of `nets/attention.py`; blocks may go without
            feed-forward layers.
        project, core, out: networks of `nets/ssm.py`.
        n_layers: how many blocks.
        dropout: rate, of the inputs and of what each half of a block adds.
        tied: whether the readout's matrix is the embedding's table.
        remat: what of a block's insides is computed again on the way back.
    """

    inputs: Net
    project: Net
    core: Net
    out: Net
    feed_forward: Net | None
    readout: Net
    n_layers: int
    dropout: Any
    tied: bool
    remat: str


def parts_of(layers: Layers) -> dict[str, Net]:
    """The networks of a block by name."""
    own = {"project": layers.project, "core": layers.core, "out": layers.out}
    if layers.feed_forward is not None:
        own["feed_forward"] = layers.feed_forward
    return own


def init(layers: Layers, key: Key) -> Any:
    """p of a new model."""
    key_inputs, key_readout, key_blocks = jax.random.split(key, 3)
    own = parts_of(layers)
    keys = jax.random.split(key_blocks, (layers.n_layers, len(own)))
    return {
        "inputs": layers.inputs.init(key_inputs)[0],
        "blocks": {
            index: {
                name: net.init(key)[0]
                for (name, net), key in zip(own.items(), keys[index], strict=True)
            }
            for index in range(layers.n_layers)
        },
        "readout": layers.readout.init(key_readout)[0],
    }


def block(
    layers: Layers,
    h: Array,
    p: Any,
    key: Key | None,
    carry: PyTree = None,
    method: str = "__call__",
) -> tuple[Array, PyTree]:
    """h + out(core(project(h))), and to that the feed-forward layers', and what the core carries
    on. `p` is the block's; without a key nothing is dropped; h is [B, T, d], or [n, d] for a step.
    """
    key_core, key_feed = (None, None) if key is None else jax.random.split(key)
    u, past = layers.project.apply(p["project"], {}, h)[0]
    given = () if carry is None else (carry,)
    y, carry = layers.core.apply(p["core"], {}, u, *given, method=method)[0]
    added = layers.out.apply(p["out"], {}, y, past)[0]
    h = h + nets.sequence.dropout(key_core, added, layers.dropout)
    if layers.feed_forward is not None:
        added = layers.feed_forward.apply(p["feed_forward"], {}, h)[0]
        h = h + nets.sequence.dropout(key_feed, added, layers.dropout)
    return h, carry


def read(layers: Layers, p: Any, h: Array) -> Array:
    """The parameters of the next event's distribution, [..., n_outputs], from the last h."""
    return nets.sequence.read(layers.readout, p, h, layers.tied)


def outputs(
    layers: Layers, p: Any, x: Array, c: Array | None, dropped: Array | None, key: Key | None
) -> Array:
    """The parameters of p(x_t | x_<t, c), [B, T, n_outputs]; with dropout where there is a key."""
    h = layers.inputs.apply(p["inputs"], {}, x, c, dropped)[0]
    keys: Any = [None] * (layers.n_layers + 1)
    if key is not None and used(layers.dropout):
        keys = jax.random.split(key, layers.n_layers + 1)
        h = nets.sequence.dropout(keys[-1], h, layers.dropout)

    def one(h: Array, p: Any, key: Key | None) -> Array:
        return block(layers, h, p, key)[0]

    one = rematerialised(one, layers.remat)
    for index, parameters in enumerate(nets.sequence.blocks_of(p, layers.n_layers)):
        h = one(h, parameters, keys[index])
    return read(layers, p, h)


# --- one step at a time ---------------------------------------------------------------------------


def step(layers: Layers, p: Any, h: Array, carries: PyTree) -> tuple[Array, PyTree]:
    """Outputs for the inputs h [n, d] of a step, and what each block carries on."""
    after = []
    for parameters, carry in zip(nets.sequence.blocks_of(p, layers.n_layers), carries, strict=True):
        h, carry = block(layers, h, parameters, None, carry, "step")
        after.append(carry)
    return read(layers, p, h), tuple(after)


def begin(
    layers: Layers, p: Any, n: int, c: Array | None, dropped: Array | None
) -> tuple[Array, PyTree]:
    """Outputs for the first step, and the carry after it."""
    h = layers.inputs.apply(p["inputs"], {}, n, c, dropped, method="initial")[0]
    starts = [
        layers.core.apply(parameters["core"], {}, n, h.dtype, method="start")[0]
        for parameters in nets.sequence.blocks_of(p, layers.n_layers)
    ]
    return step(layers, p, h, starts)


def advance(
    layers: Layers, p: Any, carry: PyTree, x: Array, c: Array | None, dropped: Array | None
) -> tuple[Array, PyTree]:
    """Outputs for the step after the events x [n, *event], and the carry after it."""
    nowhere = jnp.zeros((), jnp.int32)  # no position has a vector of its own
    h = layers.inputs.apply(p["inputs"], {}, x, c, dropped, nowhere, method="one")[0]
    return step(layers, p, h, carry)


# --- settings -------------------------------------------------------------------------------------


def sizes_of(cell: str, d_model: int, given: dict[str, int | None]) -> Sizes:
    """The sizes of a cell: those that are given, else its own.

    Raises:
        ConfigError: for a size that the cell does not have, and for sizes that do not fit.
    """
    own = SIZES[cell]
    for name, value in given.items():
        if value is not None and name not in own:
            having = ", ".join(other for other, sizes in SIZES.items() if name in sizes)
            raise ConfigError(
                f"{name} is for the cells {having}; the cell {cell} has none, got {value}. Leave "
                "it out, or say None where a recipe gives it."
            )
    asked = {name: value for name, value in given.items() if value is not None}
    found = Sizes(**{name: default(d_model) for name, default in own.items()} | asked)
    if found.n_heads and found.d_inner % found.n_heads:
        raise ConfigError(
            f"d_inner, which is {own['d_inner'](d_model)} unless given, must be a multiple of "
            f"n_heads; got {found.d_inner} and {found.n_heads}."
        )
    if cell in ("s4d", "lru") and found.d_state % 2:
        raise ConfigError(
            f"The states of {cell} are pairs of numbers, so d_state must be even; got "
            f"{found.d_state}."
        )
    return found


def mixer(
    cell: str, d: int, sizes: Sizes, rest: tuple[Any, ...], std: float
) -> tuple[partial, partial, partial]:
    """What builds `Project`, the core and the output of a cell; `rest` is what all cores take."""
    module, inner, n, heads = nets.ssm, sizes.d_inner, sizes.d_state, sizes.n_heads
    if cell == "s4d":
        core = partial(module.S4D, d, n // 2, *rest)
        return partial(module.Project, d, 0), core, partial(module.Glu, d, 0, std)
    if cell == "lru":
        core = partial(module.LRU, n // 2, *rest)
        return partial(module.Project, d, n), core, partial(module.Glu, d, n, std)
    if cell == "mingru":
        core = partial(module.MinGRU, inner, sizes.conv, *rest)
        return partial(module.Project, d, 2 * inner), core, partial(module.Plain, d, inner, std)
    if cell == "mamba2":
        core = partial(module.SSD, inner, n, heads, sizes.conv, *rest)
        project = partial(module.Project, d, inner + 2 * n + heads, inner)
        return project, core, partial(module.Gated, d, inner, 0, std)
    core = partial(module.Delta, inner, n, heads, sizes.conv, *rest)
    project = partial(module.Project, d, inner + 2 * n * heads + 2 * heads, inner)
    return project, core, partial(module.Gated, d, inner, heads, std)


def labels(spec: DataSpec, cell: str, d: int, sizes: Sizes) -> tuple[tuple[str, str], ...]:
    """What the parameters are, as `Model.labels` has it. What goes into a core is several numbers
    for each channel or head, and past it a gate, each by a matrix of its own.
    """
    inner, n, heads = sizes.d_inner, sizes.d_state, sizes.n_heads
    shares: dict[str, list[int]] = {
        "s4d": [],
        "lru": [n // 2, n // 2],
        "mingru": [inner, inner],
        "mamba2": [inner, n, n, heads, inner],
        "deltanet": [n * heads, n * heads, inner, heads, heads, inner],
    }
    fused = [("/out/dense/kernel$", "matrix:1,1")] if cell in ("s4d", "lru") else []
    if sum(shares[cell]) >= d:  # `Dense` keeps the longer axis last
        fused.append(("/project/dense/kernel$", f"matrix:{','.join(map(str, shares[cell]))}"))
    return (*nets.ssm.labels(), *nets.sequence.embedding_labels(spec), *fused)


@builder
def ssm(
    spec: DataSpec,
    *,
    cell: CellName = "mamba2",
    d_model: Count = 128,
    n_layers: Depth = 4,
    d_inner: Count | None = None,
    d_state: Count | None = None,
    n_heads: Count | None = None,
    conv: Count | None = None,
    d_hidden: Whole | None = None,
    dt_min: Share = 0.001,
    dt_max: Share = 0.1,
    form: Literal["auto", "recurrent", "scan", "chunked"] = "auto",
    chunk: Count = 64,
    dropout: Rate = 0.0,
    tie_weights: bool = False,
    remat: Remat = "none",
    cond_dropout: CondDropout = 0.0,
    n_components: Count = 1,
    dtype: Dtype = "float32",
) -> Model:
    """A state space model or linear recurrent network over the events of a sequence; conditional if
    the spec has a condition.

    With h_t the embedded event x_{t-1} (for the first step a learned start), plus V c,

        h ← h + out(recurrence(W norm(h))),    h ← h + W_2 gelu(W_1 norm(h))    in each layer,

    the second half where there is one, p(x_t | x_<t, c) is the distribution that fits the data
    (`likelihoods.emission`) with parameters linear in norm(h_t). The loss per example is -Σ_t ln
    p(x_t | x_<t, c) in nats over the steps that count (`protocol.step_mask`). `log_prob` is the
    same, negated, without dropout, and exact. Shapes: x [B, T, *event], h [B, T, d_model].

    The recurrence of a cell, of which more stands in `nets.ssm`:

        s4d       s_t = e^{ΔA} s_{t-1} + A^{-1} (e^{ΔA} - 1) u_t,  y_t = 2 Re(C s_t) (Gu 2022)
        lru       s_t = λ s_{t-1} + γ B u_t,  y_t = Re(C s_t)                   (Orvieto 2023)
        mingru    s_t = (1 - z_t) s_{t-1} + z_t v_t,  y_t = s_t                    (Feng 2024)
        mamba2    s_t = a_t s_{t-1} + Δ_t u_t b_tᵀ,  y_t = s_t c_t             (Dao & Gu 2024)
        deltanet  s_t = a_t s_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ,  y_t = s_t q_t
                                                                                 (Yang 2024)

    A, λ, the Δ that they begin with and the like have the label "dynamics": no weight decay, and
    their own step size with `rates=("dynamics=0.1",)`. `autoregressive` has all that
    `protocol.Autoregressive` says but `stream`; a carry holds the states of all layers, whose size
    does not grow with the steps. `noise` gives a `parts.autoregressive.SequenceNoise`.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, ssm
        >>> spec = DataSpec((5,), "tokens", levels=3, step="symbol")
        >>> model = ssm(spec, cell="mingru", d_model=8, n_layers=2)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 2).shape
        (2, 5)

    Args:
        spec: the data; a sequence of any kind.
        cell: the recurrence.
        d_model: the width d of h.
        n_layers: how many blocks.
        d_inner: the width of u and y in mingru (d_model unless given), mamba2 (2 d_model) and
            deltanet (d_model), over all heads.
        d_state: numbers of a state: for s4d of each channel (64 unless given), for lru of a layer
            (2 d_model), in pairs (re, im); for mamba2 of each channel (64); for deltanet the length
            of a head's keys (32).
        n_heads: heads of mamba2 and deltanet, each with a decay of its own; 4 unless given.
        conv: steps that the short convolution before the recurrence of mingru, mamba2 and deltanet
            sees; 4 unless given, 1 for the step itself only.
        d_hidden: the width of a block's feed-forward layers, 0 for none; unless given 4 d_model for
            mingru and deltanet and none for the others, whose papers have none.
        dt_min: the least rate at which a unit forgets at first. Of its state a step keeps e^-dt
            in lru, e^(-dt/2) in s4d, e^(-dt r) in mamba2 and deltanet, with r the head's own
            rate, 1 to 16, and 1 - dt in mingru; so it looks back over about 1 / dt steps.
        dt_max: the largest; the units' are log-uniform in between.
        form: how a recurrence is computed over whole sequences: step by step, by an associative
            scan, or in chunks. All give the same numbers; "auto" takes what was the fastest for the
            cell on such a backend (`nets.ssm.FASTEST`). Samples are always drawn step by step.
        chunk: about how many steps are in a chunk. Chunks have one length, and the last is filled
            up where that does not divide the sequence.
        dropout: rate, of the inputs and of what each half of a block adds.
        tie_weights: the readout uses the embedding's table (Press & Wolf 2017); for tokens.
        cond_dropout: how often training leaves out the condition, which guidance needs (Ho &
            Salimans 2022).
        n_components: Gaussians in the mixture that continuous events have.
        dtype: of the layers' arithmetic; parameters, states, gates, the residual sum and losses
            stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit each other, the cell or the data.
    """
    check_sequences(spec, "A state space model")
    nets.sequence.check_tied(spec, tie_weights)
    known = not isinstance(dt_min, Tracer) and not isinstance(dt_max, Tracer)
    if known and dt_min > dt_max:
        raise ConfigError(f"dt_min must be at most dt_max; got {dt_min} and {dt_max}.")
    given = {"d_inner": d_inner, "d_state": d_state, "n_heads": n_heads, "conv": conv}
    sizes = sizes_of(cell, d_model, given)
    emit, std = emission(spec, n_components), nets.attention.output_std(n_layers)
    rest = ((dt_min, dt_max), form, chunk)
    project, core, out = mixer(cell, d_model, sizes, rest, std)
    width = d_hidden
    if width is None:
        width = 4 * d_model if cell in WITH_FEED_FORWARD else 0
    inputs = partial(nets.attention.Inputs, spec, d_model, False, guided_by(spec, cond_dropout))
    feed = partial(nets.attention.FeedForward, d_model, width, "gelu", "rms", False, std)
    readout = partial(nets.attention.Readout, d_model, emit.n_outputs, tie_weights, "rms", False)
    layers = Layers(
        inputs=functional(inputs, dtype, nets.sequence.EVENTS),
        project=functional(project, dtype),
        core=functional(core),  # states and gates stay wide
        out=functional(out, dtype),
        feed_forward=functional(feed, dtype) if width else None,
        readout=functional(readout, dtype),
        n_layers=n_layers,
        dropout=dropout,
        tied=tie_weights,
        remat=remat,
    )
    net = SequenceNet(
        init=partial(init, layers),
        outputs=partial(outputs, layers),
        begin=partial(begin, layers),
        advance=partial(advance, layers),
        labels=labels(spec, cell, d_model, sizes),
    )
    return autoregressive(spec, emit, net, player="ssm", cond_dropout=cond_dropout)
