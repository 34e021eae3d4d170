"""Signals that end training, after what is under way is saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from genjax.learning import distributed


@contextmanager
def noted() -> Iterator[Callable[[], int]]:
    """Note SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once. Main
    thread only.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    if distributed.several():
        with distributed.stopping() as caught:
            yield caught
        return

    def handler(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, old in before.items():
            signal.signal(number, old)
