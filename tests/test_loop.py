"""`fit` with a toy model whose every number is known: feeds, intervals, resume, signals, losses
that are not finite.
"""

import os
import signal
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.checks import checked
from genjax.data import Source, Splits, batch_indices, cast
from genjax.errors import ConfigError, DataError, Interrupted, NonFiniteError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import DEVICE_LIMIT, Feed, Hook, choose_feed, device_feed, fit, host_feed
from genjax.learning.members import ensemble
from genjax.learning.optim import track_ema
from genjax.learning.step import training
from genjax.learning.transforms import skip_nonfinite
from genjax.learning.window import Metrics
from genjax.protocol import Aux, Batch, DataSpec, Model, Training, TrainState

SPEC = DataSpec((2,), "continuous", name="toy")
N, BATCH, SEED = 40, 8, 3
FLAG = 1000.0  # a first coordinate above this makes a gradient NaN though the loss is finite


def toy() -> Model:
    """Two players that each fit one coordinate with noise; "a" counts its steps, and "count" is a
    metric known exactly.
    """

    def init(key):
        a, b = jax.random.split(key)
        params = {"a": {"w": jax.random.normal(a, (3,))}, "b": {"w": jax.random.normal(b, (3,))}}
        return params, {"a": {"count": jnp.zeros((), jnp.int32)}, "b": {}}

    def loss_of(player: str, column: int):
        def loss(params, state, batch: Batch, key, step):
            x, w = batch.x[:, column], params[player]["w"]
            noise = jax.random.normal(key, x.shape)
            value = jnp.square(x + 0.1 * noise - jnp.mean(w))
            # √ of 0 is finite and has an infinite slope, times 0 is NaN: only where an example is
            # flagged.
            flagged = (batch.x[:, 0] > FLAG).astype(jnp.float32)
            value = jnp.where(flagged > 0, 0.0, value)
            value = value + jnp.sqrt(jnp.square(w[0] - jax.lax.stop_gradient(w[0])) + 1 - flagged)
            count = jnp.full(x.shape, state["a"]["count"], jnp.float32)
            if player == "a":
                state = {**state, "a": {"count": state["a"]["count"] + 1}}
            return value, Aux(state, {"count": count})

        return loss

    def sample(params, state, key, n, cond=None):
        return jnp.zeros((n, 2))

    return checked(Model(SPEC, init, {"a": loss_of("a", 0), "b": loss_of("b", 1)}, sample))


def toy_training() -> Training:
    return training(
        toy(), {"a": optax.chain(optax.adam(0.05), track_ema(0.9)), "b": optax.sgd(0.01)}
    )


def data(spoiled: tuple[int, int, float] | None = None) -> tuple[Source, Batch]:
    """Normal points; `spoiled` is (row, column, value) of one that is not."""
    x = np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)
    if spoiled:
        x[spoiled[:2]] = spoiled[2]
    arrays = Batch(x)
    return Source(SPEC, lambda: Splits(arrays, arrays, arrays), cast(SPEC)), arrays


@cache
def toy_feed(
    make: Callable[..., Feed] = device_feed,
    wrap: Callable[[Training], Training] = lambda t: t,
    spoiled=None,
) -> Feed:
    """A feed whose trainings are made once, so that each is compiled once for the whole file."""
    feed = make(wrap(toy_training()), *data(spoiled), BATCH, SEED)
    return feed._replace(training=cache(feed.training))


def visit(row: int, after: int = 0) -> int:
    """The first step from `after` on whose batch holds a row."""
    return next(step for step in range(after, 100) if row in batch_indices(N, BATCH, SEED, step))


