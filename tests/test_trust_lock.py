"""Two processes in one run folder: one trains, the other is told, and a kill leaves no lock."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from program import BIN, environment, program, refused, start

import genjax.cli
from genjax.errors import CheckpointError, ConfigError, WriteError
from genjax.learning.checkpoint import Checkpoints
from genjax.runs import lock
from genjax.runs.folder import check_folder
from genjax.runs.lock import locked

QUIET = "--steps 4 --batch-size 8 --hidden 4 --latent-dim 2 --evaluate-every 0 --sample-every 0"


def run(*args: str) -> None:
    genjax.cli.main(list(args))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(60, 3)))
    run("train", "vae", "--data", f"{folder}/x.npy", *QUIET.split(), "--out", f"{folder}/run")
    return folder / "run"


@pytest.mark.slow
def test_a_second_process_is_refused_with_the_first_ones_name(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    commands = [["train", "vae"], ["sweep", "vae-ring", "--seeds", "2"]]
    with locked(folder, pytest.fail):
        owner = json.loads((folder / ".lock").read_text())
        assert (owner["host"], owner["process"]) == (os.uname().nodename, os.getpid())
        owner["process"] = 4242
        (folder / ".lock").write_text(json.dumps(owner))
        for command in commands:
            said = refused([*command, *QUIET.split(), "--out", str(folder)], capsys)
            assert f"process 4242 on {os.uname().nodename}" in said
            assert "disk" not in said
        assert os.listdir(folder) == [".lock"]
        with pytest.raises(CheckpointError, match="is in use"), locked(folder, pytest.fail):
            pass
    assert os.listdir(folder) == []
    with locked(trained, pytest.fail):  # readers need none
        run("sample", str(trained), "--n", "2")
        run("evaluate", str(trained), "--n", "4")


HOLD = (
    "import sys, time, pathlib; from genjax.runs.lock import locked\n"
    "with locked(pathlib.Path(sys.argv[1]), print): print('held', flush=True); time.sleep(600)"
)


def test_a_lock_ends_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(CheckpointError, match=rf"in use: process {process.pid} on "),
            locked(tmp_path, pytest.fail),
        ):
            pass
        process.kill()
    assert (tmp_path / ".lock").is_file()
    with locked(tmp_path, pytest.fail):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_was_deleted_by_the_one_before_is_made_anew(tmp_path, monkeypatch):
    opened, times = os.open, []

    def delete(path, *args, **kwargs):
        descriptor = opened(path, *args, **kwargs)
        if str(path).endswith(".lock") and not times:
            times.append(path)
            os.unlink(path)
        return descriptor

    monkeypatch.setattr(os, "open", delete)
    with locked(tmp_path, pytest.fail):
        assert (tmp_path / ".lock").is_file()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def fail(*args):
        raise OSError(code, "not supported")

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    said: list[str] = []
    with locked(tmp_path, said.append):
        pass
    assert f"{tmp_path} has no locks" in said[0]
    owner = {"host": os.uname().nodename, "process": os.getppid(), "started": "today"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    with pytest.raises(CheckpointError, match=f"process {os.getppid()}"), locked(tmp_path, print):
        pass
    for gone in ({"process": 2**22 + 1}, {"host": "another"}, {"process": "?"}):
        (tmp_path / ".lock").write_text(json.dumps(owner | gone))
        with locked(tmp_path, said.append):
            pass
    assert len(said) == 4


def test_a_lock_is_not_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(victim)
    with pytest.raises(WriteError), locked(tmp_path / "run", print):
        pass
    assert victim.read_text() == "mine"


def test_a_folder_that_is_no_run_gets_no_lock(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    said = refused(["train", "vae", *QUIET.split(), "--out", str(tmp_path)], capsys)
    assert "is not a run folder; nothing was written" in said
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_what_a_kill_leaves_before_the_settings_does_not_block_a_folder(tmp_path):
    (tmp_path / ".lock").write_text("{}")
    (tmp_path / ".0123456789abcdef.part").write_text('{"half')
    check_folder(tmp_path)
    (tmp_path / ".hidden").write_text("mine")
    with pytest.raises(ConfigError, match="is not a run folder"):
        check_folder(tmp_path)


@pytest.mark.slow
def test_two_at_once_and_a_kill(tmp_path):
    """One of two trains, the other is told; what a kill leaves is gone on with."""
    assert BIN.is_dir()
    flags = "--steps 100000 --steps-per-call 10 --checkpoint-every 10 --hidden 4 --latent-dim 2"
    command = ["train", "vae", "--batch-size", "8", *flags.split(), "--out", "run[1]"]
    first, second = start(command, tmp_path), start(command, tmp_path)
    try:
        end = time.monotonic() + 200
        while first.poll() is None and second.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        loser, other = (first, second) if first.poll() is not None else (second, first)
        _, err = loser.communicate()
        assert loser.returncode == 2
        assert f"in use: process {other.pid} on " in err
        checkpoints = Checkpoints(tmp_path / "run[1]" / "checkpoints")
        while not checkpoints.steps():
            assert time.monotonic() < end
            time.sleep(0.05)
        other.send_signal(signal.SIGKILL)
        other.communicate()
        steps = checkpoints.steps()
        done = start(command, tmp_path)
        while checkpoints.steps() <= steps:
            assert done.poll() is None
            time.sleep(0.05)
        done.send_signal(signal.SIGTERM)
        out, _ = done.communicate(timeout=60)
        assert done.returncode == 143
        assert f"going on from step {steps[-1]} " in out
    finally:
        for process in (first, second):
            process.kill()
    program(["sample", "run[1]", "--n", "2"], tmp_path)
