"""Any folder under a name that every library takes.

Orbax looks for its own files with patterns, so that a folder `run[1]` loses them, and TensorStore
takes neither a backslash nor bytes that are no UTF-8. A link with a plain name, in a private folder
for temporary files, leads them to such a folder.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from genjax.errors import CheckpointError

PLAIN = re.compile(r"[A-Za-z0-9_./,=+@-]*")
LONGEST = 700  # characters, to which Orbax adds a hundred; a system may take no more than 1,024


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
    place = _private_folder(folder)
    link = place / "to"
    try:
        try:
            link.symlink_to(folder, target_is_directory=True)
        except (OSError, NotImplementedError) as error:
            raise _no_place(folder, f"a link to it cannot be made ({error})") from error
        yield link
    finally:
        with suppress(OSError):
            link.unlink(missing_ok=True)
            place.rmdir()


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
