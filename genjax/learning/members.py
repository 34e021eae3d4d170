"""Many members that are trained as one program: ensembles and sweeps."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from genjax.checks import check_key
from genjax.errors import ConfigError
from genjax.protocol import (
    Array,
    Key,
    Metrics,
    Training,
    TrainState,
)

Mode = Literal["vmap", "map", "auto"]

# The members of an ensemble share the step counter, so that what depends on it alone (data order)
# is computed once.
MEMBER_AXES: Any = TrainState(step=None, key=0, params=0, state=0, opt=0)  # type: ignore[arg-type]


def _over_members(
    one: Callable[..., Any],
    mode: Mode,
    hyper: Any,
    ts: TrainState,
    batch: Any,
    batch_axis: int | None,
) -> Any:
    """Run one(hyper, ts, batch) for every member, as one batched program or one after the other."""
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

    own = (
        None
        if batch_axis is None
        else jax.tree.map(lambda leaf: jnp.moveaxis(leaf, batch_axis, 0), batch)
    )
    new, metrics = jax.lax.map(member, (hyper, tuple(ts)[1:], own))
    return new._replace(step=new.step[0]), metrics


_MEASURED: dict[Any, Mode] = {}


def fastest_mode(
    one: Callable[..., Any],
    hyper: Any,
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
    signature = (one, batch_axis, jax.default_backend(), str(shapes))
    if signature in _MEASURED:
        return _MEASURED[signature]

    def concrete(leaf: jax.ShapeDtypeStruct) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            seeds = np.arange(np.prod(leaf.shape, dtype=int), dtype=np.uint32).reshape(leaf.shape)
            return jax.vmap(jax.random.key)(seeds) if leaf.shape else jax.random.key(0)
        return np.ones(leaf.shape, leaf.dtype)

    with jax.ensure_compile_time_eval():
        # On the device once: with members inside `feed`, the batch is the whole data set.
        arguments = jax.device_put(jax.tree.map(concrete, shapes))

    def program(mode: Mode) -> Any:
        def run(n: Array, hyper: Any, ts: TrainState, batch: Any) -> TrainState:
            body = lambda _, ts: _over_members(one, mode, hyper, ts, batch, batch_axis)[0]  # noqa: E731
            return jax.lax.fori_loop(0, n, body, ts)

        return jax.jit(run).lower(jax.ShapeDtypeStruct((), np.int32), *shapes).compile()

    programs: dict[Mode, Any] = {"vmap": program("vmap"), "map": program("map")}

    def timed(mode: Mode, n: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(programs[mode](np.int32(n), *arguments))
        return time.perf_counter() - start

    first = max(timed(mode, 1) for mode in programs)
    n = int(np.clip(0.05 / first, 1, 50))
    seconds = dict.fromkeys(programs, np.inf)
    for _ in range(
        int(np.clip(1 / first, 1, repeats))
    ):  # in alternation, so that a busy machine hurts both
        for mode in programs:
            seconds[mode] = min(seconds[mode], timed(mode, n))
    _MEASURED[signature] = min(seconds, key=lambda mode: seconds[mode])
    return _MEASURED[signature]


def ensemble(t: Training, mode: Mode = "vmap", batch_axis: int | None = None) -> Training:
    """Train many members that differ in their keys as one program: init takes keys [S], and states
    get a leading axis S.

    The members share the step counter and, unless `batch_axis` names an axis of the batch, the
    batch. Metrics get a leading axis S. A vmapped run agrees with solo runs to rounding, not
    bitwise.

    Args:
        mode: "vmap" is one batched program, "map" runs the members one after the other in one
            program, "auto" times both.
        batch_axis: the axis of every leaf of the batch that holds the members' own batches; None
            shares one batch.
    """

    def init(keys: Key) -> TrainState:
        _check_members(keys)
        return jax.vmap(t.init, out_axes=MEMBER_AXES)(keys)

    def one(hyper: Any, ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return t.step(ts, batch)

    def step(ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return _over_members(one, mode, {}, ts, batch, batch_axis)

    within = None if batch_axis is not None else lambda f: ensemble(f(t), mode)
    return Training(init, step, lambda wrap: ensemble(t.rewrap(wrap), mode, batch_axis), within)


def sweep(make: Callable[..., Training], *, mode: Mode = "vmap", **axes: Any) -> Training:
    """Train one member for each row of hyper-parameters as one program; init takes keys [S].

    A builder that is called inside the trace may be given a traced number, so any float setting of
    any family or
    optimiser can be an axis: `sweep(lambda lr, beta: training(vae(spec, beta=beta), adam(lr)),
        **grid(lr=..., beta=...))`.

    Args:
        make: (**hyper) -> Training, with one scalar per axis.
        mode: as in `ensemble`.
        **axes: arrays [S], all of one length; `grid` makes a product.

    Raises:
        ConfigError: if there is no axis, or the axes differ in length.
    """
    values = {name: jnp.asarray(value) for name, value in axes.items()}
    lengths = {name: value.shape for name, value in values.items()}
    if (
        not values
        or len(set(lengths.values())) != 1
        or any(len(shape) != 1 for shape in lengths.values())
    ):
        raise ConfigError(
            "sweep needs axes that are vectors of one length (see genjax.grid); got "
            f"{lengths or 'none'}."
        )

    def init(keys: Key) -> TrainState:
        _check_members(keys)
        (n_rows,) = next(iter(lengths.values()))
        if len(keys) != n_rows:
            raise ConfigError(
                f"sweep needs one key for each of the {n_rows} rows of its axes; got {len(keys)} "
                "keys."
            )
        return jax.vmap(lambda hyper, key: make(**hyper).init(key), out_axes=MEMBER_AXES)(
            values, keys
        )

    def one(hyper: Any, ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return make(**hyper).step(ts, batch)

    def step(ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return _over_members(one, mode, values, ts, batch, None)

    def changed(f: Callable[[Training], Training]) -> Training:
        return sweep(lambda **hyper: f(make(**hyper)), mode=mode, **axes)

    return Training(init, step, lambda wrap: changed(lambda t: t.rewrap(wrap)), changed)


def grid(**axes: Sequence[float]) -> dict[str, np.ndarray]:
    """The product of some axes as columns for `sweep`, the last axis fastest: grid(a=[1, 2], b=[3,
    4]) has 4 rows.
    """
    rows = list(itertools.product(*axes.values()))
    return {
        name: np.asarray([row[index] for row in rows], np.float32)
        for index, name in enumerate(axes)
    }


def _check_members(keys: Key) -> None:
    check_key(keys)
    if (
        keys.ndim < 1
    ):  # more axes are for the members of members: ensemble(sweep(...)) takes keys [S, rows]
        raise ConfigError(
            "init needs one key per member, [S]: jax.random.split(key, S); got keys of shape "
            f"{list(keys.shape)}."
        )
