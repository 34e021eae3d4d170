"""makemore's Transformer, trained in PyTorch by its own settings on the 30,033 names that our rows
have.

makemore (Karpathy 2022) publishes 1.92 nats per character for 1,000 test names of a split of its
own, at the best step on those very names. Two sets of 1,000 names differ by 0.02 nats, so what its
model reaches on the split of `genjax.data.names` is
measured here: the best step is chosen on the validation names, as a fair peer would, and the test
    names are looked at once.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import over_seeds, write
from genjax.data import Source, open_source
from genjax.errors import ConfigError
from genjax.protocol import step_mask

STEPS = 30_000


def lines(source: Source) -> dict[str, np.ndarray]:
    """The splits as the twin reads them: tokens [N, T], -1 after the end token."""
    splits = source.load()._asdict()
    return {
        name: np.where(
            np.asarray(step_mask(source.spec, batch)), np.asarray(batch.x).astype(np.int64), -1
        )
        for name, batch in splits.items()
    }


def twin(python: str, source: Source, seeds: list[int], steps: int) -> Iterator[dict[str, Any]]:
    """What makemore's Transformer reaches, one seed after the other."""
    script = str(Path(__file__).with_name("torch_makemore.py"))
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "names.npz"
        np.savez(data, **lines(source))  # type: ignore[arg-type]
        for seed in seeds:
            command = [python, script, str(data), str(steps), str(seed)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            run = {"seed": seed, **json.loads(answer.splitlines()[-1])}
            print(
                f"makemore's Transformer, seed {seed}: test {run['test']:.4f}, best step "
                f"{run['best_step']}",
                flush=True,
            )
            yield run


def main(seeds: list[int]) -> None:
    """Measure the twin, and write results/makemore.json after each seed; the report puts it beside
    our rows' results.

    Raises:
        ConfigError: without an interpreter that has PyTorch.
    """
    python = os.environ.get("GENJAX_TORCH_PYTHON", "")
    if not python:
        raise ConfigError("Set GENJAX_TORCH_PYTHON to an interpreter with torch==2.13.0.")
    runs: list[dict[str, Any]] = []
    for run in twin(python, open_source("names"), seeds, STEPS):
        runs.append(run)
        write(
            "makemore", {"steps": STEPS, "runs": runs, **over_seeds([run["test"] for run in runs])}
        )
