"""The metrics of a run between two lines of its log, and what is said where one is not finite."""

from typing import Any

import numpy as np

from genjax.errors import NonFiniteError
from genjax.learning import memory
from genjax.learning.checkpoint import Checkpoints


class Metrics:
    """The metrics since the last line, read one dispatch late so that the device never waits."""

    def __init__(
        self, window: dict[str, list[Any]], checkpoints: Checkpoints | None, check: bool
    ) -> None:
        self.window = window
        self._checkpoints, self._check = checkpoints, check
        self._pending: tuple[int, Any] | None = None

    def add(self, begin: int, metrics: Any) -> None:
        """Keep the metrics of a dispatch, which begins at a step, and read those of the one before,
        which has had time to finish.
        """
        self.collect()
        self._pending = (begin, metrics)

    def collect(self) -> None:
        """Read what was not read yet.

        Raises:
            NonFiniteError: for a loss that is not finite, if this is to be checked.
        """
        if self._pending is None:
            return
        (begin, metrics), self._pending = self._pending, None
        # On a CPU `jax.device_get` costs the host seven times as much.
        values = {name: memory.fetched(value) for name, value in metrics.items()}
        if self._check:
            _check_finite(begin, values, self._checkpoints)
        for name, value in values.items():
            self.window.setdefault(name, []).extend(np.asarray(value, np.float64).tolist())

    def line(self) -> dict[str, Any]:
        """What the window comes to, as far as it was read; a new one begins."""
        taken = 1 - np.asarray(self.window.get("skipped", 0.0), np.float64)
        found = {name: _window_value(name, values, taken) for name, values in self.window.items()}
        self.window.clear()
        return found


def _window_value(name: str, values: list[Any], taken: np.ndarray) -> Any:
    """Counts add up; everything else is averaged over the steps that were `taken`, NaN if none was:
    skipped ones have 0 there.
    """
    every = np.asarray(values, np.float64)
    if name == "skipped":
        return every.sum(axis=0).tolist()
    if taken.shape != every.shape:  # nothing is skipped, or one value stands for all members
        return every.mean(axis=0).tolist()
    count = taken.sum(axis=0)
    mean = np.where(taken > 0, every, 0).sum(axis=0) / np.where(count > 0, count, np.nan)
    return mean.tolist()


def _check_finite(
    begin: int, values: dict[str, np.ndarray], checkpoints: Checkpoints | None
) -> None:
    for name in sorted(values):
        if not name.endswith("/loss"):
            continue
        bad = np.argwhere(~np.isfinite(values[name]))
        if len(bad):
            place = f"player {name.rsplit('/', 1)[0]!r}"
            if values[name].ndim > 1:
                place += f", member {bad[0][1]}"
            what = f"the loss of {place} is {float(values[name][tuple(bad[0])])}"
            raise NonFiniteError(nonfinite_text(begin + int(bad[0][0]), what, checkpoints))


def nonfinite_text(step: int, what: str, checkpoints: Checkpoints | None) -> str:
    """Where training stopped, what is left of it, and what to try."""
    have = checkpoints.steps() if checkpoints is not None else []
    kept = f" The last good checkpoint is that of step {have[-1]}." if have else ""
    return (
        f"At step {step} {what}, and training stopped.{kept} Try a smaller --learning-rate or "
        "--clip-norm 1, or leave such steps out and count them with --skip-nonfinite."
    )
