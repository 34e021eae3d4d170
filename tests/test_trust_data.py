"""A user's own data: what they are is found out, said, kept with the run, and compared."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program import refused

import genjax.cli
from genjax import DataSpec
from genjax.data import arrays, fashion_mnist, open_source, rows
from genjax.data.labels import condition_of, condition_of_each
from genjax.errors import ConfigError, DataError
from genjax.runs import samples
from genjax.runs.identity import differences, files_of, read_files
from genjax.runs.load import load
from genjax.zoo import ZOO
from genjax.zoo.recipe import from_dict

SHORT = "--steps 4 --batch-size 8 --hidden 4 --latent-dim 2 --evaluate-every 0 --sample-every 0"


def saved(folder, name="mine.npz", **given):
    path = folder / name
    np.savez(path, **given)
    return str(path)


def run(args):
    genjax.cli.main(args.split())


# --- kinds ----------------------------------------------------------------------------------------

BITS = np.random.default_rng(0).integers(0, 2, (60, 4, 4))


@pytest.mark.parametrize(
    ("x", "kind", "levels", "said"),
    [
        (BITS.astype(np.uint8), "binary", None, "uint8 with two values only"),
        (BITS.astype(np.int64), "binary", None, "int64 with two values only"),
        (BITS.astype(np.float32), "binary", None, "0 and 1 only"),
        ((BITS * 255).astype(np.uint8), "binary", None, "0 is taken as 0, 255 as 1"),
        ((BITS * 3 + 4).astype(np.int32), "binary", None, "4 is taken as 0, 7 as 1"),
        ((BITS * 100 * (1 + BITS[::-1])).astype(np.uint8), "discrete", 256, "only 3 of them occur"),
        ((BITS + BITS[::-1]).astype(np.float64), "continuous", None, "--kind discrete"),
        (BITS + 0.5, "continuous", None, "real numbers (float64)"),
    ],
)
def test_what_values_are_is_found_out_and_said(tmp_path, x, kind, levels, said):
    source = arrays(saved(tmp_path, x=x))
    assert (source.spec.kind, source.spec.levels) == (kind, levels)
    assert said in "; ".join(source.notes)
    stored = np.concatenate([batch.x for batch in source.load()])
    assert stored.shape == (60, 4, 4, 1)
    if kind == "binary":
        assert set(np.unique(stored)) == {0, 1}
        assert stored.mean() == pytest.approx(BITS.mean())


def test_whole_floats_may_be_declared_discrete(tmp_path):
    x = (BITS + BITS[::-1]).astype(np.float64)
    spec = arrays(saved(tmp_path, x=x), kind="discrete").spec
    assert (spec.kind, spec.levels) == ("discrete", 3)
    with pytest.raises(DataError, match=r"whole numbers; found float64 with fractions"):
        arrays(saved(tmp_path, x=x + 0.5), kind="discrete")


GREY = np.random.default_rng(1).integers(0, 256, (60, 4, 4)).astype(np.uint8)


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (GREY, (GREY / 255).astype(np.float32), "values of one kind; found uint8, uint8, float32"),
        (GREY, GREY // 128, "the test split has values up to 1, the training split up to 255"),
        (GREY / 255, GREY / 1.0, "the test split is on another scale"),
        (GREY / 1.0, GREY / 255, "the test split is on another scale"),
        (GREY // 16 * 1, GREY * 1, "the test split has values up to 255, the training split up"),
        (BITS, BITS.astype(bool), "values of one kind; found int64, int64, bool"),
    ],
)
def test_a_split_of_another_range_or_dtype_is_refused(tmp_path, train, test, said):
    path = saved(tmp_path, x_train=train, x_test=test)
    with pytest.raises(DataError, match=re.escape(said)):
        arrays(path)


def test_what_its_remedy_says_works(tmp_path):
    counts = GREY.astype(int) // 16
    path = saved(tmp_path, x_train=np.minimum(counts, 12), x_test=counts)
    with pytest.raises(DataError, match=r"--levels 16"):
        arrays(path)
    assert arrays(path, levels=16).spec.levels == 16


# --- labels ---------------------------------------------------------------------------------------

X = np.random.default_rng(2).normal(size=(60, 3))
NUMBERS = np.arange(60) % 10 + 1
PETS = np.array(["dog", "cat", "bird"])[np.arange(60) % 3]


@pytest.mark.parametrize(
    ("y", "n", "names"),
    [
        (NUMBERS, 10, tuple(map(str, range(1, 11)))),
        (NUMBERS - 1, 10, None),
        (NUMBERS[:, None], 10, tuple(map(str, range(1, 11)))),
        (NUMBERS.astype(np.float32), 10, tuple(map(str, range(1, 11)))),
        (NUMBERS.astype(np.float64)[:, None] - 1, 10, None),
        (NUMBERS * 5, 10, tuple(str(5 * i) for i in range(1, 11))),
        (np.eye(4, dtype=np.uint8)[np.arange(60) % 4], 4, None),
        (np.eye(4)[np.arange(60) % 3], 4, None),
        (PETS, 3, ("bird", "cat", "dog")),
        (PETS.astype("S4"), 3, ("bird", "cat", "dog")),
        (PETS[:, None], 3, ("bird", "cat", "dog")),
        (PETS == "dog", 2, ("False", "True")),
    ],
)
def test_classes_are_those_that_occur_under_their_names(tmp_path, y, n, names):
    source = arrays(saved(tmp_path, x=X, y=y), conditional=True)
    assert (source.spec.n_classes, source.spec.class_names) == (n, names)
    assert source.spec.cond_dim is None
    assert f"{n} classes" in "; ".join(source.notes)
    got = np.concatenate([batch.cond for batch in source.load()])
    wanted = y if y.ndim == 1 or y.shape[1] == 1 else y.argmax(1)
    assert len(np.unique(got)) == len(np.unique(wanted))
    # Each example keeps its label: x tells which it is.
    order = {tuple(row): label for row, label in zip(X.astype("f"), np.ravel(wanted), strict=True)}
    rows = np.concatenate([batch.x for batch in source.load()])
    found = [order[tuple(row)] for row in rows]
    texts = [value.decode() if isinstance(value, bytes) else str(value) for value in found]
    if names is not None:
        plain = [text.removesuffix(".0") for text in texts]
        assert plain == [names[label] for label in got]
    else:
        assert [int(float(text)) for text in texts] == got.tolist()


def test_a_regression_target_is_a_vector(tmp_path):
    spec = arrays(saved(tmp_path, x=X, y=X[:, 0]), conditional=True).spec
    assert (spec.cond_dim, spec.n_classes) == (1, None)
    asked = arrays(saved(tmp_path, x=X, y=NUMBERS * 1.0), conditional=True, condition="vector").spec
    assert (asked.cond_dim, asked.n_classes) == (1, None)


def test_a_class_without_a_training_example_is_said(tmp_path):
    given = {"x_train": X, "x_test": X[:5], "y_train": NUMBERS, "y_test": np.arange(5) + 9}
    source = arrays(saved(tmp_path, **given), conditional=True)
    assert "no example of 11, 12, 13 is in the training split" in "; ".join(source.notes)


def test_classes_are_asked_for_by_name():
    spec = DataSpec((3,), "continuous", n_classes=3, class_names=("bird", "cat", "dog"))
    assert condition_of(spec, "cat", 3).tolist() == [1, 1, 1]
    assert condition_of(spec, ["dog", "bird"], 4).tolist() == [0, 0, 2, 2]
    assert condition_of(spec, None, 4).tolist() == [0, 0, 1, 2]
    digits = DataSpec((3,), "continuous", n_classes=3, class_names=("1", "2", "30"))
    assert condition_of(digits, "30", 2).tolist() == [2, 2]
    assert condition_of(digits, 2, 2).tolist() == [1, 1]
    for bad in ("0", "cow", 3):
        with pytest.raises(ConfigError, match=r"--cond takes classes called 1, 2, 30; got"):
            condition_of(digits, bad, 2)


def test_labels_of_examples_keep_their_order_and_are_what_they_are_called():
    """Of a list, an array and a column of a table alike; an index is understood where no class is
    called by a number.
    """
    digits = DataSpec((3,), "continuous", n_classes=3, class_names=("1", "2", "30"))
    for given in ([30, 1, 2], np.array([30, 1, 2]), np.array([[30.0], [1], [2]]), ["30", "1", "2"]):
        assert condition_of_each(digits, given, 3).tolist() == [2, 0, 1]
        assert condition_of(digits, given, 3).tolist() == [2, 0, 1]
    pets = DataSpec((3,), "continuous", n_classes=3, class_names=("bird", "cat", "dog"))
    for given in (np.array(["dog", "cat"]), np.array([b"dog", b"cat"]), np.array([2, 1])):
        assert condition_of_each(pets, given, 2).tolist() == [2, 1]
    assert condition_of_each(pets, "cat", 2).tolist() == [1, 1]
    for given in (["cat", "dog"], np.array([0, 1]), []):
        with pytest.raises(ConfigError, match=r"cond (must be|takes)"):
            condition_of_each(pets, given, 3)
    with pytest.raises(ConfigError, match=r"takes classes called 1, 2, 30; got '0'"):
        condition_of_each(digits, np.array([0, 1, 2]), 3)


def test_classes_with_commas_and_spaces_in_their_names_are_asked_for_as_they_are_shown():
    """Of a table with a space after each comma, for example."""
    spec = DataSpec((3,), "continuous", n_classes=4, class_names=(" bird", " cat", "a, b", "cat"))
    for asked, index in (("bird", 0), (" bird", 0), (" cat", 1), ("cat", 3), ("a, b", 2)):
        assert condition_of(spec, asked, 2).tolist() == [index] * 2
    assert condition_of(spec, "bird,cat", 2).tolist() == [0, 3]


def test_vectors_of_examples_are_one_for_all_or_one_each():
    one, two = (DataSpec((3,), "continuous", cond_dim=size) for size in (1, 2))
    assert condition_of_each(one, np.arange(3), 3).tolist() == [[0], [1], [2]]
    assert condition_of_each(two, [[1, 2], [3, 4]], 2).tolist() == [[1, 2], [3, 4]]
    assert condition_of_each(two, [1, 2], 3).tolist() == [[1, 2]] * 3


def test_pictures_show_at_most_ten_classes():
    spec = DataSpec((4, 4, 1), "binary", n_classes=84)
    cond = samples.picture_cond(spec, samples.picture_size(spec))
    assert len(cond) == 100
    assert set(cond.tolist()) == set(range(10))


def test_clothes_have_their_names():
    assert fashion_mnist(conditional=True).spec.class_names[9] == "Ankle boot"


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1, 2, 3, 4])
def test_channels_first_is_said_with_the_flag_that_transposes(tmp_path, c):
    x = np.random.default_rng(3).integers(0, 9, (30, c, 8, 6))
    path = saved(tmp_path, x=x)
    with pytest.raises(DataError, match=r"channels first\. --channels first transposes them"):
        arrays(path)
    source = arrays(path, channels="first")
    assert source.spec.shape == (8, 6, c)
    one = source.load().train.x[0]
    assert any(np.array_equal(np.moveaxis(one, -1, 0), other) for other in x)
    assert arrays(path, channels="last").spec.shape == (c, 8, 6)


@pytest.mark.parametrize("shape", [(4, 4, 2), (4, 4, 4), (5,)])
def test_what_had_no_picture_has_one(tmp_path, shape):
    spec = DataSpec(shape, "continuous", name="mine")
    x = np.random.default_rng(0).uniform(size=(9, *shape)).astype(np.float32)
    (path,) = samples.show(x, spec, tmp_path / "picture", "title")
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("shape", [(2,), (3,), (4, 4, 1)])
def test_names_that_look_like_formulas_are_shown_as_they_are(tmp_path, shape):
    names = ("$\\frac$", "US$ to $_", "$")
    columns = names[: shape[0]] if len(shape) == 1 else None
    spec = DataSpec(shape, "continuous", n_classes=3, class_names=names, columns=columns)
    x, labels = np.random.default_rng(0).uniform(size=(6, *shape)), np.arange(6) % 3
    written = samples.show(x.astype("f"), spec, tmp_path / "a", "$\\x$", cond=labels)
    assert written[0].stat().st_size > 1000


# --- what is said when training starts, and what a row keeps on other data ------------------------


@pytest.mark.slow
def test_training_says_what_was_decided(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, x=GREY // 16, y=PETS)
    run(f"train vae --data mine.npz --conditional {SHORT} --out run")
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("data: ")]
    assert "48 train / 6 valid / 6 test" in line
    assert "3 classes (strings): bird, cat, dog" in line
    assert "whole numbers with 256 levels (uint8)" in line
    assert "mine.npz in the place of digits" in lines
    run("sample run --cond cat --n 3")
    assert (tmp_path / "run" / "samples" / "sample_n3_seed0_condcat.npz").is_file()


def test_a_rows_options_go_along_where_the_data_take_them(tmp_path):
    other = ZOO["vae-mnist"].on("fashion_mnist")
    assert other.data_options == {"binarize": "dynamic"}
    assert genjax.cli._other_data(ZOO["vae-mnist"], other) == (
        "fashion_mnist in the place of mnist; kept binarize=dynamic"
    )
    own = ZOO["vae-mnist"].on(saved(tmp_path, x=X))
    assert "no such option: binarize" in genjax.cli._other_data(ZOO["vae-mnist"], own)


# --- identity -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a file, both in one folder; and one on a text."""
    folder = tmp_path_factory.mktemp("identity")
    rng = np.random.default_rng(5)
    saved(folder, x=rng.integers(0, 17, (60, 4, 4)))
    (folder / "book.txt").write_text("the cat sat on the mat. " * 60)
    before = os.getcwd()
    os.chdir(folder)
    try:
        run(f"train vae --data mine.npz {SHORT} --out run")
        run(
            "train rnn --data book.txt --context 16 --steps 2 --batch-size 4 --d-hidden 4 "
            "--lanes 0 --order shuffle --evaluate-every 0 --sample-every 0 --out text"
        )
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def there(trained, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for name in ("run", "text"):
        path = copy / name / "data.json"
        path.write_text(path.read_text().replace(str(trained), str(copy)))
    monkeypatch.chdir(copy)
    # The copies' checkpoints say where the data were; those are not there any more.
    return copy


@pytest.mark.slow
def test_the_run_and_its_checkpoint_keep_what_the_data_are(trained):
    (one,) = json.loads((trained / "run" / "data.json").read_text())["files"]
    assert one["path"] == str(trained / "mine.npz")
    assert len(one["sha256"]) == 64
    loaded = load(trained / "run")
    assert loaded.files == [one]
    assert loaded.data.data == str(trained / "mine.npz")


@pytest.mark.parametrize("kind", ["pictures", "parquet"])
def test_what_is_kept_of_a_file_is_not_taken_for_another_one(tmp_path, monkeypatch, kind):
    """One that was put in its place with its size and its time, as `cp -p` and `rsync -t` do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rows, "LIMIT", 64)
    table = pytest.importorskip("pyarrow")
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a/0.bmp")
    path.parent.mkdir(exist_ok=True)
    means = []
    for value in (7, 9):
        if kind == "parquet":
            column = table.array(np.full(30, float(value)) + np.arange(30))
            parquet = pytest.importorskip("pyarrow.parquet")
            plain = {"use_dictionary": False, "compression": "none"}  # of one size
            parquet.write_table(table.table({"x": column}), path, **plain)
        else:
            for number in range(10):
                picture = np.full((4, 4), value + number, np.uint8)
                Image.fromarray(picture).save(path.with_name(f"{number}.bmp"))
        every = [path] if kind == "parquet" else sorted(path.parent.iterdir())
        sizes = [one.stat().st_size for one in every]
        for one in every:
            os.utime(one, (1e9, 1e9))
        source = open_source(str(path if kind == "parquet" else path.parent))
        x = source.load().train.x
        means.append((np.sort(x[np.arange(len(x))], axis=None)[0], sizes))
    assert means[0][1] == means[1][1]
    assert means[1][0] - means[0][0] == pytest.approx(2)


def test_a_known_file_is_not_hashed_again(trained, monkeypatch):
    source = open_source(str(trained / "mine.npz"))
    known = files_of(source)
    monkeypatch.setattr("hashlib.file_digest", None)
    assert files_of(source, known) == known


@pytest.mark.slow
def test_changed_values_are_refused_by_evaluate_and_resume(there, capsys):
    report, config = there / "run" / "report.json", there / "run" / "config.json"
    run("evaluate run --n 4")
    kept, settings = report.read_bytes(), config.read_bytes()
    with np.load("mine.npz") as file:
        x = file["x"]
    saved(there, x=np.roll(x, 1, axis=2))
    said = refused(["evaluate", "run"], capsys)
    assert "The data are not those that run was trained on" in said
    assert "genjax evaluate run --data PATH" in said
    (there / "run").rename(there / "my run")
    said = refused(["evaluate", "my run"], capsys)
    assert "genjax evaluate 'my run' --data PATH" in said
    (there / "my run").rename(there / "run")
    assert report.read_bytes() == kept
    for steps in ("--steps 4", "--steps 6"):
        again = f"train vae --data mine.npz {SHORT.replace('--steps 4', steps)} --out run"
        assert "not those that run was trained on" in refused(again.split(), capsys)
        assert config.read_bytes() == settings
    run("sample run --n 2")  # needs no data


@pytest.mark.parametrize("words", ["the tac sat on the mat. ", "the cat sat on the map! "])
def test_another_text_is_refused(there, capsys, words):
    Path("book.txt").write_text(words * 60)
    assert "not those that text was trained on" in refused(["evaluate", "text"], capsys)
    assert not (there / "text" / "report.json").exists()


def test_appended_rows_are_refused(there, capsys):
    with np.load("mine.npz") as file:
        x = file["x"]
    saved(there, x=np.concatenate([x, x[:5]]))
    again = f"train vae --data mine.npz {SHORT} --out run"
    assert "not those that run was trained on" in refused(again.split(), capsys)


def test_a_file_of_the_same_name_elsewhere_is_not_taken(there, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    saved(elsewhere, x=np.zeros((60, 4, 4), int))
    run(f"evaluate {there}/run --n 4")
    report = json.loads((there / "run" / "report.json").read_text())
    assert report["files"][0]["path"] == str(there / "mine.npz")


@pytest.mark.slow
def test_missing_data_are_said_with_what_to_do(there, capsys):
    Path("mine.npz").rename("gone.npz")
    said = refused(["evaluate", "run"], capsys)
    assert "mine.npz, which run was trained on, is not there" in said
    run("evaluate run --data gone.npz --n 4")
    run("sample run --n 2")


@pytest.mark.slow
def test_other_data_are_scored_under_their_own_name(there, capsys):
    run("evaluate run --n 4")
    kept = (there / "run" / "report.json").read_bytes()
    saved(there, "held.npz", x=np.random.default_rng(8).integers(0, 9, (20, 4, 4)))
    run("evaluate run --data held.npz")
    run("evaluate run --split valid")
    report = json.loads((there / "run" / "report-held.json").read_text())
    assert (report["data"], report["n"], report["split"]) == ("held", 20, "all")
    assert (there / "run" / "report.json").read_bytes() == kept
    assert json.loads((there / "run" / "report-valid.json").read_text())["split"] == "valid"
    saved(there, "large.npz", x=np.zeros((20, 5, 5), int))
    assert "shape is (5, 5, 1), the run has (4, 4, 1)" in refused(
        ["evaluate", "run", "--data", "large.npz"], capsys
    )
    saved(there, "deep.npz", x=np.full((20, 4, 4), 40))
    assert "must be in the range 0 to 16" in refused(
        ["evaluate", "run", "--data", "deep.npz"], capsys
    )


@pytest.mark.slow
def test_other_text_is_scored_by_its_symbols(there, capsys):
    Path("more.txt").write_text("a hot mat on the cat. " * 20)
    run("evaluate text --data more.txt")
    Path("odd.txt").write_text("a zebra on the mat. " * 20)
    assert "symbols that the run does not know: 'b', 'r', 'z'" in refused(
        ["evaluate", "text", "--data", "odd.txt"], capsys
    )


def test_one_changed_setting_is_told(there, capsys):
    config = there / "run" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"beta": 1.0', '"beta": 3.0'))
    said = refused(["sample", "run"], capsys)
    assert "config.json is not the one that the checkpoint was saved with" in said
    assert "model.beta: 1.0 in the checkpoint, 3.0 now" in said
    config.write_text(whole)
    spec = there / "run" / "spec.json"
    spec.write_text(spec.read_text().replace('"levels": 17', '"levels": 57'))
    said = refused(["sample", "run"], capsys)
    assert "levels: 17 in the checkpoint, 57 now" in said


def test_differences_name_the_paths():
    was, now = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(was, now) == [
        "a.c: 2 in the checkpoint, 4 now",
        "d: 3 in the checkpoint, None now",
        "e: None in the checkpoint, 5 now",
    ]


def test_a_run_from_before_is_still_read(there):
    """Whose spec has no scale, whose settings do not name one, and which has no data.json."""
    spec = json.loads((there / "run" / "spec.json").read_text())
    for name in ("shift", "scale", "cond_shift", "cond_scale"):
        del spec[name]
    assert DataSpec(**spec) == load(there / "run").model.spec
    config = json.loads((there / "run" / "config.json").read_text())
    del config["data_options"]["standardize"]
    assert from_dict(config, ZOO).data_options["standardize"] == "none"
    (there / "run" / "data.json").unlink()
    assert read_files(there / "run") is None
