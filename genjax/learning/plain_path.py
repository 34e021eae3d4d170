"""Any folder under a name that every library takes.

Orbax looks for its own files with patterns, so that a folder `run[1]` loses them, and TensorStore
takes neither a backslash nor bytes that are no UTF-8. A link with a plain name, in a private folder
for temporary files, leads them to such a folder.
"""

import atexit
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from genjax.errors import CheckpointError
from genjax.learning.distributed import agreed, several

PLAIN = re.compile(r"[A-Za-z0-9_./,=+@-]*")
LONGEST = 700  # characters, to which Orbax adds a hundred; a system may take no more than 1,024
_links: dict[Path, Path] = {}  # of several processes, which last until they end


def is_plain(path: str | os.PathLike[str]) -> bool:
    """Whether a path means the same to every library."""
    text = os.fspath(path)
    return len(text) <= LONGEST and PLAIN.fullmatch(text) is not None


@contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """The folder itself where its path is plain, and otherwise a link to it, for as long as this
    lasts.

    Raises:
        CheckpointError: if there is no place for such a link.
    """
    if is_plain(folder):
        yield folder
        return
    if several():
        yield _shared_link(folder)
        return
    link = _private_folder(folder) / "to"
    try:
        _make(link, folder)
        yield link
    finally:
        _remove(link)


def _shared_link(folder: Path) -> Path:
    """A link of the same name on every process, which Orbax asks for, until they end: nobody knows
    when the others are done with it.
    """
    if folder not in _links:
        link = Path(agreed(lambda: str(_private_folder(folder) / "to")))
        _make(link, folder)
        atexit.register(_remove, link)
        _links[folder] = link
    return _links[folder]


def _make(link: Path, folder: Path) -> None:
    try:
        link.parent.mkdir(mode=0o700, exist_ok=True)  # that of process 0 may be on another machine
        with suppress(FileExistsError):  # or on this one
            link.symlink_to(folder, target_is_directory=True)
        if os.readlink(link) != str(folder):
            raise OSError("another one is there")
    except (OSError, NotImplementedError) as error:
        raise _no_place(folder, f"a link to it cannot be made ({error})") from error


def _remove(link: Path) -> None:
    with suppress(OSError):
        link.unlink(missing_ok=True)
        link.parent.rmdir()


def _private_folder(folder: Path) -> Path:
    places = ["/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~")]
    with suppress(OSError):  # where it can write nowhere
        places.insert(0, tempfile.gettempdir())
    for place in filter(is_plain, places):
        with suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="genjax-", dir=place))
    raise _no_place(folder, "there is no folder for temporary files with a plain name either")


def _no_place(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"Checkpoints in {folder} need a link with a plain name, because its path is long or has "
        f"characters other than letters, digits and _ . , = + @ -, and {reason}. Set TMPDIR to a "
        "folder that can be written, or give another run folder with --out."
    )
