"""A user's own arrays, from .npz and .npy files."""

import math
import os
from typing import Literal

import numpy as np

from genjax.data.order import permutation
from genjax.data.source import Source, Splits, cast, stored_dtype, validate
from genjax.errors import ConfigError, DataError, unknown_name
from genjax.protocol import Batch, DataSpec, Kind

_KINDS = ("auto", "binary", "discrete", "continuous")
_LABELS = ("y", "labels", "cond")
_LAYOUT = (
    f"x [+ {' | '.join(_LABELS)}], or x_train, x_test [, x_valid] [+ the same with y_, labels_ or "
    "cond_]"
)


def arrays(
    path: str,
    conditional: bool = False,
    kind: Literal["auto", "binary", "discrete", "continuous"] = "auto",
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
) -> Source:
    """Arrays of a .npz file (x [+ y, labels or cond], or x_train, x_valid, x_test [+ y_train, ...])
    or a .npy file (x).

    x is [N, D], or images [N, H, W, C]; [N, H, W] gets a channel axis. uint8 is discrete with 256
    levels, other whole numbers are discrete with max + 1 levels, bool is binary, floats are
    continuous (float32), unless `kind` says otherwise. Whole-number labels [N] make max + 1
    classes, float vectors [N, C] a condition vector. The file is read at once, as the spec depends
    on it; nothing in it is ever unpickled.

    Args:
        path: the .npz or .npy file.
        conditional: use the labels or vectors in the file as the condition.
        kind: what the values are; "auto" goes by their dtype.
        valid_fraction: the share of the validation set where the file has none, drawn in a fixed
            order.
        test_fraction: the share of the test set where the file has no split at all, drawn in a
            fixed order.

    Raises:
        DataError: for a file that is missing, damaged, not an archive of arrays, or whose arrays
            are not as above.
        ConfigError: for fractions that leave nothing, or an unknown `kind`.
    """
    if kind not in _KINDS:
        raise unknown_name("kind of data", kind, _KINDS)
    if not (valid_fraction > 0 and test_fraction > 0 and valid_fraction + test_fraction < 1):
        raise ConfigError(
            "valid_fraction and test_fraction must be positive with a sum below 1; got "
            f"{valid_fraction} and {test_fraction}."
        )
    where = os.fspath(path)
    parts = _split(_read(where, conditional), valid_fraction, test_fraction, where)
    xs, kind_found, levels = _values([batch.x for batch in parts], kind, where)
    conds, n_classes, cond_dim = (
        _conditions([batch.cond for batch in parts], where)
        if conditional
        else ([None] * 3, None, None)
    )
    name = os.path.splitext(os.path.basename(where))[0]
    spec = DataSpec(xs[0].shape[1:], kind_found, levels, n_classes, cond_dim, name=name)
    splits = _compact(
        validate(Splits(*(Batch(x, cond) for x, cond in zip(xs, conds, strict=True))), spec, where),
        spec,
    )
    sizes = " / ".join(f"{len(x):,} {split}" for x, split in zip(xs, Splits._fields, strict=True))
    return Source(
        spec,
        lambda: splits,
        cast(spec),
        description=f"{sizes} examples of shape {list(spec.shape)}, from {where}",
    )


