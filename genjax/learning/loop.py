"""`fit`: the one stateful place. It moves data, watches the clock, writes what happened, saves, and
stops cleanly.

The loop dispatches `steps_per_call` optimiser steps at a time and reads their metrics one dispatch
late, so the device never waits for the host. Everything that it does on the way happens at the
first dispatch boundary at or after a multiple of its interval, so what a run computes is a function
of its settings alone, stopped and resumed or not.
"""

import concurrent.futures
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from genjax.data import Source, batch_at, host_batch, prepare_at
from genjax.errors import Interrupted, NonFiniteError
from genjax.learning import distributed
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.sharding import batch_spec_of
from genjax.learning.transforms import compiled, feed, repeat_steps, scan_steps
from genjax.protocol import Batch, Key, PyTree, Training, TrainState

DEVICE_LIMIT = 2 * 2**30  # bytes of training data that place="auto" still puts on the device


class Feed(NamedTuple):
    """How batches reach the step.

    Attributes:
        training: (number of steps) -> Training whose step takes (state, payload) and does that many
            optimiser steps.
        payload: (first step, number of steps) -> what that step's second argument is.
        prefetch: whether the payload is made on the host, so that the next one is worth making
            ahead.
    """

    training: Callable[[int], Training]
    payload: Callable[[int, int], Any]
    prefetch: bool


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
) -> Feed:
    """The split stays on the host, and batches are gathered there and sent: the same as
    `device_feed`'s, bit for bit.

    With a sharding of [steps, batch_size], each process gathers and sends only the rows that its
    own devices hold.
    """

    def payload(step: int, k: int) -> Any:
        if sharding is not None:
            order = np.stack(
                [
                    np.asarray(source.order(len(arrays.x), batch_size, seed, s))
                    for s in range(step, step + k)
                ]
            )
            return jax.tree.map(
                functools.partial(_put_rows, order=order, sharding=sharding), arrays
            )
        batches = [host_batch(source, arrays, batch_size, seed, s) for s in range(step, step + k)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    fed = feed(t, prepare_at(source, seed))
    return Feed(lambda k: scan_steps(fed), payload, prefetch=True)


def choose_feed(
    t: Training,
    source: Source,
    arrays: Batch,
    batch_size: int,
    seed: int,
    place: str = "auto",
    mesh: Mesh | None = None,
) -> Feed:
    """`device_feed` for data up to 2 GiB, `host_feed` beyond and for several processes, or what
    `place` says.

    On a mesh, `device_feed` has the data on every device, and `host_feed` sends each device its
    rows.

    Raises:
        DataError, ConfigError: for a batch size that the data do not allow; see `batch_indices`.
    """
    source.order(len(arrays.x), batch_size, seed, 0)  # refuse it now, before a run folder is made
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    on_device = place == "device" or (
        place == "auto" and size <= DEVICE_LIMIT and not distributed.several()
    )
    if on_device:
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        return device_feed(t, source, arrays, batch_size, seed, everywhere)
    rows = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, *batch_spec_of(mesh)))
    return host_feed(t, source, arrays, batch_size, seed, rows)


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
    """

    every: int
    call: Callable[[int, TrainState], dict[str, Any] | None]


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
) -> TrainState:
    """Train to `steps` optimiser steps, going on from the newest checkpoint if there is one, and
    return the last state.

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

    Raises:
        NonFiniteError: naming the step and the player; checkpoints from before it are kept.
        Interrupted: on SIGTERM or SIGINT, after the state was saved.
        CheckpointError: if a checkpoint cannot be written or read.
    """
    init = compiled(feed.training(1)).init
    window: dict[str, list[Any]] = {}
    like = jax.eval_shape(init, key)
    if layout is not None:
        like = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            like,
            layout(like),
        )
    restored = None if checkpoints is None else checkpoints.restore(like)
    if checkpoints is not None and restored is not None:
        checkpoints.set_aside_damaged(restored)
        window |= {name: list(values) for name, values in restored.note.get("window", {}).items()}
    state = init(key) if restored is None else restored.state
    step = first = int(state.step)
    on_restore(step)
    programs: dict[int, Callable[..., Any]] = {}
    pending: tuple[int, Any] | None = None
    started = time.perf_counter()
    shown: dict[str, Any] = {}  # the newest value of each metric, for the progress bar

    def collect() -> None:
        """Read the metrics of the dispatch before the last, which has had time to finish."""
        nonlocal pending
        if pending is None:
            return
        (begin, metrics), pending = pending, None
        # On a CPU `jax.device_get` costs the host seven times as much.
        values = {name: np.asarray(value) for name, value in metrics.items()}
        if stop_on_nonfinite:
            _check_finite(begin, values, checkpoints)
        for name, value in values.items():
            window.setdefault(name, []).extend(np.asarray(value, np.float64).tolist())

    def save() -> None:
        if checkpoints is None:
            return
        if stop_on_nonfinite and not bool(_all_finite(state)):
            raise NonFiniteError(
                _nonfinite_text(step, "the parameters are not finite", checkpoints)
            )
        checkpoints.save(state, {"window": window})

    with _signals() as caught, concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead: concurrent.futures.Future[Any] | None = None
        while step < steps:
            k = min(steps_per_call, steps - step)
            payload = ahead.result() if ahead is not None else feed.payload(step, k)
            if k not in programs:
                programs[k] = compiled(feed.training(k)).step
                distributed.compile_together(programs[k], state, payload)
            after = min(steps_per_call, steps - step - k)
            ahead = (
                pool.submit(feed.payload, step + k, after) if feed.prefetch and after > 0 else None
            )
            state, metrics = programs[k](state, payload)
            collect()
            pending = (step, metrics)
            before, step = step, step + k
            due = [hook for hook in hooks if _crossed(before, step, hook.every, steps)]
            log_now = _crossed(before, step, log_every, steps)
            if log_now or due:
                collect()
                line: dict[str, Any] = {"step": step}
                if log_now:
                    line |= {name: _window_value(name, values) for name, values in window.items()}
                    window.clear()
                for hook in due:
                    line |= hook.call(step, state) or {}
                if len(line) > 1:
                    log(line)
                shown |= line
            if progress is not None:
                progress(step, steps, time.perf_counter() - started, step - first, shown)
            stop = caught()
            if stop or _crossed(before, step, checkpoint_every, steps):
                collect()
                save()
            if stop and step < steps:
                where = f"saved at step {step} of {steps}; run the same command again to go on"
                raise Interrupted(
                    f"{signal.Signals(stop).name}: "
                    f"{where if checkpoints else f'stopped at step {step} of {steps}'}.",
                    stop,
                )
    return state


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
            place = f"player {name.rsplit('/', 1)[0]!r}" + (
                f", member {bad[0][1]}" if values[name].ndim > 1 else ""
            )
            value = float(values[name][tuple(bad[0])])
            raise NonFiniteError(
                _nonfinite_text(
                    begin + int(bad[0][0]), f"the loss of {place} is {value}", checkpoints
                )
            )


def _nonfinite_text(step: int, what: str, checkpoints: Checkpoints | None) -> str:
    have = checkpoints.steps() if checkpoints is not None else []
    kept = f" The last good checkpoint is that of step {have[-1]}." if have else ""
    return (
        f"At step {step} {what}, and training stopped.{kept} Try a smaller --learning-rate or "
        "--clip-norm 1, "
        "or leave such steps out and count them with --skip-nonfinite."
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
