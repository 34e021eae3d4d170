"""Images per second of a PixelCNN sampled with caches of rows, and with the whole network computed
for every pixel.

Sizes are those of the zoo's rows, with random weights: what is drawn costs the same. Both ways draw
the same images from the same key, which is looked at first.
"""

import functools
from typing import Any

import jax
import numpy as np

from benchmarks.common import alternate, summary, write
from genjax.zoo import ZOO

ROWS = ("pixelcnn-digits", "pixelcnn-mnist")
BATCHES = (1, 16)


def sampler(name: str, batch: int, cached: bool) -> Any:
    """(seed) -> a batch of images of a row's model."""
    row = ZOO[name]
    model = row.build(row.source().spec, cached=cached)
    params, state = jax.jit(model.init)(jax.random.key(0))
    return functools.partial(jax.jit(model.sample, static_argnums=3), params, state, n=batch)


def measure(seconds: float, rows: tuple[str, ...] = ROWS) -> dict[str, Any]:
    """Seconds of a batch by row, size and way, in turns, and how much faster caches are."""
    found = []
    for name in rows:
        for batch in BATCHES:
            ways = {cached: sampler(name, batch, cached) for cached in (True, False)}
            one, other = (np.asarray(way(key=jax.random.key(1))) for way in ways.values())
            calls = {
                "cached" if cached else "whole": functools.partial(way, key=jax.random.key(2))
                for cached, way in ways.items()
            }
            taken = {way: summary(times) for way, times in alternate(calls, seconds).items()}
            faster = taken["whole"]["median"] / taken["cached"]["median"]
            same = float((one == other).mean())
            found.append({"recipe": name, "batch": batch, "faster": faster, "same": same, **taken})
            print(
                f"{name}, batch {batch}: {taken['cached']['median']:.3f} s with caches, "
                f"{taken['whole']['median']:.3f} s without, {faster:.1f} times; "
                f"{100 * same:.2f} % of the values are the same",
                flush=True,
            )
    return {"rows": found}


def main(seconds: float = 10.0) -> None:
    """Measure and write results/pixels.json."""
    write("pixels", measure(seconds))


if __name__ == "__main__":
    main()
