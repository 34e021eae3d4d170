"""genjax's own step, timed: in this process, or in one of its own under an allocator.

    python -m benchmarks.own_step NAME '{"d_hidden": 512}' 10

is the program of such a process: asked for a form of the step and a number of steps, it answers
with what one of them takes.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.common import in_turns
from benchmarks.processes import AskedProcess
from genjax.data import example_batch
from genjax.learning.transforms import compiled, scan_steps
from genjax.profiling import allocators
from genjax.profiling.measure import cost_of, stepper
from genjax.protocol import Training
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, replace

ROOT = Path(__file__).parents[1]


class Ours(NamedTuple):
    """genjax's step: seconds per step of so many, compile seconds, and what the program of one step
    takes.
    """

    calls: dict[str, Callable[[int], float]]
    per_call: dict[str, int]
    compile_seconds: float
    cost: dict[str, float]


def ours(recipe: Recipe, k: int | None = None) -> Ours:
    """The row's training procedure on one resident batch, one step a dispatch and k; those of its
    own schedule if None.
    """
    k = k or recipe.schedule.steps_per_call
    spec = recipe.source().spec
    one = recipe.training(spec)
    batch = example_batch(spec, jax.random.key(1), recipe.schedule.batch_size)

    def compile_one(t: Training, batch: Any) -> tuple[Any, float]:
        state = jax.eval_shape(t.init, jax.random.key(0))
        start = time.perf_counter()
        program = jax.jit(t.step, donate_argnums=0).lower(state, batch).compile()
        return program, time.perf_counter() - start

    def timed(t: Training, program: Any, batch: Any, per_call: int) -> Callable[[int], float]:
        call = stepper(program, compiled(t).init(jax.random.key(0)), batch)

        def seconds(steps: int) -> float:
            calls = -(-steps // per_call)
            start = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(call())
            return (time.perf_counter() - start) / (calls * per_call)

        return seconds

    program, compile_seconds = compile_one(one, batch)
    names = ("one step a dispatch", f"{k} steps a dispatch")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * k), batch)
    calls = {
        names[0]: timed(one, program, batch, 1),
        names[1]: timed(scan_steps(one), compile_one(scan_steps(one), stacked)[0], stacked, k),
    }
    flops, temporary = cost_of(program)
    cost = {
        "flops": flops,
        "bytes_accessed": float(
            (program.cost_analysis() or {}).get("bytes accessed", math.nan)
        ),  # loops once
        "temporary_bytes": temporary,
        "argument_bytes": program.memory_analysis().argument_size_in_bytes,
    }
    return Ours(calls, dict(zip(names, (1, k), strict=True)), compile_seconds, cost)


def alternate(
    calls: dict[str, Callable[[int], float]], per_call: dict[str, int], seconds: float, block: float
) -> dict[str, list[float]]:
    """Seconds per step of several programs in turns of about `block` seconds, five rounds at least.

    Each call runs a number of steps and gives its seconds per step.
    """
    steps = {}
    for name, call in calls.items():
        least = per_call.get(name, 1)
        call(least)  # compile and warm up
        steps[name] = max(least, round(block / call(least)))
    return in_turns(calls, steps, seconds)


class Answer(NamedTuple):
    """What a step took, a mean over those asked for: seconds by the clock and of processors, page
    faults; and the most memory that the process has had by then, in bytes.
    """

    seconds: float
    processor_seconds: float
    faults: float
    peak_bytes: int


def answer(name: str, changes: dict[str, Any], k: int | None) -> None:
    """The program of a process of its own; see the top of this file."""
    mine = ours(replace(ZOO[name], **changes), k)
    about = {
        "per_call": mine.per_call,
        "compile_seconds": mine.compile_seconds,
        "cost": mine.cost,
        "allocator": allocators.in_use(),
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        form, steps = json.loads(line)
        before = resource.getrusage(resource.RUSAGE_SELF)
        seconds = mine.calls[form](steps)
        after = resource.getrusage(resource.RUSAGE_SELF)
        done = -(-steps // mine.per_call[form]) * mine.per_call[form]
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        faults = (after.ru_minflt - before.ru_minflt) / done
        print(json.dumps(Answer(seconds, spent / done, faults, 1024 * after.ru_maxrss)), flush=True)


class OwnStep:
    """A row's step in a process with an environment of its own; `about` is what it says of itself,
    `last` its latest answer by form.
    """

    def __init__(
        self, name: str, changes: Mapping[str, Any], k: int | None, env: Mapping[str, str]
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.own_step", name, json.dumps(dict(changes))]
        command += [str(k)] * (k is not None)
        self.process = AskedProcess(command, {**env, "PYTHONPATH": str(ROOT)})
        self.about = json.loads(self.process.greeting)
        self.last: dict[str, Answer] = {}

    def seconds(self, form: str, steps: int) -> float:
        """Seconds of a step, a mean over so many."""
        self.last[form] = Answer(*json.loads(self.process.ask(json.dumps([form, steps]))))
        return self.last[form].seconds

    def close(self) -> None:
        """End the process."""
        self.process.close()


def filled(
    name: str, changes: Mapping[str, Any], k: int | None, env: Mapping[str, str]
) -> dict[str, Any]:
    """What a row's step says of itself where it is compiled; the others, which are compared, then
    all find their programs in the same cache.
    """
    step = OwnStep(name, changes, k, env)
    step.close()
    return step.about


def environments(cache: str) -> dict[str, dict[str, str]]:
    """The environments that are compared, by the allocators' names: "default", and each of
    `allocators.LIBRARIES` that is installed. Programs are compiled once for all, in `cache`.
    """
    dropped = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    plain |= {
        allocators.SETTING: "default",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    libraries = allocators.installed(allocators.folders(os.environ))
    return {"default": plain} | {
        name: allocators.under(name, plain, libraries) for name in libraries
    }


if __name__ == "__main__":
    answer(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else None)
