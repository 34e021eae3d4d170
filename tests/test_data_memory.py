"""Data in memory become the same source as those of a file."""

from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from PIL import Image

import genjax
from genjax.data import arrays
from genjax.data.labels import labels_of
from genjax.data.memory import from_arrays
from genjax.errors import ConfigError, DataError
from genjax.runs.other_data import brought_to, in_order, source_in

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
    with pytest.raises(DataError, match="lengths must be from 1 to 5; found 0 to 0"):
        from_arrays(x, step="frame", lengths=0 * lengths)


def test_labels_are_for_all_splits_or_none():
    splits = {"x_train": X[:40], "y_train": PETS[:40], "x_test": X[40:]}
    with pytest.raises(DataError, match="test has no labels, and other splits have"):
        from_arrays(splits)


def test_the_same_examples_in_other_splits_are_other_data():
    one, other = (from_arrays(X, test_fraction=part).contents for part in (0.1, 0.3))
    assert one == from_arrays(X).contents
    assert one != other


# --- names of splits, and of columns --------------------------------------------------------------


@pytest.mark.parametrize("valid", ["valid", "val", "validation"])
def test_a_validation_split_has_any_of_its_names(tmp_path, valid):
    sizes = {"train": 40, valid: 7, "test": 13}
    given, done = {}, 0
    for split, n in sizes.items():
        rows = slice(done, done + n)
        given |= {f"x_{split}": X[rows, None], f"y_{split}": PETS[rows]}
        given[f"lengths_{split}"] = np.ones(n, int)
        done += n
    np.savez(tmp_path / "data.npz", **given)
    filed = arrays(str(tmp_path / "data.npz"), conditional=True, step="frame")
    for source in (filed, from_arrays(given, step="frame")):
        splits = source.load()
        assert [len(batch.x) for batch in splits] == [40, 7, 13]
        assert [len(batch.length) for batch in splits] == [40, 7, 13]
        np.testing.assert_array_equal(splits.valid.x[:, 0], X[40:47].astype(np.float32))
        np.testing.assert_array_equal(splits.valid.cond, PETS[40:47] == "dog")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["x_dev"], "x_dev beside x_train and x_test is no split; expected x_valid, x_val or"),
        (["x_val", "x_valid"], "x_val and x_valid are two names of the valid split"),
        (["y_train", "y_test", "y_dev"], "y_dev beside y_train and y_test is no split"),
    ],
)
def test_no_array_beside_splits_is_left_out_without_a_word(tmp_path, more, message):
    given = dict.fromkeys(("x_train", "x_test", *more), X)
    np.savez(tmp_path / "data.npz", **given)
    with pytest.raises(DataError, match=message):
        arrays(str(tmp_path / "data.npz"), conditional="y_train" in more)
    with pytest.raises(DataError, match=message):
        from_arrays(given)
    # Beside one x for all they are something else.
    assert len(from_arrays({"x": X, "x_mean": X[0]}).load().train.x) == 48


class Frame:
    """A table as pandas and polars have it: the names in `columns`, chosen by a list of them."""

    def __init__(self, values, columns):
        self.values, self.columns, self.shape = values, columns, values.shape

    def __array__(self, dtype=None, copy=None):
        return self.values

    def __getitem__(self, names):
        return Frame(self.values[:, [self.columns.index(name) for name in names]], names)


NAMES = ["a", "b", "c"]
FRAME, ARROW = Frame(X, NAMES), pyarrow.table(dict(zip(NAMES, X.T, strict=True)))


@pytest.mark.parametrize("table", [FRAME, ARROW])
def test_a_table_in_memory_keeps_the_names_of_its_columns(table):
    assert from_arrays(table).spec.columns == ("a", "b", "c")
    assert from_arrays(table, y=PETS, columns=("p", "q", "r")).spec.columns == ("p", "q", "r")
    # Of sequences the last axis is none of columns; and pandas numbers what has no names.
    assert from_arrays(table, step="frame").spec.columns is None
    assert from_arrays(Frame(X, [0, 1, 2])).spec.columns is None
    turned = ["c", "a", "b"]
    other = table.select(turned) if table is ARROW else table[turned]
    np.testing.assert_array_equal(in_order(other, from_arrays(table).spec.columns), X)
    splits = {"x_train": table, "x_test": table}
    assert from_arrays(splits).spec.columns == ("a", "b", "c")
    with pytest.raises(DataError, match=r"in one order; found \[a, b, c\] and \[c, a, b\]"):
        from_arrays(splits | {"x_test": other})


