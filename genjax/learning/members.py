"""Many members that are trained as one program: ensembles and sweeps."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from genjax.checks import check_key, known
from genjax.errors import ConfigError, GenjaxError, expect, first_line
from genjax.nets.platforms import platform
from genjax.protocol import Array, Key, Metrics, PyTree, Training, TrainState
from genjax.settings import MOST, Whole, check_setting

Mode = Literal["vmap", "map", "auto"]
# The members of an ensemble share the step counter, so that what depends on it alone (data order)
# is computed once.
MEMBER_AXES: Any = TrainState(step=None, key=0, params=0, state=0, opt=0)  # type: ignore[arg-type]
MOST_TRIED = 64  # rows of a sweep that are built to see whether they can be
# What one member does: (hyper, ts, batch) -> (ts, metrics).
One = Callable[[PyTree, TrainState, Any], tuple[TrainState, Metrics]]


def ensemble(t: Training, mode: Mode = "vmap", batch_axis: int | None = None) -> Training:
    """Train many members that differ in their keys as one program: init takes keys [S], and states
    get a leading axis S.

    The members share the step counter and, unless `batch_axis` names an axis of the batch, the
    batch. Metrics get a leading axis S. A vmapped run agrees with solo runs to rounding, not
    bitwise.

    Args:
        mode: "vmap" is one batched program, "map" runs the members one after the other in one
            program, "auto" times both.
        batch_axis: the axis of every leaf of the batch that holds the members' own batches, counted
            from the first; None shares one batch.

    Raises:
        ConfigError: for a batch axis that is counted from the last.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, ensemble, example_batch, training, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
        >>> t = ensemble(training(model, optax.adam(1e-3)))
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> batch = example_batch(model.spec, jax.random.key(1), 8)
        >>> ts = jax.eval_shape(t.init, keys)  # to see shapes; else jax.jit(t.init)
        >>> ts, metrics = jax.eval_shape(t.step, ts, batch)
        >>> ts.step.shape, metrics["vae/loss"].shape
        ((), (3,))
    """
    expect("ensemble", t, Training)
    if batch_axis is not None:
        check_setting("batch_axis", batch_axis, Whole)

    def init(keys: Key) -> TrainState:
        _check_members(keys)
        return jax.vmap(t.init, out_axes=MEMBER_AXES)(keys)

    def one(hyper: PyTree, ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return t.step(ts, batch)

    def step(ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return _over_members(one, mode, {}, ts, batch, batch_axis)

    def one_prepared(hyper: PyTree, ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return t.prepare(ts, batch), {}  # type: ignore[misc]

    def prepare(ts: TrainState, batch: Any) -> TrainState:
        return _over_members(one_prepared, _at_once(mode), {}, ts, batch, batch_axis)[0]

    def within(f: Callable[[Training], Training], steps: int = 0) -> Training:
        return ensemble(f(t), mode, None if batch_axis is None else batch_axis + steps)

    return Training(
        init=init,
        step=step,
        rewrap=lambda wrap: ensemble(t.rewrap(wrap), mode, batch_axis),
        within=within,
        prepare=None if t.prepare is None else prepare,
        own_batches=batch_axis is not None,
        members=True,
    )


def sweep(make: Callable[..., Training], *, mode: Mode = "vmap", **axes: Any) -> Training:
    """Train one member for each row of hyper-parameters as one program; init takes keys [S].

    A builder that is called inside the trace may be given a traced number, so any float setting of
    any family or optimiser can be an axis.

    Args:
        make: (**hyper) -> Training, with one scalar per axis.
        mode: as in `ensemble`.
        **axes: arrays [S], all of one length; `grid` makes a product.

    Raises:
        ConfigError: if there is no axis, or the axes differ in length; for a value that `make`
            refuses; and for an axis that cannot be traced, as a size or a choice cannot.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, example_batch, grid, sweep, training, vae
        >>> spec = DataSpec((2,), "continuous")
        >>> def make(rate, beta):
        ...     return training(vae(spec, hidden=(4,), latent_dim=1, beta=beta), optax.adam(rate))
        >>> t = sweep(make, **grid(rate=[1e-3, 1e-2], beta=[0.5, 1.0]))
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> batch = example_batch(spec, jax.random.key(1), 8)
        >>> ts = jax.eval_shape(t.init, keys)  # to see shapes; else jax.jit(t.init)
        >>> ts, metrics = jax.eval_shape(t.step, ts, batch)
        >>> metrics["vae/loss"].shape
        (4,)
    """
    values = {name: _axis(name, value) for name, value in axes.items()}
    lengths = {name: value.shape for name, value in values.items()}
    vectors = all(len(shape) == 1 for shape in lengths.values())
    if not vectors or len(set(lengths.values())) != 1:
        raise ConfigError(
            "sweep needs axes that are vectors of one length (see genjax.grid); got "
            f"{lengths or 'none'}."
        )
    _check_rows(make, values)
    return _swept(make, mode, values, _prepares(make, values))


def _axis(name: str, values: Any) -> Array:
    try:
        return jnp.asarray(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"An axis of sweep holds numbers, {name}=[0.1, 0.2]; got {values!r:.80}. Train what "
            "differs by a name or a size one after the other."
        ) from error


def _check_rows(make: Callable[..., Training], values: dict[str, Array]) -> None:
    """Refuse a row that `make` refuses: in a trace a number has no value to check. Of more than
    `MOST_TRIED`, each of which takes some 20 ms, those with the ends of each axis: what a setting
    may be is a range.

    Raises:
        ConfigError: with the row.
    """
    columns = [column for value in values.values() if (column := known(value)) is not None]
    if len(columns) < len(values):
        return
    rows = dict.fromkeys(zip(*(column.tolist() for column in columns), strict=True))
    if len(rows) > MOST_TRIED:
        ends = [int(end(column)) for column in columns for end in (np.argmin, np.argmax)]
        rows = dict.fromkeys(tuple(column[i].item() for column in columns) for i in ends)
    for row in rows:
        given = dict(zip(values, map(_as_written, row), strict=True))
        try:
            make(**given)
        except GenjaxError as error:
            named = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ConfigError(f"sweep, where {named}: {error}") from error


def _as_written(value: float) -> float:
    """A whole number of `grid`, which makes floats of all, as one: a setting may need that."""
    whole = isinstance(value, float) and abs(value) <= MOST and value == int(value)
    return int(value) if whole else value


def _prepares(make: Callable[..., Training], values: dict[str, Array]) -> bool:
    """Whether what a sweep trains has something to prepare; nothing is computed to find out."""
    found: list[bool] = []

    def look(hyper: dict[str, Array]) -> int:
        found.append(make(**hyper).prepare is not None)
        return 0

    try:
        jax.eval_shape(jax.vmap(look, out_axes=None), values)
    except GenjaxError:
        raise
    except Exception as error:  # jax has several for what cannot be traced
        raise ConfigError(
            f"sweep cannot trace {', '.join(values)} ({first_line(error)}). Numbers can be axes "
            "that no shape and no choice depends on: not widths, sizes, counts of samples or "
            "layers, nor true and false. Train those one after the other."
        ) from error
    return found[0]


def _swept(
    make: Callable[..., Training], mode: Mode, values: dict[str, Array], prepares: bool
) -> Training:
    """`sweep` over axes that were checked."""
    rows = len(next(iter(values.values())))

    def init(keys: Key) -> TrainState:
        _check_members(keys)
        if len(keys) != rows:
            raise ConfigError(
                f"sweep needs one key for each of the {rows} rows of its axes; got {len(keys)} "
                "keys."
            )
        members = jax.vmap(lambda hyper, key: make(**hyper).init(key), out_axes=MEMBER_AXES)
        return members(values, keys)

    def one(hyper: PyTree, ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return make(**hyper).step(ts, batch)

    def step(ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return _over_members(one, mode, values, ts, batch, None)

    def one_prepared(hyper: PyTree, ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return make(**hyper).prepare(ts, batch), {}  # type: ignore[misc]

    def prepare(ts: TrainState, batch: Any) -> TrainState:
        return _over_members(one_prepared, _at_once(mode), values, ts, batch, None)[0]

    def within(f: Callable[[Training], Training], steps: int = 0) -> Training:
        return _swept(lambda **hyper: f(make(**hyper)), mode, values, prepares)

    return Training(
        init=init,
        step=step,
        rewrap=lambda wrap: within(lambda t: t.rewrap(wrap)),
        within=within,
        prepare=prepare if prepares else None,
        members=True,
    )


def grid(**axes: Sequence[float]) -> dict[str, np.ndarray]:
    """The product of some axes as columns for `sweep`, the last axis fastest: grid(a=[1, 2], b=[3,
    4]) has 4 rows.

    Example:
        >>> from genjax import grid
        >>> grid(learning_rate=[1, 2], b1=[3, 4])["b1"].tolist()
        [3.0, 4.0, 3.0, 4.0]

    Raises:
        ConfigError: for an axis that is no list of numbers.
    """
    for name, axis in axes.items():
        if np.ndim(axis) != 1:
            raise ConfigError(f"An axis is a list of numbers, {name}=[0.1, 0.2]; got {axis!r}.")
    rows = list(itertools.product(*axes.values()))
    return {
        name: np.asarray([row[index] for row in rows], np.float32)
        for index, name in enumerate(axes)
    }


def _check_members(keys: Key) -> None:
    check_key(keys)
    # More axes are for the members of members: ensemble(sweep(...)) takes keys [S, rows].
    if keys.ndim < 1:
        raise ConfigError(
            "init needs one key per member, [S]: jax.random.split(key, S); got keys of shape "
            f"{list(keys.shape)}."
        )


# --- one program over members ---------------------------------------------------------------------


def _over_members(
    one: One, mode: Mode, hyper: PyTree, ts: TrainState, batch: Any, batch_axis: int | None
) -> tuple[TrainState, Metrics]:
    """Run one(hyper, ts, batch) for every member, as one batched program or one after the other."""
    _check_sizes(hyper, ts, batch, batch_axis)
    if mode == "auto":
        mode = fastest_mode(one, hyper, ts, batch, batch_axis)
    if mode == "vmap":
        return jax.vmap(one, in_axes=(0, MEMBER_AXES, batch_axis), out_axes=(MEMBER_AXES, 0))(
            hyper, ts, batch
        )
    if mode != "map":
        raise ConfigError(f"mode must be 'vmap', 'map' or 'auto'; got {mode!r}.")

    def member(args: Any) -> Any:
        hyper, rest, own_batch = args
        return one(hyper, TrainState(ts.step, *rest), batch if batch_axis is None else own_batch)

    own = None
    if batch_axis is not None:
        own = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, batch_axis, 0), batch)
    new, metrics = jax.lax.map(member, (hyper, tuple(ts)[1:], own))
    return new._replace(step=new.step[0]), metrics


def _check_sizes(hyper: PyTree, ts: TrainState, batch: Any, batch_axis: int | None) -> None:
    """Refuse a state without members, and rows or batches that are not as many as they are.

    Raises:
        ConfigError: with the numbers.
    """
    if not isinstance(ts, TrainState) or not ts.key.ndim:
        raise ConfigError(
            "This training has members, and what its step was given is no state of theirs. Begin "
            "with its own init, of one key per member: t.init(jax.random.split(key, S))."
        )
    n = len(ts.key)
    rows = [len(leaf) for leaf in jax.tree.leaves(hyper)]
    own = [] if batch_axis is None else jax.tree.leaves(batch)
    if any(size != n for size in rows):
        raise ConfigError(f"This state has {n} members, and the sweep {rows[0]} rows.")
    for leaf in own:
        if leaf.ndim <= batch_axis or leaf.shape[batch_axis] != n:  # type: ignore[operator]
            raise ConfigError(
                f"This state has {n} members, and axis {batch_axis} of a batch should hold as many "
                f"batches of their own; it has an array of shape {list(leaf.shape)}."
            )


def _at_once(mode: Mode) -> Mode:
    """The mode for what is run once only, and so is not worth timing."""
    return "map" if mode == "auto" else mode


_MEASURED: dict[Any, Mode] = {}


def fastest_mode(
    one: One,
    hyper: PyTree,
    ts: TrainState,
    batch: Any,
    batch_axis: int | None = None,
    repeats: int = 5,
) -> Mode:
    """Time steps of all members as "vmap" and as "map" on this machine, and say which is faster.

    A vmapped convolution becomes a grouped one, which can be slower than one member after the
    other. Only shapes are needed, so this also works while a step is being traced; it compiles both
    forms and runs each `repeats` times on ones, fewer if that takes seconds. Short steps are timed
    in loops of up to 50: their difference is less than what a dispatch costs and varies. Results
    are kept for the life of the process.
    """
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)),
        (hyper, ts, batch),
    )
    signature = (one, batch_axis, platform(), str(shapes))
    if signature not in _MEASURED:
        _MEASURED[signature] = _timed(one, shapes, batch_axis, repeats)
    return _MEASURED[signature]


def _timed(one: One, shapes: Any, batch_axis: int | None, repeats: int) -> Mode:
    """The mode whose fastest run of several was faster."""
    with jax.ensure_compile_time_eval():
        # On the device once: with members inside `feed`, the batch is the whole data set.
        arguments = jax.device_put(jax.tree.map(_ones, shapes))

    def program(mode: Mode) -> Any:
        def run(n: Array, hyper: PyTree, ts: TrainState, batch: Any) -> TrainState:
            def step(_: Array, ts: TrainState) -> TrainState:
                return _over_members(one, mode, hyper, ts, batch, batch_axis)[0]

            return jax.lax.fori_loop(0, n, step, ts)

        return jax.jit(run).lower(jax.ShapeDtypeStruct((), np.int32), *shapes).compile()

    programs: dict[Mode, Any] = {"vmap": program("vmap"), "map": program("map")}

    def timed(mode: Mode, n: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(programs[mode](np.int32(n), *arguments))
        return time.perf_counter() - start

    first = max(timed(mode, 1) for mode in programs)
    n = int(np.clip(0.05 / first, 1, 50))
    seconds = dict.fromkeys(programs, np.inf)
    for _ in range(int(np.clip(1 / first, 1, repeats))):
        for mode in programs:  # in alternation, so that a busy machine hurts both
            seconds[mode] = min(seconds[mode], timed(mode, n))
    return min(seconds, key=lambda mode: seconds[mode])


def _ones(leaf: jax.ShapeDtypeStruct) -> Any:
    """Ones of a shape, or keys with seeds 0, 1, ..."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        seeds = np.arange(np.prod(leaf.shape, dtype=int), dtype=np.uint32).reshape(leaf.shape)
        return jax.vmap(jax.random.key)(seeds) if leaf.shape else jax.random.key(0)
    return np.ones(leaf.shape, leaf.dtype)
