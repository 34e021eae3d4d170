"""Training states on disk for a loop of one's own: `genjax.save` and `genjax.restore`."""

from pathlib import Path
from typing import Any

from genjax.errors import CheckpointError, ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.protocol import TrainState


def save(state: TrainState, folder: str | Path) -> Path:
    """Save a training state in a folder, under its step; see `Checkpoints`.

    Raises:
        CheckpointError: if the disk does not take it.
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
    return Checkpoints(folder).save(state)


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