@pytest.mark.slow
def test_a_run_takes_the_columns_of_a_table_by_their_names(tmp_path):
    small = {"hidden": (4,), "latent_dim": 2, "batch_size": 8, "steps": 1, "say": str}
    genjax.train("vae", FRAME, out=tmp_path / "run", **small)
    run = genjax.load(tmp_path / "run")
    assert run.spec.columns == ("a", "b", "c")
    wanted = run.bound(X).nats  # of an array, which has no names
    for table in (ARROW.select(["c", "a", "b"]), FRAME[["b", "c", "a"]]):
        np.testing.assert_array_equal(run.bound(table).nats, wanted)
    first = from_arrays(X).load().test.x
    for data in (X, FRAME[["b", "c", "a"]]):  # as `run.evaluate(data=data)` takes them
        source = brought_to(run.spec, source_in(data, run.spec), "it")
        np.testing.assert_array_equal(source.load().test.x, first)
    with pytest.raises(DataError, match="has no column c, which the run was trained on"):
        run.bound(FRAME[["a", "b"]])


@pytest.mark.parametrize("y", [PETS.astype(object), pyarrow.chunked_array([PETS.tolist()])])
def test_labels_are_texts_in_whatever_array(y):
    """A pandas Series of texts is an array of objects."""
    found, wanted = from_arrays(X, y=y), from_arrays(X, y=PETS)
    assert found.spec == wanted.spec
    np.testing.assert_array_equal(found.load().train.cond, wanted.load().train.cond)


def test_labels_that_are_neither_numbers_nor_strings_are_refused():
    missing = PETS.astype(object)
    missing[3] = None
    with pytest.raises(DataError, match="y must be numbers or strings; found an array of object"):
        from_arrays(X, y=missing)


def test_columns_of_a_table_are_those_that_are_named():
    """In the order that they are named in; other names are new ones, by place."""
    table = pyarrow.table({"a": np.arange(40.0), "b": np.arange(40.0) ** 2})
    turned = from_arrays(table, columns=("b", "a"))
    assert turned.spec.columns == ("b", "a")
    found = np.concatenate([batch.x for batch in turned.load()])
    np.testing.assert_array_equal(found[:, 0], found[:, 1] ** 2)
    slips = [("a", "bb"), ("a", "a"), ("p",), ("p", "q", "r"), ()]
    texts = ["called 'bb'. Did you mean b?", "'a' is given twice", "1 names", "3 names", "0 names"]
    for names, text in zip(slips, texts, strict=True):
        with pytest.raises(ConfigError, match=text):
            from_arrays(table, columns=names)
    for x, step in ((np.ones((9, 5)), "day"), (np.ones((9, 3)), None)):
        with pytest.raises(ConfigError, match=r"columns= has 2 names \(a, b\)"):
            from_arrays(x, columns=("a", "b"), step=step)
    new = from_arrays(table, columns=("p", "q"))
    found = np.concatenate([batch.x for batch in new.load()])
    np.testing.assert_array_equal(found[:, 1], found[:, 0] ** 2)


@pytest.mark.parametrize("name", ["key", "label"])
def test_names_in_a_mapping_are_none_of_an_array(name):
    with pytest.raises(ConfigError, match=f"{name}='target' is a name in a mapping"):
        from_arrays(np.zeros((9, 2)), **{name: "target"})


def test_labels_of_other_examples_are_not_left_out():
    x, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
    with pytest.raises(DataError, match="y are not the labels of the train examples"):
        from_arrays({"x_train": x, "x_test": x, "y": y})


MASKED = np.ma.masked_array(X, mask=X.max() == X)
GIVEN = {
    "x": (MASKED, {}),
    "example": (Examples(list(MASKED)), {}),
    "y": (X, {"y": np.ma.masked_array(np.arange(60) % 3, mask=np.arange(60) == 7)}),
    "lengths": (X, {"step": "day", "lengths": np.ma.masked_array([2] * 60, np.arange(60) == 7)}),
}


@pytest.mark.parametrize("what", GIVEN)
def test_what_is_masked_is_missing(what):
    x, options = GIVEN[what]
    with pytest.raises(DataError, match=rf"{what}.*: 1 of \d+ values of a masked array are masked"):
        from_arrays(x, **options)
    assert from_arrays(np.ma.masked_array(X, mask=False)).spec == from_arrays(X).spec


@pytest.mark.parametrize("form", [np.asarray, np.eye(3).__getitem__])
def test_numbers_of_classes_without_a_training_example_are_said(form):
    """As names are."""
    splits = [form(labels) for labels in ([0, 1, 0], [2, 0, 1])]
    assert labels_of(splits, "x").note.endswith("; no example of 2 is in the training split")
    assert "no example" not in labels_of(splits[::-1], "x").note
