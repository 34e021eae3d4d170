"""Checkpoints of a TrainState: Orbax behind one small interface.

What it adds to Orbax: a checksum over every array (a flipped byte in a checkpoint otherwise loads without a word), a
fall-back to the last whole checkpoint, a readable difference when the tree is not the one that was saved, and errors that
say what is still there.
"""

import logging
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from genjax.errors import CheckpointError
from genjax.protocol import PyTree, TrainState

logger = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint that was read: the state, the note that was saved with it, and the damaged ones that were passed over."""

    state: TrainState
    note: dict[str, Any]
    passed_over: tuple[str, ...] = ()


def _pack(state: PyTree) -> PyTree:
    """PRNG keys as their uint32 data, everything else as it is."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _unpack(packed: PyTree, like: PyTree) -> PyTree:
    def one(leaf: Any, wanted: Any) -> Any:
        if not _is_key(wanted):
            return leaf
        found: list[Any] = []  # key_impl takes arrays and tracers but not shapes, so ask it inside a trace
        jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(wanted.shape, wanted.dtype))
        return jax.random.wrap_key_data(leaf, impl=found[0])

    return jax.tree.map(one, packed, like)


def _abstract(like: PyTree) -> PyTree:
    """What Orbax needs to know of the packed state to restore it, including where each leaf goes."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def one(packed: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(
            packed.shape, packed.dtype, sharding=device if sharding is None or _is_key(leaf) else sharding
        )

    return jax.tree.map(one, jax.eval_shape(_pack, like), like)


def _leaves(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _checksum(packed: PyTree) -> int:
    total = 0
    for name, leaf in sorted(_leaves(packed).items()):
        total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), zlib.crc32(name.encode(), total))
    return total


def difference(saved: PyTree, wanted: PyTree, most: int = 8) -> list[str]:
    """The leaves whose name, shape or dtype differ, one line each, at most `most` of them."""
    a, b = _leaves(saved), _leaves(wanted)
    describe = lambda leaf: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"  # noqa: E731
    lines = [f"{name}: in the checkpoint {describe(a[name])}, in this model missing" for name in a if name not in b]
    lines += [f"{name}: in the checkpoint missing, in this model {describe(b[name])}" for name in b if name not in a]
    lines += [
        f"{name}: in the checkpoint {describe(a[name])}, in this model {describe(b[name])}"
        for name in a
        if name in b and (tuple(a[name].shape), a[name].dtype) != (tuple(b[name].shape), b[name].dtype)
    ]
    return lines[:most] + ([f"... and {len(lines) - most} more"] if len(lines) > most else [])


class Checkpoints:
    """The checkpoints of one run: a folder with a sub-folder per step, of which the newest few are kept.

    A save is atomic: Orbax writes a temporary folder and renames it, so a run that is killed in the middle of one leaves
    the checkpoints before it whole.
    """

    def __init__(self, folder: Path | str, keep: int = 3) -> None:
        self.folder = Path(folder).absolute()
        self.keep = keep
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs whole tracebacks of errors that it also raises

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first; a half-written one has another name and is not among them."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit() and entry.is_dir())

    def save(self, state: TrainState, note: dict[str, Any] | None = None) -> Path:
        """Save a state under its own step, with a note (JSON); a checkpoint of that step that exists already stays.

        It returns when the checkpoint is on disk: the next step may then donate the state's buffers.

        Raises:
            CheckpointError: if it cannot be written (a full or read-only disk); older checkpoints are untouched.
        """
        step = int(state.step)
        if step in self.steps():
            return self.folder / str(step)
        packed = jax.device_get(_pack(state))
        metadata = {"checksum": _checksum(packed), "note": note or {}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep_temporary()
            policy: Any = ocp.training.preservation_policies.LatestN(self.keep)
            with ocp.training.Checkpointer(str(self.folder), preservation_policy=policy) as checkpointer:
                checkpointer.save(step, _pack(state), force=True, custom_metadata=metadata)
        except Exception as error:  # Orbax and TensorStore raise many types for a disk that does not take more
            self._sweep_temporary()
            have = self.steps()
            left = f"The checkpoint of step {have[-1]} is still there" if have else "There is no earlier checkpoint"
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise CheckpointError(
                f"Could not save step {step} in {self.folder}: {reason}. {left}. Check the disk's space "
                "and permissions, then run the same command again to go on."
            ) from error
        return self.folder / str(step)

    def _sweep_temporary(self) -> None:
        if not self.folder.is_dir():
            return
        for entry in self.folder.iterdir():
            if ".orbax-checkpoint-tmp" in entry.name:
                shutil.rmtree(entry, ignore_errors=True)

    def restore(self, like: TrainState, step: int | None = None) -> Restored | None:
        """The newest whole checkpoint (or that of `step`), in the structure of `like`; None if there is none at all.

        A damaged one is passed over for the one before it, and named in `passed_over`; see `set_aside_damaged`.

        Args:
            like: a TrainState, or its shapes from `jax.eval_shape`; leaves with a sharding are restored to it.

        Raises:
            CheckpointError: if every checkpoint is damaged, the asked one does not exist or is damaged, or the saved tree
                is not that of `like`; the message lists the leaves that differ.
        """
        have = self.steps()
        if step is not None and step not in have:
            raise CheckpointError(f"There is no checkpoint of step {step} in {self.folder}; there are: {have or 'none'}.")
        passed: list[str] = []
        for candidate in reversed(have if step is None else [step]):
            path = self.folder / str(candidate)
            try:
                metadata = ocp.metadata(str(path))
                lines = difference(metadata.metadata, _abstract(like))
                packed = None if lines else ocp.load(str(path), _abstract(like))
            except Exception as error:  # whatever a damaged file makes Orbax and TensorStore raise
                passed.append(f"{path}: {(str(error) or type(error).__name__).splitlines()[0][:200]}")
                continue
            if lines:
                raise CheckpointError(f"The checkpoint {path} is not of this model:\n  " + "\n  ".join(lines))
            custom: Any = metadata.custom_metadata or {}
            if _checksum(jax.device_get(packed)) == custom.get("checksum"):
                return Restored(_unpack(packed, like), custom.get("note", {}), tuple(passed))
            passed.append(f"{path}: its checksum is wrong, so some of its bytes are not those that were saved")
        if not have:
            return None
        raise CheckpointError(
            "No whole checkpoint is left:\n  " + "\n  ".join(passed) + "\nDelete the run folder to start again."
        )

    def set_aside_damaged(self, restored: Restored) -> None:
        """Rename the checkpoints that a restore passed over, so that training can save their steps again."""
        for line in restored.passed_over:
            path = Path(line.split(": ", 1)[0])
            path.rename(path.with_name(path.name + ".damaged"))
