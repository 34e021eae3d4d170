"""Paths from data to noise, x_t = alpha(t) x0 + sigma(t) epsilon, and every conversion between what
a network may predict.

A path is five plain functions and numbers; its parts work on t [] or [n] under jit, vmap and jvp,
in the dtype of t. Where a formula needs a condition on s and t, s is the less noisy of the two: s
lies between `end` (data) and t. One denoised estimate x0 of x_t, E[x0 | x_t], says all that a model
knows at that point: noise, v, score and velocity are x0 and x_t put together, so solvers and
guidance are written for x0 alone.

Ho 2020 (DDPM), Kingma 2021 (VDM), Song 2021 (score SDEs), Karras 2022 (EDM), Lipman 2023 (flow
matching).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError, unknown_name
from genjax.protocol import Array

# (x_t [n, *event], t []) -> an estimate of E[x0 | x_t], [n, *event]; conditions, parameters and
# guidance are bound in.
Denoise = Callable[[Array, Array], Array]


class Path(NamedTuple):
    """x_t = alpha(t) x0 + sigma(t) epsilon with epsilon ~ N(0, I); t runs from `end` (data) to
    `start` (noise).

    Attributes:
        alpha: of t [] or [n], elementwise and differentiable; does not increase from `end` to
            `start`.
        sigma: the same; does not decrease, and alpha / sigma strictly decreases.
        start: the t where sampling begins, in noise.
        end: the t where sampling ends, in data; less than `start`.
        time_of_log_snr: the inverse of `log_snr`, elementwise.
    """

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    start: Array | float
    end: Array | float
    time_of_log_snr: Callable[[Array], Array]


def expand(t: Array | float, x: Array) -> Array:
    """t [] or [n] in the dtype of x and with trailing axes, so that it multiplies x [n, *event]."""
    t = jnp.asarray(t, x.dtype)
    return t if t.ndim == 0 else t.reshape(*t.shape, *[1] * (x.ndim - t.ndim))


def coefficients(path: Path, t: Array | float, x: Array) -> tuple[Array, Array]:
    """alpha(t) and sigma(t), ready to multiply x [n, *event]."""
    t = jnp.asarray(t)
    return expand(path.alpha(t), x), expand(path.sigma(t), x)


def rates(path: Path, t: Array | float, x: Array) -> tuple[Array, Array]:
    """alpha'(t) and sigma'(t), the derivatives, ready to multiply x [n, *event]."""
    t = jnp.asarray(t)
    alpha_rate, sigma_rate = (
        jax.jvp(part, (t,), (jnp.ones_like(t),))[1] for part in (path.alpha, path.sigma)
    )
    return expand(alpha_rate, x), expand(sigma_rate, x)


def log_snr(path: Path, t: Array | float) -> Array:
    """2 ln(alpha / sigma), the logarithm of the signal-to-noise ratio, of t's shape; infinite where
    alpha or sigma is 0.
    """
    t = jnp.asarray(t)
    return 2 * (jnp.log(path.alpha(t)) - jnp.log(path.sigma(t)))


def diffuse(path: Path, x0: Array, epsilon: Array, t: Array | float) -> Array:
    """x_t = alpha(t) x0 + sigma(t) epsilon, [n, *event], for t [] or [n]."""
    alpha, sigma = coefficients(path, t, x0)
    return alpha * x0 + sigma * epsilon


def prior(path: Path) -> Array:
    """sigma(start), []: sampling begins with N(0, sigma(start)² I), which takes alpha(start) x0 for
    nothing.
    """
    return path.sigma(jnp.asarray(path.start))


# --- paths ----------------------------------------------------------------------------------------


def _cosine(start: float, end: float) -> Path:
    # sin of 1 - t, not cos of t: at t = 1 it is exactly 0 rather than a small number of either
    # sign.
    return Path(
        alpha=lambda t: jnp.sin((jnp.pi / 2) * (1 - t)),
        sigma=lambda t: jnp.sin((jnp.pi / 2) * t),
        start=start,
        end=end,
        time_of_log_snr=lambda value: (2 / jnp.pi) * jnp.arctan(jnp.exp(-value / 2)),
    )


def cosine(t_end: float = 1e-3) -> Path:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), t from `t_end` to 1 - `t_end`: log-SNR within
    ±12.9.

    Nichol & Dhariwal 2021, whose offset at small t the cut at `t_end` stands in for.
    """
    return _cosine(1 - t_end, t_end)


