"""Checkpoints: what is read is what was written, bit for bit, or is refused; and a failed save
loses nothing.
"""

import errno
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from genjax.errors import CheckpointError, ConfigError
from genjax.learning.checkpoint import Checkpoints, difference
from genjax.learning.optim import track_ema
from genjax.protocol import TrainState

NOTE = {"window": {"net/loss": [0.1, 1 / 3, float("inf")], "net/members": [[1.5, float("nan")]]}}


def make(step: int = 7, width: int = 5, members: int | None = None) -> TrainState:
    """A state with everything that a run can carry: typed keys, bfloat16, int32, empty dicts and
    optax's named tuples.
    """
    root = jax.random.key(step)
    key = root if members is None else jax.random.split(root, members)
    net = {
        "w": jax.random.normal(root, (width, 3)).astype(jnp.bfloat16),
        "b": jax.random.normal(jax.random.fold_in(root, 1), (width,)),
        "nothing": {},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3), track_ema(0.9))
    state = {
        "net": {
            "count": jnp.asarray(step * 3, jnp.int32),
            "codes": jnp.arange(4, dtype=jnp.uint8),
            "noise": root,
        }
    }
    return TrainState(jnp.asarray(step, jnp.int32), key, {"net": net}, state, {"net": tx.init(net)})


def plain(tree) -> list[np.ndarray]:
    """The leaves on the host, PRNG keys as their data."""
    return [
        np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for leaf in jax.tree.leaves(tree)
    ]


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
    for x, y in zip(plain(a), plain(b), strict=True):
        assert x.tobytes() == y.tobytes()


def shapes(state: TrainState) -> TrainState:
    return jax.eval_shape(lambda: state)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def two(folder: Path) -> tuple[Checkpoints, TrainState, TrainState]:
    """Checkpoints of steps 10 and 20."""
    checkpoints, old, new = Checkpoints(folder), make(10), make(20)
    checkpoints.save(old, {"which": "old"})
    checkpoints.save(new, {"which": "new"})
    return checkpoints, old, new


@pytest.mark.slow
@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize("as_shapes", [True, False])
def test_what_is_restored_is_what_was_saved_bit_for_bit(
    tmp_path: Path, members: int | None, as_shapes: bool
) -> None:
    state = make(members=members)
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.restore(shapes(state)) is None
    checkpoints.save(state, NOTE)
    restored = Checkpoints(tmp_path / "c").restore(
        shapes(state) if as_shapes else make(0, members=members)
    )
    assert restored is not None
    assert_same(restored.state, state)
    assert repr(restored.note) == repr(NOTE)  # repr, because NaN != NaN
    assert restored.passed_over == {}
    assert jax.random.key_impl(restored.state.key) == jax.random.key_impl(state.key)


def test_keys_of_another_implementation_come_back_as_such(tmp_path: Path) -> None:
    state = make()._replace(key=jax.random.key(3, impl="rbg"))
    Checkpoints(tmp_path).save(state)
    restored = Checkpoints(tmp_path).restore(shapes(state))
    assert restored is not None
    assert_same(restored.state, state)


def test_saving_does_not_consume_the_state_and_a_step_is_saved_once(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path), make(5)
    path = checkpoints.save(state, {"first": True})
    before = [file.read_bytes() for file in files(path)]
    assert checkpoints.save(state, {"first": False}) == path
    assert [file.read_bytes() for file in files(path)] == before
    assert_same(state, make(5))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 30, 4):
        checkpoints.save(make(step))
        assert len(checkpoints.steps()) <= 2
    assert checkpoints.steps() == [4, 30]
    older = checkpoints.restore(shapes(make()), step=4)
    assert older is not None
    assert_same(older.state, make(4))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2 .* there are: \[4, 30\]"):
        checkpoints.restore(shapes(make()), step=2)


