"""Text in JSON lines: one object a line, whose column has the text and another one the class."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from genjax.data.idx import read_bytes
from genjax.data.labels import labels_of
from genjax.data.lines import about_lengths, line_lengths, pad_lines, sizes, split_rows
from genjax.data.pieces import pieces_source
from genjax.data.source import Source, Splits, TooFew, cast, stored_dtype, validate
from genjax.data.streams import (
    Layout,
    Order,
    Unit,
    by_position,
    check_layout,
    check_name,
    stream_source,
    stream_windows,
    text_spec,
)
from genjax.data.text import BYTES, encode
from genjax.errors import ConfigError, DataError
from genjax.protocol import Batch
from genjax.settings import Count, Whole

# Ends a text: the newline, or the character "end of text" where texts have newlines of their own.
_ENDS = ("\n", "\x03")


class _Rows(NamedTuple):
    """What was read: the texts that are not empty, their labels, and what is said of them."""

    texts: list[str]
    labels: list[Any]
    notes: list[str]


def json_lines(
    path: str,
    column: str | None = None,
    label: str | None = None,
    conditional: bool = False,
    unit: Unit = "character",
    layout: Layout = "stream",
    context: Count = 64,
    order: Order = "shuffle",
    max_length: Whole = 0,
    skip_bad: bool = False,
    tokenizer: str | None = None,
) -> Source:
    """The texts of a file of JSON lines, one after the other as one stream, or each an example.

    Each text is ended by a newline or, where texts have newlines themselves, by the character
    U+0003. All else is as with a text file: see `text`. A gzipped file will do.

    Args:
        path: the .jsonl or .ndjson file, with an object a line.
        column: what the text is called there; "text", or the only column of texts, unless given.
        label: what the class is called, a text or a whole number; layout "lines" only.
        conditional: use the label as the condition.
        unit: whether a token is a "character" or a "byte".
        layout: "stream" takes windows of all texts; "lines" makes each text an example.
        context: how many tokens a window of the stream has.
        order: "shuffle" takes windows at random; "stream" lets each place in the batch read on from
            step to step.
        max_length: leave out texts of more tokens than this, 0 for none. Lines only.
        skip_bad: leave out lines that cannot be used, and say how many, instead of stopping.
        tokenizer: the tokenizer.json of Hugging Face's tokenizers, whose pieces of words are then
            the tokens of the stream.

    Raises:
        DataError: for a file that is missing, empty or damaged, lines that are no objects with such
            a text, and too few of them.
        ConfigError: for choices that do not exist or do not fit each other.
    """
    check_name("unit", unit, ("character", "byte"))
    check_layout(layout, order)
    if max_length and layout != "lines":
        raise ConfigError("max_length is for lines: it needs layout='lines' (--layout lines).")
    if conditional and layout != "lines":
        raise ConfigError(
            "A class belongs to one text, and a stream's windows have parts of several: take "
            "layout='lines' (--layout lines), or conditional=False (--no-conditional)."
        )
    where = str(path)
    read = _read(where, column, label, conditional, skip_bad)
    if max_length:
        read = _short(read, max_length, unit, where)
    end = next((one for one in _ENDS if not any(one in text for text in read.texts)), None)
    if end is None:
        raise DataError(
            f"{where}: texts have both newlines and the character U+0003, and one of them must end "
            "a text. Take U+0003 out."
        )
    whole = end.join(read.texts) + end
    if tokenizer is not None:
        source = pieces_source(whole, tokenizer, unit, layout, context, order, where)
        return source._replace(notes=(*source.notes, *read.notes))
    vocabulary = BYTES if unit == "byte" else tuple(sorted(set(whole)))
    tokens = encode(whole, vocabulary, where)
    name = Path(where).stem.removesuffix(".jsonl")
    about = f"{len(vocabulary)} symbols, from {where}"
    if layout == "stream":
        spec = text_spec(name, vocabulary, context, step=unit)
        parts = by_position(tokens.astype(stored_dtype(spec)))
        stream_windows(parts, spec, where)  # refuse a short text now
        about = f"{sizes(parts)} {unit}s of {len(read.texts):,} texts, {about}"
        source = stream_source(spec, lambda: parts, order, about, where)
        return source._replace(files=(where,), notes=(about, *read.notes))
    lengths = line_lengths(tokens, vocabulary.index(end))
    notes = [*read.notes, *about_lengths(lengths, unit, 0, 0)]
    return _examples(read, tokens, vocabulary, end, unit, conditional, name, where, about, notes)


def _examples(
    read: _Rows,
    tokens: np.ndarray,
    vocabulary: tuple[str, ...],
    end: str,
    unit: str,
    conditional: bool,
    name: str,
    where: str,
    about: str,
    notes: Sequence[str],
) -> Source:
    """Each text an example, in a fixed random order."""
    n = len(read.texts)
    if n < 3:
        raise TooFew(
            f"{where}: {n} texts are too few; expected one each for train, valid and test."
        )
    cond, classes = None, None
    if conditional:
        labels = labels_of([np.asarray(read.labels)], where, "classes")
        cond, notes = labels.conds[0], [*notes, labels.note]
        classes = labels.class_names or tuple(map(str, range(labels.n_classes or 0)))
    longest = int(line_lengths(tokens, vocabulary.index(end)).max()) + 1
    spec = text_spec(name, vocabulary, longest, end, classes, step=unit)
    x = pad_lines(tokens.astype(stored_dtype(spec)), spec)
    rows = split_rows(n, max(1, round(n / 10)))
    parts = [Batch(x[part], None if cond is None else cond[part]) for part in rows]
    splits = validate(Splits(*parts), spec, where)
    about = f"{sizes(rows)} texts, {about}"
    return Source(
        spec, lambda: splits, cast(spec), description=about, notes=(about, *notes), files=(where,)
    )


def _read(
    where: str, column: str | None, label: str | None, conditional: bool, skip_bad: bool
) -> _Rows:
    """The texts and labels of the lines.

    Raises:
        DataError: for a line that cannot be used, by its number.
    """
    raw = read_bytes(where).removeprefix(b"\xef\xbb\xbf")
    lines = [(n, line) for n, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{where}: the file is empty.")
    found = {n: _object(line) for n, line in lines}
    objects = [one for one in found.values() if isinstance(one, dict)]
    if not objects:
        first, reason = next(iter(found.items()))
        raise DataError(
            f"{where}: no line is a JSON object; line {first} {reason}. Write one object a line, "
            'such as {"text": "..."}.'
        )
    columns = {name: type(value) for one in objects[:100] for name, value in one.items()}
    name = _column(columns, column, where)
    if conditional or label is not None:  # a name that is mistyped is said, used or not
        label = _label(columns, label, name, where)
    rows, bad = [], []
    for n, one in found.items():
        row = one if isinstance(one, str) else _row(one, name, label if conditional else None)
        if isinstance(row, str):
            bad.append((n, row))
        else:
            rows.append(row)
    if bad and (not skip_bad or not rows):
        more = f", and {len(bad) - 1:,} more lines are bad" if len(bad) > 1 else ""
        raise DataError(
            f"{where}: line {bad[0][0]} {bad[0][1]}{more}. Mend it, or leave such lines out with "
            "--skip-bad."
        )
    notes = [f"the text is the column {name!r}"]
    if label is not None and not conditional:
        notes.append(f"the class {label!r} is not used: --conditional --layout lines uses it")
    notes += [f"left out {len(bad):,} lines that cannot be used"] if bad else []
    full = [row for row in rows if row[0]]
    if len(full) < len(rows):
        notes.append(f"left out {len(rows) - len(full):,} empty texts")
    if not full:
        raise DataError(f"{where}: every text of the column {name!r} is empty.")
    labels = [value for _, value in full]
    if len({type(value) for value in labels}) > 1:
        labels = [str(value) for value in labels]
    return _Rows([text for text, _ in full], labels, notes)


def _object(line: bytes) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
    except json.JSONDecodeError as error:
        return f"is no JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError):
        return "is no JSON that can be read"
    return value if isinstance(value, dict) else f"is a JSON {_called(value)}, no object"


def _called(value: Any) -> str:
    names = {str: "text", list: "list", bool: "truth value", type(None): "null", dict: "object"}
    return names.get(type(value), "number")


def _row(one: dict[str, Any], name: str, label: str | None) -> tuple[str, Any] | str:
    """The text and the label of an object, or what is wrong with it."""
    if name not in one:
        return f"has no {name!r}; it has {_listed(one)}"
    text = one[name]
    if not isinstance(text, str):
        return f"has a {_called(text)} for {name!r}, where a text is expected"
    if any("\ud800" <= symbol <= "\udfff" for symbol in text):
        return f"has half a character in {name!r} (a surrogate without its other half)"
    text = text.replace("\r\n", "\n")
    if label is None:
        return text, None
    value = one.get(label)
    if not isinstance(value, (str, int)):
        there = f"a {_called(value)} for" if label in one else "no"
        return f"has {there} {label!r}, where a class (a text or a whole number) is expected"
    return text, value


def _listed(names: Any) -> str:
    return ", ".join(map(repr, list(names)[:20])) or "nothing"


def _column(columns: dict[str, type], column: str | None, where: str) -> str:
    """What the text is called."""
    if column is not None:
        if column not in columns:
            raise DataError(
                f"{where}: there is no column {column!r}; there are {_listed(columns)}."
            )
        return column
    if "text" in columns:
        return "text"
    texts = [name for name, kind in columns.items() if kind is str]
    if len(texts) == 1:
        return texts[0]
    raise DataError(
        f"{where}: which column is the text? There are {_listed(texts or columns)}: say one with "
        "--column NAME."
    )


def _label(columns: dict[str, type], label: str | None, name: str, where: str) -> str:
    """What the class is called."""
    others = _listed(other for other in columns if other != name)
    if label is None:
        raise DataError(
            f"{where}: conditional needs labels: say which column has the class (--label NAME), of "
            f"{others}; or conditional=False (--no-conditional)."
        )
    if label not in columns or label == name:
        raise DataError(f"{where}: there is no column {label!r} for the class; take {others}.")
    return label


def _short(read: _Rows, longest: int, unit: str, where: str) -> _Rows:
    """Without the texts of more than `longest` tokens."""
    lengths = [len(text.encode() if unit == "byte" else text) for text in read.texts]
    kept = [row for row, length in enumerate(lengths) if length <= longest]
    if not kept:
        raise DataError(
            f"{where}: every text is longer than max_length={longest:,}; the shortest has "
            f"{min(lengths):,}."
        )
    left = len(lengths) - len(kept)
    notes = [f"left out {left:,} texts of more than {longest:,} {unit}s"] if left else []
    texts, labels = ([values[row] for row in kept] for values in (read.texts, read.labels))
    return _Rows(texts, labels, [*read.notes, *notes])
