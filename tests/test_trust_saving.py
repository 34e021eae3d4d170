"""Saving under any path, and reading that fails."""

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import genjax.cli
from genjax.data import open_source
from genjax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    WriteError,
    replacing,
)
from genjax.learning import checkpoint, checksums, plain_path
from genjax.learning.checkpoint import Checkpoints
from genjax.protocol import TrainState
from genjax.runs.folder import read_config, read_spec
from genjax.runs.identity import read_files
from genjax.runs.load import load

SHORT = "--steps 4 --batch-size 8 --hidden 4 --latent-dim 2 --evaluate-every 0 --sample-every 0"
ODD = (
    "run[1]",
    "a*b?",
    "[!x]{y,z}",
    "back\\slash",
    "sp ace 'q' \"d\"",
    "new\nline",
    "日本é🙂",
    "dot.",
    "100%41#~$HOME",
    "gs:",
    "not\udcffutf8",
    "/".join(["long" * 50] * 8),
)


def make(step: int = 7) -> TrainState:
    key = jax.random.key(step)
    params = {"w": jax.random.normal(key, (40, 3)), "b": jnp.full(3, step, jnp.bfloat16)}
    return TrainState(
        jnp.asarray(step, jnp.int32), key, {"net": params}, {}, {"net": jnp.arange(5)}
    )


def like() -> TrainState:
    return jax.eval_shape(make)


def bits(state: TrainState) -> list[bytes]:
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def run(*args: str) -> None:
    genjax.cli.main(list(args))


# --- 8: any path ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_checkpoints_work_under_any_path(tmp_path, monkeypatch, name):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    folder = tmp_path / name / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(make(step), {"step": step})
    assert listing(folder) == ["2", "3"]
    for step in (2, 3):
        restored = Checkpoints(folder).restore(like(), step)
        assert restored is not None
        assert bits(restored.state) == bits(make(step))
        assert restored.note == {"step": step}
    assert listing(temporary) == []


def test_a_relative_path_below_a_folder_with_brackets(tmp_path, monkeypatch):
    (tmp_path / "w[1]").mkdir()
    monkeypatch.chdir(tmp_path / "w[1]")
    Checkpoints("c").save(make())
    restored = Checkpoints("c").restore(like())
    assert restored is not None
    assert bits(restored.state) == bits(make())


def test_a_folder_for_temporary_files_with_brackets_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "t[1]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t[1]"))
    Checkpoints(tmp_path / "run[1]").save(make())
    assert Checkpoints(tmp_path / "run[1]").restore(like()) is not None


def test_without_a_place_for_a_link_one_message_says_so(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(CheckpointError, match=r"(?s)Could not save step 7 .*Set TMPDIR .*--out"):
        Checkpoints(tmp_path / "run[1]").save(make())
    Checkpoints(tmp_path / "plain").save(make())  # which needs none


def test_several_processes_have_one_name_for_such_a_folder(tmp_path, monkeypatch):
    """Orbax refuses processes that call a folder by different names."""
    asked: list[str] = []

    def agreed(find):  # process 1, which is told what process 0 found
        asked.append(find())
        return asked[0]

    monkeypatch.setattr(plain_path, "several", lambda: True)
    monkeypatch.setattr(plain_path, "agreed", agreed)
    (tmp_path / "run[1]").mkdir()
    names = []
    for _ in range(2):
        monkeypatch.setattr(plain_path, "_links", {})
        with plain_path.plain_path(tmp_path / "run[1]") as first:
            names.append(first)
        with plain_path.plain_path(tmp_path / "run[1]") as again:  # lasts, for the others
            names.append(again)
    assert len(asked) == 2
    assert {str(name) for name in names} == {asked[0]}
    assert os.path.samefile(names[0], tmp_path / "run[1]")
    for name in asked:
        plain_path._remove(Path(name))
    assert not names[0].exists()


def test_a_linked_folder_of_checkpoints(tmp_path):
    (tmp_path / "disk[2]").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk[2]")
    Checkpoints(tmp_path / "checkpoints").save(make())
    assert listing(tmp_path / "disk[2]") == ["7"]
    assert Checkpoints(tmp_path / "checkpoints").restore(like()) is not None


@pytest.mark.slow
def test_a_run_below_brackets_with_a_default_name_that_has_them(tmp_path, monkeypatch, capsys):
    (tmp_path / "w[1]").mkdir()
    monkeypatch.chdir(tmp_path / "w[1]")
    np.save("img[1].npy", np.random.default_rng(0).integers(0, 17, (60, 4, 4)).astype(np.uint8))
    command = ["train", "vae", "--data", "img[1].npy", *SHORT.split()]
    run(*command)
    (folder,) = Path("runs").iterdir()
    assert "data=img[1].npy" in folder.name
    assert Checkpoints(folder / "checkpoints").steps() == [4]
    run("sample", str(folder), "--n", "2")
    run("evaluate", str(folder), "--n", "4")
    run(*command)
    assert "nothing is left to train" in capsys.readouterr().out


# --- 8: what was saved is read back ---------------------------------------------------------------


def other_values(path, tree, save, **kwargs):
    save(path, jax.tree.map(jnp.zeros_like, tree), **kwargs)


def a_leaf_less(path, tree, save, **kwargs):
    save(path, tree._replace(opt={}), **kwargs)


def another_dtype(path, tree, save, **kwargs):
    save(path, tree._replace(step=tree.step.astype(jnp.float32)), **kwargs)


def no_arrays(path, tree, save, **kwargs):
    """As Orbax does where it does not find its own folder."""
    save(path, tree, **kwargs)
    (Path(path) / "state" / "manifest.ocdbt").unlink()
    shutil.rmtree(Path(path) / "state" / "d")


def nothing(path, tree, save, **kwargs):
    save(path, tree, **kwargs)
    shutil.rmtree(Path(path) / "state")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [other_values, a_leaf_less, another_dtype, no_arrays, nothing])
