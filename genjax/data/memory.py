"""Data that are in memory: arrays, dicts of them, and whatever has a length and examples."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from genjax.data.kinds import Channels, with_channels
from genjax.data.own import (
    HELD_OUT,
    Reading,
    contents_of,
    example_names,
    lengths_beside,
    own_source,
    split_names,
)
from genjax.data.rows import of_mapped
from genjax.data.series import as_sequences
from genjax.data.source import Source
from genjax.data.tokens import STEP as TOKEN
from genjax.data.tokens import Symbols, symbols_of
from genjax.errors import ConfigError, DataError, unknown_name
from genjax.protocol import Batch
from genjax.settings import builder
from genjax.values import array_of

WHERE = "the data in memory"
_X = ("x", "image", "img", "images", "data")
_Y = ("y", "label", "labels", "cond", "fine_label")


@builder
def from_arrays(
    x: Any,
    y: Any = None,
    *,
    lengths: Any = None,
    name: str = "data",
    key: str | None = None,
    label: str | None = None,
    step: str | None = None,
    columns: tuple[str, ...] | None = None,
    channels: Channels = "auto",
    vocabulary: Sequence[str] | None = None,
    end: int | None = None,
    reading: Reading = Reading(),
) -> Source:
    """The source of data in memory: `genjax.from_arrays(x)`, `from_arrays(images, classes)`.

    x is an array [N, D] or images [N, H, W, C] or [N, H, W]; sequences [N, T, *event] if `step`
    says what a step is called. Or a mapping of arrays {"x": ..., "y": ...}, with splits
    {"x_train": ..., "x_valid": ..., "x_test": ..., "y_train": ...}; or anything with `len` and
    examples by number, whose examples are arrays, pictures, (x, y) or mappings: a Hugging Face
    table, a grain MapDataset, a torch Dataset. Values are taken as those of files are
    (`data.arrays`); `Source.notes` says how. With kind="tokens", x are token ids [N, T] from 0 to
    levels - 1, or to the largest that there is.

    An array that numpy has mapped from a file (np.load(path, mmap_mode="r")) stays there if it is
    larger than 512 MiB.

    Args:
        x: see above.
        y: labels [N] of numbers or strings, one-hot rows, or condition vectors [N, C].
        lengths: how many steps of each sequence count, [N].
        name: what the data are called.
        key: what x is called in a mapping; x, image, img, images or data unless given.
        label: what y is called there; y, label, labels or cond unless given.
        step: what one step of a sequence is called: "frame".
        columns: what the columns of the last axis are called; of a table of pandas, polars or Arrow
            as there, if they are texts, unless given. Names that it has are those of x, in this
            order; others, one for each column, are new ones.
        channels: where images have them: "first" for [N, C, H, W].
        vocabulary: of tokens, the symbol of each id: a text or a list. Samples are text if all are
            single characters.
        end: of tokens, the one that ends a sequence, which is all padding after it.

    Raises:
        DataError: for what is none of these, or does not fit.
        ConfigError: for settings that do not fit.

    Example:
        >>> import numpy as np
        >>> from genjax import from_arrays
        >>> source = from_arrays(np.random.default_rng(0).normal(size=(50, 3)))
        >>> source.spec.shape, source.spec.kind
        ((3,), 'continuous')
    """
    read, tables = _read(_with_columns(x, columns), y, key, label)
    if lengths is not None:
        if list(read) != ["all"] or read["all"].length is not None:
            raise ConfigError(
                "lengths= is for data without splits and lengths of their own: put those of each "
                "split beside it, as lengths_train and lengths_test."
            )
        read = {"all": read["all"]._replace(length=array_of(lengths, f"{WHERE}: lengths"))}
    several = any(batch.length is not None for batch in read.values())
    symbols = _symbols(reading, vocabulary, end, several)
    if symbols is not None:
        _check_ids(read)
        step = step or TOKEN
    as_sequences(read, step, WHERE)
    if step is None:
        xs = with_channels([batch.x for batch in read.values()], channels, WHERE)
        pairs = zip(read.items(), xs, strict=True)
        read = {split: batch._replace(x=one) for (split, batch), one in pairs}
    if columns is not None:
        _check_columns(columns, read, step)
    elif step is None:
        columns = _columns_of_all(tables)
    notes = [symbols.note] if symbols is not None and symbols.note else []
    source = own_source(
        read,
        reading,
        name,
        WHERE,
        step=step,
        columns=columns,
        notes=notes,
        symbols=symbols,
        end=end,
    )
    return source._replace(contents=(WHERE, _identity(read, reading)))


def _identity(read: dict[str, Batch], reading: Reading) -> str:
    """The SHA-256 of the arrays and, where they are split otherwise than usual, of how: the same
    examples in other splits are other data.
    """
    found, held_out = contents_of(read), (reading.valid_fraction, reading.test_fraction)
    if held_out == HELD_OUT:
        return found
    return hashlib.sha256(f"{found} {held_out}".encode()).hexdigest()


def _symbols(
    reading: Reading, vocabulary: Sequence[str] | None, end: int | None, lengths: bool
) -> Symbols | None:
    """What is known of tokens; None for data of another kind.

    Raises:
        ConfigError: for settings that do not fit each other.
    """
    if reading.kind != "tokens":
        for name, value in (("vocabulary", vocabulary), ("end", end)):
            if value is not None:
                raise ConfigError(f"{name} is for token ids: say kind='tokens' as well.")
        return None
    if end is not None and lengths:
        raise ConfigError("Sequences have an end token or lengths, not both: leave one out.")
    if vocabulary is None:
        return Symbols(None, None, None)
    symbols = tuple(vocabulary)
    if len(symbols) < 2 or not all(isinstance(one, str) for one in symbols):
        raise ConfigError(
            "vocabulary must be the symbols of at least two ids, as text: 'abc' or "
            f"['a', 'b', 'c']; got {vocabulary!r:.80}."
        )
    return symbols_of(symbols, "vocabulary")


def _check_ids(read: dict[str, Batch]) -> None:
    """Refuse what are no sequences of ids."""
    shapes = [list(batch.x.shape) for batch in read.values() if batch.x.ndim != 2]
    if shapes:
        raise DataError(
            f"{WHERE}: token ids must be sequences [N, T]; found {' and '.join(map(str, shapes))}."
        )


def _columns_of_all(tables: list[Any]) -> tuple[str, ...] | None:
    """What the columns of all splits are called; None where they have no names.

    Raises:
        DataError: for splits with other names, or in another order.
    """
    found = list(dict.fromkeys(filter(None, map(_columns_of, tables))))
    if len(found) > 1:
        shown = " and ".join(f"[{', '.join(names)}]" for names in found)
        raise DataError(
            f"{WHERE}: the splits must have the same columns in one order; found {shown:.300}."
        )
    return found[0] if found else None


def _with_columns(x: Any, columns: tuple[str, ...] | None) -> Any:
    """x, or each table of a mapping, with these of its columns in this order. Where they are none
    of its own they are new names, by their place.

    Raises:
        ConfigError: for names of which only some are its own, and one that is given twice.
    """
    if columns is None:
        return x
    repeated = [name for name in columns if columns.count(name) > 1]
    if repeated:
        raise ConfigError(f"The column {repeated[0]!r} is given twice: leave one out.")
    if isinstance(x, Mapping) and not hasattr(x, "num_rows"):
        return {name: _with_columns(one, columns) for name, one in x.items()}
    known = _columns_of(x)
    own = [name for name in columns if name in (known or ())]
    if not own:
        return x
    for name in columns:
        if name not in own:  # a slip: nobody calls some columns anew by the names of others
            raise unknown_name(f"column of {WHERE}", name, known or ())
    table: Any = x
    return table.select([*columns]) if hasattr(x, "column_names") else table[[*columns]]


def _check_columns(columns: Sequence[str], read: dict[str, Batch], step: str | None) -> None:
    """Refuse another number of names than there are columns."""
    event = next(iter(read.values())).x.shape[1 if step is None else 2 :]
    if event[-1:] != (len(columns),):
        has = f"{event[-1]} columns" if event else "no columns: a step is one number"
        raise ConfigError(
            f"columns= has {len(columns)} names ({', '.join(columns):.100}), and {WHERE} have "
            f"{has}. Name each of the last axis, or leave columns out."
        )


def _columns_of(table: Any) -> tuple[str, ...] | None:
    """The names of the columns of a table [N, D] of pandas, polars or Arrow; None of anything else,
    and where they are no texts, or not all different: pandas numbers what has no names.
    """
    if len(getattr(table, "shape", ())) != 2:
        return None
    # Those of Arrow have `columns`, too, which are the values.
    named = getattr(table, "column_names", getattr(table, "columns", None))
    found = tuple(named) if isinstance(named, Iterable) else ()
    texts = all(isinstance(name, str) for name in found)
    return found if texts and len({*found}) == table.shape[1] else None


def _read(x: Any, y: Any, key: str | None, label: str | None) -> tuple[dict[str, Batch], list[Any]]:
    """The batch of each split, or of all, and the x that they were made of."""
    if isinstance(x, Mapping) and not hasattr(x, "num_rows"):
        return _of_mapping(x, y, key, label)
    if hasattr(x, "__array__") or isinstance(x, np.ndarray):
        for name, given in (("key", key), ("label", label)):
            if given is not None:
                raise ConfigError(
                    f"{name}={given!r} is a name in a mapping, and x is one array or table: give "
                    "x, and the labels as y, or both in a mapping."
                )
        return {"all": _batch(x, y)}, [x]
    if isinstance(x, str | bytes) or not (hasattr(x, "__len__") and hasattr(x, "__getitem__")):
        raise DataError(
            "Expected an array, a mapping of arrays, or something with a length and examples; "
            f"found a {type(x).__name__}. open_source(PATH) opens a file."
        )
    return {"all": _of_examples(x, y, key, label)}, []


def _batch(x: Any, y: Any) -> Batch:
    try:
        array = of_mapped(x)
        array = array_of(x, f"{WHERE}: x") if array is x else array
        cond = None if y is None else _labels(y)
    except DataError:
        raise
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{WHERE}: cannot be made one array ({error}). Bring all examples to one shape."
        ) from error
    wanted = (("x", array, "biuf", "numbers"), ("y", cond, "biufUS", "numbers or strings"))
    for called, one, kinds, what in wanted:
        if one is not None and one.dtype.kind not in kinds:
            raise DataError(f"{WHERE}: {called} must be {what}; found an array of {one.dtype}.")
    if array.ndim < 2 or len(array) == 0:
        raise DataError(
            f"{WHERE}: x must be [N, D], [N, H, W, C] or [N, T, *event] with N >= 1; found shape "
            f"{list(array.shape)}."
        )
    if cond is not None and (cond.ndim == 0 or len(cond) != len(array)):
        raise DataError(
            f"{WHERE}: labels of another length: {len(array)} examples in x and "
            f"{len(cond) if cond.ndim else 1} in y."
        )
    return Batch(array, cond)


def _labels(y: Any) -> np.ndarray:
    """Labels as an array; texts that pandas and Arrow have as objects are strings."""
    found = array_of(y, f"{WHERE}: y")
    texts = found.dtype.kind == "O" and all(isinstance(one, str) for one in found.flat)
    return found.astype(str) if texts or found.dtype.kind == "T" else found


def _of_mapping(
    x: Mapping[str, Any], y: Any, key: str | None, label: str | None
) -> tuple[dict[str, Batch], list[Any]]:
    stems = (key,) if key is not None else _X
    for stem in stems:
        names = example_names(x, stem, WHERE)
        if not names:
            continue
        if y is not None and "all" not in names:
            raise ConfigError(
                "y is for data without splits of their own: put the labels of each split "
                "beside it, as y_train and y_test."
            )
        lengths = lengths_beside(x, names, WHERE)
        found = {}
        for split, name in names.items():
            batch = _batch(x[name], _label_in(x, split, label) if y is None else y)
            if split in lengths:  # as a file's are taken
                beside = array_of(x[lengths[split]], f"{WHERE}: {lengths[split]}")
                batch = batch._replace(length=beside)
            found[split] = batch
        return found, [x[name] for name in names.values()]
    raise DataError(
        f"{WHERE}: expected one of {', '.join(map(str, stems))}, or the same with _train and "
        f"_test; found {', '.join(map(str, x)) or 'nothing'}. key= says which one x is."
    )


def _label_in(x: Mapping[str, Any], split: str, label: str | None) -> Any:
    """The labels that a mapping has of a split; None if it has none."""
    every = [split_names(x, stem, WHERE) for stem in (_Y if label is None else (label,))]
    found = next((names[split] for names in every if split in names), None)
    others = [name for names in every for name in names.values()]
    of_all = any("all" in names for names in every)
    if found is None and others and label is None and of_all == (split != "all"):
        raise DataError(
            f"{WHERE}: {', '.join(others)} are not the labels of the {split} examples. Give labels "
            "of each split, as y_train and y_test beside x_train and x_test."
        )
    if found is None and label is not None:
        name = label if split == "all" else f"{label}_{split}"
        raise DataError(f"{WHERE}: has no {name}; found {', '.join(map(str, x))}.")
    return None if found is None else x[found]


def _of_examples(x: Any, y: Any, key: str | None, label: str | None) -> Batch:
    """Examples by number, each an array, a picture, (x, y) or a mapping."""
    if len(x) == 0:
        raise DataError(f"{WHERE}: has no examples.")
    try:
        every = [x[index] for index in range(len(x))]
    except Exception as error:  # whatever somebody's data set raises
        raise DataError(f"{WHERE}: an example cannot be read ({error!r:.200}).") from error
    first = every[0]
    if isinstance(first, Mapping):
        names = (key,) if key is not None else _X
        name = next((name for name in names if name in first), None)
        if name is None:
            raise DataError(
                f"{WHERE}: an example has {', '.join(map(str, first))}; key= says which one x is."
            )
        labels = (label,) if label is not None else _Y
        named = next((one for one in labels if one in first), None)
        if named is None and label is not None:
            has = ", ".join(map(str, first))
            raise DataError(f"{WHERE}: an example has no {label}; it has {has}.")
        ys = y
        if y is None and named is not None:
            ys = _called(x, named, _field(every, named))
        return _batch(_stacked(_field(every, name)), ys)
    if isinstance(first, tuple) and len(first) == 2:
        ys = _field(every, 1) if y is None else y
        return _batch(_stacked(_field(every, 0)), ys)
    return _batch(_stacked(every), y)


def _called(data: Any, name: str, labels: list[Any]) -> list[Any]:
    """Labels by the names that a table of Hugging Face's has for them; numbers where it has none,
    or where one of them has none.
    """
    names = getattr((getattr(data, "features", None) or {}).get(name), "names", None)
    if not names or not all(label in range(len(names)) for label in labels):
        return labels
    return [names[label] for label in labels]


def _field(every: list[Any], name: Any) -> list[Any]:
    """One part of every example."""
    found = []
    for index, one in enumerate(every):
        try:
            found.append(one[name])
        except (KeyError, IndexError, TypeError):
            raise DataError(f"{WHERE}: example {index} has no {name!r}: {one!r:.80}.") from None
    return found


def _stacked(every: list[Any]) -> np.ndarray:
    arrays = [array_of(one, f"{WHERE}: example {index}") for index, one in enumerate(every)]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise DataError(
            f"{WHERE}: examples of {len(shapes)} different shapes, such as "
            f"{' and '.join(str(list(shape)) for shape in sorted(shapes)[:2])}. Bring them to one."
        )
    return np.stack(arrays)
