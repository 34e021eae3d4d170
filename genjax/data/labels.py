"""What a user's labels or condition vectors are: classes under their names, or vectors."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from genjax.errors import ConfigError, DataError
from genjax.spec import DataSpec
from genjax.values import array_of

Condition = Literal["auto", "classes", "vector"]

MANY = 100  # whole numbers saved as floats are classes up to so many different ones


class Labels(NamedTuple):
    """Conditions as a spec has them.

    Attributes:
        conds: of each split, int32 labels [N] or float32 vectors [N, C].
        n_classes, cond_dim: how many classes, or C; the other one is None.
        class_names: what the classes are called; None where they are the numbers 0 .. n_classes-1.
        note: what was decided, and why.
    """

    conds: list[np.ndarray]
    n_classes: int | None
    cond_dim: int | None
    class_names: tuple[str, ...] | None
    note: str


def labels_of(conds: list[np.ndarray], where: str, how: Condition = "auto") -> Labels:
    """Labels [N] or [N, 1] of numbers or strings, one-hot rows [N, K], or vectors [N, C], of every
    split.

    Classes are the values that occur, in their order, under their names; of one-hot rows the
    columns. Whole numbers that are saved as floats are classes too, up to a hundred different ones,
    unless `how` says "vector".

    Raises:
        DataError: for arrays that are none of these, or differ between splits.
    """
    conds = [cond[:, 0] if cond.ndim == 2 and cond.shape[1] == 1 else cond for cond in conds]
    kinds = {cond.dtype.kind for cond in conds}
    if kinds <= {"U", "S"}:
        return _strings(conds, where, how)
    if how != "vector" and all(cond.ndim == 2 for cond in conds) and _one_hot(conds):
        return _of_one_hot(conds, where)
    flat = all(cond.ndim == 1 for cond in conds)
    if how != "vector" and flat and kinds <= set("biu"):
        return _classes(conds, "whole numbers")
    if flat and kinds <= set("biuf") and _whole(conds):
        different = len(np.unique(np.concatenate(conds)))
        if how == "classes" or (how == "auto" and different <= MANY):
            note = "whole numbers as floats; --condition vector takes them as a number"
            return _classes([cond.astype(np.int64) for cond in conds], note)
    if how == "classes" or (how == "auto" and not kinds & {"f"}):
        found = ", ".join(f"{cond.dtype}{list(cond.shape)}" for cond in conds)
        raise DataError(
            f"{where}: expected labels [N] (whole numbers or strings), one-hot rows [N, K] or "
            f"float vectors [N, C]; found {found}. --condition vector takes whole numbers [N, C] "
            "as vectors."
        )
    return _vectors(conds, where)


def _whole(conds: list[np.ndarray]) -> bool:
    return all(bool(np.all(np.isfinite(c) & (c == np.floor(c)))) for c in conds)


def _one_hot(conds: list[np.ndarray]) -> bool:
    """Whether every row has one 1 and else zeros, in at least 2 columns."""
    return all(
        cond.dtype.kind in "biuf"
        and cond.shape[1] >= 2
        and bool(np.isin(cond, (0, 1)).all())
        and bool((cond.sum(axis=1) == 1).all())
        for cond in conds
    )


def _of_one_hot(conds: list[np.ndarray], where: str) -> Labels:
    columns = {cond.shape[1] for cond in conds}
    if len(columns) > 1:
        raise DataError(
            f"{where}: one-hot labels must have as many columns in every split; found "
            f"{sorted(columns)}."
        )
    labels = [cond.argmax(axis=1).astype(np.int32) for cond in conds]
    n = columns.pop()
    return Labels(labels, n, None, None, f"{n} classes (one-hot rows){_untrained(labels[0], n)}")


def _strings(conds: list[np.ndarray], where: str, how: Condition) -> Labels:
    if how == "vector":
        raise DataError(f"{where}: strings are classes; leave --condition vector out.")
    if any(cond.ndim != 1 for cond in conds):
        found = ", ".join(str(list(cond.shape)) for cond in conds)
        raise DataError(f"{where}: expected one string for each example, [N]; found {found}.")
    try:
        texts = [
            np.char.decode(cond, "utf-8") if cond.dtype.kind == "S" else cond for cond in conds
        ]
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: class names must be UTF-8: {error}.") from None
    return _classes(texts, "strings")


def _classes(conds: list[np.ndarray], why: str) -> Labels:
    """The values that occur as classes 0, 1, ..., in their order."""
    found: Any = np.unique(np.concatenate(conds))
    n = len(found)
    labels = [np.searchsorted(found, cond).astype(np.int32) for cond in conds]
    if found.dtype.kind in "iu" and np.array_equal(found, np.arange(n)):
        return Labels(labels, n, None, None, f"{n} classes ({why}){_untrained(labels[0], n)}")
    names = tuple(str(value) for value in found.tolist())
    note = f"{n} classes ({why}): {_listed(names)}{_untrained(labels[0], n, names)}"
    return Labels(labels, n, None, names, note)


def _untrained(labels: np.ndarray, n: int, names: tuple[str, ...] | None = None) -> str:
    """What a note says of the classes without an example among labels; nothing where all have."""
    absent = np.setdiff1d(np.arange(n), labels).tolist()
    if not absent:
        return ""
    lacking = _listed(tuple(str(index) if names is None else names[index] for index in absent))
    return f"; no example of {lacking} is in the training split"


def _listed(names: tuple[str, ...], most: int = 10) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names) - most} more)"


def _vectors(conds: list[np.ndarray], where: str) -> Labels:
    conds = [cond[:, None] if cond.ndim == 1 else cond for cond in conds]
    lengths = {cond.shape[1:] for cond in conds}
    if len(lengths) > 1 or conds[0].ndim != 2 or conds[0].shape[1] == 0:
        found = ", ".join(str(list(cond.shape)) for cond in conds)
        raise DataError(f"{where}: expected condition vectors [N, C] of one length; found {found}.")
    size = conds[0].shape[1]
    return Labels(conds, None, size, None, f"a condition vector of {size} numbers")


# --- asking for a condition -----------------------------------------------------------------------


def condition_of(spec: DataSpec, asked: Any, n: int) -> np.ndarray | None:
    """The condition of n samples that is asked for, as a model takes it.

    Args:
        asked: a class by its name or number; several of them (a list, an array, or a text with
            commas): one for each sample in their order, or another number to cycle through; the
            numbers of a condition vector, or an array [n, cond_dim]. None is every class in turn,
            sorted.

    Raises:
        ConfigError: for a class that does not exist, or what is no number.

    Example:
        >>> pets = DataSpec((2,), "binary", n_classes=2, class_names=("cat", "dog"))
        >>> condition_of(pets, "dog", 3)
        array([1, 1, 1], dtype=int32)
    """
    if asked is None:
        return None if spec.n_classes is None else _in_turn(range(spec.n_classes), n)
    if not spec.conditional:
        raise ConfigError(
            f"This model of {spec.name} is unconditional: leave `cond` out (--cond as a flag)."
        )
    if spec.n_classes is None:
        return _vectors_of(spec, asked, n)
    labels = _labels_of(spec, asked)
    return labels if len(labels) == n else _in_turn(labels.tolist(), n)


def condition_of_each(spec: DataSpec, given: Any, n: int) -> np.ndarray | None:
    """The condition of n examples that are there: one for all of them, or one for each in their
    order; otherwise as `condition_of` has it.

    Raises:
        ConfigError: for none, and for another number of classes as well.
    """
    if spec.conditional and given is None:
        raise ConfigError(f"This model of {spec.name} is conditional: give cond=.")
    if spec.n_classes is not None:
        found = len(_labels_of(spec, given))
        if found not in (1, n):
            raise ConfigError(
                f"cond must be one class, or a class for each of {n} examples; got {found}."
            )
    return condition_of(spec, given, n)


def _labels_of(spec: DataSpec, asked: Any) -> np.ndarray:
    """The indices of the classes that are asked for, [m], in their order."""
    if isinstance(asked, str):
        asked = [asked] if asked in (spec.class_names or ()) else asked.split(",")
    try:
        array: Any = array_of(asked, "cond")
    except DataError:
        raise
    except ValueError:  # lists of several lengths
        array = np.empty((0, 0))
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim > 1 or not array.size:
        raise ConfigError(f"cond takes a class or several of them, [n]; got {asked!r:.80}.")
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    parts = array.reshape(-1).tolist()
    known = {part: _class_of(spec, part) for part in dict.fromkeys(parts)}
    return np.asarray([known[part] for part in parts], np.int32)


def _vectors_of(spec: DataSpec, asked: Any, n: int) -> np.ndarray:
    """Condition vectors [n, cond_dim]: one for all, or an array of them."""
    try:
        given = asked.split(",") if isinstance(asked, str) else asked
        found = array_of(given, "cond").astype(np.float32)
    except DataError:
        raise
    except (ValueError, TypeError):
        found = np.full(1, np.nan, np.float32)
    if not np.isfinite(found).all():
        raise ConfigError(f"--cond takes numbers between commas; got {asked!r:.80}.")
    if found.ndim == 1 and spec.cond_dim == 1 and len(found) == n:
        return found[:, None]
    return np.tile(found.reshape(-1), (n, 1)) if found.ndim < 2 else found


def _class_of(spec: DataSpec, part: Any) -> int:
    """The index of a class that is asked for by its name or, where they have none, its number. A
    number is an index as well where no name is one.
    """
    names, text = spec.class_names or (), str(part)
    text = text if text in names else text.strip()
    if isinstance(part, float) and part.is_integer():
        text = str(int(part))
    for meant in (names, [name.strip() for name in names]):
        if meant.count(text) == 1:
            return meant.index(text)
    n = spec.n_classes or 0
    number = None if isinstance(part, str) and names else _number(text)
    numbered = any(_number(name) is not None for name in names)
    if numbered or number is None or number not in range(n):
        called = f" called {_listed(names, 20)}" if names else f" 0..{n - 1}"
        raise ConfigError(f"--cond takes classes{called}; got {text!r}.")
    return int(number)


def _number(text: str) -> float | None:
    """The number that a text is; None for one that is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _in_turn(classes: Sequence[int], n: int) -> np.ndarray:
    """n labels, each of the classes as often as the others, sorted."""
    return np.sort(np.resize(np.asarray(classes, np.int32), n))
