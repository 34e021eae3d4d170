"""The layers of state space models and linear recurrent networks: what goes into a recurrence, the
recurrence itself, and what comes out of it.

Gu 2022 (S4D), Orvieto 2023 (LRU), Feng 2024 (minGRU), Dao & Gu 2024 (Mamba-2), Yang 2024 (gated
DeltaNet). A block is `Project`, one of the cores and one of the outputs. The cores keep states and
gates in wide arithmetic whatever the rest of the network computes in: each is a network of its own
for `functional`. The recurrences are in `nets/scans.py`.
"""

import abc
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.nets.layers import Dense, Norm
from genjax.nets.platforms import platform
from genjax.nets.scans import (
    Form,
    Number,
    delta_rule,
    diagonal,
    exponential,
    filtered,
    scalar_decay,
    times,
)
from genjax.protocol import Array

Carry = tuple[Array, ...]  # each [B, ...]
SLOWEST = 1e-4  # the least rate at which a state decays, so that none grows
# The form by which a gradient took the least time. Measured on two cores, two layers of 64, in ms
# of processor time for 128 sequences of 16 steps (and for 12 of 64): s4d 18 in chunks, 381 step by
# step; lru 26 (13) step by step, 55 (16) by a scan; mingru 84 (19) and 97 (21); mamba2 116 in
# chunks, 589 step by step; deltanet 215 (112 in chunks of 16) and 398 (122). No accelerator was
# measured: there it is what has the fewest steps one after the other.
FASTEST: dict[str, dict[str, Form]] = {
    "cpu": {
        "s4d": "chunked",
        "lru": "recurrent",
        "mingru": "recurrent",
        "mamba2": "chunked",
        "deltanet": "chunked",
    },
    "other": {
        "s4d": "chunked",
        "lru": "scan",
        "mingru": "scan",
        "mamba2": "chunked",
        "deltanet": "chunked",
    },
}


def labels() -> tuple[tuple[str, str], ...]:
    """`Model.labels` of the cores: rates, frequencies and the like are "dynamics", which no weight
    decay draws to 0; and what is listed channel by channel is no matrix.
    """
    return (
        ("/core/(decay|frequency|timestep|gain)$", "dynamics"),
        ("/core/(c_re|c_im|conv/kernel)$", "vector"),
    )


def log_uniform(key: Array, low: Any, high: Any, shape: tuple[int, ...]) -> Array:
    """The logarithms of numbers between low and high, uniformly distributed."""
    low, high = (jnp.log(jnp.asarray(end, jnp.float32)) for end in (low, high))  # traced, too
    return low + (high - low) * jax.random.uniform(key, shape, low.dtype)


