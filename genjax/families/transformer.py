"""Transformers, decoder-only: p(x) = Π_t p(x_t | x_<t), each step looking back at all earlier ones
by attention.

Vaswani 2017, in the pre-norm form of Radford 2019 (GPT-2), with what came after as options: rotary
positions (Su 2021), grouped queries (Ainslie 2023), SwiGLU (Shazeer 2020), RMS normalisation (Zhang
& Sennrich 2019), sliding windows (Beltagy 2020). The layers are in `nets/attention.py`, and what
makes a model of them in `parts/autoregressive.py`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from genjax import nets
from genjax.errors import ConfigError
from genjax.nets.functional import Net, functional
from genjax.nets.remat import rematerialised
from genjax.parts.autoregressive import SequenceNet, autoregressive, check_sequences
from genjax.parts.decoding import check_position, in_room
from genjax.parts.likelihoods import emission
from genjax.protocol import Array, DataSpec, Key, Model, PyTree
from genjax.settings import (
    CondDropout,
    Count,
    Depth,
    Dtype,
    Positive,
    Rate,
    Remat,
    builder,
    guided_by,
    used,
)


class Layers(NamedTuple):
    """The networks of a Transformer, and how they are put together. Its parameters p are
    {"inputs": ..., "blocks": {0: {"attention": ..., "feed_forward": ...}, 1: ...}, "readout": ...}.

    Attributes:
        inputs, attention, feed_forward, readout: the networks of `nets/attention.py`.
        n_layers: how many blocks.
        cache: the shape of the keys, or the values, that a block keeps of one sequence:
            (n_kv_heads, context, d_model / n_heads).
        dropout: rate, of the inputs and of what each half of a block adds.
        attention_dropout: rate, of the probabilities of attention.
        tied: whether the readout's matrix is the embedding's table.
        scanned: whether the blocks are a loop instead of one after the other.
        remat: what of a block's insides is computed again on the way back.
    """

    inputs: Net
    attention: Net
    feed_forward: Net
    readout: Net
    n_layers: int
    cache: tuple[int, int, int]
    dropout: Any
    attention_dropout: Any
    tied: bool
    scanned: bool
    remat: str


def init(layers: Layers, key: Key) -> Any:
    """p of a new Transformer."""
    key_inputs, key_readout, key_blocks = jax.random.split(key, 3)
    keys = jax.random.split(key_blocks, (layers.n_layers, 2))
    blocks = {
        index: {
            "attention": layers.attention.init(keys[index, 0])[0],
            "feed_forward": layers.feed_forward.init(keys[index, 1])[0],
        }
        for index in range(layers.n_layers)
    }
    return {
        "inputs": layers.inputs.init(key_inputs)[0],
        "blocks": blocks,
        "readout": layers.readout.init(key_readout)[0],
    }


def keys_of_block(layers: Layers, key: Key | None) -> tuple[Key | None, ...]:
    """Of what is dropped of attention's sum, of the feed-forward layers' and of the probabilities
    of attention. The first two are what they were before there was the third.
    """
    if key is None:
        return None, None, None
    if not used(layers.attention_dropout):
        return *jax.random.split(key), None
    return tuple(jax.random.split(key, 3))


def block(layers: Layers, h: Array, p: Any, key: Key | None) -> Array:
    """h + attention(norm(h)), and to that the feed-forward layers', [B, T, d]; `p` is the block's.

    Without a key nothing is dropped.
    """
    key_attention, key_feed, key_weights = keys_of_block(layers, key)
    rate = layers.attention_dropout
    added = layers.attention.apply(p["attention"], {}, h, key_weights, rate)[0]
    h = h + nets.sequence.dropout(key_attention, added, layers.dropout)
    added = layers.feed_forward.apply(p["feed_forward"], {}, h)[0]
    return h + nets.sequence.dropout(key_feed, added, layers.dropout)


def through_blocks(layers: Layers, p: Any, h: Array, keys: Any) -> Array:
    """h [B, T, d] after all blocks; `keys` has one for each, or is None."""
    one = rematerialised(partial(block, layers), layers.remat, layers.scanned)
    if layers.scanned:
        stacked = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *nets.sequence.blocks_of(p, layers.n_layers)
        )
        return jax.lax.scan(lambda h, at: (one(h, *at), None), h, (stacked, keys))[0]
    for index, parameters in enumerate(nets.sequence.blocks_of(p, layers.n_layers)):
        h = one(h, parameters, None if keys is None else keys[index])
    return h


def read(layers: Layers, p: Any, h: Array) -> Array:
    """The parameters of the next event's distribution, [..., n_outputs], from the last h."""
    return nets.sequence.read(layers.readout, p, h, layers.tied)


