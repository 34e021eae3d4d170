"""Transforms Training -> Training: parts of a batch, several steps a dispatch, data on the device.

Every transform is a function of pure functions, so any order that makes sense works:
`microbatch(ensemble(t), 4)`, `scan_steps(shard(t, mesh))`, `ensemble(sweep(make, lr=rates))`.

What holds for all of them, those of `members.py` and `sharding.py` included:

* The transform given last is outermost. Each axis that one adds to metrics is put in front of those
  that are there: `scan_steps(ensemble(t))` has metrics [steps, members], `ensemble(scan_steps(t))`
  [members, steps].
* Members are trained alike, whatever stands around them. What looks at the result of a step, or
  takes several, reaches every member alone (`Training.within`): `skip_nonfinite(ensemble(t))` is
  `ensemble(skip_nonfinite(t))`, and a member's NaN stops no other.
* `prepare` is passed on: it takes what `step` takes, uses the batch of the first step of it, and is
  None where the model has nothing to prepare.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from genjax.checks import check_kept
from genjax.errors import ConfigError, expect
from genjax.protocol import (
    Array,
    Batch,
    Gradient,
    Key,
    Metrics,
    Params,
    PyTree,
    State,
    Training,
    TrainState,
)


class Donating:
    """A jit-compiled function of a state, whose buffers it takes, that says so when it is given a
    state that it took before. All else of the compiled function is there as well: `lower`, ...
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._program = jax.jit(function, donate_argnums=0)

    def __call__(self, ts: TrainState, *given: Any) -> Any:
        # Of a state that was given away this is gone above all, and asking for it costs nothing.
        check_kept(getattr(ts, "step", None), "This state")
        try:
            return self._program(ts, *given)
        except (RuntimeError, ValueError):
            check_kept(ts, "This state")
            check_kept(given, "What this step is given beside its state")
            raise

    def __getattr__(self, name: str) -> Any:
        if name == "_program":
            raise AttributeError(name)
        return getattr(self._program, name)


def compiled(t: Training) -> Training:
    """The same training with its functions jit-compiled, and the state's buffers donated to `step`
    and `prepare`: go on with the state that they return.

    Raises:
        ConfigError: from `step` and `prepare`, for a state that was given to one of them before.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, compiled, example_batch, training, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,))
        >>> t = compiled(training(model, optax.adam(1e-3)))
        >>> ts = t.init(jax.random.key(0))
        >>> ts, metrics = t.step(ts, example_batch(model.spec, jax.random.key(1), 8))
        >>> int(ts.step)
        1
    """
    expect("compiled", t, Training)
    within = t.within
    return t._replace(
        init=jax.jit(t.init),
        step=Donating(t.step),
        rewrap=lambda wrap: compiled(t.rewrap(wrap)),
        within=None if within is None else lambda f, steps=0: compiled(within(f, steps)),
        prepare=None if t.prepare is None else Donating(t.prepare),
    )


def _check_count(who: str, what: str, n: Any) -> None:
    try:
        count = operator.index(n)
    except TypeError:
        count = 0
    if count < 1:
        raise ConfigError(f"{who} needs a whole number of {what}s, at least 1 {what}; got {n!r}.")


# --- parts of a batch -----------------------------------------------------------------------------


def microbatch(t: Training, n: int) -> Training:
    """The same step with its gradient accumulated over n equal parts of the batch, so that memory
    falls by about n.

    A part is every n-th example, so that each of several devices has its share of every part. The
    update equals that of the whole batch for the same noise; each part draws its noise with its
    own key. Every part begins with the state that the turn began with, and the turn leaves the mean
    of what the parts leave, weighted as they are; of what is no real number it leaves that of the
    first part that has a weight. So a decay in the state is applied once, and what all parts agree
    on is kept exactly. `prepare` sees the whole batch.

    Raises:
        ConfigError: if n is no whole number from 1 on, or the batch does not divide into n parts.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, example_batch, microbatch, training, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
        >>> t = microbatch(training(model, optax.adam(1e-3)), 4)
        >>> batch = example_batch(model.spec, jax.random.key(1), 8)
        >>> ts = jax.eval_shape(t.init, jax.random.key(0))  # to see shapes; else jax.jit(t.init)
        >>> ts, metrics = jax.eval_shape(t.step, ts, batch)
        >>> metrics["vae/loss"].shape
        ()
    """
    expect("microbatch", t, Training)
    _check_count("microbatch", "part", n)
    return t.rewrap(lambda gradient: partial(_accumulated, gradient, n))