def _read(path: str, conditional: bool) -> dict[str, Batch]:
    """The file's arrays: {"all": Batch}, or {"train": ..., "valid": ..., "test": ...}."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
            if start[:2] != b"PK" and start != b"\x93NUMPY":
                raise DataError(
                    f"{path}: not a .npz or .npy file: it starts with {start!r}. Write it with "
                    "numpy.savez."
                )
            file.seek(0)
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                keys, get = ["x"], {"x": loaded}.__getitem__
                return _select(keys, get, conditional, path)
            with loaded:
                return _select(loaded.files, loaded.__getitem__, conditional, path)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (
        Exception
    ) as error:  # numpy, zipfile, zlib and tokenize raise a dozen kinds at a damaged file
        if "Object arrays" in str(error):
            raise DataError(
                f"{path}: holds Python objects, which are never unpickled. Save arrays of plain "
                "numbers, "
                "and pad sequences of unequal length to one length."
            ) from error
        raise DataError(
            f"{path}: damaged, cannot be read as arrays ({error}). Write it again with numpy.savez."
        ) from error


def _select(keys: list[str], get, conditional: bool, path: str) -> dict[str, Batch]:
    """Only the arrays that are needed are read: others may hold anything."""
    found = f"found {', '.join(keys) or 'nothing'}"
    if "x" in keys:
        names = {"all": ""}
    elif "x_train" in keys and "x_test" in keys:
        names = {split: f"_{split}" for split in Splits._fields if f"x_{split}" in keys}
    else:
        raise DataError(f"{path}: expected the arrays {_LAYOUT}; {found}.")
    parts = {}
    for split, suffix in names.items():
        label = next((key + suffix for key in _LABELS if key + suffix in keys), None)
        if conditional and label is None:
            wanted = ", ".join(key + suffix for key in _LABELS)
            raise DataError(
                f"{path}: conditional needs labels: expected one of {wanted}; {found}. Or "
                "conditional=False (--no-conditional)."
            )
        x, cond = get(f"x{suffix}"), get(label) if conditional else None
        for key, array in ((f"x{suffix}", x), (label, cond)):
            if array is not None and (
                not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf"
            ):
                raise DataError(
                    f"{path}: {key} must be an array of numbers; found "
                    f"{getattr(array, 'dtype', type(array).__name__)}."
                )
        if x.ndim < 2:
            raise DataError(
                f"{path}: x{suffix} must be [N, D] or [N, H, W, C]; found shape {list(x.shape)}. "
                "Add the missing axis."
            )
        if len(x) == 0:
            raise DataError(f"{path}: x{suffix} is empty; expected at least 1 example.")
        if cond is not None and (cond.ndim == 0 or len(cond) != len(x)):
            n = len(cond) if cond.ndim else 1
            raise DataError(
                f"{path}: labels of another length: {len(x)} examples in x{suffix} and {n} in "
                f"{label}."
            )
        parts[split] = Batch(x, cond)
    return parts


def _split(
    parts: dict[str, Batch], valid_fraction: float, test_fraction: float, where: str
) -> tuple[Batch, Batch, Batch]:
    """Train, valid and test, in that order; what the file does not split is split in a fixed
    order.
    """

    def rows(batch: Batch, index: np.ndarray) -> Batch:
        return Batch(batch.x[index], None if batch.cond is None else batch.cond[index])

    if "valid" in parts:
        return parts["train"], parts["valid"], parts["test"]
    whole = parts.get("all", parts.get("train"))
    assert whole is not None
    n = len(whole.x)
    n_valid = max(1, round(n * valid_fraction))
    n_test = max(1, round(n * test_fraction)) if "all" in parts else 0
    n_train = n - n_valid - n_test
    if n_train < 1:
        raise DataError(
            f"{where}: {n} examples are too few to split; expected at least 1 for each of train, "
            "valid and test."
        )
    train, valid, test = np.split(permutation(n, seed=0), [n_train, n_train + n_valid])
    return (
        rows(whole, train),
        rows(whole, valid),
        parts["test"] if "all" not in parts else rows(whole, test),
    )


def _values(
    xs: list[np.ndarray], kind: Literal["auto"] | Kind, where: str
) -> tuple[list[np.ndarray], Kind, int | None]:
    """x with a channel axis, continuous values as float32; its kind; and its levels."""
    shapes = {x.shape[1:] for x in xs}
    if len(shapes) > 1:
        found = ", ".join(map(str, sorted(list(shape) for shape in shapes)))
        raise DataError(f"{where}: the splits must hold examples of one shape; found {found}.")
    dtypes = {x.dtype.kind for x in xs}
    floating = "f" in dtypes
    if kind == "auto" and floating:
        kind = "continuous"
    elif kind == "auto":
        kind = "binary" if dtypes == {"b"} else "discrete"
    if math.prod(xs[0].shape[1:]) == 0:
        raise DataError(f"{where}: the examples are empty: shape {list(xs[0].shape[1:])}.")
    xs = [x[..., None] if x.ndim == 3 else x for x in xs]
    if kind == "continuous":
        with np.errstate(
            over="ignore"
        ):  # what does not fit float32 becomes infinite, and `validate` reports it
            return [x.astype(np.float32) for x in xs], kind, None
    if kind == "binary":
        return xs, kind, None
    if floating:
        raise DataError(
            f"{where}: discrete data must be whole numbers; found {xs[0].dtype}. Round and cast "
            "them, or say continuous."
        )
    top = 255 if all(x.dtype == np.uint8 for x in xs) else max(1, *(int(x.max()) for x in xs))
    if top >= 2**24:
        raise DataError(
            f"{where}: discrete values must be below 2**24, which float32 holds exactly; found "
            f"{top}. Say continuous."
        )
    return xs, kind, top + 1


def _compact(splits: Splits, spec: DataSpec) -> Splits:
    """The same values, known to be valid by now, as uint8 or int32 if they are whole numbers."""
    if spec.kind == "continuous":
        return splits
    compact = stored_dtype(spec)
    return Splits(*(batch._replace(x=batch.x.astype(compact)) for batch in splits))


def _conditions(conds: list, where: str) -> tuple[list[np.ndarray], int | None, int | None]:
    """Labels as int32 [N] and their number, or vectors as float32 [N, C] and their length."""
    if all(cond.dtype.kind in "biu" for cond in conds):
        if any(cond.ndim != 1 for cond in conds):
            found = ", ".join(str(list(cond.shape)) for cond in conds)
            raise DataError(
                f"{where}: expected whole-number labels [N] or float vectors [N, C]; found whole "
                f"numbers {found}."
            )
        low, high = min(int(cond.min()) for cond in conds), max(int(cond.max()) for cond in conds)
        if low < 0 or high >= 2**31 - 1:
            raise DataError(
                f"{where}: labels must be in the range 0 to 2**31 - 2; found {low} to {high}."
            )
        return [cond.astype(np.int32) for cond in conds], high + 1, None
    conds = [cond[:, None] if cond.ndim == 1 else cond for cond in conds]
    lengths = {cond.shape[1:] for cond in conds}
    if len(lengths) > 1 or conds[0].ndim != 2 or conds[0].shape[1] == 0:
        found = ", ".join(str(list(cond.shape)) for cond in conds)
        raise DataError(f"{where}: expected condition vectors [N, C] of one length; found {found}.")
    with np.errstate(over="ignore"):
        return [cond.astype(np.float32) for cond in conds], None, conds[0].shape[1]
