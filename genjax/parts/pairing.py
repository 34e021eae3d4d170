"""Couplings: which noise goes with which example of a batch, as plain functions of both.

Paired at random, the straight lines from noise to data cross, and the flow that is learned from
them bends. Pairing noise and data of a batch by optimal transport makes them cross less (Pooladian
2023, Tong 2024). Everything here runs inside a compiled step, on any device: the assignment is an
auction, not a call out to the host.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from genjax.protocol import Array, Key

_SCALES = 6  # auctions with ever smaller raises, each beginning with the prices of the one before
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


def assignment(cost: Array, allowed: Array | None = None) -> Array:
    """The permutation π, int [n], that minimises Σ_i cost[i, π(i)] among those with allowed[i,
    π(i)].

    An auction (Bertsekas 1988): every example without a partner bids for the noise that is worth
    most to it, raising its price by what it is worth more than the second best, plus ε; the highest
    bid takes it. The sum is at most n ε above the least one, where n ε is a thousandth of the range
    of the costs in the last of a few rounds; so it is the least one wherever the second best
    permutation costs that thousandth more. Costs that are not finite count as 0: the auction ends
    whatever comes in.

    Args:
        cost: [n, n].
        allowed: bool [n, n]: whether two examples are of the same group, so that they may have each
            other's noise; all if None.
    """
    n = cost.shape[0]
    cost = jnp.where(jnp.isfinite(cost), cost, 0)
    span = jnp.maximum(jnp.max(cost) - jnp.min(cost), jnp.finfo(cost.dtype).tiny)
    worth = (jnp.min(cost) - cost) / span  # from -1 to 0
    worth = worth if allowed is None else jnp.where(allowed, worth, -jnp.inf)
    rows = jnp.arange(n)
    nobody = jnp.full(n, -1, rows.dtype)

    def bid(carry: tuple[Array, Array, Array], epsilon: Array) -> tuple[Array, Array, Array]:
        # taken [n]: whose partner is which; owner [n]: the inverse; -1 for none
        price, taken, owner = carry
        net = worth - price[None, :]
        best, favourite = jnp.max(net, axis=1), jnp.argmax(net, axis=1).astype(rows.dtype)
        chosen = favourite[:, None] == rows[None, :]
        second = jnp.max(jnp.where(chosen, -jnp.inf, net), axis=1)
        second = jnp.where(jnp.isfinite(second), second, best - 1)  # the only one that is allowed
        raised = jnp.where(taken < 0, price[favourite] + (best - second) + epsilon, -jnp.inf)
        bids = jnp.where(chosen, raised[:, None], -jnp.inf)
        highest, winner = jnp.max(bids, axis=0), jnp.argmax(bids, axis=0).astype(rows.dtype)
        sold = highest > -jnp.inf
        owner = jnp.where(sold, winner, owner)
        # Whoever owned what was sold has nothing now, and the winner has it: the inverse of
        # `owner`, made anew.
        has = owner[None, :] == rows[:, None]
        taken = jnp.where(has.any(axis=1), jnp.argmax(has, axis=1).astype(rows.dtype), -1)
        return jnp.where(sold, highest, price), taken, owner

    def auction(price: Array, epsilon: Array) -> tuple[Array, Array]:
        price, taken, _ = jax.lax.while_loop(
            lambda carry: (carry[1] < 0).any(),
            lambda carry: bid(carry, epsilon),
            (price, nobody, nobody),
        )
        return price - jnp.min(price), taken

    if n == 1:
        return jnp.zeros(1, rows.dtype)
    epsilons = jnp.geomspace(0.2, 1e-3 / n, _SCALES, dtype=cost.dtype)
    return jax.lax.scan(auction, jnp.zeros(n, cost.dtype), epsilons)[1][-1]


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


def optimal(key: Key, x: Array, y: Array, allowed: Array | None = None) -> Array:
    """The `assignment` that is shortest in the sum of squares."""
    return assignment(squared_distances(x, y), allowed)


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