def outputs(
    layers: Layers,
    p: Any,
    x: Array,
    c: Array | None,
    dropped: Array | None,
    key: Key | None,
) -> Array:
    """The parameters of p(x_t | x_<t, c), [B, T, n_outputs]; with dropout where there is a key."""
    h = layers.inputs.apply(p["inputs"], {}, x, c, dropped)[0]
    noisy = used(layers.dropout) or used(layers.attention_dropout)
    if key is None or not noisy:
        return read(layers, p, through_blocks(layers, p, h, None))
    keys = jax.random.split(key, layers.n_layers + 1)
    h = nets.sequence.dropout(keys[-1], h, layers.dropout)
    return read(layers, p, through_blocks(layers, p, h, keys[:-1]))


# --- one position at a time, with a cache ---------------------------------------------------------


def step(
    layers: Layers, p: Any, h: Array, keys: Sequence[Array], values: Sequence[Array], at: Array
) -> tuple[Array, PyTree]:
    """Outputs and the next carry for the inputs h [n, d] of position `at`; the blocks are not
    scanned here.
    """
    keys, values = list(keys), list(values)
    for index, parameters in enumerate(nets.sequence.blocks_of(p, layers.n_layers)):
        cached = (keys[index], values[index], at)
        added, keys[index], values[index] = layers.attention.apply(
            parameters["attention"], {}, h, *cached, method="step"
        )[0]
        h = h + added
        h = h + layers.feed_forward.apply(parameters["feed_forward"], {}, h)[0]
    carry = {"keys": tuple(keys), "values": tuple(values), "position": at + 1}
    return read(layers, p, h), carry


def begin(
    layers: Layers, p: Any, n: int, c: Array | None, dropped: Array | None
) -> tuple[Array, PyTree]:
    """Outputs for the first position, and the cache after it."""
    h = layers.inputs.apply(p["inputs"], {}, n, c, dropped, method="initial")[0]
    empty = [jnp.zeros((n, *layers.cache), h.dtype)] * layers.n_layers
    return step(layers, p, h, empty, empty, jnp.zeros((), jnp.int32))


def advance(
    layers: Layers, p: Any, carry: PyTree, x: Array, c: Array | None, dropped: Array | None
) -> tuple[Array, PyTree]:
    """Outputs for the position after the events x [n, *event], and the cache after it."""
    at, context = carry["position"], layers.cache[1]
    check_position(at, context)
    h = layers.inputs.apply(p["inputs"], {}, x, c, dropped, at, method="one")[0]
    found, carry = step(layers, p, h, carry["keys"], carry["values"], at)
    return in_room(found, at, context), carry


def labels(spec: DataSpec, n_heads: int, kv: int, two_factors: bool) -> tuple[tuple[str, str], ...]:
    """What the parameters are, as `Model.labels` has it; one matrix makes queries, keys and values,
    and one both factors of "swiglu", where there are `two_factors` side by side.
    """
    fused = [("/qkv/kernel$", f"matrix:{n_heads},{kv},{kv}")]
    fused += [("/up/kernel$", "matrix:1,1")] if two_factors else []
    return (*nets.sequence.embedding_labels(spec), *fused)


# --- settings -------------------------------------------------------------------------------------


def check_fits(
    spec: DataSpec, d_model: int, n_heads: int, kv: int, position: str, tied: bool
) -> None:
    """Refuse settings that do not fit each other or the data.

    Raises:
        ConfigError: see the text.
    """
    if d_model % n_heads or n_heads % kv:
        raise ConfigError(
            f"d_model must be a multiple of n_heads, and n_heads of n_kv_heads; got {d_model}, "
            f"{n_heads} and {kv}."
        )
    d_head = d_model // n_heads
    if position == "rotary" and d_head % 2:
        raise ConfigError(
            f"Rotary positions turn pairs: d_model / n_heads must be even; got {d_head}."
        )
    nets.sequence.check_tied(spec, tied)


