"""The errors that a user can meet. Each says what was expected, what was found, and what to do.

The command line prints these as one message and exits with 2; anything else is a defect and keeps
its traceback.
"""

import difflib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class GenjaxError(Exception):
    """The base of all errors that are addressed to the user."""


class ConfigError(GenjaxError, ValueError):
    """A name or setting that does not exist or does not fit."""


class DataError(GenjaxError, ValueError):
    """Data that are missing, damaged, or not what the spec says. The message names the file where
    there is one.
    """


class CheckpointError(GenjaxError, RuntimeError):
    """A checkpoint or run folder that cannot be written or read. What was there before is still
    there.
    """


class WriteError(CheckpointError):
    """A file beside the checkpoints that cannot be written: a picture, a report, the log."""


class MemoryExhausted(GenjaxError, MemoryError):
    """Arrays that do not fit. The message says which, and what makes them smaller."""


class NonFiniteError(GenjaxError, ArithmeticError):
    """A loss that is NaN or infinite. The message names the step and the player."""


class Interrupted(GenjaxError):
    """Training was told to stop by a signal, and has saved its state; `signal` is the signal's
    number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def first_line(error: Exception) -> str:
    """What an error of somebody else's says first, after its kind, without the full stop."""
    said = str(error).splitlines()
    return f"{type(error).__name__}: {said[0].rstrip('.') if said else 'it does not say why'}"


# How one comes to have what functions take first.
_SUCH_AS = {
    "DataSpec": "a DataSpec, such as source.spec",
    "Model": "a Model, such as vae(source.spec)",
    "Trained": "a trained model: Trained(model, params, state)",
    "Training": "a Training: training(model, tx)",
}


def expect(who: str, value: object, kind: type) -> None:
    """Refuse a value of another kind than DataSpec, Model, Trained or Training, as it is asked for.

    Raises:
        ConfigError: see above.
    """
    if not isinstance(value, kind):
        wanted = _SUCH_AS[kind.__name__]
        raise ConfigError(f"{who} takes {wanted}; got a {type(value).__name__}.")


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of any failure to write in here which file it was, as a `WriteError`: a full or read-only
    disk, above all.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"Could not write {os.fspath(path)}: {error.strerror or error}. Check the disk's space "
            "and permissions."
        ) from error


@contextmanager
def reading(
    path: str | os.PathLike[str], kind: type[GenjaxError] = CheckpointError
) -> Iterator[None]:
    """Say of any failure to read in here which file it was. That is no damage: what is there may be
    whole, and nothing must be thrown away or written in its place.

    Raises:
        GenjaxError: of that kind.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        raise kind(
            f"Could not read {os.fspath(path)}: {reason_of(error)}. Nothing was changed, and it "
            "need not be damaged: mend the cause (permissions, memory, a disk or network that does "
            "not answer) and run the same command again."
        ) from error


def reason_of(error: BaseException) -> str:
    """Why something failed, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError) and not str(error):
        return "there is not enough memory"
    return (str(error) or type(error).__name__).splitlines()[0][:600]


def out_of_memory(error: BaseException) -> str | None:
    """What asked for more memory than there is, as numpy and jax say it; None for other errors."""
    text = reason_of(error).rstrip(".")
    if isinstance(error, MemoryError):
        return text
    if isinstance(error, GenjaxError):  # which has said what it is
        return None
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    asked = re.search(r"(\d+) bytes|allocate ([\d.]+ ?[KMGT]i?B)", text)
    if asked is None:
        return text
    return f"an array or program asked for {asked[2] or in_words(int(asked[1]))} at once"


def in_words(size: int) -> str:
    """Bytes in the unit that suits them."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min(max(size.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{size / 1024**power:.{0 if power == 0 else 1}f} {units[power]}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` at the end: `path` is written
    whole or not at all.

    Raises:
        CheckpointError: if the disk does not take it; what was there before stays.
    """
    # A name that nobody can guess: in a folder of somebody else's, a link of that name may lead to
    # any file of one's own.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch(exist_ok=False)
            yield temporary
            synced(temporary)
            temporary.replace(path)
            synced(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def synced(path: Path) -> None:
    """Have the disk keep a file or a folder's entries, before what comes next relies on them.

    Raises:
        OSError: if it says that it has not.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # of a folder, where the system has no such thing
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
        # Some file systems have no such thing, above all of folders.
    finally:
        os.close(descriptor)


def regular_file(path: str | os.PathLike[str]) -> None:
    """Refuse what is no file to read: a folder, a device, or a pipe, which would wait for ever.

    Raises:
        DataError: with what it is.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # which whoever opens it says
        return
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    kinds |= {stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    for is_kind, called in kinds.items():
        if is_kind(mode):
            raise DataError(f"{os.fspath(path)} is {called}; expected a file.")


def unknown_name(what: str, name: str, names: Iterable[str]) -> ConfigError:
    """A `ConfigError` for a name that does not exist, with the nearest names that do."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(names)}."
    return ConfigError(f"There is no {what} called {name!r}. {hint}")
