"""Pictures: that every pixel, point and line is where it should be, and that a file is written
whole or not at all.
"""

import errno
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from genjax.errors import CheckpointError
from genjax.protocol import DataSpec
from genjax.runs import pictures

GREY = DataSpec((2, 3, 1), "discrete", levels=17)


def canvas(picture) -> np.ndarray:
    return np.asarray(picture.axes[0].images[0].get_array())


def numbered(n: int) -> np.ndarray:
    """Images whose pixels all differ: image i holds i, i + 1/8, ... in reading order (to be scaled
    to the range).
    """
    return (np.arange(n)[:, None] + np.arange(6) / 8).reshape(n, 2, 3, 1)


def test_every_image_lands_where_it_should() -> None:
    x = numbered(5)
    found = canvas(pictures.image_grid(x, GREY, "title", columns=2))
    assert found.shape == (3 * 3 + 1, 2 * 4 + 1)
    expected = np.ones((10, 9))
    for index, (top, left) in enumerate([(1, 1), (1, 5), (4, 1), (4, 5), (7, 1)]):
        expected[top : top + 2, left : left + 3] = x[index, :, :, 0] / 16
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("n", "shape"), [(1, (1, 1)), (4, (2, 2)), (5, (2, 3)), (64, (8, 8)), (7, (3, 3))]
)
def test_tiles_are_about_as_many_rows_as_columns(n: int, shape: tuple[int, int]) -> None:
    assert canvas(pictures.image_grid(numbered(n), GREY)).shape == (
        shape[0] * 3 + 1,
        shape[1] * 4 + 1,
    )


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        (GREY, 0, 16),
        (DataSpec((2, 3, 1), "binary"), 0, 1),
        (DataSpec((2, 3, 1), "discrete", levels=256), 0, 255),
        (DataSpec((2, 3, 1), "continuous"), -3.5, 2.0),
    ],
)
def test_black_is_the_lowest_value_and_white_the_highest(
    spec: DataSpec, low: float, high: float
) -> None:
    x = np.linspace(low, high, 6).reshape(1, 2, 3, 1)
    np.testing.assert_allclose(
        canvas(pictures.image_grid(x, spec))[1:3, 1:4].ravel(), np.linspace(0, 1, 6), atol=1e-12
    )


def test_values_outside_the_range_and_equal_values_are_drawn() -> None:
    assert canvas(pictures.image_grid(np.full((1, 2, 3, 1), 99.0), GREY))[1, 1] == 1
    assert np.isfinite(
        canvas(pictures.image_grid(np.full((1, 2, 3, 1), 5.0), DataSpec((2, 3, 1), "continuous")))
    ).all()


def test_colour() -> None:
    spec = DataSpec((1, 1, 3), "discrete", levels=256)
    found = canvas(pictures.image_grid(np.asarray([255, 0, 51]).reshape(1, 1, 1, 3), spec))
    np.testing.assert_allclose(found[1, 1], [1, 0, 0.2])


def test_classes_get_a_row_each_in_order() -> None:
    labels = np.asarray([2, 0, 1, 2, 0, 1])
    x = np.broadcast_to((labels * 4.0)[:, None, None, None], (6, 2, 3, 1))
    picture = pictures.samples(x, GREY, "by class", labels=labels)
    assert picture is not None
    found = canvas(picture)
    assert found.shape == (3 * 3 + 1, 2 * 4 + 1)
    for row in range(3):
        np.testing.assert_allclose(found[row * 3 + 1, [1, 5]], row * 4 / 16)
    axes = picture.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "2"]
    # A label stands beside the middle of its row; pixel r covers r - 0.5 to r + 0.5.
    assert list(axes.get_yticks()) == [1.5, 4.5, 7.5]


def test_uneven_classes_and_a_single_class_are_tiled_as_they_come() -> None:
    x = numbered(4)
    for labels in ([0, 0, 0, 1], [3, 3, 3, 3]):
        picture = pictures.samples(x, GREY, labels=np.asarray(labels))
        assert picture is not None
        assert canvas(picture).shape == (7, 9)
        assert picture.axes[0].get_yticklabels() == []


def test_what_cannot_be_drawn_is_not() -> None:
    assert pictures.samples(np.zeros((4, 2, 5)), DataSpec((2, 5), "continuous")) is None
    assert pictures.samples(np.zeros((4, 2, 2, 5)), DataSpec((2, 2, 5), "continuous")) is None


