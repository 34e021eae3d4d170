"""Data that a spec is there for already: other ones than a run was trained on, for `genjax evaluate
--data PATH` and `Run.evaluate(data=...)`, opened as the run's own were; and those for a model of
one's own. They are brought to the spec, or refused.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from genjax.data import Source, Splits, cast, from_arrays, loader, open_source
from genjax.data.rows import on_rows
from genjax.data.source import TooFew
from genjax.errors import DataError
from genjax.protocol import Batch, DataSpec
from genjax.runs.load import Loaded

# What may differ: how they are called, and a scale, which is the run's own.
_FREE = ("name", "shift", "scale", "cond_shift", "cond_scale", "class_names", "n_classes", "levels")


def other_source(run: Loaded, path: str) -> Source:
    """The data at a path, or of that name, as events of the run's spec under their own name.

    Values have the run's kind, and its levels or its two values; classes and symbols are matched by
    what they are called.

    Raises:
        DataError, ConfigError: for data that cannot be read, or are of another spec.
    """
    spec, takes = run.model.spec, inspect.signature(loader(path)).parameters
    kept = {name: value for name, value in run.data.data_options.items() if name != "path"}
    kept |= {"conditional": spec.conditional, "standardize": "none"}
    if "levels" in takes:
        kept |= {"kind": spec.kind, "levels": spec.levels, **_condition(spec), **_two(spec)}
    if spec.columns is not None:  # a table may have others, and have them in another order
        kept["columns"] = spec.columns
    with _enough(path):
        kept = {name: value for name, value in kept.items() if name in takes}
        return brought_to(spec, open_source(path, **kept), path)


def other_in_memory(run: Loaded, data: Any) -> Source:
    """The same of data in memory, or of a `Source`."""
    where = "What was given as data"
    with _enough(where):
        return brought_to(run.model.spec, source_in(data, run.model.spec), where)


@contextlib.contextmanager
def _enough(where: str) -> Iterator[None]:
    """Say why so few examples are refused: a split is not what anybody wanted of them."""
    try:
        yield
    except TooFew as error:
        raise DataError(
            f"{where} has too few examples to evaluate on: 3 at least, as other data are opened "
            "like those of training, in three splits, of which all examples are scored. Give more."
        ) from error


def _condition(spec: DataSpec) -> dict[str, str]:
    """What labels are taken for, whose numbers may be saved otherwise than the run's were."""
    if not spec.conditional:
        return {}
    return {"condition": "vector" if spec.n_classes is None else "classes"}


def _two(spec: DataSpec) -> dict[str, str]:
    """What is 0 and what is 1, which other data need not both have."""
    return {"values": ",".join(map(str, spec.values or (0, 1)))} if spec.kind == "binary" else {}


def in_order(x: Any, columns: Sequence[str] | None) -> Any:
    """A table with the columns that a run was trained on, in their order; what is no table, and
    data of a run without columns, as they are.

    Raises:
        DataError: with the columns that are missing.
    """
    arrow = hasattr(x, "column_names")
    if columns is None or not (arrow or hasattr(x, "columns")):
        return x
    found = list(x.column_names if arrow else x.columns)
    missing = [name for name in columns if name not in found]
    if missing:
        raise DataError(
            f"The table has no column {', '.join(missing)}, which the run was trained on; it has "
            f"{', '.join(map(str, found))}."
        )
    return x.select(list(columns)) if arrow else x[list(columns)]


def source_in(data: Any, spec: DataSpec | None = None) -> Source:
    """The source of a path, a name, or of data in memory; with a spec, of values of its kind."""
    if isinstance(data, Source):
        return data
    if isinstance(data, str | Path):
        return open_source(str(data))
    if spec is None:
        return from_arrays(data)
    taken: dict[str, Any] = {"kind": spec.kind, "levels": spec.levels, "step": spec.step}
    taken |= _condition(spec) | _two(spec)
    if spec.kind == "tokens":
        taken |= {"vocabulary": spec.vocabulary, "end": spec.end}
    return from_arrays(in_order(data, spec.columns), standardize="none", **taken)


def source_for(spec: DataSpec, data: Any) -> Source:
    """Data for a model of one's own, as events of its spec. Where the model has no names of classes
    and the data have as many, they are taken in their order.

    Raises:
        DataError: for data of another spec.
    """
    source = source_in(data, spec)
    if spec.class_names is None and spec.n_classes == source.spec.n_classes:
        spec = dataclasses.replace(spec, class_names=source.spec.class_names)
    return brought_to(spec, source, "What was given as data")


