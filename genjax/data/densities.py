"""Points in the plane whose log-density is known exactly, so that a model's figures can be checked
against the truth.

Where the classical sampler has no closed-form density, a density that has one and looks the same
takes its place, and the sampler draws from exactly that; each docstring says how it is defined.
`log_prob` is the density of the points, the marginal over the classes, and serves numpy arrays (in
their precision) as well as JAX ones.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data.drawn import Draw, drawn_source
from genjax.data.order import Examples
from genjax.data.source import Source
from genjax.protocol import DataSpec
from genjax.settings import Within, checking

Scale = Annotated[float, Within(1e-9, 1e6)]  # in float32, beside means of about 1
Turn = Annotated[float, Within(-100, 100)]

_N_VALID, _N_TEST = 2_000, 10_000
_MOON, _ROLL = (
    64,
    256,
)  # Gaussians along each moon and along the roll: closer together than their sd, so no beads show


@checking
def ring(
    radius: Scale = 1.0,
    sd: Scale = 0.02,
    conditional: bool = False,
    n_train: Examples = 20_000,
) -> Source:
    """Eight Gaussians on a circle: p(x) = 1/8 Σ_k N(x; radius (cos 2πk/8, sin 2πk/8), sd² I).

    The entropy is the expectation of -ln p under each component, by the trapezoidal rule.

    Args:
        radius: the circle's radius.
        sd: the standard deviation of each Gaussian.
        conditional: give the Gaussian's number as the condition, a label from 0 to 7.
        n_train: how many training points to draw.

    Raises:
        ConfigError: for a setting that is not what its annotation says.
    """
    angle = np.arange(8) * (2 * np.pi / 8)
    centres = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return _mixture_source("ring", centres, sd, 8, conditional, n_train)._replace(
        modes=centres, mode_std=sd
    )


@checking
def grid(sd: Scale = 0.05, conditional: bool = False, n_train: Examples = 20_000) -> Source:
    """25 Gaussians: p(x) = 1/25 Σ_c N(x; c, sd² I) with centres c in {-2, -1, 0, 1, 2}².

    The entropy is the expectation of -ln p under each component, by the trapezoidal rule.

    Args:
        sd: the standard deviation of each Gaussian.
        conditional: give the Gaussian's number as the condition, a label from 0 to 24.
        n_train: how many training points to draw.

    Raises:
        ConfigError: for a setting that is not what its annotation says.
    """
    centres = np.array([(a, b) for a in range(-2, 3) for b in range(-2, 3)], np.float64)
    return _mixture_source("grid", centres, sd, 25, conditional, n_train)._replace(
        modes=centres, mode_std=sd
    )


@checking
def moons(noise: Scale = 0.1, conditional: bool = False, n_train: Examples = 20_000) -> Source:
    """Two half circles with Gaussian noise; defined as an equal mixture of 64 Gaussians along each.

    p(x) = 1/128 Σ N(x; c, noise² I) with c on (cos t, sin t) - m and (1 - cos t, 1/2 - sin t) - m,
    t = (i + ½) π/64, where m = (1/2, 1/4) centres the data. With noise below 0.03 the single
    Gaussians begin to show; the density stays exact. The entropy is the expectation of -ln p under
    each component, by the trapezoidal rule.

    Args:
        noise: the standard deviation of the noise.
        conditional: give the moon as the condition, a label 0 (upper) or 1 (lower).
        n_train: how many training points to draw.

    Raises:
        ConfigError: for a setting that is not what its annotation says.
    """
    t = (np.arange(_MOON) + 0.5) * (np.pi / _MOON)
    upper, lower = (
        np.stack([np.cos(t), np.sin(t)], axis=1),
        np.stack([1 - np.cos(t), 0.5 - np.sin(t)], axis=1),
    )
    centres = np.concatenate([upper, lower]) - np.array([[0.5, 0.25]])
    return _mixture_source("moons", centres, noise, 2, conditional, n_train)


@checking
def swiss_roll(noise: Scale = 0.1, n_train: Examples = 20_000) -> Source:
    """A spiral with Gaussian noise; defined as an equal mixture of 256 Gaussians along it.

    p(x) = 1/256 Σ_i N(x; t_i/5 (cos t_i, sin t_i), noise² I) with t_i = 3π/2 (1 + 2 (i + ½)/256):
    like the classical sampler it is uniform in t, so the roll thins out outwards. With noise below
    0.07 the single Gaussians begin to show. The entropy is the expectation of -ln p under each
    component, by the trapezoidal rule.

    Args:
        noise: the standard deviation of the noise.
        n_train: how many training points to draw.

    Raises:
        ConfigError: for a setting that is not what its annotation says.
    """
    t = 1.5 * np.pi * (1 + 2 * (np.arange(_ROLL) + 0.5) / _ROLL)
    centres = np.stack([t * np.cos(t), t * np.sin(t)], axis=1) / 5
    return _mixture_source("swiss_roll", centres, noise, 1, False, n_train)


@checking
def pinwheel(
    radial_sd: Scale = 0.3,
    tangential_sd: Scale = 0.1,
    rate: Turn = 0.25,
    conditional: bool = False,
    n_train: Examples = 20_000,
) -> Source:
    """Five twisted arms: Gaussians N((1, 0), diag(radial_sd², tangential_sd²)), turned by 2πk/5 +
    rate · exp(|f|).

    p(x) = 1/5 Σ_k N(R(-a_k(|x|)) x). A rotation by an angle that depends on the radius keeps areas,
    so its Jacobian is 1 and the density exact; the classical sampler (Johnson et al. 2016) takes
    the angle from the first coordinate instead of the radius, which looks nearly the same. The
    radius in the exponent is cut off at 10, far outside the data. The entropy is the expectation of
    -ln p under one arm, by the trapezoidal rule.

    Args:
        radial_sd: the standard deviation along an arm.
        tangential_sd: the standard deviation across an arm.
        rate: how strongly the arms are twisted.
        conditional: give the arm as the condition, a label from 0 to 4.
        n_train: how many training points to draw.

    Raises:
        ConfigError: for a setting that is not what its annotation says.
    """
    arms = np.arange(5) * (2 * np.pi / 5)
    constant = math.log(5) + math.log(2 * math.pi * radial_sd * tangential_sd)

    def angle(radius, xp: ModuleType):
        return rate * xp.exp(xp.minimum(radius, 10.0))

    def turn(z: np.ndarray, arm: np.ndarray) -> np.ndarray:
        along, across = 1 + radial_sd * z[:, 0], tangential_sd * z[:, 1]
        a = arms[arm] + angle(np.hypot(along, across), np)
        return np.stack(
            [along * np.cos(a) - across * np.sin(a), along * np.sin(a) + across * np.cos(a)], axis=1
        )

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        arm = rng.integers(5, size=n)
        return turn(rng.standard_normal((n, 2)), arm), arm

    def log_prob(x):
        x, xp = _as_array(x)
        a = xp.asarray(arms, x.dtype)[None, :] + angle(xp.hypot(x[:, :1], x[:, 1:]), xp)  # [B, 5]
        along = x[:, :1] * xp.cos(a) + x[:, 1:] * xp.sin(a)
        across = x[:, 1:] * xp.cos(a) - x[:, :1] * xp.sin(a)
        exponent = ((along - 1) / radial_sd) ** 2 + (across / tangential_sd) ** 2
        return _log_sum_exp(-0.5 * exponent, xp) - constant

    z, weight = _normal_nodes()
    entropy = -float(
        weight @ log_prob(turn(z, np.zeros(len(z), np.int64)))
    )  # the arms are alike but for a rotation
    return _source("pinwheel", draw, log_prob, entropy, 5, conditional, n_train)


@checking
def checkerboard(half_width: Scale = 2.0, n_train: Examples = 20_000) -> Source:
    """Uniform on the eight dark squares of a 4 x 4 board: ln p(x) = -ln(2 half_width²) on them and
    -∞ elsewhere.

    The entropy is ln(2 half_width²), in closed form.

    Args:
        half_width: the board covers [-half_width, half_width]².
        n_train: how many training points to draw.

    Raises:
        ConfigError: for a setting that is not what its annotation says.
    """
    side = half_width / 2
    entropy = math.log(2 * half_width**2)

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        column, pair = rng.integers(4, size=n), rng.integers(2, size=n)
        cell = np.stack([column, 2 * pair + column % 2], axis=1)
        # A hair inside the square: rounding to float32 must not carry a point over the edge, where
        # the density is 0.
        within = np.clip(rng.random((n, 2)), 1e-6, 1 - 1e-6)
        return (cell + within - 2) * side, np.zeros(n)

    def log_prob(x):
        x, xp = _as_array(x)
        cell = xp.floor(x / side) + 2
        inside = ((cell >= 0) & (cell < 4)).all(axis=-1)
        return xp.where(
            inside & (cell.sum(axis=-1) % 2 == 0),
            xp.asarray(-entropy, x.dtype),
            xp.asarray(-math.inf, x.dtype),
        )

    return _source("checkerboard", draw, log_prob, entropy, 1, False, n_train)


def _mixture_source(
    name: str, centres: np.ndarray, sd: float, n_classes: int, conditional: bool, n_train: int
) -> Source:
    """An equal mixture of isotropic Gaussians; consecutive centres [M, 2] make up the classes."""
    count = len(centres)
    constant = math.log(count) + math.log(2 * math.pi * sd**2)

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        component = rng.integers(count, size=n)
        return centres[component] + sd * rng.standard_normal((n, 2)), component // (
            count // n_classes
        )

    def log_prob(x):
        x, xp = _as_array(x)
        centre = xp.asarray(centres, x.dtype)
        a, b = (
            (x[:, :1] - centre[None, :, 0]) / sd,
            (x[:, 1:] - centre[None, :, 1]) / sd,
        )  # [B, M] each
        return _log_sum_exp(-0.5 * (a * a + b * b), xp) - constant

    # Nodes around each component, instead of one grid over the plane: as accurate for every sd, and
    # only where it matters.
    z, weight = _normal_nodes()
    entropy = -float(np.mean([weight @ log_prob(centre[None, :] + sd * z) for centre in centres]))
    return _source(name, draw, log_prob, entropy, n_classes, conditional, n_train)


def _source(
    name: str,
    draw: Draw,
    log_prob: Callable[[Any], Any],
    entropy: float,
    n_classes: int,
    conditional: bool,
    n_train: int,
) -> Source:
    spec = DataSpec((2,), "continuous", n_classes=n_classes if conditional else None, name=name)

    sizes = n_train, _N_VALID, _N_TEST
    return drawn_source(spec, draw, log_prob, entropy, sizes, "points of a known density")


def _as_array(x) -> tuple[Any, ModuleType]:
    """The points and the module, numpy or jax.numpy, that they belong to."""
    if isinstance(x, jax.Array):
        return x, jnp
    x = np.asarray(x)
    return (x if x.dtype.kind == "f" else x.astype(np.float64)), np


def _log_sum_exp(values, xp: ModuleType):
    """ln Σ exp over the last axis."""
    top = values.max(axis=-1, keepdims=True)
    return top[..., 0] + xp.log(xp.exp(values - top).sum(axis=-1))


def _normal_nodes(spacing: float = 0.5, reach: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
    """Nodes [J, 2] and weights [J] with Σ_j w_j f(z_j) ≈ E f(z), z ~ N(0, I): the trapezoidal
    rule.
    """
    axis = np.arange(-reach, reach + spacing / 2, spacing)
    z = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    z = z[(z**2).sum(axis=1) <= reach**2]
    weight = np.exp(-0.5 * (z**2).sum(axis=1))
    return z, weight / weight.sum()
