"""Paths from data to noise: known log-SNRs, the marginals and posteriors of normal data, and every
conversion.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from path_oracles import COVARIANCE, MEAN, denoise_of, jit, marginal

from genjax.errors import ConfigError
from genjax.parts import paths
from genjax.parts.paths import PATHS, PREDICTIONS, from_log_snr

pytestmark = pytest.mark.usefixtures("x64")


def bent(t):
    """-log-SNR of a schedule that is no straight line."""
    return -13.3 + 18.3 * (0.3 * t + 0.7 * t**3)


ALL = PATHS | {
    "log_snr": lambda: from_log_snr(bent),
    "discrete": lambda: paths.discretize(paths.cosine(), 10),
}
CONTINUOUS = [name for name in ALL if name != "discrete"]


def inside(path, n=9):
    """Times strictly between the ends."""
    return path.end + (path.start - path.end) * jnp.linspace(0.06, 0.94, n)


def sample(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


# --- the schedules --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_schedules_are_what_their_papers_write():
    t = np.linspace(0.05, 0.95, 7)
    expected = {
        "cosine": (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)),
        "variance_preserving": (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)),
        "edm": (np.ones(7), t),
        "conditional_ot": (1 - t, t),
        "log_snr": (1 / np.sqrt(1 + np.exp(bent(t))), 1 / np.sqrt(1 + np.exp(-bent(t)))),
    }
    # beta(t) = 0.1 + 19.9 t, integrated by the trapezoid rule, which is exact for a line
    integral = np.array([np.trapezoid([0.1, 0.1 + 19.9 * s], [0, s]) for s in t])
    expected["linear"] = np.exp(-integral / 2), np.sqrt(1 - np.exp(-integral))
    assert set(expected) == set(CONTINUOUS)
    for name, (alpha, sigma) in expected.items():
        path = ALL[name]()
        np.testing.assert_allclose(path.alpha(jnp.asarray(t)), alpha, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(path.sigma(jnp.asarray(t)), sigma, rtol=1e-12, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTINUOUS)
def test_log_snr_falls_from_data_to_noise_and_its_inverse_finds_the_time(name):
    path = ALL[name]()
    t = inside(path)
    value = paths.log_snr(path, t)
    np.testing.assert_allclose(value, 2 * np.log(path.alpha(t) / path.sigma(t)), rtol=1e-12)
    assert np.all(np.diff(value) < 0)
    np.testing.assert_allclose(path.time_of_log_snr(value), t, rtol=1e-10)
    # a number, and an array of it, are alike
    np.testing.assert_allclose([float(path.time_of_log_snr(one)) for one in value], t, rtol=1e-10)
    np.testing.assert_allclose([float(path.alpha(one)) for one in t], path.alpha(t), rtol=1e-14)


@pytest.mark.slow
def test_the_ends_are_data_and_noise():
    ends = {
        name: [float(paths.log_snr(make(), end)) for end in (make().end, make().start)]
        for name, make in ALL.items()
    }
    tangent = 2 * math.log(math.tan(math.pi / 2 * 1e-3))
    np.testing.assert_allclose(ends["cosine"], [-tangent, tangent], rtol=1e-9)
    np.testing.assert_allclose(ends["edm"], [-2 * math.log(0.002), -2 * math.log(80)], rtol=1e-12)
    np.testing.assert_allclose(ends["log_snr"], [13.3, -5.0], rtol=1e-9)
    assert ends["conditional_ot"] == ends["variance_preserving"] == [math.inf, -math.inf]
    # Song 2021: beta(0) = 0.1 and beta(1) = 20
    assert 9 < ends["linear"][0] < 9.2
    np.testing.assert_allclose(ends["linear"][1], -math.log(math.expm1(10.05)), rtol=1e-9)
    for name, make in ALL.items():
        np.testing.assert_allclose(
            paths.prior(make()), make().sigma(jnp.asarray(make().start)), err_msg=name
        )
    for dtype in (
        jnp.float32,
        jnp.float64,
    ):  # no rounding left at the very ends, where it would be divided by
        path = paths.variance_preserving()
        assert float(path.alpha(jnp.ones((), dtype))) == 0
        assert float(path.sigma(jnp.zeros((), dtype))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cosine", "linear", "variance_preserving", "log_snr", "discrete"])
def test_the_variance_is_preserved(name):
    path = ALL[name]()
    t = inside(path, 50)
    np.testing.assert_allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, 1, rtol=1e-13)


@pytest.mark.slow
def test_a_learned_log_snr_gets_gradients_and_may_bring_its_own_inverse():
    t = jnp.asarray(0.3)

    def alpha(slope):
        return from_log_snr(lambda t: -5 + slope * t).alpha(t)

    weight = jax.nn.sigmoid(5 - 3.0)
    np.testing.assert_allclose(
        jax.grad(alpha)(10.0), -0.5 * math.sqrt(weight) * (1 - weight) * 0.3, rtol=1e-10
    )
    line = from_log_snr(lambda t: -5 + 10 * t, inverse=lambda gamma: (gamma + 5) / 10)
    np.testing.assert_allclose(
        line.time_of_log_snr(jnp.asarray([-4.0, 0.0, 4.5])), [0.9, 0.5, 0.05], rtol=1e-12
    )
    # beyond its range the search ends at the ends
    found = from_log_snr(lambda t: -5 + 10 * t).time_of_log_snr(jnp.asarray([99.0, -99.0]))
    np.testing.assert_allclose(found, [0, 1], atol=1e-12)
    single = from_log_snr(lambda t: -5 + 10 * t).time_of_log_snr(jnp.asarray([-4.0], jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, 0.9, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "edm",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("linear", "log_snr", "discrete")),
    ],
)
def test_everything_keeps_the_dtype_of_its_data_and_takes_times_of_both_shapes(name):
    path = ALL[name]()

    def everything(x0, x, t):
        s = (t + path.end) / 2
        whole = {
            kind: p.to_x0(path, p.from_x0(path, x0, x, t), x, t) for kind, p in PREDICTIONS.items()
        }
        mean, std = paths.posterior(path, x0, x, s, t)
        return whole | {
            "diffuse": paths.diffuse(path, x0, x, t),
            "mean": mean,
            "std": std + jnp.zeros_like(x),
        }

    def one_by_one(*args):
        return everything(*(arg if arg.ndim == 0 else arg[None] for arg in args))

    both = jit(lambda *args: (everything(*args), jax.vmap(one_by_one)(*args)))
    for dtype in (jnp.float32, jnp.float64):
        x0, x, t = (
            sample((3, 2, 2)).astype(dtype),
            sample((3, 2, 2), 1).astype(dtype),
            inside(path, 3).astype(dtype),
        )
        whole, single = both(x0, x, t)
        assert {value.dtype for value in jax.tree.leaves(whole)} == {jnp.dtype(dtype)}
        for what, value in whole.items():
            np.testing.assert_allclose(
                single[what][:, 0], value, rtol=1e-4, atol=1e-4, err_msg=what
            )
    assert paths.expand(0.5, x).shape == ()
    assert paths.expand(t, x).shape == (3, 1, 1)


# --- conversions ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_prediction_is_what_it_says_and_every_conversion_goes_round(name):
    path = ALL[name]()
    t = inside(path, 6)
    x0, epsilon = sample((6, 3)), sample((6, 3), 1)
    alpha, sigma = (part(t)[:, None] for part in (path.alpha, path.sigma))
    x_t = paths.diffuse(path, x0, epsilon, t)
    np.testing.assert_allclose(x_t, alpha * x0 + sigma * epsilon, rtol=1e-14)
    alpha_rate, sigma_rate = (
        jax.vmap(jax.grad(part))(t)[:, None] for part in (path.alpha, path.sigma)
    )
    expected = {
        "x0": x0,
        "epsilon": epsilon,
        "v": alpha * epsilon - sigma * x0,
        "score": -epsilon / sigma,
        "velocity": alpha_rate * x0 + sigma_rate * epsilon,
    }
    assert set(expected) == set(PREDICTIONS)

    def convert(expected, x_t):
        backs = {
            kind: PREDICTIONS[kind].to_x0(path, value, x_t, t) for kind, value in expected.items()
        }
        return backs, {
            k: {o: p.from_x0(path, back, x_t, t) for o, p in PREDICTIONS.items()}
            for k, back in backs.items()
        }

    backs, converted = jit(convert)(expected, x_t)
    for kind, back in backs.items():
        np.testing.assert_allclose(back, x0, rtol=1e-8, atol=1e-8, err_msg=kind)
        for other, value in expected.items():
            np.testing.assert_allclose(
                converted[kind][other], value, rtol=1e-7, atol=1e-7, err_msg=f"{kind} to {other}"
            )


def test_derivatives_of_a_path_in_discrete_time_are_those_of_the_path_at_the_rounded_time():
    path = paths.cosine()
    discrete, t = paths.discretize(path, 10), jnp.asarray([0.26, 0.33])
    rounded = jnp.asarray([path.end + (path.start - path.end) * 0.3] * 2)
    for one, other in zip(paths.rates(discrete, t, t), paths.rates(path, rounded, t), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.slow
def test_the_score_and_velocity_of_normal_data(name):
    path = ALL[name]()
    denoise = denoise_of(path)
    for t in inside(path, 4):
        x = 2 * sample((5, 2))
        mean, covariance = marginal(path, t)
        score = -np.linalg.solve(covariance, (np.asarray(x) - mean).T).T
        np.testing.assert_allclose(
            paths.score_of(path, denoise(x, t), x, t), score, rtol=1e-8, atol=1e-9
        )
        # d/dt of mean and covariance: the marginal velocity is alpha' mu + ½ V' V^-1 (x - alpha mu)
        alpha, sigma = (float(part(t)) for part in (path.alpha, path.sigma))
        alpha_rate, sigma_rate = (float(jax.grad(part)(t)) for part in (path.alpha, path.sigma))
        change = alpha * alpha_rate * COVARIANCE + sigma * sigma_rate * np.eye(2)
        velocity = (
            alpha_rate * MEAN + np.linalg.solve(covariance, (np.asarray(x) - mean).T).T @ change
        )
        np.testing.assert_allclose(
            paths.velocity_of(path, denoise(x, t), x, t), velocity, rtol=1e-7, atol=1e-8
        )


# --- transitions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_kernels_one_after_another_are_the_marginal(name):
    path = ALL[name]()
    times = path.end + (path.start - path.end) * jnp.arange(1.0, 10.0) / 10
    alpha, variance = path.alpha(times[0]), path.sigma(times[0]) ** 2
    for s, t in itertools.pairwise(times):
        alpha_ts, sigma_ts = paths.kernel(path, s, t)
        np.testing.assert_allclose(alpha_ts, path.alpha(t) / path.alpha(s), rtol=1e-12)
        alpha, variance = alpha_ts * alpha, alpha_ts**2 * variance + sigma_ts**2
        np.testing.assert_allclose(alpha, path.alpha(t), rtol=1e-11)
        np.testing.assert_allclose(variance, path.sigma(t) ** 2, rtol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_the_posterior_is_bayes_rule(name):
    path = ALL[name]()
    x0, x_t = sample((4, 3)), sample((4, 3), 1)
    # apart by more than the steps of the path in discrete time
    for low, high in ((0.3, 0.5), (0.05, 0.9), (0.6, 0.72)):
        s, t = (path.end + (path.start - path.end) * jnp.asarray(at) for at in (low, high))
        alpha_ts, sigma_ts = (float(part) for part in paths.kernel(path, s, t))
        # q(x_s | x0) q(x_t | x_s): precisions add up
        prior, precision = 1 / float(path.sigma(s)) ** 2, (alpha_ts / sigma_ts) ** 2
        mean = (prior * path.alpha(s) * x0 + alpha_ts / sigma_ts**2 * x_t) / (prior + precision)
        found, std = paths.posterior(path, x0, x_t, s, t)
        np.testing.assert_allclose(found, mean, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(std, (prior + precision) ** -0.5, rtol=1e-10)


def test_the_posterior_at_the_ends_has_no_noise_and_no_nan():
    for path in (paths.conditional_ot(), paths.variance_preserving()):
        x0, x_t = sample((2, 3)), sample((2, 3), 1)
        mean, std = paths.posterior(path, x0, x_t, 0.0, 0.4)
        np.testing.assert_array_equal(mean, x0)
        assert float(std) == 0
        mean, std = paths.posterior(path, x0, x_t, 0.4, 1.0)  # pure noise says nothing of x_s
        np.testing.assert_allclose(mean, path.alpha(jnp.asarray(0.4)) * x0, rtol=1e-14)
        np.testing.assert_allclose(std, path.sigma(jnp.asarray(0.4)), rtol=1e-14)


@pytest.mark.slow
def test_neighbours_in_discrete_time_are_ddpm():
    """Ho 2020, equations 6 and 7, in the paper's own letters."""
    path = paths.discretize(paths.linear(), 10)
    x0, x_t, times = (
        sample((2, 3)),
        sample((2, 3), 1),
        path.end + (1 - path.end) * jnp.arange(11.0) / 10,
    )
    bar = np.asarray(path.alpha(times)) ** 2
    for i in range(2, 11):
        kept = bar[i] / bar[i - 1]
        beta = 1 - kept
        mean = (
            np.sqrt(bar[i - 1]) * beta / (1 - bar[i]) * x0
            + np.sqrt(kept) * (1 - bar[i - 1]) / (1 - bar[i]) * x_t
        )
        found, std = paths.posterior(path, x0, x_t, times[i - 1], times[i])
        np.testing.assert_allclose(found, mean, rtol=1e-10)
        np.testing.assert_allclose(std**2, (1 - bar[i - 1]) / (1 - bar[i]) * beta, rtol=1e-10)


def test_discrete_time_takes_the_nearest_of_its_steps():
    path = paths.edm(1.0, 9.0)
    discrete = paths.discretize(path, 4)  # 1, 3, 5, 7, 9
    times = jnp.asarray([1.0, 1.9, 2.1, 5.5, 8.2, 9.0])
    np.testing.assert_allclose(discrete.sigma(times), [1, 1, 3, 5, 9, 9], rtol=1e-14)
    np.testing.assert_allclose(
        discrete.time_of_log_snr(-2 * jnp.log(times)), [1, 1, 3, 5, 9, 9], rtol=1e-14
    )


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input():
    assert paths.prediction("v") is PREDICTIONS["v"]
    with pytest.raises(
        ConfigError, match=r"There is no prediction called 'epsilo'\. Did you mean epsilon\?"
    ):
        paths.prediction("epsilo")
    for n_steps in (0, -3):
        with pytest.raises(ConfigError, match=rf"n_steps must be at least 1; got {n_steps}\."):
            paths.discretize(paths.cosine(), n_steps)
