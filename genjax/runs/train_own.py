"""Training a model of one's own: `genjax.train(model, data)`."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from genjax.data import Source
from genjax.errors import ConfigError
from genjax.learning.distributed import agreed
from genjax.learning.loop import Hook, Progress, choose_feed, fit
from genjax.learning.step import training
from genjax.protocol import Model, TrainState
from genjax.runs.lock import locked
from genjax.runs.other_data import source_for
from genjax.runs.own_model import checkpoints_of
from genjax.settings import Count, check_call
from genjax.values import key_of
from genjax.zoo.recipe import Steps


def train_own(
    model: Model,
    data: Any,
    folder: Path | None,
    progress: Progress | None,
    say: Callable[[str], None],
    *,
    steps: Steps = 2000,
    batch_size: Count = 128,
    seed: int = 0,
    optimizer: Any = None,
    steps_per_call: Steps = 50,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
    hooks: tuple[Hook, ...] = (),
) -> tuple[TrainState, Source]:
    """Train a model of one's own, with Adam at 1e-3 unless told otherwise; returns the last state
    and the data.

    Args:
        folder: where its states are kept, and where it goes on; no other process may train there.

    Raises:
        ConfigError, DataError: for settings or data that do not fit.
        CheckpointError: from the folder, such as one in which another process trains.
    """
    import optax

    if data is None:
        raise ConfigError("A model of one's own needs data=: a path, an array or a Source.")
    numbers = {"steps": steps, "batch_size": batch_size, "steps_per_call": steps_per_call}
    check_call(train_own, numbers)
    key = key_of(seed)
    source = source_for(model.spec, data)
    t = training(model, optax.adam(1e-3) if optimizer is None else optimizer)
    feed = choose_feed(t, source, source.load().train, batch_size, seed)
    checkpoints = None
    if folder is not None:
        settings = {"batch_size": batch_size, "seed": seed}
        checkpoints = checkpoints_of(folder, model, source, settings)

    def on_restore(step: int) -> None:
        if step and step >= steps:
            say(f"all {step} steps were done before in {folder}; nothing is left to train")
        elif step:
            say(
                f"going on from step {step} of {steps} in {folder}; whether losses and optimizer "
                "are those of before cannot be seen"
            )

    with ExitStack() as held:
        if folder is not None:
            agreed(partial(_lock, held, folder, say))
        state = fit(
            feed,
            key=key,
            steps=steps,
            steps_per_call=steps_per_call,
            log=log,
            on_restore=on_restore,
            hooks=hooks,
            checkpoints=checkpoints,
            progress=progress,
        )
    return state, source


def _lock(held: ExitStack, folder: Path, say: Callable[[str], None]) -> None:
    """Keep other processes from training in a folder, until `held` ends."""
    held.enter_context(locked(folder, say))