def damages(path: Path):
    """A file's contents with one byte flipped (first, middle, last), cut in half, and empty; and
    None for a missing file.
    """
    whole = path.read_bytes()
    for index in sorted({0, len(whole) // 2, len(whole) - 1} if whole else ()):
        yield whole[:index] + bytes([whole[index] ^ 0x10]) + whole[index + 1 :]
    yield whole[: len(whole) // 2]
    yield b""
    yield None


@pytest.mark.slow
def test_no_damage_to_any_file_is_ever_read_as_something_else(tmp_path: Path) -> None:
    checkpoints, old, new = two(tmp_path)
    fell_back: set[str] = set()
    for path in files(tmp_path / "20"):
        whole = path.read_bytes()
        for damaged in damages(path):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            restored = checkpoints.restore(shapes(new))
            assert restored is not None
            if restored.passed_over:
                assert list(restored.passed_over) == [tmp_path / "20"]
                assert restored.note == {"which": "old"}
                assert_same(restored.state, old)
                fell_back.add(path.parent.name)
            else:  # a file that restoring does not need
                assert restored.note == {"which": "new"}
                assert_same(restored.state, new)
        path.write_bytes(whole)
    assert {"20", "state", "d"} <= fell_back, (
        "metadata, structure and arrays must all have been hit"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"], (
        "reading changes nothing"
    )


def test_every_byte_of_the_arrays_counts(tmp_path: Path) -> None:
    """Orbax alone reads a flipped byte in the weights without a word; the checksum does not."""
    state = make(1)._replace(params={"net": jnp.arange(4096.0)}, state={}, opt={})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    biggest = max(files(tmp_path / "1"), key=lambda path: path.stat().st_size)
    whole = biggest.read_bytes()
    for index in np.random.default_rng(0).integers(0, len(whole), 20):
        biggest.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(
            CheckpointError,
            match=r"No whole checkpoint is left:\n  .*/1: .*\nDelete the run folder",
        ):
            checkpoints.restore(shapes(state))


def test_a_changed_note_is_noticed(tmp_path: Path) -> None:
    checkpoints, old, _ = two(tmp_path)
    path = tmp_path / "20" / "_CHECKPOINT_METADATA"
    assert path.read_text().count('"new"') == 1
    path.write_text(path.read_text().replace('"new"', '"now"'))
    restored = checkpoints.restore(shapes(old))
    assert restored is not None
    assert restored.passed_over == {
        tmp_path / "20": "_CHECKPOINT_METADATA holds other bytes than were saved"
    }
    assert_same(restored.state, old)


@pytest.mark.slow
def test_damaged_ones_are_set_aside_and_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, old, new = two(tmp_path)
    for name in ("20.damaged", "20.damaged2"):  # damage may strike twice
        shutil.rmtree(tmp_path / "20" / "state" / "d")
        restored = checkpoints.restore(shapes(old))
        assert restored is not None
        assert_same(restored.state, old)
        caplog.clear()
        checkpoints.set_aside_damaged(restored)
        assert f"{tmp_path / name}" in caplog.text
        assert (tmp_path / name).is_dir()
        assert checkpoints.steps() == [10]
        checkpoints.save(new, {"which": "again"})
    restored = checkpoints.restore(shapes(old))
    assert restored is not None
    assert restored.note == {"which": "again"}
    assert_same(restored.state, new)


def test_a_half_written_save_is_not_a_checkpoint_and_is_swept_away(tmp_path: Path) -> None:
    checkpoints, _, new = two(tmp_path)
    for name in ("30.part", "30.part.orbax-checkpoint-tmp"):
        shutil.copytree(tmp_path / "20", tmp_path / name)
        shutil.rmtree(tmp_path / name / "state" / "d")
    assert checkpoints.steps() == [10, 20]
    restored = checkpoints.restore(shapes(new))
    assert restored is not None
    assert_same(restored.state, new)
    checkpoints.save(make(30))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20", "30"]


def test_another_model_is_refused_with_the_leaves_that_differ(tmp_path: Path) -> None:
    checkpoints, _, _ = two(tmp_path)
    wider = make(width=6)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(shapes(wider))
    text = str(caught.value)
    assert text.startswith(f"The checkpoint {tmp_path / '20'} is not of this model:")
    assert "params/net/w: in the checkpoint bfloat16[5, 3], in this model bfloat16[6, 3]" in text
    renamed = make()._replace(params={"other": {"w": jnp.zeros(2)}})
    with pytest.raises(
        CheckpointError,
        match=r"params/other/w: in the checkpoint missing, in this model float32\[2\]",
    ):
        checkpoints.restore(shapes(renamed))
    retyped = make()._replace(step=jnp.zeros((), jnp.float32))
    with pytest.raises(
        CheckpointError, match=r"step: in the checkpoint int32\[\], in this model float32\[\]"
    ):
        checkpoints.restore(shapes(retyped))
    assert checkpoints.steps() == [10, 20]


def test_a_long_difference_is_cut() -> None:
    lines = difference({str(n): jnp.zeros(n) for n in range(12)}, {}, most=3)
    assert lines[0] == "0: in the checkpoint float32[0], in this model missing"
    assert lines[3:] == ["... and 9 more"]


def test_a_full_disk_leaves_the_older_checkpoints_whole_and_nothing_half_written(
    tmp_path: Path,
) -> None:

    def big(step: int) -> TrainState:
        return make(step)._replace(state={"a": jax.random.normal(jax.random.key(step), (200_000,))})

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(big(1))
    before = {path: path.read_bytes() for path in files(tmp_path)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Writing past it fails, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError,
            match=r"Could not save step 2 in .* step 1 is still there.* disk's space",
        ):
            checkpoints.save(big(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.steps() == [1]
    assert {path: path.read_bytes() for path in files(tmp_path / "1")} == before
    checkpoints.save(big(2))  # once there is space again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    restored = checkpoints.restore(shapes(big(0)))
    assert restored is not None
    assert_same(restored.state, big(2))


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_whatever_the_disk_says_is_said_in_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    checkpoints, _, new = two(tmp_path)

    def fail(path: str, *args, **kwargs) -> None:
        Path(path + ".orbax-checkpoint-tmp").mkdir()
        raise OSError(code, "the disk does not want to")

    monkeypatch.setattr(ocp, "save", fail)
    with pytest.raises(
        CheckpointError,
        match=r"Could not save step 30 .*the disk does not want to.* step 20 is still there",
    ):
        checkpoints.save(make(30))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]
    restored = checkpoints.restore(shapes(new))
    assert restored is not None
    assert_same(restored.state, new)


def test_a_read_only_disk_is_found_before_orbax_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads would wait for a folder that cannot be made, and keep the program from ending for
    five minutes.
    """
    checkpoints, _, _ = two(tmp_path)

    def fail(path: Path, *args, **kwargs) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(ocp, "save", lambda *args, **kwargs: pytest.fail("Orbax was asked to save"))
    with monkeypatch.context() as patch:
        # `Path.mkdir(exist_ok=True)` of a folder that exists asks for it, too.
        patch.setattr(os, "mkdir", fail)
        with pytest.raises(
            CheckpointError,
            match=r"Could not save step 30 .*Read-only file system.* step 20 is still there",
        ):
            checkpoints.save(make(30))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        CheckpointError, match=r"Could not save step 7 .*There is no earlier checkpoint"
    ):
        Checkpoints(tmp_path / "file" / "checkpoints").save(make())


def test_restoring_onto_a_mesh(tmp_path: Path) -> None:
    """Saved from one device, restored replicated over eight; and one that says nothing of devices
    fits any program.
    """
    state = make()
    Checkpoints(tmp_path).save(state)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    assert mesh.size == 8
    replicated = NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        shapes(state),
    )
    restored = Checkpoints(tmp_path).restore(like)
    assert restored is not None
    assert all(
        leaf.sharding.is_equivalent_to(replicated, leaf.ndim)
        for leaf in jax.tree.leaves(restored.state)
    )
    assert_same(restored.state, state)

    anywhere = Checkpoints(tmp_path).restore(shapes(state))
    assert anywhere is not None
    program = jax.jit(lambda tree: jax.lax.with_sharding_constraint(tree, replicated))
    assert_same(program(anywhere.state), state)


def test_a_sharded_state_is_saved_whole(tmp_path: Path) -> None:
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows = jax.device_put(
        jnp.arange(16.0).reshape(8, 2), NamedSharding(mesh, PartitionSpec("data"))
    )
    state = make()._replace(params={"net": rows}, opt={})
    Checkpoints(tmp_path).save(state)
    restored = Checkpoints(tmp_path).restore(shapes(state))
    assert restored is not None
    assert_same(restored.state.params, {"net": jnp.arange(16.0).reshape(8, 2)})


def test_none_to_keep_are_refused(tmp_path):
    for keep in (0, -1):
        with pytest.raises(ConfigError, match="keep must be at least 1"):
            Checkpoints(tmp_path, keep=keep)
