"""A small classifier of the data at hand, whose features and verdicts judge samples; trained in
place and kept in a cache.

Its figures are named after it, FD[cnn-v1], and never FID: that is another network, trained on other
data.
"""

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genjax.data import Source, batch_at
from genjax.errors import CheckpointError, ConfigError, replacing
from genjax.evaluation.estimates import Estimate
from genjax.evaluation.sample_metrics import class_agreement
from genjax.learning.optim import track_ema
from genjax.learning.step import eval_params, training
from genjax.learning.transforms import feed, repeat_steps
from genjax.nets.conv import ConvClassifier
from genjax.nets.functional import functional
from genjax.protocol import Array, Aux, Batch, Key, Model, Params, State

# of everything below that decides what the classifier is: raise it and old caches are left alone
VERSION = 1
STEPS, BATCH, CHANNELS, FEATURES = 3000, 128, (32, 64), 128


class Judge(NamedTuple):
    """A trained classifier.

    Attributes:
        name: "cnn-v1".
        features: (x in the units of the data [n, *shape]) -> the last hidden layer, [n, 128].
        predict: (x) -> classes, int [n].
        accuracy: on the real test split.
    """

    name: str
    features: Callable[[np.ndarray], np.ndarray]
    predict: Callable[[np.ndarray], np.ndarray]
    accuracy: Estimate


def cache_folder() -> Path:
    """$GENJAX_CACHE, or genjax under $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("GENJAX_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genjax"


def judge_of(
    source: Source, steps: int = STEPS, say: Callable[[str], None] = lambda text: None
) -> Judge:
    """The judge of a labelled source of images: from the cache if one was trained on the very same
    data, otherwise trained.

    Two convolutions with stride 2 (32 and 64 channels), a hidden layer of 128, softmax over the
    classes; 3,000 steps of AdamW with batches of 128 and shifts of up to one pixel, a moving
    average of the weights, seed 0. The test split is only used to say how good it is.
    """
    spec, splits = source.spec, source.load()
    shape: Any = spec.shape
    net = functional(partial(ConvClassifier, shape, CHANNELS, FEATURES, spec.n_classes or 0))
    settings = [VERSION, steps, spec.shape, spec.kind, spec.levels, spec.n_classes]
    digest = hashlib.sha256(json.dumps(settings).encode())
    # What the net sees depends on the scale, too; data without one keep the name that they had.
    for array in (splits.train.x, splits.train.cond, spec.shift, spec.scale):
        if array is None:
            continue
        digest.update(np.ascontiguousarray(array).tobytes())
    path = cache_folder() / f"cnn-v{VERSION}-{digest.hexdigest()[:16]}.npz"
    params = _read(path, jax.eval_shape(net.init, jax.random.key(0))[0])
    if params is None:
        say(
            f"training the classifier that judges samples of {spec.name}, once; it is kept in "
            f"{path}"
        )
        params = _train(source, net, steps)
        _write(path, params)

    @jax.jit
    def apply(x: Array) -> tuple[Array, Array]:
        return net.apply(params, {}, spec.normalize(x))[0]

    def both(x: np.ndarray, which: int) -> np.ndarray:
        parts = [
            np.asarray(apply(jnp.asarray(x[i : i + 500], jnp.float32))[which])
            for i in range(0, len(x), 500)
        ]
        return np.concatenate(parts)

    def features(x: np.ndarray) -> np.ndarray:
        return both(x, 0)

    def predict(x: np.ndarray) -> np.ndarray:
        return both(x, 1).argmax(axis=-1)

    test = source.prepare(jax.random.key(0), splits.test)
    accuracy = class_agreement(predict(np.asarray(test.x)), np.asarray(splits.test.cond))
    return Judge(f"cnn-v{VERSION}", features, predict, accuracy)


def _train(source: Source, net: Any, steps: int) -> Params:
    spec = source.spec

    def init(key: Key) -> tuple[Params, State]:
        return {"classifier": net.init(key)[0]}, {"classifier": {}}

    def shifted(key: Key, x: Array) -> Array:
        """Images moved by -1, 0 or 1 pixels in each direction, edges repeated."""
        wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")

        def cut(image: Array, at: Array) -> Array:
            return jax.lax.dynamic_slice(image, (at[0], at[1], jnp.zeros((), at.dtype)), spec.shape)

        return jax.vmap(cut)(wide, jax.random.randint(key, (x.shape[0], 2), 0, 3))

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        (_, logits), _ = net.apply(params["classifier"], {}, spec.normalize(shifted(key, batch.x)))
        labels = jax.nn.one_hot(batch.cond, spec.n_classes or 0)
        return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1), Aux(state, {})

    def nothing(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Any:
        # The contract asks every model for a sampler.
        raise ConfigError("A classifier has no samples.")

    # A classifier is one player with one loss, so the zoo's own train step trains it.
    rate = optax.cosine_decay_schedule(2e-3, steps)
    tx = optax.chain(optax.adamw(rate, weight_decay=0.05), track_ema(0.995))
    t = training(Model(spec, init, {"classifier": loss}, nothing), tx)
    per_call = 50 if steps % 50 == 0 else 1
    # What is on the disk is read whole: batches are gathered on the device.
    arrays = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)), source.load().train)
    size = min(BATCH, len(source.load().train.x))
    run = jax.jit(repeat_steps(feed(t, batch_at(source, size, 0)), per_call).step, donate_argnums=0)
    ts = jax.jit(t.init)(jax.random.key(0))
    for _ in range(steps // per_call):
        ts, _ = run(ts, arrays)
    return eval_params(ts)["classifier"]


def _read(path: Path, like: Params) -> Params | None:
    """What `_write` wrote; None if there is nothing, or nothing whole, so that it is made again."""

    def leaf_of(file: Any, key: Any, wanted: Any) -> np.ndarray:
        leaf = file[jax.tree_util.keystr(key)]
        if leaf.shape != wanted.shape:
            raise ValueError(f"{path}: another shape")
        return leaf

    try:
        with path.open("rb") as opened, np.load(opened) as file:
            return jax.tree_util.tree_map_with_path(partial(leaf_of, file), like)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, params: Params) -> None:
    leaves: Any = {
        jax.tree_util.keystr(key): np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    # A cache that cannot be written costs time and nothing else.
    with (
        contextlib.suppress(CheckpointError),
        replacing(path) as temporary,
        temporary.open("wb") as file,
    ):
        np.savez(file, **leaves)
