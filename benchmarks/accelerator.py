"""What genjax does on an accelerator, within nine minutes on one card: whether every family is
right there, how fast large models are, beside PyTorch on the same card, whether resume is bitwise,
and what members and dispatches cost.

    python -m benchmarks.accelerator                      all parts
    python -m benchmarks.accelerator scale torch          only these
    python -m benchmarks.accelerator --missing            rows that the file has no figures of
    python -m benchmarks.accelerator --small              what it does, at sizes for a CPU

It needs jax, flax, optax, orbax-checkpoint, chex, numpy and scipy; PyTorch, in this interpreter or
the one that $GENJAX_TORCH_PYTHON names, is compared where there is one. A part is rows, each a
function of its own: one that fails is written with its error, and one that would begin after its
part's share of the time is left for a call with --missing. results/accelerator.json is written
after every row.
"""

import argparse
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import accelerator_rows
from benchmarks.accelerator_rows import Row
from benchmarks.common import one_message, read, write
from genjax.errors import ConfigError
from genjax.runs.folder import environment

COMMAND = "python -m benchmarks.accelerator"
BUDGET = 480.0  # seconds in which rows begin; the last may take a minute more
# The share of it that each part has, and with it what the parts before left. PyTorch comes before
# the large models: this process keeps what memory it once had.
PARTS: dict[str, tuple[float, Callable[[bool], dict[str, Row]]]] = {
    "right": (130, accelerator_rows.right),
    "torch": (70, accelerator_rows.torch),
    "attention": (30, accelerator_rows.attention),
    "scale": (130, accelerator_rows.scale),
    "bitwise": (50, accelerator_rows.bitwise),
    "members": (70, accelerator_rows.members),
}


def driver() -> str:
    """The version of the first card's driver, where there is one to ask."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
        return told.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "none"


def begun(missing: bool, names: tuple[str, ...]) -> dict[str, Any]:
    """What the file has of this card and these versions, without what is to be measured anew."""
    there = read("accelerator")
    if there is None or any(there[key] != value for key, value in environment().items()):
        return {}
    if missing:
        return {name: part for name, part in there.items() if name != "date"}
    anew = {"date", *(names or PARTS)}
    seconds = {name: spent for name, spent in there["seconds"].items() if name not in anew}
    return {name: part for name, part in there.items() if name not in anew} | {"seconds": seconds}


def tried(row: Row) -> dict[str, Any]:
    """What a row gives, or its error."""
    try:
        return row()
    except Exception as error:  # of one row; the others go on
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def unknown(row: dict[str, Any] | None) -> bool:
    """Whether there is no figure of a row."""
    return row is None or "error" in row or "skipped" in row


def main(small: bool = False, names: tuple[str, ...] = (), missing: bool = False) -> dict[str, Any]:
    """Run the parts, or those that are named, and write results/accelerator.json after every row
    (of a small run nothing is written).

    Raises:
        ConfigError: where jax finds no accelerator, and for a part that does not exist.
    """
    if unknown_names := set(names) - set(PARTS):
        raise ConfigError(
            f"There is no part {', '.join(sorted(unknown_names))}. There are {', '.join(PARTS)}."
        )
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if platforms and "cpu" not in platforms.split(","):  # what values are compared with
        jax.config.update("jax_platforms", f"{platforms},cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is on the card too
    if not small and jax.default_backend() == "cpu":
        raise ConfigError(
            "jax finds no accelerator here: `python -c 'import jax; print(jax.devices())'` may say "
            f"why. `{COMMAND} --small` shows on a CPU what this does."
        )
    found = {} if small else begun(missing, names)
    found |= {"driver": driver(), "small": small, "seconds": found.get("seconds", {})}
    chosen = {name: PARTS[name] for name in PARTS if name in (names or PARTS)}
    whole = sum(seconds for seconds, _ in chosen.values())
    began, end = time.perf_counter(), 0.0
    for name, (seconds, rows_of) in chosen.items():
        end += seconds * BUDGET / whole
        start, before = time.perf_counter(), found["seconds"].get(name, 0.0)
        rows = found.setdefault(name, {})
        for title, row in rows_of(small).items():
            if not unknown(rows.get(title)):
                continue
            if time.perf_counter() - began > end:
                rows[title] = {"skipped": f"no time was left; `{COMMAND} --missing` measures it"}
                continue
            rows[title] = tried(row)
            print(f"{name}, {title}: {rows[title]}", flush=True)
            found["seconds"][name] = round(before + time.perf_counter() - start, 1)
            if not small:
                write("accelerator", found)
    if not small:
        write("accelerator", found)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--missing", action="store_true")
    given = parser.parse_args()
    with one_message():
        main(given.small, tuple(given.names), given.missing)
