"""Sources of data that are drawn and not read: three splits with fixed seeds, from a distribution
whose likelihood is known.
"""

import zlib
from collections.abc import Callable

import numpy as np

from genjax.data.source import Source, Splits, cast, stored_dtype, validate
from genjax.protocol import Array, Batch, DataSpec

# (generator, n) -> x [n, *shape], and the classes [n] or None.
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray | None]]


def drawn_source(
    spec: DataSpec,
    draw: Draw,
    log_prob: Callable[[Array], Array],
    entropy: float | None,
    sizes: tuple[int, int, int],
    what: str,
) -> Source:
    """The source of such data.

    Args:
        draw: classes are left out where the spec has none.
        log_prob, entropy: see `Source`.
        sizes: of the training, validation and test split.
        what: one calls the examples, for the description: "points of a known density".
    """

    def split(number: int, n: int) -> Batch:
        # Each split has a stream of its own, so that the size of one does not change the others.
        x, label = draw(np.random.default_rng((zlib.crc32(spec.name.encode()), number)), n)
        x = x.astype(stored_dtype(spec))
        if label is None or spec.n_classes is None:
            return Batch(x)
        return Batch(x, label.astype(np.int32))

    def load() -> Splits:
        parts = (split(number, n) for number, n in enumerate(sizes))
        return validate(Splits(*parts), spec, spec.name)

    def fresh(seed: int, n: int) -> Batch:
        return split(len(sizes) + seed, n)

    train, valid, test = (f"{n:,}" for n in sizes)
    about = f"{train} train / {valid} valid / {test} test {what}, drawn with fixed seeds"
    return Source(spec, load, cast(spec), log_prob, entropy, description=about, fresh=fresh)
