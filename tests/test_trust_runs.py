"""What must cost no checkpoint and no file: hooks that fail, terminals that lack characters, other
samples of the same name.
"""

import ast
import errno
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import arrays_in, environment

import genjax
import genjax.cli
from genjax.cli import file_names
from genjax.cli.failures import streams
from genjax.cli.terminal import say
from genjax.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError, WriteError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import Feed, Hook, fit
from genjax.protocol import Training, TrainState
from genjax.runs import log, pictures, samples
from genjax.runs import train as training
from genjax.runs.folder import write_json

SHORT = "--steps 4 --batch-size 8 --hidden 4 --latent-dim 2"
QUIET = f"{SHORT} --evaluate-every 0 --sample-every 0"


def run(*args: str) -> None:
    genjax.cli.main(list(args))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(60, 3)))
    run("train", "vae", "--data", f"{folder}/x.npy", *QUIET.split(), "--out", f"{folder}/run")
    return folder / "run"


# --- hooks ----------------------------------------------------------------------------------------


def counting() -> Feed:
    """Training that counts its steps."""

    def init(key):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, key, {"net": jnp.zeros(3)}, {}, {})

    def step(state, payload):
        metrics = {"net/loss": state.step[None].astype(jnp.float32)}
        return state._replace(step=state.step + 1), metrics

    t = Training(init, step, lambda wrap: t)
    return Feed(lambda k: t, lambda step, k: None, prefetch=False)


def fitted(folder: Path, **more: Any) -> TrainState:
    settings = {"steps": 6, "steps_per_call": 1, "log_every": 1, "checkpoint_every": 2}
    where = {"key": jax.random.key(0), "checkpoints": Checkpoints(folder)}
    return fit(counting(), **settings, **where, **more)


def failing(error: BaseException):
    def call(*args):
        raise error

    return call


ORDINARY = [
    UnicodeEncodeError("charmap", "Я", 0, 1, "character maps to <undefined>"),
    WriteError("Could not write picture.png: No space left on device."),
    OSError(errno.ENOSPC, "No space left on device"),
    ConfigError("no such sampler"),
    ValueError("shapes"),
    ZeroDivisionError(),
    AssertionError(),
    MemoryError(),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."),
]


