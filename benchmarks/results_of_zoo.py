"""Train every row of the zoo with several seeds, evaluate on its test split, and write
genjax/zoo/results.json.

`genjax list` and the README's table read that file, so no figure in them is typed by hand. Rows
whose data are not on this machine keep what was measured before. Runs are made by the real program,
one after the other, on an otherwise idle machine.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from genjax.data import Source
from genjax.errors import GenjaxError
from genjax.runs.folder import environment, write_json
from genjax.runs.pictures import read_metrics
from genjax.zoo import ZOO, catalogue

# Only so many test examples, the first, of rows whose estimator takes a second or more for each.
FIRST = {"flow-matching-mnist": 500}
PATH = catalogue.FOLDER / "results.json"


def train(name: str, seed: int, folder: Path, *flags: str) -> float:
    """Train one row through the command line, or find it trained; the seconds of its training."""
    command = [
        sys.executable,
        "-m",
        "genjax",
        "train",
        name,
        "--seed",
        str(seed),
        "--out",
        str(folder),
        *flags,
    ]
    cold = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }  # the time of a first run, with what compiling takes
    subprocess.run(command, check=True, env=cold)
    return read_metrics(folder / "metrics.jsonl")[-1]["seconds"]


def evaluate(folder: Path, steps: int) -> dict[str, Any]:
    """The report on a run's test split, made through the command line unless it is there."""
    path = folder / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    if (report.get("split"), report.get("step"), report.get("seed")) != ("test", steps, 0):
        first = FIRST.get(json.loads((folder / "config.json").read_text())["recipe"])
        some = [] if first is None else ["--n", str(first)]
        subprocess.run([sys.executable, "-m", "genjax", "evaluate", str(folder), *some], check=True)
        report = json.loads(path.read_text())
    return report


def run_row(name: str, seeds: list[int], keep: Path | None) -> dict[str, Any]:
    """Train and evaluate one row with each seed through the command line."""
    reports, seconds = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            place = keep or Path(scratch)
            folder = place / f"{name}_seed{seed}"
            seconds.append(train(name, seed, folder, *first_stage(name, seed, place)))
            reports.append(evaluate(folder, ZOO[name].schedule.steps))
    means = [report["mean"] for report in reports]
    first = reports[0]
    result = {
        "mean": statistics.mean(means),
        "sd": statistics.stdev(means) if len(means) > 1 else None,
        "by_seed": means,
        "standard_error": max(
            (r["standard_error"] for r in reports if r["standard_error"] is not None), default=None
        ),
        "seeds": seeds,
        **{
            key: first[key]
            for key in (
                "data",
                "unit",
                "kind",
                "estimator",
                "split",
                "n",
                "step",
                "versions",
                "hardware",
            )
        },
        "train_seconds": _spread(seconds),
        "evaluate_seconds": _spread([report["seconds"] for report in reports]),
    }
    for key in ("bits_per_dim", "true_log_prob"):
        if key in first:
            values = [r[key] if key == "bits_per_dim" else r[key]["mean"] for r in reports]
            result[key] = statistics.mean(values)
    if "per_step" in first:
        nats = [report["per_step"]["nats"] for report in reports]
        result["per_step"] = {
            "step": first["per_step"]["step"],
            "nats": statistics.mean(nats),
            "sd": statistics.stdev(nats) if len(nats) > 1 else None,
            "by_seed": nats,
            "standard_error": max(report["per_step"]["standard_error"] for report in reports),
            "n": first["per_step"]["n"],
        }
    if "figures" in first:
        result["figures"] = [
            over_seeds([report["figures"][index] for report in reports])
            for index in range(len(first["figures"]))
        ]
    return result


def first_stage(name: str, seed: int, place: Path) -> list[str]:
    """The flags that name the run which a row stands on, trained with the same seed; none for most
    rows.
    """
    first = ZOO[name].first
    if first is None:
        return []
    folder = place / f"{first}_seed{seed}"
    train(first, seed, folder, *first_stage(first, seed, place))
    return ["--data", str(folder)]


def source_of(name: str) -> Source:
    """The data that a row, or the row that it stands on, is trained on."""
    first = ZOO[name].first
    return ZOO[name].source() if first is None else source_of(first)


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(seconds), "max": max(seconds)}


def over_seeds(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """One figure about samples as mean and sd over seeds, with what it is."""
    values, real = (
        [figure["value"] for figure in figures],
        [f["real"] for f in figures if f["real"] is not None],
    )
    kept = ("name", "unit", "estimator", "n", "n_reference")
    return {key: figures[0][key] for key in kept} | {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "by_seed": values,
        "real": statistics.mean(real) if real else None,
    }


def main(names: list[str], seeds: list[int], keep: Path | None = None) -> None:
    """Measure the rows named, or all, and merge them into genjax/zoo/results.json; and count every
    model again, into genjax/zoo/models.json.
    """
    results = json.loads(PATH.read_text())
    for name in names or list(ZOO):
        try:
            source_of(name).load()
        except GenjaxError as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
            continue
        results[name] = run_row(name, seeds, keep)
        print(
            f"{name}: {results[name]['mean']:.3f} (by seed {results[name]['by_seed']})", flush=True
        )
        write_json(PATH, {row: results[row] for row in ZOO if row in results})
    catalogue.write()
    print(f"written: {PATH}, on {environment()['hardware']}; {catalogue.PATH}")
