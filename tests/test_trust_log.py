"""Junk in metrics.jsonl costs its own line only, and JSON that is written is JSON."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import refused

import genjax.cli
from genjax.runs import pictures
from genjax.runs.folder import write_json
from genjax.runs.json_text import dumps, metrics_in
from genjax.runs.log import Log

QUIET = "--steps 4 --batch-size 8 --hidden 4 --latent-dim 2 --evaluate-every 0 --sample-every 0"


def run(*args: str) -> None:
    genjax.cli.main(list(args))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(60, 3)))
    run("train", "vae", "--data", f"{folder}/x.npy", *QUIET.split(), "--out", f"{folder}/run")
    return folder / "run"


GOOD = b'{"step": 10, "seconds": 1.5, "a/loss": 0.5}'
LATER = b'{"step": 30, "seconds": 3.5, "a/loss": 0.25, "b/loss": [1.0, null]}'
JUNK = [
    b"\xff\xfe\x00garbage",
    b"17",
    b"[1, 2]",
    b"null",
    b'"text"',
    b"true",
    b"{}",
    b"not json",
    b'{"step": 20, "a/lo',
    b'{"a/loss": 1.0}',
    b'{"step": null, "a/loss": 1.0}',
    b'{"step": "20", "a/loss": 1.0}',
    b'{"step": 20.5}',
    b'{"step": Infinity}',
    b'{"step": NaN}',
    b'{"step": true}',
    b'{"step": -1}',
    b'{"step": [20]}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b'{"step": 20, "a/loss": 1' + b"0" * 400 + b"}",
    b'{"step": 20, "a/loss": "high"}',
    b'{"step": 20, "a/loss": {"b": 1}}',
    b'{"step": 20, "a/loss": [[1.0]]}',
    b'{"step": 20, "a/loss": []}',
    b'{"step": 20, "a/loss": [1.0, "x"]}',
    b'{"step": 20, "a/loss": false}',
    b"[" * 100_000,
    b"9" * 5000,
]


@pytest.mark.slow
@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk[:30]))
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_junk_costs_its_own_line_only(tmp_path, caplog, junk, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(end.join([junk, GOOD, b"", junk, LATER, b'{"step": 40}', junk]))
    assert [line["step"] for line in pictures.read_metrics(path)] == [10, 30, 40]
    restored = Log(tmp_path)
    restored.restore(30)
    restored({"step": 35, "a/loss": 0.125})
    restored.close()
    restored.draw("title")
    assert "3 lines are no metrics" in caplog.text
    lines = pictures.read_metrics(path)
    assert [line["step"] for line in lines] == [10, 30, 35]
    assert lines[1]["b/loss"][0] == 1.0
    assert math.isnan(lines[1]["b/loss"][1])
    assert lines[2]["seconds"] >= 3.5
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == (junk + b"\n") * 3
    assert (tmp_path / "curves.png").stat().st_size > 1000
    caplog.clear()
    again = Log(tmp_path)
    again.restore(35)
    again.close()
    assert caplog.text == ""
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == (junk + b"\n") * 3


def test_bad_lines_are_added_to_those_before(tmp_path):
    for text in (b"one\n", b"two\n"):
        (tmp_path / "metrics.jsonl").write_bytes(text)
        restored = Log(tmp_path)
        restored.restore(0)
        restored.close()
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == b"one\ntwo\n"


def test_lines_out_of_order_or_of_one_step():
    rows = [b'{"step": 30}', b'{"step": 10, "a": 1}', b'{"step": 10, "a": 2}', b'{"step": 30}']
    lines, bad = metrics_in(b"\n".join(rows))
    assert lines == [{"step": 10, "a": 2}, {"step": 30}]
    assert bad == [b'{"step": 10, "a": 1}']


def test_a_metric_has_as_many_members_as_in_the_first_line():
    rows = [b'{"step": 1, "a": 1}', b'{"step": 2, "b": [1, 2]}', b'{"step": 3, "a": 2}']
    other = [b'{"step": 4, "a": [1, 2]}', b'{"step": 5, "b": [1]}', b'{"step": 6, "b": 1}']
    lines, bad = metrics_in(b"\n".join([*rows, *other]))
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert bad == other
    pictures.curves(lines)


def test_values_that_are_not_finite_cost_no_line():
    lines, bad = metrics_in(b'{"step": 1, "a": Infinity, "b": [NaN, 1.0], "c": 1e999}')
    assert bad == []
    assert repr(lines) == "[{'step': 1, 'a': inf, 'b': [nan, 1.0], 'c': inf}]"


def strict(text: str) -> Any:
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_that_is_written_is_json(tmp_path):
    values = {"a": math.nan, "b": [1.0, -math.inf, {"c": math.inf}], "d": (2, "NaN"), "e": None}
    found = {"a": None, "b": [1.0, None, {"c": None}], "d": [2, "NaN"], "e": None}
    assert strict(dumps(values)) == found
    write_json(tmp_path / "report.json", values)
    assert strict((tmp_path / "report.json").read_text()) == found
    written = Log(tmp_path)
    written.restore(0)
    written({"step": 1, "a/loss": math.nan, "b/loss": [math.inf, 1.0]})
    written.close()
    line = strict((tmp_path / "metrics.jsonl").read_text())
    assert (line["a/loss"], line["b/loss"]) == (None, [None, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "pipe", "unreadable"])
def test_a_log_that_is_no_file_or_cannot_be_read_is_one_message(
    trained, tmp_path, monkeypatch, capsys, kind
):
    (tmp_path / "run").mkdir()
    for name, data in contents(trained).items():
        (tmp_path / "run" / name).write_bytes(data)
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_bytes()
    if kind != "unreadable":
        path.unlink()
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    read = Path.read_bytes

    def fail(self):
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", fail)
    data = str(trained.parent / "x.npy")
    out = ["--out", str(tmp_path / "run")]
    said = refused(["train", "vae", "--data", data, *QUIET.split(), *out], capsys)
    expected = {"folder": "is a folder", "pipe": "is a pipe", "unreadable": "Could not read"}
    assert expected[kind] in said
    monkeypatch.undo()
    assert kind != "unreadable" or path.read_bytes() == before
