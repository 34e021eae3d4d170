"""From a user's arrays to a `Source`, whatever file they came from: splits, kind, scale, labels."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from genjax.data.kinds import Standardize, Values, scale_of, values_of
from genjax.data.labels import Condition, labels_of
from genjax.data.lines import sizes
from genjax.data.order import permutation
from genjax.data.rows import Chunks, Rows, rows_at
from genjax.data.source import Source, Splits, TooFew, cast, stored_dtype, validate
from genjax.data.tokens import Symbols, levels_of
from genjax.errors import ConfigError, DataError
from genjax.protocol import Batch, DataSpec
from genjax.settings import Rate, Settings, Within, check_fields, is_number
from genjax.spec import two_values

Levels = Annotated[int, Within(2, 2**24)]
_WHOLE = re.compile(r"\s*-?\d{1,20}\s*", re.ASCII)  # which floats need not hold
HELD_OUT = (0.1, 0.1)  # shares of the validation and the test set, unless told otherwise

# What folders, and the endings of arrays' names, call the splits.
SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}


@dataclasses.dataclass(frozen=True)
class Reading(Settings):
    """What a user's own data are taken for.

    Attributes:
        kind: what the values are; "auto" goes by their dtype, and by how many there are;
            "tokens" are ids, of arrays and of .npz and .npy files.
        levels: how many levels discrete values have, or tokens there are, 0 .. levels-1; what
            occurs unless given.
        values: the two values of binary data, the smaller first, which are taken as 0 and 1:
            "0,255"; what occurs unless given.
        standardize: what of continuous values is taken out for the networks: the mean and spread of
            all ("event"), of each column ("element"), nothing ("none"); "auto" is "event" for
            images and "element" for all else.
        condition: what labels are: "classes", a "vector", or what they look like.
        valid_fraction: the share of the validation set where none is given, drawn in a fixed order;
            of the windows of one series the part before the test's.
        test_fraction: the share of the test set where no split is given, drawn in a fixed order; of
            the windows of one series the last part.
    """

    kind: Literal["auto", "binary", "discrete", "continuous", "tokens"] = "auto"
    levels: Levels | None = None
    values: str | None = None
    standardize: Standardize = "auto"
    condition: Condition = "auto"
    valid_fraction: Rate = HELD_OUT[0]
    test_fraction: Rate = HELD_OUT[1]

    def __post_init__(self) -> None:
        check_fields(self)
        if self.two is not None and not two_values(self.two):
            raise ConfigError(
                "values must be two different numbers with a comma between them, the smaller first "
                f"(0,255); got {self.values!r:.80}."
            )
        valid, test = self.valid_fraction, self.test_fraction
        if not (valid > 0 and test > 0 and valid + test < 1):
            raise ConfigError(
                "valid_fraction and test_fraction must be positive with a sum below 1; got "
                f"{valid} and {test}."
            )

    @property
    def two(self) -> tuple[float, ...] | None:
        """The values of binary data as numbers; none for a text that has none."""
        if self.values is None:
            return None
        parts = self.values.split(",")
        if not all(map(is_number, parts)):
            return ()
        return tuple(int(part) if _WHOLE.fullmatch(part) else float(part) for part in parts)


def own_source(
    read: dict[str, Batch],
    reading: Reading,
    name: str,
    where: str,
    *,
    step: str | None = None,
    columns: Sequence[str] | None = None,
    files: Sequence[str] = (),
    notes: Sequence[str] = (),
    symbols: Symbols | None = None,
    end: int | None = None,
) -> Source:
    """The source of arrays that were read: {"all": Batch}, or {"train", "test" [, "valid"]}.

    Args:
        read: x [N, *shape] as events are to have it, cond as `labels_of` takes it, `length` [N] of
            sequences of unequal length.
        name: what the data are called.
        where: the file or folder, for messages.
        step: what one step of x is called, if x are sequences.
        columns: what the columns of the last axis are called.
        notes: what was decided before.
        symbols: what the tokens are called, if x are token ids.
        end: the token that ends a sequence, if x are token ids.

    Raises:
        DataError: for arrays that do not fit each other, the kind, or a spec.
        ConfigError: for settings that do not fit the data.
    """
    parts = _split(read, reading.valid_fraction, reading.test_fraction, where)
    xs = [batch.x for batch in parts]
    _same_shape(xs, where)
    flag = "--levels " if files else "levels="
    values = _values(xs, reading, symbols, flag, where, own_splits="all" not in read)
    if end is not None and not 0 <= end < (values.levels or 0):
        raise ConfigError(
            f"end must be one of the tokens, from 0 to {(values.levels or 0) - 1}; got {end}. "
            f"{flag}N says how many there are."
        )
    scaled = _scaled_by(values.xs[0], parts[0].length, step)
    known, conds, found = _described(scaled, values.kind, parts, reading, where)
    lengths = [batch.length for batch in parts]
    _for_all("lengths", lengths, where)
    spec = DataSpec(
        xs[0].shape[1:],
        values.kind,
        values.levels,
        name=name,
        step=step,
        end=end,
        lengths=lengths[0] is not None,
        columns=None if columns is None else tuple(columns),
        vocabulary=None if symbols is None else symbols.vocabulary,
        values=values.two,
        **known,
    )
    batches = [
        Batch(x, cond, length=length)
        for x, cond, length in zip(values.xs, conds, lengths, strict=True)
    ]
    splits = _compact(batches, spec, where)
    about = f"{sizes(xs)} examples of shape {list(spec.shape)}, from {where}"
    return Source(
        spec,
        lambda: splits,
        cast(spec),
        description=about,
        notes=(about, *notes, values.note, *found),
        files=tuple(files),
    )


def _values(
    xs: list[np.ndarray],
    reading: Reading,
    symbols: Symbols | None,
    flag: str,
    where: str,
    own_splits: bool,
) -> Values:
    """The kind of the values, see `values_of`; tokens are so by declaration only, and how many
    there are says `flag`.
    """
    if reading.kind != "tokens":
        return values_of(xs, reading.kind, reading.levels, where, own_splits, reading.two)
    if symbols is None:
        raise ConfigError(
            f"--kind tokens is for token ids in .npz and .npy files; {where} is none. Leave it out."
        )
    levels, note = levels_of(xs, symbols, reading.levels, flag, where)
    return Values(xs, "tokens", levels, f"token ids with {note}")


def contents_of(read: dict[str, Batch]) -> str:
    """The SHA-256 of arrays, for data that are in too many files to keep the hash of each."""
    found = hashlib.sha256()
    for split, batch in sorted(read.items()):
        for leaf in batch:
            if leaf is not None:
                found.update(f"{split} {leaf.dtype.str} {leaf.shape} ".encode())
                for chunk in leaf.in_order() if isinstance(leaf, Rows) else [leaf]:
                    array = np.ascontiguousarray(chunk)
                    found.update(array.view(np.uint8).data if array.size else b"")
    return found.hexdigest()


def _split(
    parts: dict[str, Batch], valid_fraction: float, test_fraction: float, where: str
) -> tuple[Batch, Batch, Batch]:
    """Train, valid and test, in that order; what the file does not split is split in a fixed
    order.
    """

    def rows(batch: Batch, index: np.ndarray) -> Batch:
        kept = (None if leaf is None else rows_at(leaf, index) for leaf in batch)
        return Batch(*kept)

    if "valid" in parts:
        return parts["train"], parts["valid"], parts["test"]
    whole = parts.get("all", parts.get("train"))
    assert whole is not None
    n = len(whole.x)
    n_valid = max(1, round(n * valid_fraction))
    n_test = max(1, round(n * test_fraction)) if "all" in parts else 0
    n_train = n - n_valid - n_test
    if n_train < 1:
        raise TooFew(
            f"{where}: {n} examples are too few to split; expected at least 1 for each of train, "
            "valid and test."
        )
    train, valid, test = np.split(permutation(n, seed=0), [n_train, n_train + n_valid])
    return (
        rows(whole, train),
        rows(whole, valid),
        parts["test"] if "all" not in parts else rows(whole, test),
    )


def split_names(keys: Collection[Any], stem: str, where: str) -> dict[str, str]:
    """What the arrays of a stem are called, as far as they are there: {"all": "x"}, and those of
    the splits {"train": "x_train", "valid": "x_val", "test": "x_test"}.

    Raises:
        DataError: for a name beside a training and a test split that is none of a split, and for
            two names of one split: what was held out must not be left out without a word.
    """
    found = {"all": stem} if stem in keys else {}
    named = [key for key in keys if isinstance(key, str) and key.startswith(f"{stem}_")]
    of_each = {key: SPLITS.get(key.removeprefix(f"{stem}_")) for key in named}
    for split in Splits._fields:
        same = [key for key in named if of_each[key] == split]
        if len(same) > 1 and stem not in keys:
            raise DataError(
                f"{where}: {' and '.join(same)} are two names of the {split} split. Leave one out."
            )
        if same:
            found[split] = same[0]
    others = [key for key in named if of_each[key] is None]
    if others and stem not in keys and {"train", "test"} <= found.keys():
        raise DataError(
            f"{where}: {', '.join(others)} beside {found['train']} and {found['test']} is no "
            f"split; expected {stem}_valid, {stem}_val or {stem}_validation. Rename it, or leave "
            "it out."
        )
    return found


def example_names(keys: Collection[Any], stem: str, where: str) -> dict[str, str]:
    """What the arrays of examples are called: {"all": "x"}, or those of the splits; {} where
    neither one for all nor a training and a test split are there.

    Raises:
        DataError: see `split_names`.
    """
    found = split_names(keys, stem, where)
    held_out = [found[split] for split in ("valid", "test") if split in found]
    if "all" in found and held_out:
        raise DataError(
            f"{where}: is {stem} what {' and '.join(held_out)} leave for training? Call it "
            f"{stem}_train; or leave them out, and a part of {stem} is held out."
        )
    if "all" in found:
        return {"all": found["all"]}
    return found if {"train", "test"} <= found.keys() else {}


def lengths_beside(keys: Collection[Any], names: dict[str, str], where: str) -> dict[str, str]:
    """What the lengths of the sequences of `example_names` are called; {} where there are none.

    Raises:
        DataError: for lengths of all where there are splits, or the other way round.
    """
    found = split_names(keys, "lengths", where)
    if found and not names.keys() & found.keys():
        raise DataError(
            f"{where}: {', '.join(found.values())} is not of {', '.join(names.values())}. Give the "
            f"lengths of each as {', '.join(_beside('lengths', split) for split in names)}."
        )
    return found


def _beside(stem: str, split: str) -> str:
    return stem if split == "all" else f"{stem}_{split}"


def _same_shape(xs: list[np.ndarray], where: str) -> None:
    shapes = {x.shape[1:] for x in xs}
    if len(shapes) > 1:
        found = ", ".join(map(str, sorted(list(shape) for shape in shapes)))
        raise DataError(f"{where}: the splits must hold examples of one shape; found {found}.")
    if math.prod(xs[0].shape[1:]) == 0:
        raise DataError(f"{where}: the examples are empty: shape {list(xs[0].shape[1:])}.")


def _scaled_by(x: Any, length: Any, step: str | None) -> Any:
    """The values [M, *event] that the scale is that of: without the padding of sequences, and with
    a column where each step is one number.
    """
    if step is None:
        return x
    if isinstance(x, Rows):
        known = length is not None and np.shape(length) == (len(x),)
        order = np.arange(len(x)) if x.index is None else np.argsort(x.index, kind="stable")
        ordered = np.asarray(length)[order] if known else None

        def each() -> Iterator[np.ndarray]:
            done = 0
            for _, chunk in x.chunks():
                own = None if ordered is None else ordered[done : done + len(chunk)]
                done += len(chunk)
                yield _scaled_by(chunk, own, step)

        return Chunks(max(2, x.ndim - 1), each)
    if length is not None and np.shape(length) == (len(x),):
        x = x[np.arange(x.shape[1])[None] < np.asarray(length)[:, None]]
    else:
        x = x.reshape(-1, *x.shape[2:])
    return x[:, None] if x.ndim == 1 else x


def _described(
    x: np.ndarray,
    kind: str,
    parts: tuple[Batch, Batch, Batch],
    reading: Reading,
    where: str,
) -> tuple[dict[str, Any], list[Any], list[str]]:
    """What a spec says beside shape and kind, for the training split's x; the conditions of each
    split, and notes.
    """
    known: dict[str, Any] = {}
    notes, standardize = [], reading.standardize
    if kind == "continuous":
        scale = scale_of(x, standardize, where)
        known |= {"shift": scale.shift, "scale": scale.scale}
        notes.append(scale.note)
    elif standardize in ("event", "element"):
        raise ConfigError(
            f"standardize={standardize!r} is for continuous data; those of {where} are {kind}. "
            "Leave it out, or say --kind continuous."
        )
    given = [batch.cond for batch in parts if batch.cond is not None]
    if not given:
        return known, [None] * 3, notes
    _for_all("labels", [batch.cond for batch in parts], where)
    labels = labels_of(given, where, reading.condition)
    known |= {name: getattr(labels, name) for name in ("n_classes", "cond_dim", "class_names")}
    notes.append(labels.note)
    if labels.cond_dim is not None:
        scale = scale_of(labels.conds[0], "none" if standardize == "none" else "element", where)
        known |= {"cond_shift": scale.shift, "cond_scale": scale.scale}
    return known, labels.conds, notes


def _for_all(what: str, parts: Sequence[Any], where: str) -> None:
    """Refuse what some splits have, and others have not."""
    without = [n for n, part in zip(Splits._fields, parts, strict=True) if part is None]
    if 0 < len(without) < len(parts):
        raise DataError(
            f"{where}: {' and '.join(without)} has no {what}, and other splits have. Give them to "
            "all, or to none."
        )


def _compact(batches: list[Batch], spec: DataSpec, where: str) -> Splits:
    """Valid values in their compact dtype: uint8 or int32 if they are whole numbers, else float32.

    Raises:
        DataError: see `validate`.
    """
    with np.errstate(over="ignore"):  # what does not fit float32 becomes infinite, and is reported
        if spec.kind == "continuous":
            batches = [batch._replace(x=batch.x.astype(np.float32)) for batch in batches]
        if spec.cond_dim is not None:
            conds = [np.asarray(batch.cond, np.float32) for batch in batches]
            pairs = zip(batches, conds, strict=True)
            batches = [batch._replace(cond=cond) for batch, cond in pairs]
    splits = validate(Splits(*batches), spec, where)
    if spec.kind == "continuous":
        return splits
    compact = stored_dtype(spec)
    return Splits(*(batch._replace(x=batch.x.astype(compact)) for batch in splits))
