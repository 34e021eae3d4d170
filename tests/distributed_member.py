"""One of several processes, started by test_distributed.py: what it holds of a batch and of a
state, as JSON in a file.

python distributed_member.py FOLDER
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

from genjax.data import Source, Splits, cast, example_batch
from genjax.errors import DataError, GenjaxError
from genjax.families.vae import vae
from genjax.learning import checkpoint, distributed
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import choose_feed, fit
from genjax.learning.sharding import layout, make_mesh, shard
from genjax.learning.step import training
from genjax.protocol import Batch, DataSpec

SPEC = DataSpec((2,), "continuous")
N, BATCH, SEED = 60, 16, 5


class Watched(np.ndarray):
    """An array that notes which of its rows are read."""

    def __getitem__(self, index):
        if isinstance(index, np.ndarray):
            READ.extend(index.ravel().tolist())
        return np.asarray(super().__getitem__(index))


READ: list[int] = []


def held(tree) -> float:
    """The part of a tree's bytes that this process holds, copies counted once."""
    leaves = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    parts = [
        {str(part.index): part.data.nbytes for part in leaf.addressable_shards} for leaf in leaves
    ]
    return sum(sum(part.values()) for part in parts) / sum(leaf.nbytes for leaf in leaves)


def complaint(do) -> str:
    try:
        do()
    except GenjaxError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def no_data():
    raise DataError("no data on process 0")


def spoiled():
    if jax.process_index() == 1:
        raise DataError("spoiled")


def read_back_late(read_back, *args):
    time.sleep(2)
    read_back(*args)


def main(folder: Path) -> None:
    distributed.start()
    mesh = make_mesh({"fsdp": jax.device_count()})
    t = shard(training(vae(SPEC, latent_dim=4, hidden=(32, 32)), optax.adam(1e-2)), mesh)
    arrays = Batch((np.arange(2 * N, dtype=np.float32).reshape(N, 2) / N).view(Watched))
    source = Source(SPEC, lambda: Splits(arrays, arrays, arrays), cast(SPEC))
    feed = choose_feed(t, source, arrays, BATCH, SEED, mesh=mesh)
    x = feed.payload(3, 2).x  # of steps 3 and 4
    found = {"shape": x.shape, "read": list(READ), "parts": []}
    for part in x.addressable_shards:
        rows = part.index[1]
        found["parts"].append([rows.start, rows.stop, np.asarray(part.data).tolist()])

    if jax.process_index() == 1:  # the other one waits before it renames what is read
        checkpoint._check_saved = partial(read_back_late, checkpoint._check_saved)
    place = partial(layout, mesh=mesh)
    run = partial(
        fit,
        feed,
        key=jax.random.key(0),
        steps_per_call=2,
        checkpoints=Checkpoints(folder / "c"),
        layout=place,
    )
    state = run(steps=4)
    restored = run(steps=4)
    found["held"] = [held(state), held(restored)]
    found["equal"] = all(
        np.array_equal(a.data, b.data)
        for one, other in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(restored.params), strict=True
        )
        for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True)
    )
    found["sum"] = float(
        sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(distributed.whole(state.params)))
    )

    found["told"] = distributed.agreed(lambda: {"from": jax.process_index()})
    six = jax.eval_shape(lambda: example_batch(SPEC, jax.random.key(0), 6))
    found["complaints"] = [
        complaint(lambda: make_mesh({"data": 2})),
        complaint(
            lambda: jax.eval_shape(
                lambda key, batch: t.step(t.init(key), batch), jax.random.key(0), six
            )
        ),
        complaint(lambda: distributed.agreed(no_data)),
        complaint(lambda: distributed.all_passed(spoiled)),
        complaint(lambda: distributed.check_shared(folder / f"only{jax.process_index()}")),
    ]
    (folder / f"found{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
