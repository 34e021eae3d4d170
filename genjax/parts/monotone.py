"""Increasing maps of single numbers, with their derivatives and inverses: what flows are made of.

Dinh 2015 (additive) and 2017 (affine), Durkan 2019 (rational-quadratic splines). Parameters that
are 0 make each the identity.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from genjax.protocol import Array
from genjax.settings import Within

# Where splines end. Far from 1 float32 has no room: at 1e5 neighbouring numbers are 1e-3 apart.
TailBound = Annotated[float, Within(1e-3, 1e3)]

# A map may stretch by e^3 at most: a flow has several, and one wild step cannot overflow.
MAX_LOG_SCALE = 3.0
# Of a spline's bins, as a share of the interval, and of its slopes. Durkan 2019, section 3.1.
MIN_BIN = 1e-3
MIN_SLOPE = 1e-3

Bins = Annotated[int, Within(2, 500)]  # which have half of the interval to share at least


class Monotone(NamedTuple):
    """An increasing map of the numbers x [...], given parameters for each, [..., n_params].

    Attributes:
        n_params: how many parameters each number has.
        forward: (x, params) -> y and ln dy/dx, both [...].
        inverse: (y, params) -> x and ln dx/dy, both [...].
    """

    n_params: int
    forward: Callable[[Array, Array], tuple[Array, Array]]
    inverse: Callable[[Array, Array], tuple[Array, Array]]


# --- additive and affine --------------------------------------------------------------------------


def _add(x: Array, params: Array) -> tuple[Array, Array]:
    return x + params[..., 0], jnp.zeros_like(x)


def _subtract(y: Array, params: Array) -> tuple[Array, Array]:
    return y - params[..., 0], jnp.zeros_like(y)


def additive() -> Monotone:
    """y = x + t. Dinh 2015 (NICE)."""
    return Monotone(1, _add, _subtract)


def _log_scale(params: Array) -> Array:
    return MAX_LOG_SCALE * jnp.tanh(params[..., 1] / MAX_LOG_SCALE)


def _scale(x: Array, params: Array) -> tuple[Array, Array]:
    log_scale = _log_scale(params)
    return x * jnp.exp(log_scale) + params[..., 0], log_scale


def _unscale(y: Array, params: Array) -> tuple[Array, Array]:
    log_scale = _log_scale(params)
    return (y - params[..., 0]) * jnp.exp(-log_scale), -log_scale


def affine() -> Monotone:
    """y = x e^s + t with s = 3 tanh(raw / 3), within ±3. Dinh 2017."""
    return Monotone(2, _scale, _unscale)


# --- rational-quadratic splines -------------------------------------------------------------------


class Knots(NamedTuple):
    """A spline through (x_k, y_k) with slopes d_k: k = 0 ... K along the last axis, [..., K + 1].

    The first and the last are the corners ±bound, where the slope is 1, as beyond them.
    """

    x: Array
    y: Array
    slope: Array


def _places(raw: Array, bound: float) -> Array:
    """Knots between ±bound [..., K + 1] whose distances are a softmax of `raw` [..., K], but none
    less than MIN_BIN of the interval.
    """
    bins = raw.shape[-1]
    share = MIN_BIN + (1 - MIN_BIN * bins) * jax.nn.softmax(raw, axis=-1)
    # The sum of all before, as a product: a running sum has a slow derivative on a CPU.
    before = jnp.triu(jnp.ones((bins, bins - 1), raw.dtype))
    inner = 2 * bound * jnp.matmul(share, before, precision=jax.lax.Precision.HIGHEST) - bound
    end = jnp.full_like(raw[..., :1], bound)
    return jnp.concatenate([-end, inner, end], axis=-1)


def knots(params: Array, bins: int, bound: float) -> Knots:
    """The knots that 3 K - 1 numbers stand for: K widths, K heights, K - 1 inner slopes."""
    widths, heights, slopes = jnp.split(params, [bins, 2 * bins], axis=-1)
    one = jnp.ones_like(params[..., :1])
    raw_of_one = math.log(math.expm1(1 - MIN_SLOPE))
    inner = MIN_SLOPE + jax.nn.softplus(slopes + raw_of_one)
    slope = jnp.concatenate([one, inner, one], axis=-1)
    return Knots(_places(widths, bound), _places(heights, bound), slope)


class Bin(NamedTuple):
    """The bin of a number, all [...]: its lower left corner, its width and height, and the slopes
    at both ends.
    """

    x: Array
    y: Array
    width: Array
    height: Array
    slope: Array
    slope_right: Array

    @property
    def steepness(self) -> Array:
        """s = height / width."""
        return self.height / self.width

    @property
    def bend(self) -> Array:
        """d_k + d_{k+1} - 2 s: 0 where the piece is a line."""
        return self.slope + self.slope_right - 2 * self.steepness


def bin_of(value: Array, places: Array, spline: Knots) -> Bin:
    """The bin between the `places`, which are the knots' x or y, that holds the value, [...]."""
    index = jnp.sum(value[..., None] >= places[..., 1:-1], axis=-1, keepdims=True)

    def ends(values: Array) -> tuple[Array, Array]:
        left = jnp.take_along_axis(values, index, axis=-1)
        right = jnp.take_along_axis(values, index + 1, axis=-1)
        return left[..., 0], right[..., 0]

    (x, x_right), (y, y_right), slopes = map(ends, spline)
    return Bin(x, y, x_right - x, y_right - y, *slopes)


