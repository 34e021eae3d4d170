"""What the benchmarks share: alternation in time, medians with their spread, and files of
results.
"""

import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from genjax.errors import GenjaxError
from genjax.runs.folder import environment, write_json
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe

RESULTS = Path(__file__).parent / "results"


@contextmanager
def one_message() -> Iterator[None]:
    """Say what a user can meet as one message, with exit code 2, as `genjax` does."""
    try:
        yield
    except GenjaxError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def not_measured(families: Iterable[str]) -> list[str]:
    """A paragraph that names the families of the zoo that are not among these; none if all are."""
    lacking = sorted({row.family.__name__ for row in ZOO.values()} - set(families))
    return [f"Not measured: {', '.join(lacking)}.", ""] if lacking else []


def first_rows(fits: Callable[[Recipe], bool] = lambda row: True) -> tuple[str, ...]:
    """The first row of each family that stands on data, and of those that fit, in the order of the
    zoo.
    """
    rows = [row for row in ZOO.values() if row.first is None and fits(row)]
    names = {row.family: row.name for row in reversed(rows)}
    return tuple(name for name in ZOO if name in names.values())


def alternate(
    calls: dict[str, Callable[[], Any]], seconds: float = 10.0, block: float = 0.05
) -> dict[str, list[float]]:
    """Seconds per call of several programs, timed in turns of about `block` seconds so that a noisy
    machine hurts all alike.

    Returns one value per round and program: the mean over that round's calls. Round i of one
    program is next to round i of the others in time, so ratios should be taken round by round.
    """

    def timed(call: Callable[[], Any]) -> Callable[[int], float]:
        def mean(n: int) -> float:
            start = time.perf_counter()
            for _ in range(n):
                out = call()
            jax.block_until_ready(out)
            return (time.perf_counter() - start) / n

        return mean

    means, counts = {name: timed(call) for name, call in calls.items()}, {}
    for name, mean in means.items():
        mean(1)  # compiles
        counts[name] = max(1, round(block / max(mean(1), 1e-9)))
    return in_turns(means, counts, seconds)


def in_turns(
    calls: dict[str, Callable[[int], float]],
    counts: dict[str, int],
    seconds: float = 0.0,
    at_least: int = 5,
) -> dict[str, list[float]]:
    """One value per round and program: what each gives for its count, a mean over so many. Rounds
    until the seconds are over, and five unless said otherwise at least.
    """
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(next(iter(rounds.values()))) < at_least:
        # The order turns around in every second round, so that none always runs in the wake of the
        # same other.
        order = list(calls) if len(rounds[next(iter(calls))]) % 2 == 0 else list(reversed(calls))
        for name in order:
            rounds[name].append(calls[name](counts[name]))
    return rounds


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles of repeated measurements."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high, "rounds": len(values)}


def over_seeds(values: list[float]) -> dict[str, Any]:
    """A figure by seed, its mean, and its standard deviation where there are several."""
    return {
        "by_seed": values,
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Median and quartiles of a / b, round by round."""
    return summary([x / y for x, y in zip(a, b, strict=True)])


def write(name: str, results: dict[str, Any]) -> None:
    """Write results with the machine, the versions and the day they are from."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    write_json(RESULTS / f"{name}.json", {"date": stamp, **environment(), **results})


def read(name: str) -> dict[str, Any] | None:
    """Results that were written before; None if they have not been measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def quartiles(r: dict[str, float], form: str) -> str:
    """A `common.summary` in words: the median and, in brackets, the quartiles."""
    return f"{r['median']:{form}} [{r['q1']:{form}}, {r['q3']:{form}}]"


def machine(results: dict[str, Any]) -> str:
    """Where and when something was measured, in words."""
    h, v = results["hardware"], results["versions"]
    versions = ", ".join(f"{name} {v[name]}" for name in ("python", "jax", "flax", "optax"))
    return f"{results['date']}, {h['cores']} cores, {h['backend']}, {versions}"


def percent(ratio: float) -> str:
    """A ratio as a signed difference from 1 in per cent."""
    return f"{100 * (ratio - 1):+.1f} %"
