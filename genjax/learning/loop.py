"""`fit`: the one stateful place. It moves data, watches the clock, writes what happened, saves, and
stops cleanly.

The loop dispatches `steps_per_call` optimiser steps at a time and reads their metrics one dispatch
late, so the device never waits for the host. Everything that it does on the way happens at the
first dispatch boundary at or after a multiple of its interval, so what a run computes is a function
of its settings alone, stopped and resumed or not.
"""

import functools
import logging
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from genjax.data import Source, batch_at, prepare_at
from genjax.data.buckets import BucketOrder, Buckets
from genjax.data.rows import Rows
from genjax.errors import (
    CheckpointError,
    ConfigError,
    GenjaxError,
    Interrupted,
    NonFiniteError,
    WriteError,
    reason_of,
)
from genjax.learning import distributed, memory
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.pace import Pace
from genjax.learning.prefetch import Ahead
from genjax.learning.sharding import batch_spec_of
from genjax.learning.signals import noted
from genjax.learning.transforms import compiled, feed, repeat_steps, scan_steps
from genjax.learning.window import Metrics, nonfinite_text
from genjax.protocol import Batch, Key, PyTree, Training, TrainState
from genjax.settings import Count, Whole, check_setting

logger = logging.getLogger(__name__)
DEVICE_LIMIT = 2 * 2**30  # bytes of training data that place="auto" still puts on the device
READERS = 3  # threads that read rows from the disk, each the batches of one dispatch
SENT = 2**26  # bytes of such rows that are sent in one dispatch


class Feed(NamedTuple):
    """How batches reach the step.

    Attributes:
        training: (number of steps) -> Training whose step takes (state, payload) and does that many
            optimiser steps.
        payload: (first step, number of steps) -> what that step's second argument is.
        prefetch: whether the payload is made on the host, so that the next one is worth making
            ahead.
        alike: (step) -> how many steps from that one on have batches of one shape; None if all
            have.
        ahead: how many payloads are made ahead, each by a thread of its own.
    """

    training: Callable[[int], Training]
    payload: Callable[[int, int], Any]
    prefetch: bool
    alike: Callable[[int], int] | None = None
    ahead: int = 1

    def steps_at(self, step: int, most: int) -> int:
        """How many steps the dispatch at a step does."""
        return most if self.alike is None else min(most, self.alike(step))


def device_feed(
    t: Training,
    source: Source,
    arrays: Batch,
    batch_size: int,
    seed: int,
    sharding: Sharding | None = None,
) -> Feed:
    """The whole split lives on the device (or as `sharding` says), and each step gathers its own
    batch from it.
    """
    resident = jax.tree.map(lambda leaf: _put(leaf, sharding), arrays)
    fed = feed(t, batch_at(source, batch_size, seed))
    return Feed(lambda k: repeat_steps(fed, k), lambda step, k: resident, prefetch=False)


def host_feed(
    t: Training,
    source: Source,
    arrays: Batch,
    batch_size: int,
    seed: int,
    sharding: Sharding | None = None,
    buckets: Buckets | None = None,
) -> Feed:
    """The split stays on the host, and batches are gathered there and sent: the same as
    `device_feed`'s, bit for bit; with `buckets`, each is of one bucket and of its length.

    With a sharding of [steps, batch_size], each process gathers and sends only the rows that its
    own devices hold.
    """

    in_buckets = None if buckets is None else BucketOrder(buckets, batch_size, seed)
    order_at = in_buckets or functools.partial(source.order, len(arrays.x), batch_size, seed)

    def payload(step: int, k: int) -> Any:
        order = np.stack([np.asarray(order_at(s)) for s in range(step, step + k)])
        own = arrays
        if in_buckets is not None:
            own = arrays._replace(x=arrays.x[:, : in_buckets.padded(step)])
        if sharding is not None:
            put = functools.partial(_put_rows, order=order, sharding=sharding)
            return jax.tree.map(put, own)
        return jax.tree.map(lambda leaf: leaf[order], own)

    fed = feed(t, prepare_at(source, seed))
    alike = None if in_buckets is None else in_buckets.alike
    ahead = READERS if isinstance(arrays.x, Rows) else 1
    if alike is None and isinstance(arrays.x, Rows):
        alike = functools.partial(_sent_at_once, arrays.x, batch_size)
    return Feed(lambda k: scan_steps(fed), payload, prefetch=True, alike=alike, ahead=ahead)


