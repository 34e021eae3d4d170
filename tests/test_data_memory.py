"""Data in memory become the same source as those of a file."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from genjax.data import arrays
from genjax.data.memory import from_arrays
from genjax.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3))
PETS = np.array(["dog", "cat"])[np.arange(60) % 2]


class Examples:
    """Anything with a length and examples."""

    def __init__(self, every):
        self.every = every

    def __len__(self):
        return len(self.every)

    def __getitem__(self, index):
        return self.every[index]


@pytest.mark.parametrize(
    ("names", "labels", "called"),
    [
        (("cat", "dog"), [1, 0], ("cat", "dog")),
        (("cat", "dog"), [-1, 0], ("-1", "0")),  # which the first has no name for
        (None, [1, 0], None),
    ],
)
def test_labels_of_a_table_that_names_them_are_called_so(names, labels, called):
    """As Hugging Face's `datasets.ClassLabel` does."""
    table = Examples([{"image": x, "label": labels[i % 2]} for i, x in enumerate(X)])
    table.features = {"label": SimpleNamespace(names=names), "image": object()}
    assert from_arrays(table).spec.class_names == called


def test_an_array_is_what_its_file_is(tmp_path):
    np.savez(tmp_path / "data.npz", x=X, y=PETS)
    filed = arrays(str(tmp_path / "data.npz"), conditional=True)
    held = from_arrays(X, y=PETS)
    assert held.spec == filed.spec
    for a, b in zip(held.load(), filed.load(), strict=True):
        np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(a.cond, b.cond)


@pytest.mark.parametrize(
    "given",
    [
        {"x": X, "y": PETS},
        {"image": X, "label": PETS},
        Examples([(x, y) for x, y in zip(X, PETS, strict=True)]),
        Examples([{"image": x, "label": y} for x, y in zip(X, PETS, strict=True)]),
        Examples([{"x": x.tolist(), "y": str(y)} for x, y in zip(X, PETS, strict=True)]),
    ],
)
def test_mappings_and_examples_are_the_array(given):
    wanted, found = from_arrays(X, y=PETS), from_arrays(given)
    assert found.spec == wanted.spec
    assert found.contents == wanted.contents
    for a, b in zip(found.load(), wanted.load(), strict=True):
        np.testing.assert_array_equal(a.x, b.x)


def test_splits_of_ones_own():
    source = from_arrays(
        {"x_train": X[:40], "x_test": X[40:], "y_train": PETS[:40], "y_test": PETS[40:]}
    )
    assert [len(batch.x) for batch in source.load()] == [36, 4, 20]


def test_pictures_and_sequences():
    every = [Image.fromarray(RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8)) for _ in range(9)]
    assert from_arrays(Examples(every)).spec.shape == (6, 5, 3)
    frames = RNG.normal(size=(20, 7, 2))
    source = from_arrays(frames, step="frame", lengths=np.arange(20) % 7 + 1)
    assert (source.spec.shape, source.spec.step, source.spec.lengths) == ((7, 2), "frame", True)
    assert source.load().train.length.max() <= 7
    assert from_arrays(X, columns=("a", "b", "c")).spec.columns == ("a", "b", "c")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "found a int"),
        ("mine.npz", "found a str"),
        ([], "has no examples"),
        (np.zeros(5), "x must be"),
        (np.zeros((0, 3)), "x must be"),
        (np.array([["a"]]), "x must be numbers"),
        ({"a": X}, "expected one of x, image"),
        ({}, "found nothing"),
        (Examples([X[0], X[0, :2], X[1]]), "examples of 2 different shapes"),
        (Examples([{"a": 1}]), "an example has a; key="),
        (Examples([{"x": X[0]}, 3]), "example 1 has no 'x': 3"),
        (np.full((9, 2), np.nan), "NaN or infinite"),
        ({"x": X, "y": PETS[:-1]}, "60 examples in x and 59 in y"),
    ],
)
def test_what_is_no_data(given, message):
    with pytest.raises(DataError, match=message):
        from_arrays(given)


# --- token ids ------------------------------------------------------------------------------------

IDS = np.random.default_rng(1).integers(0, 5, (60, 6))


def test_ids_are_tokens_where_they_are_said_to_be(tmp_path):
    np.save(tmp_path / "data.npy", IDS)
    filed = arrays(str(tmp_path / "data.npy"), kind="tokens")
    held = from_arrays(IDS, kind="tokens")
    assert held.spec == filed.spec
    assert (held.spec.kind, held.spec.levels, held.spec.step) == ("tokens", 5, "token")
    for a, b in zip(held.load(), filed.load(), strict=True):
        np.testing.assert_array_equal(a.x, b.x)
    rows = [{"input_ids": row.tolist(), "label": "ab"[i % 2]} for i, row in enumerate(IDS)]
    named = from_arrays(rows, kind="tokens", key="input_ids", levels=9)
    assert (named.spec.levels, named.spec.class_names) == (9, ("a", "b"))
    long = from_arrays(IDS, kind="tokens", lengths=np.arange(60) % 6 + 1)
    assert long.spec.lengths
    assert long.load().train.length is not None


