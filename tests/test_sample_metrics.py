"""Figures about samples, against points made by hand, exact expectations at finite n, and loops
that are too simple to be wrong.
"""

import math

import numpy as np
import pytest
from sample_oracles import mean_and_error, normal, with_moments

from genjax.data import open_source
from genjax.errors import ConfigError, DataError
from genjax.evaluation.estimates import Estimate
from genjax.evaluation.sample_metrics import (
    class_agreement,
    frechet_distance,
    high_quality_share,
    kernel_mmd,
    modes_covered,
    precision_recall_density_coverage,
    sliced_wasserstein,
)

MODES = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])


def test_modes_on_points_made_by_hand() -> None:
    # In, in, just out, far out, in.
    x = np.array([[2.9, 0.0], [0.0, -1.0], [10.0, 3.1], [50.0, 50.0], [7.1, 0.0]])
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
    # Σ (u·x)² = n - 1 for every direction u.
    x = with_moments(normal(3, 40, 5), np.zeros(5), np.eye(5))
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
    # Several parts, the last one partial.
    monkeypatch.setattr("genjax.evaluation.sample_metrics._ROWS", 7)
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


def test_bad_labels_are_refused() -> None:
    for bad in (np.zeros((3, 10)), np.zeros(3), np.zeros(0, int), np.zeros((3, 1), int)):
        with pytest.raises(DataError, match=r"predicted_labels must be whole numbers .*argmax"):
            class_agreement(bad, np.arange(3))
    with pytest.raises(DataError, match="wanted_labels must be whole numbers"):
        class_agreement(np.arange(3), np.ones(3))
    with pytest.raises(DataError, match="one wanted label for each predicted one; got 1 for 3"):
        class_agreement(np.arange(3), np.arange(1))
