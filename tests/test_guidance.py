"""Guidance of Gaussian data, of which every score is known: what each wrapper claims, held in
float64 against closed forms.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from genjax.errors import ConfigError
from genjax.parts import paths, solvers
from genjax.parts.guidance import (
    autoguidance,
    classifier,
    classifier_free,
    guided,
    inpaint,
    interval,
    negative,
    product,
    rescale,
)

PATHS = {"cosine": paths.cosine(), "conditional_ot": paths.conditional_ot(), "edm": paths.edm()}
TIMES = {"cosine": (0.05, 0.5, 0.95), "conditional_ot": (0.05, 0.5, 0.95), "edm": (0.01, 1.0, 30.0)}
D = 3
every_path = pytest.mark.parametrize("name", PATHS)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def covariance(seed, size=1.0):
    a = normal(seed, D, D)
    return size * (a @ a.T / D + 0.3 * np.eye(D))


def gaussian(path, mean, cov):
    """E[x0 | x_t] for x0 ~ N(mean, cov): mean + alpha cov (alpha² cov + sigma² I)^-1 (x_t - alpha
    mean).
    """
    values, vectors = map(jnp.asarray, np.linalg.eigh(cov))

    def denoise(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        gain = alpha * values / (alpha**2 * values + sigma**2)
        return mean[None] + ((x - alpha * mean[None]) @ vectors * gain[None]) @ vectors.T

    return denoise


def noisy(path, t, mean, cov):
    """Mean and covariance of x_t for x0 ~ N(mean, cov)."""
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    return alpha * mean, alpha**2 * cov + sigma**2 * np.eye(D)


def power(path, t, parts):
    """Mean and precision of the normal that is proportional to the product of the noisy N(mean,
    cov)^weight.
    """
    of = [(*noisy(path, t, mean, cov), weight) for mean, cov, weight in parts]
    precision = sum(weight * np.linalg.inv(cov) for _, cov, weight in of)
    assert np.linalg.eigvalsh(precision).min() > 0  # it is a density
    return np.linalg.solve(
        precision, sum(weight * np.linalg.solve(cov, mean) for mean, cov, weight in of)
    ), precision


def assert_scores(name, make, all_weights, keys, rtol=1e-9):
    """For each of the weights, the score of the denoiser make(weights) is that of the product of
    powers, early and late.
    """
    path, x = PATHS[name], jnp.asarray(normal(9, 5, D))
    score = jax.jit(lambda x, t, weights: paths.score_of(path, make(weights)(x, t), x, t))
    for t, weights in itertools.product(map(jnp.asarray, TIMES[name]), all_weights):
        mean, precision = power(
            path, t, [(*PAIRS[key], weight) for key, weight in zip(keys, weights, strict=True)]
        )
        wanted = -(np.asarray(x) - mean) @ precision
        found = score(x, t, jnp.asarray(weights))
        # The score is a difference of two numbers of the size of x / sigma².
        np.testing.assert_allclose(
            found, wanted, rtol=0, atol=rtol * (np.abs(wanted).max() + 1 / path.sigma(t) ** 2)
        )


PAIRS = {  # the first is the unconditional one
    "wide": (normal(0, D), covariance(0, 3.0)),
    "narrow": (normal(1, D), covariance(0, 1.0)),
    "other": (normal(2, D), covariance(2)),
}


@pytest.fixture
def of(x64, name):
    """The denoisers of all Gaussians on the path."""
    return {key: gaussian(PATHS[name], *pair) for key, pair in PAIRS.items()}


# --- two denoisers --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        *((name, guided) for name in PATHS),
        ("conditional_ot", autoguidance),
        ("conditional_ot", negative),
    ],
)
def test_the_guided_score_of_gaussians_is_that_of_a_product_of_powers(of, name, wrapper):
    """(1-s) u + s c of x0 is the score of the normal proportional to p_t(x)^(1-s) p_t(x|c)^s."""
    all_weights = [(1 - scale, scale) for scale in (0.3, 1.0, 2.5)]
    assert_scores(
        name, lambda w: wrapper(of["narrow"], of["wide"], w[1]), all_weights, ("wide", "narrow")
    )


@pytest.mark.parametrize("wrapper", [guided, autoguidance, negative])
def test_scale_one_is_the_first_and_zero_the_second_denoiser_bit_for_bit(wrapper):
    c, u = (jnp.asarray(normal(seed, 4, D), jnp.float32) for seed in (0, 1))
    c, u = c.at[0, 0].set(-0.0), u.at[0, 1].set(jnp.inf).at[1, 0].set(jnp.nan)

    def run(scale):
        return wrapper(lambda x, t: c, lambda x, t: u, scale)(jnp.zeros((4, D)), jnp.asarray(0.5))

    for one, zero in ((1, 0), (1.0, 0.0), (jnp.asarray(1.0), jnp.asarray(0.0))):
        assert np.asarray(run(one)).tobytes() == np.asarray(c).tobytes()
        assert np.asarray(run(zero)).tobytes() == np.asarray(u).tobytes()
    scales = jnp.asarray([1.0, 0.0])
    both = jax.jit(jax.vmap(run))(scales)
    assert np.asarray(both).tobytes() == np.asarray(jnp.stack([c, u])).tobytes()


def test_a_scale_may_be_traced_in_another_precision_than_the_events(x64):
    x = jnp.asarray(normal(0, 4, D), jnp.float32)
    y = jax.jit(lambda s: guided(lambda x, t: x, lambda x, t: 2 * x, s)(x, jnp.asarray(0.5)))(
        jnp.asarray(3.0, jnp.float64)
    )
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, -x, rtol=1e-6)


# --- interval -------------------------------------------------------------------------------------


def test_an_interval_switches_at_its_ends_exactly(x64):
    path, low, high = PATHS["edm"], 0.3, 5.0
    both = interval(path, lambda x, t: x, lambda x, t: 2 * x, low, high)
    x, run = jnp.asarray(normal(0, 2, D)), jax.jit(both)
    for t, inside in (
        (low, True),
        (np.nextafter(low, 0), False),
        (high, True),
        (np.nextafter(high, 9), False),
        (1.0, True),
        (0.002, False),
        (80.0, False),
    ):
        np.testing.assert_array_equal(run(x, jnp.asarray(t)), x if inside else 2 * x)
    # sigma / alpha, not sigma: on a straight line it is 1 at t = 1/2 and infinite at the start.
    straight = jax.jit(
        interval(PATHS["conditional_ot"], lambda x, t: x, lambda x, t: 2 * x, 1.0, 3.0)
    )
    for t, inside in ((0.49, False), (0.5, True), (0.74, True), (0.76, False), (1.0, False)):
        np.testing.assert_array_equal(straight(x, jnp.asarray(t)), x if inside else 2 * x)


@pytest.mark.slow
def test_a_solver_that_guides_in_an_interval_is_a_loop_with_an_if(x64):
    path = PATHS["edm"]
    cond, plain = gaussian(path, *PAIRS["narrow"]), gaussian(path, *PAIRS["wide"])
    guide, times = guided(cond, plain, 2.0), solvers.GRIDS["karras"](path, 8)
    x = jnp.asarray(80.0 * normal(3, 4, D))
    found = jax.jit(
        lambda x: solvers.SOLVERS["ddim"](interval(path, guide, cond, 0.1, 4.0), path, x, times)
    )(x)
    inside = 0
    for t, s in itertools.pairwise(times):
        within = bool(0.1 <= t <= 4.0)
        x0, inside = (guide if within else cond)(x, t), inside + within
        x = x0 + s / t * (x - x0)
    assert 0 < inside < 8
    np.testing.assert_allclose(found, x, rtol=1e-10)


# --- classifiers and products ---------------------------------------------------------------------


@pytest.mark.slow
@every_path
def test_the_exact_classifier_at_scale_one_gives_the_conditional_denoiser(of, name):
    """Two classes, one Gaussian each: the denoiser of the mixture, guided by Bayes' rule, is that
    of the class.
    """
    path, share, classes = PATHS[name], (0.3, 0.7), ("narrow", "other")

    def log_posterior(x, t):
        joint = []
        for p, (mean, cov) in zip(share, (PAIRS[key] for key in classes), strict=True):
            values, vectors = map(jnp.asarray, np.linalg.eigh(cov))
            var = path.alpha(t) ** 2 * values + path.sigma(t) ** 2
            z = (x - path.alpha(t) * mean[None]) @ vectors
            joint.append(np.log(p) - 0.5 * jnp.sum(z**2 / var[None] + jnp.log(var)[None], axis=1))
        return jax.nn.log_softmax(jnp.stack(joint, axis=-1), axis=-1)

    def mixture(x, t):
        weights = jnp.exp(log_posterior(x, t))
        return weights[:, :1] * of[classes[0]](x, t) + weights[:, 1:] * of[classes[1]](x, t)

    @jax.jit
    def all_of(x, t):
        towards = [lambda x, t, index=index: log_posterior(x, t)[:, index] for index in (0, 1)]
        of_scale = [
            [classifier(mixture, path, f, scale)(x, t) for scale in (0.0, 1.0, 2.0)]
            for f in towards
        ]
        return of_scale, [of[key](x, t) for key in classes], mixture(x, t)

    for t in map(jnp.asarray, TIMES[name]):
        mean, cov = noisy(path, t, *PAIRS["narrow"])
        x = jnp.asarray(mean + normal(4, 6, D) @ np.linalg.cholesky(cov).T)  # where the density is
        found, wanted, plain = all_of(x, t)
        for (none, once, twice), conditional in zip(found, wanted, strict=True):
            scale = float(jnp.abs(conditional).max())
            np.testing.assert_allclose(once, conditional, rtol=0, atol=1e-9 * scale)
            np.testing.assert_allclose(none, plain, rtol=0, atol=1e-14 * scale)
            np.testing.assert_allclose(twice - plain, 2 * (once - plain), rtol=0, atol=1e-9 * scale)
        assert np.abs(wanted[0] - plain).max() > 1e-6


def test_at_pure_noise_a_classifier_adds_nothing():
    y = classifier(lambda x, t: x, PATHS["conditional_ot"], lambda x, t: x.sum(1), 3.0)(
        jnp.ones((2, D)), jnp.asarray(1.0)
    )
    np.testing.assert_array_equal(y, jnp.ones((2, D)))


@pytest.mark.slow
@every_path
def test_a_product_of_gaussian_experts_is_the_product_gaussian(of, name):
    path, experts = PATHS[name], [of["narrow"], of["other"]]
    assert_scores(
        name,
        lambda w: product(path, experts, w),
        [(1.0, 1.0), (1.0, 0.5)],
        ("narrow", "other"),
        1e-8,
    )

    def based(w):
        return product(path, experts, w[:2], of["wide"])

    assert_scores(name, based, [(1.0, 1.0, -1.0), (0.5, 1.0, -0.5)], ("narrow", "other", "wide"))
    x, t = jnp.asarray(normal(9, 5, D)), jnp.asarray(TIMES[name][1])
    one = product(path, experts[:1], (2.0,), of["wide"])(x, t)
    np.testing.assert_allclose(
        one, guided(of["narrow"], of["wide"], 2.0)(x, t), rtol=1e-9, atol=1e-12
    )


def test_products_need_one_weight_for_each_expert_and_are_finite_at_pure_noise():
    path, same = PATHS["conditional_ot"], lambda x, t: x
    for experts, weights in (([same], (1.0, 2.0)), ([], ()), ([same, same], jnp.ones(3))):
        with pytest.raises(ConfigError, match=rf"got {len(experts)} and {len(weights)}"):
            product(path, experts, weights)
    assert np.isfinite(
        product(path, [same, same], (1.0, 1.0))(jnp.ones((2, D)), jnp.asarray(1.0))
    ).all()


# --- inpainting -----------------------------------------------------------------------------------

LEFT = np.asarray([True, False])


def painted(rho, name, solver, n_steps=200):
    """A pair of standard normals with correlation rho, the first known to be 1.5: x as an affine
    function of the noise.
    """
    path = {"edm": paths.edm(0.0, 80.0)}.get(name) or paths.PATHS[name]()
    pair = gaussian(path, np.zeros(2), np.asarray([[1, rho], [rho, 1]]))
    denoise = inpaint(pair, jnp.asarray([1.5, 7.0]), LEFT)
    times = solvers.GRIDS["karras" if name == "edm" else "uniform"](path, n_steps)
    x = float(paths.prior(path)) * jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    y = np.asarray(jax.jit(lambda x: solvers.SOLVERS[solver](denoise, path, x, times))(x))
    return y[:, 0], y[0, 1], np.sum((y[1:, 1] - y[0, 1]) ** 2)


def replaced_mean(rho, start, known=1.5):
    """What the ODE with replaced pixels makes of the unknown one: with z = x / alpha and q = 1 +
    (sigma / alpha)²,

    dz/dq = (q z - rho (known + noise)) / (2 (q² - rho²)), solved by variation of constants from z =
    noise at q = ∞ to q = 1. A path that ends at sigma / alpha = `start` begins without the known
    value, so that its noise makes up for it there.
    """

    def share(q):
        return (1 - np.sqrt(q - 1) / start) * (q**2 - rho**2) ** -1.25

    integral = scipy.integrate.quad(
        share, 1, np.inf if start == np.inf else 1 + start**2, limit=500
    )[0]
    return 0.5 * rho * known * (1 - rho**2) ** 0.25 * integral


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solver"),
    [("conditional_ot", "heun"), ("edm", "heun"), ("variance_preserving", "ddim")],
)
def test_known_pixels_come_out_as_given_and_independent_ones_are_not_touched(x64, name, solver):
    known, mean, var = painted(0.0, name, solver)
    np.testing.assert_allclose(known, 1.5, atol=1e-12)
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(
        var, 1, atol=1e-3 if solver == "heun" else 2e-2
    )  # the solver's own error, of order 2 and 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conditional_ot", "variance_preserving", "edm"])
def test_the_bias_of_replacement_is_the_known_one(x64, name):
    """The law of the unknown given the known is N(rho known, 1 - rho²); the mean falls short by as
    much on every path.
    """
    for rho in (0.5, 0.9):
        _, mean, var = painted(rho, name, "heun")
        np.testing.assert_allclose(
            mean, replaced_mean(rho, 80.0 if name == "edm" else np.inf), rtol=3e-3
        )
        assert 0 < mean < rho * 1.5
        assert 1 - rho**2 < var < 1


@pytest.mark.slow
def test_langevin_steps_take_the_bias_of_replacement_away(x64):
    path, rho, n = paths.conditional_ot(), 0.5, 4_000
    denoise = inpaint(
        gaussian(path, np.zeros(2), np.asarray([[1, rho], [rho, 1]])), jnp.asarray([1.5, 0.0]), LEFT
    )
    times, x = solvers.GRIDS["uniform"](path, 40), jnp.asarray(normal(0, n, 2))
    gaps = []
    for n_steps in (0, 5, 60):
        ddim = solvers.SOLVERS["ddim"]
        run = solvers.corrected(ddim, n_steps) if n_steps else ddim
        y = np.asarray(
            jax.jit(lambda x, key, run=run: run(denoise, path, x, times, key))(x, jax.random.key(0))
        )
        np.testing.assert_allclose(y[:, 0], 1.5, atol=1e-12)
        gaps.append(rho * 1.5 - y[:, 1].mean())
    assert gaps[0] > 0.4
    assert gaps[1] < 0.7 * gaps[0]
    assert (
        abs(gaps[2]) < 0.2 * gaps[0]
    )  # what is left is the noise of the last step, 1 / 40, and that 60 steps are not all
    np.testing.assert_allclose(y[:, 1].var(), 1 - rho**2, atol=0.03)


def test_masks_and_known_values_may_be_of_one_event_or_of_all(x64):
    known, x, t = normal(0, 4, 2, 3), jnp.asarray(normal(1, 4, 2, 3)), jnp.asarray(0.5)
    mask = np.random.default_rng(0).random((4, 2, 3)) < 0.5

    def estimate(x, t):
        return 10 * x

    np.testing.assert_array_equal(
        inpaint(estimate, known, mask)(x, t), np.where(mask, known, 10 * x)
    )
    np.testing.assert_array_equal(
        inpaint(estimate, known, mask[0])(x, t), np.where(mask[:1], known, 10 * x)
    )
    np.testing.assert_array_equal(
        inpaint(estimate, known[0], mask)(x, t), np.where(mask, known[:1], 10 * x)
    )


@pytest.mark.parametrize("shape", [(3, 2), (3,), (2,), (5, 2, 3), (1, 2, 3), (2, 3, 1)])
def test_a_mask_of_another_shape_is_refused_with_both_shapes(shape):
    x, t = jnp.zeros((4, 2, 3)), jnp.asarray(0.5)
    text = rf"\[2, 3\], or of all, \[4, 2, 3\]; got \[{', '.join(map(str, shape))}\]"
    with pytest.raises(ConfigError, match="mask .*" + text):
        inpaint(lambda x, t: x, x[0], np.zeros(shape, bool))(x, t)
    with pytest.raises(ConfigError, match="known values .*" + text):
        inpaint(lambda x, t: x, np.zeros(shape, np.float32), np.zeros((2, 3), bool))(x, t)


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ConfigError, match=r"bool.*float32"):
        inpaint(lambda x, t: x, jnp.zeros(3), jnp.ones(3))


# --- rescaling ------------------------------------------------------------------------------------


def test_rescaling_gives_the_standard_deviation_of_the_conditional(x64):
    c, g, t = (
        jnp.asarray(normal(0, 5, 4, 3)),
        jnp.asarray(1 + 3 * normal(1, 5, 4, 3)),
        jnp.asarray(0.5),
    )

    def of(phi):
        return np.asarray(rescale(lambda x, t: g, lambda x, t: c, phi)(g, t))

    def std(y):
        return np.asarray(y).reshape(5, -1).std(1)

    np.testing.assert_allclose(std(of(1.0)), std(c), rtol=1e-12)
    np.testing.assert_array_equal(of(0.0), g)
    np.testing.assert_allclose(std(of(0.25)), 0.25 * std(c) + 0.75 * std(g), rtol=1e-12)
    np.testing.assert_allclose(
        of(0.5), (of(0.0) + of(1.0)) / 2, rtol=1e-12
    )  # in between, and in the direction of g
    same = rescale(lambda x, t: jnp.ones_like(x), lambda x, t: c, 1.0)(g, t)
    np.testing.assert_array_equal(same, jnp.ones_like(g))  # nothing to stretch


@pytest.mark.parametrize("shape", [(D,), (1, D, 1)])
def test_a_scale_of_another_rank_is_refused(shape):
    """As many examples as entries: one number for each example was taken for one of each entry."""
    c = jnp.ones((D, D))
    assert classifier_free(c, 0 * c, jnp.ones((D, 1))).shape == (D, D)
    with pytest.raises(ConfigError, match=r"One for each example is scale\.reshape\(-1, 1\)"):
        jax.eval_shape(lambda scale: classifier_free(c, 0 * c, scale), jnp.ones(shape))


@pytest.mark.slow
def test_wrappers_compose_under_jit_and_vmap(x64):
    path = PATHS["cosine"]
    cond, plain = gaussian(path, *PAIRS["narrow"]), gaussian(path, *PAIRS["wide"])

    def run(scale, phi, x):
        guide = rescale(guided(cond, plain, scale), cond, phi)
        inner = interval(path, guide, cond, 0.2, 5.0)
        return solvers.SOLVERS["heun"](
            inpaint(inner, jnp.ones(D), np.asarray([True, False, False])), path, x, times
        )

    times, x = solvers.GRIDS["uniform"](path, 6), jnp.asarray(normal(3, 4, D))
    scales, shares = jnp.asarray([1.0, 3.0]), jnp.asarray([0.3, 0.7])
    many = jax.jit(jax.vmap(run, (0, 0, None)))(scales, shares, x)
    for index in range(2):
        np.testing.assert_allclose(
            many[index], jax.jit(run)(scales[index], shares[index], x), rtol=1e-9
        )
    assert np.abs(many[0] - many[1]).max() > 0.01
