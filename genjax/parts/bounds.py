"""The variational bound of a diffusion model, for any denoiser, and the noise schedule that is
learned by it.

`denoise` takes a t for each example here: (x_t [n, *event], t [n]) -> E[x0 | x_t]. Kingma 2021
(VDM), Ho 2020 (DDPM).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from genjax.parts.distributions import normal_log_prob
from genjax.parts.paths import Denoise, Path, coefficients, diffuse, log_snr
from genjax.protocol import Array, DataSpec, Key


def squared(x: Array) -> Array:
    """‖x‖² of each example: [n, *event] -> [n]."""
    return jnp.sum(jnp.square(x.reshape(x.shape[0], -1)), axis=1)


def snr_drop(path: Path, s: Array, t: Array) -> Array:
    """SNR(s) - SNR(t) for s between `end` and t, without cancellation; of the shape of s and t."""
    return -jnp.exp(log_snr(path, s)) * jnp.expm1(log_snr(path, t) - log_snr(path, s))


def time_of_step(path: Path, step: Array, n_times: int) -> Array:
    """t of the steps 0 (data) .. n_times (noise), which are evenly spaced in it; of the shape and
    dtype of `step`.
    """
    end, start = jnp.asarray(path.end, step.dtype), jnp.asarray(path.start, step.dtype)
    return end + (start - end) * (step / n_times)


def log_snr_of_values(spec: DataSpec) -> float:
    """The log-SNR at which the middle between two neighbouring values of the data is 3 standard
    deviations away from each.

    sigma / alpha = 1 / (3 (levels - 1)) for values evenly spaced on [-1, 1]; 13.3 for 256 of them,
    as in Kingma 2021.
    """
    return 2 * math.log(3 * (spec.top or 1))


def ending_at_values(path: Path, spec: DataSpec) -> Path:
    """The path, which ends at `log_snr_of_values` if it went on: beyond, the values of x0 are known
    and noise is all there is.

    A network cannot round, and would pay for that noise in the bound. Of continuous data the path
    itself.
    """
    if spec.kind == "continuous":
        return path
    end = path.time_of_log_snr(jnp.asarray(log_snr_of_values(spec), float))
    return path._replace(end=max(float(end), float(path.end)))


# --- the terms of the bound -----------------------------------------------------------------------


def prior_kl(path: Path, x0: Array) -> Array:
    """KL(q(x_start | x0) || N(0, sigma(start)² I)) = ½ SNR(start) ‖x0‖², [n] nats."""
    return 0.5 * jnp.exp(log_snr(path, path.start)).astype(x0.dtype) * squared(x0)


def reconstruction(spec: DataSpec, path: Path, x: Array, x_end: Array, denoised: Array) -> Array:
    """ln p(x | x_end) [n] nats, for x in the units of the data and x_end its diffused value at the
    end of the path.

    Binary and discrete data: every element by itself, each of its values y with probability ∝
    N(x_end; alpha y, sigma²) (Kingma 2021, section 3.3). Continuous data: N(x0; denoised, (sigma /
    alpha)² I) of the standardised x0, `denoised` being E[x0 | x_end].
    """
    n, (alpha, sigma) = x.shape[0], coefficients(path, path.end, x)
    ratio = sigma / alpha
    if spec.kind == "continuous":
        each = normal_log_prob(spec.normalize(x), denoised, jnp.log(ratio))
        return jnp.sum(each.reshape(n, -1), axis=1) + spec.log_volume
    z, y = (v.reshape(n, -1, 1) for v in (x_end / alpha, spec.normalize(x)))
    values = spec.normalize(jnp.arange(spec.levels or 2, dtype=x.dtype)).reshape(1, 1, -1)
    # The exponent relative to that of the true value, as a product that does not cancel; it is at
    # most ½ ε².
    relative = (values - y) * (z - (values + y) / 2) / jnp.square(ratio)
    return -jnp.sum(jnp.log(jnp.sum(jnp.exp(relative), axis=-1)), axis=1)


def _mean_error(
    denoise: Denoise,
    path: Path,
    x0: Array,
    key: Key,
    n_samples: int,
    at: Callable[[Array], tuple[Array, Array]],
) -> Array:
    """1/K Σ_k w_k ‖x0 - denoise(x_t, t_k)‖² [n], with (t_k, w_k) = at(u_k) and u_k uniform on [k/K,
    (k+1)/K].
    """
    n = x0.shape[0]

    def add(total: Array, draw: tuple[Array, Key]) -> tuple[Array, None]:
        index, key = draw
        key_time, key_noise = jax.random.split(key)
        t, weight = at((index + jax.random.uniform(key_time, (n,), x0.dtype)) / n_samples)
        x_t = diffuse(path, x0, jax.random.normal(key_noise, x0.shape, x0.dtype), t)
        return total + weight * squared(x0 - denoise(x_t, t)), None

    draws = jnp.arange(n_samples, dtype=x0.dtype), jax.random.split(key, n_samples)
    return jax.lax.scan(add, jnp.zeros(n, x0.dtype), draws)[0] / n_samples


def diffusion_nats(denoise: Denoise, path: Path, x0: Array, key: Key, n_samples: int = 1) -> Array:
    """½ ∫ SNR E‖x0 - denoise(x_t)‖² d log-SNR over the path, [n] nats, by a stratified sample of
    log-SNR for each example.

    The loss of Kingma 2021, section 5, with log-SNR in the place of time, which their section 5.1
    shows not to matter. `denoise` takes a t for each example.
    """
    first, last = (log_snr(path, t).astype(x0.dtype) for t in (path.start, path.end))

    def at(u: Array) -> tuple[Array, Array]:
        value = first + u * (last - first)
        return path.time_of_log_snr(value), 0.5 * (last - first) * jnp.exp(value)

    return _mean_error(denoise, path, x0, key, n_samples, at)


def discrete_nats(
    denoise: Denoise, path: Path, x0: Array, key: Key, n_times: int, n_samples: int
) -> Array:
    """Σ_i KL(q(x_s | x_t, x0) || p(x_s | x_t)) over the steps i = 1 .. T from t = i/T to s =
    (i-1)/T of the path, [n] nats.

    = Σ_i ½ (SNR(s) - SNR(t)) ‖x0 - denoise(x_t)‖², Kingma 2021, section 4; every term once with
    n_samples >= T, otherwise n_samples of them, stratified.
    """
    k = min(n_samples, n_times)

    def at(u: Array) -> tuple[Array, Array]:
        step = jnp.minimum(jnp.floor(u * n_times), n_times - 1)
        s, t = (time_of_step(path, i, n_times) for i in (step, step + 1))
        return t, 0.5 * n_times * snr_drop(path, s, t)

    return _mean_error(denoise, path, x0, key, k, at)


def end_nats(denoise: Denoise, path: Path, spec: DataSpec, x: Array, epsilon: Array) -> Array:
    """ln p(x | x_end) [n] nats, for x [n, *event] in the units of the data and the noise in
    x_end.
    """
    x0, t = spec.normalize(x), jnp.asarray(path.end, x.dtype)
    x_end = denoised = diffuse(path, x0, epsilon, t)
    if spec.kind == "continuous":
        denoised = denoise(x_end, jnp.broadcast_to(t, x.shape[:1]))
    return reconstruction(spec, path, x, x_end, denoised)


def variational_bound(
    denoise: Denoise,
    path: Path,
    spec: DataSpec,
    x: Array,
    key: Key,
    n_samples: int = 1,
    n_times: int | None = None,
) -> Array:
    """A lower bound (in expectation) of ln p(x), [n] nats: ln p(x | x_end) - diffusion - prior KL.
    Kingma 2021, section 3.5.

    The sampler that it is the bound of draws N(0, sigma(start)² I) at the start of the path, and x
    given x_end at its end; in between it goes in n_times ancestral steps, or infinitely many.
    """
    key_path, key_end = jax.random.split(key)
    x0 = spec.normalize(x)
    nats = diffusion_nats if n_times is None else partial(discrete_nats, n_times=n_times)
    between = nats(denoise, path, x0, key_path, n_samples=n_samples)
    epsilon = jax.random.normal(key_end, x.shape, x.dtype)
    return end_nats(denoise, path, spec, x, epsilon) - between - prior_kl(path, x0)


# --- a learned schedule ---------------------------------------------------------------------------


def init_schedule(highest: float = 13.3, n_units: int = 8) -> Any:
    """The parameters of `learned_gamma`: log-SNR from `highest` to -5, as in Kingma 2021, and
    nearly linear in t.
    """
    return {
        "ends": jnp.asarray([-highest, math.log(highest + 5)], jnp.float32),
        "inner": {
            "weight": jnp.asarray([-4.0] * n_units, jnp.float32),
            "slope": jnp.asarray([math.log(10.0)] * n_units, jnp.float32),
            "centre": jnp.asarray([(j + 0.5) / n_units for j in range(n_units)], jnp.float32),
        },
    }


def learned_gamma(schedule: Any) -> Callable[[Array], Array]:
    """gamma(t) = -log-SNR, increasing on [0, 1]: gamma_0 + e^r (g(t) - g(0)) / (g(1) - g(0)), with
    ends (gamma_0, r).

    g(t) = t + Σ_j softplus(weight_j) σ(e^slope_j (t - centre_j)): a network of one hidden layer
    with positive weights, smaller than that of Kingma 2021, appendix H.
    """
    (first, log_range), inner = schedule["ends"], schedule["inner"]
    zero, one = (jnp.asarray(end, first.dtype) for end in (0, 1))

    def g(t: Array) -> Array:
        weight, slope, centre = (
            v.reshape(*[1] * t.ndim, -1)
            for v in (
                jax.nn.softplus(inner["weight"]),
                jnp.exp(inner["slope"]),
                inner["centre"],
            )
        )
        return t + jnp.sum(weight * jax.nn.sigmoid(slope * (t[..., None] - centre)), axis=-1)

    def gamma(t: Array) -> Array:
        low, high = g(zero), g(one)
        return first + jnp.exp(log_range) * ((g(t) - low) / (high - low))

    return gamma
