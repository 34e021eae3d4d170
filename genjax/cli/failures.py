"""What the program says of errors and warnings. Nothing heavy is imported here."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator

from genjax.cli.terminal import say
from genjax.errors import GenjaxError, MemoryExhausted, out_of_memory

_STEP = "Take a smaller --batch-size or more --microbatches, or --remat full where there is one."
# What makes the arrays of a command smaller; `train` and `sweep` say so themselves.
SMALLER = {
    "sample": "Draw fewer with --n, and several times with other seeds; of --beams take fewer.",
    "evaluate": "Take fewer at a time with --batch-size, or fewer in all with --n.",
    "bench": _STEP,
    "compile": _STEP,
}

_FITTING = (
    "Where it is installed, it must be of jax's own version, and the driver (`nvidia-smi`) no "
    "older than its CUDA"
)


def told(error: Exception, command: str) -> str | None:
    """What to say of an error that a user can meet; None for a defect, which keeps its traceback.

    Args:
        command: what was asked for: "train".
    """
    if isinstance(error, GenjaxError) and not isinstance(error, MemoryExhausted):
        return str(error)
    memory = out_of_memory(error)
    if memory is not None:
        text = str(error) if isinstance(error, MemoryExhausted) else f"Out of memory: {memory}."
        return f"{text} {SMALLER.get(command, '')}".rstrip()
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name]
        where = f"{' and '.join(names)}: " if names else ""
        return f"{where}{error.strerror or error}. What was saved before is still there."
    if isinstance(error, (RuntimeError, AssertionError)):
        return _no_backend(error)
    return None


def _no_backend(error: Exception) -> str | None:
    """What to do where jax has not the hardware that it was asked for; None for other errors."""
    reason, asked = " ".join(str(error).split()), os.environ.get("JAX_PLATFORMS")
    # An unknown plug-in ends in an assertion without a word, whose place jax may have filtered out.
    of_jax = "backend" in reason or (not reason and not _has_devices())
    if not (of_jax if asked else "Unable to initialize backend" in reason):
        return None
    said = f"{': ' * bool(reason)}{reason[:300]}"
    if not asked:
        return (
            f"jax has a plug-in for an accelerator that does not start{said}. {_FITTING}, or go on "
            "without it: JAX_PLATFORMS=cpu."
        )
    return (
        f"JAX_PLATFORMS={asked} asks for what jax does not find here{said}. Unset it to use what "
        "there is, or install the plug-in: pip install 'genjax-zoo[tpu]' or 'genjax-zoo[cuda]'. "
        f"{_FITTING}."
    )


def _has_devices() -> bool:
    """Whether jax finds any hardware as it was asked to."""
    import jax

    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


class _Warnings(logging.Handler):
    """Warnings of this package, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # such as a terminal that is gone
            say(f"genjax: warning: {record.getMessage()}", sys.stderr)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Have a terminal that has not all characters show the others as escapes, and warnings shown
    like errors. What was closed (`genjax list >&-`) takes everything and shows nothing.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logger, handler = logging.getLogger("genjax"), _Warnings(logging.WARNING)
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False  # a library may have set up another handler
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
