"""Sequences of known likelihood and entropy, against enumeration, joint Gaussians, and their own
samples.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_checks import assert_same, assert_uniform
from gates import quick
from scipy.stats import multivariate_normal

from genjax import data
from genjax.checks import check_batch
from genjax.data import processes
from genjax.errors import ConfigError
from genjax.protocol import DataSpec

NAMES = ("markov", "hmm", "lgssm")
markov_log_prob, hmm_log_likelihood = (
    quick(processes.markov_log_prob),
    quick(processes.hmm_log_likelihood),
)
kalman_log_likelihood, rts_smoother = (
    quick(processes.kalman_log_likelihood),
    quick(processes.rts_smoother),
)


def all_sequences(n_symbols, length):
    return np.array(list(itertools.product(range(n_symbols), repeat=length)))


@pytest.mark.parametrize("name", NAMES)
def test_sources(name):
    source = data.open_source(name, length=5, n_train=300)
    shape, kind = ((5, 2), "continuous") if name == "lgssm" else ((5,), "tokens")
    step = "step" if name == "lgssm" else "token"
    assert source.spec == DataSpec(
        shape, kind, levels=4 if kind == "tokens" else None, step=step, name=name
    )
    splits = source.load()
    assert [batch.x.shape for batch in splits] == [(300, *shape), (2000, *shape), (2000, *shape)]
    check_batch(source.spec, source.prepare(jax.random.key(0), splits.test))
    # n_train changes the training set only, and the splits are not each other's copies.
    again = data.open_source(name, length=5, n_train=301).load()
    assert_same(splits[1:], again[1:])
    assert (splits.valid.x != splits.test.x).any()
    assert (splits.valid.x[:300] != splits.train.x).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_entropy_is_the_mean_code_length(name, x64):
    source = data.open_source(name)
    splits = source.load()
    for batch in (splits.train, splits.test):
        nats = -np.asarray(jax.jit(source.log_prob)(source.prepare(jax.random.key(0), batch).x))
        assert nats.shape == (len(batch.x),)
        assert abs(nats.mean() - source.entropy) < 3 * nats.std() / math.sqrt(len(nats))


def test_log_prob_is_dtype_generic(x64):
    for name in NAMES:
        source = data.open_source(name, length=4)
        x, log_prob = source.load().test.x[:3], quick(source.log_prob)
        single, double = (
            log_prob(x),
            log_prob(x.astype(np.float64)),
        )  # tokens, too, may come as real numbers
        assert (single.dtype, double.dtype) == (
            jnp.float32 if name == "lgssm" else jnp.float64,
            jnp.float64,
        )
        np.testing.assert_allclose(single, double, rtol=1e-5)


# --- tokens -------------------------------------------------------------------------------------


def test_markov_parameters_are_fixed():
    # A checkpoint's figures hang on them: they must not change from one version to the next.
    initial, transition = processes.markov_parameters()
    np.testing.assert_allclose(transition[0], MARKOV_ROW, rtol=1e-12)
    assert processes.markov_entropy_rate(transition) == pytest.approx(MARKOV_RATE, rel=1e-12)
    np.testing.assert_allclose(initial @ transition, initial, atol=1e-15)
    assert (
        processes._entropy(initial) > processes.markov_entropy_rate(transition) + 0.1
    )  # the past matters


MARKOV_ROW = [0.7309698462785986, 0.22682578656334199, 0.030181479293280203, 0.012022887864779185]
MARKOV_RATE = 0.9482711036812557


def test_entropy_rates_in_closed_form():
    flip = np.array([[0.7, 0.3], [0.3, 0.7]])
    np.testing.assert_allclose(processes.stationary(flip), [0.5, 0.5], atol=1e-15)
    assert processes.markov_entropy_rate(flip) == pytest.approx(
        -0.7 * math.log(0.7) - 0.3 * math.log(0.3), rel=1e-14
    )
    cycle = np.roll(np.eye(3), 1, axis=1)  # deterministic, with zeros
    assert processes.markov_entropy_rate(cycle) == 0.0
    np.testing.assert_allclose(processes.stationary(cycle), np.full(3, 1 / 3), atol=1e-15)


def test_markov_by_enumeration(x64):
    source = data.markov(n_symbols=3, length=5)
    log_p = np.asarray(quick(source.log_prob)(all_sequences(3, 5)))
    p = np.exp(log_p)
    assert p.sum() == pytest.approx(1, abs=1e-13)
    assert source.entropy == pytest.approx(-(p * log_p).sum(), abs=1e-12)


def test_markov_draws_follow_the_chain():
    source = data.markov(length=8, n_train=40_000)
    initial, transition = processes.markov_parameters()
    x = source.load().train.x
    assert_uniform(
        np.bincount(x[:, -1], minlength=4), len(x) * initial
    )  # still stationary at the end
    pairs = np.bincount(4 * x[:, 3].astype(int) + x[:, 4], minlength=16)
    assert_uniform(pairs, len(x) * (initial[:, None] * transition).ravel())
    triples = np.bincount(16 * x[:, 0].astype(int) + 4 * x[:, 1] + x[:, 2], minlength=64)
    assert_uniform(
        triples,
        len(x) * (initial[:, None, None] * transition[:, :, None] * transition[None]).ravel(),
    )


def brute_force_hmm(x, initial, transition, emission):
    """The sum over all paths of the states, for one sequence."""
    total = 0.0
    for z in itertools.product(range(len(initial)), repeat=len(x)):
        p = initial[z[0]] * emission[z[0], x[0]]
        for t in range(1, len(x)):
            p *= transition[z[t - 1], z[t]] * emission[z[t], x[t]]
        total += p
    return total


def test_hmm_likelihood_by_enumeration(x64):
    parameters = processes.hmm_parameters(n_states=3, n_symbols=2)
    x = all_sequences(2, 5)
    log_p = np.asarray(hmm_log_likelihood(x, *parameters))
    np.testing.assert_allclose(
        np.exp(log_p), [brute_force_hmm(one, *parameters) for one in x], rtol=1e-12
    )
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-13)
    np.testing.assert_allclose(
        hmm_log_likelihood(x[-1:, :1], *parameters), [math.log(parameters[0] @ parameters[2][:, 1])]
    )


def test_hmm_likelihood_with_zeros(x64):
    # Symbol 2 is never emitted; the states are seen through symbols 0 and 1, so this is a Markov
    # chain.
    _, transition = processes.markov_parameters(2)
    initial, emission = processes.stationary(transition), np.eye(2, 3)
    x = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 2, 0, 0]])
    found = np.asarray(hmm_log_likelihood(x, initial, transition, emission))
    np.testing.assert_allclose(found[:2], markov_log_prob(x[:2], initial, transition), rtol=1e-13)
    assert found[2] == -np.inf


@pytest.mark.slow
def test_hmm_entropy(x64, monkeypatch):
    parameters = processes.hmm_parameters(n_states=3, n_symbols=2)
    log_p = np.asarray(hmm_log_likelihood(all_sequences(2, 12), *parameters))
    exact = -(np.exp(log_p) * log_p).sum()
    assert processes.hmm_entropy(*parameters, 12) == pytest.approx(
        (exact, exact), abs=1e-12
    )  # all are enumerated
    with monkeypatch.context() as patch:
        patch.setattr(processes, "_BLOCKS", 2**4)  # only 4 of the 12 symbols are
        low, high = processes.hmm_entropy(*parameters, 12)
    assert 1e-6 < high - low < 0.5
    assert low < exact < high
    source = data.hmm()
    assert "entropy known to ±" in source.description
    low, high = np.float64(processes.hmm_entropy(*processes.hmm_parameters(), 32))
    assert 0 < high - low < 5e-5
    assert low < source.entropy < high
    assert (
        processes.hmm_entropy(*processes.hmm_parameters(2, 2**17), 2)[0] > 0
    )  # even 2 symbols are too many to enumerate


def test_hmm_remembers():
    initial, _, emission = processes.hmm_parameters()
    assert (
        processes._entropy(initial @ emission) - data.hmm().entropy / 32 > 0.1
    )  # a model without memory falls short


def test_hmm_draws_follow_the_model(x64):
    source = data.hmm(length=3, n_train=40_000)
    x = source.load().train.x.astype(int)
    p = np.exp(np.asarray(quick(source.log_prob)(all_sequences(4, 3))))
    assert_uniform(np.bincount(x @ [16, 4, 1], minlength=64), len(x) * p)


# --- real vectors -------------------------------------------------------------------------------


def random_lgssm(k=3, d=2, seed=0):
    """Not stationary, and with full matrices everywhere."""
    rng = np.random.default_rng(seed)
    spread = [rng.standard_normal((size, size)) for size in (k, d, k)]
    Q, R, P0 = (a @ a.T + 0.1 * np.eye(len(a)) for a in spread)
    return processes.LinearGaussian(
        0.5 * rng.standard_normal((k, k)),
        rng.standard_normal((d, k)),
        Q,
        R,
        rng.standard_normal(k),
        P0,
    )


def joint(model, length):
    """Mean and covariance of (z_1..T, x_1..T), written as one linear map of independent noises."""
    A, C, Q, R, m0, P0 = model
    k = len(A)
    to_z = np.zeros((length, k, length, k))  # z_t = Σ_s A^{t-s} w_s
    for t in range(length):
        for s in range(t + 1):
            to_z[t, :, s] = np.linalg.matrix_power(A, t - s)
    to_z = to_z.reshape(length * k, length * k)
    noise = np.kron(np.eye(length), Q)
    noise[:k, :k] = P0
    mean = to_z @ np.concatenate([m0, np.zeros((length - 1) * k)])
    c = np.kron(np.eye(length), C)
    z = to_z @ noise @ to_z.T
    return mean, c @ mean, z, c @ z @ c.T + np.kron(np.eye(length), R), z @ c.T


@pytest.mark.parametrize("length", [1, 6])
def test_kalman_likelihood_is_that_of_the_joint_gaussian(length, x64):
    model = random_lgssm()
    _, mean, _, covariance, _ = joint(model, length)
    x = 3 * np.random.default_rng(1).standard_normal((5, length, 2))
    found = kalman_log_likelihood(x, *model)
    exact = multivariate_normal(mean, covariance).logpdf(x.reshape(5, -1))
    np.testing.assert_allclose(found, exact, rtol=1e-11)
    entropy = processes.lgssm_entropy(*model, length)
    assert entropy == pytest.approx(multivariate_normal(mean, covariance).entropy(), abs=1e-11)


@pytest.mark.slow
def test_likelihood_has_the_gradient_of_its_parameters(x64):
    model = random_lgssm()
    x = np.random.default_rng(3).standard_normal((2, 6, 2))
    gradient = quick(jax.grad(lambda A: processes.kalman_log_likelihood(x, A, *model[1:]).sum()))(
        model.A
    )
    h = 1e-5 * np.eye(3)[:, [1, 0, 0]]  # moves three of the entries
    ahead, behind = (
        kalman_log_likelihood(x, model.A + sign * h, *model[1:]).sum() for sign in (1, -1)
    )
    assert float((gradient * h).sum()) == pytest.approx(float(ahead - behind) / 2, rel=1e-7)


def test_smoother_is_the_posterior_of_the_joint_gaussian(x64):
    length, k = 6, 3
    model = random_lgssm()
    mean_z, mean_x, zz, xx, zx = joint(model, length)
    x = np.random.default_rng(2).standard_normal((4, length, 2))
    found = rts_smoother(x, *model)
    gain = zx @ np.linalg.inv(xx)
    mean = mean_z + (x.reshape(4, -1) - mean_x) @ gain.T
    covariance = (zz - gain @ zx.T).reshape(length, k, length, k)
    np.testing.assert_allclose(found.mean, mean.reshape(4, length, k), atol=1e-11)
    np.testing.assert_allclose(
        found.covariance, [covariance[t, :, t] for t in range(length)], atol=1e-11
    )
    np.testing.assert_allclose(
        found.cross, [covariance[t + 1, :, t] for t in range(length - 1)], atol=1e-11
    )


def test_lgssm_is_stationary():
    A, C, Q, R, m0, P0 = processes.lgssm_parameters()
    np.testing.assert_allclose(A @ P0 @ A.T + Q, P0, atol=1e-14)
    x = data.lgssm(length=4, n_train=40_000).load().train.x.astype(np.float64)
    exact = C @ P0 @ C.T + R, C @ A @ P0 @ C.T
    for t, s, covariance in ((0, 0, exact[0]), (3, 3, exact[0]), (3, 2, exact[1])):
        products = x[:, t, :, None] * x[:, s, None, :]
        assert (np.abs(products.mean(axis=0) - covariance) < 4 * products.std(axis=0) / 200).all()
    assert (np.abs(x.mean(axis=0)) < 4 * np.sqrt(np.diag(exact[0])) / 200).all()
    assert not m0.any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("markov", {"n_symbols": 1}, "n_symbols must be at least 2; got 1"),
        ("hmm", {"n_states": 1}, "n_states must be at least 2; got 1"),
        ("hmm", {"n_symbols": 0}, "n_symbols must be at least 2; got 0"),
        *((name, {"length": 0}, "length must be at least 1; got 0") for name in NAMES),
        *((name, {"n_train": 0}, "n_train must be at least 1; got 0") for name in NAMES),
    ],
)
def test_processes_refuse(name, options, message):
    with pytest.raises(ConfigError, match=message):
        data.open_source(name, **options)
