"""The likelihood by the ODE against normal data, whose density is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from path_oracles import COVARIANCE, MEAN, denoise_of, jit, model_log_prob, root

from genjax.errors import ConfigError
from genjax.parts import paths
from genjax.parts.ode_likelihood import LIKELIHOOD_SOLVERS, ode_log_prob
from genjax.parts.paths import PATHS
from genjax.parts.solvers import GRIDS, SOLVERS

pytestmark = pytest.mark.usefixtures("x64")


def sample(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


LIKELIHOODS = [
    *((path_name, "rk4") for path_name in ("edm", "linear", "cosine")),
    *(("conditional_ot", name) for name in LIKELIHOOD_SOLVERS if name != "adaptive"),
    pytest.param("conditional_ot", "adaptive", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("path_name", "name"), LIKELIHOODS)
def test_the_likelihood_of_normal_data_is_the_normal_density(path_name, name):
    path = paths.cosine(1e-6) if path_name == "cosine" else PATHS[path_name]()
    x = jnp.asarray(MEAN + 1.5 * np.asarray(sample((5, 2))) @ np.linalg.cholesky(COVARIANCE).T)
    n_steps, atol = {"euler": (2000, 4e-3), "heun": (200, 1e-4), "midpoint": (200, 1e-4)}.get(
        name, (120, 1e-5)
    )
    times = GRIDS["uniform" if path_name == "conditional_ot" else "cosine"](path, n_steps)
    if path_name in ("edm", "linear"):
        times = GRIDS["karras"](path, n_steps)

    def log_prob(x):
        return ode_log_prob(denoise_of(path), path, x, times, solver=name, tolerance=1e-8)

    got = jit(log_prob)(x)
    np.testing.assert_allclose(got, model_log_prob(path, x), rtol=0, atol=atol)
    if path_name in (
        "conditional_ot",
        "cosine",
    ):  # begins in noise altogether, so the model's law is that of the data
        exact = scipy.stats.multivariate_normal(MEAN, COVARIANCE).logpdf(np.asarray(x))
        np.testing.assert_allclose(got, exact, rtol=0, atol=max(atol, 2e-5))


@pytest.mark.slow
def test_probes_estimate_the_likelihood_without_bias():
    path = paths.conditional_ot()
    x = jnp.asarray(MEAN + np.asarray(sample((1, 2))) @ np.linalg.cholesky(COVARIANCE).T)
    times = GRIDS["uniform"](path, 40)

    def log_prob(x, key=None, probes=0):
        return ode_log_prob(denoise_of(path), path, x, times, key, probes)

    exact = float(jit(log_prob)(x)[0])
    many = jit(lambda x: log_prob(jnp.broadcast_to(x, (500, 2)), jax.random.key(10), 1))(x)
    error = np.std(many) / math.sqrt(500)
    assert error > 1e-3  # the axes are not those of Sigma, so single probes miss
    assert abs(np.mean(many) - exact) < 3.5 * error
    averaged = jit(lambda x: log_prob(jnp.broadcast_to(x, (100, 2)), jax.random.key(11), 25))(x)
    assert 0.6 < np.std(averaged) / (np.std(many) / 5) < 1.5


def test_the_likelihood_of_images_is_that_of_their_pixels():
    """Independent pixels, each N(0.3, 0.5²): the event's shape does not matter, and float32 stays
    float32.
    """
    path, x = paths.cosine(), (0.3 + 0.5 * sample((3, 2, 2, 1))).astype(jnp.float32)

    def denoise(x, t):
        alpha, sigma = paths.coefficients(path, t, x)
        return 0.3 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha * 0.3)

    got = jit(lambda x: ode_log_prob(denoise, path, x, GRIDS["uniform"](path, 60)))(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, scipy.stats.norm(0.3, 0.5).logpdf(np.asarray(x)).sum((1, 2, 3)), atol=2e-2
    )
    # A probe of -1 and 1 is exact where no pixel sees another.
    times, key = GRIDS["uniform"](path, 60), jax.random.key(0)
    probed = jit(lambda x: ode_log_prob(denoise, path, x, times, key, 1))(x)
    np.testing.assert_allclose(probed, got, atol=1e-3)


def test_the_flow_map_of_the_oracle_carries_the_prior_to_the_data():
    path = paths.conditional_ot()
    from_prior = float(paths.prior(path)) * np.eye(len(COVARIANCE))
    carried = from_prior @ np.linalg.solve(root(path, 1.0), root(path, 0.0))
    np.testing.assert_allclose(carried @ carried.T, COVARIANCE, rtol=1e-12)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input():
    path, x = paths.cosine(), sample((2, 2))
    times, denoise = GRIDS["uniform"](path, 2), denoise_of(path)
    for name in sorted(set(SOLVERS) - set(LIKELIHOOD_SOLVERS)):
        with pytest.raises(
            ConfigError,
            match=rf"'{name}' has no likelihood; .*euler, midpoint, heun, rk4, adaptive\.",
        ):
            ode_log_prob(denoise, path, x, times, solver=name)
    with pytest.raises(ConfigError, match=r"There is no solver called 'rk5'\. Did you mean rk4\?"):
        ode_log_prob(denoise, path, x, times, solver="rk5")
    with pytest.raises(ConfigError, match=r"Probes are random and need a key"):
        ode_log_prob(denoise, path, x, times, probes=2)
    with pytest.raises(ConfigError, match=r"probes must be 0 \(exact\) or more; got -1\."):
        ode_log_prob(denoise, path, x, times, jax.random.key(0), probes=-1)
