"""One train step for every family, and the transforms Training -> Training that compose over it.

    train = training(vae(spec), optax.adam(1e-3))
    many = ensemble(train)                   # vmap over keys: one program trains all members
    fast = scan_steps(many)                  # k optimiser steps per dispatch
    run = compiled(fast)                     # jit, with the state's buffers donated

Every transform is a function of two pure functions, so any order that makes sense works:
`microbatch(ensemble(t), 4)`, `scan_steps(shard(t, mesh))`, `ensemble(sweep(make, lr=rates))`.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genjax.checks import check_batch, check_key
from genjax.errors import ConfigError
from genjax.learning.optim import averaged
from genjax.protocol import (
    Array,
    Batch,
    Gradient,
    Key,
    Metrics,
    Model,
    Params,
    PyTree,
    State,
    Training,
    TrainState,
)

Mode = Literal["vmap", "map", "auto"]
# The members of an ensemble share the step counter, so that what depends on it alone (data order)
# is computed once.
MEMBER_AXES: Any = TrainState(step=None, key=0, params=0, state=0, opt=0)  # type: ignore[arg-type]


def training(
    model: Model, tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation]
) -> Training:
    """The training procedure of any model: each step takes the turns of `model.turns`, one gradient
    and one update each.

    This is the one place where the mean over the batch is taken: Σ_i w_i loss_i with w = weight / Σ
    weight. The key of turn j of step s, of J turns a step, is `fold_in(ts.key, s J + j)`. Metrics
    are weighted means named "player/name"; "player/loss" is always there, and a player with several
    turns reports its last.

    Args:
        model: what a family's builder returned.
        tx: one optimiser for all players, or one for each player by name.

    Raises:
        ConfigError: if `tx` or `model.turns` name a player that has no loss, or leave one out.
    """
    players = tuple(model.losses)
    turns = model.turns or tuple((player, 1) for player in players)
    order = [player for player, times in turns for _ in range(times)]
    by_player = dict(tx) if isinstance(tx, Mapping) else dict.fromkeys(players, tx)
    if set(by_player) != set(players):
        raise ConfigError(
            f"Give one optimiser for each player ({', '.join(players)}); got them for: "
            f"{', '.join(by_player) or 'none'}."
        )
    for player, times in turns:
        if player not in players or times < 1:
            raise ConfigError(
                f"A turn must name a player ({', '.join(players)}) and a count >= 1; got "
                f"{(player, times)}."
            )
    for player in players:
        if player not in dict(turns):
            raise ConfigError(f"Player {player!r} has a loss but no turn; turns are {turns}.")

    def gradient(
        player: str,
        params: Params,
        state: State,
        batch: Batch,
        weight: Array,
        key: Key,
        step: Array,
    ) -> tuple[PyTree, State, Metrics]:
        def objective(own: PyTree) -> tuple[Array, tuple[State, Metrics]]:
            loss, aux = model.losses[player]({**params, player: own}, state, batch, key, step)
            metrics = {
                f"{player}/{name}": _dot(weight, value)
                for name, value in {**aux.metrics, "loss": loss}.items()
            }
            return metrics[f"{player}/loss"], (aux.state, metrics)

        grads, (state, metrics) = jax.grad(objective, has_aux=True)(params[player])
        return grads, state, metrics

    def init(key: Key) -> TrainState:
        check_key(key)
        if key.ndim:
            raise ConfigError(
                f"init needs one key; got keys of shape {list(key.shape)}. For many members, use "
                "`ensemble`."
            )
        key_model, key_train = jax.random.split(key)
        params, state = model.init(key_model)
        opt = {player: by_player[player].init(params[player]) for player in players}
        return TrainState(jnp.zeros((), jnp.int32), key_train, params, state, opt)

    def step_with(gradient: Gradient, ts: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_batch(model.spec, batch)
        n = batch.x.shape[0]
        # A mean with equal weights is a sum times one number: a vector of them costs the whole step
        # 5 % on a CPU.
        weight = (
            jnp.asarray(1 / n, jnp.float32)
            if batch.weight is None
            else batch.weight / jnp.sum(batch.weight)
        )
        if batch.weight is not None:
            batch = _blank(batch, batch.weight > 0)
        metrics: Metrics = {}
        for index, player in enumerate(order):
            key = jax.random.fold_in(ts.key, ts.step * len(order) + index)
            grads, state, new = gradient(player, ts.params, ts.state, batch, weight, key, ts.step)
            with jax.numpy_dtype_promotion(
                "standard"
            ):  # optax's own arithmetic mixes whole and real numbers
                updates, opt = by_player[player].update(grads, ts.opt[player], ts.params[player])
            own = optax.apply_updates(ts.params[player], updates)
            ts = ts._replace(
                params={**ts.params, player: own}, state=state, opt={**ts.opt, player: opt}
            )
            metrics |= new
        return ts._replace(step=ts.step + 1), metrics

    def make(wrap: Callable[[Gradient], Gradient]) -> Training:
        # The wrapper given last is outermost: it splits the batch before those that were given
        # earlier see it.
        return Training(
            init, partial(step_with, wrap(gradient)), lambda more: make(lambda g: more(wrap(g)))
        )

    return make(lambda g: g)


def _blank(batch: Batch, kept: Array) -> Batch:
    """The batch with 0 in the place of examples that are not kept: in a gradient even 0 times NaN
    is NaN.
    """

    def blank(leaf: Array) -> Array:
        return jnp.where(kept.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))

    return batch._replace(x=jax.tree.map(blank, batch.x), cond=jax.tree.map(blank, batch.cond))


def _dot(weight: Array, value: Array) -> Array:
    """Σ weight value for a weight [B], or [] for all alike; a weight of 0 silences even a NaN, such
    as that of padding.
    """
    value = (
        value if value.dtype == jnp.float64 else value.astype(jnp.float32)
    )  # sums of few bits would lose them
    if not weight.ndim:
        return jnp.sum(value) * weight.astype(value.dtype)
    return jnp.sum(jnp.where(weight > 0, value, 0) * weight.astype(value.dtype))


def eval_params(ts: TrainState) -> Params:
    """The parameters to sample and evaluate with: each player's moving average where its optimiser
    tracks one.
    """
    return {player: averaged(ts.opt.get(player, ()), own) for player, own in ts.params.items()}


def compiled(t: Training) -> Training:
    """The same training with `init` and `step` jit-compiled, and the state's buffers donated to the
    step.
    """
    return Training(
        jax.jit(t.init), jax.jit(t.step, donate_argnums=0), lambda wrap: compiled(t.rewrap(wrap))
    )


def microbatch(t: Training, n: int) -> Training:
    """The same step with its gradient accumulated over `n` equal parts of the batch, so that memory
    falls by about n.

    The update equals that of the whole batch for the same noise; each part draws its noise with its
    own key, and batch statistics are updated part by part.

    Raises:
        ConfigError: if the batch does not divide into n parts.
    """
    if n < 1:
        raise ConfigError(f"microbatch needs at least 1 part; got {n}.")

    def wrap(gradient: Gradient) -> Gradient:
        def accumulated(
            player: str,
            params: Params,
            state: State,
            batch: Batch,
            weight: Array,
            key: Key,
            step: Array,
        ) -> tuple[PyTree, State, Metrics]:
            size = batch.x.shape[0]
            if size % n:
                raise ConfigError(f"A batch of {size} does not divide into {n} equal parts.")

            def part(carry: Any, xs: Any) -> tuple[Any, None]:
                (grads, metrics), state = carry
                part_batch, part_weight, part_key = xs
                more, state, more_metrics = gradient(
                    player, params, state, part_batch, part_weight, part_key, step
                )
                return (jax.tree.map(jnp.add, (grads, metrics), (more, more_metrics)), state), None

            split = partial(jax.tree.map, lambda leaf: leaf.reshape(n, size // n, *leaf.shape[1:]))
            parts = (split(batch), split(weight) if weight.ndim else jnp.broadcast_to(weight, (n,)))
            keys = jax.random.split(key, n)
            first = jax.tree.map(lambda leaf: leaf[0], (*parts, keys))
            shapes = jax.eval_shape(
                lambda *args: gradient(player, params, state, *args, step), *first
            )
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0], shapes[2])
            )
            ((grads, metrics), state), _ = jax.lax.scan(part, (zeros, state), (*parts, keys))
            return grads, state, metrics

        return accumulated

    return t.rewrap(wrap)


def scan_steps(t: Training, k: int | None = None) -> Training:
    """A step that runs several optimiser steps in one dispatch; metrics get a leading axis of that
    length.

    With k None the second argument of the step is a tree of batches with a leading axis, one batch
    a step. With a number
    it is given unchanged to each of k steps: the form to use after `feed`. Members that share their
        batch take all k steps
    by themselves: "map" then takes a member's state out of the others' and puts it back once, not
        at every step.
    """
    if t.within is not None:
        many = t.within(lambda one: scan_steps(one, k))

        def members(ts: TrainState, batches: Any) -> tuple[TrainState, Metrics]:
            ts, metrics = many.step(ts, batches)
            return ts, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), metrics)

        return Training(t.init, members, lambda wrap: scan_steps(t.rewrap(wrap), k))

    def step(ts: TrainState, batches: Any) -> tuple[TrainState, Metrics]:
        if k is None:
            return jax.lax.scan(t.step, ts, batches)
        return jax.lax.scan(lambda ts, _: t.step(ts, batches), ts, length=k)

    return Training(t.init, step, lambda wrap: scan_steps(t.rewrap(wrap), k))


def feed(t: Training, batch_at: Callable[[Any, Array], Batch]) -> Training:
    """A step that takes the whole data set and gathers its own batch: step(ts, arrays) = t.step(ts,
    batch_at(arrays, step)).

    With device-resident arrays a scanned step then never waits for the host.
    """
    members = t.within
    return Training(
        t.init,
        lambda ts, arrays: t.step(ts, batch_at(arrays, ts.step)),
        lambda wrap: feed(t.rewrap(wrap), batch_at),
        None if members is None else lambda f: members(lambda one: f(feed(one, batch_at))),
    )


def skip_nonfinite(t: Training) -> Training:
    """A step that changes nothing but the step counter when its result is not finite, and says so
    in metric "skipped" (0 or 1).

    It looks at the new parameters, state and optimiser state, all players together, and costs one
    pass over them.
    """

    def step(ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        new, metrics = t.step(ts, batch)
        kept = (new.params, new.state, new.opt)
        finite = [
            jnp.all(jnp.isfinite(leaf))
            for leaf in jax.tree.leaves((kept, metrics))
            if _is_float(leaf)
        ]
        # The barrier keeps them one vector. Without, XLA puts all of its terms into the choice of
        # every leaf: a program of leaves² operations, which takes several times as long to compile.
        ok = jax.lax.optimization_barrier(jnp.stack(finite)).all()
        choose = lambda a, b: jax.tree.map(lambda x, y: jnp.where(ok, x, y), a, b)  # noqa: E731
        params, state, opt = choose(kept, (ts.params, ts.state, ts.opt))
        # A skipped step's NaN metrics would spoil the mean of the whole window.
        metrics = {name: jnp.where(ok, value, 0) for name, value in metrics.items()}
        return new._replace(params=params, state=state, opt=opt), metrics | {
            "skipped": 1 - ok.astype(jnp.float32)
        }

    return Training(t.init, step, lambda wrap: skip_nonfinite(t.rewrap(wrap)))


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


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
