"""Data that a run is evaluated on: its own from any working directory, and others that are opened
as its spec says.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import genjax
from genjax.data import from_arrays, midi, open_source, tables
from genjax.errors import DataError
from genjax.protocol import DataSpec
from genjax.runs.load import load, source_of
from genjax.runs.other_data import brought_to, other_source, source_in

RNG = np.random.default_rng(0)
TEXT = "".join(RNG.choice(list("the sun and a moon\n"), 1200))
SMALL = {"steps": 1, "batch_size": 4, "evaluate_every": 0, "sample_every": 0}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, trained from there on book.txt by bpe.json under relative paths."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "book.txt").write_text(TEXT)
    made = tokenizers.ByteLevelBPETokenizer()
    made.train([str(folder / "book.txt")], vocab_size=260)
    made.save(str(folder / "bpe.json"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        recipe = genjax.ZOO["rnn"].on("book.txt")
        options = {"tokenizer": "bpe.json", "context": 8, "lanes": 0, "d_hidden": 4}
        genjax.train(recipe, out="run", say=str, **SMALL, **options)
    return folder


@pytest.mark.slow
def test_a_run_on_several_files_finds_them_from_any_directory(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = load(pieces / "run")
    assert [Path(one["path"]).name for one in run.files or ()] == ["book.txt", "bpe.json"]
    assert source_of(run).files == (str(pieces / "book.txt"), str(pieces / "bpe.json"))
    (tmp_path / "other.txt").write_text(TEXT[:900])
    assert other_source(run, "other.txt").spec.shape == (8,)


@pytest.mark.slow
def test_a_run_is_scored_on_windows_that_share_nothing(pieces: Path) -> None:
    run = genjax.load(pieces / "run")
    windows = len(run.source.load().train.x)
    assert run.evaluate("train")["n"] == -(-windows // 8)
    report = run.evaluate("train", n=50)
    assert (report["n"], report["per_step"]["n"]) == (50, 400)


TABLE = RNG.normal(size=(40, 3))


def written(path: Path, names: str, x: np.ndarray) -> str:
    np.savetxt(path, x, delimiter=",", header=names, comments="")
    return str(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table of the columns a, b and c."""
    folder = tmp_path_factory.mktemp("table")
    path = written(folder / "abc.csv", "a,b,c", TABLE)
    genjax.train("vae", path, out=folder / "run", hidden=(4,), latent_dim=1, say=str, **SMALL)
    return folder


@pytest.mark.slow
def test_the_columns_of_a_file_are_taken_by_their_names(table: Path, tmp_path: Path) -> None:
    run = load(table / "run")
    same = other_source(run, str(table / "abc.csv")).load()
    more = np.column_stack([TABLE[:, 2], RNG.normal(size=40), TABLE[:, :2]])
    other = other_source(run, written(tmp_path / "cdab.csv", "c,d,a,b", more))
    assert other.spec.columns == ("a", "b", "c")
    np.testing.assert_array_equal(other.load().test.x, same.test.x)


@pytest.mark.slow
def test_examples_of_weight_0_are_no_part_of_a_report(table: Path) -> None:
    run = genjax.load(table / "run")
    source = source_in(TABLE, run.spec)
    test = source.load().test
    weight = np.asarray([1, 0, 0, 2], np.float32)
    splits = source.load()._replace(test=test._replace(weight=weight))
    found = run.evaluate("test", source._replace(load=lambda: splits))
    assert found["n"] == 2
    alone = splits._replace(test=test._replace(weight=np.asarray([0, 1, 0, 0])))
    only = run.evaluate("test", source._replace(load=lambda: alone))
    assert (only["n"], only["mean"]) != (found["n"], found["mean"])
    equal = splits._replace(test=test._replace(weight=np.full(4, 3.0)))
    plain = run.evaluate("test", source)
    again = run.evaluate("test", source._replace(load=lambda: equal))
    for name in ("n", "mean", "standard_error"):
        assert again[name] == pytest.approx(plain[name])


def test_labels_of_other_data_are_what_those_of_the_run_are() -> None:
    """Whole numbers that are saved as floats are classes or numbers, as the run has them."""
    x = RNG.normal(size=(60, 3))
    many, few = RNG.permutation(60) * 1.0, np.arange(60) % 3 * 1.0
    heights = from_arrays(x, y=np.linspace(0, 2, 60)).spec
    assert heights.cond_dim == 1
    found = brought_to(heights, source_in({"x": x, "y": few}, heights), "x")
    assert found.load().train.cond.dtype == np.float32
    spec = from_arrays(x, y=np.arange(60)).spec
    assert brought_to(spec, source_in({"x": x, "y": many}, spec), "x").spec.n_classes == 60


