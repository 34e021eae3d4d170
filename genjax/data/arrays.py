"""A user's own arrays, from .npz and .npy files."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np

from genjax.data.kinds import Channels, with_channels
from genjax.data.own import (
    HELD_OUT,
    Reading,
    example_names,
    lengths_beside,
    own_source,
    split_names,
)
from genjax.data.rows import Rows, in_npy
from genjax.data.series import STEP, as_sequences, windows_apart, windows_of
from genjax.data.source import Source
from genjax.data.streams import by_position
from genjax.data.tokens import STEP as TOKEN
from genjax.data.tokens import stream_of, symbols_beside
from genjax.errors import ConfigError, DataError, reason_of, regular_file
from genjax.protocol import Batch
from genjax.settings import Count, builder

_LABELS = ("y", "labels", "cond")
_LAYOUT = (
    f"x [+ {' | '.join(_LABELS)}], or x_train, x_test [, x_valid] [+ the same with y_, labels_ or "
    "cond_]"
)


@builder
def arrays(
    path: str,
    *,
    conditional: bool = False,
    key: str | None = None,
    label: str | None = None,
    channels: Channels = "auto",
    step: str | None = None,
    context: Count | None = None,
    reading: Reading = Reading(),
) -> Source:
    """Arrays of a .npz file (x [+ y, labels or cond], or x_train, x_valid, x_test [+ y_train, ...])
    or a .npy file (x).

    x is [N, D], or images [N, H, W, C]; [N, H, W] gets a channel axis. x_val and x_validation are
    x_valid, too. bool, whole numbers of two values, and floats that are 0 and 1 only are binary;
    uint8 is discrete with 256 levels, other whole numbers have max + 1, and other floats are
    continuous (float32), unless `kind` says otherwise. Continuous values are standardised for the
    networks, and nowhere else. Labels are classes under their names: whole numbers or strings [N],
    one-hot rows [N, K]; float vectors [N, C] are a condition vector.
    Of the kind "tokens", x are ids [N, T] or, with `context`, one long stream of them [T]; see
    `token_stream` for its vocabulary and its split. With `step`, x are sequences [N, T, *event],
    and an array lengths [N] says how many of the steps count; with `context`, x is one long series
    [T, *event]. `Source.notes` says what was decided.
    The file is read at once, as the spec depends on it, but for a .npy file beyond 512 MiB, whose
    rows stay on the disk until they are asked for; nothing in it is ever unpickled.

    Args:
        path: the .npz or .npy file.
        conditional: use the labels or vectors in the file as the condition.
        key: what x is called in the file; x, or the only array that can be it, unless given.
        label: what the labels are called there; y, labels or cond unless given.
        channels: where images have them: "first" for [N, C, H, W].
        step: take x as sequences, and call one step of them so: "frame", "hour".
        context: cut one long series into windows of so many steps, which are split by position.

    Raises:
        DataError: for a file that is missing, damaged, not an archive of arrays, or whose arrays
            are not as above.
        ConfigError: for fractions that leave nothing, or a choice that does not exist.
    """
    where = os.fspath(path)
    tokens = reading.kind == "tokens"
    read = _read(where, conditional, key, label, tokens)
    if tokens:
        return _tokens(read, conditional, step, context, reading, where)
    if context is not None:
        if list(read) != ["all"] or conditional or read["all"].length is not None:
            raise ConfigError(
                "--context cuts one long series without labels into windows; leave it out for "
                "examples with splits, labels or lengths."
            )
        series = np.asarray(read["all"].x)
        held_out = reading.valid_fraction, reading.test_fraction
        read, step = windows_of(series, context, where, *held_out), step or STEP
    as_sequences(read, step, where)
    if step is None:
        xs = with_channels([batch.x for batch in read.values()], channels, where)
        pairs = zip(read.items(), xs, strict=True)
        read = {split: batch._replace(x=x) for (split, batch), x in pairs}
    notes = []
    if label is not None and not conditional:
        notes.append(f"{label} is not used: --conditional takes it as the condition")
    name = Path(where).stem
    source = own_source(read, reading, name, where, step=step, files=(where,), notes=notes)
    return source if context is None else source._replace(apart=windows_apart(context))


def _tokens(
    read: dict[str, Batch],
    conditional: bool,
    step: str | None,
    context: int | None,
    reading: Reading,
    where: str,
) -> Source:
    """Token ids: sequences, or one long stream."""
    symbols = symbols_beside(where)
    dims = {batch.x.ndim for batch in read.values()}
    if context is None and dims == {2}:
        as_sequences(read, step or TOKEN, where)
        files, notes = (where, *symbols.files), [symbols.note] if symbols.note else []
        name, called = Path(where).stem, step or TOKEN
        return own_source(
            read, reading, name, where, step=called, files=files, notes=notes, symbols=symbols
        )
    if context is None or conditional or dims != {1} or list(read) != ["all"]:
        found = " and ".join(str(list(batch.x.shape)) for batch in read.values())
        raise DataError(
            f"{where}: token ids are sequences [N, T], or one long stream [T] with --context 64 "
            f"and without labels and splits; found {found}."
        )
    if (reading.valid_fraction, reading.test_fraction) != HELD_OUT:
        raise ConfigError(
            "One long stream of tokens is split by position, the last 10 % for the test: leave "
            "--valid-fraction and --test-fraction out."
        )
    parts = by_position(read["all"].x)
    return stream_of(
        parts, symbols, reading.levels, "--levels ", context, "shuffle", where, [where], []
    )


def _read(
    path: str, conditional: bool, key: str | None, label: str | None, tokens: bool
) -> dict[str, Batch]:
    """The file's arrays: {"all": Batch}, or {"train": ..., "valid": ..., "test": ...}."""
    regular_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(6)
            if start[:2] != b"PK" and start != b"\x93NUMPY":
                raise DataError(
                    f"{path}: not a .npz or .npy file: it starts with {start!r}. Write it with "
                    "numpy.savez."
                )
            file.seek(0)
            if tokens and start[:2] != b"PK":  # ids stay on the disk
                loaded = np.load(path, mmap_mode="r", allow_pickle=False)
            elif start[:2] != b"PK":  # what is large does, too
                loaded = in_npy(path)
            else:
                loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray | Rows):
                get = {"x": loaded}.__getitem__
                return _select(["x"], get, conditional, "x", label, path, tokens)
            with loaded:
                get = loaded.__getitem__
                return _select(loaded.files, get, conditional, key, label, path, tokens)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except MemoryError as error:
        raise DataError(
            f"{path}: is more than there is memory for ({reason_of(error)}). A .npy file of all of "
            "x may be larger than memory: numpy.save."
        ) from error
    except Exception as error:  # numpy, zipfile, zlib and tokenize raise a dozen at a damaged file
        # zipfile asks a damaged file for a place that it has not.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise DataError(f"{path}: cannot be read: {reason_of(error)}.") from error
        if "Object arrays" in str(error) or "Python objects" in str(error):
            raise DataError(
                f"{path}: holds Python objects, which are never unpickled. Save arrays of plain "
                "numbers, "
                "and pad sequences of unequal length to one length."
            ) from error
        raise DataError(
            f"{path}: damaged, cannot be read as arrays ({error}). Write it again with numpy.savez."
        ) from error


