"""Figures about samples, against closed forms, exact expectations at finite n, and loops that are
too simple to be wrong.
"""

import math

import numpy as np
import pytest
import scipy.linalg

from genjax.data import open_source
from genjax.errors import ConfigError, DataError
from genjax.evaluation.estimates import Estimate
from genjax.evaluation.sample_metrics import (
    KERNELS,
    class_agreement,
    frechet_distance,
    gaussian_frechet_distance,
    gaussian_kernel,
    high_quality_share,
    kernel_mmd,
    median_distance,
    modes_covered,
    polynomial_kernel,
    precision_recall_density_coverage,
    sliced_wasserstein,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(seed: int, size: int, rank: int | None = None) -> np.ndarray:
    a = normal(seed, size, rank or size)
    return a @ a.T


def rotation(seed: int, size: int) -> np.ndarray:
    return np.linalg.qr(normal(seed, size, size))[0]


def with_moments(x: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """The points moved so that their sample mean and unbiased sample covariance are exactly
    these.
    """
    white = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return mean + white @ np.linalg.cholesky(cov).T


def mean_and_error(values) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


MODES = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])


def test_modes_on_points_made_by_hand() -> None:
    x = np.array(
        [[2.9, 0.0], [0.0, -1.0], [10.0, 3.1], [50.0, 50.0], [7.1, 0.0]]
    )  # in, in, just out, far out, in
    assert modes_covered(x, MODES, sd=1.0) == 2
    assert high_quality_share(x, MODES, sd=1.0) == (
        pytest.approx(0.6),
        pytest.approx(math.sqrt(0.6 * 0.4 / 4)),
        5,
    )
    assert modes_covered(x[2:4], MODES, sd=1.0) == 0
    assert high_quality_share(x[2:4], MODES, sd=1.0) == Estimate(0.0, 0.0, 2)
    assert modes_covered(x[2:3], MODES, sd=1.0, within=3.2) == 1
    assert modes_covered(x[2:3], MODES, sd=2.0) == 1
    assert modes_covered(np.array([[3.0, 0.0]]), MODES, sd=1.0) == 1, "the bound itself is inside"
    assert modes_covered(MODES, MODES, sd=0.001) == 3


def test_a_sample_between_two_modes_covers_the_nearer_one_only() -> None:
    assert modes_covered(np.array([[0.9, 0.0]]), np.array([[0.0, 0.0], [2.0, 0.0]]), sd=1.0) == 1


