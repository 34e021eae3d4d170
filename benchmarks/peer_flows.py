"""What a normalizing flow of another library is asked, by an interpreter of its own: it imports
nothing of genjax, and numpy alone.

    python peer_zuko.py CASE.json
    python peer_flowjax.py CASE.json

The case says the sizes of the flow, the optimiser and where the data are, as `flow_peers.py` writes
it. The first line on stdout is JSON: the library, its version and the number of parameters. Each
line of JSON on stdin is answered by one on stdout: {"steps": n} by seconds per step of so many
further steps of training, and {"score": "FILE.npy"} by the mean log-likelihood of the test points,
whose own are put into that file.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


class Points:
    """Training points in batches, the same for whoever asks with the same case; and test points."""

    def __init__(self, case: dict[str, Any]) -> None:
        with np.load(case["data"]) as file:
            self.train, self.test = file["train"], file["test"]
        self.rng, self.size = np.random.default_rng(case["seed"]), case["batch_size"]
        self.mean, self.std = self.train.mean(0), self.train.std(0)

    def batches(self, n: int) -> np.ndarray:
        """The next n batches, [n, batch_size, d]."""
        return self.train[self.rng.integers(len(self.train), size=(n, self.size))]

    def standard(self, x: np.ndarray) -> np.ndarray:
        """With mean 0 and variance 1, as users of libraries without such a layer have them."""
        return (x - self.mean) / self.std

    @property
    def log_volume(self) -> float:
        """ln |det| of that."""
        return -float(np.log(self.std).sum())


def rate(case: dict[str, Any], step: int) -> float:
    """The learning rate of a step: a cosine, from what the case says to 0."""
    return case["learning_rate"] * (0.5 + 0.5 * math.cos(math.pi * step / case["steps"]))


def decay(case: dict[str, Any], step: int) -> float:
    """Of the moving average of the parameters."""
    return min(case["ema_decay"], (1 + step) / (10 + step))


def serve(
    make: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[..., Any], Callable[..., Any]]],
) -> None:
    """Answer until stdin ends.

    Args:
        make: (case) -> what the library says of itself, (batch, step) -> None, which is a step of
            training, and (x) -> log-likelihoods by the averaged parameters; of standard points.
    """
    with open(sys.argv[1]) as file:
        case = json.load(file)
    points, done = Points(case), 0
    about, train, score = make(case)
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "score" in asked:
            nats = score(points.standard(points.test)) + points.log_volume
            np.save(asked["score"], nats)
            print(json.dumps(float(nats.mean())), flush=True)
            continue
        start = time.perf_counter()
        for batch in points.standard(points.batches(asked["steps"])):
            train(batch, done)
            done += 1
        print(json.dumps((time.perf_counter() - start) / asked["steps"]), flush=True)
