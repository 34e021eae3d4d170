"""Checkpoints of a TrainState: Orbax behind one small interface.

What it adds to Orbax: any path will do (`plain_path`), what was saved is read back before it
counts, a checksum of every file (a flipped byte in a checkpoint otherwise loads without a word), a
fall-back to the last whole checkpoint, a readable difference when the tree is not the one that was
saved, and errors that say what is still there.

Damage is what a checksum says. A file that cannot be read (permissions, memory, a network) may be
whole: nothing is renamed for it, and no earlier checkpoint takes its place.
"""

import functools
import itertools
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from genjax.checks import leaves_by_name
from genjax.errors import CheckpointError, GenjaxError, reading, reason_of, synced, writing
from genjax.learning.checksums import CHECKSUMS, checksums, damage_of, files_in
from genjax.learning.distributed import agreed, all_passed, several
from genjax.learning.plain_path import plain_path
from genjax.protocol import PyTree, TrainState
from genjax.settings import Within, check_setting

logger = logging.getLogger(__name__)
READ_BACK = 2**26  # bytes of arrays that a save compares with what it was given
RACES = 5  # how often a reader looks again for what a process that trains has just deleted

# What a save writes until it is whole, and what is about to be deleted, with Orbax's own addition.
_ADDITION = r"(\.orbax-checkpoint-tmp.*)?"
_PART = re.compile(r"\d+\.[0-9a-f]{16}\.part" + _ADDITION)
_OLDER_PART = re.compile(r"\d+\.part" + _ADDITION)  # of earlier versions


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


class Noted(NamedTuple):
    """What the newest whole checkpoint notes, under which step; or None and {}. See `Restored`."""

    step: int | None
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
    """Whether a part of an array is to lie, or lies, on devices of other processes."""
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


def _has_arrays(path: Path) -> bool:
    """Whether Orbax will find arrays in a checkpoint. Where it finds none, its reads go on past its
    own end, and are reported as errors of a closed loop now and then.
    """
    state = path / "state"
    forms = ("manifest.ocdbt", "*/zarr.json", "*/.zarray")
    return any(next(state.glob(form), None) is not None for form in forms)


def _read(
    path: Path, called: Path, like: TrainState, check: Callable[[dict[str, Any]], None]
) -> tuple[TrainState, dict[str, Any]]:
    """The state and the note of a checkpoint whose files are whole; `check` may refuse the note.

    Args:
        called: the path that a person knows.

    Raises:
        CheckpointError: if it is of another tree, or cannot be read.
    """
    if not _has_arrays(path):
        raise CheckpointError(
            f"The checkpoint {called} holds no arrays: earlier versions lost them in a folder with "
            f"special characters in its path. Move {called.parent} away and train again."
        )
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
        reason = reason_of(error).replace(str(path), str(called))
        if several():  # the others may have read it, and would go on without this one
            raise CheckpointError(
                f"Process {jax.process_index()} could not read the checkpoint {called}, whose "
                f"files are whole: {reason}. All processes need one folder that each of them "
                "sees; give it with --out."
            ) from error
        raise CheckpointError(
            f"The checkpoint {called}, whose files are whole, could not be read: {reason}. Nothing "
            "was changed. Mend the cause (memory, permissions, another version of "
            "orbax-checkpoint) and run the same command again; or move that folder away to go on "
            "from the one before it."
        ) from error
    if lines:
        raise CheckpointError(
            f"The checkpoint {called} is not of this model:\n  " + "\n  ".join(lines)
        )
    return _unpack(packed, like), note


def _check_saved(path: Path, packed: PyTree) -> None:
    """Read back what Orbax has written: every name, shape and dtype, and the bits of arrays, the
    small ones first, up to `READ_BACK` bytes.

    Raises:
        CheckpointError: if it is not what was to be saved.
    """
    if not _has_arrays(path):
        raise CheckpointError("what was written has no arrays")
    metadata: Any = ocp.metadata(str(path)).metadata
    lines = difference({} if metadata is None else metadata, packed)
    if lines:
        raise CheckpointError(f"what was written reads back as something else ({lines[0]})")
    leaves, structure = jax.tree.flatten(packed)
    sizes = [READ_BACK if _elsewhere(leaf) else leaf.nbytes for leaf in leaves]
    order = np.argsort(sizes, kind="stable")
    chosen = set(order[np.cumsum(np.asarray(sizes)[order]) < READ_BACK].tolist())
    if not chosen:
        return
    like = [
        np.empty(leaf.shape, leaf.dtype) if index in chosen else ocp.PLACEHOLDER
        for index, leaf in enumerate(leaves)
    ]
    found = jax.tree.leaves(ocp.load(str(path), structure.unflatten(like)))
    names = list(leaves_by_name(packed))
    for index in sorted(chosen):
        if np.asarray(found[index]).tobytes() != np.asarray(leaves[index]).tobytes():
            raise CheckpointError(f"{names[index]} reads back with other values than were saved")


