"""Likelihoods, emissions and dequantisation: what they say against the functions they are made of,
and their samples against their law.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from statistics_checks import RARE, check_counts

from genjax.errors import ConfigError
from genjax.parts import likelihoods as lk
from genjax.parts.likelihoods import emission
from genjax.protocol import DataSpec

bounded = jax.jit(lk.bounded_log_scale)

# --- scales and likelihood records ----------------------------------------------------------------


def test_bounded_log_scale_has_a_floor_and_is_the_identity_far_above_it(x64):
    raw = np.array([-1e6, -100.0, -20.0, -7.0, -3.0, 0.0, 5.0, 30.0])
    got = np.asarray(bounded(jnp.asarray(raw)))
    np.testing.assert_allclose(got, -7 + np.logaddexp(0, raw + 7), rtol=1e-13)
    assert np.all(got >= -7)
    assert np.all(np.diff(got) >= 0)
    # raw + ln(1 + exp(-(raw - min))): the difference from raw is known, and is nothing 37 nats
    # above the floor.
    np.testing.assert_allclose(got[4:] - raw[4:], np.log1p(np.exp(-(raw[4:] + 7))), atol=1e-14)
    assert got[-1] == 30.0
    np.testing.assert_allclose(bounded(jnp.asarray(-50.0), -2.0), -2.0, atol=1e-15)
    slope = jax.vmap(jax.grad(bounded))(jnp.asarray(raw))
    np.testing.assert_allclose(slope, scipy.special.expit(raw + 7), rtol=1e-12)


SPECS = {
    "bernoulli": DataSpec((2, 3), "binary"),
    "gaussian": DataSpec((2, 3), "continuous"),
    "discretized_logistic": DataSpec((2, 3), "discrete", levels=5),
    "categorical": DataSpec((2, 3), "discrete", levels=5),
}
# Numbers that a decoder gives for each element: with a shared scale, and with one of its own.
N_OUTPUTS = {
    "bernoulli": (1, 1),
    "gaussian": (1, 2),
    "discretized_logistic": (1, 2),
    "categorical": (5, 5),
}


def test_every_likelihood_belongs_to_one_kind():
    named = [name for names in lk.LIKELIHOODS_OF_KIND.values() for name in names]
    assert sorted(named) == sorted(lk.LIKELIHOODS) == sorted(SPECS)
    for name, spec in SPECS.items():
        assert name in lk.LIKELIHOODS_OF_KIND[spec.kind]
        assert lk.likelihood_of(spec, name).n_outputs == N_OUTPUTS[name][0]
        assert lk.likelihood_of(spec, name, True).n_outputs == N_OUTPUTS[name][1]
    for spec in SPECS.values():  # the usual one
        usual = lk.LIKELIHOODS[lk.LIKELIHOODS_OF_KIND[spec.kind][0]](spec, False)
        found = lk.likelihood_of(spec)
        assert (found.n_outputs, found.scaled) == (usual.n_outputs, usual.scaled)


def test_likelihoods_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="whose likelihood is gaussian; got categorical"):
        lk.likelihood_of(SPECS["gaussian"], "categorical")
    with pytest.raises(ConfigError, match="words is tokens, which no likelihood of events is for"):
        lk.likelihood_of(DataSpec((3,), "tokens", levels=4, name="words"))


@pytest.mark.slow
@pytest.mark.parametrize("per_element", [False, True], ids=["shared", "element"])
@pytest.mark.parametrize("name", SPECS)
def test_likelihood_records_say_what_the_functions_say(x64, name, per_element):
    spec = SPECS[name]
    like = lk.LIKELIHOODS[name](spec, per_element)
    assert like.scaled == (name in ("gaussian", "discretized_logistic"))
    assert like.n_outputs == N_OUTPUTS[name][per_element]
    rng = np.random.default_rng(7)
    outputs = jnp.asarray(rng.normal(size=(4, 2, 3, like.n_outputs)))
    shared = -0.4
    mean = np.asarray(outputs[..., 0])
    log_scale = (
        -7 + np.logaddexp(0, np.asarray(outputs[..., 1]) + 7)
        if like.n_outputs == 2
        else np.full(mean.shape, shared)
    )
    if name == "gaussian":
        x = rng.normal(size=mean.shape)
        want, want_mean = scipy.stats.norm.logpdf(x, mean, np.exp(log_scale)), mean
    elif name == "bernoulli":
        x = rng.integers(0, 2, size=mean.shape).astype(np.float64)
        want, want_mean = (
            scipy.stats.bernoulli.logpmf(x, scipy.special.expit(mean)),
            scipy.special.expit(mean),
        )
    elif name == "categorical":
        x = rng.integers(0, 5, size=mean.shape).astype(np.float64)
        log_p = scipy.special.log_softmax(np.asarray(outputs), axis=-1)
        want = np.take_along_axis(log_p, x[..., None].astype(int), axis=-1)[..., 0]
        want_mean = (np.exp(log_p) * np.arange(5)).sum(-1)
    else:
        x = rng.integers(0, 5, size=mean.shape).astype(np.float64)
        cdf = scipy.stats.logistic(mean, np.exp(log_scale)).cdf
        y = x / 2 - 1
        want = np.log(np.where(x == 4, 1, cdf(y + 0.25)) - np.where(x == 0, 0, cdf(y - 0.25)))
        want_mean = np.clip((mean + 1) * 2, 0, 4)
    np.testing.assert_allclose(like.log_prob(jnp.asarray(x), outputs, shared), want, rtol=1e-10)
    np.testing.assert_allclose(like.mean(outputs, shared), want_mean, rtol=1e-12)
    # A different shared scale changes the answer exactly where the likelihood has a scale and the
    # decoder does not give it.
    changed = not np.allclose(like.log_prob(jnp.asarray(x), outputs, shared + 0.5), want)
    assert changed == (like.scaled and not per_element)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SPECS if name != "gaussian"])
@pytest.mark.parametrize("size", [0.5, 30.0])
def test_likelihoods_of_whole_numbers_sum_to_one(x64, name, size):
    spec = SPECS[name]
    like, levels = lk.LIKELIHOODS[name](spec, True), (spec.top or 1) + 1
    outputs = size * np.random.default_rng(8).normal(size=(7, 1, like.n_outputs))
    x = jnp.broadcast_to(jnp.arange(float(levels)), (7, levels))
    log_p = like.log_prob(x, jnp.broadcast_to(outputs, (7, levels, like.n_outputs)), 0.0)
    assert log_p.shape == (7, levels)
    np.testing.assert_allclose(scipy.special.logsumexp(log_p, axis=1), 0.0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_likelihood_samples_have_their_law(name):
    like, n = lk.LIKELIHOODS[name](SPECS[name], True), 20_000
    outputs = jnp.array([0.3, -0.8, 1.0, -2.0, 0.0][: like.n_outputs])
    x = np.asarray(
        like.sample(jax.random.key(8), jnp.broadcast_to(outputs, (n, like.n_outputs)), 0.0)
    )
    assert x.shape == (n,)
    assert x.dtype == np.float32
    if name == "gaussian":
        log_scale = float(bounded(jnp.asarray(-0.8)))
        assert scipy.stats.kstest(x, scipy.stats.norm(0.3, math.exp(log_scale)).cdf).pvalue > RARE
    else:
        levels = SPECS[name].levels or 2
        log_p = like.log_prob(
            jnp.arange(float(levels)), jnp.broadcast_to(outputs, (levels, like.n_outputs)), 0.0
        )
        check_counts(np.bincount(x.astype(int), minlength=levels), np.exp(log_p))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("per_element", [False, True])
def test_what_goes_in_as_float64_or_float32_comes_out_as_it(x64, dtype, per_element):
    a = jnp.asarray([0.0, 1.0, 2.0], dtype)

    def everything(key, a):
        values = [lk.bounded_log_scale(a)]
        for name, spec in SPECS.items():
            like = lk.LIKELIHOODS[name](spec, per_element)
            outputs = jnp.zeros((3, like.n_outputs), dtype)
            drawn = like.sample(key, outputs, 0.0)
            values += [like.log_prob(a, outputs, 0.0), drawn, like.mean(outputs, 0.0)]
        return values

    found = jax.eval_shape(everything, jax.random.key(9), a)
    assert {value.dtype for value in found} == {jnp.dtype(dtype)}


# --- emissions ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "discrete", "binary", "continuous"])
def test_an_emission_is_a_distribution_that_samples_follow(kind, x64):
    """Discrete ones sum to 1 over all events and frequencies agree; a mixture of Gaussians has the
    moments of its parts.
    """
    shape = (1,) if kind == "tokens" else (1, 2)
    spec = DataSpec(shape, kind, levels=3 if kind in ("tokens", "discrete") else None, step="step")
    of = emission(spec, 2)
    outputs = jax.random.normal(jax.random.key(1), (of.n_outputs,), jnp.float64)
    n = 20_000
    x = jax.jit(of.sample)(jax.random.key(2), jnp.broadcast_to(outputs[None], (n, of.n_outputs)))
    assert x.shape == (n, *shape[1:])
    if kind == "continuous":
        weight = np.asarray(jax.nn.softmax(outputs[:2]))
        parts = np.asarray(outputs[2:]).reshape(2, 4)
        mean = weight @ parts[:, :2]
        sd = np.sqrt(weight @ (np.exp(2 * parts[:, 2:]) + parts[:, :2] ** 2) - mean**2)
        # The floor of the log-scale is at -7 and moves values near 0 by e^-7.
        assert (np.abs(np.asarray(x).mean(0) - mean) < 4 * sd / np.sqrt(n) + 1e-3).all()
        line = np.linspace(-12, 12, 401)
        grid = jnp.asarray(np.stack(np.meshgrid(line, line), -1).reshape(-1, 2))
        density = of.log_prob(grid, jnp.broadcast_to(outputs[None], (len(grid), of.n_outputs)))
        np.testing.assert_allclose(np.exp(density).sum() * (line[1] - line[0]) ** 2, 1, atol=1e-6)
        return
    values = {
        "tokens": [(v,) for v in range(3)],
        "discrete": np.ndindex(3, 3),
        "binary": np.ndindex(2, 2),
    }[kind]
    events = np.asarray(list(values), spec.dtype).reshape(-1, *shape[1:])
    events = events if kind == "tokens" else events.astype(np.float64)
    probability = np.exp(
        of.log_prob(
            jnp.asarray(events), jnp.broadcast_to(outputs[None], (len(events), of.n_outputs))
        )
    )
    np.testing.assert_allclose(probability.sum(), 1, rtol=1e-12)
    same = np.asarray(x)[:, None] == events[None]
    found = same.all(axis=tuple(range(2, same.ndim))).mean(0)
    assert (np.abs(found - probability) < 4 * np.sqrt(probability * (1 - probability) / n)).all()


# --- densities of discrete data -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "levels"), [("binary", None), ("discrete", 5)])
def test_levels_of_dequantised_values_tile_the_normalised_scale(x64, kind, levels):
    spec = DataSpec((2,), kind, levels=levels)
    x = jnp.broadcast_to(jnp.arange(float(levels or 2))[:, None], (levels or 2, 2))
    y = np.asarray(
        jax.vmap(lambda key: lk.dequantize(spec, x, key))(jax.random.split(jax.random.key(0), 500))
    )
    width = 2 / ((levels or 2) - 1)
    assert spec.log_volume == pytest.approx(2 * math.log(width))
    centre = np.asarray(spec.normalize(x))
    assert np.all(np.abs(y - centre) <= width / 2)
    assert np.abs(y - centre).max() > 0.49 * width
    # Of a density that is uniform over all levels, each has its share.
    span = (levels or 2) * width
    bound = lk.dequantized_bound(
        spec, lambda y: jnp.full(y.shape[:1], -2 * math.log(span)), x, jax.random.key(1)
    )
    np.testing.assert_allclose(bound, -2 * math.log(levels or 2), rtol=1e-12)


def test_continuous_values_are_not_dequantised():
    spec, x = DataSpec((2,), "continuous"), jnp.ones((3, 2))
    np.testing.assert_array_equal(lk.dequantize(spec, x, jax.random.key(0)), x)
    assert spec.log_volume == 0
