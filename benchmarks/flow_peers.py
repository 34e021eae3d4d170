"""Neural spline flows beside those of zuko and flowjax: the same bijections, widths, number of
layers, optimiser and batches, trained in turns, one process each.

The peers (`peer_zuko.py`, `peer_flowjax.py`) run in interpreters that $GENJAX_ZUKO_PYTHON and
$GENJAX_FLOWJAX_PYTHON name; one that is not named is skipped. What is theirs to choose, such as how
a network begins and how a spline is parameterised, is as their library has it.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.common import in_turns, over_seeds, ratio, summary, write
from benchmarks.peer_flows import Points
from benchmarks.processes import AskedProcess
from genjax.evaluation.estimates import count, estimate, score_examples, scorer
from genjax.learning.optim import Optimizer
from genjax.learning.step import eval_params
from genjax.learning.transforms import compiled, scan_steps
from genjax.protocol import Batch
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe
from genjax.zoo.sections import replace, sections_of

ROWS = ("nsf-ring", "nsf-grid")
VARIABLES = {"zuko": "GENJAX_ZUKO_PYTHON", "flowjax": "GENJAX_FLOWJAX_PYTHON"}
FOLDER = Path(__file__).parent
BLOCK = 100  # steps of a turn


class Trained(NamedTuple):
    """One library's flow: what it is, (n) -> seconds per step of n more steps, and () -> ln q of
    every test point.
    """

    about: dict[str, Any]
    train: Callable[[int], float]
    score: Callable[[], np.ndarray]


def case_of(recipe: Recipe, seed: int, folder: Path) -> dict[str, Any]:
    """What a peer has to know of a row, as JSON-ready data; the points are put into the folder."""
    source, optimizer = recipe.source(), recipe.optimizer
    settings = {name: value for name, (_, value, _) in sections_of(recipe)["model"].items()}
    wanted = {"structure": "coupling", "activation": "gelu", "mix": "linear"}
    assert all(settings[name] == value for name, value in wanted.items()), recipe.name
    assert isinstance(optimizer, Optimizer), recipe.name
    assert (optimizer.algorithm, optimizer.schedule) == ("adam", "cosine"), recipe.name
    splits, path = source.load(), folder / "points.npz"
    np.savez(path, train=splits.train.x, test=splits.test.x)
    return {
        "data": str(path),
        "seed": seed,
        "d": source.spec.size,
        "n_layers": settings["n_layers"],
        "hidden": list(settings["hidden"]),
        "bins": settings["bins"],
        "tail_bound": settings["tail_bound"],
        "learning_rate": optimizer.learning_rate,
        "ema_decay": optimizer.ema_decay,
        "batch_size": recipe.schedule.batch_size,
        "steps": recipe.schedule.steps,
    }


def ours(recipe: Recipe, case: dict[str, Any]) -> Trained:
    """The row's own training procedure, as many steps a dispatch as its schedule says."""
    spec, k = recipe.source().spec, recipe.schedule.steps_per_call
    model, points = recipe.build(spec), Points(case)
    t = compiled(scan_steps(recipe.training(spec)))
    now = [t.init(jax.random.key(case["seed"]))]
    first = Batch(points.batches(k))
    assert t.prepare is not None
    now = [t.prepare(now[0], first)]
    points = Points(case)  # from the first batch on
    run = scorer(model.log_prob, recipe.source().prepare)  # type: ignore[arg-type]

    def train(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps // k):
            now[0], metrics = t.step(now[0], Batch(points.batches(k)))
            jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / steps

    def score() -> np.ndarray:
        ts = now[0]
        return score_examples(run, eval_params(ts), ts.state, Batch(points.test), jax.random.key(0))

    about = {"version": f"jax {jax.__version__}", "parameters": count(now[0].params)}
    return Trained(about, train, score)


def peer(name: str, python: str, case: dict[str, Any], folder: Path) -> tuple[Trained, Any]:
    """Another library's flow, and the process that it is in."""
    path, script = folder / "case.json", FOLDER / f"peer_{name}.py"
    path.write_text(json.dumps(case))
    process = AskedProcess([python, str(script), str(path)])

    def train(steps: int) -> float:
        return float(json.loads(process.ask(json.dumps({"steps": steps}))))

    def score() -> np.ndarray:
        file = folder / f"{name}.npy"
        process.ask(json.dumps({"score": str(file)}))
        return np.load(file)

    return Trained(json.loads(process.greeting), train, score), process


def compare(recipe: Recipe, seed: int, pythons: dict[str, str]) -> dict[str, Any]:
    """By library: seconds per step, turn by turn, and how far it ends from the truth in nats."""
    steps, source = recipe.schedule.steps, recipe.source()
    assert source.log_prob is not None, f"the density of {recipe.name} is not known"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        case = case_of(recipe, seed, folder)
        flows, processes = {"genjax": ours(recipe, case)}, []
        for name, python in pythons.items():
            flows[name], process = peer(name, python, case, folder)
            processes.append(process)
        calls = {name: flow.train for name, flow in flows.items()}
        for call in calls.values():
            call(BLOCK)  # which compiles
        counts = dict.fromkeys(calls, BLOCK)
        rounds = in_turns(calls, counts, at_least=steps // BLOCK - 1)
        test: Any = source.load().test.x.astype(np.float64)
        truth = np.asarray(source.log_prob(test))
        nats = {name: np.asarray(flow.score(), np.float64) for name, flow in flows.items()}
        for process in processes:
            process.close()
    found = {}
    for name, flow in flows.items():
        gap, less = estimate(truth - nats[name]), estimate(nats["genjax"] - nats[name])
        found[name] = {
            **flow.about,
            "rounds": rounds[name],
            "gap": gap.mean,
            "standard_error": gap.standard_error,
            "genjax_more_by": [less.mean, less.standard_error],
            "n": gap.n,
        }
        print(f"{recipe.name}, seed {seed}, {name}: {gap} nats from the truth", flush=True)
    return found


def row_of(recipe: Recipe, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written of a row: each library's figures over the seeds, and its time beside ours."""
    libraries = {}
    for name in found[0]:
        own = [one[name] for one in found]
        rounds = [value for one in own for value in one["rounds"]]
        mine = [value for one in found for value in one["genjax"]["rounds"]]
        libraries[name] = {
            "version": own[0]["version"],
            "parameters": own[0]["parameters"],
            "gap": over_seeds([one["gap"] for one in own]),
            "standard_error": max(one["standard_error"] for one in own),
            "genjax_more_by": [one["genjax_more_by"] for one in own],
            "steps_per_second": 1 / statistics.median(rounds),
            "ms": {k: 1000 * v if k != "rounds" else v for k, v in summary(rounds).items()},
            "ratio": ratio(mine, rounds),
        }
    schedule = recipe.schedule
    sizes = {"steps": schedule.steps, "batch_size": schedule.batch_size}
    return {"recipe": recipe.name, **sizes, "n": found[0]["genjax"]["n"], "libraries": libraries}


def main(names: tuple[str, ...] = (), seeds: tuple[int, ...] = (0,), **changes: Any) -> None:
    """Measure and write results/flow_peers.json, with some settings of the rows changed; nothing
    where neither peer's interpreter is named.
    """
    pythons = {name: os.environ[at] for name, at in VARIABLES.items() if os.environ.get(at)}
    for name, at in VARIABLES.items():
        if name not in pythons:
            print(f"{name} is skipped: {at} is not set; it names an interpreter that has it.")
    if not pythons:
        return
    rows = []
    for name in names or ROWS:
        recipe = replace(ZOO[name], **changes)
        found = [compare(recipe, seed, pythons) for seed in seeds]
        rows.append(row_of(recipe, found))
        for library, own in rows[-1]["libraries"].items():
            print(
                f"{name}, {library}: {own['gap']['mean']:.4f} nats from the truth, "
                f"{own['steps_per_second']:.0f} steps/s; genjax takes "
                f"{own['ratio']['median']:.2f} of its time",
                flush=True,
            )
        write("flow_peers", {"seeds": list(seeds), "rows": rows})


if __name__ == "__main__":
    main()
