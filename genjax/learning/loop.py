"""`fit`: the one stateful place. It moves data, watches the clock, writes what happened, saves, and
stops cleanly.

The loop dispatches `steps_per_call` optimiser steps at a time and reads their metrics one dispatch
late, so the device never waits for the host. Everything that it does on the way happens at the
first dispatch boundary at or after a multiple of its interval, so what a run computes is a function
of its settings alone, stopped and resumed or not.
"""

import concurrent.futures
import functools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from genjax.data import Source, batch_at, prepare_at
from genjax.data.buckets import BucketOrder, Buckets
from genjax.errors import (
    CheckpointError,
    GenjaxError,
    Interrupted,
    NonFiniteError,
    WriteError,
    reason_of,
)
from genjax.learning import distributed, memory
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.sharding import batch_spec_of
from genjax.learning.transforms import compiled, feed, repeat_steps, scan_steps
from genjax.protocol import Batch, Key, PyTree, Training, TrainState

logger = logging.getLogger(__name__)
DEVICE_LIMIT = 2 * 2**30  # bytes of training data that place="auto" still puts on the device


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
    """

    training: Callable[[int], Training]
    payload: Callable[[int, int], Any]
    prefetch: bool
    alike: Callable[[int], int] | None = None

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
    return Feed(lambda k: scan_steps(fed), payload, prefetch=True, alike=alike)


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

    Raises:
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
    state, window = _begin(feed, key, checkpoints, layout)
    step = first = int(state.step)
    on_restore(step)
    metrics = _Metrics(window, checkpoints, stop_on_nonfinite)
    programs: dict[int, Callable[..., Any]] = {}
    met: set[tuple[Any, ...]] = set()  # shapes of dispatches that are compiled
    failed: set[str] = set()  # hooks of which it was said
    payload = None
    started = time.perf_counter()
    shown: dict[str, Any] = {}  # the newest value of each metric, for the progress bar

    def save() -> None:
        if checkpoints is None:
            return
        if stop_on_nonfinite and not bool(_all_finite(state)):
            raise NonFiniteError(
                _nonfinite_text(step, "the parameters are not finite", checkpoints)
            )
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
    with asking, _signals() as caught, concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead: concurrent.futures.Future[Any] | None = None
        while step < steps and not enough(step):
            k = feed.steps_at(step, min(steps_per_call, steps - step))
            payload = ahead.result() if ahead is not None else feed.payload(step, k)
            if k not in programs:
                programs[k] = compiled(feed.training(k)).step
            shapes = (k, *(jnp.shape(leaf) for leaf in jax.tree.leaves(payload)))
            if shapes not in met:
                met.add(shapes)
                distributed.compile_together(programs[k], state, payload)
            after, ahead = min(steps_per_call, steps - step - k), None
            if feed.prefetch and after > 0:
                ahead = pool.submit(feed.payload, step + k, feed.steps_at(step + k, after))
            state, new = programs[k](state, payload)
            metrics.add(step, new)
            before, step = step, step + k
            due = [hook for hook in hooks if _crossed(before, step, hook.every, steps)]
            log_now = _crossed(before, step, log_every, steps)
            if log_now or due:
                metrics.collect()
                line = {"step": step, **(metrics.line() if log_now else {})}
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


class _Metrics:
    """The metrics since the last line, read one dispatch late so that the device never waits."""

    def __init__(
        self, window: dict[str, list[Any]], checkpoints: Checkpoints | None, check: bool
    ) -> None:
        self.window = window
        self._checkpoints, self._check = checkpoints, check
        self._pending: tuple[int, Any] | None = None

    def add(self, begin: int, metrics: Any) -> None:
        """Keep the metrics of a dispatch, which begins at a step, and read those of the one before,
        which has had time to finish.
        """
        self.collect()
        self._pending = (begin, metrics)

    def collect(self) -> None:
        """Read what was not read yet.

        Raises:
            NonFiniteError: for a loss that is not finite, if this is to be checked.
        """
        if self._pending is None:
            return
        (begin, metrics), self._pending = self._pending, None
        # On a CPU `jax.device_get` costs the host seven times as much.
        values = {name: memory.fetched(value) for name, value in metrics.items()}
        if self._check:
            _check_finite(begin, values, self._checkpoints)
        for name, value in values.items():
            self.window.setdefault(name, []).extend(np.asarray(value, np.float64).tolist())

    def line(self) -> dict[str, Any]:
        """What the window comes to, as far as it was read; a new one begins."""
        found = {name: _window_value(name, values) for name, values in self.window.items()}
        self.window.clear()
        return found


def _crossed(before: int, step: int, every: int, last: int) -> bool:
    """Whether a multiple of `every` lies in (before, step], or the run ends here; 0 means only the
    end.
    """
    return step == last or (every > 0 and step // every > before // every)


def _window_value(name: str, values: list[Any]) -> Any:
    # Counts add up; everything else is averaged.
    total = np.asarray(values, np.float64)
    return (total.sum(axis=0) if name == "skipped" else total.mean(axis=0)).tolist()


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    leaves = [
        leaf
        for leaf in jax.tree.leaves((state.params, state.state))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).all()


def _check_finite(
    begin: int, values: dict[str, np.ndarray], checkpoints: Checkpoints | None
) -> None:
    for name in sorted(values):
        if not name.endswith("/loss"):
            continue
        bad = np.argwhere(~np.isfinite(values[name]))
        if len(bad):
            place = f"player {name.rsplit('/', 1)[0]!r}"
            if values[name].ndim > 1:
                place += f", member {bad[0][1]}"
            what = f"the loss of {place} is {float(values[name][tuple(bad[0])])}"
            raise NonFiniteError(_nonfinite_text(begin + int(bad[0][0]), what, checkpoints))


def _stopped_text(stop: int, step: int, steps: int, checkpoints: Checkpoints | None) -> str:
    name = signal.Signals(stop).name
    if checkpoints is None:
        return f"{name}: stopped at step {step} of {steps}."
    return f"{name}: saved at step {step} of {steps}; run the same command again to go on."


def _nonfinite_text(step: int, what: str, checkpoints: Checkpoints | None) -> str:
    have = checkpoints.steps() if checkpoints is not None else []
    kept = f" The last good checkpoint is that of step {have[-1]}." if have else ""
    return (
        f"At step {step} {what}, and training stopped.{kept} Try a smaller --learning-rate or "
        "--clip-norm 1, or leave such steps out and count them with --skip-nonfinite."
    )


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """Note SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once. Main
    thread only.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    if distributed.several():
        with distributed.stopping() as caught:
            yield caught
        return

    def handler(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, old in before.items():
            signal.signal(number, old)