def _accumulated(
    gradient: Gradient,
    n: int,
    player: str,
    params: Params,
    state: State,
    batch: Batch,
    weight: Array,
    key: Key,
    step: Array,
) -> tuple[PyTree, State, Metrics]:
    """The sum of a gradient and of metrics over n parts of a batch, and the mean of the states."""
    size = batch.x.shape[0]
    if size % n:
        raise ConfigError(f"A batch of {size} does not divide into {n} equal parts.")

    def split(tree: PyTree) -> PyTree:
        # Not one stretch after the other: of a batch that lies on several devices each part would
        # be on a few of them, and more than these would compute it.
        def one(leaf: Array) -> Array:
            return leaf.reshape(size // n, n, *leaf.shape[1:]).swapaxes(0, 1)

        return jax.tree.map(one, tree)

    def of_part(batch: Batch, weight: Array, key: Key) -> tuple[PyTree, State, Metrics]:
        return gradient(player, params, state, batch, weight, key, step)

    def part(carry: Any, given: Any) -> tuple[Any, None]:
        sums, mean, before = carry
        grads, after, metrics = of_part(*given)
        share = jnp.sum(given[1])  # of equal parts all shares are 1 / size, which will do
        total = before + share
        mean = jax.tree.map(partial(_running_mean, before, share, total), mean, after)
        return (jax.tree.map(jnp.add, sums, (grads, metrics)), mean, total), None

    weights = split(weight) if weight.ndim else jnp.broadcast_to(weight, (n,))
    parts = (split(batch), weights, jax.random.split(key, n))
    grads, _, metrics = jax.eval_shape(of_part, *jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (grads, metrics))
    nothing = jnp.zeros((), weight.dtype)
    (sums, mean, _), _ = jax.lax.scan(part, (zeros, state, nothing), parts)
    return sums[0], mean, sums[1]


def _running_mean(before: Array, share: Array, total: Array, mean: Array, new: Array) -> Array:
    """The mean of what the parts up to one leave of a leaf of the state (West 1979).

    In this form what all parts agree on stays exactly that. A part of weight 0 counts for nothing,
    its NaN neither.
    """
    if not _is_inexact(new):
        return jnp.where(before > 0, mean, new)
    towards = (share / jnp.where(total > 0, total, 1)).astype(new.dtype)
    moved = (share > 0) & (new != mean)  # of two infinities the difference is NaN
    later = jnp.where(moved, mean + towards * (new - mean), mean)
    return jnp.where((before == 0) & (share > 0), new, later)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)  # real or complex


# --- several steps a dispatch ---------------------------------------------------------------------


def scan_steps(t: Training, k: None = None) -> Training:
    """Several optimiser steps in one dispatch, over batches stacked along a new first axis; metrics
    get that axis too. For one and the same payload see `repeat_steps`.

    Members that share their batches take all steps by themselves: "map" then takes a member's state
    out of the others' and puts it back once, not at every step. `prepare` takes the first batch.

    Raises:
        ConfigError: for a number of steps, which is `repeat_steps(t, k)`.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, example_batch, scan_steps, training, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
        >>> t = scan_steps(training(model, optax.adam(1e-3)))
        >>> keys = jax.random.split(jax.random.key(1), 5)
        >>> batches = jax.vmap(lambda key: example_batch(model.spec, key, 8))(keys)
        >>> ts = jax.eval_shape(t.init, jax.random.key(0))  # to see shapes; else jax.jit(t.init)
        >>> ts, metrics = jax.eval_shape(t.step, ts, batches)
        >>> metrics["vae/loss"].shape
        (5,)
    """
    expect("scan_steps", t, Training)
    if k is not None:
        raise ConfigError(
            "scan_steps(t) goes over stacked batches; k steps that are all given the same are "
            f"repeat_steps(t, {k})."
        )

    def step(ts: TrainState, batches: Any) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(t.step, ts, batches)

    def prepare(ts: TrainState, batches: Any) -> TrainState:
        return t.prepare(ts, jax.tree.map(lambda leaf: leaf[0], batches))  # type: ignore[misc]

    return Training(
        init=t.init,
        step=step if t.within is None else _steps_first(t.within(scan_steps, 1)),
        rewrap=lambda wrap: scan_steps(t.rewrap(wrap)),
        prepare=None if t.prepare is None else prepare,
        members=t.members,
    )


def repeat_steps(t: Training, k: int) -> Training:
    """k optimiser steps in one dispatch that are all given the same, the form to use after `feed`;
    metrics get a leading axis of steps. Members take them by themselves, as under `scan_steps`.

    Raises:
        ConfigError: if k is no whole number from 1 on.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, example_batch, repeat_steps, training, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
        >>> t = repeat_steps(training(model, optax.adam(1e-3)), 5)
        >>> batch = example_batch(model.spec, jax.random.key(1), 8)
        >>> ts = jax.eval_shape(t.init, jax.random.key(0))  # to see shapes; else jax.jit(t.init)
        >>> ts, metrics = jax.eval_shape(t.step, ts, batch)
        >>> metrics["vae/loss"].shape
        (5,)
    """
    expect("repeat_steps", t, Training)
    _check_count("repeat_steps", "step", k)

    def step(ts: TrainState, given: Any) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda ts, _: t.step(ts, given), ts, length=k)

    def repeat(one: Training) -> Training:
        return repeat_steps(one, k)

    return Training(
        init=t.init,
        step=step if t.within is None else _steps_first(t.within(repeat)),
        rewrap=lambda wrap: repeat(t.rewrap(wrap)),
        prepare=t.prepare,
        members=t.members,
    )


