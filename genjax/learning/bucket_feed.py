"""Batches of sequences of one length bucket, for `fit`."""

from typing import Any

import jax
import numpy as np

from genjax.data import Source, batch_indices, prepare_at
from genjax.data.buckets import Buckets, make_buckets
from genjax.errors import ConfigError
from genjax.learning.loop import Feed
from genjax.learning.transforms import feed, scan_steps
from genjax.protocol import Batch, Training


def buckets_for(
    t: Training, source: Source, arrays: Batch, n: int, batch_size: int, group: int
) -> Buckets:
    """`make_buckets` for a training split, once it is sure that they can be trained on.

    Raises:
        ConfigError: for sequences without lengths, an order of the data's own, and a model that
            takes the whole length only.
        DataError: see `make_buckets`.
    """
    if arrays.length is None or source.order is not batch_indices:
        raise ConfigError(
            f"--buckets is for sequences of unequal length; {source.spec.name} has none. Leave "
            "--buckets out."
        )
    found = make_buckets(np.asarray(arrays.length), source.spec.shape[0], n, batch_size, group)
    prepare = prepare_at(source, 0)
    rows = jax.tree.map(lambda leaf: leaf[:batch_size], arrays)
    short = rows._replace(x=rows.x[:, : found.bounds[0]])
    rest = short._replace(length=np.minimum(short.length, found.bounds[0]))
    try:
        jax.eval_shape(lambda key: t.step(t.init(key), prepare(rest, 0)), jax.random.key(0))
    except Exception as error:  # whatever a network says of another shape
        raise ConfigError(
            f"This model takes sequences of {source.spec.shape[0]} steps only ({error}). "
            "Say --buckets 1."
        ) from error
    return found


def bucket_feed(t: Training, source: Source, arrays: Batch, buckets: Buckets, seed: int) -> Feed:
    """A `Feed` whose batches are padded to their bucket's length only. One program is compiled for
    each bucket and number of steps.

    Steps of one dispatch are padded to the longest of their buckets; give `fit`
    steps_per_call=buckets.group, so that these are one. The split stays on the host.

    Args:
        t: a `Training` of one member, or of members that share their batches.
        arrays: the training split, with lengths.
        buckets: from `make_buckets`.
        seed: of the order of the data.
    """

    def payload(step: int, k: int) -> Any:
        found = [buckets.batch(seed, at) for at in range(step, step + k)]
        longest = max(bound for bound, _ in found)
        order = np.stack([index for _, index in found])
        rest = jax.tree.map(lambda leaf: leaf[order], arrays._replace(x=None))
        return rest._replace(x=arrays.x[:, :longest][order])

    fed = feed(t, prepare_at(source, seed))
    return Feed(lambda k: scan_steps(fed), payload, prefetch=True)
