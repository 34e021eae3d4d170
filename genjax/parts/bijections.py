"""Bijections with the logarithm of their Jacobian's determinant, and how they are put together.

`forward` goes from data x to noise z, which is what a density needs; `inverse` goes back, which is
what samples need. Both are pure functions of (params, x, cond) and treat each example by itself:

    ln p(x) = ln N(z; 0, I) + ln |det dz/dx|

Layers of one kind are `stacked`: their parameters have an axis in front, and a loop goes over it in
both directions, so that what is compiled does not grow with their number.

Dinh 2017 (coupling), Papamakarios 2017 (masked autoregressive), Kingma 2016 (inverse
autoregressive), Kingma & Dhariwal 2018 (actnorm, products by L U).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genjax.nets.functional import Net
from genjax.parts.distributions import sum_event
from genjax.parts.monotone import Monotone
from genjax.protocol import Array, Key, Params

Moved = tuple[Array, Array]  # a value, and ln |det| of how it came about, [n]


class Bijection(NamedTuple):
    """An invertible map of events, given conditions c [n, E] (or None).

    Attributes:
        init: (key) -> params.
        forward: (params, x, c) -> z, and ln |det dz/dx| [n].
        inverse: (params, z, c) -> x, and ln |det dx/dz| [n].
        prepare: (params, x, c, weight [n]) -> params that are initialised from data, and z by them;
            None where nothing is. An example of weight 0 has no part in it, whatever is in it.
    """

    init: Callable[[Key], Params]
    forward: Callable[[Params, Array, Array | None], Moved]
    inverse: Callable[[Params, Array, Array | None], Moved]
    prepare: Callable[[Params, Array, Array | None, Array], tuple[Params, Array]] | None = None


def _none(key: Key) -> Params:
    return {}


def unmoved(x: Array) -> Array:
    """ln |det| = 0 for each example, [n]."""
    return jnp.zeros(x.shape[0], x.dtype)


def prepared(
    bijection: Bijection, params: Params, x: Array, c: Array | None, weight: Array
) -> tuple[Params, Array]:
    """`prepare` of a bijection that has one; of any other the same parameters, and z."""
    if bijection.prepare is None:
        return params, bijection.forward(params, x, c)[0]
    return bijection.prepare(params, x, c, weight)


# --- put together ---------------------------------------------------------------------------------


def chain(**parts: Bijection) -> Bijection:
    """One after the other, in the order given; the parameters go by their names."""

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(parts))
        return {name: part.init(k) for k, (name, part) in zip(keys, parts.items(), strict=True)}

    def forward(params: Params, x: Array, c: Array | None) -> Moved:
        total = unmoved(x)
        for name, part in parts.items():
            x, log_det = part.forward(params[name], x, c)
            total = total + log_det
        return x, total

    def inverse(params: Params, z: Array, c: Array | None) -> Moved:
        total = unmoved(z)
        for name, part in reversed(parts.items()):
            z, log_det = part.inverse(params[name], z, c)
            total = total + log_det
        return z, total

    def prepare(params: Params, x: Array, c: Array | None, weight: Array) -> tuple[Params, Array]:
        after = {}
        for name, part in parts.items():
            after[name], x = prepared(part, params[name], x, c, weight)
        return after, x

    nothing = all(part.prepare is None for part in parts.values())
    return Bijection(init, forward, inverse, None if nothing else prepare)


def stacked(layer: Callable[[Array], Bijection], n_layers: int) -> Bijection:
    """layer(0), layer(1) ... one after the other, as a loop in both directions.

    Args:
        layer: (number, an int32 scalar that is traced) -> the bijection; all have the same tree of
            parameters, which are stacked along a first axis.
        n_layers: how many.
    """
    numbers = jnp.arange(n_layers, dtype=jnp.int32)

    def init(key: Key) -> Params:
        def one(number: Array, key: Key) -> Params:
            return layer(number).init(key)

        return jax.vmap(one)(numbers, jax.random.split(key, n_layers))

    def through(params: Params, x: Array, c: Array | None, back: bool) -> Moved:
        def step(carry: Moved, at: tuple[Array, Params]) -> tuple[Moved, None]:
            number, own = at
            one = layer(number)
            x, log_det = (one.inverse if back else one.forward)(own, carry[0], c)
            return (x, carry[1] + log_det), None

        return jax.lax.scan(step, (x, unmoved(x)), (numbers, params), reverse=back)[0]

    def forward(params: Params, x: Array, c: Array | None) -> Moved:
        return through(params, x, c, back=False)

    def inverse(params: Params, z: Array, c: Array | None) -> Moved:
        return through(params, z, c, back=True)

    def prepare(params: Params, x: Array, c: Array | None, weight: Array) -> tuple[Params, Array]:
        def step(x: Array, at: tuple[Array, Params]) -> tuple[Array, Params]:
            number, own = at
            after, z = prepared(layer(number), own, x, c, weight)
            return z, after

        z, after = jax.lax.scan(step, x, (numbers, params))
        return after, z

    nothing = layer(numbers[0]).prepare is None
    return Bijection(init, forward, inverse, None if nothing else prepare)


def inverted(bijection: Bijection) -> Bijection:
    """The same map the other way round, with the same parameters; it has no `prepare`."""
    return Bijection(bijection.init, bijection.inverse, bijection.forward)


# --- the order of numbers -------------------------------------------------------------------------


def rearranged(there: Callable[[Array], Array], back: Callable[[Array], Array]) -> Bijection:
    """Numbers in another order or shape: `there` from x to z, `back` from z to x."""

    def forward(params: Params, x: Array, c: Array | None) -> Moved:
        return there(x), unmoved(x)

    def inverse(params: Params, z: Array, c: Array | None) -> Moved:
        return back(z), unmoved(z)

    return Bijection(_none, forward, inverse)


def flattened(shape: tuple[int, ...]) -> Bijection:
    """Events of that shape as vectors."""
    size = math.prod(shape)
    return rearranged(lambda x: x.reshape(-1, size), lambda z: z.reshape(-1, *shape))


def reversed_order() -> Bijection:
    """The last axis the other way round."""
    return rearranged(lambda x: x[..., ::-1], lambda z: z[..., ::-1])


def reordered(order: Array) -> Bijection:
    """z_i = x_{order_i} along the last axis; `order` is a permutation, and may be traced."""
    back = jnp.argsort(order)
    return rearranged(lambda x: jnp.take(x, order, axis=-1), lambda z: jnp.take(z, back, axis=-1))


# --- scales, shifts and products ------------------------------------------------------------------


def _places(x: Array) -> int:
    """How many vectors an event of images consists of: 1 for a vector, H W for an image."""
    return math.prod(x.shape[1:-1])


def _each(x: Array, log_det: Array) -> Array:
    """The same ln |det| for every example, [n]."""
    return jnp.broadcast_to(log_det * _places(x), x.shape[:1])


def _along_last(vector: Array, x: Array) -> Array:
    return vector.reshape(*[1] * (x.ndim - 1), -1)


def _statistics(x: Array, weight: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each entry of the last axis, [d] each, over examples as they
    are weighted; 1 for an entry that does not vary.
    """
    share = (weight / jnp.sum(weight)).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    axes = tuple(range(x.ndim - 1))
    # What has no weight may be anything, and 0 times infinity is no number.
    x = jnp.where(share > 0, x, 0)
    mean = jnp.sum(share * x, axis=axes) / _places(x)
    apart = jnp.square(x - _along_last(mean, x))
    std = jnp.sqrt(jnp.sum(share * apart, axis=axes) / _places(x))
    varies = std > 1e-6 * (1 + jnp.abs(mean))
    return mean, jnp.where(varies, std, 1)


