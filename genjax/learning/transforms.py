"""Transforms Training -> Training: parts of a batch, several steps a dispatch, data on the device.

Every transform is a function of pure functions, so any order that makes sense works:
`microbatch(ensemble(t), 4)`, `scan_steps(shard(t, mesh))`, `ensemble(sweep(make, lr=rates))`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError
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


def scan_steps(t: Training, k: None = None) -> Training:
    """Several optimiser steps in one dispatch, over a tree of batches with a leading axis of steps;
    metrics get that axis too. See `repeat_steps` for one and the same payload.

    Members that share their batch take all steps by themselves: "map" then takes a member's state
    out of the others' and puts it back once, not at every step.
    """
    if k is not None:
        raise ConfigError(
            "scan_steps(t) goes over stacked batches; k steps that are all given the same are "
            f"repeat_steps(t, {k})."
        )
    if t.within is not None:
        many = t.within(scan_steps)
        return Training(t.init, _steps_first(many.step), lambda wrap: scan_steps(t.rewrap(wrap)))

    def step(ts: TrainState, batches: Any) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(t.step, ts, batches)

    return Training(t.init, step, lambda wrap: scan_steps(t.rewrap(wrap)))


def repeat_steps(t: Training, k: int) -> Training:
    """k optimiser steps in one dispatch that are all given the same, as after `feed`; metrics get a
    leading axis of steps. Members take them as under `scan_steps`.
    """
    if t.within is not None:
        many = t.within(lambda one: repeat_steps(one, k))
        return Training(
            t.init, _steps_first(many.step), lambda wrap: repeat_steps(t.rewrap(wrap), k)
        )

    def step(ts: TrainState, given: Any) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda ts, _: t.step(ts, given), ts, length=k)

    return Training(t.init, step, lambda wrap: repeat_steps(t.rewrap(wrap), k))


def _steps_first(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step with its metrics' axes of members and of steps exchanged."""

    def exchanged(ts: TrainState, given: Any) -> tuple[TrainState, Metrics]:
        ts, metrics = step(ts, given)
        return ts, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), metrics)

    return exchanged


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
