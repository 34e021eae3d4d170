"""The files of a user's own folder: which of them are read."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from genjax.errors import DataError


def files_below(folder: str, endings: Sequence[str], above: tuple[Path, ...] = ()) -> Iterator[str]:
    """The paths of the files with some endings in a folder, and then of those in the folders below
    it, each in the order of their names; hidden files and folders are passed over.

    Links to folders are followed, as a class or a split may be one; but for those to a folder
    below the first, which is read as it is, or above it, so that loops end.

    Args:
        above: the real paths of the folders on the way to this one.

    Raises:
        DataError: for a folder that cannot be listed: a class or a split would be missing.
    """
    above = (*above, Path(os.path.realpath(folder)))
    _, inner, files = next(os.walk(folder, onerror=_unread))
    for name in sorted(files):
        if name.lower().endswith(tuple(endings)) and not is_hidden(name):
            yield os.path.join(folder, name)
    for name in sorted(inner):
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        again = os.path.islink(path) and Path(real).is_relative_to(above[0])
        if not is_hidden(name) and not again and not any(o.is_relative_to(real) for o in above):
            yield from files_below(path, endings, above)


def _unread(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}).")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name holds nothing of a user's: .ipynb_checkpoints, and what
    macOS puts beside files.
    """
    return name.startswith((".", "__MACOSX"))
