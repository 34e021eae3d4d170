"""Training states on disk for a loop of one's own: `genjax.save` and `genjax.restore`."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax.errors import CheckpointError, ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.distributed import agreed, all_passed
from genjax.protocol import TrainState

ANOTHER = "It is of another training; give another folder."


def save(state: TrainState, folder: str | Path) -> Path:
    """Save a training state in a folder, under its step; see `Checkpoints`. The newest three stay.

    Raises:
        CheckpointError: if the disk does not take it; or if the folder has a state of a later step,
            or another one of this step, which is of another training.
        ConfigError: for something else than a training state.

    Example:
        >>> import jax, optax, tempfile
        >>> import genjax
        >>> model = genjax.vae(genjax.DataSpec((2,), "continuous"), hidden=(4,))
        >>> t = genjax.training(model, optax.adam(1e-3))
        >>> ts, folder = jax.jit(t.init)(jax.random.key(0)), tempfile.mkdtemp()
        >>> genjax.save(ts, folder).name
        '0'
    """
    _check_state(state)
    checkpoints = Checkpoints(folder)
    _check_goes_on(checkpoints, state)
    return checkpoints.save(state)


def _check_goes_on(checkpoints: Checkpoints, state: TrainState) -> None:
    """Refuse a folder whose newest state is none that this one comes after: `Checkpoints` would
    keep that, and delete this one.
    """
    step, have = int(state.step), agreed(checkpoints.steps)
    if not have or have[-1] < step:
        return
    found = checkpoints.newest_note()  # of those that are whole
    checkpoints.set_aside_damaged(found)
    newest = -1 if found.step is None else found.step
    if newest > step:
        raise CheckpointError(
            f"{checkpoints.folder} has a state of step {newest}, and this one is of step {step}. "
            f"{ANOTHER}"
        )
    if newest == step:
        try:
            restored = checkpoints.restore(state, step)
        except CheckpointError as error:  # damaged, or of another model
            raise CheckpointError(f"{error}\nGive another folder.") from error
        assert restored is not None
        all_passed(functools.partial(_check_same, state, restored.state, checkpoints.folder))


def _check_same(state: TrainState, there: TrainState, folder: Path) -> None:
    """Refuse another state of the same step."""
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(there), strict=True)
    if any(_bits(a) != _bits(b) for a, b in pairs):
        raise CheckpointError(f"{folder} has another state of step {int(state.step)}. {ANOTHER}")


def _bits(leaf: Any) -> list[bytes]:
    """The bits of an array or of a PRNG key, in the parts that this process has."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return [np.asarray(shard.data).tobytes() for shard in jnp.asarray(leaf).addressable_shards]


def restore(folder: str | Path, like: TrainState, step: int | None = None) -> TrainState:
    """The newest state (or that of `step`) that `save` left in a folder.

    Args:
        like: a state of the same structure, or its shapes: `jax.eval_shape(t.init, key)`.

    Raises:
        CheckpointError: if there is none that is whole, or it is of another model.
        ConfigError: for something else than a training state.

    Example:
        >>> import jax, optax, tempfile
        >>> import genjax
        >>> model = genjax.vae(genjax.DataSpec((2,), "continuous"), hidden=(4,))
        >>> t = genjax.training(model, optax.adam(1e-3))
        >>> folder = tempfile.mkdtemp()
        >>> _ = genjax.save(jax.jit(t.init)(jax.random.key(0)), folder)
        >>> int(genjax.restore(folder, jax.eval_shape(t.init, jax.random.key(0))).step)
        0
    """
    _check_state(like)
    restored = Checkpoints(folder).restore(like, step)
    if restored is None:
        raise CheckpointError(f"There is no checkpoint in {folder}.")
    return restored.state


def _check_state(state: Any) -> None:
    if not isinstance(state, TrainState):
        raise ConfigError(
            "Expected a training state, which `t.init` and `t.step` return (of its shapes alone: "
            f"jax.eval_shape(t.init, key)); got {type(state).__name__}. A run folder is loaded by "
            "genjax.load, and `genjax export` writes parameters alone."
        )
