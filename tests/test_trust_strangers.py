"""Folders and files of somebody else's: nothing of one's own is written through them, nothing in
them is obeyed, and whatever they hold ends in one message.
"""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from program import refused

import genjax.cli
from genjax.cli.terminal import plain
from genjax.data import FILES, open_source
from genjax.errors import ConfigError, DataError, regular_file, replacing
from genjax.runs.folder import read_config, read_spec

SHORT = "--steps 4 --batch-size 8 --hidden 4 --latent-dim 2 --evaluate-every 0 --sample-every 0"


def run(*args):
    genjax.cli.main(list(args))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    np.savez(folder / "mine.npz", x=np.random.default_rng(0).integers(0, 17, (60, 4, 4)))
    run(
        "train", "vae", "--data", str(folder / "mine.npz"), *SHORT.split(), "--out", f"{folder}/run"
    )
    return folder / "run"


@pytest.fixture
def theirs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


# --- links ----------------------------------------------------------------------------------------


def test_what_is_written_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".a.txt.part", "a.txt"):
        (tmp_path / name).symlink_to(victim)
    with replacing(tmp_path / "a.txt") as temporary:
        assert not temporary.is_symlink()
        temporary.write_text("new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert not (tmp_path / "a.txt").is_symlink()


def test_temporary_names_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
            names.add(temporary.name)
    assert len(names) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.slow
def test_sampling_and_going_on_write_nothing_through_links(theirs, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (theirs / "samples").mkdir(exist_ok=True)
    for name in ("sample_n2_seed0.npz", "sample_n2_seed0.png", ".sample_n2_seed0.npz.part"):
        (theirs / "samples" / name).symlink_to(victim)
    for name in ("metrics.jsonl", "curves.png", "report.json"):
        (theirs / name).unlink(missing_ok=True)
        (theirs / name).symlink_to(victim)
    run("sample", "run", "--n", "2")
    run("evaluate", "run", "--n", "4")
    data = str(theirs.parent / "none")
    config = json.loads((theirs / "config.json").read_text())
    data = config["data"]
    run("train", "vae", "--data", data, *SHORT.split(), "--out", "run")
    assert victim.read_text() == "mine"


@pytest.mark.slow
def test_only_our_own_names_are_swept(theirs, tmp_path):
    elsewhere = tmp_path / "precious"
    shutil.move(theirs / "checkpoints", elsewhere)
    for name in ("photos.part", "old.part2", "7.partial", "99.part"):
        (elsewhere / name).mkdir()
        (elsewhere / name / "file").write_text("mine")
    (theirs / "checkpoints").symlink_to(elsewhere)
    config = json.loads((theirs / "config.json").read_text())
    config["schedule"]["steps"] = 6
    longer = SHORT.replace("--steps 4", "--steps 6")
    (theirs / "config.json").write_text(json.dumps(config))
    run("train", "vae", "--data", config["data"], *longer.split(), "--out", "run")
    assert (elsewhere / "6").is_dir()
    for name in ("photos.part", "old.part2", "7.partial", "99.part"):
        assert (elsewhere / name / "file").read_text() == "mine"


# --- what a terminal would obey -------------------------------------------------------------------


def test_control_characters_are_shown_and_not_obeyed(capsys):
    assert plain("a\x1b[31mb\x07c\rd\n\te") == "a\\x1b[31mb\\x07c\\rd\n\te"
    assert plain("abc\u202edcb") == "abc\\u202edcb"
    assert plain("naïve 日本 🙂") == "naïve 日本 🙂"
    said = refused(["train", "vae", "--data", "x\x1b]0;title\x07.npz"], capsys)
    assert "\x1b" not in said
    assert "\\x1b]0;title" in said


@pytest.mark.slow
def test_samples_of_a_vocabulary_with_control_characters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_bytes(b"ab\x1b[2J\x07 " * 200)
    small = "--context 8 --steps 2 --batch-size 4 --d-hidden 4 --lanes 0 --order shuffle"
    flags = [*small.split(), "--evaluate-every", "0", "--sample-every", "0"]
    run("train", "rnn", "--data", "book.txt", *flags, "--out", "run")
    run("sample", "run", "--n", "4", "--length", "60")
    out = capsys.readouterr()
    assert "\x1b" not in out.out + out.err
    assert "\x07" not in out.out + out.err
    assert "\\x1b" in out.out


# --- settings that somebody wrote -----------------------------------------------------------------


def changed(**more):
    def change(values):
        values.update(more)

    return change


def within(section, **more):
    def change(values):
        values[section].update(more)

    return change


def renamed(values):
    values["model"]["betta"] = values["model"].pop("beta")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        renamed,
        within("model", hidden=[-1]),
        within("model", hidden="wide"),
        within("model", hidden=[[[]]]),
        within("model", latent_dim=1.5),
        within("model", latent_dim=None),
        within("model", latent_dim=10**30),
        within("optimizer", learning_rate="fast"),
        within("optimizer", b1=7),
        within("optimizer", surprise=1),
        within("schedule", steps=-1),
        within("schedule", batch_size=True),
        within("data_options", kind="odd"),
        within("data_options", surprise=1),
        changed(model=None),
        changed(model=[]),
        changed(optimizer=3),
        changed(schedule="long"),
        changed(data_options=None),
        changed(data=None),
        changed(data={"a": 1}),
        changed(data="no such data"),
        changed(recipe=None),
        changed(recipe=[1]),
        changed(recipe="x" * 10_000),
        changed(first=7),
        changed(first={"folder": 1}),
        lambda values: values.pop("model"),
        lambda values: values.clear(),
    ],
)
def test_settings_of_other_names_and_types_are_one_message(theirs, capsys, change):
    path = theirs / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    for command in ("sample", "evaluate"):
        said = refused([command, "run"], capsys)
        assert len(said) < 2000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        "{",
        "\x00",
        "3",
        '"text"',
        '{"shape": [4, 4, 1], "kind": "discrete", "levels": 1e999}',
        "NaN",
    ],
)
@pytest.mark.parametrize("name", ["config.json", "spec.json"])
def test_damaged_settings_are_one_message(theirs, capsys, name, text):
    (theirs / name).write_text(text)
    assert name in refused(["sample", "run"], capsys) or text.startswith('{"shape"')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", "444"),
        ("shape", [4, 4, -1]),
        ("shape", [1e300]),
        ("shape", None),
        ("shape", {}),
        ("kind", "odd"),
        ("kind", ["discrete"]),
        ("levels", "17"),
        ("levels", 17.5),
        ("n_classes", "ten"),
        ("class_names", 3),
        ("vocabulary", [1, 2]),
        ("vocabulary", ["ab", "cd"]),
        ("name", 5),
        ("lengths", "yes"),
        ("scale", [0.0]),
        ("shift", ["a"]),
        ("surprise", 1),
    ],
)
def test_a_spec_of_other_types_is_one_message(theirs, field, value):
    values = json.loads((theirs / "spec.json").read_text())
    values[field] = value
    (theirs / "spec.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"spec\.json is damaged"):
        read_spec(theirs)


def test_bytes_that_are_no_text(theirs):
    (theirs / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        read_config(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "spec.json", "data.json", "metrics.jsonl"])
def test_a_folder_in_the_place_of_a_file(theirs, capsys, name):
    (theirs / name).unlink()
    (theirs / name).mkdir()
    config = theirs / "config.json"
    if name != "config.json":
        data = json.loads(config.read_text())["data"]
        longer = SHORT.replace("--steps 4", "--steps 4")
        refused(["train", "vae", "--data", data, *longer.split(), "--out", "run"], capsys)
    else:
        assert "not a run folder" in refused(["sample", "run"], capsys)


def test_odd_names_among_the_checkpoints(theirs):
    for name in ("²", "٣", "-1", "1e3", "12.part", "x"):
        (theirs / "checkpoints" / name).mkdir()
    (theirs / "checkpoints" / "99").write_text("a file")
    run("sample", "run", "--n", "2")


def test_a_folder_that_stands_on_itself_for_ever(theirs, capsys):
    config = json.loads((theirs / "config.json").read_text())
    config["first"] = {"folder": "run", "step": 4, "hash": "0"}
    (theirs / "config.json").write_text(json.dumps(config))
    (theirs / "first").symlink_to(".")
    assert "stands on more than" in refused(["sample", "run"], capsys)


# --- data -----------------------------------------------------------------------------------------


def test_sampling_shows_where_the_data_were_and_does_not_open_them(theirs, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the data were opened")

    # The module: the package has a function of the same name.
    monkeypatch.setattr(sys.modules["genjax.data.arrays"], "_read", refuse)
    run("sample", "run", "--n", "2")
    assert "the run was trained on " in capsys.readouterr().out


def test_a_pipe_or_a_device_is_no_data(tmp_path, capsys):
    pipe = tmp_path / "pipe.npz"
    os.mkfifo(pipe)
    assert "is a pipe; expected a file" in refused(["train", "vae", "--data", str(pipe)], capsys)
    zero = tmp_path / "zero.npz"
    zero.symlink_to("/dev/zero")
    assert "is a device; expected a file" in refused(["train", "vae", "--data", str(zero)], capsys)


@pytest.mark.parametrize("ending", FILES)
def test_a_pipe_is_no_file_of_any_format(tmp_path, ending):
    """A reader that opens it waits for ever."""
    pipe = tmp_path / f"pipe{ending}"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="is a pipe; expected a file"):
        open_source(pipe)


def test_a_file_is_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    regular_file(tmp_path / "a")
    regular_file(tmp_path / "not there")  # which is said by whoever opens it
    with pytest.raises(DataError, match="is a folder; expected a file"):
        regular_file(tmp_path)
