"""How fast a run trains, by the clock: steps a second without what is done between them (compiling,
evaluations, pictures, saves).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pace:
    """Steps, and the seconds that they took, since the last line of a log."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Where something else is done; the device must have nothing left to do before it."""
        self._stop()
        try:
            yield
        finally:
            self._since = time.perf_counter()

    @contextmanager
    def dispatch(self, steps: int, compiled: bool) -> Iterator[None]:
        """A dispatch of so many steps; one that is compiled first does not count."""
        if compiled:
            with self.paused():
                yield
            return
        yield
        self.steps += steps

    def line(self, speed: Callable[[float], dict[str, float]]) -> dict[str, float]:
        """What there is to say of the steps since the last line, which are all done; nothing where
        none counted.
        """
        self._stop()
        steps, seconds = self.steps, self.seconds
        self.steps, self.seconds = 0, 0.0
        return speed(steps / seconds) if steps and seconds > 0 else {}

    def _stop(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
