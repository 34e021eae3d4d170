"""What the values of a user's arrays are: binary, levels or real numbers; where their channels are;
and the scale that networks see.
"""

import math
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np

from genjax.data.rows import chunks, extent, moments, on_rows
from genjax.errors import ConfigError, DataError
from genjax.spec import Kind

Standardize = Literal["auto", "none", "event", "element"]
Channels = Literal["auto", "first", "last"]

SEVERAL = 100  # of fewer values a split is not said to have another range


# --- shapes ---------------------------------------------------------------------------------------


def with_channels(xs: list[np.ndarray], channels: Channels, where: str) -> list[np.ndarray]:
    """Images [N, H, W] and [N, H, W, C] as [N, H, W, C]; with channels "first" those of [N, C, H,
    W]. Other arrays as they are.

    Raises:
        DataError: for images that seem to have their channels first, where nothing is said.
        ConfigError: for channels first of arrays that are no images of 4 axes.
    """
    if channels == "first":
        if xs[0].ndim != 4:
            raise ConfigError(
                f"--channels first is for images [N, C, H, W]; {where} has {xs[0].ndim} axes. "
                "Leave it out."
            )
        return [on_rows(x, partial(np.moveaxis, source=1, destination=-1)) for x in xs]
    if channels == "auto" and xs[0].ndim == 4:
        first, height, last = xs[0].shape[1], xs[0].shape[2], xs[0].shape[3]
        if first in (1, 2, 3, 4) and last > 4 and height > 4:
            raise DataError(
                f"{where}: images of shape {list(xs[0].shape[1:])} seem to have their {first} "
                "channels first. --channels first transposes them; --channels last takes them as "
                "height, width and channels, as they are."
            )
    return [on_rows(x, itemgetter((..., None))) if x.ndim == 3 else x for x in xs]


# --- kinds ----------------------------------------------------------------------------------------


class Values(NamedTuple):
    """Values of a kind.

    Attributes:
        xs: of each split; binary ones as 0 and 1, whole numbers as they are.
        kind, levels: as in a spec.
        note: what was decided, and why.
        two: what binary ones were, if not 0 and 1.
    """

    xs: list[np.ndarray]
    kind: Kind
    levels: int | None
    note: str
    two: tuple[float, ...] | None = None


def values_of(
    xs: list[np.ndarray],
    kind: Literal["auto", "binary", "discrete", "continuous"],
    levels: int | None,
    where: str,
    own_splits: bool,
    two: tuple[float, ...] | None = None,
) -> Values:
    """The kind of the values of all splits, the training split first.

    bool, whole numbers of two values (of which the smaller is taken as 0), and floats that are 0
    and 1 only are binary; uint8 has 256 levels, other whole numbers max + 1, and other floats are
    real numbers, unless `kind` says otherwise; floats that are whole numbers may be declared
    discrete. What has `levels` is.

    Args:
        levels: how many levels discrete values have; found in the data unless given.
        own_splits: whether the splits were given, and so may differ.
        two: the values of binary data; found in the data unless given.

    Raises:
        DataError: for values that do not fit what is declared, or splits that differ in dtype or
            range.
        ConfigError: for levels, or two values, of what is declared to have none.
    """
    _same_dtype(xs, where)
    floating = xs[0].dtype.kind == "f"
    found = _few(xs)
    decided, why = kind, "as declared"
    if kind == "auto" and two is not None:
        decided = "binary"
    elif kind == "auto" and levels is None:
        decided, why = _kind_of(xs, found, floating)
    elif kind == "auto":
        decided = "discrete"
    if levels is not None and decided != "discrete":
        raise ConfigError(
            f"levels={levels} is for discrete data, and kind={kind!r} was given: leave one out."
        )
    if two is not None and decided != "binary":
        raise ConfigError(
            f"values are for binary data, and kind={kind!r} was given: leave one out."
        )
    if decided == "continuous":
        if own_splits:
            _same_spread(xs, where)
        return Values(xs, decided, None, f"real numbers ({why})")
    if decided == "binary":
        return _binary(xs, found, two, why, where)
    return _discrete(xs, found, levels, why, where, own_splits)


def _same_dtype(xs: list[np.ndarray], where: str) -> None:
    kinds = {{"b": "bool", "f": "floats"}.get(x.dtype.kind, "whole numbers") for x in xs}
    if len(kinds) > 1:
        found = ", ".join(str(x.dtype) for x in xs)
        raise DataError(
            f"{where}: the splits must hold values of one kind; found {found} in train, valid and "
            "test. Save them with one dtype and one range."
        )


def _few(xs: list[np.ndarray], most: int = 256) -> np.ndarray | None:
    """The different values, in order, if there are at most so many."""
    found = np.zeros(0, xs[0].dtype)
    for x in xs:
        for chunk in chunks(x):
            flat = chunk.reshape(-1)
            for begin in range(0, len(flat), 1 << 16):
                found = np.union1d(found, flat[begin : begin + (1 << 16)])
                if len(found) > most:
                    return None
                if found.dtype.itemsize == 1 and len(found) == 256:
                    return found  # all that there can be
    return found