def brought_to(spec: DataSpec, source: Source, where: str) -> Source:
    """A source as events of a run's spec under their own name; classes and symbols are matched by
    what they are called, and sequences whose longest is shorter are padded.

    Args:
        where: what the data are called in messages.

    Raises:
        DataError: for data of another spec.
    """
    wanted = dataclasses.replace(spec, name=source.spec.name)
    _check(source.spec, spec, where)
    classes = _positions(source.spec.class_names, source.spec.n_classes, spec, where)
    symbols = _symbols(source.spec, spec, where)

    def one(batch: Batch) -> Batch:
        x = batch.x if symbols is None else symbols[np.asarray(batch.x)]
        x = on_rows(x, partial(_padded, spec)) if source.spec.shape != spec.shape else x
        cond = batch.cond if classes is None else classes[np.asarray(batch.cond)]
        return batch._replace(x=x, cond=cond)

    def load() -> Splits:
        return Splits(*map(one, source.load()))

    if symbols is None and classes is None and source.spec == wanted:
        return source
    prepare = source.prepare if symbols is None and classes is None else cast(wanted)
    return source._replace(spec=wanted, load=load, prepare=prepare)


def _check(found: DataSpec, spec: DataSpec, path: str) -> None:
    """Refuse what cannot be brought to the spec."""
    free = (*_FREE, "values", *["vocabulary", "end"] * spec.text)
    new, old = dataclasses.asdict(found), dataclasses.asdict(spec)
    # Steps may be called otherwise, and an array has no names of columns.
    free += ("step",) * (found.step is not None and spec.step is not None)
    free += ("columns",) * (found.columns is None or spec.columns is None)
    free += ("shape",) * _shorter(found, spec)
    names = [name for name in new if name not in free and new[name] != old[name]]
    if (spec.n_classes is None) != (found.n_classes is None):
        names.append("n_classes")
    if names:
        lines = "; ".join(
            f"{name} is {_shown(new[name])}, the run has {_shown(old[name])}" for name in names
        )
        raise DataError(f"{path} is of another kind than the data of the run: {lines}.")
    if found.values != spec.values:
        theirs, ours = (" and ".join(map(str, one.values or (0, 1))) for one in (found, spec))
        raise DataError(
            f"{path} has the values {theirs} as 0 and 1, the data of the run {ours}. Bring it with "
            "the same."
        )
    ends = [one.vocabulary[one.end] for one in (found, spec) if one.vocabulary and one.end]
    if len({*ends}) > 1:
        raise DataError(
            f"{path} ends its texts with {ends[0]!r}, and the data of the run with {ends[1]!r}: "
            "bring it with the same, lines or texts of several."
        )
    if (found.levels or 0) > (spec.levels or 0) and not spec.text:
        raise DataError(f"{path} has {found.levels} levels, the data of the run {spec.levels}.")


def _shorter(found: DataSpec, spec: DataSpec) -> bool:
    """Whether the longest sequence is shorter than the run's, of data that say where one ends."""
    both = (found, spec)
    ends = all(one.lengths for one in both) or all(one.end is not None for one in both)
    return ends and found.shape[0] < spec.shape[0] and found.shape[1:] == spec.shape[1:]


def _padded(spec: DataSpec, x: np.ndarray) -> np.ndarray:
    """Sequences [N, T, *event] with padding up to the longest of a spec."""
    wide = [(0, 0)] * x.ndim
    wide[1] = (0, spec.shape[0] - x.shape[1])
    return np.pad(x, wide, constant_values=spec.end or 0)


def _shown(value: Any) -> str:
    """A value of a spec in a message: a tokenizer is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text):,} characters)"


def _positions(names: Any, n: int | None, spec: DataSpec, path: str) -> np.ndarray | None:
    """Index there -> index of the class in the run with the same name; None where they agree."""
    if n is None or (names == spec.class_names and n <= (spec.n_classes or 0)):
        return None
    theirs = names or tuple(map(str, range(n)))
    ours = spec.class_names or tuple(map(str, range(spec.n_classes or 0)))
    return _matched(theirs, ours, "classes", path)


def _symbols(found: DataSpec, spec: DataSpec, path: str) -> np.ndarray | None:
    """The same for the symbols of a text."""
    if not spec.text or found.vocabulary == spec.vocabulary:
        return None
    return _matched(found.vocabulary or (), spec.vocabulary or (), "symbols", path)


def _matched(theirs: tuple, ours: tuple, what: str, path: str) -> np.ndarray:
    lacking = [name for name in theirs if name not in ours]
    if lacking:
        raise DataError(
            f"{path} has {what} that the run does not know: {', '.join(map(repr, lacking[:10]))}."
        )
    return np.asarray([ours.index(name) for name in theirs], np.int32)
