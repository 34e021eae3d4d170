"""Checkpoints of a TrainState: Orbax behind one small interface.

What it adds to Orbax: a checksum of every file (a flipped byte in a checkpoint otherwise loads
without a word), a fall-back to the last whole checkpoint, a readable difference when the tree is
not the one that was saved, and errors that say what is still there.
"""

import functools
import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from genjax.checks import leaves_by_name
from genjax.errors import CheckpointError, GenjaxError, writing
from genjax.learning.distributed import agreed, several
from genjax.protocol import PyTree, TrainState

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        state: what was saved.
        note: what was saved with it.
        passed_over: the folders of newer checkpoints that are damaged, with what is wrong with
            each.
    """

    state: TrainState
    note: dict[str, Any]
    passed_over: dict[Path, str]


def _pack(state: PyTree) -> PyTree:
    """PRNG keys as their uint32 data, everything else as it is."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _unpack(packed: PyTree, like: PyTree) -> PyTree:
    """The arrays as they were saved, on the devices that `like` says."""

    def one(leaf: Any, wanted: Any) -> Any:
        array = leaf if _elsewhere(wanted) else jnp.array(leaf)
        if _is_key(wanted):
            # key_impl takes arrays and tracers but not shapes, so ask it inside a trace.
            found: list[Any] = []
            shape = jax.ShapeDtypeStruct(wanted.shape, wanted.dtype)
            jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), shape)
            array = jax.random.wrap_key_data(array, impl=found[0])
        # Where nothing is said an array stays uncommitted, and so can enter a program over one
        # device or over many.
        sharding = getattr(wanted, "sharding", None) if getattr(wanted, "committed", True) else None
        return array if sharding is None or _elsewhere(wanted) else jax.device_put(array, sharding)

    return jax.tree.map(one, packed, like)


def _elsewhere(wanted: Any) -> bool:
    """Whether a part of an array is to lie on devices of other processes."""
    sharding = getattr(wanted, "sharding", None)
    return sharding is not None and not sharding.is_fully_addressable


def _abstract(like: PyTree) -> PyTree:
    """What Orbax needs to know to read the packed state: arrays of its shapes and dtypes, in host
    memory.

    Of an array that lies on several processes each reads only the parts that its own devices hold.
    """

    def one(leaf: Any, wanted: Any) -> Any:
        if _elsewhere(wanted):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wanted.sharding)
        return np.empty(leaf.shape, leaf.dtype)

    return jax.tree.map(one, jax.eval_shape(_pack, like), like)


