"""What fresh memory costs a step: the same programs with pages of 4 KiB, as they come, and with
huge ones.

XLA asks for a program's temporary memory anew at every dispatch. glibc takes pieces of tens of MiB
from the kernel each time and gives them back, and the kernel clears every page when it is touched
first; with pages of 2 MiB there are fewer to fault in. Which of the two a process has is fixed when
it starts, so each has a process of its own, and they are asked in turns.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import ratio, summary, write
from benchmarks.peers import alternate, ours
from benchmarks.processes import AskedProcess
from genjax.errors import ConfigError
from genjax.zoo import ZOO
from genjax.zoo.recipe import replace

ROWS = ("vae", "lstm", "transformer", "edm-mnist")
STEPS = 10  # a dispatch, where it is not one
HUGE = "glibc.malloc.hugetlb=1"  # glibc 2.35 and newer: large pieces of memory may have huge pages
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ROOT = Path(__file__).parents[1]


def check_kernel() -> None:
    """Processes have huge pages if they ask for them, which is what the kernel calls `madvise`.

    Raises:
        ConfigError: where asking makes no difference.
    """
    text = KERNEL.read_text() if KERNEL.exists() else "no such file"
    if "[madvise]" not in text:
        raise ConfigError(
            "pages compares processes that ask for huge pages with others, so it needs Linux with "
            f"`[madvise]` in {KERNEL}; "
            f"found: {text.strip()}. Choose another part, or set it as root: echo madvise > "
            f"{KERNEL}."
        )


def answer(name: str, changes: dict[str, Any]) -> None:
    """The program of each process: asked for a form of the step and a number of steps, it answers
    with the seconds and the page faults of one.
    """
    mine = ours(replace(ZOO[name], **changes), STEPS)
    print(
        json.dumps({"per_call": mine.per_call, "temporary_bytes": mine.cost["temporary_bytes"]}),
        flush=True,
    )
    for line in sys.stdin:
        form, steps = json.loads(line)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = mine.calls[form](steps)
        done = -(-steps // mine.per_call[form]) * mine.per_call[form]
        print(
            json.dumps(
                [seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / done]
            ),
            flush=True,
        )


def measure(name: str, seconds: float, block: float = 0.3, **changes: Any) -> dict[str, Any]:
    """Milliseconds (medians) and page faults (in the last round) of a step, one and several a
    dispatch, with both kinds of pages.
    """
    command = [sys.executable, "-m", "benchmarks.pages", name, json.dumps(changes)]
    inherited = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"} | {
        "PYTHONPATH": str(ROOT)
    }
    processes = {"as it is": AskedProcess(command, inherited)}
    processes["huge"] = AskedProcess(command, {**inherited, "GLIBC_TUNABLES": HUGE})
    about = json.loads(processes["huge"].greeting)
    faults: dict[str, float] = {}

    def call(label: str, process: AskedProcess, form: str, steps: int) -> float:
        took, faults[label] = json.loads(process.ask(json.dumps([form, steps])))
        return took

    calls: dict[str, Callable[[int], float]] = {}
    per_call: dict[str, int] = {}
    for form, k in about["per_call"].items():
        for pages, process in processes.items():
            label = f"{form}, {pages}"
            calls[label], per_call[label] = partial(call, label, process, form), k
    rounds = alternate(calls, per_call, seconds, block)
    for process in processes.values():
        process.close()
    forms = {
        form: {
            "ms": {
                pages: 1000 * summary(rounds[f"{form}, {pages}"])["median"] for pages in processes
            },
            "faults": {pages: faults[f"{form}, {pages}"] for pages in processes},
            "huge_to_plain": ratio(rounds[f"{form}, huge"], rounds[f"{form}, as it is"]),
        }
        for form in about["per_call"]
    }
    return {"recipe": name, "temporary_bytes": about["temporary_bytes"], "forms": forms}


def main(seconds: float = 20.0) -> None:
    """Measure and write results/pages.json; `seconds` for each row."""
    check_kernel()
    rows = []
    for name in ROWS:
        rows.append(measure(name, seconds))
        found = {
            form: {pages: round(ms, 1) for pages, ms in of["ms"].items()}
            for form, of in rows[-1]["forms"].items()
        }
        print(f"{name}: {found} ms a step", flush=True)
    write("pages", {"tunables": HUGE, "rows": rows})


if __name__ == "__main__":
    answer(sys.argv[1], json.loads(sys.argv[2]))