def test_what_does_not_read_back_is_no_checkpoint(tmp_path, monkeypatch, wrong):
    checkpoints, save = Checkpoints(tmp_path), ocp.save
    checkpoints.save(make(1))
    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save", lambda path, tree, **more: wrong(path, tree, save, **more))
        with pytest.raises(
            CheckpointError, match=r"Could not save step 2 .* step 1 is still there"
        ):
            checkpoints.save(make(2))
    assert listing(tmp_path) == ["1"]
    checkpoints.save(make(2))
    assert listing(tmp_path) == ["1", "2"]


def test_large_arrays_are_not_compared_but_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "READ_BACK", 100)
    monkeypatch.setattr(checkpoint.np, "empty", lambda shape, dtype: np.zeros(shape, dtype))
    Checkpoints(tmp_path).save(make())
    assert Checkpoints(tmp_path).restore(like()) is not None


def test_an_empty_checkpoint_of_an_earlier_version_is_said(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    no_arrays(str(tmp_path / "7"), make()._replace(key=jnp.zeros(2)), ocp.save)
    sums = checkpoint.checksums(tmp_path / "7")
    (tmp_path / "7" / checkpoint.CHECKSUMS).write_text(checkpoint.json.dumps(sums))
    with pytest.raises(CheckpointError, match=r"7 holds no arrays: .*Move .* away and train again"):
        checkpoints.restore(like())


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def note_rename(source, target, **kwargs):
        if Path(target).name == "7":
            found = {str(path) for path in Path(source).rglob("*")}
            assert found | {str(source)} <= set(done)
            done.append("renamed")
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    Checkpoints(tmp_path).save(make())
    assert str(tmp_path) in done[done.index("renamed") :]


def test_a_disk_that_does_not_keep_what_was_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("before")

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError, match="Input/output error"), replacing(tmp_path / "a") as part:
        part.write_text("after")
    assert (tmp_path / "a").read_text() == "before"
    with pytest.raises(CheckpointError, match="Could not save step 7"):
        Checkpoints(tmp_path / "c").save(make())
    assert Checkpoints(tmp_path / "c").steps() == []


# --- 9: a read that fails is no damage ------------------------------------------------------------

FAILURES = [
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EMFILE, "Too many open files"),
    MemoryError(),
]


def two(folder: Path) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    checkpoints.save(make(10))
    checkpoints.save(make(20))
    return checkpoints


