"""The log of a run: lines, events and curves, however the run ends."""

from pathlib import Path
from typing import Any

import pytest
from short_runs import events
from tensorboardX.proto.event_pb2 import SessionLog

from genjax.errors import CheckpointError
from genjax.runs import pictures
from genjax.runs.log import Log, logging_in


def test_a_log_is_cut_back_to_the_step_that_training_goes_on_from(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.restore(0)
    for step in (10, 20, 30):
        log({"step": step, "a/loss": 1 / step, "b/loss": [1.0, float("nan")]})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 40, "a/lo')  # killed in the middle of a line
    again = Log(tmp_path)
    again.restore(20)
    again({"step": 25, "a/loss": 7.0})
    again.close()
    lines = pictures.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 25]
    assert lines[1]["a/loss"] == 1 / 20
    assert lines[2]["seconds"] >= lines[1]["seconds"]
    found = events(tmp_path)
    tags = [
        (event.step, [value.tag for value in event.summary.value])
        for event in found
        if event.summary.value
    ]
    members = ["seconds", "a/loss", "b/loss/0", "b/loss/1"]
    assert sorted(tags) == [
        (10, members),
        (20, members),
        (25, ["seconds", "a/loss"]),
        (30, members),
    ]
    # TensorBoard drops what an earlier process logged from the step of a START event on.
    assert [event.step for event in found if event.session_log.status == SessionLog.START] == [
        1,
        21,
    ]


def test_a_log_that_cannot_be_written_names_its_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log(tmp_path)
    log.restore(0)
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(CheckpointError, match=r"Could not write .*metrics\.jsonl: Is a directory"):
        log({"step": 1, "a/loss": 1.0})
    log.close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").write_text("in the way")
    other = Log(tmp_path / "other")
    other.restore(0)
    other({"step": 1, "a/loss": 1.0})
    assert caplog.text.count(f"Could not write {tmp_path}/other/tensorboard (File exists)") == 1
    assert [line["step"] for line in pictures.read_metrics(other.path)] == [1]


def test_curves_are_drawn_however_a_run_ends_and_hide_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(log: Log) -> None:
        log.restore(0)
        log({"step": 1, "a/loss": 1.0})
        raise KeyError("what went wrong")

    with pytest.raises(KeyError, match="what went wrong"), logging_in(tmp_path, "title") as log:
        fail(log)
    assert (tmp_path / "curves.png").stat().st_size > 1000

    def full(*args: Any) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(pictures, "save", full)
    with pytest.raises(KeyError, match="what went wrong"), logging_in(tmp_path, "title"):
        raise KeyError("what went wrong")
    with (
        pytest.raises(CheckpointError, match="the disk is full"),
        logging_in(tmp_path, "title"),
    ):
        pass