def actnorm(d: int) -> Bijection:
    """z = (x - shift) e^(-log_scale) along the last axis, of d entries; `prepare` makes mean 0 and
    variance 1 of the batch, and training goes on from there. Kingma & Dhariwal 2018, section 3.1.
    """

    def init(key: Key) -> Params:
        return {"shift": jnp.zeros(d, jnp.float32), "log_scale": jnp.zeros(d, jnp.float32)}

    def forward(params: Params, x: Array, c: Array | None) -> Moved:
        shift, log_scale = (_along_last(params[name], x) for name in ("shift", "log_scale"))
        return (x - shift) * jnp.exp(-log_scale), _each(x, -jnp.sum(log_scale))

    def inverse(params: Params, z: Array, c: Array | None) -> Moved:
        shift, log_scale = (_along_last(params[name], z) for name in ("shift", "log_scale"))
        return z * jnp.exp(log_scale) + shift, _each(z, jnp.sum(log_scale))

    def prepare(params: Params, x: Array, c: Array | None, weight: Array) -> tuple[Params, Array]:
        mean, std = _statistics(x, weight)
        after = {"shift": mean, "log_scale": jnp.log(std)}
        return after, forward(after, x, c)[0]

    return Bijection(init, forward, inverse, prepare)


def matrix(params: Params) -> tuple[Array, Array]:
    """L, with ones on its diagonal, and U of what `linear` learns, [d, d] each."""
    scale = jnp.exp(params["log_diagonal"])
    eye = jnp.eye(scale.shape[0], dtype=scale.dtype)
    return jnp.tril(params["lower"], -1) + eye, jnp.triu(params["upper"], 1) + eye * scale[None]


