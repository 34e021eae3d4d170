"""Couplings of noise and data: the assignment against all permutations, and Sinkhorn's plan against
both of its limits.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from genjax.parts.pairing import COUPLINGS, assignment, sinkhorn, squared_distances

RNG = np.random.default_rng(0)
assign = jax.jit(assignment)
plan_of = jax.jit(lambda cost, temperature: jnp.exp(sinkhorn(cost, temperature, 500)))


def least(cost, allowed=None):
    """The cheapest permutation of all, by trying them."""

    def fits(p):
        return allowed is None or all(allowed[i, j] for i, j in enumerate(p))

    every = [p for p in itertools.permutations(range(len(cost))) if fits(p)]
    return np.asarray(min(every, key=lambda p: cost[np.arange(len(cost)), list(p)].sum()))


def test_distances_of_all_pairs(x64):
    x, y = RNG.normal(size=(5, 2, 3)), RNG.normal(size=(4, 2, 3))
    wanted = [[np.square(a - b).sum() for b in y] for a in x]
    np.testing.assert_allclose(
        squared_distances(jnp.asarray(x), jnp.asarray(y)), wanted, rtol=1e-12
    )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_assignment_is_the_cheapest_of_all_permutations(scale):
    for _ in range(20):
        cost = (scale * RNG.normal(size=(6, 6))).astype(np.float32)
        np.testing.assert_array_equal(assign(cost), least(cost))


def test_forbidden_pairs_are_not_made():
    groups = np.asarray(
        [0, 1, 1, 2, 0, 1]
    )  # one group of three, one of two, one of a single example
    allowed = groups[:, None] == groups[None, :]
    for _ in range(20):
        cost = RNG.normal(size=(6, 6)).astype(np.float32)
        np.testing.assert_array_equal(assign(cost, allowed), least(cost, allowed))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_pairs_cost_at_most_a_thousandth_of_the_range_more_than_the_least(dtype):
    with jax.enable_x64(dtype == np.float64):
        x, y = RNG.normal(size=(2, 64, 2))
        cost = np.asarray(squared_distances(jnp.asarray(x, dtype), jnp.asarray(y, dtype)))
        found = np.asarray(assign(cost))
    assert sorted(found) == list(range(64))
    best = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
    assert best * (1 - 1e-6) <= cost[np.arange(64), found].sum() <= best + 1e-3 * np.ptp(cost)


def test_a_translation_is_undone():
    """Moving all points by one vector is the cheapest way to make one set into the other: squares
    are convex.
    """
    x, order = RNG.normal(size=(64, 3)), RNG.permutation(64)
    moved = x[order] + np.asarray([3.0, -1.0, 0.5])
    np.testing.assert_array_equal(
        assign(squared_distances(jnp.asarray(moved, jnp.float32), jnp.asarray(x, jnp.float32))),
        order,
    )


@pytest.mark.parametrize("n_far", [1, 3])
def test_points_far_away_take_no_digits_from_the_others(n_far):
    rng = np.random.default_rng(2)
    couple = jax.jit(lambda x, y: COUPLINGS["optimal"](jax.random.key(0), x, y, None))
    for _ in range(3):
        x, y = rng.normal(size=(2, 24, 2)).astype(np.float32)
        x[:n_far] *= 1e7
        found = np.asarray(couple(x, y))
        cost = -2 * (x - x[n_far:].mean(0)).astype(np.float64) @ y.T.astype(np.float64)
        best = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
        assert cost[np.arange(24), found].sum() - best < 0.1


def test_an_auction_ends_whatever_comes_in():
    for cost in (
        np.full((5, 5), np.nan),
        np.full((5, 5), np.inf),
        np.zeros((5, 5)),
        np.eye(5) * np.nan,
        np.ones((1, 1)),
    ):
        assert sorted(np.asarray(assign(cost.astype(np.float32)))) == list(range(len(cost)))


def test_assignments_are_batched():
    cost = RNG.normal(size=(4, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(jax.vmap(assignment))(cost), [least(one) for one in cost])


def test_sinkhorns_plan_has_the_right_sums_and_the_closed_form_of_two(x64):
    cost = RNG.normal(size=(6, 6))
    plan = np.asarray(plan_of(cost, 0.5))
    np.testing.assert_allclose(plan.sum(0), 1 / 6, rtol=1e-10)
    np.testing.assert_allclose(plan.sum(1), 1 / 6, rtol=1e-10)
    # Two by two: by symmetry the plan is (p, 1/2 - p), with p / (1/2 - p) = exp(-(c00 + c11 - c01 -
    # c10) / 2T).
    two = RNG.normal(size=(2, 2))
    odds = math.exp(-(two[0, 0] + two[1, 1] - two[0, 1] - two[1, 0]) / (2 * 0.3))
    np.testing.assert_allclose(plan_of(two, 0.3)[0, 0], 0.5 * odds / (1 + odds), rtol=1e-10)


@pytest.mark.slow
def test_sinkhorns_plan_goes_from_independent_to_optimal(x64):
    """For T -> ∞ it is the product of the margins, for T -> 0 the cheapest permutation; in between
    its cost grows with T.
    """
    cost = (
        jnp.asarray(RNG.uniform(size=(6, 6))).at[np.arange(6), [2, 0, 5, 1, 4, 3]].set(-1.0)
    )  # the cheapest by far
    best = least(np.asarray(cost))
    np.testing.assert_array_equal(best, [2, 0, 5, 1, 4, 3])
    np.testing.assert_allclose(plan_of(cost, 1e6), 1 / 36, rtol=1e-5)
    np.testing.assert_allclose(6 * plan_of(cost, 0.03), np.eye(6)[best], atol=1e-6)
    costs = [float((cost * plan_of(cost, t)).sum()) for t in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e6)]
    assert (np.diff(costs) > 0).all()
    assert costs[0] == pytest.approx(float(cost[np.arange(6), best].mean()), abs=1e-6)
    assert costs[-1] == pytest.approx(float(cost.mean()), abs=1e-5)


@pytest.mark.slow
def test_the_entropic_coupling_draws_from_the_plan(x64):
    x, y = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 20)))
    cost = squared_distances(x, y)
    plan = 3 * np.exp(np.asarray(sinkhorn(cost, 0.05 * jnp.mean(cost))))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: COUPLINGS["entropic"](key, x, y, None)))(keys))
    shares = (drawn[:, :, None] == np.arange(3)).mean(0)
    assert (np.abs(shares - plan) <= 4 * np.sqrt(plan * (1 - plan) / len(keys)) + 1e-6).all()
    assert ((plan > 0.05) & (plan < 0.95)).any()
    alone = COUPLINGS["entropic"](keys[0], x, y, jnp.eye(3, dtype=bool))
    np.testing.assert_array_equal(alone, np.arange(3))


@pytest.mark.slow
def test_couplings_of_points():
    x, y = jnp.asarray(RNG.normal(size=(2, 6, 2)), jnp.float32)
    key = jax.random.key(0)
    np.testing.assert_array_equal(COUPLINGS["independent"](key, x, y, None), np.arange(6))
    np.testing.assert_array_equal(
        COUPLINGS["optimal"](key, x, y, None), least(np.asarray(squared_distances(x, y)))
    )
