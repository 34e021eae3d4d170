"""Steps a second on sequences of unequal length, in buckets and padded to the longest, in turns."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.common import in_turns, quartiles, ratio, summary, write
from genjax.data import Source, Splits
from genjax.data.buckets import Buckets, buckets_for
from genjax.data.music import KEYS
from genjax.data.source import cast
from genjax.learning.loop import choose_feed
from genjax.learning.transforms import compiled
from genjax.protocol import Batch, DataSpec
from genjax.zoo import ZOO

PIECES, MEAN, LONGEST = 694, 254, 1793  # those of Nottingham's training split


def nottingham_like(seed: int = 0) -> Source:
    """Random rolls as many and as long as Nottingham's pieces: log-normal lengths of its mean, the
    longest of them its longest.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(0, 0.5, PIECES)
    lengths = np.clip(lengths * MEAN / lengths.mean(), 20, LONGEST).round().astype(np.int32)
    lengths[lengths.argmax()] = LONGEST
    x = np.zeros((PIECES, LONGEST, KEYS), np.uint8)
    for row, length in zip(x, lengths, strict=True):
        row[:length] = rng.random((length, KEYS), np.float32) < 0.04
    spec = DataSpec((LONGEST, KEYS), "binary", step="frame", lengths=True, name="like Nottingham")
    length: Any = lengths
    one = Batch(x, length=length)
    return Source(spec, lambda: Splits(one, one, one), cast(spec))


class _Run:
    """Training as `fit` does it, without what it writes: so many steps at a call."""

    def __init__(self, source: Source, buckets: Buckets | None) -> None:
        recipe, arrays = ZOO["lstm-jsb"], source.load().train
        t, schedule = recipe.training(source.spec), recipe.schedule
        self.batch_size = schedule.batch_size
        self.feed = choose_feed(t, source, arrays, self.batch_size, 0, buckets=buckets)
        self.programs: dict[int, Callable[..., Any]] = {}
        self.state = compiled(t).init(jax.random.key(0))
        self.step = 0

    def dispatch(self, most: int) -> int:
        k = self.feed.steps_at(self.step, most)
        if k not in self.programs:
            self.programs[k] = compiled(self.feed.training(k)).step
        payload = self.feed.payload(self.step, k)
        self.state, _ = self.programs[k](self.state, payload)
        self.step += k
        return k

    def seconds_a_step(self, least: int) -> float:
        """Of at least so many steps, in whole dispatches."""
        began, first = time.perf_counter(), self.step
        while self.step - first < least:
            self.dispatch(least if self.feed.alike is None else 50)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - began) / (self.step - first)


def main(seconds: float = 240.0) -> None:
    """Measure and write results/buckets.json."""
    source, row = nottingham_like(), ZOO["lstm-jsb"]
    arrays = source.load().train
    model = row.build(source.spec)
    buckets = buckets_for(model, source, arrays, row.schedule.batch_size)
    assert buckets is not None
    print(buckets.note, flush=True)
    runs = {"buckets": _Run(source, buckets), "longest": _Run(source, None)}
    epoch = round(len(arrays.x) / row.schedule.batch_size)
    began = time.perf_counter()
    runs["buckets"].seconds_a_step(2 * epoch)  # compiles for every bucket
    compiling = time.perf_counter() - began
    # An epoch, so that every bucket has its share; and about as many seconds of the other.
    counts = {"buckets": epoch, "longest": max(2, epoch // 8)}
    runs["longest"].seconds_a_step(counts["longest"])
    found = in_turns({name: run.seconds_a_step for name, run in runs.items()}, counts, seconds)
    frames = float(np.mean(np.asarray(arrays.length))) * row.schedule.batch_size
    times = ratio(found["longest"], found["buckets"])
    results: dict[str, Any] = {
        "padded": buckets.padded,
        "fewer_frames": buckets.gain,
        "times_the_steps": times,
        "seconds_of_first_epochs": compiling,
    }
    for name, values in found.items():
        speed = summary([1 / value for value in values])
        results[name] = {"steps_per_second": speed, "steps_a_round": counts[name]}
        real = speed["median"] * frames
        print(f"{name}: {quartiles(speed, '.2f')} steps/s, {real:,.0f} frames/s", flush=True)
    print(
        f"ratio of steps/s: {quartiles(times, '.2f')}, round by round, in {times['rounds']} turns "
        f"of {counts['buckets']} steps in buckets and {counts['longest']} padded to {LONGEST}; "
        f"lstm-jsb, batch {row.schedule.batch_size}; frames are those that count",
        flush=True,
    )
    write("buckets", results)
