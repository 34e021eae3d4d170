"""Linear recurrences over time, each in three forms that give the same numbers: step by step, by an
associative scan, and in chunks.

* `diagonal`: h_t = a_t h_{t-1} + b_t elementwise, real or complex (Martin & Cundy 2018).
* `filtered`: the same for constant a, read out as y_t = Re(Σ_n w_n h_tn), in chunks.
* `scalar_decay`: h_t = a_t h_{t-1} + x_t b_tᵀ, y_t = h_t c_t, with a number a_t for each head:
  state space duality (Dao & Gu 2024).
* `delta_rule`: S_t = a_t S_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ, y_t = S_t q_t (Yang 2024).

Complex numbers are pairs (re, im) of real arrays, real ones are (re,), so that nothing outside sees
a complex array. Nothing here is a Fourier transform, which would leak a rounding error of the
future into every likelihood. Products of many a_t are exponentials of sums of their logarithms, and
such a sum over steps j < k <= i is summed as it is: the difference of two long sums would lose its
digits.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from genjax.protocol import Array

Form = Literal["recurrent", "scan", "chunked"]
Number = tuple[Array, ...]  # (re,) or (re, im)


def times(x: Number, y: Number) -> Number:
    """x y, elementwise."""
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def plus(x: Number, y: Number) -> Number:
    """x + y, elementwise."""
    return tuple(one + other for one, other in zip(x, y, strict=True))


def exponential(x: Number) -> Number:
    """e^x, elementwise."""
    size = jnp.exp(x[0])
    if len(x) == 1:
        return (size,)
    return size * jnp.cos(x[1]), size * jnp.sin(x[1])


def over_time(step: Callable[[Any, Any], Any], carry: Any, given: Any) -> tuple[Any, Any]:
    """The loop (carry, given_t) -> (carry, y_t) over given [B, T, ...] -> y [B, T, ...], and the
    carry after the last.
    """
    given = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), given)
    carry, y = jax.lax.scan(step, carry, given)
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), y), carry


def in_chunks(x: Array, chunk: int, fill: float = 0.0) -> Array:
    """x [B, T, ...] as [B, C, L, ...], in chunks of equal length L of about `chunk` steps, the last
    one filled up: 65 steps are one chunk rather than two of 64.
    """
    steps = x.shape[1]
    size = -(-steps // max(1, round(steps / chunk)))
    edges = [(0, 0), (0, -steps % size), *[(0, 0)] * (x.ndim - 2)]
    padded = jnp.pad(x, edges, constant_values=fill) if steps % size else x
    return padded.reshape(x.shape[0], -1, size, *x.shape[2:])


def joined(y: Array, steps: int) -> Array:
    """Chunks [B, C, L, ...] as one sequence again, [B, T, ...]."""
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :steps]


def decays(log_a: Array) -> Array:
    """Π a_k over j < k <= i, [..., L, L], for logarithms [..., L]; 0 above the diagonal.

    Masked before the exponential: above the diagonal the sums have no bound, and 0 times infinity
    is no gradient.
    """
    steps = jnp.arange(log_a.shape[-1])
    later = (steps[:, None] > steps[None]).reshape(*[1] * (log_a.ndim - 1), *[len(steps)] * 2)
    sums = jnp.cumsum(jnp.where(later, log_a[..., :, None], 0), axis=-2)
    here = (steps[:, None] >= steps[None]).reshape(later.shape)
    return jnp.exp(jnp.where(here, sums, -jnp.inf))


# --- diagonal -------------------------------------------------------------------------------------


def diagonal(
    a: Number, b: Number, start: Number, form: Form, chunk: int = 64
) -> tuple[Number, Number]:
    """h_t = a_t h_{t-1} + b_t elementwise -> h, and the last one.

    Example:
        >>> import jax.numpy as jnp
        >>> from genjax.nets.scans import diagonal
        >>> half, ones = jnp.full((1, 3, 1), 0.5), jnp.ones((1, 3, 1))
        >>> (h,), _ = diagonal((half,), (ones,), (jnp.zeros((1, 1)),), "scan")
        >>> h.ravel().tolist()
        [1.0, 1.5, 1.75]

    Args:
        a: [B or 1, T, ...].
        b: [B, T, ...].
        start: h before the first step, [B, ...].
        form: how to compute it.
        chunk: for "chunked", which is a loop over scans of about so many steps.
    """
    if form == "recurrent":

        def step(h: Number, given: tuple[Number, Number]) -> tuple[Number, Number]:
            h = plus(times(given[0], h), given[1])
            return h, h

        return over_time(step, start, (a, b))
    if form == "scan":
        return _scanned(a, b, start)
    steps = b[0].shape[1]
    one_and_zero = (1.0, 0.0)  # filled up with steps that keep h
    kept = tuple(in_chunks(leaf, chunk, one_and_zero[i]) for i, leaf in enumerate(a))
    parts = kept, tuple(in_chunks(leaf, chunk) for leaf in b)

    def one(h: Number, given: tuple[Number, Number]) -> tuple[Number, Number]:
        found, last = _scanned(*given, h)
        return last, found

    found, last = over_time(one, start, parts)
    return tuple(joined(leaf, steps) for leaf in found), last


def _scanned(a: Number, b: Number, start: Number) -> tuple[Number, Number]:
    """`diagonal` by an associative scan of the maps h -> a h + b."""

    def then(first: Any, second: Any) -> Any:
        return times(second[0], first[0]), plus(times(second[0], first[1]), second[1])

    product, h = jax.lax.associative_scan(then, (a, b), axis=1)
    h = plus(h, times(product, tuple(leaf[:, None] for leaf in start)))
    return h, tuple(leaf[:, -1] for leaf in h)


# --- a filter of every channel --------------------------------------------------------------------


def filtered(
    u: Array, log_a: Number, weight: Number, start: Number | None, chunk: int = 64
) -> tuple[Array, Number]:
    """h_t = a h_{t-1} + u_t, y_t = Re(Σ_n w_n h_tn) for constant a -> y [B, T, d], and the last h.

    Within a chunk it is a product with the matrix of the impulse response, whose upper half is 0,
    so that it is causal to the last bit; between chunks the state is carried.

    Args:
        u: [B, T, d].
        log_a, weight: [d, n].
        start: h before the first step, [B, d, n]; None for zeros.
        chunk: about how many steps are in a chunk.
    """
    steps, parts = u.shape[1], in_chunks(u, chunk)
    size = parts.shape[2]
    ages = jnp.arange(size + 1, dtype=u.dtype)[:, None, None]
    powers = exponential(tuple(ages * leaf[None] for leaf in log_a))  # [L + 1, d, n]
    read = times(tuple(leaf[None] for leaf in weight), powers)
    response = read[0][:size].sum(-1)  # [L, d]
    apart = jnp.arange(size)[:, None] - jnp.arange(size)[None]
    matrix = jnp.where((apart >= 0)[..., None], response[jnp.maximum(apart, 0)], 0)
    y = jnp.einsum("ijd,bcjd->bcid", matrix, parts)
    if start is None and parts.shape[1] == 1:
        return joined(y, steps), _onwards(parts[:, 0, :steps], powers, None)
    before, h = _before(parts[:, :-1], powers, start)
    re, im = (jnp.einsum("idn,bcdn->bcid", r[1:], x) for r, x in zip(read, before, strict=True))
    # A chunk that is filled up ends after its last true step.
    left = steps - (parts.shape[1] - 1) * size
    return joined(y + re - im, steps), _onwards(parts[:, -1, :left], powers, h)


def _onwards(u: Array, powers: Number, h: Number | None) -> Number:
    """The state after u [B, L, d], from h or from zeros."""
    steps = u.shape[1]
    added = tuple(jnp.einsum("ldn,bld->bdn", p[:steps][::-1], u) for p in powers)
    if h is None:
        return added
    return plus(added, times(tuple(p[steps][None] for p in powers), h))


def _before(parts: Array, powers: Number, h: Number | None) -> tuple[Number, Number]:
    """The states before each of the chunks [B, C, L, d] and after them, [B, C + 1, d, n], and the
    last of them.
    """
    size = parts.shape[2]
    added = tuple(jnp.einsum("ldn,bcld->bcdn", p[:size][::-1], parts) for p in powers)
    if h is None:
        h = tuple(jnp.zeros((parts.shape[0], *p.shape[1:]), p.dtype) for p in powers)

    def one(h: Number, added: Number) -> tuple[Number, Number]:
        return plus(times(tuple(p[size][None] for p in powers), h), added), h

    before, last = over_time(one, h, added)
    every = zip(before, last, strict=True)
    return tuple(jnp.concatenate([old, new[:, None]], axis=1) for old, new in every), last


# --- state space duality --------------------------------------------------------------------------


def scalar_step(h: Array, x: Array, log_a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """One step: h [B, H, P, N], x [B, H, P], log_a [B, H], b and c [B, N] -> h, y [B, H, P]."""
    h = jnp.exp(log_a)[..., None, None] * h + x[..., None] * b[:, None, None]
    return h, (h * c[:, None, None]).sum(-1)


def scalar_decay(
    x: Array, log_a: Array, b: Array, c: Array, start: Array | None, form: Form, chunk: int = 64
) -> tuple[Array, Array]:
    """h_t = a_t h_{t-1} + x_t b_tᵀ, y_t = h_t c_t -> y [B, T, H, P], and the last h [B, H, P, N].

    In chunks of L steps it is a masked product (c_iᵀ b_j Π a_k) x_j, as in attention, and a loop
    over the chunks' states. Dao & Gu 2024, section 6.

    Args:
        x: [B, T, H, P].
        log_a: [B, T, H], at most 0.
        b, c: [B, T, N], shared by the heads.
        start: h before the first step; None for zeros.
        form: how to compute it.
        chunk: about L.
    """
    if form == "chunked":
        return _scalar_chunked(x, log_a, b, c, start, chunk)
    if start is None:
        start = jnp.zeros((x.shape[0], *x.shape[2:], b.shape[-1]), x.dtype)
    if form == "recurrent":
        return over_time(lambda h, given: scalar_step(h, *given), start, (x, log_a, b, c))
    a = jnp.exp(log_a)[..., None, None]
    given = x[..., None] * b[:, :, None, None]
    (h,), (last,) = _scanned((a,), (given,), (start,))
    return (h * c[:, :, None, None]).sum(-1), last


def _scalar_chunked(
    x: Array, log_a: Array, b: Array, c: Array, start: Array | None, chunk: int
) -> tuple[Array, Array]:
    steps = x.shape[1]
    x, log_a, b, c = (in_chunks(leaf, chunk) for leaf in (x, log_a, b, c))
    x, log_a = x.transpose(0, 1, 3, 2, 4), log_a.swapaxes(2, 3)  # [B, C, H, L, ...]
    within = decays(log_a)
    scores = jnp.einsum("bcin,bcjn->bcij", c, b)
    y = jnp.einsum("bchij,bchjp->bchip", within * scores[:, :, None], x)
    # What each chunk adds to the state, had it begun with none.
    added = jnp.einsum("bchjp,bcjn->bchpn", within[..., -1, :, None] * x, b)
    since = jnp.exp(jnp.cumsum(log_a, axis=-1))
    if start is None and x.shape[1] == 1:
        last = added[:, 0]
    else:
        first = jnp.zeros_like(added[:, 0]) if start is None else start

        def one(h: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
            return given[0][..., None, None] * h + given[1], h

        before, last = over_time(one, first, (since[..., -1], added))
        y = y + since[..., None] * jnp.einsum("bchpn,bcin->bchip", before, c)
    return joined(y.swapaxes(2, 3), steps), last


# --- the gated delta rule -------------------------------------------------------------------------


def delta_step(
    s: Array, q: Array, k: Array, v: Array, log_a: Array, beta: Array
) -> tuple[Array, Array]:
    """One step: s [B, H, V, K], q and k [B, H, K], v [B, H, V], log_a and beta [B, H] -> s, y [B,
    H, V].

    As s_t = a s + β (v - a s k) kᵀ: what s says of the key is replaced, by the share β.
    """
    s = jnp.exp(log_a)[..., None, None] * s
    error = v - (s * k[..., None, :]).sum(-1)
    s = s + (beta[..., None] * error)[..., None] * k[..., None, :]
    return s, (s * q[..., None, :]).sum(-1)


def inverse(lower: Array) -> Array:
    """(I + lower)^{-1} for lower [..., L, L] with zeros on and above its diagonal.

    By halves, [[A, 0], [B, C]]^{-1} = [[A', 0], [-C' B A', C']], both at once: products only, of
    which a batch is quick, where a triangular solver goes through it one by one.
    """
    size = lower.shape[-1]
    if size == 1:
        return jnp.ones_like(lower)
    if size % 2:
        edges = [(0, 0)] * (lower.ndim - 2)
        return inverse(jnp.pad(lower, [*edges, (0, 1), (0, 1)]))[..., :size, :size]
    half = size // 2
    blocks = [lower[..., :half, :half], lower[..., half:, half:]]
    both = inverse(jnp.stack(blocks, axis=-3))
    first, second = both[..., 0, :, :], both[..., 1, :, :]
    corner = -(second @ lower[..., half:, :half] @ first)
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    log_a: Array,
    beta: Array,
    start: Array | None,
    form: Form,
    chunk: int = 64,
) -> tuple[Array, Array]:
    """S_t = a_t S_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ, y_t = S_t q_t -> y [B, T, H, V], and
    the last S [B, H, V, K].

    In chunks, with g_i = Π a_k over k <= i, what step i writes is u_i k_iᵀ with

        u_i = β_i (v_i - g_i S k_i - Σ_{j<i} (g_i / g_j) (k_jᵀ k_i) u_j),

    a triangular system (Yang 2024, section 3.3). The scan multiplies K x K matrices.

    Args:
        q, k: [B, T, H, K]; k of length at most 1.
        v: [B, T, H, V].
        log_a: [B, T, H], at most 0.
        beta: [B, T, H], from 0 to 1.
        start: S before the first step; None for zeros.
        form: how to compute it.
        chunk: about how many steps are in a chunk.
    """
    if form == "chunked":
        return _delta_chunked(q, k, v, log_a, beta, start, chunk)
    if start is None:
        start = jnp.zeros((*v.shape[:1], *v.shape[2:], k.shape[-1]), v.dtype)
    if form == "recurrent":
        return over_time(lambda s, given: delta_step(s, *given), start, (q, k, v, log_a, beta))
    eye = jnp.eye(k.shape[-1], dtype=k.dtype).reshape(1, 1, 1, k.shape[-1], -1)
    written = beta[..., None] * k
    keep = jnp.exp(log_a)[..., None, None] * (eye - written[..., None] * k[..., None, :])
    added = v[..., None] * written[..., None, :]

    def then(first: Any, second: Any) -> Any:
        return first[0] @ second[0], first[1] @ second[0] + second[1]

    kept, s = jax.lax.associative_scan(then, (keep, added), axis=1)
    s = s + start[:, None] @ kept
    return (s * q[..., None, :]).sum(-1), s[:, -1]


def _delta_chunked(
    q: Array, k: Array, v: Array, log_a: Array, beta: Array, start: Array | None, chunk: int
) -> tuple[Array, Array]:
    steps = q.shape[1]
    q, k, v, log_a, beta = (
        in_chunks(leaf, chunk).swapaxes(2, 3) for leaf in (q, k, v, log_a, beta)
    )  # [B, C, H, L, ...]
    within, since = decays(log_a), jnp.exp(jnp.cumsum(log_a, axis=-1))[..., None]
    overlap = jnp.einsum("bchik,bchjk->bchij", k, k)
    system = beta[..., None] * jnp.tril(within * overlap, -1)
    sides = beta[..., None] * jnp.concatenate([v, since * k], axis=-1)
    solved = inverse(system) @ sides
    own, of_state = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    reads = within * jnp.einsum("bchik,bchjk->bchij", q, k)
    to_end = within[..., -1, :, None] * k
    if start is None:
        start = jnp.zeros((*v.shape[:1], v.shape[2], v.shape[-1], k.shape[-1]), v.dtype)

    def one(s: Array, given: Any) -> tuple[Array, Array]:
        own, of_state, reads, read_state, to_end, kept = given
        u = own - of_state @ s.swapaxes(-1, -2)
        y = reads @ u + read_state @ s.swapaxes(-1, -2)
        return kept[..., None] * s + u.swapaxes(-1, -2) @ to_end, y

    given = (own, of_state, reads, since * q, to_end, since[..., -1, :])
    y, last = over_time(one, start, given)
    return joined(y.swapaxes(2, 3), steps), last