def _log_slope(at: Bin, share: Array) -> Array:
    """ln dy/dx where x is the bin's left end and `share` of its width. Durkan 2019, equation 5."""
    rest = share * (1 - share)
    s = at.steepness
    above = at.slope_right * share**2 + 2 * s * rest + at.slope * (1 - share) ** 2
    return 2 * jnp.log(s) + jnp.log(above) - 2 * jnp.log(s + at.bend * rest)


def _inside(value: Array, bound: float) -> tuple[Array, Array]:
    """Which values are within ±bound, and the values cut off there: `where` evaluates both of its
    branches, so that it is what goes into the spline that must be safe.
    """
    return jnp.abs(value) < bound, jnp.clip(value, -bound, bound)


def spline_forward(x: Array, params: Array, *, bins: int, bound: float) -> tuple[Array, Array]:
    """y and ln dy/dx of a rational-quadratic spline; y = x outside of ±bound. Durkan 2019,
    equation 4.
    """
    inside, cut = _inside(x, bound)
    spline = knots(params, bins, bound)
    at = bin_of(cut, spline.x, spline)
    share = (cut - at.x) / at.width
    rest = share * (1 - share)
    s = at.steepness
    y = at.y + at.height * (s * share**2 + at.slope * rest) / (s + at.bend * rest)
    return jnp.where(inside, y, x), jnp.where(inside, _log_slope(at, share), 0)


def spline_inverse(y: Array, params: Array, *, bins: int, bound: float) -> tuple[Array, Array]:
    """x and ln dx/dy: the root of a quadratic that is in the bin. Durkan 2019, equations 6 to 8."""
    inside, cut = _inside(y, bound)
    spline = knots(params, bins, bound)
    at = bin_of(cut, spline.y, spline)
    s, risen = at.steepness, cut - at.y
    a = at.height * (s - at.slope) + risen * at.bend
    b = at.height * at.slope - risen * at.bend
    c = -s * risen
    # Above 0 but for rounding.
    discriminant = jnp.maximum(b**2 - 4 * a * c, jnp.finfo(y.dtype).tiny)
    share = 2 * c / (-b - jnp.sqrt(discriminant))
    x = at.x + share * at.width
    return jnp.where(inside, x, y), jnp.where(inside, -_log_slope(at, share), 0)


def spline(bins: int, bound: float) -> Monotone:
    """A rational-quadratic spline of so many bins on [-bound, bound], the identity outside of it
    (linear tails). Durkan 2019.
    """
    return Monotone(
        3 * bins - 1,
        partial(spline_forward, bins=bins, bound=bound),
        partial(spline_inverse, bins=bins, bound=bound),
    )