def test_points_are_scattered_over_the_square_root_of_the_density() -> None:
    points = np.random.default_rng(0).normal(size=(500, 2))

    def log_prob(x: np.ndarray) -> np.ndarray:
        return -0.5 * np.square(x - [1.0, 0.0]).sum(-1) - math.log(2 * math.pi)

    picture = pictures.samples(points, DataSpec((2,), "continuous"), "points", log_prob)
    assert picture is not None
    axes = picture.axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), points)
    image = axes.images[0]
    left, right, bottom, top = image.get_extent()
    assert left == -right == bottom == -top
    assert right > np.quantile(np.abs(points), 0.995)
    density = np.square(np.asarray(image.get_array()))
    row, column = np.unravel_index(np.argmax(density), density.shape)
    side = np.linspace(left, right, 220)
    assert image.origin == "lower"
    assert abs(side[column] - 1) < 0.05  # x runs along the columns,
    assert abs(side[row]) < 0.05  # and y along the rows, upwards
    assert density.max() == pytest.approx(1 / (2 * math.pi), rel=1e-3)
    plain = pictures.scatter(points)
    assert len(plain.axes[0].images) == 0


def test_a_film_has_a_row_for_each_sample_and_a_column_for_each_time() -> None:
    x = np.stack([numbered(3) + 4 * step for step in range(3)])  # [steps + 1, n, height, width, 1]
    picture = pictures.film(x, GREY, "film", labels=["a", "b", "c"])
    assert picture is not None
    found = canvas(picture)
    expected = np.ones((3 * 3 + 1, 3 * 4 + 1))
    for step in range(3):
        for row in range(3):
            expected[3 * row + 1 : 3 * row + 3, 4 * step + 1 : 4 * step + 4] = (
                x[step, row, :, :, 0] / 16
            )
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    axes = picture.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2"]
    # The middle of each column: pixel c covers c - 0.5 to c + 0.5.
    assert list(axes.get_xticks()) == [2, 6, 10]
    assert axes.get_xlabel() == "step of 2"


def test_a_long_film_shows_some_times_the_first_and_the_last_among_them() -> None:
    picture = pictures.film(np.zeros((51, 2, 2, 3, 1)), GREY, at_most=6)
    assert picture is not None
    assert [text.get_text() for text in picture.axes[0].get_xticklabels()] == [
        "0",
        "10",
        "20",
        "30",
        "40",
        "50",
    ]
    points = np.random.default_rng(0).normal(size=(31, 40, 2))
    picture = pictures.film(
        points, DataSpec((2,), "continuous"), "points", lambda x: -np.square(x).sum(-1), at_most=4
    )
    assert picture is not None
    assert [axes.get_xlabel() for axes in picture.axes] == ["0", "10", "20", "30"]
    for axes, index in zip(picture.axes, (0, 10, 20, 30), strict=True):
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), points[index])
        assert axes.get_xlim() == picture.axes[0].get_xlim()
    assert pictures.film(np.zeros((4, 2, 5)), DataSpec((5,), "continuous")) is None


@pytest.mark.parametrize("log_prob", [None, lambda x: -np.square(x).sum(-1)])
def test_a_film_from_wide_noise_shows_each_time_on_a_scale_of_its_own(log_prob) -> None:
    points = np.random.default_rng(0).normal(size=(3, 400, 2)) * [[[80.0]], [[8.0]], [[1.0]]]
    picture = pictures.film(points, DataSpec((2,), "continuous"), log_prob=log_prob)
    assert picture is not None
    widths = [np.ptp(axes.get_xlim()) for axes in picture.axes]
    said = [axes.get_xlabel().split("\n") for axes in picture.axes]
    assert [index for index, _ in said] == ["0", "1", "2"]
    for width, (_, scale) in zip(widths, said, strict=True):
        assert float(scale.removesuffix("x")) == pytest.approx(width / widths[-1], rel=0.15)
    assert widths[0] > 60 * widths[-1]


