"""Several processes that train one model together: every process of a cluster runs the same
command.

    start()                                  # before anything else of jax
    train(recipe, folder, mesh={"data": 8})  # the mesh holds the devices of all processes

A cluster that jax recognises needs no arguments of `start`.

Process 0 alone writes what a person reads; checkpoints are written by all of them, into one folder.
What processes must agree on, such as whether a file is there, process 0 finds out and tells the
others (`agreed`): two that go different ways would wait for each other. With one process everything
here does nothing.

What jax does when a process dies: without process 0 the others are ended at once (SIGABRT); without
another one the rest may wait for it, and are ended when it has given no sign of life for 100 s. One
that stops with an error of its own waits `SHUTDOWN` seconds for the others, and all are ended then.
Start all of them again, and they go on from the last whole checkpoint.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from genjax import errors
from genjax.errors import ConfigError, GenjaxError
from genjax.settings import is_size

TIMEOUT = 300  # seconds that jax waits for all processes to start, and then ends those that did
SHUTDOWN = 30  # seconds that a process which ends waits for the others, before jax ends them
# seconds that processes wait for one that compiles, draws or reads; jax notices before then if it
# has died
MEETING = 3600
_meetings = itertools.count()  # each has a name of its own, the same on all processes


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Join the other processes; to be called before jax touches a device. What is left out comes
    from the environment.

    Args:
        coordinator: "host:port" of process 0, the port being free; else $JAX_COORDINATOR_ADDRESS,
            else what jax finds on a cluster that it recognises (Slurm, Open MPI, Cloud TPU,
            Kubernetes).
        processes: how many there are; else $JAX_NUM_PROCESSES, else as above.
        process: which of them this is, from 0; else $JAX_PROCESS_ID, else as above.

    Raises:
        ConfigError: if one of the three is not known or does not fit, or the coordinator's port is
            taken.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process = _number("JAX_PROCESS_ID") if process is None else process
    host, _, port = ("host", ":", "1") if coordinator is None else coordinator.rpartition(":")
    if not (host and is_size(port) and 0 < int(port) < 2**16):
        raise ConfigError(
            f"A coordinator is written as host:port, such as 10.0.0.1:1234; got {coordinator!r}."
        )
    if processes is not None and processes < 1:
        raise ConfigError(f"There must be at least 1 process; got --processes {processes}.")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(
            f"The {processes} processes are numbered from 0 to {processes - 1}; got --process "
            f"{process}."
        )
    # Of those that do not come jax ends the process, with a trace of its own: say first what it is
    # waiting for.
    who = f"process {'?' if process is None else process} of {processes or '?'}"
    print(
        f"genjax: {who} joins the others at {coordinator or 'the coordinator that jax finds'}",
        file=sys.stderr,
        flush=True,
    )
    try:
        # The collectives of a CPU are jax's own choice, gloo.
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except (ValueError, TypeError, KeyError) as error:  # where jax recognises no cluster
        known = {
            "--coordinator HOST:PORT": coordinator,
            "--processes N": processes,
            "--process I": process,
        }
        missing = [flag for flag, value in known.items() if value is None]
        if not missing:
            raise ConfigError(f"These processes cannot be joined: {error}") from error
        raise ConfigError(
            f"--distributed found no cluster that jax recognises; give {', '.join(missing)} too, "
            "or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. The number of a "
            "process is its own, from 0; the rest is the same for all."
        ) from error
    except RuntimeError as error:
        raise ConfigError(
            f"The processes cannot be joined at {coordinator or 'the coordinator'}: "
            f"{str(error).splitlines()[0][:300]}. The coordinator is process 0, on a port that is "
            "free there and can be reached from the others."
        ) from error


def _number(name: str) -> int | None:
    """A whole number from the environment; None if it is not set."""
    text = os.environ.get(name, "")
    if text and not is_size(text):
        raise ConfigError(f"${name} must be a whole number; got {text!r}.")
    return int(text) if text else None


def several() -> bool:
    """Whether there are other processes than this one."""
    return jax.process_count() > 1


def writes() -> bool:
    """Whether this is the process that writes: process 0, or the only one."""
    return jax.process_index() == 0


def agreed(find: Callable[[], Any]) -> Any:
    """What `find()` returns on process 0, as JSON, on every process; no other process calls it.

    It also is a barrier: nobody goes on before process 0 is done.

    Raises:
        Exception: what `find` raises, on process 0; on the others the same where it is a
            GenjaxError, or one of its text.
    """
    if not several():
        return find()
    answer, failure = {}, None
    if writes():
        try:
            answer = {"value": find()}
        except Exception as error:
            answer, failure = {"error": type(error).__name__, "text": str(error)}, error
    data = json.dumps(answer).encode()
    meet()
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    padded = np.zeros(-(-size // 1024) * 1024, np.uint8)  # few sizes, since each is compiled
    if writes():
        padded[:size] = np.frombuffer(data, np.uint8)
    answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes())
    if failure is not None:
        raise failure
    if "error" in answer:
        raise getattr(errors, answer["error"], GenjaxError)(answer["text"])
    return answer["value"]


def all_passed(check: Callable[[], None]) -> None:
    """Run a check on every process; nobody goes on before all have passed it.

    Raises:
        Exception: what the check raises, where it does; on the others a CheckpointError that names
            the processes.
    """
    failure = None
    try:
        check()
    except Exception as error:
        failure = error
    if several():
        meet()
        failed = multihost_utils.process_allgather(np.asarray(failure is not None))
        who = ", ".join(map(str, np.flatnonzero(failed)))
        if who and failure is None:
            raise errors.CheckpointError(f"it did not read back on process {who}, which says why")
    if failure is not None:
        raise failure


def meet() -> None:
    """Wait until every process is here, without the devices.

    At the first sum of a program over the processes of a CPU gloo waits 30 s for them and then
    fails: for one that compiles, or reads a file, that is little. Those that have met once may keep
    each other waiting.
    """
    if several():
        multihost.get_barrier_sync_fn()(key=f"genjax{next(_meetings)}", timeout_ms=MEETING * 1000)


def compile_together(program: Any, *args: Any) -> None:
    """Compile a jitted program on every process before any of them runs it; see `meet`."""
    if several():
        program.lower(*args).compile()  # jit keeps it for the call
        meet()


def check_shared(path: Path) -> None:
    """Refuse a run folder of one's own.

    Raises:
        ConfigError: if this process does not see a file that process 0 does.
    """
    if not path.is_file():
        raise ConfigError(
            f"Process {jax.process_index()} does not see {path.absolute()}, which process 0 has "
            "written. All processes need one folder that each of them sees; give it with --out."
        )


def whole(tree: Any) -> Any:
    """Arrays that lie on all processes as arrays of this one, whole: to score and draw with on
    process 0.

    All processes must call it, and each must have room for what it gathers.
    """
    if not several():
        return tree
    return jax.device_put(multihost_utils.process_allgather(tree, tiled=True))


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """A function that says, called once a dispatch by every process, whether to stop now: SIGTERM,
    or 0.

    jax's own handler notes the SIGTERM of any process, and all of them stop at the same later call.
    SIGINT counts as SIGTERM.
    """
    calls = itertools.count()

    def caught() -> int:
        reached = multihost_utils.reached_preemption_sync_point(next(calls))
        return signal.SIGTERM if reached else 0

    before = signal.signal(
        signal.SIGINT, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)
    )
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
