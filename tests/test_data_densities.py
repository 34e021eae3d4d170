"""Densities in the plane, held to their own samples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_checks import assert_same, assert_uniform
from gates import optimised

from genjax import data
from genjax.checks import check_batch
from genjax.errors import ConfigError

DENSITIES = ("ring", "grid", "moons", "pinwheel", "checkerboard", "swiss_roll")
HALF_WIDTH = {
    "ring": 1.2,
    "grid": 2.4,
    "moons": 2.4,
    "pinwheel": 3.2,
    "checkerboard": 2.0,
    "swiss_roll": 3.6,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSITIES)
def test_density_is_exact(name):
    """It integrates to 1, its entropy is its own, and its samples follow it."""
    source = data.open_source(name)
    width, cells, fine = HALF_WIDTH[name], 8, 40
    axis = (np.arange(cells * fine) + 0.5) * (2 * width / (cells * fine)) - width
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).astype(np.float32)
    log_p = np.asarray(
        jax.jit(lambda rows: jax.lax.map(source.log_prob, rows))(jnp.asarray(points)), np.float64
    )
    area = (axis[1] - axis[0]) ** 2
    p = np.exp(log_p) * area
    assert p.sum() == pytest.approx(1, abs=1e-3)
    assert -(p * np.where(p > 0, log_p, 0)).sum() == pytest.approx(source.entropy, abs=2e-3)

    x = source.load().train.x
    scores = np.asarray(jax.jit(source.log_prob)(jnp.asarray(x)), np.float64)
    assert scores.shape == (20_000,)
    # numpy in, numpy out, in double precision.
    exact = source.log_prob(x[:500].astype(np.float64))
    assert isinstance(exact, np.ndarray)
    assert exact.dtype == np.float64
    np.testing.assert_allclose(scores[:500], exact, rtol=1e-4, atol=1e-3)
    # (A constant density has a standard error of 0 and is exact to float32's rounding.)
    assert abs(scores.mean() + source.entropy) < 4 * scores.std() / math.sqrt(len(x)) + 1e-6

    cell = np.floor((x + width) / (2 * width / cells)).astype(int)
    assert cell.min() >= 0
    assert cell.max() < cells
    counts = np.bincount(cell[:, 0] * cells + cell[:, 1], minlength=cells**2)
    expected = p.reshape(cells, fine, cells, fine).sum(axis=(1, 3)).ravel() * len(x)
    rare = expected < 10
    counts, expected = (
        np.append(counts[~rare], counts[rare].sum()),
        np.append(expected[~rare], expected[rare].sum()),
    )
    assert_uniform(counts[expected > 0], expected[expected > 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSITIES)
def test_density_sources(name):
    source = data.open_source(name, n_train=30)
    splits = source.load()
    assert [batch.x.shape for batch in splits] == [(30, 2), (2000, 2), (10_000, 2)]
    assert all(batch.x.dtype == np.float32 for batch in splits)
    assert_same(splits, source.load())
    assert_same(
        splits.test, data.open_source(name).load().test
    )  # n_train does not move the other splits
    new = [source.fresh(seed, 30) for seed in (0, 1)]
    assert_same(new[1], source.fresh(1, 30))
    firsts = np.concatenate([batch.x[:30] for batch in (*splits, *new)])
    assert len(np.unique(firsts, axis=0)) == 150
    check_batch(source.spec, source.prepare(jax.random.key(0), splits.train))
    assert not np.isnan(source.log_prob(np.full((1, 2), 1e4, np.float32))).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ring", "pinwheel", "checkerboard"])
def test_score_is_finite(name):
    source = data.open_source(name)
    score = optimised(jax.grad(lambda x: source.log_prob(x).sum()))(
        jnp.asarray(source.load().valid.x)
    )
    assert np.isfinite(np.asarray(score)).all()


@pytest.mark.parametrize(
    ("name", "n_classes"), [("ring", 8), ("grid", 25), ("moons", 2), ("pinwheel", 5)]
)
def test_density_classes(name, n_classes):
    source = data.open_source(name, conditional=True)
    assert source.spec.n_classes == n_classes
    batch = source.load().train
    assert_uniform(np.bincount(batch.cond, minlength=n_classes))
    check_batch(source.spec, source.prepare(jax.random.key(0), batch))
    np.testing.assert_array_equal(batch.x, data.open_source(name).load().train.x)
    if source.modes is not None:
        assert source.modes.shape == (n_classes, 2)
        z = (batch.x - source.modes[batch.cond]) / source.mode_std
        assert abs(z.mean()) < 0.03
        assert z.std() == pytest.approx(1, abs=0.02)
    if name == "moons":
        assert batch.x[batch.cond == 0, 1].mean() > 0.3 > -0.3 > batch.x[batch.cond == 1, 1].mean()
    if name == "pinwheel":
        # Untwisted, each arm points its own way.
        radius, angle = np.hypot(*batch.x.T), np.arctan2(batch.x[:, 1], batch.x[:, 0])
        off = (angle - 0.25 * np.exp(radius) - 2 * np.pi / 5 * batch.cond + np.pi) % (
            2 * np.pi
        ) - np.pi
        assert np.median(np.abs(off)) < 0.15


def test_entropy_of_one_gaussian_and_of_many():
    # Eight Gaussians far apart: ln 8 nats more than one; all in one place: one Gaussian.
    one = math.log(2 * math.pi * math.e * 0.02**2)
    assert data.ring(radius=10.0).entropy == pytest.approx(one + math.log(8), abs=1e-6)
    assert data.ring(radius=1e-9).entropy == pytest.approx(one, abs=1e-6)
    assert data.checkerboard(half_width=4.0).entropy == pytest.approx(math.log(32))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ring", {"sd": 0.0}, r"sd must be in \[1e-09, 1e\+06\]; got 0"),
        ("ring", {"radius": -1.0}, "radius must be"),
        ("grid", {"sd": math.nan}, "got nan"),
        ("moons", {"noise": 0.0}, "noise must be"),
        ("swiss_roll", {"noise": math.inf}, "got inf"),
        ("pinwheel", {"radial_sd": 0.0}, "radial_sd must be"),
        ("checkerboard", {"half_width": 0.0}, "half_width must be"),
        ("ring", {"n_train": 0}, "n_train must be at least 1; got 0"),
    ],
)
def test_densities_refuse(name, options, message):
    with pytest.raises(ConfigError, match=message):
        data.open_source(name, **options)
