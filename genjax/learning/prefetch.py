"""Batches made on the host while the device works on those before them."""

import collections
import concurrent.futures
import time
from typing import Any, Protocol


class Feed(Protocol):
    """What is needed of `loop.Feed`."""

    prefetch: bool
    ahead: int

    def payload(self, step: int, k: int, /) -> Any: ...

    def steps_at(self, step: int, most: int) -> int: ...


class Ahead:
    """The payloads of the dispatches to come, made by `feed.ahead` threads and no more than as many
    ahead of the device; in the order of the steps, whichever is made first.

    Its threads end with the block that it is entered for. What a thread raises, `take` raises.

    Attributes:
        waited: seconds that the loop waited for a payload, after the first one.
    """

    def __init__(self, feed: Any, most: int, steps: int) -> None:
        self._feed: Feed = feed
        self._most, self._steps = most, steps
        self._coming: collections.deque[tuple[int, int, concurrent.futures.Future[Any]]]
        self._coming = collections.deque()
        self._pool = concurrent.futures.ThreadPoolExecutor(max(1, feed.ahead), "genjax-data")
        self.waited = 0.0

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *about: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> tuple[Any, int]:
        """The payload of the dispatch at a step, and how many steps it has."""
        if not self._coming:
            k = self._length(step)
            return self._feed.payload(step, k), k
        _, k, future = self._coming.popleft()
        before = time.perf_counter()
        payload = future.result()
        self.waited += time.perf_counter() - before
        return payload, k

    def begin(self, step: int) -> None:
        """Have those made that come next, the first of them at a step."""
        while self._feed.prefetch and len(self._coming) < self._feed.ahead:
            if self._coming:
                last, k, _ = self._coming[-1]
                step = last + k
            if step >= self._steps:
                return
            k = self._length(step)
            self._coming.append((step, k, self._pool.submit(self._feed.payload, step, k)))

    def _length(self, step: int) -> int:
        return self._feed.steps_at(step, min(self._most, self._steps - step))
