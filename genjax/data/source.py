"""What a data set is to the rest of genjax: a `Source`, and the two ways to take batches from it.

On the device, `batch_at` gathers and prepares inside a jitted step; on the host, the rows that
`Source.order` names are gathered with numpy (`learning.loop.host_feed`) and `prepare_at` finishes
inside the step. Both give the same batches, bit for bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data.order import batch_indices
from genjax.data.rows import joined, numbered
from genjax.errors import DataError, expect
from genjax.protocol import Array, Batch, DataSpec, Key

# Folded into the key of the data, so that the data's draws differ from those of a training run with
# the same seed.
DATA_TAG = 0x64617461  # "data"
# Folded into the key of a step, so that what `prepare` draws does not depend on `augment`.
AUGMENT_TAG = 0x61756765  # "auge"


class TooFew(DataError):
    """Examples that are too few for three splits."""


class Splits(NamedTuple):
    """Training, validation and test data on the host: numpy arrays in their compact stored dtype
    (uint8 images).
    """

    train: Batch
    valid: Batch
    test: Batch


class Source(NamedTuple):
    """A data set: what it looks like, how to read it, and how to turn what is stored into what the
    spec says.

    Attributes:
        spec: what a builder must know; it is known before anything is loaded.
        load: () -> Splits: reads the files, or makes the points. Raises DataError when it cannot.
        prepare: (key, stored batch) -> Batch in the dtypes of `spec`; pure and jit-able, draws
            dynamic binarisation with the key, and keeps `weight` and `length`.
        log_prob: (x [B, *shape]) -> exact log-probability or log-density in nats [B], where it is
            known; the marginal over the classes.
        entropy: the entropy of the same distribution in nats (differential for a density), where it
            is known.
        modes: the centres [M, 2] of a mixture with separate components, and
        mode_std: their standard deviation, for measures of mode coverage.
        description: one line with the sizes of the splits and where the data come from.
        order: (n, batch_size, seed, step) -> the examples of one batch, int32 [batch_size]; see
            `batch_indices`, which shuffles. A stream whose batches go on from each other has
            another one.
        fresh: (seed, n) -> Batch: n examples that are in no split, where the data can be drawn
            without end.
        notes: what was decided about a user's own data, and why.
        files: the files that the data are read from; none for data that are made.
        contents: a folder and the SHA-256 of what was read from it, in the place of files.
        augment: (key, x) -> x: a random change of the examples that are trained on, after
            `prepare`; validation and test never see it. See `augment.augmentation`.
        apart: of two training examples that are so many places apart none has a part of the other:
            1, but for windows that overlap. See `rows_of`.
    """

    spec: DataSpec
    load: Callable[[], Splits]
    prepare: Callable[[Key, Batch], Batch]
    log_prob: Callable[[Array], Array] | None = None
    entropy: float | None = None
    modes: np.ndarray | None = None
    mode_std: float | None = None
    description: str = ""
    order: Callable[[int, int, int | Array, int | Array], Array | np.ndarray] = batch_indices
    fresh: Callable[[int, int], Batch] | None = None
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    contents: tuple[str, str] | None = None
    augment: Callable[[Key, Array], Array] | None = None
    apart: int = 1


def cast(spec: DataSpec) -> Callable[[Key, Batch], Batch]:
    """A `prepare` that only casts: x to the spec's dtype, labels to int32, condition vectors to
    float32.
    """

    def prepare(key: Key, batch: Batch) -> Batch:
        cond = batch.cond
        if cond is not None:
            cond = jnp.asarray(cond).astype(jnp.int32 if spec.n_classes else jnp.float32)
        length = None if batch.length is None else jnp.asarray(batch.length).astype(jnp.int32)
        return Batch(jnp.asarray(batch.x).astype(spec.dtype), cond, batch.weight, length)

    return prepare


def stored_dtype(spec: DataSpec) -> type[np.generic]:
    """The most compact dtype that holds every value which the spec allows."""
    if spec.top is None:
        return np.float32
    return np.uint8 if spec.top <= np.iinfo(np.uint8).max else np.int32


def prepare_at(source: Source, seed: int | Array) -> Callable[[Batch, int | Array], Batch]:
    """(stored batch, step) -> prepared Batch, with the key of that step: the device's half of the
    host path. It is for training: the source's `augment` is applied.
    """

    def prepare(raw: Batch, step: int | Array) -> Batch:
        key = jax.random.fold_in(jax.random.key(seed), DATA_TAG)
        key = jax.random.fold_in(key, step)
        batch = source.prepare(key, raw)
        if source.augment is None:
            return batch
        return batch._replace(x=source.augment(jax.random.fold_in(key, AUGMENT_TAG), batch.x))

    return prepare


def batch_at(
    source: Source, batch_size: int, seed: int | Array
) -> Callable[[Batch, int | Array], Batch]:
    """(stored arrays on the device, step) -> prepared Batch: a pure function that works inside jit,
    scan and vmap.

    The arrays are those of one split, as `jax.device_put(source.load().train)`; see `batch_indices`
    for the order.

    Raises:
        DataError, ConfigError: when called with too few examples; see `batch_indices`.
        TypeError: when called with something else than the arrays of a split.

    Example:
        >>> import jax, numpy as np
        >>> from genjax import batch_at, from_arrays
        >>> source = from_arrays(np.random.default_rng(0).normal(size=(100, 3)))
        >>> batch = jax.jit(batch_at(source, batch_size=8, seed=0))
        >>> batch(jax.device_put(source.load().train), 5).x.shape
        (8, 3)
    """
    prepare = prepare_at(source, seed)

    def batch(arrays: Batch, step: int | Array) -> Batch:
        if not isinstance(arrays, Batch):
            raise TypeError(
                "A batch is taken of the arrays of one split, such as source.load().train; got a "
                f"{type(arrays).__name__}."
            )
        index = source.order(_length(arrays), batch_size, seed, step)
        # The indices are in range by construction; "clip" only spares the code that would look at
        # them.
        return prepare(
            jax.tree.map(lambda array: jnp.take(array, index, axis=0, mode="clip"), arrays), step
        )

    return batch


def example_batch(spec: DataSpec, key: Key, n: int) -> Batch:
    """n random examples of any spec, prepared: uniform bits, levels, tokens, labels and lengths,
    normal numbers with the mean and the scale that the spec says, 0 and 1 unless it does.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, example_batch
        >>> spec = DataSpec((3,), "continuous", n_classes=4)
        >>> example_batch(spec, jax.random.key(0), 5).cond.shape
        (5,)
    """
    expect("example_batch", spec, DataSpec)
    x_key, cond_key, length_key = jax.random.split(key, 3)
    shape = (n, *spec.shape)
    if spec.top is None:
        x = spec.denormalize(jax.random.normal(x_key, shape, jnp.float32))
    else:
        x = jax.random.randint(x_key, shape, 0, spec.top + 1, jnp.int32).astype(spec.dtype)
    cond = length = None
    if spec.n_classes is not None:
        cond = jax.random.randint(cond_key, (n,), 0, spec.n_classes, jnp.int32)
    if spec.cond_dim is not None:
        cond = jax.random.normal(cond_key, (n, spec.cond_dim), jnp.float32)
    if spec.lengths:
        length = jax.random.randint(length_key, (n,), 1, spec.shape[0] + 1, jnp.int32)
    return Batch(x, cond, length=length)


def rows_of(splits: Splits, split: str, apart: int = 1) -> Batch:
    """The examples of a split, or of "all" of them, to be scored or compared: of the training
    split every one that is `apart` from the one before. Windows that overlap are no independent
    examples, and a standard error over them would be too small.

    Args:
        apart: `Source.apart`.
    """
    splits = splits._replace(train=jax.tree.map(lambda leaf: leaf[::apart], splits.train))
    if split != "all":
        return getattr(splits, split)
    if any(batch.weight is not None for batch in splits):  # then those without count as 1
        splits = Splits(*map(_weighted, splits))
    return jax.tree.map(lambda *parts: joined(parts), *splits)


def _weighted(batch: Batch) -> Batch:
    return batch if batch.weight is not None else batch._replace(weight=np.ones(len(batch.x)))


def validate(splits: Splits, spec: DataSpec, where: str) -> Splits:
    """The same splits, once every one of them has been held to the spec; `where` is the file or
    folder, for messages.

    Raises:
        DataError: for an empty split, another event shape, labels of another length or missing
            ones, NaN or infinite values, values that are not whole numbers where they must be, and
            values or labels out of range.
    """
    for name, batch in zip(Splits._fields, splits, strict=True):
        _check_split(batch, spec, f"{where}: the {name} split")
    return splits


def _length(arrays: Batch) -> int:
    return jax.tree.leaves(arrays)[0].shape[0]


def _check_split(batch: Batch, spec: DataSpec, where: str) -> None:
    x, n = batch.x, len(batch.x)
    if n == 0:
        raise DataError(f"{where} is empty; expected at least 1 example.")
    if x.shape[1:] != spec.shape:
        raise DataError(
            f"{where} must hold examples of shape {list(spec.shape)}; found {list(x.shape[1:])}."
        )
    _check_values(x, spec.top, f"{where}: x")
    if spec.lengths:
        length = batch.length
        if length is None or length.shape != (n,):
            found = "none" if length is None else f"shape {list(length.shape)}"
            raise DataError(
                f"{where}: expected the length of each of {n} sequences; found {found}."
            )
        if length.min() < 1 or length.max() > spec.shape[0]:
            raise DataError(
                f"{where}: lengths must be from 1 to {spec.shape[0]}; found {length.min()} to "
                f"{length.max()}."
            )
    if batch.weight is not None and batch.weight.shape != (n,):
        raise DataError(
            f"{where}: expected one weight for each of {n} examples; found shape "
            f"{list(batch.weight.shape)}."
        )
    if batch.weight is not None and not np.any(np.asarray(batch.weight) > 0):
        raise DataError(f"{where}: all {n} examples have weight 0. Give some a positive weight.")
    cond = batch.cond
    if not spec.conditional:
        if cond is not None:
            raise DataError(
                f"{where} has a condition, but its spec is unconditional; leave the condition out."
            )
        return
    if cond is None:
        raise DataError(
            f"{where} has no condition; expected a {'label' if spec.n_classes else 'vector'} for "
            "each example."
        )
    if len(cond) != n:
        raise DataError(
            f"{where} has labels of another length: {n} examples in x and {len(cond)} labels."
        )
    shape = (n,) if spec.n_classes else (n, spec.cond_dim)
    if cond.shape != shape:
        raise DataError(
            f"{where}: expected a condition of shape {list(shape)}; found {list(cond.shape)}."
        )
    _check_values(cond, spec.n_classes - 1 if spec.n_classes else None, f"{where}: labels")


def _check_values(values: Any, top: int | None, where: str) -> None:
    """Refuse values that are not finite or, with `top`, not whole numbers in 0..top."""
    kind = values.dtype
    if top is not None and kind.kind in "bu" and 2 ** (8 * kind.itemsize) - 1 <= top:
        return  # no value of this kind could be out of range
    for rows, part in numbered(values):
        told = where if rows is None else f"{where} in rows {rows[0]} to {rows[-1]} of the file"
        _check_part(part, top, told, rows)


def _check_part(values: np.ndarray, top: int | None, where: str, rows: Any) -> None:
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values)
        if bad.any():
            raise DataError(
                f"{where}: {_count(bad, 'NaN or infinite', rows)} Remove or replace such examples."
            )
    if top is None:
        return
    if values.dtype.kind == "f":
        bad = values != np.floor(values)
        if bad.any():
            raise DataError(
                f"{where} must be whole numbers from 0 to {top}: {_count(bad, 'not whole', rows)}"
            )
    # Minimum and maximum first: they need no temporary array, and good data stop here.
    low, high = values.min(), values.max()
    if low < 0 or high > top:
        bad = (values < 0) | (values > top)
        raise DataError(
            f"{where} must be in the range 0 to {top}; found {low} to {high}: "
            f"{_count(bad, 'out of range', rows)}"
        )


def _count(bad: np.ndarray, what: str, rows: np.ndarray | None) -> str:
    first = [int(i) for i in np.unravel_index(np.argmax(bad), bad.shape)]
    if rows is not None:
        first[0] = int(rows[first[0]])
    return f"{int(bad.sum())} of {bad.size} values are {what}, the first at index {first}."
