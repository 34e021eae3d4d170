"""What fresh memory costs a step: the same programs under several allocators of memory, and under
settings of glibc's.

XLA asks for a program's temporary memory anew at every dispatch. glibc takes pieces of tens of MiB
from the kernel each time and gives them back, and the kernel clears every page when it is touched
first; with pages of 2 MiB there are fewer to fault in, and an allocator that keeps what was freed
has none. Which one a process has is fixed when it starts, so each has a process of its own, and
they are asked in turns.
"""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import in_turns, ratio, summary, write
from benchmarks.own_step import OwnStep, environments, filled
from genjax.errors import ConfigError, DataError, unknown_name
from genjax.zoo import ZOO, scale

STEPS = 10  # a dispatch, where it is not one
ROUNDS = 7
BLOCK = 1.0  # seconds of one turn, about: in 0.3 of them fast rows scatter by a fifth
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_KEPT = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_MAX_": "0"}
# Settings of glibc's, beside the allocators that are installed.
GLIBC: dict[str, dict[str, str]] = {
    # glibc 2.35 and newer: large pieces of memory may have huge pages.
    "huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "kept": _KEPT,
    "kept, padded": {**_KEPT, "MALLOC_TOP_PAD_": str(64 * 2**20)},
    "kept, one arena": {**_KEPT, "MALLOC_ARENA_MAX": "1"},
    "kept to 32 MiB": {
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "MALLOC_TOP_PAD_": str(64 * 2**20),
    },
}


def rows_here() -> tuple[str, ...]:
    """Every row but those that are meant for accelerators, and those that stand on a run."""
    large = {row.name for row in scale.ROWS}
    return tuple(name for name, row in ZOO.items() if row.first is None and name not in large)


def settings(cache: str) -> dict[str, dict[str, str]]:
    """The environments that are compared, by name; "default" comes first."""
    found = environments(cache)
    asks = KERNEL.exists() and "[madvise]" in KERNEL.read_text()
    own = {name: env for name, env in GLIBC.items() if asks or "GLIBC_TUNABLES" not in env}
    return {**found, **{name: {**found["default"], **env} for name, env in own.items()}}


def measure(
    name: str, rounds: int = ROUNDS, block: float = BLOCK, k: int = STEPS, **changes: Any
) -> dict[str, Any]:
    """Milliseconds of a step by the clock and of processors, page faults of a step, and the most
    memory of the process, under every setting, one and `k` steps a dispatch.
    """
    with tempfile.TemporaryDirectory() as cache:
        compared = settings(cache)
        about = filled(name, changes, k, compared["default"])
        steps = {one: OwnStep(name, changes, k, env) for one, env in compared.items()}
        found = {one: step.about["allocator"] for one, step in steps.items()}
        forms = {
            form: _form(steps, form, per_call, rounds, block)
            for form, per_call in about["per_call"].items()
        }
        for step in steps.values():
            step.close()
    return {
        "recipe": name,
        "temporary_bytes": about["cost"]["temporary_bytes"],
        "allocators": found,
        "forms": forms,
    }


def _form(
    steps: Mapping[str, OwnStep], form: str, per_call: int, rounds: int, block: float
) -> dict[str, Any]:
    """One form of the step under every setting, in turns."""
    for step in steps.values():
        step.seconds(form, per_call)  # warms up
    count = max(per_call, round(block / steps["default"].seconds(form, per_call)))
    spent: dict[str, list[float]] = {one: [] for one in steps}

    def timed(one: str, n: int) -> float:
        seconds = steps[one].seconds(form, n)
        spent[one].append(steps[one].last[form].processor_seconds)
        return seconds

    calls: dict[str, Callable[[int], float]] = {one: partial(timed, one) for one in steps}
    took = in_turns(calls, dict.fromkeys(steps, count), at_least=rounds)
    last = {one: step.last[form] for one, step in steps.items()}
    return {
        "ms": {one: 1000 * summary(of)["median"] for one, of in took.items()},
        "processor_ms": {one: 1000 * summary(of)["median"] for one, of in spent.items()},
        "faults": {one: of.faults for one, of in last.items()},
        "peak_bytes": {one: of.peak_bytes for one, of in last.items()},
        "to_default": {one: ratio(of, took["default"]) for one, of in took.items()},
        "processors_to_default": {one: ratio(of, spent["default"]) for one, of in spent.items()},
    }


def main(names: tuple[str, ...] = (), rounds: int = ROUNDS, block: float = BLOCK) -> None:
    """Measure and write results/pages.json, after each row: what was measured is there when a long
    run is stopped.

    Args:
        names: rows; those of `rows_here` unless given.
        rounds: turns of each setting.
        block: seconds of one turn, about.
    """
    for name in names:
        if name not in ZOO:
            raise unknown_name("recipe", name, ZOO)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name in names or rows_here():
        try:
            ZOO[name].source()
        except (ConfigError, DataError) as error:
            left_out[name] = str(error)
            print(f"{name} is left out: {error}", flush=True)
        else:
            rows.append(measure(name, rounds, block))
            for form, of in rows[-1]["forms"].items():
                found = ", ".join(f"{one} {ms:.1f}" for one, ms in of["ms"].items())
                print(f"{name}, {form}: {found} ms a step", flush=True)
        if rows:
            write("pages", {"glibc": GLIBC, "rounds": rounds, "rows": rows, "left_out": left_out})
