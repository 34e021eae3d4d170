"""The benchmark of optimisers: what it searches, reads and reports."""

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common, optimisers, report_results


@pytest.mark.slow
@pytest.mark.tools
def test_optimisers_are_compared_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(optimisers, "RESULTS", tmp_path)
    monkeypatch.setattr(optimisers, "FACTORS", (1.0,))
    monkeypatch.setattr(optimisers, "TRIES", 1)
    small = ("--d-model", "4", "--n-layers", "1", "--n-heads", "2", "--dtype", "float32")
    small += ("--n-symbols", "16", "--length", "8", "--n-train", "64", "--batch-size", "4")
    small += ("--microbatches", "1", "--steps-per-call", "2", "--warmup-steps", "2")
    task = optimisers.Task("gpt2-124m", 1e-2, 8, 4, small)
    monkeypatch.setattr(optimisers, "TASKS", {"gpt2-124m": task})
    optimisers.main((), [0], tmp_path / "runs")
    found = common.read("optimisers")
    assert found is not None
    (of,) = found["tasks"]
    for algorithm in ("adamw", "muon", "schedule-free"):
        (run,) = of["algorithms"][algorithm]["runs"]
        assert run["steps"] == [4, 8]
        assert min(run["nats"]) > of["truth"] > 0
        assert of["algorithms"][algorithm]["tried"] == {"0.01": run["nats"][-1]}
    curves = {tuple(found["runs"][0]["nats"]) for found in of["algorithms"].values()}
    assert len(curves) == 3
    assert of["algorithms"]["adamw"]["steps_to_adam"] in (4, 8)
    assert (tmp_path / "optimisers.png").stat().st_size > 10_000
    text = "\n".join(report_results.optimiser_parts(found))
    assert text.count("| `gpt2-124m` |") == 3


@pytest.mark.parametrize(
    ("lowest", "best", "tried"),
    [
        (1.0, 1.0, [0.5, 1.0, 2.0]),
        (4.0, 4.0, [0.5, 1.0, 2.0, 4.0, 8.0]),
        (1e9, 8.0, [0.5, 1.0, 2.0, 4.0, 8.0]),  # five were tried
        (0.25, 0.25, [0.125, 0.25, 0.5, 1.0, 2.0]),
    ],
)
def test_a_step_size_is_searched_until_it_is_between_others(
    lowest: float, best: float, tried: list[float]
) -> None:
    def ends(factor: float) -> dict[str, Any]:
        far = abs(math.log(factor / lowest))
        return {"nats": [0.0, math.nan if factor == 2.0 and lowest == 1.0 else far]}

    found, runs = optimisers.searched(ends)
    assert found == best
    assert sorted(runs) == tried


def test_a_curve_is_read_from_a_log() -> None:
    lines = [
        {"step": 5, "speed/examples_per_second": 400.0, "vae/loss": 9.0},
        {"step": 10, "speed/examples_per_second": 200.0, "valid/log_prob": -7.0},
    ]
    found = optimisers.curve(lines, 8)
    assert found == {"steps": [10], "nats": [7.0], "ms": 30.0}
    runs = [{"steps": [5, 10], "nats": [4.0, 1.0]}, {"steps": [5, 10], "nats": [2.0, 2.0]}]
    assert optimisers.steps_to(3.0, runs) == 5
    assert optimisers.steps_to(1.6, runs) == 10
    assert optimisers.steps_to(1.0, runs) is None
