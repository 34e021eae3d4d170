"""One process at a time trains in a run folder.

The lock is the operating system's (`flock`) on a file `.lock` in the folder, so that it ends with
its process, however that ends. What stands in the file is for the message: who has it.
"""

import contextlib
import errno
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from genjax.errors import CheckpointError, writing

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

NAME = ".lock"
# What file systems without such locks answer, above all those over a network.
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from training in a run folder, which is made if need be. Reading needs
    no lock.

    Args:
        say: what is told where the file system has no locks.

    Raises:
        CheckpointError: if another process trains there, naming it; or if the folder cannot be
            written.
    """
    path = folder / NAME
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquired(path, folder, say)
        try:
            _write(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is(descriptor, path):
                path.unlink()
        os.close(descriptor)


def _acquired(path: Path, folder: Path, say: Callable[[str], None]) -> int:
    """The descriptor of the lock's file, locked."""
    while True:
        # Never through a link: in a folder of somebody else's it may lead to a file of one's own.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EEXIST, "it is no file")
            if not _lock(descriptor):
                raise _taken(folder, _read(descriptor))
            if _is(descriptor, path):  # else the one before has just deleted it
                return descriptor
        except _Unsupported:
            _without_locks(descriptor, folder, say)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


class _Unsupported(Exception):
    """The file system has no locks."""


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours now."""
    if fcntl is None:
        raise _Unsupported
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _UNKNOWN:
            raise _Unsupported from None
        raise
    return True


def _without_locks(descriptor: int, folder: Path, say: Callable[[str], None]) -> None:
    """Refuse a process that is seen to run, and say that others are not seen."""
    owner = _read(descriptor)
    if owner.get("host") == socket.gethostname() and _runs(owner.get("process")):
        os.close(descriptor)
        raise _taken(folder, owner)
    by = f" (the last one there was {_named(owner)})" if owner else ""
    say(
        f"the file system of {folder} has no locks: see to it that no other process trains "
        f"there{by}"
    )


def _runs(process: Any) -> bool:
    if os.name != "posix" or type(process) is not int or process in (0, os.getpid()):
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _is(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        there, here = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)


def _write(descriptor: int) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    owner = {"host": socket.gethostname(), "process": os.getpid(), "started": started}
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(owner).encode())


def _read(descriptor: int) -> dict[str, Any]:
    """Who has the lock; nothing if it was written by nobody, or is being written."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        owner = json.loads(os.read(descriptor, 4096))
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _named(owner: dict[str, Any]) -> str:
    if owner.get("host") == socket.gethostname() and owner.get("process") == os.getpid():
        return "this very process"
    process, host = owner.get("process", "?"), owner.get("host", "?")
    return f"process {process} on {host}, since {owner.get('started', '?')}"


def _taken(folder: Path, owner: dict[str, Any]) -> CheckpointError:
    by = _named(owner) if owner else "another process"
    return CheckpointError(
        f"{folder} is in use: {by}, trains there. Nothing was changed. Wait for it or stop it, or "
        "give another folder with --out."
    )