def run(
    feed: Feed, steps: int = 23, per_call: int = 5, key=None, **kwargs: Any
) -> tuple[TrainState, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    kwargs = {"log_every": 5, "log": lines.append, **kwargs}
    state = fit(
        feed,
        key=jax.random.key(0) if key is None else key,
        steps=steps,
        steps_per_call=per_call,
        **kwargs,
    )
    return state, lines


def bits(state: TrainState) -> list[bytes]:
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def at(step: int, do: Callable[[], Any]) -> Hook:
    """Do something once, at a dispatch boundary."""

    def call(now: int, state: TrainState) -> None:
        if now == step:
            do()

    return Hook(1, call)


@pytest.mark.slow
def test_host_and_device_feeds_are_equal_bit_for_bit_also_with_a_last_short_dispatch() -> None:
    on_device, lines = run(toy_feed(device_feed))
    on_host, host_lines = run(toy_feed(host_feed))
    assert bits(on_device) == bits(on_host)
    assert lines == host_lines
    assert int(on_device.step) == 23
    assert int(on_device.state["a"]["count"]) == 23


def test_auto_puts_small_data_on_the_device_and_large_data_on_the_host() -> None:
    source, arrays = data()
    choose = partial(choose_feed, toy_training(), source, batch_size=BATCH, seed=SEED)
    assert not choose(arrays).prefetch
    assert choose(arrays, place="host").prefetch
    huge = Batch(
        np.broadcast_to(np.zeros(2, np.float32), (DEVICE_LIMIT // 8 + 1, 2))
    )  # strides of 0: no memory
    assert huge.x.nbytes > DEVICE_LIMIT
    assert choose(huge).prefetch


def test_a_batch_larger_than_the_data_is_refused_before_anything_happens() -> None:
    source, arrays = data()
    with pytest.raises(DataError, match="batch_size=41 is more than the 40 examples there are"):
        choose_feed(toy_training(), source, arrays, 41, SEED)


@pytest.mark.slow
def test_lines_and_hooks_come_at_the_first_boundary_at_or_after_a_multiple_of_their_interval() -> (
    None
):
    seen: dict[int, list[int]] = {10: [], 20: [], 0: []}

    def hook(every: int) -> Hook:
        def call(step: int, state: TrainState) -> dict[str, Any]:
            assert int(state.step) == step
            seen[every].append(step)
            return {f"every/{every}": 1.0}

        return Hook(every, call)

    _, lines = run(toy_feed(), log_every=7, hooks=[hook(every) for every in seen])
    assert seen == {10: [10, 20, 23], 20: [20, 23], 0: [23]}
    assert [line["step"] for line in lines] == [10, 15, 20, 23]
    assert lines[2] == {"step": 20, "every/10": 1.0, "every/20": 1.0}
    # "count" of step s is s, and a line is the mean over the steps since the line before.
    means = [np.mean(range(start, end)) for start, end in ((0, 10), (10, 15), (15, 23))]
    assert [line["a/count"] for line in lines if "a/count" in line] == means
    assert set(lines[1]) == {"step", "a/loss", "a/count", "b/loss", "b/count"}


@pytest.mark.slow
def test_progress_is_told_after_every_dispatch() -> None:
    told: list[tuple[int, int, int, dict[str, Any]]] = []

    def progress(step: int, steps: int, seconds: float, done: int, metrics: dict[str, Any]) -> None:
        assert seconds >= 0
        told.append((step, steps, done, dict(metrics)))

    _, lines = run(toy_feed(), log_every=10, progress=progress)
    assert [entry[:3] for entry in told] == [(step, 23, step) for step in (5, 10, 15, 20, 23)]
    assert told[0][3] == {}
    assert told[2][3] == told[1][3] == lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("make", [device_feed, host_feed])
def test_a_signal_saves_and_going_on_is_bitwise_equal_to_never_having_stopped(
    tmp_path: Path, number: int, make
) -> None:
    """Stopped in the middle of a log window, so that what the window held so far has to come back
    too.
    """
    settings = {"steps": 43, "log_every": 20, "checkpoint_every": 30}
    expected, expected_lines = run(toy_feed(make), **settings)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    began: list[int] = []
    lines: list[dict[str, Any]] = []
    common = {
        **settings,
        "log": lines.append,
        "on_restore": began.append,
        "checkpoints": Checkpoints(tmp_path),
    }
    with pytest.raises(Interrupted) as stopped:
        run(toy_feed(make), **common, hooks=[at(35, lambda: os.kill(os.getpid(), number))])
    assert stopped.value.signal == number
    name = signal.Signals(number).name
    assert (
        str(stopped.value)
        == f"{name}: saved at step 35 of 43; run the same command again to go on."
    )
    assert Checkpoints(tmp_path).steps() == [30, 35]
    assert {s: signal.getsignal(s) for s in handlers} == handlers

    state, _ = run(toy_feed(make), **common)
    assert began == [0, 35]
    assert bits(state) == bits(expected)
    assert lines == expected_lines
    again, more = run(toy_feed(make), **{**common, "log": lines.append})
    assert (began[-1], more, lines) == (43, [], expected_lines)
    assert bits(again) == bits(expected)


@pytest.mark.slow
def test_going_on_from_every_checkpoint_gives_the_same_run(tmp_path: Path) -> None:
    """As after a crash at any moment: whatever was done after the checkpoint is done again, to the
    same bits.
    """
    settings = {"steps": 23, "log_every": 10, "checkpoint_every": 5}
    expected, expected_lines = run(
        toy_feed(), checkpoints=Checkpoints(tmp_path / "all", keep=10), **settings
    )
    for step in Checkpoints(tmp_path / "all").steps():
        folder = tmp_path / f"from_{step}"
        folder.mkdir()
        (tmp_path / "all" / str(step)).rename(folder / str(step))
        state, lines = run(toy_feed(), checkpoints=Checkpoints(folder), **settings)
        assert bits(state) == bits(expected)
        assert lines == [line for line in expected_lines if line["step"] > step]


def test_a_run_does_not_go_on_to_fewer_steps_than_it_has(tmp_path: Path) -> None:
    feed = toy_feed()
    run(feed, 10, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(ConfigError, match=r"to 9 steps .* at step 10.* at least 10 steps"):
        run(feed, 9, checkpoints=Checkpoints(tmp_path))
    state, _ = run(feed, 10, checkpoints=Checkpoints(tmp_path))
    assert int(state.step) == 10


@pytest.mark.slow
def test_an_ensemble_goes_on_bitwise_too(tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    feed = partial(toy_feed, wrap=ensemble)
    expected, expected_lines = run(feed(), key=keys)
    assert np.shape(expected_lines[0]["a/loss"]) == (3,)
    lines: list[dict[str, Any]] = []
    common = {"key": keys, "log": lines.append, "checkpoints": Checkpoints(tmp_path)}
    with pytest.raises(Interrupted):
        run(feed(), **common, hooks=[at(15, lambda: signal.raise_signal(signal.SIGTERM))])
    state, _ = run(feed(), **common)
    assert bits(state) == bits(expected)
    assert lines == expected_lines


@pytest.mark.slow
def test_a_second_sigint_interrupts_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(
            toy_feed(), checkpoints=Checkpoints(tmp_path), checkpoint_every=5, hooks=[at(10, twice)]
        )
    assert Checkpoints(tmp_path).steps() == [5]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_signal_without_checkpoints_or_at_the_very_end() -> None:
    with pytest.raises(Interrupted, match=r"^SIGTERM: stopped at step 10 of 23\.$"):
        run(toy_feed(), hooks=[at(10, lambda: signal.raise_signal(signal.SIGTERM))])
    expected, _ = run(toy_feed())
    state, _ = run(toy_feed(), hooks=[at(23, lambda: signal.raise_signal(signal.SIGTERM))])
    assert bits(state) == bits(expected), "a run that is done has nothing to go on with"


def test_fit_works_outside_the_main_thread_where_signals_cannot_be_caught() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run(toy_feed())[0]))
    thread.start()
    thread.join()
    assert bits(found[0]) == bits(run(toy_feed())[0])


@pytest.mark.slow
@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_its_step_and_player(
    tmp_path: Path, column: int, value: float
) -> None:
    row = next(
        row for row in range(N) if visit(row) in (3, 4)
    )  # in the middle of a dispatch, and of the first epoch
    # The flag must stay off, so an infinite first coordinate is a negative one.
    feed = toy_feed(spoiled=(row, column, -value))
    with pytest.raises(NonFiniteError) as stopped:
        run(feed, per_call=3, checkpoints=Checkpoints(tmp_path), checkpoint_every=1)
    player, shown = "ab"[column], "nan" if np.isnan(value) else "inf"
    text = f"At step {visit(row)} the loss of player {player!r} is {shown}, and training stopped. "
    assert str(stopped.value).startswith(text + "The last good checkpoint is that of step 3.")
    assert "--skip-nonfinite" in str(stopped.value)
    assert Checkpoints(tmp_path).steps() == [3]


def test_without_a_checkpoint_none_is_promised() -> None:
    with pytest.raises(NonFiniteError) as stopped:
        run(toy_feed(spoiled=(0, 1, float("nan"))))
    assert f"At step {visit(0)} " in str(stopped.value)
    assert "checkpoint" not in str(stopped.value)


@pytest.mark.slow
def test_the_member_of_an_ensemble_is_named() -> None:
    def one_bad(t: Training) -> Training:
        def init(key):  # the member with seed 1 starts at NaN
            state = t.init(key)
            bad = jnp.where(jax.random.key_data(key)[1] == 1, jnp.nan, 0.0)
            return state._replace(params={**state.params, "b": {"w": state.params["b"]["w"] + bad}})

        return ensemble(t._replace(init=init))

    keys = jax.vmap(jax.random.key)(np.arange(3, dtype=np.uint32))
    with pytest.raises(NonFiniteError, match="At step 0 the loss of player 'b', member 1 is nan"):
        run(toy_feed(wrap=one_bad), key=keys)
    _, lines = run(toy_feed(wrap=one_bad), key=keys, stop_on_nonfinite=False)
    assert [np.isfinite(line["b/loss"]).tolist() for line in lines] == [[True, False, True]] * len(
        lines
    )


@pytest.mark.slow
def test_skipped_steps_are_counted_and_leave_the_rest_finite() -> None:
    """The bad row comes once an epoch; its steps change nothing but the step, and the others go
    on.
    """
    row = 7
    bad = [step for step in range(23) if row in batch_indices(N, BATCH, SEED, step)]
    assert len(bad) >= 4
    state, lines = run(
        toy_feed(wrap=skip_nonfinite, spoiled=(row, 1, float("nan"))), stop_on_nonfinite=False
    )
    ends = [line["step"] for line in lines]
    counts = [
        sum(start <= step < end for step in bad)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    assert [line["skipped"] for line in lines] == counts
    assert int(state.step) == 23
    assert int(state.state["a"]["count"]) == 23 - len(bad)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.opt)))


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_never_saved_even_if_the_loss_is(tmp_path: Path) -> None:
    """The gradient of a flagged example is NaN and its loss is not: the loss would only tell one
    step later.
    """
    step = visit(7)
    assert step > 0
    feed = toy_feed(spoiled=(7, 0, 2 * FLAG))
    with pytest.raises(
        NonFiniteError, match=f"At step {step + 1} the parameters are not finite"
    ) as stopped:
        run(feed, per_call=1, checkpoints=Checkpoints(tmp_path), checkpoint_every=1)
    assert f"The last good checkpoint is that of step {step}." in str(stopped.value)
    assert Checkpoints(tmp_path).steps()[-1] == step


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_dispatches(tmp_path: Path) -> None:
    compiled: list[str] = []
    counts: list[int] = []

    def listen(event: str, seconds: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        hook = Hook(1, lambda step, state: counts.append(len(compiled)))
        fresh = device_feed(toy_training(), *data(), BATCH, SEED)
        run(fresh, steps=40, hooks=[hook], checkpoints=Checkpoints(tmp_path), checkpoint_every=5)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(counts) == 8
    assert counts[0] > 0, "the listener hears nothing"
    assert (
        counts[1:] == [counts[1]] * 7
    )  # the first save, between the first two, compiles its check for finite values


def test_a_damaged_newest_checkpoint_is_trained_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"steps": 23, "checkpoint_every": 5, "checkpoints": Checkpoints(tmp_path)}
    expected, expected_lines = run(toy_feed(), **settings)
    biggest = max(
        (path for path in (tmp_path / "23").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    biggest.write_bytes(biggest.read_bytes()[:-7])
    began: list[int] = []
    state, lines = run(toy_feed(), on_restore=began.append, **settings)
    assert began == [20]
    assert "damaged checkpoint was passed over" in caplog.text
    assert bits(state) == bits(expected)
    assert lines == [line for line in expected_lines if line["step"] > 20]
    assert Checkpoints(tmp_path).steps() == [15, 20, 23]


def test_what_was_skipped_is_no_part_of_a_mean() -> None:
    metrics = Metrics({}, None, check=False)
    loss = np.array([[4.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    skipped = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    metrics.add(0, {"a/loss": loss, "skipped": skipped})
    metrics.collect()
    line = metrics.line()
    np.testing.assert_array_equal(line["a/loss"], [3.0, np.nan])
    assert line["skipped"] == [1.0, 3.0]
