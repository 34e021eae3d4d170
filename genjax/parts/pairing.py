"""Couplings: which noise goes with which example of a batch, as plain functions of both.

Paired at random, the straight lines from noise to data cross, and the flow that is learned from
them bends. Pairing noise and data of a batch by optimal transport makes them cross less (Pooladian
2023, Tong 2024). Everything here runs inside a compiled step, on any device: the assignment is
found there, not by a call out to the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genjax.protocol import Array, Key

_ENTROPY = 0.05  # the temperature of the entropic coupling, in units of the mean cost


def squared_distances(x: Array, y: Array) -> Array:
    """|x_i - y_j|² of all pairs, [n, m], for x [n, *event] and y [m, *event]."""
    x, y = x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return (
        jnp.sum(jnp.square(x), axis=1)[:, None]
        - 2 * product
        + jnp.sum(jnp.square(y), axis=1)[None, :]
    )


class _Partners(NamedTuple):
    """Partners found so far, and what shows that these rows have no better ones.

    Attributes:
        price: of the columns, [n]: no column is worth more to a row than its own, where cost +
            price is the least of its row. (Prices are v < 0 in the literature, here -v.)
        taken: the column of each row, int [n], -1 for none.
        owner: the row of each column, int [n], -1 for none.
    """

    price: Array
    taken: Array
    owner: Array


class _Search(NamedTuple):
    """A search for the cheapest way from a row without a partner to a column without one.

    Attributes:
        row: whose costs are looked at next; -1 when the way has come to a free column.
        column: the last column that was settled; -1 for none.
        ahead: how much more it costs to come to each column than to come here, [n].
        before: the row from which a column is reached at that cost, int [n].
        done: the columns that are settled, bool [n].
        price: as in `_Partners`, with what the way has raised so far.
    """

    row: Array
    column: Array
    ahead: Array
    before: Array
    done: Array
    price: Array


def _search(cost: Array, found: _Partners, start: Array) -> _Search:
    """The cheapest way from the row `start`, by Dijkstra's algorithm: at most n steps.

    All is kept relative to where the way has come, so that a large cost on it takes no digits from
    the small ones behind it.
    """
    n = len(cost)
    nowhere = jnp.full(n, -1, start.dtype)

    def step(at: _Search) -> _Search:
        own = jnp.where(at.column < 0, 0, cost[at.row, at.column] + at.price[at.column])
        more = (cost[at.row] - own) + at.price
        better = ~at.done & (more < at.ahead)
        ahead = jnp.where(better, more, at.ahead)
        before = jnp.where(better, at.row, at.before)
        column = jnp.argmin(jnp.where(at.done, jnp.inf, ahead)).astype(start.dtype)
        least = ahead[column]
        price = jnp.where(at.done, at.price + least, at.price)
        done = at.done.at[column].set(True)
        return _Search(found.owner[column], column, ahead - least, before, done, price)

    far = jnp.full(n, jnp.inf, cost.dtype)
    begin = _Search(start, nowhere[0], far, nowhere, jnp.zeros(n, bool), found.price)
    return jax.lax.while_loop(lambda at: at.row >= 0, step, begin)


def _augment(cost: Array, found: _Partners, start: Array) -> _Partners:
    """One row more with a partner: those on the cheapest way each take the next one's."""
    way = _search(cost, found, start)

    def back(at: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        column, taken, owner = at
        row = way.before[column]
        return taken[row], taken.at[row].set(column), owner.at[column].set(row)

    ends = (way.column, found.taken, found.owner)
    _, taken, owner = jax.lax.while_loop(lambda at: at[0] >= 0, back, ends)
    return _Partners(way.price, taken, owner)


def _median(values: Array, kept: Array) -> Array:
    """The median of what is kept of each row, [n, 1]: of an even number the upper one."""
    ordered = jnp.sort(jnp.where(kept, values, jnp.inf), axis=1)
    return jnp.take_along_axis(ordered, kept.sum(1, keepdims=True) // 2, axis=1, mode="clip")


def assignment(cost: Array, allowed: Array | None = None) -> Array:
    """The permutation π, int [n], that minimises Σ_i cost[i, π(i)] among those with allowed[i,
    π(i)].

    By shortest augmenting paths (Jonker & Volgenant 1987): one row after the other finds a partner,
    and those before it change theirs where that is cheaper. It is exact but for rounding, with no
    tolerance that would grow with the range of the costs, and rows of a larger scale than most come
    last, so that one far point takes no digits from the others. It takes at most n² steps of n
    operations. Costs that are not finite count as 0; where no permutation is allowed, pairs that
    are not come in.

    Args:
        cost: [n, n].
        allowed: bool [n, n]: whether two examples are of the same group, so that they may have each
            other's noise; all if None.
    """
    n = cost.shape[0]
    if jnp.finfo(cost.dtype).bits < 32:
        cost = cost.astype(jnp.float32)
    most = float(jnp.finfo(cost.dtype).max) / (8 * n * n)  # sums of them stay finite
    cost = jnp.clip(jnp.where(jnp.isfinite(cost), cost, 0), -most, most)
    kept = jnp.ones((n, n), bool) if allowed is None else allowed
    # What a row has in common changes nothing, and would take digits from what it has not.
    cost = jnp.where(kept, cost - _median(cost, kept), 0)
    size = _median(jnp.abs(cost), kept)
    near = size <= 16 * jnp.median(size)
    least = jnp.min(jnp.where(kept & near, cost, jnp.inf), axis=0)
    price = -jnp.where(jnp.isfinite(least), least, 0)  # any price will do to begin with
    # More than all pairs that are allowed can cost together, so that one less is always better.
    cost = jnp.where(kept, cost, 2 * n * (1 + jnp.max(jnp.abs(cost))))
    order = jnp.argsort(~near[:, 0]).astype(jnp.int32)
    none = jnp.full(n, -1, order.dtype)
    found = _Partners(price, none, none)
    return jax.lax.scan(lambda f, row: (_augment(cost, f, row), None), found, order)[0].taken


def sinkhorn(cost: Array, temperature: Array | float, n_iterations: int = 100) -> Array:
    """ln of the plan P [n, n] that minimises Σ P cost - temperature · H(P) among those whose rows
    and columns sum to 1/n.

    Sinkhorn's iterations in logarithms (Cuturi 2013); the rows' sums are exact, the columns' after
    enough iterations. For temperature -> 0 it is the optimal assignment over n, for ∞ it is 1/n²
    everywhere.
    """
    n = cost.shape[0]
    kernel = -cost / jnp.asarray(temperature, cost.dtype)
    share = -jnp.log(jnp.asarray(n, cost.dtype))

    def balance(_: int, column: Array) -> Array:
        row = share - jax.nn.logsumexp(kernel + column[None, :], axis=1)
        return share - jax.nn.logsumexp(kernel + row[:, None], axis=0)

    column = jax.lax.fori_loop(0, n_iterations, balance, jnp.zeros(n, cost.dtype))
    row = share - jax.nn.logsumexp(kernel + column[None, :], axis=1)
    return kernel + row[:, None] + column[None, :]


def independent(key: Key, x: Array, y: Array, allowed: Array | None = None) -> Array:
    """Each with its own, as they were drawn."""
    return jnp.arange(x.shape[0])


def _middle(x: Array) -> Array:
    """The mean of x [n, d] without what is far away, [1, d]: from the mean of all, no more than
    twice the median distance.
    """
    away = jnp.sqrt(jnp.sum(jnp.square(x - x.mean(0, keepdims=True)), axis=1))
    near = (away <= 2 * jnp.median(away))[:, None]
    return jnp.where(near, x, 0).sum(0, keepdims=True) / near.sum().astype(x.dtype)


def optimal(key: Key, x: Array, y: Array, allowed: Array | None = None) -> Array:
    """The `assignment` that is shortest in the sum of squares.

    Of |x_i - y_j|² only -2 x_i y_j tells permutations apart. That of deviations from a middle is
    what is left of it when either side is moved, and loses nothing to the size of |x|² and |y|².
    """
    x, y = (points.reshape(points.shape[0], -1) for points in (x, y))
    x, y = x - _middle(x), y - _middle(y)
    return assignment(-2 * jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST), allowed)


def entropic(key: Key, x: Array, y: Array, allowed: Array | None = None) -> Array:
    """For each x a y drawn from its row of Sinkhorn's plan, so that one y may be drawn twice; T is
    5 % of the mean cost.
    """
    cost = squared_distances(x, y)
    kept = cost if allowed is None else jnp.where(allowed, cost, jnp.inf)
    return jax.random.categorical(key, sinkhorn(kept, _ENTROPY * jnp.mean(cost)), axis=1)


# (key, x [n, *event], y [n, *event], allowed bool [n, n] | None) -> for each x the index of its y,
# int [n].
COUPLINGS: dict[str, Callable[[Key, Array, Array, Array | None], Array]] = {
    "independent": independent,
    "optimal": optimal,
    "entropic": entropic,
}