def _steps_first(members: Training) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step of members that take several, with metrics [steps, members] in the place of
    [members, steps].
    """

    def step(ts: TrainState, given: Any) -> tuple[TrainState, Metrics]:
        ts, metrics = members.step(ts, given)
        return ts, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), metrics)

    return step


def feed(t: Training, batch_at: Callable[[Any, Array], Batch]) -> Training:
    """A step that takes the whole data set and gathers its own batch: step(ts, arrays) = t.step(ts,
    batch_at(arrays, step)), and `prepare` the same.

    With device-resident arrays a scanned step then never waits for the host.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, example_batch, feed, training, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
        >>> arrays = example_batch(model.spec, jax.random.key(1), 24)
        >>> def batch_at(arrays, step):  # `genjax.batch_at(source, 8, seed)` makes a better one
        ...     rows = 8 * (step % 3) + jax.numpy.arange(8)
        ...     return jax.tree.map(lambda leaf: leaf[rows], arrays)
        >>> t = feed(training(model, optax.adam(1e-3)), batch_at)
        >>> ts = jax.eval_shape(t.init, jax.random.key(0))  # to see shapes; else jax.jit(t.init)
        >>> ts, metrics = jax.eval_shape(t.step, ts, arrays)
        >>> metrics["vae/loss"].shape
        ()
    """
    expect("feed", t, Training)

    def step(ts: TrainState, arrays: Any) -> tuple[TrainState, Metrics]:
        return t.step(ts, batch_at(arrays, ts.step))

    def prepare(ts: TrainState, arrays: Any) -> TrainState:
        return t.prepare(ts, batch_at(arrays, ts.step))  # type: ignore[misc]

    members = t.within

    def within(f: Callable[[Training], Training], steps: int = 0) -> Training:
        return members(lambda one: f(feed(one, batch_at)), steps)  # type: ignore[misc]

    return t._replace(
        step=step,
        rewrap=lambda wrap: feed(t.rewrap(wrap), batch_at),
        # Only of what all members share can a member gather its own.
        within=None if members is None or t.own_batches else within,
        prepare=None if t.prepare is None else prepare,
    )


# --- steps that are left out ----------------------------------------------------------------------


def skip_nonfinite(t: Training) -> Training:
    """A step that changes nothing but the step counter when its result is not finite, and says so
    in metric "skipped" (0 or 1; [S] of S members, each of which skips its own steps).

    It looks at the new parameters, state and optimiser state, all players together, and costs one
    pass over them. To be put inside of `scan_steps` and `repeat_steps`: around them, one bad step
    undoes the whole dispatch.

    Raises:
        ConfigError: around members that it cannot reach, which take several steps a dispatch or
            are fed batches of their own; put it inside.

    Example:
        >>> import jax, optax
        >>> from genjax import Batch, DataSpec, skip_nonfinite, training, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
        >>> t = skip_nonfinite(training(model, optax.adam(1e-3)))
        >>> ts, metrics = jax.jit(t.step)(
        ...     jax.jit(t.init)(jax.random.key(0)), Batch(jax.numpy.full((8, 2), jax.numpy.nan))
        ... )
        >>> int(ts.step), float(metrics["skipped"])
        (1, 1.0)
    """
    expect("skip_nonfinite", t, Training)
    if t.within is not None:
        return t.within(skip_nonfinite)
    if t.members:
        raise ConfigError(
            "skip_nonfinite cannot reach the members of `scan_steps(t)` and `repeat_steps(t, k)`, "
            "nor those of `feed(t, batch_at)` that have batches of their own. Put it inside: write "
            "feed(skip_nonfinite(t), batch_at), or scan_steps(skip_nonfinite(t))."
        )

    def step(ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        new, metrics = t.step(ts, batch)
        kept, before = (new.params, new.state, new.opt), (ts.params, ts.state, ts.opt)
        leaves = filter(_is_inexact, jax.tree.leaves((kept[:2], metrics)))
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
        pairs = zip(jax.tree.leaves(new.opt), jax.tree.leaves(ts.opt), strict=True)
        finite += [_still_finite(leaf, old) for leaf, old in pairs if _is_inexact(leaf)]
        # The barrier keeps them one vector. Without, XLA puts all of its terms into the choice of
        # every leaf: a program of leaves² operations, which takes several times as long to compile.
        ok = jax.lax.optimization_barrier(jnp.stack(finite)).all()
        params, state, opt = jax.tree.map(partial(jnp.where, ok), kept, before)
        # A skipped step's NaN metrics would spoil the mean of the whole window.
        metrics = {name: jnp.where(ok, value, 0) for name, value in metrics.items()}
        skipped = 1 - ok.astype(jnp.float32)
        return new._replace(params=params, state=state, opt=opt), metrics | {"skipped": skipped}

    return t._replace(step=step, rewrap=lambda wrap: skip_nonfinite(t.rewrap(wrap)))


def _still_finite(new: Array, old: Array) -> Array:
    """Whether a leaf of an optimiser's state is finite. A single number may stay what it was: the
    best value of optax.contrib.reduce_on_plateau begins infinite.
    """
    finite = jnp.all(jnp.isfinite(new))
    return finite if new.ndim else finite | ~jnp.isfinite(old)