@pytest.mark.parametrize("name", ["ring", "grid"])
def test_the_data_themselves_cover_all_modes_and_98_9_percent_are_of_high_quality(
    name: str,
) -> None:
    source = open_source(name)
    modes, sd = source.modes, source.mode_std
    assert modes is not None
    assert sd is not None
    x = source.load().test.x
    truth = 1 - math.exp(-4.5)
    found = high_quality_share(x, modes, sd)
    assert found.standard_error == pytest.approx(math.sqrt(truth * (1 - truth) / len(x)), rel=0.15)
    assert abs(found.mean - truth) < 4 * math.sqrt(truth * (1 - truth) / len(x))
    assert modes_covered(x, modes, sd) == len(modes)
    half = x[np.linalg.norm(x[:, None] - modes, axis=2).argmin(axis=1) < len(modes) // 2]
    assert modes_covered(half, modes, sd) == len(modes) // 2
    one = high_quality_share(x, modes, sd, within=1.0)
    assert abs(one.mean - (1 - math.exp(-0.5))) < 4 * one.standard_error


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


def brute_force_mmd(x: np.ndarray, y: np.ndarray, k) -> float:
    n, m = len(x), len(y)
    same = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    same += sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return same - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_one_block_is_the_double_loop() -> None:
    x, y = normal(0, 6, 3) * 2 + 1, normal(1, 6, 3)
    found = kernel_mmd(x, y, n_blocks=1)
    assert found.mean == pytest.approx(
        brute_force_mmd(x, y, lambda a, b: (a @ b / 3 + 1) ** 3), rel=1e-12
    )
    assert math.isnan(found.standard_error)
    assert found.n == 6
    distances = [math.dist(x[i], x[j]) for i in range(6) for j in range(i)]
    assert median_distance(x) == pytest.approx(np.median(distances), rel=1e-12)
    for kernel, bandwidth in (("gaussian", np.median(distances)), (gaussian_kernel(0.7), 0.7)):
        expected = brute_force_mmd(
            x, y, lambda a, b, h=bandwidth: math.exp(-(math.dist(a, b) ** 2) / (2 * h**2))
        )
        assert kernel_mmd(x, y, kernel, n_blocks=1).mean == pytest.approx(expected, rel=1e-10)
    linear = kernel_mmd(x, y, lambda a, b: a @ b.T, n_blocks=1).mean
    assert linear == pytest.approx(brute_force_mmd(x, y, np.dot), rel=1e-10)
    assert set(KERNELS) == {"polynomial", "gaussian"}


def test_blocks_are_disjoint_random_and_of_both_sets() -> None:
    seen: list[np.ndarray] = []

    def spy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if x is y:
            seen.append(x[:, 0])
        return polynomial_kernel(x, y)

    real, fake = np.arange(25.0)[:, None], 100 + np.arange(23.0)[:, None]
    found = kernel_mmd(real, fake, spy, n_blocks=5, seed=1)
    assert found.n == 20, "5 blocks of 23 // 5"
    assert [len(rows) for rows in seen] == [4] * 10
    of_real, of_fake = np.concatenate(seen[0::2]), np.concatenate(seen[1::2])
    assert len(set(of_real)) == len(set(of_fake)) == 20
    assert of_real.max() < 100 <= of_fake.min()
    assert (np.diff(of_real) < 0).any()
    assert set(of_real) != set(of_fake - 100)
    values = [
        kernel_mmd(a[:, None], b[:, None], n_blocks=1).mean
        for a, b in zip(seen[0::2], seen[1::2], strict=True)
    ]
    assert found[:2] == pytest.approx(mean_and_error(values), rel=1e-9)
    assert kernel_mmd(real, fake, n_blocks=5, seed=1) == found
    assert kernel_mmd(real, fake, n_blocks=5, seed=2) != found


@pytest.mark.parametrize("kernel", ["polynomial", "gaussian"])
def test_under_equal_distributions_the_mean_is_0_and_the_standard_error_is_honest(
    kernel: str,
) -> None:
    draws = normal(3, 400, 2, 120, 4) * np.array([0.5, 1, 1, 2]) + 0.3
    found = [kernel_mmd(*pair, kernel, n_blocks=6) for pair in draws]
    mean, error = mean_and_error([one.mean for one in found])
    assert abs(mean) < 4 * error
    variance = np.var([one.mean for one in found], ddof=1)
    assert np.mean([one.standard_error**2 for one in found]) == pytest.approx(
        variance, rel=0.35
    )  # 4 sd of a heavy tail


def test_the_standard_error_is_honest_between_different_distributions_too() -> None:
    draws = normal(4, 600, 2, 120, 2)
    found = [kernel_mmd(real, fake + 1, "polynomial", n_blocks=12) for real, fake in draws]
    # Gauss-Hermite quadrature with 4 nodes an axis is exact for polynomials up to degree 7 in each
    # coordinate.
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    x, weight = (
        np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2),
        np.outer(weights, weights).ravel() / (2 * math.pi),
    )
    y = x + 1
    truth = (
        weight
        @ (polynomial_kernel(x, x) + polynomial_kernel(y, y) - 2 * polynomial_kernel(x, y))
        @ weight
    )
    mean, error = mean_and_error([each.mean for each in found])
    assert abs(mean - truth) < 4 * error
    covered = [
        abs(each.mean - truth) < 2.201 * each.standard_error for each in found
    ]  # Student's t, 11 degrees of freedom
    assert np.mean(covered) == pytest.approx(
        0.95, abs=4 * math.sqrt(0.05 * 0.95 / 600) + 0.02
    )  # 0.02: skewed blocks


