"""The layers of a decoder-only Transformer: normalisation, causal self-attention with a cache,
feed-forward, inputs, readout.

Vaswani 2017 (attention), Radford 2019 (pre-norm blocks and the initial distributions of GPT-2), Ba
2016 and Zhang & Sennrich 2019 (layer and RMS normalisation), Su 2021 (rotary positions), Ainslie
2023 (grouped queries), Beltagy 2020 (sliding windows), Shazeer 2020 (SwiGLU). Forms are those that
were the fastest on a CPU; comments say where that decided.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from genjax.errors import ConfigError
from genjax.nets.layers import EPSILON, Dense, Norm, wide
from genjax.nets.platforms import has_cudnn_attention, platform
from genjax.nets.sequence import EventEmbed, dropout
from genjax.protocol import Array, DataSpec, Key

BASE = 10000.0  # of rotary positions


def rotary(x: Array, positions: Array | range, base: Any = BASE) -> Array:
    """Turns the pairs (x_i, x_{i+h/2}) of x [..., T, h] by the angles position · base^(-2i/h), for
    positions [T].

    The product of a turned query and a turned key depends on the difference of their positions
    only. Su 2021, equation 34, which pairs neighbours instead. The angles of a `range` are known
    beforehand: XLA on a CPU computes those of an array anew for every head of every example.
    """
    half, dtype = x.shape[-1] // 2, wide(x.dtype)
    if isinstance(positions, range) and not isinstance(base, jax.Array):
        cos, sin = _known_turns(positions, half, float(base), jnp.dtype(dtype))
    else:
        angles = jnp.asarray(positions, dtype)[:, None] * _frequencies(half, base, dtype)[None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
    cos, sin = (y.reshape(*[1] * (x.ndim - 2), *y.shape).astype(x.dtype) for y in (cos, sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _frequencies(half: int, base: Any, dtype: Any) -> Any:
    exponents = (-np.arange(half) / half).astype(dtype)
    if isinstance(base, jax.Array):  # swept
        return base.astype(dtype) ** exponents
    return np.asarray(base, dtype) ** exponents


@functools.lru_cache(maxsize=16)
def _known_turns(positions: range, half: int, base: float, dtype: Any) -> tuple[Any, Any]:
    angles = np.asarray(positions, dtype)[:, None] * _frequencies(half, base, dtype)[None]
    return np.cos(angles), np.sin(angles)


def attend(
    q: Array, k: Array, v: Array, allowed: Array, key: Key | None = None, rate: Any = 0.0
) -> Array:
    """softmax(q kᵀ / sqrt(h)) v over the allowed keys. Vaswani 2017, equation 1.

    Args:
        q: [B, G, R, T, h], the R queries of each of the G groups of heads.
        k, v: [B, G, S, h], one key and value for each group (Ainslie 2023).
        allowed: bool [T, S], at least one in each row.
        key, rate: with a key each probability is 0 at this rate, and the others are divided by
            1 - rate.

    Returns:
        [B, G, R, T, h].
    """
    b, g, r, t, h = q.shape
    s = k.shape[2]
    k, v = k.reshape(b * g, s, h), v.reshape(b * g, s, h)
    batched = ((0,), (0,))
    flat = q.reshape(b * g, r * t, h)
    scores = jax.lax.dot_general(
        flat, k, (((2,), (2,)), batched), preferred_element_type=wide(q.dtype)
    )
    scores = jnp.where(allowed[None, None], scores.reshape(b * g, r, t, s) * h**-0.5, -jnp.inf)
    # Dividing after the second product is [.., h] numbers instead of [.., S].
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1).reshape(b, g, r, t, 1)
    weights = dropout(key, weights, rate)
    mixed = jax.lax.dot_general(
        weights.astype(v.dtype).reshape(b * g, r * t, s), v, (((2,), (1,)), batched)
    )
    return mixed.reshape(b, g, r, t, h) / total.astype(v.dtype)


def attend_one(q: Array, k: Array, v: Array, allowed: Array) -> Array:
    """`attend` for one query a head: q [n, G, R, h], k and v [n, G, S, h], allowed bool [S] -> [n,
    G, R, h].

    By matrix products: on a CPU, sums of products took 7 to 50 times as long with jax 0.10, for 1
    and 64 sequences with a context of 64 to 512; with 0.12 they took up to 3 times as long for 64
    sequences, and half to a quarter for one.
    """
    dtype = wide(q.dtype)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    scores = jnp.einsum("ngrh,ngsh->ngrs", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(allowed[None, None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return jnp.einsum("ngrs,ngsh->ngrh", weights, v) / weights.sum(axis=-1, keepdims=True)


def causal(t: int, window: int | None) -> Array:
    """bool [T, T]: position i sees j for i - window < j <= i (Beltagy 2020); without a window all j
    <= i.
    """
    i, j = jnp.arange(t)[:, None], jnp.arange(t)[None]
    return (j <= i) if window is None else (j <= i) & (i - j < window)


def dense_attention(
    q: Array,
    k: Array,
    v: Array,
    window: int | None = None,
    key: Key | None = None,
    rate: Any = 0.0,
) -> Array:
    """Causal attention of q [B, G, R, T, h] to k and v [B, G, T, h] by `attend`: the faster one on
    a CPU, and the one that can leave out weights.
    """
    return attend(q, k, v, causal(q.shape[3], window), key, rate)


def fused_attention(q: Array, k: Array, v: Array, window: int | None = None) -> Array:
    """The same by `jax.nn.dot_product_attention`, for accelerators: where cuDNN's kernel takes the
    numbers (Dao 2022: it never holds the scores [T, T]) by that, elsewhere by XLA's products.
    """
    b, g, r, t, h = q.shape
    q, k, v = (x.reshape(b, -1, t, h).swapaxes(1, 2) for x in (q, k, v))
    local = None if window is None else (window - 1, 0)
    narrow = q.dtype in (jnp.bfloat16, jnp.float16) and h % 8 == 0 and h <= 128
    by = "cudnn" if narrow and has_cudnn_attention() else "xla"
    y = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=local, implementation=by
    )
    return y.swapaxes(1, 2).reshape(b, g, r, t, h)


class Attention(nnx.Module):
    """What causal self-attention adds to x: W_out attend(W_qkv norm(x)), one matrix product for
    queries, keys and values.
    """

    def __init__(
        self,
        d: int,
        n_heads: int,
        n_kv_heads: int,
        norm: str,
        bias: bool,
        window: int | None,
        turned: bool,
        std_out: float,
        *,
        base: Any = BASE,
        epsilon: Any = EPSILON,
        rngs: nnx.Rngs,
    ) -> None:
        self.g, self.r, self.h = n_kv_heads, n_heads // n_kv_heads, d // n_heads
        self.window = window
        # In a function, as `Norm` has its epsilon.
        self.turn = functools.partial(rotary, base=base) if turned else None
        self.norm = Norm(d, norm, bias, epsilon, rngs=rngs)
        self.qkv = Dense(d, (n_heads + 2 * n_kv_heads) * self.h, bias, rngs=rngs)
        self.out = Dense(d, d, bias, std_out, rngs=rngs)

    def heads(self, x: Array, positions: Array | range) -> tuple[Array, Array, Array]:
        """Queries [B, G, R, T, h], keys and values [B, G, T, h] of x [B, T, d]."""
        b, t, d = x.shape
        parts = self.qkv(self.norm(x).reshape(b * t, d))
        q, k, v = jnp.split(parts, [d, d + self.g * self.h], axis=-1)
        q = q.reshape(b, t, self.g, self.r, self.h).transpose(0, 2, 3, 1, 4)
        k, v = (y.reshape(b, t, self.g, self.h).transpose(0, 2, 1, 3) for y in (k, v))
        return (
            (q, k, v)
            if self.turn is None
            else (self.turn(q, positions), self.turn(k, positions), v)
        )

    def joined(self, y: Array) -> Array:
        """W_out of what the heads found, [B, G, R, T, h] -> [B, T, d]."""
        b, t = y.shape[0], y.shape[3]
        return self.out(y.transpose(0, 3, 1, 2, 4).reshape(b * t, -1)).reshape(b, t, -1)

    def __call__(self, x: Array, key: Key | None = None, rate: Any = 0.0) -> Array:
        """`key` and `rate` are those of `attend`."""
        t, on_cpu = x.shape[1], platform() == "cpu"
        # An exported program's length may be a symbol.
        known = on_cpu and isinstance(t, int)
        q, k, v = self.heads(x, range(t) if known else jnp.arange(t))
        if key is not None:  # the fused form cannot leave out weights
            return self.joined(dense_attention(q, k, v, self.window, key, rate))
        # The fused form computes its softmax in float32, whatever comes in.
        fused = not on_cpu and q.dtype != jnp.float64
        return self.joined((fused_attention if fused else dense_attention)(q, k, v, self.window))

    def step(
        self, x: Array, keys: Array, values: Array, position: Array
    ) -> tuple[Array, Array, Array]:
        """The same for one position, x [n, d], with the keys and values [n, G, S, h] of those
        before it; they are returned with its own.
        """
        q, k, v = self.heads(x[:, None], position[None])
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), position, axis=2)
            for cache, new in ((keys, k), (values, v))
        )
        ages = position - jnp.arange(keys.shape[2], dtype=position.dtype)
        allowed = (ages >= 0) if self.window is None else (ages >= 0) & (ages < self.window)
        y = attend_one(q[..., 0, :], keys, values, allowed).astype(x.dtype)
        return self.joined(y[..., None, :])[:, 0], keys, values


def gated(x: Array) -> Array:
    """silu(a) ⊙ b for x = [a, b] along the last axis."""
    a, b = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(a) * b


# "gelu" is GPT-2's approximation by tanh, "gelu_exact" x Φ(x) by the error function (Hendrycks
# 2016), which is what PyTorch's GELU is unless told otherwise.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "swiglu": gated,
}


class FeedForward(nnx.Module):
    """What the second half of a block adds to x: W_2 gelu(W_1 norm(x)), or W_2 (silu(W_1 y) ⊙ W_3
    y) of y = norm(x).
    """

    def __init__(
        self,
        d: int,
        d_hidden: int,
        activation: str,
        norm: str,
        bias: bool,
        std_out: float,
        *,
        epsilon: Any = EPSILON,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = ACTIVATIONS[activation]
        self.norm = Norm(d, norm, bias, epsilon, rngs=rngs)
        self.up = Dense(d, d_hidden * (2 if activation == "swiglu" else 1), bias, rngs=rngs)
        self.down = Dense(d_hidden, d, bias, std_out, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = self.up(self.norm(x).reshape(-1, x.shape[-1]))
        return self.down(self.activation(y)).reshape(x.shape)


class Inputs(nnx.Module):
    """The vectors that go into the first block: those of `EventEmbed`, plus a learned one for each
    position where wanted.
    """

    def __init__(
        self, spec: DataSpec, d: int, learned: bool, droppable: bool = False, *, rngs: nnx.Rngs
    ) -> None:
        self.events = EventEmbed(spec, d, droppable, rngs=rngs)
        positions = None
        if learned:
            positions = nnx.Param(
                0.02 * jax.random.normal(rngs.params(), (spec.shape[0], d), jnp.float32)
            )
        self.positions = positions

    def __call__(self, x: Array, c: Array | None, dropped: Array | None) -> Array:
        h = self.events(x, c, dropped)
        if self.positions is None:
            return h
        table = self.positions[...]
        if x.shape[1] > len(table):
            raise ConfigError(
                f"A model with a learned vector for each of {len(table)} positions takes sequences "
                f"of up to {len(table)} steps; got {x.shape[1]}. Cut them, or take "
                "position='rotary'."
            )
        return h + table[None, : x.shape[1]]

    def initial(self, n: int, c: Array | None, dropped: Array | None) -> Array:
        """The input of position 0, [n, d]."""
        h = self.events.initial(n, c, dropped)
        return h if self.positions is None else h + self.positions[...][:1]

    def one(self, x: Array, c: Array | None, dropped: Array | None, position: Array) -> Array:
        """The input of a position, [n, d], given the event x [n, *event] before it."""
        h = self.events.one(x, c, dropped)
        if self.positions is None:
            return h
        return h + jax.lax.dynamic_index_in_dim(self.positions[...], position, keepdims=True)


class Readout(nnx.Module):
    """The outputs of a step from the last block's h: a normalised h times a matrix, which may be
    given as `table` [V, d].
    """

    def __init__(
        self,
        d: int,
        n_outputs: int,
        tied: bool,
        norm: str,
        bias: bool,
        *,
        epsilon: Any = EPSILON,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm = Norm(d, norm, bias, epsilon, rngs=rngs)
        self.dense = None if tied else Dense(d, n_outputs, True, rngs=rngs)

    def __call__(self, h: Array, table: Array | None = None) -> Array:
        flat = self.norm(h).reshape(-1, h.shape[-1])
        if self.dense is not None:
            y = self.dense(flat)
        else:
            assert table is not None, "a tied readout needs the table"
            y = flat @ table.T
        return y.reshape(*h.shape[:-1], -1)


def output_std(n_layers: int) -> float:
    """The sd of the matrices that write into the residual sum, 0.02 / sqrt(2 layers), so that its
    size does not grow with their number. Radford 2019, section 2.3.
    """
    return 0.02 / math.sqrt(2 * n_layers)
