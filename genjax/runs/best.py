"""The best state of a run by its figure on the validation split, kept beside the newest ones; and
when there has been no gain for long enough.

best/ in a run folder is a folder of checkpoints that keeps one. Which evaluations there have been
follows from the step alone, so a run that was stopped and went on keeps and ends as one that was
not.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genjax.errors import CheckpointError, ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.distributed import agreed
from genjax.protocol import Model, TrainState
from genjax.runs.identity import check_note
from genjax.zoo.recipe import Schedule

FOLDER = "best"
WHICH = ("newest", FOLDER)  # of a run's checkpoints


class Best:
    """The best state so far.

    Attributes:
        value: its figure on the validation split, in nats, where more is better; -inf without one,
            and where it was damaged.
        step: its step; 0 without one. Where it was damaged evaluations still count from there, so
            that the run does not end before its time.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """What is damaged is set aside, which is said.

        Args:
            folder: of the run.
            about: what the note of a checkpoint says of the run, see `identity.note_of`.

        Raises:
            CheckpointError: if there is one of other settings, or it cannot be read.
        """
        check = functools.partial(check_note, about=about, folder=folder)
        self.checkpoints = Checkpoints(folder / FOLDER, 1, about, check)
        found = self.checkpoints.newest_note()
        self.checkpoints.set_aside_damaged(found)
        self.value, self.step = -math.inf, agreed(functools.partial(_best_step, self.checkpoints))
        if found.step is not None:
            check(found.note)
            self.value = float(found.note["valid"])

    def offer(self, step: int, state: TrainState, figure: Callable[[], float]) -> float:
        """Keep a state if it is better than the best so far; returns its figure.

        Args:
            figure: finds it, on process 0; what it raises there is raised on all.

        Raises:
            CheckpointError: if the disk does not take it; the best before stays.
        """
        value = agreed(figure)
        if value > self.value:  # NaN is no gain
            self.checkpoints.save(state, {"valid": value})
            self.value, self.step = value, step
        return value


def no_gain(schedule: Schedule, best: int, step: int) -> bool:
    """Whether a run whose best state is of step `best` (0 without one) ends at a step: as many
    evaluations as `stop_after` says, one at each multiple of `evaluate_every`, but at most one in
    `steps_per_call` steps, brought no gain. It waits longer where dispatches are shorter than that.
    """
    if not schedule.stop_after or not schedule.evaluate_every:
        return False
    every = max(schedule.evaluate_every, schedule.steps_per_call)
    return step // every - best // every >= schedule.stop_after


def ended_early(folder: Path, schedule: Schedule, step: int) -> bool:
    """Whether a run has ended at a step because evaluations brought no gain.

    Raises:
        CheckpointError: if its best state cannot be read.
    """
    if not schedule.stop_after:
        return False
    return no_gain(schedule, _best_step(Checkpoints(folder / FOLDER, 1)), step)


def _best_step(checkpoints: Checkpoints) -> int:
    """The step of the best state, or of one that was damaged and set aside; 0 without one."""
    aside = [path.name.split(".")[0] for path in checkpoints.folder.glob("*.damaged*")]
    known = checkpoints.steps() or [int(name) for name in aside if name.isdecimal()]
    return max(known, default=0)


def best_of(folder: Path, model: Model, **how: Any) -> Checkpoints:
    """Where the best state of a run is.

    Args:
        how: of `Checkpoints`.

    Raises:
        ConfigError: for a model without a figure to compare.
        CheckpointError: if none was kept.
    """
    if model.score is None:
        raise ConfigError(
            f"{folder} has no best checkpoint: this model has neither a log-probability nor a "
            "bound, by which checkpoints could be compared. Leave --which out."
        )
    found = Checkpoints(folder / FOLDER, 1, **how)
    if not found.steps():
        raise CheckpointError(
            f"{folder} has no best checkpoint: none was kept (it is from before there were any, or "
            "was trained with --evaluate-every 0), or it was damaged. Leave --which out for the "
            "newest."
        )
    return found