class _Gone(Exception):
    """A checkpoint was deleted as it was read."""


@contextmanager
def _still_there(folder: Path) -> Iterator[None]:
    """Tell whatever is found of a folder in here from the folder's having been deleted meanwhile.

    Raises:
        _Gone: if it was. Several processes have the lock of the run, and nobody deletes anything.
    """
    try:
        yield
    except GenjaxError:
        if not several() and not folder.is_dir():
            raise _Gone from None
        raise
    if not several() and not folder.is_dir():
        raise _Gone


class Checkpoints:
    """The checkpoints of one run: a folder with a sub-folder per step, of which the newest few are
    kept.

    A save is atomic: it writes a folder of another name and renames it, so a run that is killed in
    the middle of one leaves the checkpoints before it whole. Several processes save and restore
    together, in one folder that all of them see: each writes its part of the arrays, and process 0
    does the rest.

    Example:
        >>> import jax, optax, tempfile
        >>> import genjax
        >>> model = genjax.vae(genjax.DataSpec((2,), "continuous"), hidden=(4,))
        >>> t = genjax.training(model, optax.adam(1e-3))
        >>> checkpoints = genjax.Checkpoints(tempfile.mkdtemp(), keep=2)
        >>> _ = checkpoints.save(jax.jit(t.init)(jax.random.key(0)), {"note": "of one's own"})
        >>> checkpoints.steps()
        [0]
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
            keep: how many of the newest to keep, at least one.
            about: what every note says beside what `save` is given.
            check: refuses the note of a checkpoint that belongs to something else, before its
                arrays are read.

        Raises:
            ConfigError: for none to keep.
        """
        check_setting("keep", keep, Annotated[int, Within(1)])
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.about, self.check = dict(about or {}), check
        # Orbax logs whole tracebacks of errors that it also raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first; a half-written one has another name and
        is not among them.

        Raises:
            CheckpointError: if the folder cannot be read; it may well have some.
        """
        with reading(self.folder):
            try:
                with os.scandir(self.folder) as entries:
                    names = [entry.name for entry in entries if entry.is_dir()]
            except (FileNotFoundError, NotADirectoryError):
                return []
        numbers = (int(name) for name in names if name.isascii() and name.isdecimal())
        return sorted(number for number in numbers if str(number) in names)

    def save(self, state: TrainState, note: dict[str, Any] | None = None) -> Path:
        """Save a state under its own step, with a note (JSON); a checkpoint of that step that
        exists already stays.

        It returns when the checkpoint is on disk and was read back: the next step may then donate
        the state's buffers.

        Raises:
            CheckpointError: if it cannot be written (a full or read-only disk), or does not read
                back; older checkpoints are untouched.
        """
        step = int(state.step)
        try:
            with plain_path(self.folder) as at:
                part = agreed(functools.partial(self._begin, at, step))
                if part is not None:
                    packed = _pack(state)
                    about: Any = {"note": {**self.about, **(note or {})}}
                    ocp.save(str(at / part), packed, custom_metadata=about)
                    # Not before all have read it may it be renamed.
                    all_passed(functools.partial(_check_saved, at / part, packed))
                    agreed(functools.partial(self._finish, at, part, step))
        # Orbax and TensorStore raise many types for a disk that does not take more.
        except Exception as error:
            for _ in range(10):  # writes that were already under way may still put files back
                if not self._sweep(self.folder):
                    break
                time.sleep(0.05)
            raise CheckpointError(
                f"Could not save step {step} in {self.folder}: {reason_of(error)}. {self._left()} "
                "Check the disk's space and permissions, and that no other process writes there; "
                "then run the same command again to go on."
            ) from error
        return self.folder / str(step)

    def newest_note(self) -> Noted:
        """What the newest whole checkpoint notes, without its arrays.

        Raises:
            CheckpointError: if it cannot be read.
        """
        step, note, passed = agreed(self._newest_note)
        return Noted(step, note, {self.folder / name: reason for name, reason in passed.items()})

    def _newest_note(self) -> tuple[int | None, dict[str, Any], dict[str, str]]:
        passed: dict[str, str] = {}
        with plain_path(self.folder) as at:
            for step in reversed(self.steps()):
                damage = damage_of(at / str(step), self.folder / str(step))
                if damage is None:
                    custom: Any = ocp.metadata(str(at / str(step))).custom_metadata or {}
                    return step, custom.get("note", {}), passed
                passed[str(step)] = damage
        return None, {}, passed

    def saved(self, part: str) -> PyTree | None:
        """The shapes of one part of the newest whole checkpoint, such as "opt", in dicts and lists:
        what a state can be restored like, whatever made it. None if there is no checkpoint.

        Raises:
            CheckpointError: if it cannot be read.
        """
        with plain_path(self.folder) as at:
            for step in reversed(self.steps()):
                path = at / str(step)
                if damage_of(path, self.folder / str(step)) is None and _has_arrays(path):
                    saved: Any = ocp.metadata(str(path)).metadata
                    return jax.tree.map(
                        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved[part]
                    )
        return None

    def _begin(self, at: Path, step: int) -> str | None:
        """The name of a folder to write; None if the step has a checkpoint already."""
        if (at / str(step)).is_dir():
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep(at)
        # A name that nobody has, so that all that is called like it is ours to delete.
        part = f"{step}.{secrets.token_hex(8)}.part"
        # Orbax's threads would wait five minutes, and hold up the exit, for a folder that cannot be
        # made.
        (at / part).mkdir()
        (at / part).rmdir()
        return part

    def _finish(self, at: Path, part: str, step: int) -> None:
        """Make what was written a checkpoint, once it is on the disk."""
        text = json.dumps(checksums(at / part), indent=1)
        (at / part / CHECKSUMS).write_text(text, encoding="utf-8")
        for path in files_in(at / part):
            synced(path)
        for folder, _, _ in os.walk(at / part):
            synced(Path(folder))
        (at / part).rename(at / str(step))
        synced(at)
        for old in self.steps()[: -self.keep]:
            (at / str(old)).rename(at / f"{old}.{secrets.token_hex(8)}.part")
        self._sweep(at)

    def _left(self) -> str:
        """What there still is, for a message."""
        try:
            have = self.steps()
        except CheckpointError:
            return "Nothing that was there before was touched."
        if not have:
            return "There is no earlier checkpoint."
        return f"The checkpoint of step {have[-1]} is still there."

    def _sweep(self, folder: Path) -> bool:
        """Delete what a save left half-written and what is not kept; whether there was anything.

        Only what has our own names: through a link, names of this version that nobody else gives.
        """
        try:
            names = os.listdir(folder)
        except OSError:
            return False
        older = not self.folder.is_symlink()
        swept = False
        for name in names:
            if _PART.fullmatch(name) or (older and _OLDER_PART.fullmatch(name)):
                shutil.rmtree(folder / name, ignore_errors=True)
                swept = True
        return swept

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
                damaged, one cannot be read, or the saved tree is not that of `like`; the message
                lists the leaves that differ.
        """
        for _ in range(RACES):
            try:
                return self._restore(like, step)
            except _Gone:  # a process that trains there has deleted what is not kept
                continue
        raise CheckpointError(
            f"The checkpoints in {self.folder} are deleted faster than they can be read: a process "
            "trains there that keeps few. Wait for it, or have it keep more (--keep-checkpoints)."
        )

    def _restore(self, like: TrainState, step: int | None) -> Restored | None:
        have = agreed(self.steps)
        if step is not None and step not in have:
            raise CheckpointError(
                f"There is no checkpoint of step {step} in {self.folder}; there are: "
                f"{have or 'none'}."
            )
        passed: dict[Path, str] = {}
        with plain_path(self.folder) as at:
            for candidate in reversed(have if step is None else [step]):
                name, path = str(candidate), self.folder / str(candidate)
                with _still_there(at / name):
                    damage = agreed(functools.partial(damage_of, at / name, path))
                    if damage is None:
                        return Restored(*_read(at / name, path, like, self.check), passed)
                passed[path] = damage
        if not have:
            return None
        text = "\n".join(f"  {path}: {reason}" for path, reason in passed.items())
        if step is not None:
            raise CheckpointError(f"The checkpoint of step {step} is damaged:\n{text}")
        raise CheckpointError(
            f"No whole checkpoint is left:\n{text}\nDelete the run folder to start again."
        )

    def set_aside_damaged(self, restored: Restored | Noted) -> None:
        """Rename the checkpoints that were passed over, so that training can save their steps
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