def variance_preserving() -> Path:
    """The cosine path on all of [0, 1], for flow matching: alpha = 1 at t = 0 and exactly 0 at t =
    1. Albergo 2023.
    """
    return _cosine(1.0, 0.0)


def linear(
    beta_min: Array | float = 0.1, beta_max: Array | float = 20.0, t_end: float = 1e-3
) -> Path:
    """ln alpha = -t² (beta_max - beta_min) / 4 - t beta_min / 2, sigma² = 1 - alpha², t from
    `t_end` to 1.

    The continuous limit of DDPM's linear schedule, with beta(t) = beta_min + t (beta_max -
    beta_min). Song 2021 (VP SDE).
    """

    def log_alpha(t: Array) -> Array:
        low, high = jnp.asarray(beta_min, t.dtype), jnp.asarray(beta_max, t.dtype)
        return -jnp.square(t) * (high - low) / 4 - t * low / 2

    def time_of_log_snr(value: Array) -> Array:
        low, high = jnp.asarray(beta_min, value.dtype), jnp.asarray(beta_max, value.dtype)
        # -2 ln alpha: alpha² = sigmoid(log-SNR) where the variance is preserved
        integral = jax.nn.softplus(-value)
        return 2 * integral / (low + jnp.sqrt(jnp.square(low) + 2 * (high - low) * integral))

    return Path(
        alpha=lambda t: jnp.exp(log_alpha(t)),
        sigma=lambda t: jnp.sqrt(-jnp.expm1(2 * log_alpha(t))),
        start=1.0,
        end=t_end,
        time_of_log_snr=time_of_log_snr,
    )


def edm(sigma_min: Array | float = 0.002, sigma_max: Array | float = 80.0) -> Path:
    """alpha = 1, sigma = t, t from `sigma_min` to `sigma_max`: time is the noise's standard
    deviation. Karras 2022.

    The paper's grids go on from sigma_min to 0 in one last step; here they do with `sigma_min=0`.
    """
    return Path(
        alpha=lambda t: jnp.ones_like(t),
        sigma=lambda t: t,
        start=sigma_max,
        end=sigma_min,
        time_of_log_snr=lambda value: jnp.exp(-value / 2),
    )


def conditional_ot() -> Path:
    """alpha = 1 - t, sigma = t, t from 0 (data) to 1 (noise): straight lines. Lipman 2023, Liu
    2023.

    Their time runs the other way: 0 is noise and 1 data there, and their velocity is the negative
    of this one.
    """
    return Path(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        start=1.0,
        end=0.0,
        time_of_log_snr=lambda value: jax.nn.sigmoid(-value / 2),
    )


def from_log_snr(
    gamma: Callable[[Array], Array],
    start: Array | float = 1.0,
    end: Array | float = 0.0,
    inverse: Callable[[Array], Array] | None = None,
) -> Path:
    """alpha² = sigmoid(-gamma(t)), sigma² = sigmoid(gamma(t)): preserves the variance at any
    log-SNR -gamma. Kingma 2021.

    Args:
        gamma: of t [] or [n], elementwise, differentiable and increasing from `end` to `start`,
            such as a learned schedule; it may close over traced parameters.
        start: t of the noise.
        end: t of the data.
        inverse: t of gamma's value; None searches for it by bisection, which passes no gradient.
    """

    def time_of_log_snr(value: Array) -> Array:
        if inverse is not None:
            return inverse(-value)
        value = jnp.asarray(value)

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = (low + high) / 2
            beyond = gamma(middle) > -value
            return jnp.where(beyond, low, middle), jnp.where(beyond, middle, high)

        ends = jnp.full_like(value, end), jnp.full_like(value, start)
        low, high = jax.lax.fori_loop(0, jnp.finfo(value.dtype).nmant + 4, halve, ends)
        return jax.lax.stop_gradient((low + high) / 2)

    return Path(
        alpha=lambda t: jnp.sqrt(jax.nn.sigmoid(-gamma(t))),
        sigma=lambda t: jnp.sqrt(jax.nn.sigmoid(gamma(t))),
        start=start,
        end=end,
        time_of_log_snr=time_of_log_snr,
    )


PATHS: dict[str, Callable[[], Path]] = {
    "cosine": cosine,
    "linear": linear,
    "edm": edm,
    "conditional_ot": conditional_ot,
    "variance_preserving": variance_preserving,
}


