"""What tells a whole checkpoint from a damaged one: the SHA-256 of each of its files."""

import hashlib
import json
import os
from pathlib import Path

from genjax.errors import reading, reason_of

CHECKSUMS = "checksums.json"


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder. What cannot be looked into raises: `Path.rglob` would take it for
    empty.
    """

    def fail(error: OSError) -> None:
        raise error

    found = [Path(at) / name for at, _, names in os.walk(folder, onerror=fail) for name in names]
    return sorted(path for path in found if path.is_file())


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its name there."""
    found = {}
    for path in files_in(folder):
        if path != folder / CHECKSUMS:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            found[str(path.relative_to(folder))] = digest.hexdigest()
    return found


def damage_of(folder: Path, called: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: Orbax must only ever see files that are
    whole.

    Raises:
        CheckpointError: if they cannot be read, which says nothing of what they hold.
    """
    with reading(f"the checkpoint {called}"):
        try:
            found = checksums(folder)
            text = (folder / CHECKSUMS).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            return f"{CHECKSUMS} cannot be read ({error.strerror})"
    try:
        wanted = json.loads(text)
        bad = [name for name in wanted if found.get(name) != wanted[name]]
    except (ValueError, TypeError, RecursionError) as error:
        return f"{CHECKSUMS} cannot be read ({reason_of(error)})"
    if not wanted:
        return f"{CHECKSUMS} names no file"
    if not bad:
        return None
    return f"{bad[0]} {'holds other bytes than were saved' if bad[0] in found else 'is missing'}"
