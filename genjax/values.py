"""What refuses values that are not what a spec says: keys, conditions, events, batches.

Shapes and dtypes are looked at always, which costs nothing once traced; values where they are
known: in a trace they are not.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from genjax.errors import ConfigError, DataError
from genjax.protocol import Batch, DataSpec, Key, PyTree


def check_key(key: Key) -> None:
    """Refuse anything but a typed PRNG key.

    Raises:
        TypeError: for an old-style uint32 key or something that is no key at all.
    """
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        found = (
            f"an array of {key.dtype}{list(key.shape)}"
            if hasattr(key, "dtype")
            else f"a {type(key).__name__}"
        )
        raise TypeError(
            f"Expected a typed PRNG key; got {found}. Make one with jax.random.key(seed), not "
            "PRNGKey(seed)."
        )


def key_of(seed: Any) -> Key:
    """The key of a seed.

    Raises:
        ConfigError: for what is no whole number from 0 to 2**32 - 1.
    """
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be a whole number from 0 to 2**32 - 1; got {seed!r:.80}.")
    return jax.random.key(seed)


def array_of(x: Any, what: str) -> np.ndarray:
    """x as a numpy array, which would take what stands below a mask for a value.

    Raises:
        DataError: for values that are masked.
    """
    for one in x if isinstance(x, list | tuple) else [x]:
        count = int(np.ma.getmaskarray(one).sum()) if isinstance(one, np.ma.MaskedArray) else 0
        if count:
            raise DataError(
                f"{what}: {count} of {one.size} values of a masked array are masked, which is "
                "missing. Fill them in with its filled(...), or leave such examples out."
            )
    return np.asarray(x)


def check_cond(spec: DataSpec, cond: PyTree | None, n: int) -> None:
    """Check a condition against the spec: present exactly when the model is conditional, [n] labels
    or [n, cond_dim].

    Raises:
        DataError: for a missing, superfluous or mis-shaped condition, or a label that is out of
            range (where the labels
            are concrete: inside a trace their values are not known).
        TypeError: for labels that are not whole numbers or vectors that are not real.
    """
    if not spec.conditional:
        if cond is not None:
            raise DataError(
                f"A condition was given, but this model of {spec.name} is unconditional: leave "
                "`cond` out."
            )
        return
    wanted = (
        f"labels 0..{spec.n_classes - 1}, int [{n}]"
        if spec.n_classes
        else f"vectors, float [{n}, {spec.cond_dim}]"
    )
    if cond is None:
        raise DataError(f"This model of {spec.name} is conditional: give `cond` ({wanted}).")
    if not hasattr(cond, "dtype"):
        cond = np.asarray(cond)
    shape = (n,) if spec.n_classes else (n, spec.cond_dim)
    if cond.shape != shape:
        raise DataError(f"`cond` must be {wanted}; got shape {list(cond.shape)}.")
    right = jnp.issubdtype(cond.dtype, jnp.integer if spec.n_classes else jnp.floating)
    if not right:
        raise TypeError(f"`cond` must be {wanted}; got dtype {cond.dtype}.")
    values = known(cond)
    if values is None or not n:
        return
    if spec.n_classes is None:
        if not np.isfinite(values).all():
            raise DataError(f"`cond` must be {wanted}; got values that are not finite.")
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= spec.n_classes:
        raise DataError(f"`cond` must be {wanted}; got labels from {low} to {high}.")


def check_events(spec: DataSpec, x: Any, what: str = "x", any_length: bool = False) -> None:
    """Check events x [n, *shape] against the spec: their shape, n >= 1, their dtype and, where
    they are known, their values: tokens and levels in range, bits 0 or 1, real numbers finite.

    Args:
        any_length: sequences may have another number of steps than the spec says.

    Raises:
        ConfigError: for no events.
        DataError: for another shape, or a value that the data cannot have.
        TypeError: for another dtype.
    """
    check_form(spec, x, what, any_length)
    check_values(spec, x, what)


def check_form(spec: DataSpec, x: Any, what: str, any_length: bool = False) -> None:
    """Check the shape and the dtype of events; it costs nothing once traced.

    Raises:
        ConfigError, DataError, TypeError: see `check_events`.
    """
    found = tuple(x.shape) if hasattr(x, "shape") else None
    free = 2 if any_length else 1  # axes of any size
    wanted = ("B", "steps")[:free] + spec.shape[free - 1 :]
    if found is None or len(found) != len(wanted) or found[free:] != spec.shape[free - 1 :]:
        named = type(x).__name__ if found is None else list(found)
        raise DataError(
            f"{what} of {spec.name} must have shape [{', '.join(map(str, wanted))}]; got {named}."
        )
    if not found[0]:
        raise ConfigError(
            f"{what} of {spec.name} must hold one example at least; got shape {list(found)}. Leave "
            "out what has no examples."
        )
    if spec.kind == "tokens" and not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(
            f"{what} of {spec.name} holds tokens and must be whole numbers; got {x.dtype}."
        )
    if spec.kind != "tokens" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{what} of {spec.name} is {spec.kind} and must be floating point; got {x.dtype}."
        )


def as_stored(spec: DataSpec, x: np.ndarray, what: str = "x") -> np.ndarray:
    """The same numbers in the dtype that a spec says.

    Raises:
        DataError: for what is no number, and tokens that are no whole numbers of 32 bits.
    """
    if x.dtype.kind != "b" and not jnp.issubdtype(x.dtype, jnp.number):
        raise DataError(f"{what} of {spec.name} must be numbers; found an array of {x.dtype}.")
    with np.errstate(all="ignore"):  # of what becomes infinite, which is refused by its value
        stored = x.astype(spec.dtype)
    if spec.kind == "tokens" and not np.array_equal(stored, x):
        raise DataError(
            f"{what} of {spec.name} holds tokens and must be whole numbers from 0 to {spec.top}."
        )
    return stored


def known(x: Any) -> np.ndarray | None:
    """The values of an array; None inside a trace, and for one that lies on other machines."""
    if x is None or isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)  # in a trace, jax would trace even operations on constants


def check_values(spec: DataSpec, x: Any, what: str, kept: np.ndarray | None = None) -> None:
    """Check the values of events where they are known, of those that are `kept` [n] or [n, T].

    Raises:
        DataError: with how many are wrong, and the first of them.
    """
    values = known(x)
    if values is None:
        return
    if spec.top is None:
        bad, wanted = ~np.isfinite(values), "finite numbers"
    else:
        bad, wanted = (values < 0) | (values > spec.top), f"whole numbers from 0 to {spec.top}"
        if values.dtype.kind not in "iu":
            bad |= values != np.floor(values)  # NaN is neither
    if kept is not None:
        bad &= kept.reshape(*kept.shape, *[1] * (bad.ndim - kept.ndim))
    if bad.any():
        first = tuple(int(index) for index in np.argwhere(bad)[0])
        raise DataError(
            f"{what} of {spec.name} is {spec.kind} and must hold {wanted}; {int(bad.sum())} of "
            f"{bad.size} are not: {values[first]} at index {list(first)}."
        )


def wide(x: Any) -> Any:
    """Real numbers of fewer than 32 bits as float32, in which a model computes, and those of a
    numpy array in the precision that jax has; anything else as it is.
    """
    if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)):
        return x
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def check_real(x: Any, shape: tuple[int | None, ...], what: str) -> None:
    """Check real numbers: their shape, where None is any number of examples, and that those known
    are finite.

    Raises:
        ConfigError, DataError, TypeError: with what was wanted.
    """
    found = tuple(jnp.shape(x))
    same = len(found) == len(shape) and all(
        one is None or one == size for one, size in zip(shape, found, strict=True)
    )
    if not same:
        wanted = ", ".join("n" if size is None else str(size) for size in shape)
        raise DataError(f"{what} must have shape [{wanted}]; got {list(found)}.")
    if 0 in found:
        raise ConfigError(
            f"{what} must hold one example at least; got shape {list(found)}. Leave out what has "
            "no examples."
        )
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} must be floating point; got {dtype}.")
    values = known(x)
    if values is not None and not np.isfinite(values).all():
        raise DataError(f"{what} must be finite; {int((~np.isfinite(values)).sum())} are not.")


def _kept(batch: Batch) -> tuple[np.ndarray | None, bool]:
    """Which values of x count, [B] or [B, T], None for all; and whether that is known."""
    weight, length = known(batch.weight), known(batch.length)
    seen = (batch.weight is None or weight is not None) and (
        batch.length is None or length is not None
    )
    if not seen or (weight is None and length is None):
        return None, seen
    kept = np.ones(len(batch.x), bool) if weight is None else weight > 0
    if length is None:
        return kept, True
    return kept[:, None] & (np.arange(batch.x.shape[1])[None] < length[:, None]), True


def check_batch(spec: DataSpec, batch: Batch, any_length: bool = False) -> None:
    """Check a batch's ranks, shapes and dtypes against the spec, which costs nothing once traced;
    and where they are known, the values that count for anything.

    Args:
        any_length: sequences may have another number of steps than the spec says.

    Raises:
        ConfigError, DataError, TypeError: see the text, which names what was expected and found.
    """
    if not isinstance(batch, Batch):
        raise TypeError(
            f"Expected a genjax.Batch(x, cond, weight, length); got {type(batch).__name__}."
        )
    x = batch.x
    check_form(spec, x, "batch.x", any_length)
    if batch.weight is not None:
        _check_weight(batch.weight, x.shape[0])
    if spec.lengths != (batch.length is not None):
        found = (
            "it is missing: sequences of unequal length need it" if spec.lengths else "it was given"
        )
        raise DataError(
            f"batch.length goes with a spec that says lengths=True; that of {spec.name} says "
            f"{spec.lengths}, and {found}."
        )
    if batch.length is not None:
        _check_length(batch.length, *x.shape[:2])
    kept, seen = _kept(batch)
    if seen:
        check_values(spec, x, "batch.x", kept)
    check_cond(spec, batch.cond, x.shape[0])


def _check_weight(weight: Any, n: int) -> None:
    dtype = getattr(weight, "dtype", None)
    if dtype is None:
        raise TypeError(
            f"batch.weight must be an array of numbers, [{n}]; got a {type(weight).__name__}."
        )
    if weight.shape != (n,):
        raise DataError(f"batch.weight must have shape [{n}]; got {list(weight.shape)}.")
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"batch.weight must be real numbers; got {dtype}.")
    values = known(weight)
    if values is None:
        return
    if not np.isfinite(values).all() or (values < 0).any() or not (values > 0).any():
        raise DataError(
            "batch.weight must be finite, not negative, and above 0 for one example at least; got "
            f"{values.min()} to {values.max()}."
        )


def _check_length(length: Any, n: int, most: int) -> None:
    if length.shape != (n,) or not jnp.issubdtype(length.dtype, jnp.integer):
        raise DataError(f"batch.length must be int [{n}]; got {length.dtype}{list(length.shape)}.")
    values = known(length)
    if values is not None and values.size and (values.min() < 1 or values.max() > most):
        raise DataError(
            f"batch.length must be from 1 to {most}; got {values.min()} to {values.max()}."
        )