# --- discrete time --------------------------------------------------------------------------------


def discretize(path: Path, n_steps: int) -> Path:
    """The same path in `n_steps` steps: any t counts as the nearest of end + (start - end) i /
    n_steps, i = 0 .. n_steps.

    With `kernel` and `posterior` between neighbours it is DDPM's chain of n_steps transitions.
    Derivatives are those of the continuous path at the rounded t.

    Raises:
        ConfigError: for n_steps below 1.
    """
    if n_steps < 1:
        raise ConfigError(f"n_steps must be at least 1; got {n_steps}.")

    def nearest(t: Array) -> Array:
        start, end = jnp.asarray(path.start, t.dtype), jnp.asarray(path.end, t.dtype)
        rounded = end + (start - end) * (jnp.round((t - end) / (start - end) * n_steps) / n_steps)
        return t + jax.lax.stop_gradient(rounded - t)

    return path._replace(
        alpha=lambda t: path.alpha(nearest(t)),
        sigma=lambda t: path.sigma(nearest(t)),
        time_of_log_snr=lambda value: nearest(path.time_of_log_snr(value)),
    )


def _lost(path: Path, s: Array | float, t: Array | float) -> Array:
    """1 - SNR(t) / SNR(s), which is what x_t does not tell of x_s; exact where the two are
    close.
    """
    return -jnp.expm1(log_snr(path, t) - log_snr(path, s))


def kernel(path: Path, s: Array | float, t: Array | float) -> tuple[Array, Array]:
    """q(x_t | x_s) = N(alpha_ts x_s, sigma_ts² I): alpha_ts and sigma_ts, of the shape of s and t.

    alpha_ts = alpha_t / alpha_s, sigma_ts² = sigma_t² - alpha_ts² sigma_s². Kingma 2021.
    """
    s, t = jnp.asarray(s), jnp.asarray(t)
    return path.alpha(t) / path.alpha(s), path.sigma(t) * jnp.sqrt(_lost(path, s, t))


def posterior(
    path: Path, x0: Array, x_t: Array, s: Array | float, t: Array | float
) -> tuple[Array, Array]:
    """q(x_s | x_t, x0), a normal: its mean [n, *event], and its standard deviation, [] or with the
    axes of x to multiply it.

    mean = alpha_ts sigma_s² / sigma_t² x_t + alpha_s sigma_ts² / sigma_t² x0, std = sigma_ts
    sigma_s / sigma_t; at sigma_s = 0 it is alpha_s x0 exactly. Ho 2020, equations 6 and 7, for any
    path.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = coefficients(path, s, x_t), coefficients(path, t, x_t)
    lost = expand(_lost(path, s, t), x_t)
    kept = alpha_t / alpha_s * jnp.square(sigma_s / sigma_t)
    return kept * x_t + alpha_s * lost * x0, sigma_s * jnp.sqrt(lost)


# --- what a network predicts ----------------------------------------------------------------------


class Prediction(NamedTuple):
    """A kind of output, from and to x0; both are (path, value [n, *event], x_t [n, *event], t [] or
    [n]) -> [n, *event].
    """

    to_x0: Callable[[Path, Array, Array, Array | float], Array]
    from_x0: Callable[[Path, Array, Array, Array | float], Array]


def epsilon_of(path: Path, x0: Array, x_t: Array, t: Array | float) -> Array:
    """epsilon = (x_t - alpha x0) / sigma: the noise that leads from x0 to x_t; sigma > 0."""
    alpha, sigma = coefficients(path, t, x_t)
    return (x_t - alpha * x0) / sigma


def _x0_of_epsilon(path: Path, epsilon: Array, x_t: Array, t: Array | float) -> Array:
    """x0 = (x_t - sigma epsilon) / alpha; alpha > 0."""
    alpha, sigma = coefficients(path, t, x_t)
    return (x_t - sigma * epsilon) / alpha


def v_of(path: Path, x0: Array, x_t: Array, t: Array | float) -> Array:
    """v = alpha epsilon - sigma x0. Salimans & Ho 2022."""
    alpha, sigma = coefficients(path, t, x_t)
    return alpha * epsilon_of(path, x0, x_t, t) - sigma * x0


def _x0_of_v(path: Path, v: Array, x_t: Array, t: Array | float) -> Array:
    """x0 = (alpha x_t - sigma v) / (alpha² + sigma²); the divisor is 1 where the variance is
    preserved.
    """
    alpha, sigma = coefficients(path, t, x_t)
    return (alpha * x_t - sigma * v) / (jnp.square(alpha) + jnp.square(sigma))


def score_of(path: Path, x0: Array, x_t: Array, t: Array | float) -> Array:
    """The score, grad ln p(x_t) = -epsilon / sigma = (alpha x0 - x_t) / sigma², for x0 = E[x0 |
    x_t]. Song 2021.
    """
    alpha, sigma = coefficients(path, t, x_t)
    return (alpha * x0 - x_t) / jnp.square(sigma)


def _x0_of_score(path: Path, score: Array, x_t: Array, t: Array | float) -> Array:
    """x0 = (x_t + sigma² score) / alpha: Tweedie's formula."""
    alpha, sigma = coefficients(path, t, x_t)
    return (x_t + jnp.square(sigma) * score) / alpha


