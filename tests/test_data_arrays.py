"""A user's own arrays in .npz and .npy files: kinds, conditions, splits, and what is refused."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from data_checks import LABELS, with_value

from genjax import data
from genjax.checks import check_batch
from genjax.errors import ConfigError, DataError
from genjax.protocol import DataSpec


def npz(tmp_path, **arrays):
    path = str(tmp_path / "mine.npz")
    np.savez(path, **arrays)
    return path


FLOATS = np.random.default_rng(0).normal(size=(50, 3))
ITEMS, LENGTHS = FLOATS[:40].reshape(20, 2, 3), np.full(20, 2)


@pytest.mark.parametrize(
    ("x", "kind", "spec", "dtype"),
    [
        (
            np.full((50, 4, 5), 9, np.uint8),
            "auto",
            DataSpec((4, 5, 1), "discrete", levels=256, name="mine"),
            np.uint8,
        ),
        (
            np.full((50, 4, 5, 3), 9, np.uint8),
            "auto",
            DataSpec((4, 5, 3), "discrete", levels=256, name="mine"),
            np.uint8,
        ),
        (np.full((50, 4), 9), "auto", DataSpec((4,), "discrete", levels=10, name="mine"), np.uint8),
        (
            np.full((50, 4), 900),
            "auto",
            DataSpec((4,), "discrete", levels=901, name="mine"),
            np.int32,
        ),
        (np.ones((50, 4), bool), "auto", DataSpec((4,), "binary", name="mine"), np.uint8),
        (np.ones((50, 4), np.uint8), "binary", DataSpec((4,), "binary", name="mine"), np.uint8),
        (np.ones((50, 4)), "binary", DataSpec((4,), "binary", name="mine"), np.uint8),
        (
            np.ones((50, 4), bool),
            "discrete",
            DataSpec((4,), "discrete", levels=2, name="mine"),
            np.uint8,
        ),
        (FLOATS, "auto", DataSpec((3,), "continuous", name="mine"), np.float32),  # and a scale
        (
            np.full((50, 4), 9, np.uint8),
            "continuous",
            DataSpec((4,), "continuous", name="mine"),
            np.float32,
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_arrays_kinds(tmp_path, x, kind, spec, dtype, suffix):
    path = str(tmp_path / f"mine.{suffix}")
    np.savez(path, x=x) if suffix == "npz" else np.save(path, x)
    source = data.open_source(path, kind=kind)
    assert dataclasses.replace(source.spec, shift=None, scale=None) == spec
    assert (source.spec.scale is None) == (spec.kind != "continuous")
    splits = source.load()
    assert [len(batch.x) for batch in splits] == [40, 5, 5]
    assert splits.train.x.dtype == dtype
    assert "40 train / 5 valid / 5 test" in source.description
    check_batch(spec, source.prepare(jax.random.key(0), splits.train))
    rows = np.concatenate([batch.x for batch in splits]).reshape(50, -1)
    stored = x.reshape(50, -1).astype(dtype)
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], stored[np.lexsort(stored.T)])


@pytest.mark.parametrize("key", ["y", "labels", "cond"])
def test_arrays_conditions(tmp_path, key):
    label = np.arange(50) % 7
    x = np.stack([label, label], axis=1).astype(np.float32)
    source = data.arrays(npz(tmp_path, x=x, **{key: label}), conditional=True)
    assert source.spec.n_classes == 7
    batch = source.load().train
    assert batch.cond.dtype == np.int32
    np.testing.assert_array_equal(batch.x[:, 0], batch.cond)  # rows and labels stay together
    check_batch(source.spec, source.prepare(jax.random.key(0), batch))
    assert data.arrays(npz(tmp_path, x=x, **{key: label})).load().train.cond is None
    source = data.arrays(npz(tmp_path, x=x, **{key: FLOATS}), conditional=True)
    assert source.spec.cond_dim == 3
    check_batch(source.spec, source.prepare(jax.random.key(0), source.load().test))
    assert (
        data.arrays(npz(tmp_path, x=x, **{key: FLOATS[:, 0]}), conditional=True).spec.cond_dim == 1
    )


def test_arrays_given_splits(tmp_path):
    label = np.array([0, 1, 2, 3])
    given = {
        "x_train": FLOATS[:20],
        "x_test": FLOATS[20:24],
        "y_train": np.zeros(20, int),
        "y_test": label,
    }
    source = data.arrays(npz(tmp_path, **given), conditional=True, valid_fraction=0.25)
    assert source.spec.n_classes == 4
    splits = source.load()
    assert [len(batch.x) for batch in splits] == [15, 5, 4]
    np.testing.assert_array_equal(splits.test.x, FLOATS[20:24].astype(np.float32))
    three = npz(
        tmp_path,
        **given,
        x_valid=FLOATS[24:27],
        y_valid=np.zeros(3, int),
        junk=np.array([{}], object),
    )
    splits = data.arrays(
        three, conditional=True
    ).load()  # an object array that is not needed is not touched
    np.testing.assert_array_equal(splits.train.x, FLOATS[:20].astype(np.float32))
    np.testing.assert_array_equal(splits.valid.x, FLOATS[24:27].astype(np.float32))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"z": FLOATS, "w": FLOATS}, {}, r"expected the arrays x \[.*found z, w. --key NAME"),
        ({"x_train": FLOATS}, {}, "expected the arrays.*found x_train"),
        ({}, {}, "found nothing"),
        ({"x": np.zeros(5)}, {}, re.escape("x must be [N, D] or [N, H, W, C]; found shape [5]")),
        ({"x": np.float64(1)}, {}, re.escape("found shape []")),
        ({"x": np.zeros((0, 3))}, {}, "x is empty"),
        ({"x": np.zeros((5, 0))}, {}, "the examples are empty"),
        ({"x": with_value(np.nan)}, {}, r"1 of \d+ values are NaN or infinite"),
        ({"x": np.full((5, 2), 1e300)}, {}, "NaN or infinite"),
        ({"x": FLOATS[:2]}, {}, "2 examples are too few to split"),
        ({"x": np.array([["a"]] * 9)}, {}, "x must be an array of numbers; found <U1"),
        ({"x": FLOATS.astype(complex)}, {}, "numbers; found complex128"),
        (
            {"x": np.array([[{}]] * 9, object)},
            {},
            "holds Python objects, which are never unpickled",
        ),
        ({"x": FLOATS}, {"kind": "discrete"}, "discrete data must be whole numbers; found float64"),
        ({"x": FLOATS}, {"kind": "binary"}, "binary data have two different values; found 150"),
        (
            {"x": np.full((9, 2), 255, np.uint8)},
            {"kind": "binary"},
            "binary data are 0 and 1; found 255 only",
        ),
        ({"x": np.full((9, 2), -3)}, {}, "found -3 to -3"),
        ({"x": np.full((9, 2), 2**30)}, {}, re.escape("below 2**24")),
        ({"x": FLOATS}, {"conditional": True}, "expected one of y, labels, cond; found x"),
        (
            {"x": FLOATS, "y": np.zeros(49, int)},
            {"conditional": True},
            "another length: 50 examples in x and 49 in y",
        ),
        ({"x": FLOATS, "y": np.int64(3)}, {"conditional": True}, "50 examples in x and 1 in y"),
        (
            {"x": FLOATS, "y": np.zeros((50, 2), int)},
            {"conditional": True},
            "expected labels",
        ),
        (
            {"x": FLOATS, "y": np.zeros((50, 1, 2))},
            {"conditional": True},
            "expected condition vectors",
        ),
        (
            {"x": FLOATS, "y": np.full((50, 1), np.inf)},
            {"conditional": True},
            "labels: .*NaN or infinite",
        ),
        ({"x_train": FLOATS, "x_test": FLOATS[:, :2]}, {}, "examples of one shape; found"),
        (
            {"x_train": FLOATS, "x_test": FLOATS, "y_train": LABELS},
            {"conditional": True},
            "in x_train and 4 in y_train",
        ),
        (b"not an archive", {}, "not a .npz or .npy file: it starts with b'not an'"),
        (b"", {}, "not a .npz or .npy file"),
        (b"PK\x03\x04 but not a zip", {}, "damaged"),
        (b"\x93NUMPY\x01\x00\x04\x00????", {}, "damaged"),
    ],
)
def test_arrays_refuse(tmp_path, content, options, message):
    path = tmp_path / "mine.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(DataError, match=rf"mine\.npz: .*{message}"):
        data.open_source(path, **options)


def test_arrays_refuse_damage(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.npz: there is no such file"):
        data.arrays(str(tmp_path / "nowhere.npz"))
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DataError, match=r"folder\.npz is a folder; expected a file"):
        data.arrays(str(tmp_path / "folder.npz"))
    whole = Path(npz(tmp_path, x=FLOATS)).read_bytes()
    for name, content in (
        ("cut", whole[:300]),
        ("flipped", whole[:400] + bytes([whole[400] ^ 255]) + whole[401:]),
    ):
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.npz: damaged"):
            data.arrays(str(tmp_path / f"{name}.npz"))
    np.save(tmp_path / "cut.npy", FLOATS)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    with pytest.raises(DataError, match=r"cut\.npy: damaged"):
        data.arrays(str(tmp_path / "cut.npy"))
    np.save(tmp_path / "objects.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"objects\.npy: holds Python objects"):
        data.arrays(str(tmp_path / "objects.npy"))
    for fractions in ((0, 0.1), (0.1, 0), (0.5, 0.5)):
        with pytest.raises(
            ConfigError,
            match="valid_fraction and test_fraction must be positive with a sum below 1",
        ):
            data.arrays("any.npz", valid_fraction=fractions[0], test_fraction=fractions[1])
    with pytest.raises(ConfigError, match="no kind called 'floats'"):
        data.arrays("any.npz", kind="floats")


def test_x_and_labels_may_be_called_anything(tmp_path):
    label = np.arange(50) % 3
    assert data.arrays(npz(tmp_path, images=FLOATS)).spec.shape == (3,)
    path = npz(tmp_path, images=FLOATS, kinds=label)
    source = data.arrays(path, key="images", label="kinds", conditional=True)
    assert source.spec.n_classes == 3
    with pytest.raises(DataError, match=r"--label NAME says which array they are"):
        data.arrays(path, key="images", conditional=True)


def test_labels_that_are_not_used_are_said_and_their_name_is_looked_for(tmp_path):
    path = npz(tmp_path, x=FLOATS, kinds=np.arange(50) % 3)
    source = data.arrays(path, label="kinds")
    assert not source.spec.conditional
    assert "kinds is not used: --conditional takes it as the condition" in source.notes
    with pytest.raises(DataError, match="expected one of kind; found x, kinds"):
        data.arrays(path, label="kind")


def test_bytes_of_few_levels_are_told_what_would_say_so():
    """Those that are 0, 1, 2 ... already have no other numbers to take."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, (40, 3)).astype(np.uint8)
    note = "; ".join(data.from_arrays(x).notes)
    assert "none is above 3: --levels 4 says that there are no more" in note
    note = "; ".join(data.from_arrays(40 * x).notes)
    assert "only 4 of them occur (0, 40, 80, 120), which numbers from 0 to 3" in note
    assert data.from_arrays(x, levels=4).spec.levels == 4


@pytest.mark.parametrize(
    ("saved", "options", "message"),
    [
        ({"x": FLOATS, "x_test": FLOATS[:9]}, {}, "is x what x_test leave for training"),
        (
            {"x_train": ITEMS, "x_test": ITEMS[:9], "lengths": LENGTHS},
            {"step": "day"},
            "lengths is not of x_train, x_test. Give the lengths of each as lengths_train",
        ),
        (
            {"x": ITEMS, "lengths_train": LENGTHS, "lengths_test": LENGTHS[:9]},
            {"step": "day"},
            "lengths_train, lengths_test is not of x. Give the lengths of each as lengths.",
        ),
    ],
)
def test_what_is_of_the_whole_and_what_of_its_splits_are_not_mixed(
    tmp_path, saved, options, message
):
    np.savez(tmp_path / "a.npz", **saved)
    with pytest.raises(DataError, match=re.escape(message)):
        data.open_source(str(tmp_path / "a.npz"), **options)
    with pytest.raises(DataError, match=re.escape(message)):
        data.from_arrays(saved, **options)