def unit(x: Array) -> Array:
    """x / |x| along the last axis; x near 0 stays near 0."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


class Conv(nnx.Module):
    """A causal convolution of each channel by itself, y_t = Σ_i w_i x_{t-i} + b, then silu."""

    def __init__(self, width: int, channels: int, *, rngs: nnx.Rngs) -> None:
        bound = width**-0.5
        self.width = width
        self.kernel = nnx.Param(
            jax.random.uniform(
                rngs.params(), (width, channels), jnp.float32, minval=-bound, maxval=bound
            )
        )
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Array, before: Array) -> tuple[Array, Array]:
        """x [B, T, c] and the width - 1 inputs before it -> y, and the last width - 1 inputs."""
        steps = x.shape[1]
        x = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        kernel = self.kernel[...][:, None, None]
        y = sum(kernel[i] * x[:, self.width - 1 - i :][:, :steps] for i in range(self.width))
        return jax.nn.silu(y + self.bias[...][None, None]), x[:, steps:]


class Project(nnx.Module):
    """What goes into a core, and what goes past it to the output: both of W norm(x).

    Without a matrix, norm(x) goes into the core; where nothing else goes past it, norm(x) does.
    """

    def __init__(self, d: int, n_core: int, n_past: int = 0, *, rngs: nnx.Rngs) -> None:
        self.n_core, self.n_past = n_core, n_past
        self.norm = Norm(d, "rms", False, rngs=rngs)
        self.dense = Dense(d, n_core + n_past, False, d**-0.5, rngs=rngs) if n_core else None

    def __call__(self, x: Array) -> tuple[Array, Array]:
        y = self.norm(x)
        if self.dense is None:
            return y, y
        found = self.dense(y.reshape(-1, y.shape[-1])).reshape(*y.shape[:-1], -1)
        core, past = jnp.split(found, [self.n_core], axis=-1)
        return core, past if self.n_past else y


# --- cores: u [B, T, n] and what was carried -> y [B, T, m], and what is carried on ---------------


class Core(nnx.Module):
    """A recurrence from zeros, or from what is carried. `form` is how it is computed; "auto" is
    `FASTEST`.
    """

    name: str
    form: Literal["auto", "recurrent", "scan", "chunked"]
    chunk: int

    @abc.abstractmethod
    def start(self, n: int, dtype: Any) -> Carry:
        """What is carried before the first step."""

    def chosen(self) -> Form:
        if self.form != "auto":
            return self.form
        backend = "cpu" if platform() == "cpu" else "other"
        return FASTEST[backend][self.name]

    @abc.abstractmethod
    def over(self, u: Array, carry: Carry | None, form: Form) -> tuple[Array, Carry]:
        """All steps of u, from zeros where nothing was carried."""

    def __call__(self, u: Array, carry: Carry | None = None) -> tuple[Array, Carry]:
        return self.over(u, carry, self.chosen())

    def step(self, u: Array, carry: Carry) -> tuple[Array, Carry]:
        """One step, u [B, n]."""
        y, carry = self.over(u[:, None], carry, "recurrent")
        return y[:, 0], carry


class S4D(Core):
    """For each of d channels a state of complex numbers, h' = A h + u, y = 2 Re(C h), from step to
    step by a zero-order hold of length Δ: h_t = e^{ΔA} h_{t-1} + A^{-1} (e^{ΔA} - 1) u_t.

    Gu 2022. A = -e^decay + i frequency begins at -1/2 + i π n (S4D-Lin), Δ = e^timestep
    log-uniform. A real part never comes above -SLOWEST. Of a pair of conjugates one is kept.
    """

    name = "s4d"

    def __init__(
        self,
        d: int,
        n_pairs: int,
        dt: tuple[float, float],
        form: Any,
        chunk: int,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.form, self.chunk, self.d, self.n = form, chunk, d, n_pairs
        self.decay = nnx.Param(jnp.full((d, n_pairs), math.log(0.5), jnp.float32))
        turns = jnp.pi * jnp.arange(n_pairs, dtype=jnp.float32)
        self.frequency = nnx.Param(jnp.broadcast_to(turns[None], (d, n_pairs)))
        self.timestep = nnx.Param(log_uniform(rngs.params(), *dt, (d,)))
        sd = 0.5**0.5
        self.c_re = nnx.Param(sd * jax.random.normal(rngs.params(), (d, n_pairs), jnp.float32))
        self.c_im = nnx.Param(sd * jax.random.normal(rngs.params(), (d, n_pairs), jnp.float32))

    def start(self, n: int, dtype: Any) -> Carry:
        return (jnp.zeros((n, self.d, self.n), dtype),) * 2

    def discrete(self) -> tuple[Number, Number]:
        """ln of the factor e^{ΔA}, and 2 C A^{-1} (e^{ΔA} - 1): what a unit of u adds to y."""
        dt = jnp.exp(self.timestep[...])[:, None]
        re, im = jnp.minimum(-jnp.exp(self.decay[...]), -SLOWEST), self.frequency[...]
        # Below what float32 can tell from no decay at all, however small Δ gets.
        x, y = jnp.minimum(dt * re, -1e-6), dt * im
        # e^z - 1 for z near 0, where the difference would have no digits left.
        less_one = (jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2, jnp.exp(x) * jnp.sin(y))
        inverse = (re / (re**2 + im**2), -im / (re**2 + im**2))
        c = (2 * self.c_re[...], 2 * self.c_im[...])
        return (x, y), times(c, times(inverse, less_one))

    def over(self, u: Array, carry: Carry | None, form: Form) -> tuple[Array, Carry]:
        log_a, weight = self.discrete()
        if form == "chunked":
            return filtered(u, log_a, weight, carry, self.chunk)
        start = self.start(u.shape[0], u.dtype) if carry is None else carry
        a = tuple(
            jnp.broadcast_to(leaf[None, None], (1, u.shape[1], *leaf.shape))
            for leaf in exponential(log_a)
        )
        given = jnp.broadcast_to(u[..., None], (*u.shape, self.n))
        h, last = diagonal(a, (given, jnp.zeros_like(given)), start, form, self.chunk)
        weight = tuple(leaf[None, None] for leaf in weight)
        return times(h, weight)[0].sum(-1), last


class LRU(Core):
    """h_t = λ h_{t-1} + γ u_t for complex numbers, given and returned as [re, im]. Orvieto 2023.

    λ = exp(-e^decay + i frequency), |λ| <= e^-SLOWEST; γ = e^gain begins at sqrt(1 - |λ|²), for
    states of the size of the inputs. The products with B and C are `Project`'s and `Glu`'s.
    """

    name = "lru"

    def __init__(
        self, n_pairs: int, dt: tuple[float, float], form: Any, chunk: int, *, rngs: nnx.Rngs
    ) -> None:
        self.form, self.chunk, self.n = form, chunk, n_pairs
        decay = log_uniform(rngs.params(), *dt, (n_pairs,))
        self.decay = nnx.Param(decay)
        self.frequency = nnx.Param(
            jax.random.uniform(rngs.params(), (n_pairs,), maxval=jnp.pi, dtype=jnp.float32)
        )
        self.gain = nnx.Param(0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(decay))))

    def start(self, n: int, dtype: Any) -> Carry:
        return (jnp.zeros((n, self.n), dtype),) * 2

    def over(self, u: Array, carry: Carry | None, form: Form) -> tuple[Array, Carry]:
        start = self.start(u.shape[0], u.dtype) if carry is None else carry
        log_a = jnp.minimum(-jnp.exp(self.decay[...]), -SLOWEST), self.frequency[...]
        a = tuple(
            jnp.broadcast_to(leaf[None, None], (1, u.shape[1], self.n))
            for leaf in exponential(log_a)
        )
        gain = jnp.exp(self.gain[...])[None, None]
        given = tuple(gain * part for part in jnp.split(u, 2, axis=-1))
        h, last = diagonal(a, given, start, form, self.chunk)
        return jnp.concatenate(h, axis=-1), last


class MinGRU(Core):
    """h_t = (1 - z_t) h_{t-1} + z_t v_t with z_t = σ(r_t + timestep), for u = [r, v]. Feng 2024.

    A GRU whose gate and candidate do not see h, so that it is linear in h. The gate begins at
    shares z that are log-uniform.
    """

    name = "mingru"

    def __init__(
        self,
        d: int,
        conv: int,
        dt: tuple[float, float],
        form: Any,
        chunk: int,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.form, self.chunk, self.d = form, chunk, d
        share = jnp.exp(log_uniform(rngs.params(), *dt, (d,)))
        self.timestep = nnx.Param(jnp.log(share) - jnp.log1p(-share))
        self.conv = Conv(conv, 2 * d, rngs=rngs) if conv > 1 else None

    def start(self, n: int, dtype: Any) -> Carry:
        h = jnp.zeros((n, self.d), dtype)
        return (h,) if self.conv is None else (h, before(self.conv, n, dtype))

    def over(self, u: Array, carry: Carry | None, form: Form) -> tuple[Array, Carry]:
        h, *window = self.start(u.shape[0], u.dtype) if carry is None else carry
        if self.conv is not None:
            u, *window = self.conv(u, *window)
        gate, value = jnp.split(u, 2, axis=-1)
        gate = gate + self.timestep[...][None, None]
        a, b = jax.nn.sigmoid(-gate), jax.nn.sigmoid(gate) * value
        (y,), (last,) = diagonal((a,), (b,), (h,), form, self.chunk)
        return y, (last, *window)


def before(conv: Conv, n: int, dtype: Any) -> Array:
    """The inputs before the first step: zeros."""
    return jnp.zeros((n, conv.width - 1, conv.kernel[...].shape[1]), dtype)


class Selective(Core):
    """What Mamba-2 and gated DeltaNet share: states [H, d / H, n], a short convolution of `n_mixed`
    channels, and in each head a decay a_t = exp(-Δ_t e^decay) with Δ_t = softplus(r_t + timestep),
    which begins log-uniform.
    """

    def __init__(
        self,
        d: int,
        n: int,
        n_heads: int,
        conv: int,
        dt: tuple[float, float],
        form: Any,
        chunk: int,
        *,
        n_mixed: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.form, self.chunk, self.n_heads, self.d, self.n = form, chunk, n_heads, d, n
        start = jnp.exp(log_uniform(rngs.params(), *dt, (n_heads,)))
        self.timestep = nnx.Param(start + jnp.log(-jnp.expm1(-start)))
        rates = jax.random.uniform(rngs.params(), (n_heads,), jnp.float32, minval=1.0, maxval=16.0)
        self.decay = nnx.Param(jnp.log(rates))
        self.conv = Conv(conv, n_mixed, rngs=rngs)

    def gates(self, raw: Array) -> tuple[Array, Array]:
        """Δ, and ln a, of raw [B, T, H]."""
        dt = jax.nn.softplus(raw + self.timestep[...][None, None])
        return dt, -dt * jnp.maximum(jnp.exp(self.decay[...]), SLOWEST)[None, None]

    def heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.n_heads, -1)

    def start(self, n: int, dtype: Any) -> Carry:
        state = (n, self.n_heads, self.d // self.n_heads, self.n)
        return jnp.zeros(state, dtype), before(self.conv, n, dtype)

    def convolved(self, u: Array, carry: Carry | None) -> tuple[Array, Array]:
        window = before(self.conv, u.shape[0], u.dtype) if carry is None else carry[1]
        return self.conv(u, window)


class SSD(Selective):
    """h_t = a_t h_{t-1} + Δ_t x_t b_tᵀ, y_t = h_t c_t + D x_t in each head, for u = [x, b, c, r];
    b and c are shared by the heads. Dao & Gu 2024 (Mamba-2).
    """

    name = "mamba2"

    def __init__(self, d: int, n: int, n_heads: int, *rest: Any, rngs: nnx.Rngs) -> None:
        super().__init__(d, n, n_heads, *rest, n_mixed=d + 2 * n, rngs=rngs)
        self.skip = nnx.Param(jnp.ones(n_heads, jnp.float32))

    def over(self, u: Array, carry: Carry | None, form: Form) -> tuple[Array, Carry]:
        mixed, raw = jnp.split(u, [self.d + 2 * self.n], axis=-1)
        mixed, window = self.convolved(mixed, carry)
        x, b, c = jnp.split(mixed, [self.d, self.d + self.n], axis=-1)
        x, (dt, log_a) = self.heads(x), self.gates(raw)
        start = None if carry is None else carry[0]
        y, last = scalar_decay(dt[..., None] * x, log_a, b, c, start, form, self.chunk)
        y = y + self.skip[...][None, None, :, None] * x
        return y.reshape(*u.shape[:2], -1), (last, window)


class Delta(Selective):
    """S_t = a_t S_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ, y_t = S_t q_t in each head, for u = [q,
    k, v, r, s]; q and k of length 1, β = σ(s). Yang 2024 (gated DeltaNet).
    """

    name = "deltanet"

    def __init__(self, d: int, n: int, n_heads: int, *rest: Any, rngs: nnx.Rngs) -> None:
        super().__init__(d, n, n_heads, *rest, n_mixed=d + 2 * n * n_heads, rngs=rngs)

    def over(self, u: Array, carry: Carry | None, form: Form) -> tuple[Array, Carry]:
        keys = self.n * self.n_heads
        mixed, raw, beta = jnp.split(
            u, [2 * keys + self.d, 2 * keys + self.d + self.n_heads], axis=-1
        )
        mixed, window = self.convolved(mixed, carry)
        q, k, v = (self.heads(part) for part in jnp.split(mixed, [keys, 2 * keys], axis=-1))
        start, beta = None if carry is None else carry[0], jax.nn.sigmoid(beta)
        log_a = self.gates(raw)[1]
        y, last = delta_rule(unit(q), unit(k), v, log_a, beta, start, form, self.chunk)
        return y.reshape(*u.shape[:2], -1), (last, window)


# --- outputs: y of the core, and what went past it -> what a block adds ---------------------------


class Glu(nnx.Module):
    """a ⊙ σ(b) for [a, b] = W gelu(C y + D ⊙ x), the output of S4D and the LRU; C where `n_core`
    numbers are not the channels yet.
    """

    def __init__(self, d: int, n_core: int, std: float, *, rngs: nnx.Rngs) -> None:
        self.read = Dense(n_core, d, False, n_core**-0.5, rngs=rngs) if n_core else None
        self.skip = nnx.Param(jnp.ones(d, jnp.float32))
        self.dense = Dense(d, 2 * d, True, std, rngs=rngs)

    def __call__(self, y: Array, past: Array) -> Array:
        shape = past.shape
        y = y.reshape(-1, y.shape[-1])
        if self.read is not None:
            y = self.read(y)
        y = y + self.skip[...][None] * past.reshape(-1, shape[-1])
        a, b = jnp.split(self.dense(jax.nn.gelu(y)), 2, axis=-1)
        return (a * jax.nn.sigmoid(b)).reshape(shape)


class Plain(nnx.Module):
    """W y, the output of the minGRU."""

    def __init__(self, d: int, n_core: int, std: float, *, rngs: nnx.Rngs) -> None:
        self.dense = Dense(n_core, d, False, std, rngs=rngs)

    def __call__(self, y: Array, past: Array) -> Array:
        return self.dense(y.reshape(-1, y.shape[-1])).reshape(past.shape)


class Gated(nnx.Module):
    """W norm(y ⊙ silu(g)) for the g that went past the core, Mamba-2's output; or with a norm of
    each of `n_heads`, W (norm(y) ⊙ silu(g)), gated DeltaNet's.
    """

    def __init__(self, d: int, n_core: int, n_heads: int, std: float, *, rngs: nnx.Rngs) -> None:
        self.n_heads = n_heads
        self.norm = Norm(n_core // (n_heads or 1), "rms", False, rngs=rngs)
        self.dense = Dense(n_core, d, False, std, rngs=rngs)

    def __call__(self, y: Array, past: Array) -> Array:
        y, gate = (part.reshape(-1, part.shape[-1]) for part in (y, jax.nn.silu(past)))
        if self.n_heads:
            y = self.norm(y.reshape(y.shape[0], self.n_heads, -1)).reshape(y.shape) * gate
        else:
            y = self.norm(y * gate)
        return self.dense(y).reshape(*past.shape[:-1], -1)
