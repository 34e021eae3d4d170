"""Normalizing flows of points whose density is known: how far from it they end.

Runs are made through the command line, as `results` makes its own, and kept in the same folders.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import results_of_zoo
from benchmarks.common import over_seeds, write
from genjax.evaluation.estimates import score_examples, scorer
from genjax.runs.load import Loaded, load

ROWS = ("nsf-ring", "nsf-grid")
WANTED = 0.01  # nats


def gap(name: str, seed: int, keep: Path, *flags: str) -> dict[str, float]:
    """ln p(x) - ln q(x) of one run, the mean over all test points: an estimate of
    KL(p || q) in nats. Its standard error is that of the differences, point by point. And the
    worst distance of such a point to what the inverse makes of its noise, in float32.
    """
    folder = keep / "-".join([f"{name}_seed{seed}", *(flag.strip("-") for flag in flags)])
    results_of_zoo.train(name, seed, folder, *flags)
    loaded = load(folder)
    source = loaded.data.source()
    assert source.log_prob is not None, f"the density of {name} is not known"
    assert loaded.model.log_prob is not None, f"{name} has no exact density"
    key, points = jax.random.key(0), source.load().test
    run = scorer(loaded.model.log_prob, source.prepare)
    nats = score_examples(run, loaded.params, loaded.state, points, key)
    x = source.prepare(key, points).x
    truth = source.log_prob(x)
    apart = np.asarray(truth, np.float64) - np.asarray(nats, np.float64)
    error = float(apart.std(ddof=1) / np.sqrt(len(apart)))
    worst = round_trip(loaded, x)
    print(
        f"{name}, seed {seed}: {apart.mean():.4f} nats from the truth (s.e. {error:.4f}), there "
        f"and back within {worst:.1e}",
        flush=True,
    )
    return {
        "gap": float(apart.mean()),
        "standard_error": error,
        "round_trip": worst,
        "n": len(apart),
    }


def round_trip(loaded: Loaded, x: jax.Array) -> float:
    """The largest difference of an entry of x from that of inverse(forward(x))."""

    @jax.jit
    def back(params: Any, state: Any, x: jax.Array) -> jax.Array:
        z, _ = loaded.model.extras.forward(params, state, x)
        return loaded.model.extras.inverse(params, state, z)[0]

    return float(np.abs(back(loaded.params, loaded.state, x) - x).max())


def main(names: list[str], seeds: list[int], keep: Path | None = None) -> None:
    """Measure and write results/flows.json, a row at a time; runs that are in `keep` already are
    not trained again.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or ROWS:
            found = [gap(name, seed, keep or Path(scratch)) for seed in seeds]
            gaps = [one["gap"] for one in found]
            rows.append(
                {
                    "recipe": name,
                    "seeds": seeds,
                    **over_seeds(gaps),
                    "standard_error": max(one["standard_error"] for one in found),
                    "round_trip": max(one["round_trip"] for one in found),
                    "n": int(found[0]["n"]),
                }
            )
            within = "within" if max(gaps) <= WANTED else "not within"
            print(f"{name}: {statistics.mean(gaps):.4f} nats, {within} {WANTED}", flush=True)
            write("flows", {"wanted": WANTED, "rows": rows})
