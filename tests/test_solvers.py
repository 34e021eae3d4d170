"""Solvers against normal data, whose probability-flow ODE has a solution in closed form; grids,
corrector, likelihood.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from path_oracles import COVARIANCE, MEAN, TURN, VARIANCES, denoise_of, flow, jit, marginal

from genjax.errors import ConfigError
from genjax.parts import paths, solvers
from genjax.parts.paths import PATHS
from genjax.parts.solvers import GRIDS, SOLVERS

pytestmark = pytest.mark.usefixtures("x64")

STOCHASTIC = {"ancestral"}
DETERMINISTIC = sorted(set(SOLVERS) - STOCHASTIC)
ALL = PATHS | {
    "log_snr": lambda: paths.from_log_snr(lambda t: -13.3 + 18.3 * (0.3 * t + 0.7 * t**3))
}


def sample(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


# --- solvers --------------------------------------------------------------------------------------

ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "midpoint": 2, "dpmpp_2m": 2, "rk4": 4}


def test_every_fixed_deterministic_solver_has_an_order():
    assert set(ORDERS) | {"adaptive"} == set(DETERMINISTIC)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path_name", "ends", "order"),
    [
        *((name, "cosine", (0.85, 0.15), order) for name, order in ORDERS.items()),
        # all the way from alpha = 0 to sigma = 0, where a step of another kind takes over
        *(
            (name, "conditional_ot", (1.0, 0.0), ORDERS[name])
            for name in ("ddim", "euler", "heun", "rk4")
        ),
        ("midpoint", "variance_preserving", (1.0, 0.0), 2),
        # dx/dt = a (x - m) with a = V' / 2V, and where V is quadratic in t the midpoint rule's
        # leading error, a'' / 24 + a a' / 4 + a³ / 6, is exactly zero: one order more, on straight
        # lines and on EDM's path
        ("midpoint", "conditional_ot", (1.0, 0.0), 3),
        ("midpoint", "edm", (5.0, 0.2), 3),
        ("dpmpp_2m", "edm", (5.0, 0.2), 2),
    ],
)
def test_the_order_of_convergence_to_the_exact_solution(name, path_name, ends, order):
    path = PATHS[path_name]()
    x = sample((4, 2))
    exact = flow(path, x, *ends)
    counts = (48, 96, 192) if path_name == "edm" or name == "dpmpp_2m" else (24, 48, 96)

    def errors(x):
        runs = (
            SOLVERS[name](denoise_of(path), path, x, jnp.linspace(*ends, n + 1)) for n in counts
        )
        return [jnp.sqrt(jnp.mean((run - exact) ** 2)) for run in runs]

    found = np.array(jit(errors)(x))
    slope = np.polyfit(np.log(counts), np.log(found), 1)[0]
    assert abs(slope + order) < 0.15, (slope, found)


@pytest.mark.slow
@pytest.mark.parametrize("path_name", ["linear", "conditional_ot"])
def test_the_adaptive_solver_is_exact_to_its_tolerance_and_saves_where_it_is_told(path_name):
    path = PATHS[path_name]()
    x = sample((4, 2)) * paths.prior(path)
    times = GRIDS["cosine"](path, 5)

    def run(tolerance, every):
        return jit(
            lambda x: solvers.adaptive_to(tolerance)(denoise_of(path), path, x, times, every=every)
        )

    every = run(1e-8, True)(x)
    for got, t in zip(every, times, strict=True):
        np.testing.assert_allclose(got, flow(path, x, path.start, float(t)), rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(every[0], x)
    if path_name == "linear":
        np.testing.assert_allclose(run(1e-4, False)(x), every[-1], atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*DETERMINISTIC[1:], *STOCHASTIC, pytest.param("adaptive", marks=pytest.mark.slow)]
)
def test_every_keeps_all_of_the_way_and_a_last_time_without_noise_works(name):
    """`denoise` is never asked where sigma = 0: it would be NaN there. Here with images, float32,
    and an odd grid.
    """
    path = paths.conditional_ot()
    seen = jit(lambda t: path.sigma(t))

    def denoise(x, t):
        assert t.shape == ()
        return jnp.where(path.sigma(t) > 0, 0.3 * x + 0.1 * path.alpha(t), jnp.nan)

    x, key = sample((3, 2, 2, 1)).astype(jnp.float32), jax.random.key(3)
    times = jnp.asarray([1.0, 0.8, 0.3, 0.0])

    def run(every):
        return lambda x: SOLVERS[name](denoise, path, x, times, key, every=every)

    last, way = jit(lambda x: (run(False)(x), run(True)(x)))(x)
    assert (last.dtype, last.shape, way.shape) == (jnp.float32, x.shape, (4, *x.shape))
    assert np.all(np.isfinite(way))
    np.testing.assert_array_equal(way[0], x)
    np.testing.assert_allclose(way[-1], last, rtol=1e-5, atol=1e-6)
    assert float(seen(times[-1])) == 0
    for before, after in itertools.pairwise(np.asarray(way)):
        assert np.abs(before - after).max() > 1e-3
    # each example goes its own way, whatever is beside it (the adaptive step and the noise look at
    # the whole batch)
    if name not in STOCHASTIC | {"adaptive"}:
        np.testing.assert_allclose(jit(run(False))(x[::-1])[::-1], last, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_one_step_by_hand():
    """From t = 1 to 0.5 and on to 0 on straight lines, with a denoiser that one can do on paper."""
    path, x = paths.conditional_ot(), jnp.asarray([[2.0]])

    def denoise(x, t):
        return x * 0.5 * t

    def to(name, *times):
        return float(SOLVERS[name](denoise, path, x, jnp.asarray(times))[0, 0])

    def velocity(x, t):
        return (x - 0.5 * t * x) / t

    half = 2 - 0.5 * velocity(2, 1)
    assert to("euler", 1.0, 0.5) == pytest.approx(half)
    assert to("ddim", 1.0, 0.5) == pytest.approx(0.5 * 1 + 0.5 * 2)
    assert to("heun", 1.0, 0.5) == pytest.approx(2 - 0.25 * (velocity(2, 1) + velocity(half, 0.5)))
    middle = 2 - 0.25 * velocity(2, 1)
    assert to("midpoint", 1.0, 0.5) == pytest.approx(2 - 0.5 * velocity(middle, 0.75))
    # the step to sigma = 0: Heun's is Euler's, to x0
    before = to("heun", 1.0, 0.5)
    assert to("heun", 1.0, 0.5, 0.0) == pytest.approx(0.5 * 0.5 * before)
    # DPM-Solver++(2M) from 0.8 to 0.5 to 0.3: half log-SNRs ln(0.25), 0, ln(7/3)
    first = 0.4 * 2
    at_half = 0.5 * first + 0.5 * (2 - 0.2 * first) / 0.8
    plain = 0.25 * at_half
    x0 = plain + math.log(7 / 3) / (2 * math.log(4)) * (plain - first)
    assert to("dpmpp_2m", 0.8, 0.5, 0.3) == pytest.approx(
        0.7 * x0 + 0.3 * (at_half - 0.5 * x0) / 0.5
    )

    # Kutta's classical step against the exact series of e^z, where the field is linear
    # velocity x
    def linear(x, t):
        return x - t * x

    stepped = solvers.rk4(linear, path, x, jnp.asarray([1.0, 0.6]))[0, 0]
    assert float(stepped) == pytest.approx(
        2 * sum((-0.4) ** k / math.factorial(k) for k in range(5))
    )


@pytest.mark.slow
def test_translations_take_one_step():
    """Noise tied to data by a translation, x0 = epsilon + c: straight lines that never cross, and
    any step is exact.
    """
    path, shift = paths.conditional_ot(), jnp.asarray([[3.0, -1.0]])

    def denoise(x, t):
        return x + t * shift

    x = sample((5, 2))
    for name in sorted(set(DETERMINISTIC) - {"adaptive"}):
        for times in ([1.0, 0.0], [1.0, 0.35, 0.0]):
            got = jit(lambda x: SOLVERS[name](denoise, path, x, jnp.asarray(times)))(x)
            np.testing.assert_allclose(got, x + shift, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.slow
def test_the_best_denoiser_of_finite_data_flows_to_the_data():
    """E[x0 | x_t] of K points is their softmax-weighted mean, and the ODE ends in one of them:
    which, is a matter of x.
    """
    points = jnp.asarray([[1.0, 1.0], [-1.0, 0.5], [0.2, -1.2]])
    path = paths.edm(0.002, 20.0)

    def denoise(x, t):
        square = jnp.sum((x[:, None] - points[None]) ** 2, axis=2)
        return jax.nn.softmax(-square / (2 * t**2)) @ points

    # Bayes by hand at one place
    x = jnp.asarray([[0.3, 0.4]])
    density = scipy.stats.norm(np.asarray(points), 0.7).pdf(np.asarray(x)).prod(1)
    np.testing.assert_allclose(
        denoise(x, jnp.asarray(0.7))[0], density @ points / density.sum(), rtol=1e-12
    )
    x = 20 * sample((300, 2))
    got = jit(lambda x: solvers.heun(denoise, path, x, GRIDS["karras"](path, 40)))(x)
    distance = np.linalg.norm(np.asarray(got)[:, None] - np.asarray(points)[None], axis=2)
    assert np.median(distance.min(1)) < 0.01
    assert np.mean(distance.min(1) < 0.02) > 0.97
    # each point draws its third: the flow keeps probabilities
    share = np.bincount(distance.argmin(1), minlength=3) / 300
    assert np.all(np.abs(share - 1 / 3) < 4 * math.sqrt(2 / 9 / 300))


def assert_normal(x, mean, covariance):
    """Mean and covariance of x [n, 2] within 4.5 standard errors of those of a normal law."""
    x, n = np.asarray(x), len(x)
    assert np.all(np.abs(x.mean(0) - mean) < 4.5 * np.sqrt(np.diag(covariance) / n))
    product = np.outer(np.diag(covariance), np.diag(covariance))
    assert np.all(np.abs(np.cov(x.T) - covariance) < 4.5 * np.sqrt((product + covariance**2) / n))


def ancestral_law(path, times):
    """Mean and variance, along the axes of Sigma, of ancestral sampling: a chain of affine steps
    with normal noise.
    """
    mean, variance = np.zeros(2), np.full(2, float(paths.prior(path)) ** 2)
    target = MEAN @ TURN
    levels = zip(np.asarray(path.alpha(times)), np.asarray(path.sigma(times)), strict=True)
    for (alpha, sigma), (alpha_s, sigma_s) in itertools.pairwise(levels):
        gain = alpha * VARIANCES / (alpha**2 * VARIANCES + sigma**2)
        lost = 1 - (alpha * sigma_s / (sigma * alpha_s)) ** 2
        factor = alpha / alpha_s * (sigma_s / sigma) ** 2 + alpha_s * lost * gain
        mean = factor * mean + alpha_s * lost * (target - gain * alpha * target)
        variance = factor**2 * variance + sigma_s**2 * lost
    return TURN @ mean, TURN @ np.diag(variance) @ TURN.T


@pytest.mark.slow
def test_ancestral_sampling_has_the_law_that_its_chain_must_have_and_tends_to_that_of_the_data():
    path = paths.linear()
    errors = []
    for n in (25, 100, 400):
        times = GRIDS["uniform"](path, n)
        covariance = ancestral_law(path, times)[1]
        errors.append(np.abs(covariance - COVARIANCE).max())
    slope = np.polyfit(np.log([25, 100, 400]), np.log(errors), 1)[0]
    assert abs(slope + 1) < 0.15, (slope, errors)
    times = GRIDS["log_snr"](path, 100)
    law = ancestral_law(path, times)
    x = sample((20_000, 2), 4) * paths.prior(path)
    got = jit(lambda x: solvers.ancestral(denoise_of(path), path, x, times, jax.random.key(5)))(x)
    assert_normal(got, *law)


# --- Langevin corrector ---------------------------------------------------------------------------


def langevin_law(path, t, snr):
    """The stationary covariance of the corrector at t, v / (1 - eta / (2 v)) along each axis."""
    eta = 2 * (snr * float(path.sigma(jnp.asarray(t)))) ** 2
    variance = np.diag(TURN.T @ marginal(path, t)[1] @ TURN)
    return TURN @ np.diag(variance / (1 - eta / (2 * variance))) @ TURN.T


@pytest.mark.slow
def test_langevin_steps_keep_their_known_normal_and_pull_a_wrong_start_to_it():
    path, t, n, snr = paths.cosine(), 0.6, 20_000, 0.4
    mean, exact = marginal(path, t)
    biased = langevin_law(path, t, snr)
    assert np.abs(biased - exact).max() > 0.02  # the bias is more than what the test can miss

    def run(steps):
        return jit(
            lambda x: solvers.langevin(path, steps, snr)(
                denoise_of(path), x, jnp.asarray(t), jax.random.key(6)
            )
        )

    invariant = jnp.asarray(mean + np.asarray(sample((n, 2), 7)) @ np.linalg.cholesky(biased).T)
    assert_normal(run(1)(invariant), mean, biased)
    assert_normal(run(40)(jnp.full((n, 2), 2.5)), mean, biased)
    # what is the law to the eye of one step is also the formula: mean after k steps is contracted k
    # times
    eta = 2 * (snr * float(path.sigma(jnp.asarray(t)))) ** 2
    contraction = np.eye(2) - eta * np.linalg.inv(exact)
    after = np.asarray(run(3)(jnp.full((n, 2), 2.5))).mean(0)
    expected = mean + np.linalg.matrix_power(contraction, 3) @ (2.5 - mean)
    np.testing.assert_allclose(after, expected, atol=4.5 * math.sqrt(3 * 2 * eta / n))


@pytest.mark.slow
def test_a_corrected_solver_makes_good_for_steps_that_are_too_long():
    """Four steps of DDIM are far off at the third; corrected, the law there is the corrector's own,
    with its known bias.
    """
    path, n, snr = paths.cosine(), 20_000, 0.5
    times = GRIDS["uniform"](path, 4)
    solver = solvers.corrected(solvers.ddim, n_steps=40, snr=snr)
    x = sample((n, 2), 8) * paths.prior(path)
    plain = jit(lambda x: solvers.ddim(denoise_of(path), path, x, times, every=True))(x)
    way = jit(lambda x: solver(denoise_of(path), path, x, times, jax.random.key(9), every=True))(x)
    assert way.shape == (5, n, 2)
    mean, exact = marginal(path, times[3])
    assert_normal(way[3], mean, langevin_law(path, times[3], snr))
    assert np.abs(np.cov(np.asarray(plain[3]).T) - exact).max() > 0.1


def test_a_corrector_leaves_what_has_no_noise_alone():
    path = paths.conditional_ot()
    x = sample((3, 2))
    at_data = jit(lambda x: solvers.langevin(path)(denoise_of(path), x, 0.0, jax.random.key(0)))
    np.testing.assert_array_equal(at_data(x), x)
    solver, times = solvers.corrected(solvers.heun), jnp.asarray([1.0, 0.5, 0.0])
    got = jit(lambda x: solver(denoise_of(path), path, x, times, jax.random.key(1)))(x)
    assert np.all(np.isfinite(got))


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_grids_go_down_from_start_to_end_evenly_in_what_they_say(name):
    made = {path_name: make() for path_name, make in ALL.items()}
    grids = jit(
        lambda: {of: {n: GRIDS[name](path, n) for n in (1, 2, 9)} for of, path in made.items()}
    )()
    ratios = jit(
        lambda g: {of: jnp.exp(-paths.log_snr(path, g[of][9]) / 2) for of, path in made.items()}
    )(grids)
    for of, path in made.items():
        for n_steps, times in grids[of].items():
            assert times.shape == (n_steps + 1,)
            assert (times[0], times[-1]) == (path.start, path.end), of
            assert np.all(np.diff(times) < 0), (of, times)
        spaced = {"karras": lambda r: r ** (1 / 7), "cosine": np.arctan, "log_snr": np.log}.get(
            name
        )
        ratio = np.asarray(ratios[of])
        if of in (
            "conditional_ot",
            "variance_preserving",
        ):  # their ends are no noise levels to space
            ratio = ratio[1:-1]
        steps = np.diff(spaced(ratio) if spaced else grids[of][9])
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-6, err_msg=of)


@pytest.mark.slow
def test_the_grid_of_karras_is_the_papers():
    """Karras 2022, equation 5: n noise levels from 80 to 0.002, and then 0."""
    n, i = 18, np.arange(18)
    paper = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(GRIDS["karras"](paths.edm(sigma_min=0.0), n), [*paper, 0], rtol=1e-9)
    np.testing.assert_allclose(GRIDS["karras"](paths.edm(), n - 1), paper, rtol=1e-9)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input():
    path, x = paths.cosine(), sample((2, 2))
    times, denoise = GRIDS["uniform"](path, 2), denoise_of(path)
    for name, n_steps in itertools.product(GRIDS, (0, -1)):
        with pytest.raises(ConfigError, match=rf"n_steps must be at least 1; got {n_steps}\."):
            GRIDS[name](path, n_steps)
    with pytest.raises(ConfigError, match=r"n_steps must be at least 1; got 0\."):
        solvers.langevin(path, 0)
    with pytest.raises(ConfigError, match=r"The ancestral solver draws noise and needs a key"):
        solvers.ancestral(denoise, path, x, times)
    with pytest.raises(ConfigError, match=r"A corrected solver draws noise and needs a key"):
        solvers.corrected(solvers.heun)(denoise, path, x, times)
