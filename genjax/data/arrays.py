"""A user's own arrays, from .npz and .npy files."""

import math
import os
from typing import Annotated, Literal

import numpy as np

from genjax.data.kinds import Channels, Standardize, scale_of, values_of, with_channels
from genjax.data.labels import Condition, labels_of
from genjax.data.order import permutation
from genjax.data.source import Source, Splits, cast, stored_dtype, validate
from genjax.errors import ConfigError, DataError, regular_file
from genjax.protocol import Batch, DataSpec
from genjax.settings import Within, check_call

Levels = Annotated[int, Within(2, 2**24)]

_LABELS = ("y", "labels", "cond")
_LAYOUT = (
    f"x [+ {' | '.join(_LABELS)}], or x_train, x_test [, x_valid] [+ the same with y_, labels_ or "
    "cond_]"
)


def arrays(
    path: str,
    conditional: bool = False,
    kind: Literal["auto", "binary", "discrete", "continuous"] = "auto",
    levels: Levels | None = None,
    standardize: Standardize = "auto",
    channels: Channels = "auto",
    condition: Condition = "auto",
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
) -> Source:
    """Arrays of a .npz file (x [+ y, labels or cond], or x_train, x_valid, x_test [+ y_train, ...])
    or a .npy file (x).

    x is [N, D], or images [N, H, W, C]; [N, H, W] gets a channel axis. Two different values are
    binary; uint8 is discrete with 256 levels, other whole numbers have max + 1, bool is binary, and
    floats are continuous (float32), unless `kind` says otherwise. Continuous values are
    standardised for the networks, and nowhere else. Labels are classes under their names: whole
    numbers or strings [N], one-hot rows [N, K]; float vectors [N, C] are a condition vector.
    `Source.notes` says what was decided. The file is read at once, as the spec depends on it;
    nothing in it is ever unpickled.

    Args:
        path: the .npz or .npy file.
        conditional: use the labels or vectors in the file as the condition.
        kind: what the values are; "auto" goes by their dtype, and by how many there are.
        levels: how many levels discrete values have, 0 .. levels-1; what occurs unless given.
        standardize: what of continuous values is taken out for the networks: the mean and spread of
            all ("event"), of each column ("element"), nothing ("none"); "auto" is "event" for
            images and "element" for vectors.
        channels: where images have them: "first" for [N, C, H, W].
        condition: what the labels are: "classes", a "vector", or what they look like.
        valid_fraction: the share of the validation set where the file has none, drawn in a fixed
            order.
        test_fraction: the share of the test set where the file has no split at all, drawn in a
            fixed order.

    Raises:
        DataError: for a file that is missing, damaged, not an archive of arrays, or whose arrays
            are not as above.
        ConfigError: for fractions that leave nothing, or a choice that does not exist.
    """
    choices = {"kind": kind, "levels": levels, "standardize": standardize}
    check_call(arrays, {**choices, "channels": channels, "condition": condition})
    if not (valid_fraction > 0 and test_fraction > 0 and valid_fraction + test_fraction < 1):
        raise ConfigError(
            "valid_fraction and test_fraction must be positive with a sum below 1; got "
            f"{valid_fraction} and {test_fraction}."
        )
    where = os.fspath(path)
    read = _read(where, conditional)
    parts = _split(read, valid_fraction, test_fraction, where)
    _same_shape([batch.x for batch in parts], where)
    xs = with_channels([batch.x for batch in parts], channels, where)
    values = values_of(xs, kind, levels, where, own_splits="all" not in read)
    name = os.path.splitext(os.path.basename(where))[0]
    known, conds, notes = _described(
        values.xs[0], values.kind, parts, standardize, condition, where
    )
    spec = DataSpec(xs[0].shape[1:], values.kind, values.levels, name=name, **known)
    splits = _compact([Batch(*pair) for pair in zip(values.xs, conds, strict=True)], spec, where)
    sizes = " / ".join(f"{len(x):,} {split}" for x, split in zip(xs, Splits._fields, strict=True))
    about = f"{sizes} examples of shape {list(spec.shape)}, from {where}"
    return Source(
        spec,
        lambda: splits,
        cast(spec),
        description=about,
        notes=(about, values.note, *notes),
        files=(where,),
    )


def _read(path: str, conditional: bool) -> dict[str, Batch]:
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
        for key, array, kinds in ((f"x{suffix}", x, "biuf"), (label, cond, "biufUS")):
            if array is not None and (
                not isinstance(array, np.ndarray) or array.dtype.kind not in kinds
            ):
                wanted = "numbers" if kinds == "biuf" else "numbers or strings"
                raise DataError(
                    f"{path}: {key} must be an array of {wanted}; found "
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


def _same_shape(xs: list[np.ndarray], where: str) -> None:
    shapes = {x.shape[1:] for x in xs}
    if len(shapes) > 1:
        found = ", ".join(map(str, sorted(list(shape) for shape in shapes)))
        raise DataError(f"{where}: the splits must hold examples of one shape; found {found}.")
    if math.prod(xs[0].shape[1:]) == 0:
        raise DataError(f"{where}: the examples are empty: shape {list(xs[0].shape[1:])}.")


def _described(
    x: np.ndarray,
    kind: str,
    parts: tuple[Batch, Batch, Batch],
    standardize: Standardize,
    condition: Condition,
    where: str,
) -> tuple[dict, list, list[str]]:
    """What a spec says beside shape and kind, for the training split's x; the conditions of each
    split, and notes.
    """
    known, notes = {}, []
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
    labels = labels_of(given, where, condition)
    known |= {name: getattr(labels, name) for name in ("n_classes", "cond_dim", "class_names")}
    notes.append(labels.note)
    if labels.cond_dim is not None:
        scale = scale_of(labels.conds[0], "none" if standardize == "none" else "element", where)
        known |= {"cond_shift": scale.shift, "cond_scale": scale.scale}
    return known, labels.conds, notes


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