def _checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its name there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / CHECKSUMS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            found[str(path.relative_to(folder))] = digest.hexdigest()
    return found


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: Orbax must only ever see files that are
    whole.
    """
    try:
        wanted, found = json.loads((folder / CHECKSUMS).read_text()), _checksums(folder)
        bad = [name for name in wanted if found.get(name) != wanted[name]]
    except (OSError, ValueError, TypeError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    if not bad:
        return None
    return f"{bad[0]} {'holds other bytes than were saved' if bad[0] in found else 'is missing'}"


def difference(saved: PyTree, wanted: PyTree, most: int = 8) -> list[str]:
    """The leaves whose name, shape or dtype differ, one line each, at most `most` of them."""
    a, b = leaves_by_name(saved), leaves_by_name(wanted)
    both = [name for name in a if name in b and _kind(a[name]) != _kind(b[name])]
    names = [*(name for name in a if name not in b), *(name for name in b if name not in a), *both]
    lines = []
    for name in names[:most]:
        was = _kind(a[name]) if name in a else "missing"
        now = _kind(b[name]) if name in b else "missing"
        lines.append(f"{name}: in the checkpoint {was}, in this model {now}")
    more = len(names) - most
    return lines if more <= 0 else [*lines, f"... and {more} more"]


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


class _Unreadable(Exception):
    """Why Orbax cannot read a checkpoint whose files are whole."""


def _read(
    path: Path, like: TrainState, check: Callable[[dict[str, Any]], None]
) -> tuple[TrainState, dict[str, Any]]:
    """The state and the note of a checkpoint whose files are whole; `check` may refuse the note.

    Raises:
        CheckpointError: if it is of another tree, or if one of several processes cannot read it.
        _Unreadable: if this one process cannot.
    """
    try:
        metadata = ocp.metadata(str(path))
        custom: Any = metadata.custom_metadata or {}
        note = custom.get("note", {})
        check(note)
        lines = difference(metadata.metadata, _abstract(like))
        packed = None if lines else ocp.load(str(path), _abstract(like))
    except GenjaxError:
        raise
    except Exception as error:  # such as a format that this version of Orbax does not know
        if several():  # the others may have read it, and would go on without this one
            raise CheckpointError(
                f"Process {jax.process_index()} could not read the checkpoint {path}, whose files "
                f"are whole: {_reason(error)}. All processes need one folder that each of them "
                "sees; give it with --out."
            ) from error
        raise _Unreadable(_reason(error)) from error
    if lines:
        raise CheckpointError(
            f"The checkpoint {path} is not of this model:\n  " + "\n  ".join(lines)
        )
    return _unpack(packed, like), note


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:600]


class Checkpoints:
    """The checkpoints of one run: a folder with a sub-folder per step, of which the newest few are
    kept.

    A save is atomic: it writes a folder of another name and renames it, so a run that is killed in
    the middle of one leaves the checkpoints before it whole. Several processes save and restore
    together, in one folder that all of them see: each writes its part of the arrays, and process 0
    does the rest.
    """

    def __init__(
        self,
        folder: Path | str,
        keep: int = 3,
        about: Mapping[str, Any] | None = None,
        check: Callable[[dict[str, Any]], None] = lambda note: None,
    ) -> None:
        """
        Args:
            folder: where they are.
            keep: how many of the newest to keep.
            about: what every note says beside what `save` is given.
            check: refuses the note of a checkpoint that belongs to something else, before its
                arrays are read.
        """
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.about, self.check = dict(about or {}), check
        # Orbax logs whole tracebacks of errors that it also raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first; a half-written one has another name and
        is not among them.
        """
        if not self.folder.is_dir():
            return []
        return sorted(
            int(entry.name)
            for entry in self.folder.iterdir()
            if entry.name.isascii() and entry.name.isdecimal() and entry.is_dir()
        )

    def save(self, state: TrainState, note: dict[str, Any] | None = None) -> Path:
        """Save a state under its own step, with a note (JSON); a checkpoint of that step that
        exists already stays.

        It returns when the checkpoint is on disk: the next step may then donate the state's
        buffers.

        Raises:
            CheckpointError: if it cannot be written (a full or read-only disk); older checkpoints
                are untouched.
        """
        step = int(state.step)
        path, part = self.folder / str(step), self.folder / f"{step}.part"
        if agreed(path.is_dir):
            return path

        def begin() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            # Orbax's threads would wait five minutes, and hold up the exit, for a folder that
            # cannot be made.
            part.mkdir()
            part.rmdir()

        def finish() -> None:
            (part / CHECKSUMS).write_text(json.dumps(_checksums(part), indent=1))
            part.rename(path)
            for old in self.steps()[: -self.keep]:
                (self.folder / str(old)).rename(self.folder / f"{old}.part")
            self._sweep()

        try:
            agreed(begin)
            ocp.save(
                str(part), _pack(state), custom_metadata={"note": {**self.about, **(note or {})}}
            )
            agreed(finish)
        # Orbax and TensorStore raise many types for a disk that does not take more.
        except Exception as error:
            for _ in range(10):  # writes that were already under way may still put files back
                self._sweep()
                if not list(self.folder.glob("*.part*")):
                    break
                time.sleep(0.05)
            left = "There is no earlier checkpoint"
            if have := self.steps():
                left = f"The checkpoint of step {have[-1]} is still there"
            raise CheckpointError(
                f"Could not save step {step} in {self.folder}: {_reason(error)}. {left}. Check the "
                "disk's space and permissions, then run the same command again to go on."
            ) from error
        return path

    def _sweep(self) -> None:
        """Delete what a save left half-written and what is not kept."""
        if self.folder.is_dir():
            for entry in self.folder.glob("*.part*"):
                shutil.rmtree(entry, ignore_errors=True)

    def restore(self, like: TrainState, step: int | None = None) -> Restored | None:
        """The newest whole checkpoint (or that of `step`), in the structure of `like`; None if
        there is none at all.

        A damaged one is passed over for the one before it, and named in `passed_over`; see
        `set_aside_damaged`.

        Args:
            like: a TrainState, or its shapes from `jax.eval_shape`; leaves with a sharding are
                restored to it.

        Raises:
            CheckpointError: if every checkpoint is damaged, the asked one does not exist or is
                damaged, or the saved tree is not that of `like`; the message lists the leaves that
                differ.
        """
        have = agreed(self.steps)
        if step is not None and step not in have:
            raise CheckpointError(
                f"There is no checkpoint of step {step} in {self.folder}; there are: "
                f"{have or 'none'}."
            )
        passed: dict[Path, str] = {}
        for candidate in reversed(have if step is None else [step]):
            path = self.folder / str(candidate)
            damage = agreed(functools.partial(_damage, path))
            if damage is None:
                try:
                    return Restored(*_read(path, like, self.check), passed)
                except _Unreadable as error:
                    damage = str(error)
            passed[path] = damage
        if not have:
            return None
        text = "\n".join(f"  {path}: {reason}" for path, reason in passed.items())
        raise CheckpointError(
            f"No whole checkpoint is left:\n{text}\nDelete the run folder to start again."
        )

    def set_aside_damaged(self, restored: Restored) -> None:
        """Rename the checkpoints that a restore passed over, so that training can save their steps
        again, and say so.
        """

        def rename(path: Path, reason: str) -> None:
            numbers = itertools.chain([""], itertools.count(2))
            candidates = (path.with_name(f"{path.name}.damaged{number}") for number in numbers)
            aside = next(candidate for candidate in candidates if not candidate.exists())
            with writing(aside):
                path.rename(aside)
            logger.warning(
                "A damaged checkpoint was passed over and is now called %s: %s", aside, reason
            )

        for path, reason in restored.passed_over.items():
            agreed(functools.partial(rename, path, reason))
