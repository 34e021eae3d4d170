"""The kernel MMD, against loops that are too simple to be wrong, closed forms and its own error."""

import math

import numpy as np
import pytest
from sample_oracles import mean_and_error, normal

from genjax.evaluation.sample_metrics import (
    KERNELS,
    gaussian_kernel,
    kernel_mmd,
    median_distance,
    polynomial_kernel,
)


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
    # 4 sd of a heavy tail.
    assert np.mean([one.standard_error**2 for one in found]) == pytest.approx(variance, rel=0.35)


def test_the_standard_error_is_honest_between_different_distributions_too() -> None:
    draws = normal(4, 600, 2, 120, 2)
    found = [kernel_mmd(real, fake + 1, "polynomial", n_blocks=12) for real, fake in draws]
    # Gauss-Hermite quadrature with 4 nodes an axis is exact for polynomials up to degree 7 in each
    # coordinate.
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    x = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    weight = np.outer(weights, weights).ravel() / (2 * math.pi)
    y = x + 1
    truth = (
        weight
        @ (polynomial_kernel(x, x) + polynomial_kernel(y, y) - 2 * polynomial_kernel(x, y))
        @ weight
    )
    mean, error = mean_and_error([each.mean for each in found])
    assert abs(mean - truth) < 4 * error
    # Student's t, 11 degrees of freedom; 0.02: skewed blocks.
    covered = [abs(each.mean - truth) < 2.201 * each.standard_error for each in found]
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 600) + 0.02)


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
