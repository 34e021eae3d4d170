"""A user's own tables: CSV, TSV and Parquet files with named columns."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genjax.data import kept, rows
from genjax.data.own import Reading, own_source
from genjax.data.source import Source
from genjax.errors import ConfigError, DataError, regular_file, unknown_name
from genjax.protocol import Batch
from genjax.settings import builder, is_number


@builder
def table(
    path: str,
    *,
    conditional: bool = False,
    columns: tuple[str, ...] | None = None,
    label: str | None = None,
    condition_columns: tuple[str, ...] | None = None,
    reading: Reading = Reading(),
) -> Source:
    """A table with named columns: an example is a row, x are its numbers, [N, D].

    Columns of numbers are taken; those of texts only as the label, and the row index that pandas
    writes only if it is asked for. Numbers are real numbers unless `kind` says otherwise, or all
    are 0 and 1. Values that are missing are refused by row and column. A Parquet file larger than
    512 MiB is kept as one array in the cache folder, and read from there row by row. A sample is a
    table of the same columns again.

    Args:
        path: the .csv, .tsv or .parquet file.
        conditional: use the label, or the columns of the condition, as the condition.
        columns: the columns that x has, in this order; all of numbers unless given.
        label: the column that has the class.
        condition_columns: the columns that make the condition vector.

    Raises:
        DataError: for a file that is missing, damaged or no table, and for missing values.
        ConfigError: for a column that does not exist, or settings that do not fit each other.
    """
    where = os.fspath(path)
    regular_file(where)
    _check_start(where)
    large = _is_large(where)
    read = _read(where, columns=[]) if large else _read(where)
    names, notes = _chosen(read, columns, label, condition_columns, where)
    real = reading.kind == "auto"  # columns of whole numbers have no range in common
    if large:
        x = _on_disk(where, names, real)
        others = [*([label] if label else []), *(condition_columns or ())]
        read = _read(where, columns=others) if others and conditional else read
    else:
        x = _stacked(read, names, where, real)
    if not conditional and (label is not None or condition_columns is not None):
        unused = [label] if label is not None else list(condition_columns or ())
        notes.append(f"{', '.join(unused)} is not used: --conditional takes it as the condition")
    cond = _condition(read, label, condition_columns, where) if conditional else None
    if condition_columns is not None:  # numbers, be they whole or not
        reading = dataclasses.replace(reading, condition="vector")
    parts = {"all": Batch(x, cond)}
    name = Path(where).stem
    return own_source(parts, reading, name, where, columns=names, files=(where,), notes=notes)


def _is_large(where: str) -> bool:
    """Whether a Parquet file has more numbers than are read into memory."""
    if not where.lower().endswith(".parquet"):
        return False
    with contextlib.suppress(Exception):  # which `_read` tells
        from pyarrow import parquet

        about = parquet.read_metadata(where)
        return about.num_rows * about.num_columns * 8 > rows.LIMIT
    return False


def _stacked(read: Any, names: Sequence[str], where: str, real: bool, before: int = 0) -> Any:
    """The columns of numbers side by side, [N, D]; `before` is how many rows the file has before
    these.
    """
    x = np.stack([_numbers(read, name, where, before) for name in names], axis=1)
    return x.astype(np.float64) if real else x


def _on_disk(where: str, names: Sequence[str], real: bool) -> Any:
    """The same of a large Parquet file, kept in the cache folder; some of its rows are in memory at
    a time.

    Raises:
        DataError: for values that are missing, and where it cannot be kept.
    """

    def stamp() -> list[int]:
        about = os.stat(where)
        # A copy that keeps the time of its original has another ctime.
        return [about.st_size, about.st_mtime_ns, about.st_ctime_ns]

    begun = stamp()
    text = json.dumps([os.path.abspath(where), begun, list(names), real, 1])
    path = kept.folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npy"
    found = kept.read(path)
    if found is not None:
        return found[0]

    def parts() -> Iterator[np.ndarray]:
        import pyarrow
        from pyarrow import parquet

        done = 0
        try:
            with parquet.ParquetFile(where) as file:
                for batch in file.iter_batches(columns=list(names)):
                    some = pyarrow.Table.from_batches([batch])
                    yield _stacked(some, names, where, real, done)
                    done += some.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(where, error) from error
        if stamp() != begun:
            raise DataError(f"{where} changed while it was being read. Start again.")

    return kept.stream(path, parts(), where)


def _unreadable(where: str, error: BaseException) -> DataError:
    reason = str(error).splitlines()[0][:300]
    return DataError(f"{where}: cannot be read as a table: {reason}")


def _read(where: str, columns: list[str] | None = None) -> Any:
    """The table, by pyarrow; of a Parquet file with these columns, or none of the rows where these
    are none.

    Raises:
        DataError: for what cannot be read as one.
    """
    try:
        from pyarrow import ArrowException, csv, parquet
    except ModuleNotFoundError:
        raise DataError(
            f"{where}: tables are read by pyarrow, which is not installed: pip install "
            "'genjax-zoo[data]'."
        ) from None
    try:
        if where.lower().endswith(".parquet"):
            if columns == []:
                return _named_once(parquet.read_schema(where).empty_table(), where)
            found = parquet.read_table(where, columns=columns)
        else:
            tab = where.lower().endswith(".tsv")
            parse = csv.ParseOptions(delimiter="\t" if tab else ",")
            found = csv.read_csv(where, parse_options=parse)
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such file.") from None
    except (ArrowException, OSError, ValueError) as error:
        raise _unreadable(where, error) from error
    if not where.lower().endswith(".parquet"):
        _check_utf8(found, where)
    _named_once(found, where)
    if found.num_rows == 0:
        raise DataError(f"{where}: the table has no rows.")
    headless = [name for name in found.column_names if is_number(name)]
    if len(headless) == len(found.column_names) and not where.lower().endswith(".parquet"):
        raise DataError(
            f"{where}: its first line is numbers ({', '.join(headless[:5])}), where the names of "
            "the columns are expected. Write a line of names before it."
        )
    return found


def _check_start(where: str) -> None:
    """Refuse what is packed, and UTF-16, by their first bytes: pyarrow has other names for them.

    Raises:
        DataError: with how to unpack or write it.
    """
    start = b""
    with contextlib.suppress(OSError), open(where, "rb") as file:  # which `_read` tells
        start = file.read(1024)
    if start[:2] == b"\x1f\x8b":
        raise DataError(
            f"{where}: is compressed by gzip. Unpack it, and give the plain file: "
            "gunzip < old.csv > new.csv."
        )
    if start[:4] == b"PK\x03\x04":
        raise DataError(
            f"{where}: is a zip archive, or a spreadsheet. Unpack it, or save it as CSV UTF-8 in "
            "the spreadsheet."
        )
    if start.count(0) > len(start) / 4 and not where.lower().endswith(".parquet"):
        raise _not_utf8(where)


def _check_utf8(found: Any, where: str) -> None:
    """Refuse a text in another encoding, such as cp1252: pyarrow takes its values as bytes, and
    decodes its names of columns only when they are asked for.

    Raises:
        DataError: with how to write it.
    """
    from pyarrow import types

    with contextlib.suppress(UnicodeDecodeError):
        if found.column_names and not any(map(types.is_binary, found.schema.types)):
            return
    raise _not_utf8(where)


def _not_utf8(where: str) -> DataError:
    return DataError(
        f"{where}: is not UTF-8. Save it as UTF-8, which spreadsheets call CSV UTF-8; for a file "
        "of Windows: iconv -f CP1252 -t UTF-8 old.csv > new.csv (-f UTF-16 for Unicode text)."
    )


def _named_once(found: Any, where: str) -> Any:
    twice = [name for name in found.column_names if found.column_names.count(name) > 1]
    if twice:
        raise DataError(
            f"{where}: several columns are called {twice[0]!r}. Give each a name of its own."
        )
    return found


def _numeric(kind: Any) -> bool:
    from pyarrow import types

    is_any = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    return any(is_one(kind) for is_one in is_any)


def _chosen(
    read: Any,
    columns: tuple[str, ...] | None,
    label: str | None,
    condition_columns: tuple[str, ...] | None,
    where: str,
) -> tuple[tuple[str, ...], list[str]]:
    """The columns of x, and what is said of them."""
    known = read.column_names
    for flag, chosen in (("--columns", columns), ("--condition-columns", condition_columns)):
        if chosen is not None and not chosen:
            raise ConfigError(f"{flag} names at least one column, or is left out.")
    other = [*([label] if label else []), *(condition_columns or ())]
    for name in [*(columns or ()), *other]:
        if name not in known:
            raise unknown_name(f"column of {where}", name, known)
    if columns is not None:
        repeated = [name for name in columns if columns.count(name) > 1 or name in other]
        if repeated:
            raise ConfigError(f"The column {repeated[0]!r} is given twice.")
        return columns, [f"columns {', '.join(columns)}"]
    indices = [name for name in _row_indices(read) if name not in other]
    free = [name for name in known if name not in (*other, *indices)]
    found = tuple(name for name in free if _numeric(read.schema.field(name).type))
    left = [name for name in free if name not in found]
    shown = ", ".join(map(repr, indices))
    index = [f"the row index of pandas: {shown} (--columns takes it)"] if indices else []
    for name in left:
        _check_text(read.column(name), name, where)
    if not found:
        texts = [f"{name} ({read.schema.field(name).type})" for name in left[:5]]
        raise DataError(f"{where}: no column has numbers; found {', '.join([*texts, *index])}.")
    notes = [f"columns {', '.join(found)}"]
    notes += [f"left out {one}" for one in index]
    if left:
        notes.append(f"left out, as they are no numbers: {', '.join(left)}")
    return found, notes


def _row_indices(read: Any) -> list[str]:
    """The columns that are the row index that pandas writes: in CSV the first one, without a name
    or with what pandas reads that as; in Parquet what its metadata or the name say.
    """
    known = read.column_names
    said = []
    with contextlib.suppress(ValueError, TypeError, KeyError):  # of metadata that are damaged
        said = list(read.schema.pandas_metadata["index_columns"])
    return [
        name
        for place, name in enumerate(known)
        if name in said
        or re.fullmatch(r"__index_level_\d+__", name)
        or (place == 0 and name in ("", "Unnamed: 0"))
    ]


def _check_text(column: Any, name: str, where: str) -> None:
    """Refuse a column of numbers, of which a few cells are none: nobody wants it left out.

    Raises:
        DataError: with the row.
    """
    some = [str(value) for value in column.slice(0, 10_000).to_pylist() if value is not None]
    text = _first_text(column) if sum(map(is_number, some)) > len(some) / 2 else None
    if text is not None:
        raise DataError(
            f"{where}: the column {name!r} has numbers, but {text}. Mend it, or say which columns "
            "are meant with --columns."
        )


def _numbers(read: Any, name: str, where: str, before: int = 0) -> np.ndarray:
    """A column of numbers [N]; whole numbers and truth values stay so. The file has so many rows
    before these.

    Raises:
        DataError: for missing values and for texts, with the row.
    """
    column, kind = read.column(name), read.schema.field(name).type
    if not _numeric(kind):
        text = _first_text(column) or "its numbers are texts"
        raise DataError(
            f"{where}: the column {name!r} has no numbers but {kind}: {text}. Leave it out of "
            "--columns, or make it the --label."
        )
    _check_missing(column, name, where, before)
    array = column.to_numpy()
    if array.dtype.kind == "O":  # decimals
        array = array.astype(np.float64)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array))[0])
        raise DataError(
            f"{where}: row {before + row + 1} of column {name!r} is {array[row]}. Fill it in, or "
            "leave such rows out."
        )
    return array


def _first_text(column: Any) -> str | None:
    """The first value that is no number, with its row; None where all are numbers, as texts."""
    for row, value in enumerate(column.to_pylist()):
        if value is not None and not is_number(str(value)):
            return f"row {row + 1} is {str(value)[:40]!r}"
    return None


def _check_missing(column: Any, name: str, where: str, before: int = 0) -> None:
    if column.null_count:
        row = before + column.is_null().to_pylist().index(True)
        raise _missing(row, column.null_count, name, where)


def _missing(row: int, count: int, name: str, where: str) -> DataError:
    """What is said of values that are missing, the first of them in a row from 0."""
    more = f", and {count - 1} more" if count > 1 else ""
    return DataError(
        f"{where}: row {row + 1} of column {name!r} is missing{more}. Fill in what is missing, or "
        "leave such rows out."
    )


def _condition(
    read: Any, label: str | None, condition_columns: tuple[str, ...] | None, where: str
) -> np.ndarray:
    """The label's values [N], or the condition vectors [N, C]."""
    if (label is None) == (condition_columns is None):
        raise DataError(
            f"{where}: conditional needs labels: say which column has the class (--label NAME), or "
            f"which ones make a vector (--condition-columns NAME NAME); found "
            f"{', '.join(read.column_names)}. Or conditional=False (--no-conditional)."
        )
    if condition_columns is not None:
        return np.stack([_numbers(read, name, where) for name in condition_columns], axis=1)
    column = read.column(label)
    _check_missing(column, str(label), where)
    if _numeric(read.schema.field(label).type):
        return _numbers(read, str(label), where)
    found = [str(value) for value in column.to_pylist()]
    if "" in found:  # as a table of text has what is missing
        raise _missing(found.index(""), found.count(""), str(label), where)
    return np.asarray(found)
