"""Seconds from the command to the first step of training, with an empty and with a filled cache of
compiled programs.

Every run is a process of its own, and every pair of a cold and a warm one has its own cache folder.
With one step a dispatch and every step logged, the first step is done when its values are in
metrics.jsonl; the run is then stopped.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import write

ROWS = ("vae", "transformer")
RUNS = 3
FLAGS = ("--steps-per-call", "1", "--log-every", "1")


def environment(cache: Path) -> dict[str, str]:
    """A user's environment, with a cache folder of its own; what the command would set for itself
    is left to it.
    """
    dropped = (
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
        "JAX_ENABLE_COMPILATION_CACHE",
    )
    kept = {
        name: value for name, value in os.environ.items() if name not in (*dropped, "XLA_FLAGS")
    }
    return {**kept, "XDG_CACHE_HOME": str(cache)}


def seconds_to_first_step(name: str, cache: Path, *flags: str) -> float:
    """Seconds from starting `genjax train NAME` until its log has the first step; it is then
    stopped and waited for.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "genjax", "train", name, "--out", str(out), *FLAGS, *flags]
        start = time.perf_counter()
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=environment(cache), text=True, **pipes)
        log = out / "metrics.jsonl"
        while not (log.exists() and log.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(
                    f"genjax train {name} ended before its first step: {process.communicate()[1]}"
                )
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        process.terminate()  # which saves a checkpoint and ends
        process.communicate()
        return seconds


def seconds_of_help() -> float:
    """Seconds that `genjax --help` takes as a process."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "genjax", "--help"], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def measure(runs: int, *flags: str) -> list[dict[str, Any]]:
    """Every row, cold and then warm, `runs` times each."""
    rows = []
    for name in ROWS:
        found: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(runs):
            with tempfile.TemporaryDirectory() as cache:
                for times in found.values():
                    times.append(seconds_to_first_step(name, Path(cache), *flags))
        rows.append({"command": f"genjax train {name}", **found})
        print(rows[-1], flush=True)
    return rows


def main(runs: int = RUNS) -> None:
    """Measure and write results/startup.json."""
    seconds_of_help()  # byte code is compiled once for good
    helped = [seconds_of_help() for _ in range(runs)]
    print(f"genjax --help: {statistics.median(helped):.2f} s", flush=True)
    write("startup", {"runs": runs, "rows": measure(runs), "help": helped})
