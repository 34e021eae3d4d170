"""The program starts itself once more, under an allocator of memory with which a step on the CPU is
faster. Nothing heavy is imported here.
"""

import contextlib
import os
import sys
from collections.abc import Sequence

# Those that run many steps of training.
COMMANDS = ("train", "sweep", "bench")


def restart(args: Sequence[str]) -> None:
    """Become the same program in the environment that `allocators.better` gives, if it gives one.

    The process keeps its number, its files and its place in the terminal. What asks for help, or
    runs in a debugger, is left alone, as is a process that has imported jax: it has begun.

    Raises:
        ConfigError: where GENJAX_ALLOCATOR names one that does not exist or is not installed.
    """
    if not args or args[0] not in COMMANDS or {"-h", "--help"} & set(args):
        return
    if "jax" in sys.modules or sys.gettrace() is not None or not sys.executable:
        return
    from genjax.profiling import allocators

    env = allocators.better(*allocators.here())
    if env is not None:
        with contextlib.suppress(OSError):  # it is faster so, but not needed
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