def test_metrics_of_one_kind_share_a_panel() -> None:
    lines = [
        {
            "step": s,
            "seconds": 0.1,
            "gen/loss": s,
            "disc/loss": -s,
            "gen/elbo": s,
            "valid/bound": s,
            "skipped": 0.0,
        }
        for s in (10, 20, 30)
    ]
    lines.append({"step": 40, "valid/bound": 99.0})
    picture = pictures.curves(lines, "all")
    by_title = {axes.get_title(): axes for axes in picture.axes}
    assert set(by_title) == {"loss", "log-probability (nats)", "skipped"}
    drawn = {
        line.get_label(): line
        for line in by_title["loss"].get_lines()
        if not line.get_label().startswith("_")
    }
    assert set(drawn) == {"gen/loss", "disc/loss"}
    assert len({line.get_color() for line in drawn.values()}) == 2
    shared = [
        line for line in by_title["log-probability (nats)"].get_lines() if len(line.get_xdata())
    ]
    assert sorted(line.get_xdata().tolist() for line in shared) == [[10, 20, 30], [10, 20, 30, 40]]
    assert "seconds" not in str(list(by_title))


def test_members_are_a_line_each_and_nan_is_a_gap() -> None:
    lines = [
        {"step": s, "a/loss": [s, 2 * s, float("nan") if s > 10 else 1.0]} for s in (10, 20, 30)
    ]
    axes = pictures.curves(lines).axes[0]
    drawn = [line for line in axes.get_lines() if len(line.get_xdata())]
    assert [line.get_ydata().tolist() for line in drawn[:2]] == [[10, 20, 30], [20, 40, 60]]
    assert np.isnan(drawn[2].get_ydata()[1:]).all()
    low, high = axes.get_ylim()
    assert low < 1 < 60 < high


@pytest.mark.slow
def test_curves_that_are_never_finite_or_constant_or_missing_are_drawn(tmp_path: Path) -> None:
    for lines in (
        [{"step": s, "a/loss": float("nan")} for s in (1, 2)],
        [{"step": s, "a/loss": float("inf")} for s in (1, 2)],
        [{"step": s, "a/loss": 1.0} for s in (1, 2)],
        [{"step": 1, "a/loss": 1.0}],
        [{"step": 1, "seconds": 1.0}],
        [{"step": 1, "early/loss": 3.0}, *({"step": s, "a/kl": 1.0} for s in range(2, 60))],
    ):
        assert pictures.save(pictures.curves(lines), tmp_path / "curves.png").stat().st_size > 1000


def test_a_far_off_beginning_does_not_flatten_the_rest() -> None:
    lines = [{"step": s, "a/loss": 1e6 if s == 0 else 1.0 + s / 100} for s in range(100)]
    low, high = pictures.curves(lines).axes[0].get_ylim()
    assert 0.9 < low < high < 2.2


def test_a_saved_picture_shows_its_tiles(tmp_path: Path) -> None:
    x = np.zeros((1, 2, 3, 1))
    x[0, 0, 0, 0] = 16
    path = pictures.save(pictures.image_grid(x, GREY), tmp_path / "new" / "folder" / "tiles.png")
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.ndim == 3
    assert (pixels > 0.99).all(axis=-1).any()  # the frame and one pixel are white,
    dark = (pixels < 0.01).all(axis=-1)
    assert dark.any()  # the others black
    rows, columns = np.nonzero(dark)
    corner = dark[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = corner.shape
    assert not corner[: height // 3, : width // 5].any()  # the white pixel is that at the top left
    assert corner[: height // 3, width // 2 :].all()
    assert corner[2 * height // 3 :].all()
    assert [entry.name for entry in path.parent.iterdir()] == ["tiles.png"]


def test_a_picture_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pictures.save(pictures.image_grid(numbered(1), GREY), tmp_path / "tiles.png")
    before = path.read_bytes()

    def fail(self, file, **kwargs) -> None:
        Path(file).write_bytes(b"half a pic")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FigureCanvasAgg, "print_figure", fail)
    with pytest.raises(
        CheckpointError,
        match=r"Could not write .*tiles\.png: No space left on device\. Check the disk's space",
    ):
        pictures.save(pictures.image_grid(numbered(4), GREY), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiles.png"]


def test_reading_metrics_leaves_out_a_last_line_that_was_cut(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "a/loss": 0.1},
        {"step": 2, "a/loss": float("nan")},
        {"step": 3, "b/loss": [1.0, 2.0]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert repr(pictures.read_metrics(path)) == repr(lines)
    start = len(text) - len(json.dumps(lines[-1])) - 1
    for end in range(start + 1, len(text) - 1):
        path.write_text(text[:end])
        assert repr(pictures.read_metrics(path)) == repr(lines[:2]), text[start:end]
    path.write_text("")
    assert pictures.read_metrics(path) == []
