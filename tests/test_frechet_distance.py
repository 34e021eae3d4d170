"""The Fréchet distance, against closed forms and exact expectations at finite n."""

import math

import numpy as np
import pytest
import scipy.linalg
from sample_oracles import covariance, mean_and_error, normal, rotation, with_moments

from genjax.errors import DataError
from genjax.evaluation.sample_metrics import (
    frechet_distance,
    gaussian_frechet_distance,
)


def test_the_distance_of_gaussians_with_diagonal_covariances() -> None:
    s1, s2, shift = (
        np.array([1.0, 4.0, 0.25]),
        np.array([9.0, 1.0, 0.0]),
        np.array([1.0, -2.0, 0.5]),
    )
    found = gaussian_frechet_distance(shift, np.diag(s1), np.zeros(3), np.diag(s2))
    assert found == pytest.approx(1 + 4 + 0.25 + (1 - 3) ** 2 + (2 - 1) ** 2 + 0.5**2, rel=1e-12)
    turn = rotation(0, 3)
    turned = gaussian_frechet_distance(
        turn @ shift, turn * s1 @ turn.T, np.zeros(3), turn * s2 @ turn.T
    )
    assert turned == pytest.approx(found, rel=1e-12)


def test_the_distance_of_gaussians_whose_covariances_do_not_commute() -> None:
    cov1, cov2 = covariance(1, 5), covariance(2, 5)
    assert np.abs(cov1 @ cov2 - cov2 @ cov1).max() > 1
    mean = normal(3, 5)
    expected = mean @ mean + np.trace(cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real)
    assert gaussian_frechet_distance(mean, cov1, np.zeros(5), cov2) == pytest.approx(
        expected, rel=1e-10
    )
    assert gaussian_frechet_distance(np.zeros(5), cov2, mean, cov1) == pytest.approx(
        expected, rel=1e-10
    )
    # In two dimensions tr √M = √(tr M + 2 √det M), by hand.
    a, b = np.array([[2.0, 1.0], [1.0, 2.0]]), np.diag([1.0, 4.0])
    by_hand = 4 + 5 - 2 * math.sqrt(10 + 2 * math.sqrt(3 * 4))
    assert gaussian_frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(
        by_hand, rel=1e-12
    )


def test_singular_covariances() -> None:
    # One-dimensional Gaussians along unit vectors u and v: tr √(u uᵀ v vᵀ) = |u·v|.
    u, v = (x / np.linalg.norm(x) for x in normal(0, 2, 40))
    found = gaussian_frechet_distance(
        np.zeros(40), 4 * np.outer(u, u), np.zeros(40), np.outer(v, v)
    )
    assert found == pytest.approx(4 + 1 - 4 * abs(u @ v), rel=1e-9)
    cov = covariance(1, 40, rank=3)
    assert gaussian_frechet_distance(u, cov, u, cov) == pytest.approx(0, abs=1e-12 * np.trace(cov))
    assert (
        min(
            gaussian_frechet_distance(u[:5], c, u[:5], c)
            for c in (covariance(seed, 5) for seed in range(20))
        )
        == 0
    )
    zero = np.zeros((40, 40))
    assert gaussian_frechet_distance(u, zero, v, zero) == pytest.approx(float(((u - v) ** 2).sum()))


def test_samples_with_exact_moments_have_the_closed_form() -> None:
    mean, cov1, cov2 = np.array([1.0, 2.0, -1.0]), covariance(5, 3), covariance(6, 3)
    real, fake = (
        with_moments(normal(7, 50, 3), mean, cov1),
        with_moments(normal(8, 30, 3), -mean, cov2),
    )
    expected = gaussian_frechet_distance(mean, cov1, -mean, cov2)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)
    turn = rotation(9, 3)
    assert frechet_distance(real @ turn + 5, fake @ turn + 5) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real * 3, fake * 3) == pytest.approx(9 * expected, rel=1e-9)


@pytest.mark.parametrize("n", [1000, 8])
def test_equal_samples_are_at_distance_0_and_shifted_ones_at_the_shift_squared(n: int) -> None:
    x = normal(0, n, 20).astype(np.float32)  # 8 samples of 20 features: a singular covariance
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-7)
    assert frechet_distance(x.astype(np.float64), x + np.float64(0.5)) == pytest.approx(
        20 * 0.25, rel=1e-6
    )


def test_one_feature_has_the_bias_that_theory_says() -> None:
    # Independent normal samples: E s = c σ for the sample standard deviation, so every term is
    # known at finite n.
    n, shift, sd = 6, 0.5, 2.0
    c = math.sqrt(2 / (n - 1)) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
    expected = shift**2 + (1 + sd**2) / n + 1 + sd**2 - 2 * c**2 * sd
    draws = (
        normal(1, 3000, 2, n, 1) * np.array([1.0, sd])[:, None, None]
        + np.array([0.0, shift])[:, None, None]
    )
    mean, error = mean_and_error([frechet_distance(*pair) for pair in draws])
    assert abs(mean - expected) < 4 * error
    assert abs(mean - (shift**2 + (sd - 1) ** 2)) > 20 * error, "the test sees the bias"


def test_the_bias_of_equal_distributions_falls_as_predicted() -> None:
    # To first order in 1/n, with eigenvalues l: 2 Σ l / n from the means and Σ_ij l_i l_j (1 +
    # δ_ij) / (l_i + l_j) / (n - 1).
    eigenvalues = np.array([0.5, 1.0, 2.0, 4.0])
    pairs = (
        np.outer(eigenvalues, eigenvalues) * (1 + np.eye(4)) / (eigenvalues[:, None] + eigenvalues)
    )
    for n, repeats in ((100, 400), (1600, 200)):
        expected = 2 * eigenvalues.sum() / n + pairs.sum() / (n - 1)
        draws = normal(n, repeats, 2, n, 4) * np.sqrt(eigenvalues)
        mean, error = mean_and_error([frechet_distance(*pair) for pair in draws])
        assert abs(mean - expected) < 4 * error + 2 * expected / n


def test_moments_that_are_none_are_refused() -> None:
    zero, one = np.zeros(2), np.eye(2)
    for mean in (np.zeros(3), np.zeros((1, 2)), np.array([0.0, np.nan])):
        with pytest.raises(DataError, match="two means must be finite and of one shape"):
            gaussian_frechet_distance(zero, one, mean, one)
    for cov in (
        np.eye(3),
        np.zeros(2),
        np.array([[1.0, 0.5], [0.0, 1.0]]),
        np.full((2, 2), np.inf),
    ):
        with pytest.raises(
            DataError, match=r"cov2 must be a finite, symmetric matrix of shape \(2, 2\)"
        ):
            gaussian_frechet_distance(zero, one, zero, cov)
    with pytest.raises(DataError, match=r"cov1 must be positive semi-definite.*eigenvalue of -1"):
        gaussian_frechet_distance(zero, np.diag([1.0, -1.0]), zero, one)


@pytest.mark.parametrize(("n", "m"), [(8, 12), (20, 3), (2, 2)])
def test_fewer_rows_than_features_have_the_distance_of_their_covariances(n: int, m: int) -> None:
    real, fake = normal(n, n, 30), 2 * normal(m + 50, m, 30) + 0.5
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (real, fake)]
    expected = gaussian_frechet_distance(*moments[0], *moments[1])
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)


def test_large_pictures_need_no_matrix_of_all_their_features() -> None:
    """Which would have 80 GB for 100,000 features."""
    x = normal(0, 3, 100_000)
    assert frechet_distance(x, x + 0.5) == pytest.approx(100_000 * 0.25, rel=1e-9)