def test_a_gaussian_kernel_between_gaussians_has_its_closed_form() -> None:
    # E k(x, y) = (h²/(h² + a² + b²))^{D/2} exp(-|shift|²/(2 (h² + a² + b²))) for x ~ N(0, a² I), y
    # ~ N(shift, b² I).
    size, h, sd, shift = 3, 1.3, 1.5, 0.8

    def expected(variance: float, squared: float) -> float:
        total = h**2 + variance
        return (h**2 / total) ** (size / 2) * math.exp(-squared / (2 * total))

    truth = expected(2, 0) + expected(2 * sd**2, 0) - 2 * expected(1 + sd**2, size * shift**2)
    draws = normal(5, 2, 4000, size)
    found = kernel_mmd(draws[0], sd * draws[1] + shift, gaussian_kernel(h), n_blocks=40)
    assert abs(found.mean - truth) < 4 * found.standard_error
    assert found.standard_error < truth / 20, "the test can tell it from others"


def test_the_median_distance_of_many_rows_is_that_of_some() -> None:
    assert median_distance(normal(6, 5000, 2)) == pytest.approx(
        math.sqrt(2 * 2 * math.log(2)), rel=0.03
    )


def brute_force_sliced(x: np.ndarray, y: np.ndarray) -> float:
    """In one dimension, by repeating each value until both have lcm(n, m) of them."""
    size = math.lcm(len(x), len(y))
    a, b = (np.sort(np.repeat(values, size // len(values))) for values in (x, y))
    return math.sqrt(((a - b) ** 2).mean())


def test_in_one_dimension_it_is_the_wasserstein_distance() -> None:
    x, y = normal(0, 12), 2 * normal(1, 12) + 1
    assert sliced_wasserstein(x[:, None], x[::-1, None] + 3) == pytest.approx(3, rel=1e-12)
    for n, m in ((12, 12), (12, 8), (5, 7), (1, 12), (9, 3)):
        expected = brute_force_sliced(x[:n], y[:m])
        assert sliced_wasserstein(x[:n, None], y[:m, None], n_projections=3) == pytest.approx(
            expected, rel=1e-12
        )
        assert sliced_wasserstein(y[:m, None], x[:n, None], n_projections=3) == pytest.approx(
            expected, rel=1e-12
        )


def test_a_shift_costs_its_length_over_root_d() -> None:
    shift = np.array([3.0, -1.0, 2.0, 0.0])
    x = normal(2, 64, 4)
    found = sliced_wasserstein(x, x[::-1] + shift, n_projections=4000)
    assert found == pytest.approx(np.linalg.norm(shift) / 2, rel=4 / math.sqrt(2 * 4000))
    assert sliced_wasserstein(x + shift, x, n_projections=4000) == pytest.approx(found, rel=1e-12)
    spread = np.std([sliced_wasserstein(x, x + shift, seed=seed) for seed in range(100)]) / found
    assert 0.5 < spread * math.sqrt(2 * 200) < 1, (
        "the relative error that the documentation promises"
    )


@pytest.mark.parametrize("n_projections", [1, 50, 51, 120])
def test_a_scale_costs_the_same_in_every_direction_of_white_points(n_projections: int) -> None:
    x = with_moments(
        normal(3, 40, 5), np.zeros(5), np.eye(5)
    )  # Σ (u·x)² = n - 1 for every direction u
    expected = 1.5 * math.sqrt(39 / 40)
    assert sliced_wasserstein(x, 2.5 * x[::-1], n_projections=n_projections) == pytest.approx(
        expected, rel=1e-9
    )


def test_equal_sets_are_at_distance_0_and_the_seed_decides() -> None:
    x, y = normal(4, 30, 3), normal(5, 20, 3)
    assert sliced_wasserstein(x, x[::-1]) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(x, np.repeat(x, 3, axis=0)) == pytest.approx(0, abs=1e-12)
    assert (
        sliced_wasserstein(x, y)
        == sliced_wasserstein(x, y, seed=0)
        != sliced_wasserstein(x, y, seed=1)
    )


def brute_force_balls(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, ...]:
    def reach(x: np.ndarray) -> list[float]:
        return [
            sorted(math.dist(a, b) for j, b in enumerate(x) if j != i)[k - 1]
            for i, a in enumerate(x)
        ]

    around_real, around_fake = reach(real), reach(fake)
    inside = np.array(
        [[math.dist(a, b) <= r for b in fake] for a, r in zip(real, around_real, strict=True)]
    )
    inside_fake = np.array(
        [[math.dist(a, b) <= r for b, r in zip(fake, around_fake, strict=True)] for a in real]
    )
    found = (
        inside.any(axis=0).mean(),
        inside_fake.any(axis=1).mean(),
        inside.sum() / (k * len(fake)),
        inside.any(axis=1).mean(),
    )
    return tuple(float(value) for value in found)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_balls_against_loops(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "genjax.evaluation.estimates._ROWS", 7
    )  # several parts, the last one partial
    real, fake = normal(0, 17, 2), normal(1, 23, 2) * 1.3 + 0.8
    found = precision_recall_density_coverage(real, fake, k)
    assert tuple(found) == pytest.approx(brute_force_balls(real, fake, k), rel=1e-12)
    assert found._fields == ("precision", "recall", "density", "coverage")
    assert len({round(value, 6) for value in found}) > 2, "a case that tells them apart"
    # Points of a lattice: many ties, repeated points, and balls of radius 0; with rounding, and far
    # from the origin.
    rng = np.random.default_rng(k)
    real, fake = rng.integers(0, 4, (40, 3)), rng.integers(0, 4, (30, 3))
    exact = brute_force_balls(real, fake, k)
    for scale, offset in ((0.1, 7.7), (1.0, 2.0**24)):
        found = precision_recall_density_coverage(real * scale + offset, fake * scale + offset, k)
        assert tuple(found) == pytest.approx(exact, rel=1e-12)


def test_balls_by_hand() -> None:
    real, fake = np.array([[0.0], [1.0], [3.0], [10.0]]), np.array([[0.5], [1.5], [20.0]])
    # k = 1: real balls of radius 1, 1, 2, 7; fake ones of radius 1, 1, 18.5. 0.5 is in those of 0,
    # 1; 1.5 in those of 1, 3; 20 in none. All but 10 lie in a ball around 0.5 or 1.5, and 10 around
    # 20.
    assert precision_recall_density_coverage(real, fake, k=1) == (
        2 / 3,
        1.0,
        pytest.approx(4 / 3),
        0.75,
    )


def test_equal_sets_and_sets_that_are_far_apart() -> None:
    x = normal(2, 700, 8).astype(np.float32)
    for k in (5, 100):
        same = precision_recall_density_coverage(x, x, k)
        assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
        assert same.density == pytest.approx((1 + k) / k), "a ball has its centre and k neighbours"
    assert precision_recall_density_coverage(x, x + 1000) == (0, 0, 0, 0)


def test_for_equal_distributions_density_and_coverage_have_their_exact_expectation() -> None:
    n, m, k = 40, 25, 3
    draws = normal(3, 800, n + m, 3)
    found = np.array([precision_recall_density_coverage(x[:n], x[n:], k) for x in draws])
    coverage = 1 - math.prod((n - 1 - i) / (n - 1 - i + m) for i in range(k))
    for values, expected in ((found[:, 2], 1.0), (found[:, 3], coverage)):
        mean, error = mean_and_error(values)
        assert abs(mean - expected) < 4 * error
        assert error < 0.01


def test_a_dropped_mode_costs_recall_and_coverage_and_not_precision() -> None:
    source = open_source("ring")
    assert source.modes is not None
    splits = source.load()
    real, fake = splits.test.x[:800], splits.valid.x[:800]
    nearest = np.linalg.norm(fake[:, None] - source.modes, axis=2).argmin(axis=1)
    all_modes, half = (
        precision_recall_density_coverage(real, fake),
        precision_recall_density_coverage(real, fake[nearest < 4]),
    )
    assert all_modes.precision > 0.95
    assert half.precision > 0.95
    assert all_modes.coverage > 0.93
    assert all_modes.recall > 0.95
    assert half.coverage == pytest.approx(0.5, abs=0.06)
    assert half.recall == pytest.approx(0.5, abs=0.06)
    noisy = precision_recall_density_coverage(real, np.concatenate([fake, 3 + fake]))
    assert noisy.precision == pytest.approx(all_modes.precision / 2, abs=0.01)
    assert noisy.density == pytest.approx(all_modes.density / 2, rel=0.01)
    assert noisy.coverage == all_modes.coverage


def test_class_agreement_by_hand() -> None:
    found = class_agreement(np.array([0, 1, 2, 2, 9]), np.array([0, 1, 2, 3, 9], np.uint8))
    assert found == (pytest.approx(0.8), pytest.approx(math.sqrt(0.8 * 0.2 / 4)), 5)
    assert class_agreement(np.arange(3), np.arange(3)) == Estimate(1.0, 0.0, 3)


POINTS = normal(0, 40, 2)
TWO_SETS = [frechet_distance, kernel_mmd, sliced_wasserstein, precision_recall_density_coverage]


@pytest.mark.parametrize(
    "figure",
    [*TWO_SETS, lambda x, y: modes_covered(x, y, 1.0), lambda x, y: high_quality_share(x, y, 1.0)],
)
def test_bad_arrays_are_refused(figure) -> None:
    bad = POINTS.copy()
    bad[3, 1], bad[5, 0] = np.nan, -np.inf
    figure(POINTS, POINTS)
    for pair in ((bad, POINTS), (POINTS, bad)):
        with pytest.raises(DataError, match="must be finite; 2 of 40 rows have NaN or infinite"):
            figure(*pair)
    for empty in (POINTS[:0], POINTS[:, :0], POINTS[:, 0], POINTS[:, :, None]):
        for pair in ((empty, POINTS), (POINTS, empty)):
            with pytest.raises(
                DataError, match=r"an array \[n, F\] with n of at least .* got shape .*Flatten"
            ):
                figure(*pair)
    with pytest.raises(DataError, match=r"same number of columns; got 2 for \w+ and 1 for \w+"):
        figure(POINTS, POINTS[:, :1])


def test_bad_settings_are_refused() -> None:
    for name, settings in (
        ("sd", {"sd": 0.0}),
        ("within", {"sd": 1.0, "within": -1.0}),
        ("sd", {"sd": math.nan}),
    ):
        with pytest.raises(ConfigError, match=f"^{name} must be a positive number"):
            modes_covered(POINTS, MODES, **settings)
    for seed in range(6):  # rounding must not make a bandwidth out of one repeated row
        with pytest.raises(ConfigError, match="bandwidth must be a positive number; got 0"):
            kernel_mmd(np.tile(normal(seed, 1, 100), (40, 1)), normal(9, 40, 100), "gaussian")
    with pytest.raises(ConfigError, match=r"no kernel called 'gausian'. Did you mean gaussian\?"):
        kernel_mmd(POINTS, POINTS, "gausian")
    with pytest.raises(ConfigError, match=r"all pairs, \[4, 4\] here; got shape \(4,\)"):
        kernel_mmd(POINTS, POINTS, lambda x, y: x[:, 0])
    with pytest.raises(ConfigError, match="n_blocks must be at least 1; got 0"):
        kernel_mmd(POINTS, POINTS, n_blocks=0)
    with pytest.raises(
        DataError, match="10 blocks need at least 20 rows of each set; got 40 real and 19 fake"
    ):
        kernel_mmd(POINTS, POINTS[:19])
    with pytest.raises(ConfigError, match="n_projections must be at least 1; got 0"):
        sliced_wasserstein(POINTS, POINTS, n_projections=0)
    for k, n in ((0, 40), (40, 40), (5, 5)):
        with pytest.raises(
            ConfigError, match=f"k must be at least 1 and below .* 40 real and {n} fake; got {k}"
        ):
            precision_recall_density_coverage(POINTS, POINTS[:n], k)
    with pytest.raises(DataError, match="n of at least 2; got shape"):
        frechet_distance(POINTS[:1], POINTS)


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


def test_bad_labels_are_refused() -> None:
    for bad in (np.zeros((3, 10)), np.zeros(3), np.zeros(0, int), np.zeros((3, 1), int)):
        with pytest.raises(DataError, match=r"predicted_labels must be whole numbers .*argmax"):
            class_agreement(bad, np.arange(3))
    with pytest.raises(DataError, match="wanted_labels must be whole numbers"):
        class_agreement(np.arange(3), np.ones(3))
    with pytest.raises(DataError, match="one wanted label for each predicted one; got 1 for 3"):
        class_agreement(np.arange(3), np.arange(1))