def linear(d: int) -> Bijection:
    """z = W x along the last axis, W = L U: a 1x1 convolution of images, and a product for vectors.
    ln |det| = H W Σ ln diag(U). Kingma & Dhariwal 2018, section 3.2.

    It begins as the identity. Their fixed permutation is a bijection of its own.
    """

    def init(key: Key) -> Params:
        zeros = jnp.zeros((d, d), jnp.float32)
        return {"lower": zeros, "upper": zeros, "log_diagonal": jnp.zeros(d, jnp.float32)}

    def product(x: Array, matrix: Array) -> Array:
        # In full precision: an accelerator's default would make the determinant another map's.
        return jnp.matmul(x, matrix.T, precision=jax.lax.Precision.HIGHEST)

    def forward(params: Params, x: Array, c: Array | None) -> Moved:
        lower, upper = matrix(params)
        return product(product(x, upper), lower), _each(x, jnp.sum(params["log_diagonal"]))

    def inverse(params: Params, z: Array, c: Array | None) -> Moved:
        lower, upper = matrix(params)
        flat = z.reshape(-1, d).T
        flat = jax.lax.linalg.triangular_solve(
            lower, flat, left_side=True, lower=True, unit_diagonal=True
        )
        flat = jax.lax.linalg.triangular_solve(upper, flat, left_side=True, lower=False)
        return flat.T.reshape(z.shape), _each(z, -jnp.sum(params["log_diagonal"]))

    return Bijection(init, forward, inverse)


# --- maps whose parameters a network gives --------------------------------------------------------


def _moved(pair: Moved) -> Moved:
    """A value, and the sum of its logarithms [n, *event] over the event."""
    value, each = pair
    return value, sum_event(each.reshape(each.shape[0], -1))


def coupling(net: Net, monotone: Monotone, d: int) -> Bijection:
    """z = (a, f(b; net(a, c))) for x = (a, b) along the last axis, of d entries, of which a has d/2
    rounded down. Dinh 2017, equations 4 and 5.

    `net`: (a, c) -> the parameters of the monotone map of each entry of b, [..., n_params].
    """
    kept = d // 2

    def of(move: Callable[[Array, Array], Moved]) -> Callable[..., Moved]:
        def through(params: Params, x: Array, c: Array | None) -> Moved:
            a, b = x[..., :kept], x[..., kept:]
            b, log_det = _moved(move(b, net.apply(params, {}, a, c)[0]))
            return jnp.concatenate([a, b], axis=-1), log_det

        return through

    return Bijection(lambda key: net.init(key)[0], of(monotone.forward), of(monotone.inverse))


def autoregressive(net: Net, monotone: Monotone, d: int) -> Bijection:
    """z_i = f(x_i; net_i(x_1 ... x_{i-1}, c)) for vectors x [n, d]. Papamakarios 2017.

    `net`: (x, c) -> parameters [n, d, n_params], those of entry i a function of the entries before
    it. The inverse takes d passes, one for each entry; `inverted`, that is the other direction
    (Kingma 2016).
    """

    def forward(params: Params, x: Array, c: Array | None) -> Moved:
        return _moved(monotone.forward(x, net.apply(params, {}, x, c)[0]))

    def inverse(params: Params, z: Array, c: Array | None) -> Moved:
        def one(x: Array, i: Array) -> tuple[Array, None]:
            found, _ = monotone.inverse(z, net.apply(params, {}, x, c)[0])
            # Only what is right by now: what comes later may be as large as it likes.
            return jnp.where(jnp.arange(d)[None] == i, found, x), None

        x = jax.lax.scan(one, jnp.zeros_like(z), jnp.arange(d))[0]
        return x, -forward(params, x, c)[1]

    return Bijection(lambda key: net.init(key)[0], forward, inverse)