def _sent_at_once(x: Rows, batch_size: int, step: int) -> int:
    """How many steps of rows from the disk are sent in one dispatch."""
    return max(1, SENT // (batch_size * max(1, x.nbytes // len(x))))


def choose_feed(
    t: Training,
    source: Source,
    arrays: Batch,
    batch_size: int,
    seed: int,
    place: str = "auto",
    mesh: Mesh | None = None,
    buckets: Buckets | None = None,
) -> Feed:
    """`device_feed` for data up to 2 GiB, `host_feed` beyond and for several processes, or what
    `place` says.

    On a mesh, `device_feed` has the data on every device, and `host_feed` sends each device its
    rows. With `buckets`, from `buckets_for`, it is `host_feed`.

    Raises:
        DataError, ConfigError: for a batch size that the data do not allow; see `batch_indices`.

    Example:
        >>> import jax, numpy as np, optax
        >>> from genjax import choose_feed, fit, from_arrays, training, vae
        >>> source = from_arrays(np.random.default_rng(0).normal(size=(100, 3)))
        >>> t = training(vae(source.spec, hidden=(4,)), optax.adam(1e-3))
        >>> feed = choose_feed(t, source, source.load().train, batch_size=8, seed=0)
        >>> int(fit(feed, key=jax.random.key(0), steps=2, steps_per_call=2).step)
        2
    """
    source.order(len(arrays.x), batch_size, seed, 0)  # refuse it now, before a run folder is made
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    on_device = buckets is None and (
        place == "device"
        or (place == "auto" and size <= DEVICE_LIMIT and not distributed.several())
    )
    if on_device:
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        return device_feed(t, source, arrays, batch_size, seed, everywhere)
    rows = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, *batch_spec_of(mesh)))
    return host_feed(t, source, arrays, batch_size, seed, rows, buckets)


