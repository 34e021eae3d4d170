"""Where the loss of a diffusion model looks, and how it weights the squared errors that it finds
there.

Kingma 2021 (the bound), Karras 2022 (EDM), Hang 2023 (min-SNR).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from genjax.parts.bounds import snr_drop, time_of_step
from genjax.parts.paths import Path, log_snr
from genjax.protocol import Array, Key

# --- weights --------------------------------------------------------------------------------------


def unit_weight(path: Path, t: Array, scale: Array, sigma_data: Array | float) -> Array:
    """1: the squared error of what the network predicts. Ho 2020, equation 14, for ε."""
    return jnp.ones_like(t)


def elbo_weight(path: Path, t: Array, scale: Array, sigma_data: Array | float) -> Array:
    """-½ dSNR/dt of the squared error of x0, -½ d log-SNR/dt of that of ε: the variational bound.
    Kingma 2021, section 5.
    """
    rate = jax.jvp(partial(log_snr, path), (t,), (jnp.ones_like(t),))[1]
    # Times are uniform on this length.
    length = jnp.asarray(path.start, t.dtype) - jnp.asarray(path.end, t.dtype)
    return -0.5 * rate * length * jnp.exp(log_snr(path, t)) * jnp.square(scale)


def discrete_elbo_weight(
    n_times: int, path: Path, t: Array, scale: Array, sigma_data: Array | float
) -> Array:
    """T/2 (SNR(s) - SNR(t)) of the squared error of x0, s being the step before t. Kingma 2021,
    section 4.
    """
    s = t - (path.start - path.end) / n_times
    return 0.5 * n_times * snr_drop(path, s, t) * jnp.square(scale)


def min_snr_weight(path: Path, t: Array, scale: Array, sigma_data: Array | float) -> Array:
    """min(SNR, 5) of the squared error of x0. Hang 2023, section 3.4."""
    return jnp.minimum(jnp.exp(log_snr(path, t)), 5) * jnp.square(scale)


def edm_weight(path: Path, t: Array, scale: Array, sigma_data: Array | float) -> Array:
    """(s² + sigma_data²) / (s sigma_data)² of the squared error of x0, s = sigma / alpha. Karras
    2022, table 1.
    """
    s = path.sigma(t) / path.alpha(t)
    return (1 / jnp.square(sigma_data) + 1 / jnp.square(s)) * jnp.square(scale)


# (path, t [n], scale [n], sigma_data) -> the weight [n] of the squared error of what the network
# predicts, where scale = dx0 / d(prediction): the weight of an error of x0, times scale².
Weighting = Callable[[Path, Array, Array, Array | float], Array]
WEIGHTINGS: dict[str, Weighting] = {
    "unit": unit_weight,
    "elbo": elbo_weight,
    "min_snr": min_snr_weight,
    "edm": edm_weight,
}


# --- times ----------------------------------------------------------------------------------------

Times = Callable[[Key, Path, int, Any], Array]  # (key, path, n, dtype) -> t [n]


def uniform_times(key: Key, path: Path, n: int, dtype: Any) -> Array:
    """t [n] uniform from path.end to path.start, but never path.end, where some paths have no
    noise and the log-SNR is infinite.
    """
    end, start = jnp.asarray(path.end, dtype), jnp.asarray(path.start, dtype)
    u = jnp.maximum(jax.random.uniform(key, (n,), dtype), jnp.finfo(dtype).epsneg)
    return end + (start - end) * u


def log_normal_times(p_mean: Any, p_std: Any, key: Key, path: Path, n: int, dtype: Any) -> Array:
    """t [n] with ln(sigma / alpha) ~ N(p_mean, p_std²), within the path. Karras 2022, table 1."""
    log_ratio = p_mean + p_std * jax.random.normal(key, (n,), dtype)
    return jnp.clip(
        path.time_of_log_snr(-2 * log_ratio),
        jnp.asarray(path.end, dtype),
        jnp.asarray(path.start, dtype),
    )


def discrete_times(n_times: int, key: Key, path: Path, n: int, dtype: Any) -> Array:
    """t [n], each of the steps 1 .. n_times with the same probability."""
    return time_of_step(path, jax.random.randint(key, (n,), 1, n_times + 1).astype(dtype), n_times)
