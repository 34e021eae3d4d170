"""Karras's preconditioning, weights, and the laws of times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from denoising_oracles import PATHS

from genjax.parts.paths import diffuse, edm, edm_prediction, input_scale, log_snr
from genjax.parts.weightings import (
    discrete_times,
    edm_weight,
    log_normal_times,
    min_snr_weight,
    uniform_times,
)

# --- Karras's preconditioning ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_edm_inputs_and_targets_have_unit_variance(x64, name):
    """For data of variance sigma_data², exactly: both are linear in x0 and epsilon, so variances
    add.
    """
    path, sd = PATHS[name], 0.5
    t = jnp.linspace(jnp.asarray(path.end), jnp.asarray(path.start), 7)
    alpha, sigma = path.alpha(t), path.sigma(t)
    np.testing.assert_allclose(
        input_scale(path, t, sd) ** 2 * (alpha**2 * sd**2 + sigma**2), 1, rtol=1e-12
    )

    def target(x0, epsilon):
        return edm_prediction(sd).from_x0(path, x0, diffuse(path, x0, epsilon, t), t)

    of_data, of_noise = (
        target(jnp.ones_like(t), jnp.zeros_like(t)),
        target(jnp.zeros_like(t), jnp.ones_like(t)),
    )
    np.testing.assert_allclose((of_data * sd) ** 2 + of_noise**2, 1, rtol=1e-8)
    # And the weighting of the paper makes the loss one of the target itself: lambda c_out² = 1.
    c_out = edm_prediction(sd).to_x0(path, jnp.ones_like(t), jnp.zeros_like(t), t)
    np.testing.assert_allclose(edm_weight(path, t, c_out, sd), 1, rtol=1e-8)
    # Karras 2022, table 1, as it is written there.
    s = sigma / alpha
    np.testing.assert_allclose(c_out, s * sd / np.sqrt(s**2 + sd**2), rtol=1e-12)
    np.testing.assert_allclose(
        edm_weight(path, t, jnp.ones_like(t), sd), (s**2 + sd**2) / (s * sd) ** 2, rtol=1e-12
    )
    skip = edm_prediction(sd).to_x0(path, jnp.zeros_like(t), jnp.ones_like(t), t)
    np.testing.assert_allclose(skip * alpha, sd**2 / (s**2 + sd**2), rtol=1e-12)


def test_min_snr_is_the_snr_of_x0_up_to_5():
    """Hang 2023: min(SNR, 5) of the error of x0, over the SNR of that of the noise."""
    snr = np.asarray([0.1, 4.0, 5.0, 80.0], np.float32)
    path, sigma = edm(), jnp.asarray(snr**-0.5)
    found = min_snr_weight(path, sigma, jnp.ones(4), 1.0)
    np.testing.assert_allclose(found, [0.1, 4, 5, 5], rtol=1e-5)
    of_noise = min_snr_weight(path, sigma, -sigma, 1.0)
    np.testing.assert_allclose(of_noise, np.minimum(snr, 5) / snr, rtol=1e-5)


def test_edm_denoiser_returns_its_input_where_there_is_no_noise(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    for name in ("edm", "cosine"):
        path = PATHS[name]

        def gap(sigma):
            return np.abs(
                edm_prediction(0.5).to_x0(path, 10 * jnp.ones_like(x), x, jnp.asarray(sigma)) - x
            ).max()

        gaps = np.asarray([gap(sigma) for sigma in (1e-3, 1e-5, 1e-7, 1e-9)])
        assert (np.diff(gaps) < 0).all()
        assert gaps[-1] < 1e-7


@pytest.mark.parametrize("name", ["edm", "cosine"])
def test_edm_prediction_and_x0_are_inverses(x64, name):
    path, rng = PATHS[name], np.random.default_rng(1)
    x0, epsilon = (jnp.asarray(rng.normal(size=(5, 2))) for _ in range(2))
    t = path.end + (path.start - path.end) * jnp.asarray([0.0, 0.01, 0.3, 0.7, 1.0])
    x_t, kind = diffuse(path, x0, epsilon, t), edm_prediction(0.7)
    np.testing.assert_allclose(
        kind.to_x0(path, kind.from_x0(path, x0, x_t, t), x_t, t), x0, rtol=1e-9, atol=1e-10
    )


# --- times ----------------------------------------------------------------------------------------


def test_a_time_is_never_the_end_of_the_path_where_there_may_be_no_noise(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.zeros(shape, dtype))
    path = edm(sigma_min=0.0)
    t = uniform_times(jax.random.key(0), path, 3, jnp.float32)
    assert bool((t > path.end).all())
    assert bool(jnp.isfinite(log_snr(path, t)).all())


@pytest.mark.slow
def test_times_have_the_laws_they_say(x64):
    n, key = 20_000, jax.random.key(6)
    for path in (PATHS["cosine"], PATHS["edm"]):
        t = np.asarray(uniform_times(key, path, n, jnp.float64))
        assert (
            scipy.stats.kstest(
                t, scipy.stats.uniform(float(path.end), float(path.start) - float(path.end)).cdf
            ).pvalue
            > 1e-4
        )
        t = log_normal_times(-1.2, 1.2, key, path, n, jnp.float64)
        log_ratio = np.asarray(-log_snr(path, t) / 2)
        low, high = (float(-log_snr(path, jnp.asarray(end)) / 2) for end in (path.end, path.start))
        inside = (log_ratio > low + 1e-6) & (log_ratio < high - 1e-6)
        law = scipy.stats.norm(-1.2, 1.2)
        assert (
            scipy.stats.kstest(
                log_ratio[inside],
                lambda q: (law.cdf(q) - law.cdf(low)) / (law.cdf(high) - law.cdf(low)),
            ).pvalue
            > 1e-4
        )
        assert inside.mean() > 0.99
        t = np.asarray(discrete_times(4, key, path, n, jnp.float64))
        step, counts = np.unique(
            np.round((t - path.end) / (path.start - path.end) * 4, 9), return_counts=True
        )
        np.testing.assert_array_equal(step, [1, 2, 3, 4])
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