def _put(leaf: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """An array of the host on its devices; of several processes' devices, on this one's own."""
    leaf = np.asarray(leaf) if isinstance(leaf, Rows) else leaf
    if sharding is None:
        return jax.device_put(leaf)
    # device_put would have the processes compare what they have, all of it.
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def _put_rows(leaf: np.ndarray, order: np.ndarray, sharding: Sharding) -> jax.Array:
    """leaf[order] on devices, order being [steps, batch_size]; only the rows of this process' own
    devices are read.
    """

    def gather(index: Any) -> np.ndarray:
        return leaf[order[index[:2]]]

    return jax.make_array_from_callback((*order.shape, *leaf.shape[1:]), sharding, gather)


class Hook(NamedTuple):
    """Something to do every so many steps, such as an evaluation: call(step, state) -> metrics to
    log with that step.

    One that fails is said once, by its name, and training goes on without what it would have given.
    Only `NonFiniteError`, `Interrupted` and a `CheckpointError` of checkpoints stop it.

    Example:
        >>> from genjax import Hook
        >>> hook = Hook(100, lambda step, ts: {"players": len(ts.params)}, "the players")
        >>> hook.every
        100
    """

    every: int
    call: Callable[[int, TrainState], dict[str, Any] | None]
    name: str = "a hook"


class Progress(Protocol):
    """What `fit` tells after each dispatch: (step, steps, seconds in this process, steps done in
    it, newest metrics).
    """

    def __call__(
        self, step: int, steps: int, seconds: float, done: int, metrics: dict[str, Any]
    ) -> None: ...


def fit(
    feed: Feed,
    *,
    key: Key,
    steps: int,
    steps_per_call: int = 50,
    log_every: int = 100,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
    on_restore: Callable[[int], None] = lambda step: None,
    hooks: Sequence[Hook] = (),
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 500,
    stop_on_nonfinite: bool = True,
    progress: Progress | None = None,
    layout: Callable[[PyTree], PyTree] | None = None,
    enough: Callable[[int], bool] = lambda step: False,
    speed: Callable[[float], dict[str, float]] = lambda steps_per_second: {},
) -> TrainState:
    """Train to `steps` optimiser steps, going on from the newest checkpoint if there is one, and
    return the last state. A new run begins with `Training.prepare`, where there is one.

    Args:
        feed: from `choose_feed`, `device_feed` or `host_feed`.
        key: of the run; an array of keys [S] for an ensemble or a sweep.
        log: takes a line {"step": ..., name: mean over the window, or a list of them for members}.
        on_restore: called with the step that training goes on from (0 for a new run), before
            anything is logged.
        hooks: see `Hook`.
        checkpoints: where to save; None saves nothing.
        stop_on_nonfinite: stop at the first loss that is not finite; a sweep goes on, since its
            other members are well.
        layout: (the state's shapes) -> where each of its arrays is to be put that is restored; see
            `sharding.layout`.
        enough: whether training ends at this step, before `steps`; asked at every dispatch
            boundary, after the hooks, and of the step that it goes on from.
        speed: (steps a second of training alone) -> what a line says of it; see `pace`.

    Raises:
        ConfigError: for numbers of steps that cannot be meant, and for fewer steps than the newest
            checkpoint has.
        NonFiniteError: naming the step and the player; checkpoints from before it are kept.
        Interrupted: on SIGTERM or SIGINT, after the state was saved.
        CheckpointError: if a checkpoint cannot be written or read, or the log cannot be written; in
            that case the state was saved.
        MemoryExhausted: with the array that asked for it.

    Example:
        >>> import jax, numpy as np, optax
        >>> from genjax import choose_feed, fit, from_arrays, training, vae
        >>> source = from_arrays(np.random.default_rng(0).normal(size=(100, 3)))
        >>> t = training(vae(source.spec, hidden=(4,)), optax.adam(1e-3))
        >>> feed = choose_feed(t, source, source.load().train, 8, seed=0)
        >>> int(fit(feed, key=jax.random.key(0), steps=2, steps_per_call=2).step)
        2
    """
    check_setting("steps_per_call", steps_per_call, Count)  # none would never come to an end
    for name, value in (("steps", steps), ("log_every", log_every)):
        check_setting(name, value, Whole)
    check_setting("checkpoint_every", checkpoint_every, Whole)
    state, window = _begin(feed, key, checkpoints, layout)
    step = first = int(state.step)
    if checkpoints is not None and step > steps:
        raise ConfigError(
            f"Training to {steps} steps cannot go on from {checkpoints.folder}, which is at step "
            f"{step}. Ask for at least {step} steps, or give another folder for checkpoints."
        )
    on_restore(step)
    metrics = Metrics(window, checkpoints, stop_on_nonfinite)
    programs: dict[int, Callable[..., Any]] = {}
    met: set[tuple[Any, ...]] = set()  # shapes of dispatches that are compiled
    failed: set[str] = set()  # hooks of which it was said
    payload = None
    started, pace = time.perf_counter(), Pace()
    shown: dict[str, Any] = {}  # the newest value of each metric, for the progress bar

    def save() -> None:
        if checkpoints is None:
            return
        if stop_on_nonfinite and not bool(_all_finite(state)):
            raise NonFiniteError(nonfinite_text(step, "the parameters are not finite", checkpoints))
        checkpoints.save(state, {"window": metrics.window})

    def write(line: dict[str, Any]) -> None:
        try:
            log(line)
        except Exception:  # which costs the line and no checkpoint
            if not distributed.several():  # the others would not save with this one
                with suppress(GenjaxError):
                    save()
            raise

    asking = memory.explained(
        lambda: f"in training, at or before step {step}", lambda: (programs[k], (state, payload))
    )
    with asking, noted() as caught, Ahead(feed, steps_per_call, steps) as ahead:
        while step < steps and not enough(step):
            payload, k = ahead.take(step)
            if k not in programs:
                programs[k] = compiled(feed.training(k)).step
            shapes = (k, *(jnp.shape(leaf) for leaf in jax.tree.leaves(payload)))
            new_shapes = shapes not in met
            if new_shapes:
                metrics.collect()
                met.add(shapes)
                distributed.compile_together(programs[k], state, payload)
            ahead.begin(step + k)
            with pace.dispatch(k, new_shapes):
                state, new = programs[k](state, payload)
                if new_shapes:  # compiled just now, which is not its speed
                    jax.block_until_ready(new)
            metrics.add(step, new)
            before, step = step, step + k
            due = [hook for hook in hooks if _crossed(before, step, hook.every, steps)]
            log_now = _crossed(before, step, log_every, steps)
            if log_now or due:
                metrics.collect()
                line = {"step": step}
                if log_now:
                    line |= metrics.line() | pace.line(speed)
                with pace.paused():
                    for hook in due:
                        line |= _called(hook.name, hook.call, step, failed, step, state) or {}
                    for hook in hooks:  # which are all due at the end
                        if hook not in due and enough(step):
                            line |= _called(hook.name, hook.call, step, failed, step, state) or {}
                if len(line) > 1:
                    write(line)
                shown |= line
            if progress is not None:
                seconds, done = time.perf_counter() - started, step - first
                told = (step, steps, seconds, done, shown)
                _called("the progress bar", progress, step, failed, *told)
            stop = caught()
            if stop or enough(step) or _crossed(before, step, checkpoint_every, steps):
                metrics.collect()
                with pace.paused():
                    save()
            if stop and step < steps:
                raise Interrupted(_stopped_text(stop, step, steps, checkpoints), stop)
    return state


def _called(name: str, hook: Callable[..., Any], step: int, failed: set[str], *args: Any) -> Any:
    """What a hook gives; nothing, and a warning the first time, if it fails."""
    try:
        return hook(*args)
    except (NonFiniteError, Interrupted):
        raise
    except Exception as error:
        if isinstance(error, CheckpointError) and not isinstance(error, WriteError):
            raise
        if name not in failed:
            failed.add(name)
            what = "" if isinstance(error, GenjaxError) else f"{type(error).__name__}: "
            text = "At step %d %s failed (%s%s). Training goes on, and this is said once."
            logger.warning(text, step, name, what, reason_of(error))
        return None


def _begin(
    feed: Feed,
    key: Key,
    checkpoints: Checkpoints | None,
    layout: Callable[[PyTree], PyTree] | None,
) -> tuple[TrainState, dict[str, list[Any]]]:
    """The state to go on from, with the metrics of its unfinished window: the newest checkpoint's,
    or that of step 0, prepared from its batch where the model says how.
    """
    first = compiled(feed.training(1))
    like = jax.eval_shape(first.init, key)
    if layout is not None:
        like = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            like,
            layout(like),
        )
    restored = None if checkpoints is None else checkpoints.restore(like)
    if checkpoints is not None and restored is not None:
        checkpoints.set_aside_damaged(restored)
        window = restored.note.get("window", {})
        return restored.state, {name: list(values) for name, values in window.items()}
    with memory.explained(lambda: "before the first step", lambda: (first.init, (key,))):
        state = first.init(key)
        if first.prepare is not None:
            payload = feed.payload(0, 1)
            distributed.compile_together(first.prepare, state, payload)
            state = first.prepare(state, payload)
    return state, {}


def _crossed(before: int, step: int, every: int, last: int) -> bool:
    """Whether a multiple of `every` lies in (before, step], or the run ends here; 0 means only the
    end.
    """
    return step == last or (every > 0 and step // every > before // every)


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    leaves = [
        leaf
        for leaf in jax.tree.leaves((state.params, state.state))
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).all()


def _stopped_text(stop: int, step: int, steps: int, checkpoints: Checkpoints | None) -> str:
    name = signal.Signals(stop).name
    if checkpoints is None:
        return f"{name}: stopped at step {step} of {steps}."
    return f"{name}: saved at step {step} of {steps}; run the same command again to go on."
