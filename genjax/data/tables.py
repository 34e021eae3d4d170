"""A user's own tables: CSV, TSV and Parquet files with named columns."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from genjax.data.own import Reading, own_source
from genjax.data.source import Source
from genjax.errors import ConfigError, DataError, regular_file, unknown_name
from genjax.protocol import Batch
from genjax.settings import builder


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

    Columns of numbers are taken; those of texts only as the label. Numbers are real numbers unless
    `kind` says otherwise, or all are 0 and 1. Values that are missing are
    refused by row and column. A sample is a table of the same columns again.

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
    read = _read(where)
    names, notes = _chosen(read, columns, label, condition_columns, where)
    x = np.stack([_numbers(read, name, where) for name in names], axis=1)
    if reading.kind == "auto":  # columns of whole numbers have no range in common
        x = x.astype(np.float64)
    cond = _condition(read, label, condition_columns, where) if conditional else None
    if condition_columns is not None:  # numbers, be they whole or not
        reading = dataclasses.replace(reading, condition="vector")
    parts = {"all": Batch(x, cond)}
    name = Path(where).stem
    return own_source(parts, reading, name, where, columns=names, files=(where,), notes=notes)


def _read(where: str) -> Any:
    """The table, by pyarrow.

    Raises:
        DataError: for what cannot be read as one.
    """
    regular_file(where)
    try:
        from pyarrow import ArrowException, csv, parquet
    except ModuleNotFoundError:
        raise DataError(
            f"{where}: tables are read by pyarrow, which is not installed: pip install "
            "'genjax-zoo[data]'."
        ) from None
    try:
        if where.lower().endswith(".parquet"):
            found = parquet.read_table(where)
        else:
            tab = where.lower().endswith(".tsv")
            parse = csv.ParseOptions(delimiter="\t" if tab else ",")
            found = csv.read_csv(where, parse_options=parse)
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such file.") from None
    except (ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:300]
        raise DataError(f"{where}: cannot be read as a table: {reason}") from error
    twice = [name for name in found.column_names if found.column_names.count(name) > 1]
    if twice:
        raise DataError(
            f"{where}: several columns are called {twice[0]!r}. Give each a name of its own."
        )
    if found.num_rows == 0:
        raise DataError(f"{where}: the table has no rows.")
    headless = [name for name in found.column_names if _is_number(name)]
    if len(headless) == len(found.column_names) and not where.lower().endswith(".parquet"):
        raise DataError(
            f"{where}: its first line is numbers ({', '.join(headless[:5])}), where the names of "
            "the columns are expected. Write a line of names before it."
        )
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
    other = [*([label] if label else []), *(condition_columns or ())]
    for name in [*(columns or ()), *other]:
        if name not in known:
            raise unknown_name(f"column of {where}", name, known)
    if columns is not None:
        repeated = [name for name in columns if columns.count(name) > 1 or name in other]
        if repeated:
            raise ConfigError(f"The column {repeated[0]!r} is given twice.")
        return columns, [f"columns {', '.join(columns)}"]
    free = [name for name in known if name not in other]
    found = tuple(name for name in free if _numeric(read.schema.field(name).type))
    left = [name for name in free if name not in found]
    if not found:
        texts = ", ".join(f"{name} ({read.schema.field(name).type})" for name in left[:5])
        raise DataError(f"{where}: no column has numbers; found {texts}.")
    notes = [f"columns {', '.join(found)}"]
    if left:
        notes.append(f"left out, as they are no numbers: {', '.join(left)}")
    return found, notes


def _numbers(read: Any, name: str, where: str) -> np.ndarray:
    """A column of numbers [N]; whole numbers and truth values stay so.

    Raises:
        DataError: for missing values and for texts, with the row.
    """
    column, kind = read.column(name), read.schema.field(name).type
    if not _numeric(kind):
        raise DataError(
            f"{where}: the column {name!r} has no numbers but {kind}: {_first_text(column)}. Leave "
            "it out of --columns, or make it the --label."
        )
    _check_missing(column, name, where)
    array = column.to_numpy()
    if array.dtype.kind == "O":  # decimals
        array = array.astype(np.float64)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array))[0])
        raise DataError(
            f"{where}: row {row + 1} of column {name!r} is {array[row]}. Fill it in, or leave such "
            "rows out."
        )
    return array


def _first_text(column: Any) -> str:
    """The first value that is no number, with its row."""
    for row, value in enumerate(column.to_pylist()):
        if value is not None and not _is_number(str(value)):
            return f"row {row + 1} is {str(value)[:40]!r}"
    return "its numbers are texts"


def _check_missing(column: Any, name: str, where: str) -> None:
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(
            f"{where}: row {row + 1} of column {name!r} is missing, and {column.null_count - 1} "
            "more. Fill them in, or leave such rows out."
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
    return np.asarray([str(value) for value in column.to_pylist()])
