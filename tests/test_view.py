"""What events of some data look like."""

import numpy as np
import pytest

from genjax.data import SOURCES, open_source
from genjax.data.view import as_image, no_picture, view_of
from genjax.protocol import DataSpec

LETTERS = ("a", "b")


@pytest.mark.parametrize(
    ("spec", "view"),
    [
        (DataSpec((6,), "tokens", levels=2, vocabulary=LETTERS, step="character"), "text"),
        (DataSpec((8, 8, 1), "binary"), "image"),
        (DataSpec((8, 6, 3), "continuous"), "image"),
        (DataSpec((8, 8, 2), "continuous"), "image"),
        (DataSpec((8, 8, 4), "continuous"), "image"),
        (DataSpec((8, 8, 5), "continuous"), "nothing"),
        (DataSpec((4, 8, 3), "continuous", step="frame"), "sequence"),
        (DataSpec((8, 6), "discrete", levels=17, step="row"), "rows"),
        (DataSpec((28, 88), "binary", step="row"), "rows"),
        (DataSpec((9,), "tokens", levels=17, step="pixel"), "pixels"),
        (DataSpec((8,), "tokens", levels=17, step="pixel"), "sequence"),
        (DataSpec((9,), "tokens", levels=17, step="token"), "sequence"),
        (DataSpec((8, 6), "discrete", levels=17), "nothing"),
        (DataSpec((2,), "continuous"), "points"),
        (DataSpec((2,), "binary"), "points"),
        (DataSpec((9, 88), "binary", step="frame", lengths=True), "music"),
        (DataSpec((9, 88), "continuous", step="frame"), "sequence"),
        (DataSpec((9, 3), "binary", step="frame"), "sequence"),
        (DataSpec((6,), "tokens", levels=2, step="token"), "sequence"),
        (DataSpec((6,), "tokens", levels=2), "vectors"),
        (DataSpec((5,), "continuous"), "vectors"),
        (DataSpec((), "continuous"), "nothing"),
    ],
)
def test_what_an_event_looks_like(spec: DataSpec, view: str) -> None:
    assert view_of(spec) == view


def test_every_data_set_looks_like_something() -> None:
    views = {name: view_of(open_source(name).spec) for name in SOURCES}
    assert set(views.values()) == {"text", "image", "rows", "pixels", "points", "music", "sequence"}


def test_rows_become_images_and_all_else_stays() -> None:
    spec = DataSpec((3, 4), "discrete", levels=17, step="row", name="rows")
    x = np.arange(24.0).reshape(2, 3, 4)
    images, whole = as_image(x, spec)
    assert images.shape == (2, 3, 4, 1)
    np.testing.assert_array_equal(images[..., 0], x)
    assert whole == DataSpec((3, 4, 1), "discrete", levels=17, name="rows")
    assert view_of(whole) == "image"
    for other in (DataSpec((3, 4), "continuous"), DataSpec((3, 4, 1), "continuous")):
        assert as_image(x, other) == (x, other)


def test_pixels_become_square_images() -> None:
    spec = DataSpec((9,), "tokens", levels=17, step="pixel", name="pixels")
    x = np.arange(18).reshape(2, 9)
    images, whole = as_image(x, spec)
    np.testing.assert_array_equal(images, x.reshape(2, 3, 3, 1))
    assert whole == DataSpec((3, 3, 1), "discrete", levels=17, name="pixels")


def test_two_channels_stand_side_by_side() -> None:
    spec = DataSpec((3, 4, 2), "continuous", shift=(0.0,), scale=(2.0,), name="pairs")
    x = np.arange(48.0).reshape(2, 3, 4, 2)
    images, whole = as_image(x, spec)
    assert whole == DataSpec((3, 8, 1), "continuous", name="pairs")
    np.testing.assert_array_equal(images[..., :4, 0], x[..., 0])
    np.testing.assert_array_equal(images[..., 4:, 0], x[..., 1])


def test_why_there_is_no_picture() -> None:
    assert no_picture(DataSpec((8, 8, 4), "binary")) is None
    assert "[8, 8, 7]" in (no_picture(DataSpec((8, 8, 7), "binary")) or "")
