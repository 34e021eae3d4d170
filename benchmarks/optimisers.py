"""Loss on the validation split against steps and seconds, of Adam, Muon and schedule-free.

Each optimiser has the row's settings but for the algorithm and the step size, and schedule-free has
neither a schedule nor another average of weights. The step size is that with which the first seed
ends lowest, and then all seeds have it: of a few around the row's own, and of further ones as long
as the largest or the smallest is the best. Runs are made by the real program, one after the other,
and their seconds are those of training alone, without compiling and evaluating.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results_of_zoo
from benchmarks.common import RESULTS, over_seeds, write
from genjax.data import open_source
from genjax.errors import unknown_name
from genjax.runs import pictures
from genjax.runs.folder import read_json

# With the flags that go with it. AdamW is first: the others are held against it.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "adamw": (),
    "muon": (),
    "schedule-free": ("--schedule", "constant", "--ema-decay", "0"),
}
FACTORS = (0.5, 1.0, 2.0)  # of the row's own step size
TRIES = 5  # with the further ones
PICTURE = "optimisers.png"


class Task(NamedTuple):
    """What is trained: a row with flags, for so many steps, evaluated every so many."""

    recipe: str
    learning_rate: float
    steps: int
    every: int
    flags: tuple[str, ...] = ()


# By the names of the rows that they stand for; of GPT-2 it is a small sister.
TASKS = {
    "transformer-shakespeare": Task("transformer-shakespeare", 3e-3, 2_000, 100),
    "gpt2-124m": Task(
        "gpt2-124m",
        2e-3,
        1_000,
        50,
        (
            *("--d-model", "64", "--n-layers", "4", "--n-heads", "4", "--dtype", "float32"),
            *("--n-symbols", "512", "--length", "64", "--batch-size", "16"),
            *("--microbatches", "1", "--steps-per-call", "10", "--warmup-steps", "50"),
        ),
    ),
}


def run(task: Task, algorithm: str, factor: float, seed: int, keep: Path) -> dict[str, Any]:
    """One run: nats on validation by step, those of the truth, and the milliseconds of a step."""
    rate = f"{factor * task.learning_rate:g}"
    folder = keep / f"{task.recipe}-{algorithm}-{rate}_seed{seed}"
    every = str(task.every)
    flags = ["--algorithm", algorithm, "--learning-rate", rate, "--steps", str(task.steps)]
    flags += ["--evaluate-every", every, "--log-every", every, "--checkpoint-every", every]
    flags += ["--sample-every", "0", *task.flags, *ALGORITHMS[algorithm]]
    results_of_zoo.train(task.recipe, seed, folder, *flags)
    config = read_json(folder / "config.json")
    lines = pictures.read_metrics(folder / "metrics.jsonl")
    return curve(lines, config["schedule"]["batch_size"]) | {"truth": truth_of(config)}


def curve(lines: Sequence[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """What a run's log says: losses on the validation split, in nats of an example, by step, and
    the milliseconds of a step of training.
    """
    speed = f"{pictures.SPEED}examples_per_second"
    ms = [1000 * batch_size / line[speed] for line in lines if speed in line]
    steps, nats = [], []
    for line in lines:
        for name in line:
            if name.startswith("valid/"):
                steps.append(line["step"])
                nats.append(-line[name])
    return {"steps": steps, "nats": nats, "ms": statistics.median(ms) if ms else math.nan}


def searched(run: Callable[[float], dict[str, Any]]) -> tuple[float, dict[float, dict[str, Any]]]:
    """The best factor of the step size, and what was run: the best is none at an end of those that
    were tried, unless there were `TRIES`.
    """
    tried = {factor: run(factor) for factor in FACTORS}
    while True:
        # One that is not finite is no gain.
        ends = {
            factor: end if (end := of["nats"][-1]) < math.inf else math.inf
            for factor, of in tried.items()
        }
        best = min(ends, key=lambda factor: ends[factor])
        if best not in (min(tried), max(tried)) or len(tried) >= TRIES:
            return best, tried
        further = best / 2 if best == min(tried) else best * 2
        tried[further] = run(further)


def measure(name: str, seeds: Sequence[int], keep: Path) -> dict[str, Any]:
    """All optimisers on a task."""
    task = TASKS[name]
    found: dict[str, dict[str, Any]] = {}
    for algorithm in ALGORITHMS:
        best, first = searched(lambda factor: run(task, algorithm, factor, seeds[0], keep))
        runs = [first[best], *(run(task, algorithm, best, seed, keep) for seed in seeds[1:])]
        found[algorithm] = {
            "tried": {
                f"{factor * task.learning_rate:g}": first[factor]["nats"][-1]
                for factor in sorted(first)
            },
            "learning_rate": best * task.learning_rate,
            "final": over_seeds([of["nats"][-1] for of in runs]),
            "ms": statistics.median(of["ms"] for of in runs),
            "runs": runs,
        }
        mean = found[algorithm]["final"]["mean"]
        print(f"{name}, {algorithm}, {best:g} of the step size: {mean:.3f} nats", flush=True)
    reference = found["adamw"]["final"]["mean"]
    for of in found.values():
        of["steps_to_adam"] = steps_to(reference, of["runs"])
    truth = found["adamw"]["runs"][0]["truth"]
    return {"task": name, **task._asdict(), "algorithms": found, "truth": truth}


def steps_to(nats: float, runs: Sequence[dict[str, Any]]) -> int | None:
    """The first evaluation at which the mean over seeds is no more than so many nats, by step."""
    for index, step in enumerate(runs[0]["steps"]):
        if statistics.mean(of["nats"][index] for of in runs) <= nats:
            return step
    return None


def truth_of(config: dict[str, Any]) -> float | None:
    """What the true distribution has on a run's validation split, where it is known: few examples
    may have less than the entropy.
    """
    source = open_source(config["data"], **config["data_options"])
    if source.log_prob is None:
        return None
    return -float(source.log_prob(source.load().valid.x).mean())


def draw(tasks: Sequence[dict[str, Any]]) -> Path:
    """A row for each task, against steps and against seconds: a line for each seed."""
    picture = pictures.empty(9.0, 3.4 * len(tasks), layout="constrained")
    for row, of in enumerate(tasks):
        for column, label in enumerate(("steps", "seconds of training")):
            axes = picture.add_subplot(len(tasks), 2, 2 * row + column + 1)
            for color, (algorithm, found) in zip(
                pictures.COLORS, of["algorithms"].items(), strict=False
            ):
                for index, one in enumerate(found["runs"]):
                    factor = one["ms"] / 1000 if column else 1.0
                    x = [factor * step for step in one["steps"]]
                    axes.plot(x, one["nats"], color=color, label=None if index else algorithm)
            if of["truth"] is not None:
                axes.axhline(of["truth"], color="#888888", label="true distribution")
            axes.set_xlabel(label)
            axes.set_ylabel("nats, validation split")
            axes.set_title(of["task"], fontsize=9)
            axes.legend(frameon=False)
    return pictures.save(picture, RESULTS / PICTURE)


def main(names: Sequence[str], seeds: Sequence[int], keep: Path | None = None) -> None:
    """Measure, write results/optimisers.json after each task, and draw results/optimisers.png; runs
    that are in `keep` already are not trained again.
    """
    for name in names:
        if name not in TASKS:
            raise unknown_name("task", name, TASKS)
    tasks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or TASKS:
            tasks.append(measure(name, list(seeds), keep or Path(scratch)))
            write("optimisers", {"seeds": list(seeds), "tasks": tasks})
            print(f"written: {draw(tasks)}", flush=True)