def _kind_of(xs: list[np.ndarray], found: np.ndarray | None, floating: bool) -> tuple[Kind, str]:
    dtype = xs[0].dtype
    if dtype.kind == "b":
        return "binary", "bool"
    if floating:
        if found is not None and np.array_equal(found, [0, 1]):
            return "binary", f"{dtype}, but 0 and 1 only"
        if found is not None and len(found) > 1 and _levels(found):
            advice = "all are whole numbers: --kind discrete has them as levels"
            return "continuous", f"{dtype}; {advice}"
        return "continuous", str(dtype)
    if found is not None and len(found) == 2:
        return "binary", f"{dtype} with two values only"
    return "discrete", str(dtype)


def _levels(values: np.ndarray) -> bool:
    """Whether these could be levels: whole numbers from 0."""
    return bool(np.all(values == np.floor(values)) and values.min() >= 0)


def _binary(
    xs: list[np.ndarray],
    found: np.ndarray | None,
    two: tuple[float, ...] | None,
    why: str,
    where: str,
) -> Values:
    if two is not None:
        _check_two(found, two, where)
        found = np.asarray(two)
    if found is None or len(found) > 2:
        some = "more than 256" if found is None else str(len(found))
        raise DataError(f"{where}: binary data have two different values; found {some}.")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise DataError(
            f"{where}: binary data have two different numbers; found {found[0]} and {found[-1]}. "
            "Put 0 in the place of what is missing."
        )
    if bool(np.isin(found, (0, 1)).all()):
        return Values(xs, "binary", None, f"binary ({why})")
    if len(found) < 2:
        low, high = sorted((0, found.tolist()[0]))
        raise DataError(
            f"{where}: binary data are 0 and 1; found {found[0]} only. Say which two values there "
            f"are, such as --values={low},{high}."
        )
    low, high = found.tolist()
    note = f"binary ({why}: {low} is taken as 0, {high} as 1; --kind discrete keeps them)"
    ones = [on_rows(x, partial(np.equal, high)) for x in xs]
    return Values(ones, "binary", None, note, (low, high))


def _check_two(found: np.ndarray | None, two: Sequence[float], where: str) -> None:
    """Refuse other values than these two."""
    others = None if found is None else [one for one in found.tolist() if one not in two]
    if others != []:
        shown = "more than 256 different ones" if others is None else _some(others)
        raise DataError(
            f"{where}: binary values must be {two[0]} and {two[1]} here; found {shown}. Bring them "
            "to those."
        )


def as_bits(x: np.ndarray, two: Sequence[float] | None, where: str) -> np.ndarray:
    """Binary values as 0 and 1, of those that a spec says.

    Raises:
        DataError: for other values.
    """
    if two is None or x.dtype.kind not in "biuf":  # which is refused elsewhere
        return x
    _check_two(_few([x]), two, where)
    return x == two[1]


def as_values(x: np.ndarray, two: Sequence[float] | None) -> np.ndarray:
    """0 and 1 as the values that a spec says, and means between them as means of those."""
    if two is None:
        return x
    low, high = two
    return np.where(x == 1, high, low + (high - low) * np.asarray(x, np.float64))


def _discrete(
    xs: list[np.ndarray],
    found: np.ndarray | None,
    levels: int | None,
    why: str,
    where: str,
    own_splits: bool,
) -> Values:
    if not all(map(_whole, xs)):
        raise DataError(
            f"{where}: discrete data must be whole numbers; found {xs[0].dtype} with fractions or "
            "NaN. Round them, or say continuous (--kind continuous)."
        )
    tops = [255] * len(xs)  # which bytes need not be looked at for
    if levels is None and (own_splits or not all(x.dtype == np.uint8 for x in xs)):
        tops = [max(int(chunk.max()) for chunk in chunks(x)) for x in xs]
    if levels is not None:
        top = levels - 1
    elif all(x.dtype == np.uint8 for x in xs):
        top = 255
    else:
        top = max(1, *tops)
    if own_splits and levels is None:
        _same_range(xs, tops, where)
    if top >= 2**24:
        raise DataError(
            f"{where}: discrete values must be below 2**24, which float32 holds exactly; found "
            f"{top}. Say continuous (--kind continuous)."
        )
    note = f"whole numbers with {top + 1} levels ({why})"
    if found is not None and top >= 8 and len(found) <= (top + 1) / 4:
        note += _sparse(found)
    return Values(xs, "discrete", top + 1, note)


