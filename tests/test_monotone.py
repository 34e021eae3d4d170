"""Rational-quadratic splines and affine maps of single numbers, in float64, against the paper's
equations written down by hand.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_oracles import jit

from genjax.parts.monotone import additive, affine, knots, spline

pytestmark = pytest.mark.usefixtures("x64")

BINS, BOUND = 6, 3.0
SPLINE = spline(BINS, BOUND)
forward, inverse = jit(SPLINE.forward), jit(SPLINE.inverse)
MAPS = {"additive": additive(), "affine": affine(), "spline": SPLINE}


def raw(n, size=2.0, seed=0, of=SPLINE):
    return jnp.asarray(size * np.random.default_rng(seed).normal(size=(n, of.n_params)))


def numbers(n=400, reach=2 * BOUND):
    """Inside, in both tails, and on the corners."""
    x = np.linspace(-reach, reach, n)
    x[[0, n // 3, n - 1]] = -BOUND, BOUND, 0.0
    return jnp.asarray(x)


def by_hand(x, w, h, d):
    """Durkan 2019, equation 4, with knots at the sums of widths w and heights h, slopes d."""
    if not -BOUND <= x < BOUND:
        return x
    xs, ys = (np.concatenate([[0], np.cumsum(one)]) - BOUND for one in (w, h))
    k = np.searchsorted(xs, x, side="right") - 1
    s, share = h[k] / w[k], (x - xs[k]) / w[k]
    above = h[k] * (s * share**2 + d[k] * share * (1 - share))
    return ys[k] + above / (s + (d[k + 1] + d[k] - 2 * s) * share * (1 - share))


def test_it_is_the_papers_equation():
    params, x = raw(200), np.random.default_rng(1).uniform(-2 * BOUND, 2 * BOUND, 200)
    y, _ = forward(jnp.asarray(x), params)
    spread = np.asarray(params)
    for one, found, own in zip(x, np.asarray(y), spread, strict=True):
        w, h = (np.exp(part) for part in (own[:BINS], own[BINS : 2 * BINS]))
        w, h = (2 * BOUND * (1e-3 + (1 - 1e-3 * BINS) * part / part.sum()) for part in (w, h))
        slopes = 1e-3 + np.log1p(np.exp(own[2 * BINS :] + math.log(math.expm1(1 - 1e-3))))
        wanted = by_hand(one, w, h, np.concatenate([[1], slopes, [1]]))
        assert found == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("name", MAPS)
def test_parameters_of_zero_are_the_identity(name):
    """Of a spline they stand for uniform bins and slopes of one."""
    one, x = MAPS[name], numbers()
    params = jnp.zeros((len(x), one.n_params))
    for move in (one.forward, one.inverse):
        y, log_slope = jit(move)(x, params)
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(log_slope, 0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MAPS)
def test_the_inverse_undoes_it_and_slopes_are_derivatives(name):
    one, x = MAPS[name], numbers()
    params = raw(len(x), of=one)
    y, log_slope = jit(one.forward)(x, params)
    back, log_slope_back = jit(one.inverse)(y, params)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-8)
    np.testing.assert_allclose(log_slope_back, -log_slope, rtol=0, atol=1e-8)
    slope = jit(jax.vmap(jax.grad(lambda x, p: one.forward(x, p)[0])))(x, params)
    np.testing.assert_allclose(log_slope, np.log(slope), rtol=0, atol=1e-8)


@pytest.mark.slow
def test_knots_go_to_knots_and_there_too_the_slopes_are_its_own():
    params = raw(50)
    spline_ = knots(params, BINS, BOUND)
    for k in range(BINS + 1):
        at, wanted = spline_.x[:, k], spline_.y[:, k]
        y, log_slope = forward(at, params)
        back, _ = inverse(wanted, params)
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-10)
        np.testing.assert_allclose(back, at, rtol=0, atol=1e-8)
        np.testing.assert_allclose(log_slope, np.log(spline_.slope[:, k]), rtol=0, atol=1e-8)


def test_it_is_smooth_at_the_ends_of_the_interval():
    params, near = raw(50), BOUND * (1 - 1e-12)
    for end in (near, -near):
        y, log_slope = forward(jnp.full(50, end), params)
        np.testing.assert_allclose(y, end, rtol=0, atol=1e-7)
        np.testing.assert_allclose(log_slope, 0, rtol=0, atol=1e-4)


def test_where_all_numbers_are_in_the_tails_nothing_moves():
    x = jnp.asarray([-1e30, -7.0, -BOUND, BOUND, 5.0, 1e30])
    for move in (forward, inverse):
        y, log_slope = move(x, raw(len(x)))
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(log_slope, 0)


@pytest.mark.parametrize("size", [0.5, 3.0, 10.0])
def test_it_increases(size):
    x = jnp.linspace(-1.2 * BOUND, 1.2 * BOUND, 2000)
    params = jnp.broadcast_to(raw(1, size), (len(x), SPLINE.n_params))
    y, log_slope = forward(x, params)
    assert (np.diff(y) > 0).all()
    assert np.isfinite(log_slope).all()
    back, _ = inverse(x, params)
    assert (np.diff(back) > 0).all()


def test_affine_maps_stretch_by_no_more_than_they_may():
    x, huge = jnp.ones(2), jnp.asarray([[0.0, 1e6], [0.0, -1e6]])
    y, log_slope = affine().forward(x, huge)
    np.testing.assert_allclose(log_slope, [3, -3])
    np.testing.assert_allclose(y, np.exp([3, -3]))


OUTSIDE = [1e30, -1e30, 1e10, BOUND, -BOUND, np.nextafter(BOUND, 0), 0.3]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_gradients_are_finite_wherever_a_number_is(dtype, way):
    """Both branches of a `where` are differentiated: what is not finite in the one that is not
    taken would come through as 0 times infinity.
    """
    x = jnp.asarray(OUTSIDE, dtype)
    params = raw(len(x)).astype(dtype)
    move = getattr(SPLINE, way)

    def both(x, params):
        y, log_slope = move(x, params)
        return y + log_slope

    each = jax.vmap(jax.grad(both, argnums=(0, 1)))
    for grads in (each(x, params), jit(each)(x, params)):
        assert all(np.isfinite(leaf).all() for leaf in grads)
        np.testing.assert_array_equal(grads[0][:3], 1)  # the tails are lines
        np.testing.assert_array_equal(grads[1][:3], 0)
    whole = jax.grad(lambda params: both(x, params).sum())(params)
    assert np.isfinite(whole).all()
    assert np.asarray(whole)[-1].any()