@builder
def transformer(
    spec: DataSpec,
    *,
    d_model: Count = 128,
    n_layers: Depth = 4,
    n_heads: Count = 4,
    n_kv_heads: Count | None = None,
    d_hidden: Count | None = None,
    position: Literal["learned", "rotary", "none"] = "rotary",
    activation: Literal["gelu", "gelu_exact", "swiglu"] = "gelu",
    norm: Literal["layer", "rms"] = "layer",
    bias: bool = False,
    dropout: Rate = 0.0,
    attention_dropout: Rate = 0.0,
    tie_weights: bool = False,
    window: Count | None = None,
    scan_layers: bool = False,
    remat: Remat = "none",
    cond_dropout: CondDropout = 0.0,
    n_components: Count = 1,
    dtype: Dtype = "float32",
    rope_base: Positive = 10000.0,
    norm_eps: Positive = 1e-5,
) -> Model:
    """A decoder-only Transformer over the events of a sequence; conditional if the spec has a
    condition.

    With h_t the embedded event x_{t-1} (for the first step a learned start), plus V c, plus a
    position where it is learned,

        h ← h + attention(norm(h)),    h ← h + W_2 gelu(W_1 norm(h))    in each layer,

    p(x_t | x_<t, c) is the distribution that fits the data (`likelihoods.emission`) with parameters
    linear in norm(h_t). The loss per example is -Σ_t ln p(x_t | x_<t, c) in nats over the steps
    that count (`protocol.step_mask`). `log_prob` is the same, negated, without dropout, and exact.
    Shapes: x [B, T, *event], h [B, T, d_model]; T is the context.

    `autoregressive` has all that `protocol.Autoregressive` says but `stream`; a carry holds the
    keys and values of all layers, [n, n_kv_heads, T, d_model / n_heads] each, and the position.
    `noise` gives a `parts.autoregressive.SequenceNoise`.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, transformer
        >>> spec = DataSpec((5,), "tokens", levels=3, step="symbol")
        >>> model = transformer(spec, d_model=8, n_layers=2, n_heads=2)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 2).shape
        (2, 5)

    Args:
        spec: the data; a sequence of any kind.
        d_model: the width d of h.
        n_layers: how many blocks of attention and feed-forward.
        n_heads: heads of attention, each of d_model / n_heads dimensions.
        n_kv_heads: heads that keys and values have, each shared by n_heads / n_kv_heads queries;
            n_heads unless given.
        d_hidden: the width of the feed-forward layers; 4 d_model unless given.
        position: "rotary" turns queries and keys by angles proportional to their position,
            "learned" adds a vector for each; "none" leaves the order to the causal mask.
        activation: of the feed-forward layers; "gelu" is the approximation by tanh that OpenAI's
            GPT-2 has, "gelu_exact" the error function's (nanoGPT's, and PyTorch's nn.GELU());
            "swiglu" has a third matrix.
        norm: "layer" or "rms".
        bias: whether dense layers and layer norms have biases (GPT-2 has, its successors have not).
        dropout: rate, of the inputs and of what each half of a block adds.
        attention_dropout: rate, of the probabilities of attention (GPT-2: the same rate); on an
            accelerator training then takes attention that is written out, not the fused one.
        tie_weights: the readout uses the embedding's table (Press & Wolf 2017); for tokens.
        window: a step attends to itself and window - 1 steps before it; None to all.
        scan_layers: loop over the layers instead of unrolling them. It compiles faster for many
            layers, with the same values.
        cond_dropout: how often training leaves out the condition, which guidance needs (Ho &
            Salimans 2022).
        n_components: Gaussians in the mixture that continuous events have.
        dtype: of the layers' arithmetic; parameters, the residual sum and losses stay float32.
        rope_base: b of rotary positions, where the pair i of a head's h dimensions turns by
            b^(-2i/h) from one position to the next.
        norm_eps: ε of all normalisations.

    Raises:
        ConfigError: for settings that do not exist or do not fit each other or the data.
    """
    check_sequences(spec, "A transformer")
    kv = n_heads if n_kv_heads is None else n_kv_heads
    width = 4 * d_model if d_hidden is None else d_hidden
    check_fits(spec, d_model, n_heads, kv, position, tie_weights)
    emit, std = emission(spec, n_components), nets.attention.output_std(n_layers)
    learned, turned = position == "learned", position == "rotary"
    guided = guided_by(spec, cond_dropout)

    def made(layer: Any, *sizes: Any, **more: Any) -> Net:
        return functional(partial(layer, *sizes, epsilon=norm_eps, **more), dtype)

    of = nets.attention
    heads = (d_model, n_heads, kv, norm, bias, window, turned, std)
    layers = Layers(
        inputs=functional(
            partial(of.Inputs, spec, d_model, learned, guided), dtype, nets.sequence.EVENTS
        ),
        attention=made(of.Attention, *heads, base=rope_base),
        feed_forward=made(of.FeedForward, d_model, width, activation, norm, bias, std),
        readout=made(of.Readout, d_model, emit.n_outputs, tie_weights, norm, bias),
        n_layers=n_layers,
        cache=(kv, spec.shape[0], d_model // n_heads),
        dropout=dropout,
        attention_dropout=attention_dropout,
        tied=tie_weights,
        scanned=scan_layers,
        remat=remat,
    )
    net = SequenceNet(
        init=partial(init, layers),
        outputs=partial(outputs, layers),
        begin=partial(begin, layers),
        advance=partial(advance, layers),
        context=spec.shape[0],
        # `Dense` keeps the longer axis last.
        labels=labels(spec, n_heads, kv, activation == "swiglu" and d_model <= 2 * width),
    )
    return autoregressive(spec, emit, net, player="transformer", cond_dropout=cond_dropout)