def refuses_to_read(checkpoints: Checkpoints) -> None:
    """One message, and nothing else happens."""
    before = listing(checkpoints.folder)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(like())
    assert "ould not read" in str(caught.value) or "could not be read" in str(caught.value)
    assert "Delete" not in str(caught.value)
    assert "Nothing was changed" in str(caught.value)
    assert listing(checkpoints.folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("which", ["", "/state", checkpoint.CHECKSUMS])
def test_a_failed_read_is_told_apart_from_damage(tmp_path, monkeypatch, failure, which):
    checkpoints = two(tmp_path)
    reads = {name: getattr(os, name) for name in ("open", "scandir")}
    path, read = Path(f"{tmp_path}/20"), open

    def fails(name) -> bool:
        return str(name).endswith(which) if which else str(name).startswith(f"{path}/")

    def fail(name, *args, **kwargs):
        if fails(name):
            raise failure
        return read(name, *args, **kwargs)

    def fail_to_list(name="."):
        if which != checkpoint.CHECKSUMS and fails(name):
            raise failure
        return reads["scandir"](name)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fail)
        patch.setattr("io.open", fail)
        patch.setattr(os, "scandir", fail_to_list)
        refuses_to_read(checkpoints)
    restored = checkpoints.restore(like())
    assert restored is not None
    assert (int(restored.state.step), restored.passed_over) == (20, {})


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(tmp_path, monkeypatch, failure):
    checkpoints = two(tmp_path)

    def fail(*args):
        raise failure

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(CheckpointError, match="Could not read"):
        checkpoints.restore(like())


@pytest.mark.slow
@pytest.mark.parametrize("failure", [*FAILURES, ValueError("RESOURCE_EXHAUSTED: x")])
@pytest.mark.parametrize("call", ["load", "metadata"])
def test_orbax_failing_on_whole_files_is_no_damage(tmp_path, monkeypatch, failure, call):
    checkpoints = two(tmp_path)

    def fail(*args):
        raise failure

    monkeypatch.setattr(ocp, call, fail)
    refuses_to_read(checkpoints)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["20", "20/state", "20/checksums.json", "."])
def test_files_without_the_permission_to_read(tmp_path, name):
    checkpoints = two(tmp_path / "c")
    path = tmp_path / "c" / name
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with pytest.raises(CheckpointError, match=r"Could not read .*Permission denied"):
            checkpoints.restore(like())
    finally:
        path.chmod(mode)
    assert listing(tmp_path / "c") == ["10", "20"]


def test_one_damaged_checkpoint_that_was_asked_for_is_no_reason_to_delete_the_others(tmp_path):
    checkpoints = two(tmp_path)
    (tmp_path / "10" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match=r"^The checkpoint of step 10 is damaged") as caught:
        checkpoints.restore(like(), 10)
    assert "Delete" not in str(caught.value)


def test_a_reader_that_is_overtaken_reads_the_next(tmp_path, monkeypatch):
    """A process that trains deletes what a reader has just chosen."""
    checkpoints, damage = two(tmp_path), checkpoint.damage_of

    def overtaken(folder, called):
        if folder.name == "20":
            checkpoints.save(make(30))
            shutil.rmtree(folder)
        return damage(folder, called)

    monkeypatch.setattr(checkpoint, "damage_of", overtaken)
    restored = Checkpoints(tmp_path).restore(like())
    assert restored is not None
    assert (int(restored.state.step), restored.passed_over) == (30, {})


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("read", [read_config, read_spec, read_files])
def test_settings_that_cannot_be_read_are_not_called_damaged(tmp_path, monkeypatch, failure, read):
    for name in ("config.json", "spec.json", "data.json"):
        (tmp_path / name).write_text("{}")

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ConfigError, match="Could not read") as caught:
        read(tmp_path)
    assert "is damaged" not in str(caught.value)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("ending", ["npz", "npy"])
def test_data_that_cannot_be_read_are_not_called_damaged(tmp_path, monkeypatch, failure, ending):
    """Nor is it advised to write them again."""
    path = tmp_path / f"x.{ending}"
    with path.open("wb") as file:
        (np.savez if ending == "npz" else np.save)(file, np.zeros((60, 3)))

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(np, "load", fail)
    monkeypatch.setattr(sys.modules["genjax.data.arrays"], "in_npy", fail)
    with pytest.raises(DataError, match=r"cannot be read|more than there is memory for") as caught:
        open_source(path)
    assert "damaged" not in str(caught.value)


@pytest.mark.slow
def test_a_run_that_cannot_be_read_is_not_trained_anew(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 3)))
    command = ["train", "vae", "--data", str(tmp_path / "x.npy"), *SHORT.split()]
    run(*command, "--out", str(tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()

    def fail(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(checksums, "checksums", fail)
    with pytest.raises(SystemExit):
        run(*command, "--out", str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="Could not read the checkpoint"):
        load(tmp_path / "run")
    assert listing(tmp_path / "run" / "checkpoints") == ["4"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
