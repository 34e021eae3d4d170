"""Normal data N(mu, Sigma) in the plane, of which everything along a path is known: what paths and
solvers are held against.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from genjax.parts import paths

# These programs are small and run once or a few times: most of the time is the compiler's.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MEAN = np.array([0.7, -0.4])
ANGLE = 0.6
VARIANCES = np.array([1.3, 0.25])
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
COVARIANCE = TURN @ np.diag(VARIANCES) @ TURN.T


def marginal(path, t):
    """Mean and covariance of x_t."""
    alpha, sigma = (float(part(jnp.asarray(t))) for part in (path.alpha, path.sigma))
    return alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * np.eye(2)


def denoise_of(path):
    """mu + alpha Sigma (alpha² Sigma + sigma² I)^-1 (x - alpha mu) in the basis where Sigma is
    diagonal.
    """
    turn, mean, variances = jnp.asarray(TURN), jnp.asarray(MEAN), jnp.asarray(VARIANCES)

    def denoise(x, t):
        alpha, sigma = paths.coefficients(path, t, x)
        gain = alpha * variances[None] / (alpha**2 * variances[None] + sigma**2)
        return mean[None] + ((x - alpha * mean[None]) @ turn * gain) @ turn.T

    return denoise


def root(path, t):
    """The symmetric root of the covariance of x_t: covariances of all t commute, so the ODE
    stretches along fixed axes.
    """
    alpha, sigma = (float(part(jnp.asarray(t))) for part in (path.alpha, path.sigma))
    return TURN @ np.diag(np.sqrt(alpha**2 * VARIANCES + sigma**2)) @ TURN.T


def flow(path, x, t, s):
    """Where the probability-flow ODE takes x [n, 2] from t to s."""
    stretch = np.linalg.solve(root(path, t), root(path, s))
    return marginal(path, s)[0] + (np.asarray(x) - marginal(path, t)[0]) @ stretch


def model_log_prob(path, x):
    """The log-density at path.end of the ODE's samples from N(0, sigma(start)² I): normal too,
    since the flow is affine.
    """
    stretch = np.linalg.solve(root(path, path.start), root(path, path.end))
    mean = flow(path, np.zeros((1, 2)), path.start, path.end)[0]
    covariance = float(paths.prior(path)) ** 2 * stretch.T @ stretch
    return scipy.stats.multivariate_normal(mean, covariance).logpdf(np.asarray(x))