@pytest.mark.slow
@pytest.mark.parametrize("error", ORDINARY, ids=lambda error: type(error).__name__)
def test_a_hook_that_fails_is_said_once_and_costs_nothing(tmp_path, caplog, error):
    seen: list[int] = []
    lines: list[dict[str, Any]] = []
    hooks = [
        Hook(1, failing(error), "the picture"),
        Hook(2, lambda step, state: seen.append(step), "the other"),
        Hook(3, lambda step, state: {"valid/bound": 1.0}),
    ]
    state = fitted(tmp_path, hooks=hooks, log=lines.append, progress=failing(error))
    assert int(state.step) == 6
    assert Checkpoints(tmp_path).steps() == [2, 4, 6]
    assert seen == [2, 4, 6]
    assert [line["step"] for line in lines if "valid/bound" in line] == [3, 6]
    assert [line["net/loss"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert caplog.text.count("the picture failed") == caplog.text.count("progress bar failed") == 1
    assert "At step 1 the picture failed" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        NonFiniteError("nan"),
        Interrupted("stop", 15),
        CheckpointError("could not save"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_must_stop_a_run_still_does(tmp_path, error):
    with pytest.raises(type(error)):
        fitted(tmp_path, hooks=[Hook(3, failing(error))])
    assert Checkpoints(tmp_path).steps() == [2]


def test_a_log_that_cannot_be_written_stops_a_run_that_is_saved_first(tmp_path):
    def full(line):
        if line["step"] == 3:
            raise WriteError("Could not write metrics.jsonl: No space left on device.")

    with pytest.raises(WriteError):
        fitted(tmp_path, log=full)
    assert Checkpoints(tmp_path).steps() == [2, 3]


@pytest.mark.slow
def test_a_run_whose_pictures_scores_events_and_curves_all_fail(tmp_path, monkeypatch, capsys):
    error = UnicodeEncodeError("charmap", "Я", 0, 1, "character maps to <undefined>")
    for where, name in (
        (samples, "show"),
        (training, "estimate"),
        (pictures, "curves"),
        (log, "_event"),
    ):
        monkeypatch.setattr(where, name, failing(error))
    every = "--evaluate-every 1 --sample-every 1 --checkpoint-every 2 --steps-per-call 1"
    run("train", "vae-ring", *SHORT.split(), *every.split(), "--out", str(tmp_path / "run"))
    said = capsys.readouterr().err
    assert said.count("genjax: warning: ") == 4
    for what in ("the picture of samples failed", "the evaluation on the validation split failed"):
        assert said.count(what) == 1
    assert said.count("tensorboard") == said.count("curves.png could not be drawn") == 1
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [2, 4]
    assert len(pictures.read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


# --- text -----------------------------------------------------------------------------------------


def text_calls(path: Path):
    """The calls in a file that read or write text, or may."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if ast.unparse(called) in ("os.open", "tarfile.open", "Image.open"):
            continue
        if name in ("read_text", "write_text", "open", "fdopen", "NamedTemporaryFile"):
            yield node


@pytest.mark.slow
def test_text_is_utf_8_everywhere():
    found = []
    for path in sorted(Path(genjax.__file__).parent.rglob("*.py")):
        for node in text_calls(path):
            given = [*node.args, *(one.value for one in node.keywords)]
            texts = [one.value for one in given if isinstance(one, ast.Constant)]
            binary = any(isinstance(text, str) and "b" in text.strip("rwax+") for text in texts)
            named = any(one.arg == "encoding" for one in node.keywords) or "utf-8" in texts
            if not (binary or named):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_terminal_that_has_not_all_characters_shows_escapes(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with streams():
        say("Яx \udcff é")
    shown = raw.getvalue().decode(encoding)
    assert shown.endswith(" é\n" if encoding != "ascii" else " \\xe9\n")
    assert "\\udcff" in shown
    assert ("Я" if encoding == "utf-8" else "\\u042f") in shown


@pytest.mark.slow
def test_cyrillic_text_in_a_terminal_that_has_none(tmp_path):
    (tmp_path / "book.txt").write_text("Съешь же ещё этих мягких булок ☃ " * 60, encoding="utf-8")
    small = "--context 8 --steps 4 --batch-size 4 --d-hidden 4 --lanes 0 --order shuffle"
    every = "--sample-every 2 --evaluate-every 2 --checkpoint-every 2 --steps-per-call 1"
    old = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    env = environment() | old | {"PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "genjax"]
    first = ["train", "rnn", "--data", "book.txt", *small.split(), *every.split(), "--out", "ru"]
    for args in (first, ["sample", "ru", "--n", "2"], ["evaluate", "ru"]):
        done = subprocess.run(
            command + args, cwd=tmp_path, env=env, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert b"warning" not in done.stderr
    shown = (tmp_path / "ru" / "samples" / "step_00000004.txt").read_text(encoding="utf-8")
    assert set(shown) & set("Съешьжещёэтихмягкихбулок☃")


# --- names of samples and reports -----------------------------------------------------------------


def stem(folder: Path, arrays, prompt=None, cond=None, **asked) -> Path:
    options = SimpleNamespace(
        run=folder, seed=0, cond=cond, means=False, film=False, which="newest", sigma_rel=None
    )
    asked |= {} if prompt is None else {"prompt": prompt}
    return file_names.sample_stem(options, 2, asked, arrays)


SETTINGS = [
    {},
    {"prompt": "a"},
    {"prompt": "b"},
    {"prompt": "a" * 300},
    {"prompt": "a" * 299 + "b"},
    {"cond": "cat"},
    {"cond": "Cat"},
    {"cond": "a/b"},
    {"cond": "a_b"},
    {"cond": "a:b"},
    {"cond": "кошка"},
    {"cond": "мышка"},
    {"cond": "0_prompt"},
    {"cond": "x" * 400},
    {"cond": "x" * 401},
    {"temperature": 0.5},
    {"temperature": 0.51},
    {"prompt": "a", "temperature": 0.5},
    {"top_k": 3, "temperature": 0.5},
    {"cond": "0", "guidance": 2.0},
    {"cond": "0_guidance2.0"},
]


@pytest.mark.parametrize("order", [1, -1])
def test_samples_of_other_settings_have_other_names(tmp_path, order):
    (tmp_path / "samples").mkdir()
    kept = {}
    for again in range(2):  # the second time as after more training, with other samples
        for index, settings in enumerate(SETTINGS[::order]):
            path = stem(tmp_path, {"x": np.asarray([index, again])}, **settings)
            assert path.parent == tmp_path / "samples"
            np.savez(path.with_name(path.name + ".npz"), x=np.asarray([index, again]))
            kept[index] = path
        assert len(set(kept.values())) == len(SETTINGS)
        for index, path in kept.items():
            assert arrays_in(f"{path}.npz")["x"].tolist() == [index, again]


@pytest.mark.slow
def test_a_name_that_was_given_twice_is_numbered(trained, tmp_path, capsys):
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"a picture of my own")
    for seed in ("0", "1", "0", "1"):
        run("sample", str(trained), "--n", "2", "--seed", seed, "--out", str(tmp_path / "a"))
    assert f"{tmp_path}/a is taken by something else" in capsys.readouterr().out
    run("sample", str(trained), "--n", "2", "--out", str(tmp_path / "mine"))
    assert mine.read_bytes() == b"a picture of my own"
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".npz"} == {
        "a.npz",
        "a-2.npz",
        "mine-2.npz",
    }
    first, second = arrays_in(tmp_path / "a.npz")["x"], arrays_in(tmp_path / "a-2.npz")["x"]
    assert (first != second).any()
    np.testing.assert_array_equal(first, arrays_in(tmp_path / "mine-2.npz")["x"])


@pytest.mark.slow
def test_the_report_of_another_split_is_another_file(trained):
    run("evaluate", str(trained), "--n", "4")
    before = (trained / "report.json").read_bytes()
    for split in ("valid", "train", "all"):
        run("evaluate", str(trained), "--n", "4", "--split", split)
        report = json.loads((trained / f"report-{split}.json").read_text())
        assert report["split"] == split
    assert (trained / "report.json").read_bytes() == before


def test_reports_about_other_things_are_kept_apart_where_their_names_are_one(tmp_path):
    """Files of one name in two folders; data that are called like a split or a checkpoint."""

    def written(split, data, sha256, which="newest", n=100):
        files = [{"sha256": sha256}]
        report = {"data": data or "own", "split": split, "which": which, "files": files, "n": n}
        path = file_names.report_path(tmp_path / file_names.report_name(split, data, which), report)
        write_json(path, report)
        return path.name

    (tmp_path / "report.json").write_text("{")  # damaged
    assert written("test", None, "a") == "report.json"
    assert written("valid", None, "a") == "report-valid.json"
    assert written("all", "valid", "b") == "report-valid-2.json"
    assert written("all", "t", "c") == "report-t.json"
    assert written("all", "t", "d") == "report-t-2.json"
    assert written("all", "t", "d") == "report-t-2.json"
    assert written("all", "t", "c") == "report-t.json"
    assert written("all", "best", "e") == "report-best.json"
    assert written("test", None, "a", "best") == "report-best-2.json"
    assert written("valid", None, "a") == "report-valid.json"


def test_a_cheaper_report_does_not_replace_a_dearer_one(tmp_path):
    def written(estimator, figures=()):
        report = {"data": "own", "split": "test", "which": "newest", "n": 4}
        report |= {"estimator": estimator} | ({"figures": list(figures)} if figures else {})
        path = file_names.report_path(tmp_path / "report.json", report)
        write_json(path, report)
        return path.name

    assert written("K=5000", ["FD"]) == "report.json"
    assert written("K=1") == "report-2.json"
    assert written("K=5000") == "report-3.json"
    assert written("K=5000", ["FD"]) == "report.json"


def test_a_glance_at_a_few_examples_does_not_replace_the_report_of_all(tmp_path):
    def written(n):
        report = {"data": "own", "split": "test", "which": "newest", "n": n}
        path = file_names.report_path(tmp_path / "report.json", report)
        write_json(path, report)
        return path.name

    assert written(4) == "report.json"
    assert written(360) == "report.json"
    assert written(4) == "report-2.json"
    assert written(8) == "report-2.json"
    assert written(360) == "report.json"
