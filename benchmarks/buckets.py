"""Length buckets beside padding to the longest: `lstm-jsb`'s model on synthetic rolls as long as
Nottingham's pieces (694, mean 254 frames, longest 1,793), trained in turns.

Both train on whole epochs' worth of examples: a round of buckets is as many turns as it takes for
each bucket to have its share.
"""

import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.common import write
from genjax.data import Source, Splits, cast
from genjax.data.buckets import Buckets, make_buckets
from genjax.learning.bucket_feed import bucket_feed
from genjax.learning.loop import Feed, device_feed
from genjax.learning.transforms import compiled
from genjax.protocol import Batch, DataSpec
from genjax.zoo import ZOO

PIECES, MEAN, LONGEST, NOTES = 694, 254, 1793, 88
STEPS = {"longest": 4, "buckets": 44}  # of a turn: 44 x 16 examples are one epoch of the pieces
ROUNDS = 2


def pieces() -> Batch:
    """Rolls with 4 of 88 notes on, and lengths of a log-normal distribution, cut at the longest."""
    draw = np.random.default_rng(0)
    length = np.clip(np.exp(draw.normal(np.log(210), 0.6, PIECES)), 20, LONGEST)
    length = np.clip(np.round(length * MEAN / length.mean()), 1, LONGEST).astype(np.int32)
    length[np.argmax(length)] = LONGEST
    x = (draw.random((PIECES, LONGEST, NOTES), np.float32) < 4 / NOTES).astype(np.uint8)
    x[np.arange(LONGEST)[None] >= length[:, None]] = 0
    return Batch(x, length=length)


def _timer(feed: Feed, keys: jax.Array, group: int, warm: int) -> Callable[[int], float]:
    """(steps) -> their seconds, going on from where the last ones ended; all is compiled before."""
    program = compiled(feed.training(group))
    state, at = program.init(keys), 0

    def run(steps: int) -> float:
        nonlocal state, at
        began = time.perf_counter()
        for _ in range(steps // group):
            state, _ = program.step(state, feed.payload(at, group))
            at += group
        jax.block_until_ready(state)
        return time.perf_counter() - began

    run(warm)
    return run


def _warm(buckets: Buckets) -> int:
    """Steps until each bucket has been met, whose program is compiled then."""
    met: set[int] = set()
    step = 0
    while len(met) < len(buckets.bounds):
        met.add(buckets.batch(0, step)[0])
        step += buckets.group
    return step


def main(n: int = 8) -> None:
    """Measure and write results/buckets.json."""
    rows, recipe = pieces(), ZOO["lstm-jsb"]
    length = np.asarray(rows.length)
    spec = DataSpec((LONGEST, NOTES), "binary", step="frame", lengths=True, name="nottingham-like")
    source = Source(spec, lambda: Splits(rows, rows, rows), cast(spec))
    size, key = recipe.schedule.batch_size, jax.random.key(0)
    buckets = make_buckets(length, LONGEST, n, size)
    t = recipe.training(spec)
    ways = {
        "longest": _timer(device_feed(t, source, rows, size, 0), key, 1, 1),
        "buckets": _timer(bucket_feed(t, source, rows, buckets, 0), key, 1, _warm(buckets)),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, run in ways.items():
            found[way].append(STEPS[way] / run(STEPS[way]))
    rates = {way: float(np.median(values)) for way, values in found.items()}
    ratio = rates["buckets"] / rates["longest"]
    mean = float(length.mean())
    for way, rate in rates.items():
        print(f"{way}: {rate:.3f} steps/s, {rate * size * mean:,.0f} frames/s that count")
    print(
        f"ratio {ratio:.2f} (padded to {buckets.bounds}; {PIECES} pieces, mean {mean:.0f}, batch "
        f"{size}, 1 step a dispatch, medians of {ROUNDS} turns of {STEPS} steps after compiling)"
    )
    write(
        "buckets",
        {
            "bounds": list(buckets.bounds),
            "mean_length": mean,
            "batch_size": size,
            "steps_of_a_turn": STEPS,
            "steps_per_second": found,
            "ratio": ratio,
        },
    )