def _select(
    keys: list[str],
    get: Any,
    conditional: bool,
    key: str | None,
    label: str | None,
    path: str,
    tokens: bool,
) -> dict[str, Batch]:
    """Only the arrays that are needed are read: others may hold anything."""
    x_key = key or _key_of(keys, path)
    names = example_names(keys, x_key, path)
    if not names:
        raise DataError(
            f"{path}: expected the arrays {_LAYOUT}; found {', '.join(keys) or 'nothing'}. "
            "--key NAME says which one x is."
        )
    used = conditional or label is not None  # a name that is mistyped is said, used or not
    wanted = _LABELS if label is None else (label,)
    labels = {} if not used else {stem: split_names(keys, stem, path) for stem in wanted}
    lengths = lengths_beside(keys, names, path)
    parts = {}
    for split, name in names.items():
        y_key = _label_key(keys, labels, split, path) if used else None
        y_key = y_key if conditional else None
        batch = _examples(get, name, y_key, path, tokens)
        parts[split] = batch._replace(length=get(lengths[split])) if split in lengths else batch
    return parts


def _key_of(keys: list[str], path: str) -> str:
    """What x is called where nobody says: x, or the only array of examples with several axes."""
    stems = dict.fromkeys(key.removesuffix("_train") for key in keys)
    if "x" in stems or len(keys) > 20:  # to look at an array is to read it
        return "x"
    known = [s for s in stems if s not in _LABELS and example_names(keys, s, path)]
    if len(known) == 1:
        return known[0]
    return "x"


def _label_key(keys: list[str], labels: dict[str, dict[str, str]], split: str, path: str) -> str:
    """What the labels of a split are called, of stems that have names of each split."""
    found = next((names[split] for names in labels.values() if split in names), None)
    if found is None:
        ending = "" if split == "all" else f"_{split}"
        raise DataError(
            f"{path}: conditional needs labels: expected one of "
            f"{', '.join(stem + ending for stem in labels)}; found {', '.join(keys)}. --label NAME "
            "says which array they are; without labels leave it out, and say conditional=False "
            "(--no-conditional)."
        )
    return found


def _examples(get: Any, x_key: str, y_key: str | None, path: str, tokens: bool) -> Batch:
    """x and its labels, held to each other."""
    x, cond = get(x_key), None if y_key is None else get(y_key)
    for name, array, kinds in ((x_key, x, "biuf"), (y_key, cond, "biufUS")):
        wrong = not isinstance(array, np.ndarray | Rows) or array.dtype.kind not in kinds
        if array is not None and wrong:
            wanted = "numbers" if kinds == "biuf" else "numbers or strings"
            raise DataError(
                f"{path}: {name} must be an array of {wanted}; found "
                f"{getattr(array, 'dtype', type(array).__name__)}."
            )
    if x.ndim < 2 and not (tokens and x.ndim):
        advice = "Add the missing axis."
        if x.ndim and x.dtype.kind in "iu":
            advice += " A long stream of token ids is read with --kind tokens --context 64."
        raise DataError(
            f"{path}: {x_key} must be [N, D] or [N, H, W, C]; found shape {list(x.shape)}. {advice}"
        )
    if len(x) == 0:
        raise DataError(f"{path}: {x_key} is empty; expected at least 1 example.")
    if cond is not None and (cond.ndim == 0 or len(cond) != len(x)):
        n = len(cond) if cond.ndim else 1
        raise DataError(
            f"{path}: labels of another length: {len(x)} examples in {x_key} and {n} in {y_key}."
        )
    return Batch(x, cond)