def test_tokens_have_a_vocabulary_and_an_end():
    for symbols in ("\nabcd", ["\n", *"abcd"]):
        spec = from_arrays(IDS, kind="tokens", vocabulary=symbols, end=0).spec
        assert (spec.vocabulary, spec.end) == (("\n", *"abcd"), 0)
    words = from_arrays(IDS, kind="tokens", vocabulary=["a", "b", "the", "c", "d"])
    assert (words.spec.vocabulary, words.spec.levels) == (None, 5)
    assert any("samples are ids" in note for note in words.notes)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (IDS, {"levels": 4}, DataError, r"the id 4 at position \[.*from 0 to 3.*\(levels=N\)"),
        (IDS - 1, {}, DataError, "the id -1 at position"),
        (IDS, {"vocabulary": "abcd"}, DataError, "from 0 to 3"),
        (IDS, {"vocabulary": "abcde", "levels": 9}, ConfigError, "levels=9 and vocabulary.*5"),
        (IDS, {"vocabulary": "a"}, ConfigError, "at least two ids"),
        (IDS, {"vocabulary": [1, 2]}, ConfigError, "as text"),
        (IDS, {"end": 5}, ConfigError, "from 0 to 4; got 5"),
        (IDS, {"end": 1, "lengths": np.ones(60, int)}, ConfigError, "not both"),
        (IDS, {"end": 1, "kind": "auto"}, ConfigError, "say kind='tokens'"),
        (IDS, {"vocabulary": "abcde", "kind": "auto"}, ConfigError, "say kind='tokens'"),
        (IDS * 1.0, {}, DataError, "whole numbers; found float64"),
        (IDS[..., None], {}, DataError, r"sequences \[N, T\]; found \[60, 6, 1\]"),
    ],
)
def test_ids_that_do_not_fit_are_told(x, options, error, message):
    with pytest.raises(error, match=message):
        from_arrays(x, **{"kind": "tokens"} | options)


def test_labels_are_never_dropped():
    splits = {"x_train": X[:40], "x_test": X[40:]}
    with pytest.raises(ConfigError, match="put the labels of each split beside it, as y_train"):
        from_arrays(splits, y=PETS)
    rows = [{"x": x, "pet": pet} for x, pet in zip(X, PETS, strict=True)]
    with pytest.raises(DataError, match="an example has no pett; it has x, pet"):
        from_arrays(rows, label="pett")


def test_binary_data_are_numbers():
    mask = np.where(np.arange(120).reshape(60, 2) % 3 == 0, 1.0, np.nan)
    with pytest.raises(DataError, match=r"two different numbers; found 1\.0 and nan"):
        from_arrays(mask, kind="binary")


def test_what_has_levels_is_discrete():
    pixels = ((np.arange(960).reshape(60, 4, 4, 1) % 2) * 255).astype(np.uint8)
    assert from_arrays(pixels).spec.kind == "binary"
    spec = from_arrays(pixels, levels=256).spec
    assert (spec.kind, spec.levels) == ("discrete", 256)
    assert from_arrays((pixels % 4).astype(np.float32), levels=4).spec.kind == "discrete"
    with pytest.raises(ConfigError, match="levels=4 is for discrete data, and kind='continuous'"):
        from_arrays(X, kind="continuous", levels=4)


def test_lengths_are_taken_as_a_file_has_them(tmp_path):
    x, lengths = RNG.normal(size=(60, 5, 2)), np.arange(60) % 5 + 1
    np.savez(tmp_path / "data.npz", x=x, lengths=lengths)
    filed = arrays(str(tmp_path / "data.npz"), step="frame")
    held = from_arrays({"x": x, "lengths": lengths}, step="frame")
    assert held.spec.lengths
    np.testing.assert_array_equal(held.load().train.length, filed.load().train.length)
    parts = {"x_train": x[:40], "lengths_train": lengths[:40]}
    parts |= {"x_test": x[40:], "lengths_test": lengths[40:]}
    np.testing.assert_array_equal(from_arrays(parts, step="frame").load().test.length, lengths[40:])
    with pytest.raises(ConfigError, match="put those of each split beside it, as lengths_train"):
        from_arrays(parts, step="frame", lengths=lengths)
    with pytest.raises(ConfigError, match="lengths, which are for sequences"):
        from_arrays({"x": x[:, :, 0], "lengths": lengths})


def test_labels_are_for_all_splits_or_none():
    splits = {"x_train": X[:40], "y_train": PETS[:40], "x_test": X[40:]}
    with pytest.raises(DataError, match="test has no labels, and other splits have"):
        from_arrays(splits)


def test_the_same_examples_in_other_splits_are_other_data():
    one, other = (from_arrays(X, test_fraction=part).contents for part in (0.1, 0.3))
    assert one == from_arrays(X).contents
    assert one != other