def velocity_of(path: Path, x0: Array, x_t: Array, t: Array | float) -> Array:
    """dx/dt = alpha' x0 + sigma' epsilon, of the probability-flow ODE, for x0 = E[x0 | x_t]. Lipman
    2023, Song 2021.
    """
    alpha_rate, sigma_rate = rates(path, t, x_t)
    return alpha_rate * x0 + sigma_rate * epsilon_of(path, x0, x_t, t)


def _x0_of_velocity(path: Path, velocity: Array, x_t: Array, t: Array | float) -> Array:
    """x0 = (sigma' x_t - sigma velocity) / (alpha sigma' - alpha' sigma); the divisor is 1 on
    straight lines.
    """
    (alpha, sigma), (alpha_rate, sigma_rate) = coefficients(path, t, x_t), rates(path, t, x_t)
    return (sigma_rate * x_t - sigma * velocity) / (alpha * sigma_rate - alpha_rate * sigma)


def _same(path: Path, value: Array, x_t: Array, t: Array | float) -> Array:
    return value


PREDICTIONS: dict[str, Prediction] = {
    "x0": Prediction(_same, _same),
    "epsilon": Prediction(_x0_of_epsilon, epsilon_of),
    "v": Prediction(_x0_of_v, v_of),
    "score": Prediction(_x0_of_score, score_of),
    "velocity": Prediction(_x0_of_velocity, velocity_of),
}


def prediction(name: str) -> Prediction:
    """The entry of PREDICTIONS of that name.

    Raises:
        ConfigError: if there is none; it says which there are.
    """
    if name not in PREDICTIONS:
        raise unknown_name("prediction", name, PREDICTIONS)
    return PREDICTIONS[name]


# --- what a network sees, and the preconditioning of Karras ---------------------------------------


def input_scale(path: Path, t: Array, sigma_data: Array | float) -> Array:
    """c_in = 1 / sqrt(alpha² sigma_data² + sigma²): with it, inputs have unit variance if data have
    sigma_data². Of t's shape.

    1 for a path that preserves the variance and sigma_data = 1; Karras 2022, table 1, has alpha =
    1.
    """
    return jax.lax.rsqrt(jnp.square(path.alpha(t) * sigma_data) + jnp.square(path.sigma(t)))


def edm_prediction(sigma_data: Array | float) -> Prediction:
    """F with x0 = c_skip x_t / alpha + c_out F: what is left to predict once the best linear guess
    is made.

    Karras 2022, table 1. With s = sigma / alpha: c_skip = sigma_data² / (s² + sigma_data²), c_out =
    s sigma_data / sqrt(s² + sigma_data²). The target has unit variance at every t, and x0 is x_t /
    alpha as s goes to 0.
    """

    def parts(path: Path, x_t: Array, t: Array | float) -> tuple[Array, Array]:
        alpha, sigma = coefficients(path, t, x_t)
        s, d = jnp.square(sigma / alpha), jnp.square(jnp.asarray(sigma_data, x_t.dtype))
        return d / (s + d) * x_t / alpha, jnp.sqrt(s * d / (s + d))

    def to_x0(path: Path, value: Array, x_t: Array, t: Array | float) -> Array:
        linear_guess, c_out = parts(path, x_t, t)
        return linear_guess + c_out * value

    def from_x0(path: Path, x0: Array, x_t: Array, t: Array | float) -> Array:
        linear_guess, c_out = parts(path, x_t, t)
        return (x0 - linear_guess) / c_out

    return Prediction(to_x0, from_x0)
