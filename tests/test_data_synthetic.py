"""Data that are made, of any size: their likelihoods against formulas and their own samples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_checks import assert_same
from scipy.stats import multivariate_normal

from genjax import data
from genjax.checks import check_batch
from genjax.errors import ConfigError

SMALL = {
    "zipf": {"n_symbols": 50, "length": 6},
    "textures": {"size": 4, "channels": 2},
}
both = pytest.mark.parametrize("name", SMALL)


@both
def test_splits_are_drawn_apart_and_prepared(name):
    source = data.open_source(name, **SMALL[name], n_train=300)
    splits = source.load()
    assert [len(batch.x) for batch in splits] == [300, 256, 256]
    check_batch(source.spec, source.prepare(jax.random.key(0), splits.test))
    assert_same(splits[1:], data.open_source(name, **SMALL[name], n_train=301).load()[1:])
    assert (splits.valid.x != splits.test.x).any()
    assert (source.fresh(0, 256).x != splits.train.x[:256]).any()


@pytest.mark.slow
@both
def test_entropy_is_the_mean_code_length(name, x64):
    source = data.open_source(name, **SMALL[name], n_train=4_000)
    nats = -np.asarray(source.log_prob(source.load().train.x.astype(np.float64)))
    assert abs(nats.mean() - source.entropy) < 3 * nats.std() / math.sqrt(len(nats))


def test_tokens_have_zipfs_frequencies(x64):
    source = data.zipf(n_symbols=7, length=3, exponent=1.5)
    weights = np.arange(1, 8) ** -1.5
    weights /= weights.sum()
    np.testing.assert_allclose(source.log_prob(jnp.arange(7)[:, None]), np.log(weights), rtol=1e-12)
    assert source.entropy == pytest.approx(-3 * weights @ np.log(weights), rel=1e-12)
    x = source.load().train.x
    counts = np.bincount(x.ravel(), minlength=7) / x.size
    assert (np.abs(counts - weights) < 4 * np.sqrt(weights / x.size)).all()


def test_all_tokens_are_as_frequent_with_exponent_0():
    assert data.zipf(n_symbols=8, length=1, exponent=0.0).entropy == pytest.approx(math.log(8))


def covariance_of(size, exponent):
    """Of one channel [size², size²], by the sum over frequencies."""
    k = np.fft.fftfreq(size, 1 / size)
    power = (1 + k[:, None] ** 2 + k[None] ** 2) ** (-exponent / 2)
    power /= power.mean()
    at = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    waves = np.stack(np.meshgrid(k, k, indexing="ij"), -1).reshape(-1, 2)
    phases = np.exp(2j * np.pi * at @ waves.T / size)
    return ((phases * power.ravel()) @ phases.conj().T).real / size**2


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
def test_the_density_of_textures_is_a_gaussian_with_that_spectrum(x64, size):
    source = data.textures(size=size, channels=2, exponent=1.7)
    x = np.random.default_rng(0).normal(size=(5, size, size, 2))
    gaussian = multivariate_normal(cov=covariance_of(size, 1.7))
    wanted = sum(gaussian.logpdf(x[..., c].reshape(5, -1)) for c in range(2))
    np.testing.assert_allclose(source.log_prob(x), wanted, rtol=1e-10)


def test_textures_have_pixels_of_variance_1_and_their_neighbours_are_alike():
    x = data.textures(size=4, channels=1, exponent=2.0, n_train=20_000).load().train.x[..., 0]
    pixels = x.reshape(len(x), -1).astype(np.float64)
    products = pixels[:, :, None] * pixels[:, None]
    error = products.mean(axis=0) - covariance_of(4, 2.0)
    assert (np.abs(error) < 4.5 * products.std(axis=0) / math.sqrt(len(x))).all()


@pytest.mark.slow
def test_classes_are_smoother_and_smoother_and_the_density_is_their_mixture(x64):
    source = data.textures(size=4, channels=1, exponent=1.0, conditional=True)
    splits = source.load()
    assert source.spec.n_classes == 10
    assert set(splits.train.cond) == set(range(10))
    assert source.entropy is None
    x = splits.test.x[:6].astype(np.float64)
    each = [data.textures(size=4, channels=1, exponent=1 + k / 3).log_prob(x) for k in range(10)]
    wanted = np.logaddexp.reduce(np.stack(each)) - math.log(10)
    np.testing.assert_allclose(source.log_prob(x), wanted, rtol=1e-12)
    rough, smooth = (splits.train.x[splits.train.cond == k] for k in (0, 9))
    assert np.diff(rough, axis=1).std() > 1.3 * np.diff(smooth, axis=1).std()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zipf", {"n_symbols": 1}, "n_symbols must be at least 2; got 1"),
        ("zipf", {"exponent": -1.0}, r"exponent must be in \[0, 8\]; got -1"),
        ("textures", {"size": 0}, "size must be at least 1; got 0"),
        ("textures", {"n_train": 0}, "n_train must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        data.open_source(name, **options)