def _sparse(found: np.ndarray) -> str:
    """What is said of levels of which few occur."""
    if int(found[-1]) == len(found) - 1:
        return f"; none is above {found[-1]}: --levels {len(found)} says that there are no more"
    shown = _some(found.astype(int).tolist())
    return (
        f"; only {len(found)} of them occur ({shown}), which numbers from 0 to {len(found) - 1} "
        "would say more simply"
    )


def _some(values: list[Any]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def _whole(x: Any) -> bool:
    if x.dtype.kind in "biu":
        return True
    return all(bool(np.all(np.isfinite(part) & (part == np.floor(part)))) for part in chunks(x))


def _same_range(xs: list[np.ndarray], tops: list[int], where: str) -> None:
    """Refuse a split whose whole numbers have another range than those of the training split."""
    for name, x, top in zip(("valid", "test"), xs[1:], tops[1:], strict=True):
        fewer = x.size >= SEVERAL and top * 4 < tops[0]
        more = top > tops[0] and not all(x.dtype == np.uint8 for x in xs)
        much_more = xs[0].size >= SEVERAL and top > 4 * tops[0]
        if fewer or more or much_more:
            raise DataError(
                f"{where}: the {name} split has values up to {top}, the training split up to "
                f"{tops[0]}. Bring them to one range, or say how many levels there are (--levels "
                f"{max(tops) + 1})."
            )


def _same_spread(xs: list[np.ndarray], where: str) -> None:
    """Refuse a split of real numbers that is on another scale than the training split."""
    mean, sd = _moments(xs[0])
    for name, x in zip(("valid", "test"), xs[1:], strict=True):
        if x.size < SEVERAL or not (math.isfinite(sd) and sd > 0):
            continue
        own_mean, own_sd = _moments(x)
        if not 0.1 < own_sd / sd < 10 or abs(own_mean - mean) > 10 * sd:
            raise DataError(
                f"{where}: the {name} split is on another scale than the training split: mean "
                f"{own_mean:.4g} and spread {own_sd:.4g} for {mean:.4g} and {sd:.4g}. Bring them "
                "to one scale."
            )


def _moments(x: Any) -> tuple[float, float]:
    with np.errstate(all="ignore"):  # of what is not finite, which is reported elsewhere
        mean, sd, _ = moments(x, each=False)
    return float(mean[0]), float(sd[0])


# --- standardisation ------------------------------------------------------------------------------


class Scale(NamedTuple):
    """(x - shift) / scale is what networks see; None for what they see as it is."""

    shift: tuple[float, ...] | None
    scale: tuple[float, ...] | None
    note: str


def scale_of(x: Any, how: Standardize, where: str, what: str = "column") -> Scale:
    """The mean and the standard deviation of real numbers [N, *shape] of the training split: one
    pair with "event", one for each column of the last axis with "element", and with "auto" one
    for images [N, H, W, C] and one a column for all else.

    Raises:
        DataError: for values so large beside their spread, or so small, that 32-bit numbers do not
            tell them apart.
    """
    if how == "none":
        return Scale(None, None, "not standardised")
    each = how == "element" or (how == "auto" and x.ndim < 4)
    with np.errstate(all="ignore"):  # of what is not finite, which is reported elsewhere
        mean, sd, largest = moments(x, each)
    if not (np.isfinite(mean).all() and np.isfinite(sd).all()):
        return Scale(None, None, "not standardised")
    # Rounding leaves a constant column a spread of its last digits; what differs by 1, such as
    # large numbers of customers, is not constant.
    constant = sd <= 1e-12 * largest
    if constant.any():
        constant &= extent(x, each) < 1
    _check_resolution(largest, np.where(constant, np.inf, sd), where, what)
    scale = np.where(constant, 1.0, sd)
    note = f"standardised by one mean and spread for each {what}"
    if not each:
        note = f"standardised by one mean ({mean[0]:.4g}) and spread ({sd[0]:.4g})"
    if constant.any():
        which = ", ".join(str(int(index)) for index in np.flatnonzero(constant)[:10])
        note += f"; constant: {what} {which}" if each else "; all values are equal"
    return Scale(tuple(mean.tolist()), tuple(scale.tolist()), note)


def _check_resolution(largest: np.ndarray, sd: np.ndarray, where: str, what: str) -> None:
    """Refuse what float32 cannot tell apart: steps between numbers near the largest one of more
    than a hundredth of the spread. There is no step below 2**-126, as smaller numbers count as 0.
    """
    coarse = np.flatnonzero(np.maximum(largest * 2.0**-23, 2.0**-126) > sd / 100)
    if len(coarse):
        index = int(coarse[0])
        mend = f"Divide them by a number such as {largest[index]:.0e}"
        if largest[index] * 2.0**-23 > sd[index] / 100:
            mend = "Subtract an offset such as the mean"
        raise DataError(
            f"{where}: values of {what} {index} are up to {largest[index]:.4g} with a spread of "
            f"{sd[index]:.3g}, which 32-bit numbers cannot tell apart. {mend}, and save them again."
        )