@pytest.mark.slow
def test_labels_in_a_file_are_what_those_of_the_run_are(tmp_path: Path) -> None:
    x = RNG.normal(size=(40, 2))
    np.savez(tmp_path / "mine.npz", x=x, y=np.linspace(0, 2, 40))
    recipe = genjax.ZOO["cvae"].on(str(tmp_path / "mine.npz"))
    genjax.train(
        recipe, out=tmp_path / "run", conditional=True, hidden=(4,), latent_dim=1, say=str, **SMALL
    )
    np.savez(tmp_path / "other.npz", x=x, y=np.arange(40) % 3 * 1.0)
    found = other_source(load(tmp_path / "run"), str(tmp_path / "other.npz"))
    assert found.spec.cond_dim == 1


def test_shorter_sequences_are_padded(tmp_path: Path) -> None:
    x, lengths = RNG.normal(size=(40, 7, 2)), np.arange(40) % 7 + 1
    spec = from_arrays(x, lengths=lengths, step="hour", standardize="none").spec
    given = {"x": x[:, :5], "lengths": np.minimum(lengths, 5)}
    short = brought_to(spec, source_in(given, spec), "x").load()
    own = source_in(given, spec).load()
    np.testing.assert_array_equal(short.train.x[:, :5], own.train.x)
    np.testing.assert_array_equal(short.train.x[:, 5:], 0)
    np.testing.assert_array_equal(short.train.length, own.train.length)
    (tmp_path / "long.txt").write_text("a\nbb\nccccc\na\nb")
    (tmp_path / "short.txt").write_text("c\nb\na\nbb")
    wanted = open_source(str(tmp_path / "long.txt"), layout="lines").spec
    lines = brought_to(wanted, open_source(str(tmp_path / "short.txt"), layout="lines"), "x")
    batch = lines.load().train
    assert batch.x.shape[1] == 6
    assert wanted.end is not None
    np.testing.assert_array_equal(batch.x[:, 3:], wanted.end)
    with pytest.raises(DataError, match=r"shape is \(7, 2\), the run has \(5, 2\)"):
        brought_to(source_in(given, spec).spec, source_in({"x": x, "lengths": lengths}, spec), "x")


def test_a_run_from_when_the_row_index_was_a_feature_has_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "t.csv", ",a", np.column_stack([np.arange(40), TABLE[:, 0]]))
    with monkeypatch.context() as before:
        before.setattr(tables, "_row_indices", lambda read: [])
        genjax.train("vae", path, out=tmp_path / "run", hidden=(4,), latent_dim=1, say=str, **SMALL)
    assert source_of(load(tmp_path / "run")).spec.columns == ("", "a")


@pytest.mark.slow
def test_a_run_on_one_piece_of_music_is_evaluated(tmp_path: Path) -> None:
    """Whose file is cut, so that how it was is kept beside what it is."""
    midi((RNG.random((60, 88)) < 0.1).astype(np.uint8), tmp_path / "one.mid")
    recipe = genjax.ZOO["rnn-jsb"].on(str(tmp_path / "one.mid"))
    options = {"context": 8, "lanes": 0, "d_hidden": 4}
    genjax.train(recipe, out=tmp_path / "run", say=str, **SMALL, **options)
    run = load(tmp_path / "run")
    assert source_of(run).spec.shape == (8, 88)
    midi((RNG.random((60, 88)) < 0.1).astype(np.uint8), tmp_path / "one.mid")
    with pytest.raises(DataError, match=r"one\.mid"):
        source_of(run)


def test_texts_that_end_otherwise_are_refused() -> None:
    lines = DataSpec((4,), "tokens", levels=3, step="character", vocabulary="ab\n", end=2)
    several = dataclasses.replace(lines, vocabulary="a\n\x03")
    x = np.asarray([[0, 2, 2, 2]] * 9)
    source = from_arrays(x, kind="tokens", vocabulary="ab\n", end=2)
    assert brought_to(dataclasses.replace(source.spec, vocabulary="ba\n"), source, "it")
    with pytest.raises(DataError, match=r"ends its texts with '\\n', and .* with '\\x03'"):
        brought_to(dataclasses.replace(source.spec, vocabulary=several.vocabulary), source, "it")
