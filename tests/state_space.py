"""A linear-Gaussian state space model, z_t = A z_{t-1} + N(0, Q), x_t = C z_t + N(0, R), z_0 = 0:
solved densely in numpy, and as weights of a VRNN whose cell adds up what it is given, so that h_t =
z_t. Q, R and S are diagonal.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.stats
from gates import named

from genjax.families.vrnn import MIN_SCALE, vrnn
from genjax.nets.cells import Cell
from genjax.protocol import DataSpec

L, D = 1, 2
A, Q = np.asarray([[0.9]]), np.asarray([0.5])
C, R = np.asarray([[1.0], [-0.7]]), np.asarray([0.3, 0.6])
ADDING = Cell(lambda a, u, carry: (a + u,), 1)


def spec(steps):
    return DataSpec((steps, D), "continuous", step="step", name="a state space")


def chain(transition, noise, steps):
    """z = M e for e ~ N(0, noise) and z_t = transition z_{t-1} + e_t: M, and the covariance of
    z.
    """
    m = np.linalg.inv(np.eye(steps * L) - np.kron(np.eye(steps, k=-1), transition))
    return m, m @ np.kron(np.eye(steps), np.diag(noise)) @ m.T


def marginal(steps):
    """Covariance of x, and what takes z to the mean of x."""
    c = np.kron(np.eye(steps), C)
    return c @ chain(A, Q, steps)[1] @ c.T + np.kron(np.eye(steps), np.diag(R)), c


def log_prob(x):
    """The Kalman filter's ln p(x), here from the dense Gaussian, for x [n, T, D]."""
    covariance, _ = marginal(x.shape[1])
    return scipy.stats.multivariate_normal.logpdf(x.reshape(len(x), -1), cov=covariance)


def posterior_of_path(x):
    """Mean and covariance of p(z | x) for one x [T, D]: what the RTS smoother gives, densely."""
    covariance, c = marginal(len(x))
    z = chain(A, Q, len(x))[1]
    gain = z @ c.T @ np.linalg.inv(covariance)
    return gain @ x.reshape(-1), z - gain @ c @ z


def normal_kl(mean, covariance, mean_2, covariance_2):
    difference, inverse = mean_2 - mean, np.linalg.inv(covariance_2)
    log_det = np.linalg.slogdet(covariance_2)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (
        np.trace(inverse @ covariance) + difference @ inverse @ difference - len(mean) + log_det
    )


def elbo(x, k, g, s):
    """The exact ELBO of one x [T, D] under q(z_t | x_t, z_{t-1}) = N(k x_t + g z_{t-1}, s): ln p(x)
    - KL(q || p(z | x)).
    """
    m, covariance = chain(g, s, len(x))
    mean = m @ np.kron(np.eye(len(x)), k) @ x.reshape(-1)
    return log_prob(x[None]) - normal_kl(mean, covariance, *posterior_of_path(x))


def filtering():
    """k, g, s of the exact p(z_t | x_t, z_{t-1})."""
    s = 1 / (1 / Q + (C.T / R) @ C)
    return s * (C.T / R), s / Q * A, s[0]


def bootstrap():
    """k, g, s of the proposal that is the prior."""
    return np.zeros((L, D)), A, Q


def raw(variance):
    """The network's output that makes the scale of z that of this variance."""
    return np.log(np.expm1(np.sqrt(variance) - MIN_SCALE))


def raw_of_x(variance):
    """The same for the scale of x, whose logarithm has the floor -7."""
    return -7 + np.log(np.expm1(0.5 * np.log(variance) + 7))


def weights(model, k, g, s):
    """Parameters, float64, for which the model's p is the state space model and its q is N(k x_t +
    g z_{t-1}, s).
    """
    params, state = model.init(jax.random.key(0))
    eye, none = np.eye(L), np.zeros((L, L))
    values = {
        "embed/start": np.zeros(L),
        "embed/dense/kernel": k.T,
        "embed/dense/bias": np.zeros(L),
        "layer/inputs/kernel": none,
        "layer/inputs/bias": np.zeros(L),
        "layer/kernel": none,
        "z_features/layers/0/kernel": eye,
        "z_features/layers/0/bias": np.zeros(L),
        "z_inputs/kernel": eye,
        "prior/layers/0/kernel": np.concatenate([A.T, none], axis=1),
        "prior/layers/0/bias": np.concatenate([np.zeros(L), raw(Q)]),
        "encoder/first/kernel": np.concatenate([eye, none], axis=1),
        "encoder/first/bias": np.concatenate([np.zeros(L), raw(s)]),
        "encoder/second/kernel": np.concatenate([g.T, none], axis=1),
        "decoder/first/kernel": np.concatenate([np.zeros((L, 1)), C.T, np.zeros((L, D))], axis=1),
        "decoder/first/bias": np.concatenate([np.zeros(1 + D), raw_of_x(R)]),
        "decoder/second/kernel": np.zeros((L, 1 + 2 * D)),
    }
    paths = named(params["vrnn"])
    assert paths.keys() == values.keys()
    assert all(paths[name].shape == value.shape for name, value in values.items())
    leaves = [jnp.asarray(values[name], jnp.float64) for name in paths]
    return {"vrnn": jax.tree.unflatten(jax.tree.structure(params["vrnn"]), leaves)}, state


@functools.cache
def model(steps, **settings):
    return vrnn(spec(steps), cell=ADDING, latent_dim=L, d_hidden=L, hidden=(), **settings)


def draw(steps, seed=0):
    """One x [T, D] of the state space model."""
    rng = np.random.default_rng(seed)
    covariance, _ = marginal(steps)
    return (scipy.linalg.cholesky(covariance, lower=True) @ rng.normal(size=steps * D)).reshape(
        steps, D
    )
