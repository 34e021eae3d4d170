"""Every log-probability against scipy or a direct formula, and every sampler against its law."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from statistics_checks import RARE, check_counts

from genjax.parts import distributions as ds

STATIC = {"sum_event": ["event_ndim"], "log_mean_exp": ["axis"]}
STATIC |= {f"discretized_logistic_{what}": ["levels"] for what in ("log_prob", "sample")}
# Under jit, as they are used; and op by op each operation would be compiled on its own.
jitted = SimpleNamespace(
    **{
        name: jax.jit(getattr(ds, name), static_argnames=STATIC.get(name, ()))
        for name in (
            "sum_event",
            "log_mean_exp",
            "normal_log_prob",
            "normal_sample",
            "normal_kl",
            "softplus",
            "bernoulli_log_prob",
            "bernoulli_sample",
            "categorical_log_prob",
            "discretized_logistic_log_prob",
            "discretized_logistic_sample",
        )
    }
)
LEVELS = (2, 17, 256)


def grid(*axes):
    """Every combination of some values, as float64 columns."""
    return [
        column.ravel()
        for column in np.meshgrid(*[np.asarray(axis, np.float64) for axis in axes], indexing="ij")
    ]


# --- helpers of the rest --------------------------------------------------------------------------


def test_softplus_is_ln_one_plus_exp_with_the_logistic_function_as_derivative(x64):
    x = np.concatenate([np.linspace(-40, 40, 161), [-1e4, -745.2, 745.2, 1e4]])
    np.testing.assert_allclose(jitted.softplus(jnp.asarray(x)), np.logaddexp(0, x), rtol=1e-15)
    sigmoid = scipy.special.expit(x)
    slope = jax.vmap(jax.grad(jitted.softplus))(jnp.asarray(x))
    np.testing.assert_allclose(slope, sigmoid, rtol=1e-14)
    curvature = jax.vmap(jax.grad(jax.grad(jitted.softplus)))(jnp.asarray(x))
    np.testing.assert_allclose(curvature, sigmoid * (1 - sigmoid), atol=1e-15)
    assert np.asarray(jitted.softplus(jnp.asarray([-np.inf, np.inf]))).tolist() == [0, np.inf]


def test_sum_event_sums_the_last_axes_only(x64):
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    np.testing.assert_allclose(jitted.sum_event(jnp.asarray(values)), values.sum(-1), rtol=1e-13)
    np.testing.assert_allclose(
        jitted.sum_event(jnp.asarray(values), 3), values.sum((1, 2, 3)), rtol=1e-13
    )
    np.testing.assert_array_equal(jitted.sum_event(jnp.asarray(values), 0), values)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_log_mean_exp_is_the_log_of_the_mean(x64, axis):
    values = np.random.default_rng(0).normal(size=(3, 4, 5))
    want = np.log(np.mean(np.exp(values), axis=axis))
    np.testing.assert_allclose(
        jitted.log_mean_exp(jnp.asarray(values), axis=axis), want, rtol=1e-12
    )
    # The same at a distance where exp alone is infinite or 0.
    for shift in (-1e4, 1e4):
        np.testing.assert_allclose(
            jitted.log_mean_exp(jnp.asarray(values + shift), axis=axis), want + shift, rtol=1e-12
        )


def test_log_mean_exp_of_equal_values_is_the_value_and_of_minus_infinity_too():
    assert float(jitted.log_mean_exp(jnp.full((7,), -3.25))) == pytest.approx(-3.25, abs=1e-6)
    assert float(jitted.log_mean_exp(jnp.full((7,), -jnp.inf))) == -math.inf
    assert float(jitted.log_mean_exp(jnp.array([0.0, -jnp.inf]))) == pytest.approx(
        -math.log(2), abs=1e-6
    )


# --- normal ---------------------------------------------------------------------------------------


def test_normal_log_prob_is_scipys(x64):
    x, mean, log_scale = grid(
        [-30.0, -1.0, 0.0, 0.3, 5.0], [-2.0, 0.0, 4.0], [-7.0, -1.0, 0.0, 3.0]
    )
    want = scipy.stats.norm.logpdf(x, mean, np.exp(log_scale))
    np.testing.assert_allclose(
        jitted.normal_log_prob(*map(jnp.asarray, (x, mean, log_scale))), want, rtol=1e-12
    )
    np.testing.assert_allclose(
        jitted.normal_log_prob(jnp.asarray(x), 0.0, 0.0), scipy.stats.norm.logpdf(x), rtol=1e-12
    )


def test_normal_sample_has_the_law_and_the_reparametrised_gradient(x64):
    mean, log_scale = jnp.full((20_000,), 1.5), jnp.full((20_000,), -0.7)
    z = jitted.normal_sample(jax.random.key(0), mean, log_scale)
    assert scipy.stats.kstest(np.asarray(z), scipy.stats.norm(1.5, np.exp(-0.7)).cdf).pvalue > RARE
    # z = mean + s eps, so dz/dmean = 1 and dz/dlog_scale = z - mean, element by element.
    by_mean, by_log_scale = jax.grad(
        lambda m, s: jnp.sum(jitted.normal_sample(jax.random.key(0), m, s)), (0, 1)
    )(mean, log_scale)
    np.testing.assert_allclose(by_mean, 1.0)
    np.testing.assert_allclose(by_log_scale, z - mean, rtol=1e-12, atol=1e-15)


def test_normal_kl_is_the_integral_of_its_definition(x64):
    for m, s, m2, s2 in [
        (0.0, 0.0, 0.0, 0.0),
        (1.0, -1.0, 0.0, 0.0),
        (-0.5, 0.7, 2.0, 0.2),
        (3.0, 0.0, -1.0, -0.5),
    ]:
        p, q = scipy.stats.norm(m, np.exp(s)), scipy.stats.norm(m2, np.exp(s2))
        want, _ = scipy.integrate.quad(
            lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)),
            *p.interval(1 - 1e-15),
            epsabs=1e-12,
            epsrel=1e-12,
        )
        got = jitted.normal_kl(*map(jnp.asarray, (m, s, m2, s2)))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_normal_kl_equals_the_monte_carlo_kl(x64):
    mean, log_scale, mean_2, log_scale_2 = map(
        jnp.asarray, ([0.5, -1.0], [-1.0, 0.3], [0.0, 0.5], [0.0, 0.6])
    )
    n = 40_000
    z = jitted.normal_sample(
        jax.random.key(1), jnp.broadcast_to(mean, (n, 2)), jnp.broadcast_to(log_scale, (n, 2))
    )
    p = jitted.normal_log_prob(z, mean[None], log_scale[None])
    for closed, q in [
        (jitted.normal_kl(mean, log_scale), jitted.normal_log_prob(z, 0.0, 0.0)),
        (
            jitted.normal_kl(mean, log_scale, mean_2, log_scale_2),
            jitted.normal_log_prob(z, mean_2[None], log_scale_2[None]),
        ),
    ]:
        ratio = np.asarray(p - q)
        assert np.all(np.abs(ratio.mean(0) - closed) < 4 * ratio.std(0, ddof=1) / math.sqrt(n))


def test_normal_kl_of_identical_distributions_is_zero_and_of_others_positive(x64):
    mean, log_scale = map(jnp.asarray, grid([-3.0, 0.0, 0.1, 8.0], [-7.0, 0.0, 2.0]))
    np.testing.assert_allclose(jitted.normal_kl(mean, log_scale, mean, log_scale), 0.0, atol=1e-14)
    assert float(jitted.normal_kl(jnp.zeros(()), jnp.zeros(()))) == 0.0
    assert np.all(jitted.normal_kl(mean, log_scale, mean + 1e-3, log_scale) > 0)
    assert np.all(jitted.normal_kl(mean, log_scale, mean, log_scale + 1e-3) > 0)


# --- Bernoulli and categorical --------------------------------------------------------------------


def test_bernoulli_log_prob_is_scipys(x64):
    x, logits = grid([0.0, 1.0], [-30.0, -2.0, 0.0, 0.1, 30.0])
    want = -np.logaddexp(0, np.where(x == 1, -logits, logits))
    # x logits and softplus(logits) are up to 30 and cancel, to rounding of numbers of that size.
    np.testing.assert_allclose(
        jitted.bernoulli_log_prob(jnp.asarray(x), jnp.asarray(logits)),
        want,
        rtol=1e-12,
        atol=30 * 2**-52,
    )
    small = np.abs(logits) < 5
    scipys = scipy.stats.bernoulli.logpmf(x[small], scipy.special.expit(logits[small]))
    np.testing.assert_allclose(want[small], scipys, rtol=1e-12)


@pytest.mark.parametrize("logit", [-1e4, -90.0, 90.0, 1e4])
def test_bernoulli_is_finite_at_extreme_logits_and_so_is_its_gradient(logit):
    x, logits = jnp.array([0.0, 1.0]), jnp.full((2,), logit)
    value = jitted.bernoulli_log_prob(x, logits)
    np.testing.assert_allclose(value, [-max(logit, 0.0), min(logit, 0.0)], rtol=1e-6, atol=1e-30)
    # d/dlogit = x - sigmoid(logit)
    slope = jax.grad(lambda a: jitted.bernoulli_log_prob(x, a).sum())(logits)
    np.testing.assert_allclose(slope, np.asarray(x) - float(logit > 0), atol=1e-30)


def test_bernoulli_sample_has_the_law():
    logits = jnp.array([-3.0, -0.2, 0.0, 1.5])
    n = 20_000
    x = np.asarray(jitted.bernoulli_sample(jax.random.key(2), jnp.broadcast_to(logits, (n, 4))))
    assert set(np.unique(x)) == {0.0, 1.0}
    assert x.dtype == np.float32
    p = scipy.special.expit(np.asarray(logits, np.float64))
    assert np.all(np.abs(x.mean(0) - p) < 4 * np.sqrt(p * (1 - p) / n))
    # Neighbours are independent.
    assert np.all(np.abs(np.corrcoef(x.T)[np.triu_indices(4, 1)]) < 4 / math.sqrt(n))


def test_categorical_log_prob_is_log_softmax_at_the_value(x64):
    logits = np.random.default_rng(3).normal(size=(2, 3, 5)) * 10
    x = np.random.default_rng(4).integers(0, 5, size=(2, 3))
    table = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    want = np.take_along_axis(table, x[..., None], axis=-1)[..., 0]
    for dtype in (jnp.int32, jnp.float64):  # discrete data are float, tokens are int
        got = jitted.categorical_log_prob(jnp.asarray(x, dtype), jnp.asarray(logits))
        assert got.shape == (2, 3)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    everything = jitted.categorical_log_prob(
        jnp.arange(5), jnp.broadcast_to(jnp.asarray(logits[0, 0]), (5, 5))
    )
    np.testing.assert_allclose(np.exp(everything).sum(), 1.0, rtol=1e-12)


# --- discretised logistic -------------------------------------------------------------------------

MEANS = (-40.0, -3.0, -1.01, -0.999, -0.3, 0.0, 0.123, 0.9, 1.0, 1.5, 40.0)
LOG_SCALES = (-7.0, -5.0, -3.0, -1.0, 0.0, 2.0, 6.0)


def all_levels(levels, means=MEANS, log_scales=LOG_SCALES, dtype=np.float64):
    """ln P of every level [levels] for every mean and log-scale: [n, levels], with its
    arguments.
    """
    mean, log_scale, x = (
        column.astype(dtype).reshape(-1, levels)
        for column in grid(means, log_scales, np.arange(levels))
    )
    value = jitted.discretized_logistic_log_prob(*map(jnp.asarray, (x, mean, log_scale)), levels)
    return np.asarray(value), x, mean, log_scale


@pytest.mark.parametrize("levels", LEVELS)
def test_discretized_logistic_sums_to_one(x64, levels):
    value, *_ = all_levels(levels)
    assert np.all(np.isfinite(value))
    assert np.all(value <= 0)
    np.testing.assert_allclose(scipy.special.logsumexp(value, axis=1), 0.0, atol=1e-12)


@pytest.mark.parametrize("levels", LEVELS)
def test_discretized_logistic_is_the_difference_of_cdfs_where_that_is_accurate(x64, levels):
    value, x, mean, log_scale = all_levels(levels)
    half = 1 / (levels - 1)
    y = 2 * x * half - 1
    cdf = scipy.stats.logistic(mean, np.exp(log_scale)).cdf
    upper = np.where(x == levels - 1, 1.0, cdf(y + half))
    lower = np.where(x == 0, 0.0, cdf(y - half))
    naive = upper - lower
    # It loses eps / naive; where that is below 1e-12 the two must agree to 1e-10.
    accurate = naive > 1e-3
    assert accurate.mean() > (0.05 if levels == 256 else 0.3)
    np.testing.assert_allclose(value[accurate], np.log(naive[accurate]), rtol=1e-10, atol=1e-11)


def test_discretized_logistic_keeps_its_digits_far_in_the_tail(x64):
    # Far below the location, sigma(a) = exp(a) to relative exp(a): ln P = a + ln(1 - exp(-w/s)),
    # where the naive form is ln 0.
    levels, mean, log_scale = 256, 5.0, -5.0
    x = np.arange(1.0, 255.0)
    width, scale = 2 / 255, math.exp(log_scale)
    upper = (x * width - 1 + width / 2 - mean) / scale
    want = upper + math.log(-math.expm1(-width / scale))
    got = jitted.discretized_logistic_log_prob(
        jnp.asarray(x), jnp.full(254, mean), jnp.full(254, log_scale), levels
    )
    assert np.all(want < -500)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("levels", LEVELS)
def test_discretized_logistic_is_finite_with_finite_gradients_in_float32(levels):
    # Sampled levels are enough for the gradients, and always hold both edges.
    mean, log_scale, x = grid(
        MEANS, LOG_SCALES, sorted({0, 1, levels // 2, levels - 2, levels - 1})
    )
    arguments = tuple(jnp.asarray(a, jnp.float32) for a in (x, mean, log_scale))

    def log_prob(x, m, s):
        return jitted.discretized_logistic_log_prob(x, m, s, levels)

    both = jax.jit(jax.vmap(jax.value_and_grad(log_prob, (1, 2))))
    value, slopes = jax.tree.map(np.asarray, both(*arguments))
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(slopes))
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(np.asarray(a), jnp.float64) for a in arguments)
        want, want_slopes = jax.tree.map(np.asarray, both(*wide))
    # The edges y +- w/2 - mean are rounded to eps (1 + |mean|) and then multiplied by 1/s: no
    # float32 code can do better.
    reach = (2 + np.abs(mean)) * np.exp(-log_scale)
    eps = np.finfo(np.float32).eps
    assert np.all(np.abs(value - want) < 8 * eps * (10 + reach))
    # The slope in the mean is of order 1/s, the one in log-scale of order reach, and each changes
    # by 1/s per unit of an edge.
    for got, exact, size in zip(slopes, want_slopes, (np.exp(-log_scale), 10 + reach), strict=True):
        assert np.all(np.abs(got - exact) < 8 * eps * (10 + reach) * (size + 10))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("mean", "log_scale"), [(0.1, -1.5), (-0.9, 0.0), (1.3, -0.5)])
def test_discretized_logistic_sample_has_the_law(levels, mean, log_scale):
    n = 20_000
    x = jitted.discretized_logistic_sample(
        jax.random.key(5), jnp.full((n,), mean), jnp.full((n,), log_scale), levels
    )
    assert x.dtype == jnp.float32
    x = np.asarray(x)
    assert np.all(x == np.round(x))
    assert x.min() >= 0
    assert x.max() <= levels - 1
    with jax.enable_x64(True):
        log_p = jitted.discretized_logistic_log_prob(
            jnp.arange(float(levels)), jnp.full(levels, mean), jnp.full(levels, log_scale), levels
        )
    check_counts(np.bincount(x.astype(int), minlength=levels), np.exp(log_p))


def test_discretized_logistic_sample_survives_extreme_scales():
    for log_scale in (-7.0, 20.0):
        x = jitted.discretized_logistic_sample(
            jax.random.key(6), jnp.zeros(1000), jnp.full((1000,), log_scale), 17
        )
        assert np.all(np.isfinite(x))
        # A tiny scale gives the level at the location, a huge one only the two edges (in equal
        # shares).
        assert set(np.unique(x)) == ({8.0} if log_scale < 0 else {0.0, 16.0})
        if log_scale > 0:
            assert abs(np.mean(np.asarray(x) == 0) - 0.5) < 4 * math.sqrt(0.25 / 1000)


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_goes_in_as_float64_or_float32_comes_out_as_it(x64, dtype):
    a = jnp.asarray([0.0, 1.0, 2.0], dtype)

    def everything(key, a):
        return [
            ds.normal_log_prob(a, a, a),
            ds.normal_kl(a, a),
            ds.normal_sample(key, a, a),
            ds.bernoulli_log_prob(a, a),
            ds.bernoulli_sample(key, a),
            ds.categorical_log_prob(jnp.asarray(1), a),
            ds.discretized_logistic_log_prob(a, a, a, 3),
            ds.discretized_logistic_sample(key, a, a, 3),
            ds.log_mean_exp(a),
        ]

    found = jax.eval_shape(everything, jax.random.key(9), a)
    assert {value.dtype for value in found} == {jnp.dtype(dtype)}
