"""Transformers, decoder-only: p(x) = Π_t p(x_t | x_<t), each step looking back at all earlier ones
by attention.

Vaswani 2017, in the pre-norm form of Radford 2019 (GPT-2), with what came after as options: rotary
positions (Su 2021), grouped queries (Ainslie 2023), SwiGLU (Shazeer 2020), RMS normalisation (Zhang
& Sennrich 2019), sliding windows (Beltagy 2020).
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from genjax.checks import check_cond, checked
from genjax.errors import ConfigError, unknown_name
from genjax.nets.attention import Attention, FeedForward, Inputs, Readout, output_std
from genjax.nets.functional import functional
from genjax.nets.sequence import dropout as drop
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

CHOICES = {
    "position": ("learned", "rotary", "none"),
    "activation": ("gelu", "swiglu"),
    "norm": ("layer", "rms"),
    "dtype": ("float32", "bfloat16"),
}


def transformer(
    spec: DataSpec,
    *,
    d_model: int = 128,
    n_layers: int = 4,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    d_hidden: int | None = None,
    position: Literal["learned", "rotary", "none"] = "rotary",
    activation: Literal["gelu", "swiglu"] = "gelu",
    norm: Literal["layer", "rms"] = "layer",
    bias: bool = False,
    dropout: float = 0.0,
    tie_weights: bool = False,
    window: int | None = None,
    scan_layers: bool = False,
    remat: bool = False,
    cond_dropout: float = 0.0,
    n_components: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Model:
    """A decoder-only Transformer over the events of a sequence; conditional if the spec has a
    condition.

    With h_t the embedded event x_{t-1} (for the first step a learned start), plus V c, plus a
    position where it is learned,

        h ← h + attention(norm(h)),    h ← h + W_2 gelu(W_1 norm(h))    in each layer,

    p(x_t | x_<t, c) is the distribution that fits the data (`distributions.emission`) with
    parameters linear in norm(h_t). The loss per example is -Σ_t ln p(x_t | x_<t, c) in nats over
    the steps that count (`protocol.step_mask`). `log_prob` is the same, negated, without dropout,
    and exact. Shapes: x [B, T, *event], h [B, T, d_model]; T is the context.

    Extras:
        outputs: (params, state, x, cond=None, dropped=None) -> the parameters of p(x_t | x_<t), [B,
            T, n_outputs].
        step_log_prob: (params, state, batch) -> ln p(x_t | x_<t) [B, T], 0 where padded.
        begin: (params, state, n, cond=None, dropped=None) -> outputs [n, n_outputs] for the first
            step, and a carry: the keys and values of all layers, [n, n_kv_heads, T, d_model /
            n_heads] each, and the position.
        advance: (params, state, carry, x [n, *event], cond=None, dropped=None) -> outputs for the
            step after x, and a carry.
        generate: see `decoding.generator`.
    In these, `dropped` bool [n] says which examples go without their condition.

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
        activation: of the feed-forward layers; "swiglu" has a third matrix.
        norm: "layer" or "rms".
        bias: whether dense layers and layer norms have biases (GPT-2 has, its successors have not).
        dropout: rate, of the inputs and of what each half of a block adds; the attention weights
            have none.
        tie_weights: the readout uses the embedding's table (Press & Wolf 2017); for tokens.
        window: a step attends to itself and window - 1 steps before it; None to all.
        scan_layers: loop over the layers instead of unrolling them. It compiles faster for many
            layers, with the same values.
        remat: recompute a block's insides on the way back instead of keeping them, for less memory.
        cond_dropout: how often training leaves out the condition, which guidance needs (Ho &
            Salimans 2022).
        n_components: Gaussians in the mixture that continuous events have.
        dtype: of the layers' arithmetic; parameters, the residual sum and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit each other or the data.
    """
    if spec.step is None:
        raise ConfigError(
            f"A transformer models sequences; {spec.name} has no steps. Give its DataSpec `step`."
        )
    chosen = {"position": position, "activation": activation, "norm": norm, "dtype": dtype}
    for what, name in chosen.items():
        if name not in CHOICES[what]:
            raise unknown_name(what, name, CHOICES[what])
    kv = n_heads if n_kv_heads is None else n_kv_heads
    width = 4 * d_model if d_hidden is None else d_hidden
    sizes = {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": kv,
        "d_hidden": width,
    }
    for label, number in (
        sizes | {"n_components": n_components, "window": 1 if window is None else window}
    ).items():
        if number < 1:
            raise ConfigError(f"{label} must be at least 1; got {number}.")
    for label, rate in {"dropout": dropout, "cond_dropout": cond_dropout}.items():
        if isinstance(rate, int | float) and not 0 <= rate < 1:
            raise ConfigError(f"{label} must be in [0, 1); got {rate}.")
    if d_model % n_heads or n_heads % kv:
        raise ConfigError(
            f"d_model must be a multiple of n_heads, and n_heads of n_kv_heads; got {d_model}, "
            f"{n_heads} and {kv}."
        )
    d_head, context, event = d_model // n_heads, spec.shape[0], spec.shape[1:]
    if position == "rotary" and d_head % 2:
        raise ConfigError(
            f"Rotary positions turn pairs: d_model / n_heads must be even; got {d_head}."
        )
    if tie_weights and (spec.kind != "tokens" or event):
        raise ConfigError(
            f"tie_weights is for sequences of tokens; {spec.name} has {spec.kind} events of shape "
            f"{event}."
        )

    emit = emission(spec, n_components)
    std = output_std(n_layers)
    guided = isinstance(cond_dropout, Tracer) or cond_dropout > 0
    inputs = functional(partial(Inputs, spec, d_model, position == "learned", guided), dtype)
    attention = functional(
        partial(Attention, d_model, n_heads, kv, norm, bias, window, position == "rotary", std),
        dtype,
    )
    feed_forward = functional(
        partial(FeedForward, d_model, width, activation, norm, bias, std), dtype
    )
    readout = functional(partial(Readout, d_model, emit.n_outputs, tie_weights, norm, bias), dtype)

    def init(key: Key) -> tuple[Params, State]:
        key_inputs, key_readout, key_blocks = jax.random.split(key, 3)
        keys = jax.random.split(key_blocks, (n_layers, 2))
        blocks = {
            f"{index}": {
                "attention": attention.init(keys[index, 0])[0],
                "feed_forward": feed_forward.init(keys[index, 1])[0],
            }
            for index in range(n_layers)
        }
        params = {
            "inputs": inputs.init(key_inputs)[0],
            "blocks": blocks,
            "readout": readout.init(key_readout)[0],
        }
        return {"transformer": params}, {"transformer": {}}

    def layers_of(p: Any) -> list[Any]:
        return [p["blocks"][f"{index}"] for index in range(n_layers)]

    def block(h: Array, layer: Any, key: Key | None) -> Array:
        key_attention, key_feed = (None, None) if key is None else jax.random.split(key)
        h = h + drop(key_attention, attention.apply(layer["attention"], {}, h)[0], dropout)
        return h + drop(key_feed, feed_forward.apply(layer["feed_forward"], {}, h)[0], dropout)

    def read(p: Any, h: Array) -> Array:
        return readout.apply(
            p["readout"], {}, h, *([p["inputs"]["events"]["table"]] if tie_weights else [])
        )[0]

    def outputs_of(
        p: Any, x: Array, cond: Any, dropped: Array | None = None, key: Key | None = None
    ) -> Array:
        """The parameters of p(x_t | x_<t, c), [B, T, n_outputs]; with dropout where there is a
        key.
        """
        keys: Any = [None] * (n_layers + 1) if key is None else jax.random.split(key, n_layers + 1)
        h = drop(keys[-1], inputs.apply(p["inputs"], {}, x, condition(cond), dropped)[0], dropout)
        one = jax.checkpoint(block) if remat else block
        if scan_layers:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers_of(p))
            h = jax.lax.scan(
                lambda h, at: (one(h, *at), None), h, (stacked, None if key is None else keys[:-1])
            )[0]
        else:
            for layer, key_layer in zip(layers_of(p), keys[:-1], strict=True):
                h = one(h, layer, key_layer)
        return read(p, h)

    def condition(cond: Any) -> Array | None:
        return jax.nn.one_hot(cond, spec.n_classes) if spec.n_classes else cond

    def nats(batch: Batch, outputs: Array) -> Array:
        """ln p(x_t | x_<t, c) [B, T], 0 where padded."""
        return jnp.where(step_mask(spec, batch), emit.log_prob(batch.x, outputs), 0)

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        key_net, key_cond = jax.random.split(key)
        dropped = (
            jax.random.bernoulli(key_cond, cond_dropout, batch.x.shape[:1])
            if spec.conditional
            else None
        )
        still = isinstance(dropout, int | float) and dropout == 0
        outputs = outputs_of(
            params["transformer"], batch.x, batch.cond, dropped, None if still else key_net
        )
        value = -nats(batch, outputs).sum(1)
        return value, Aux(
            state, {"nats_per_step": value / step_mask(spec, batch).sum(1).astype(value.dtype)}
        )

    def outputs(
        params: Params, state: State, x: Array, cond: Any = None, dropped: Array | None = None
    ) -> Array:
        check_cond(spec, cond, x.shape[0])
        return outputs_of(params["transformer"], x, cond, dropped)

    def step_log_prob(params: Params, state: State, batch: Batch) -> Array:
        return nats(batch, outputs_of(params["transformer"], batch.x, batch.cond))

    def log_prob(params: Params, state: State, batch: Batch, key: Key) -> Array:
        return step_log_prob(params, state, batch).sum(1)

    def step(p: Any, h: Array, keys: PyTree, values: PyTree, at: Array) -> tuple[Array, PyTree]:
        """Outputs and the next carry for the inputs h [n, d] of position `at`; the layers are not
        scanned here.
        """
        keys, values = list(keys), list(values)
        for index, layer in enumerate(layers_of(p)):
            added, keys[index], values[index] = attention.apply(
                layer["attention"], {}, h, keys[index], values[index], at, method="step"
            )[0]
            h = h + added
            h = h + feed_forward.apply(layer["feed_forward"], {}, h)[0]
        return read(p, h), {"keys": tuple(keys), "values": tuple(values), "position": at + 1}

    def begin(
        params: Params, state: State, n: int, cond: Any = None, dropped: Array | None = None
    ) -> tuple[Array, PyTree]:
        check_cond(spec, cond, n)
        p = params["transformer"]
        h = inputs.apply(p["inputs"], {}, n, condition(cond), dropped, method="first")[0]
        empty = [jnp.zeros((n, kv, context, d_head), h.dtype)] * n_layers
        return step(p, h, empty, empty, jnp.zeros((), jnp.int32))

    def advance(
        params: Params,
        state: State,
        carry: PyTree,
        x: Array,
        cond: Any = None,
        dropped: Array | None = None,
    ) -> tuple[Array, PyTree]:
        p, at = params["transformer"], carry["position"]
        h = inputs.apply(p["inputs"], {}, x, condition(cond), dropped, at, method="one")[0]
        return step(p, h, carry["keys"], carry["values"], at)

    generate = generator(spec, begin, advance, emit.sample, context, guided)

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        return generate(params, state, key, n, cond)

    return checked(
        Model(
            spec=spec,
            init=init,
            losses={"transformer": loss},
            sample=sample,
            log_prob=log_prob,
            estimator="exact",
            extras={
                "outputs": outputs,
                "step_log_prob": step_log_prob,
                "begin": begin,
                "advance": advance,
                "generate": generate,
            },
        )
    )
