"""Files of published data sets: where they are looked for, and whether they are the published
ones.
"""

import hashlib
import os
from pathlib import Path

from genjax.data.idx import read_bytes
from genjax.errors import DataError


def read_published(name: str, file: str, sha256: str, path: str | None) -> tuple[bytes, str]:
    """The decompressed bytes of the one file of a data set, checked against their hash, and where
    it was found.

    Args:
        name: the data set, for messages.
        file: the file within its folder, such as "tinyshakespeare/input.txt".
        sha256: of the decompressed bytes.
        path: the file, or a folder that has it, and then the only place; without it, $GENJAX_DATA.

    Raises:
        DataError: for a file that is missing, damaged, or not the published one.
    """
    root = os.environ.get("GENJAX_DATA") or None if path is None else path
    roots = [] if root is None else [Path(root)]
    # With its folder first, which says which data set it is.
    places = [place for root in roots for place in (root / file, root / Path(file).name)]
    places = [zipped for place in places for zipped in (place, place.with_name(place.name + ".gz"))]
    places = roots if path is not None and Path(path).is_file() else places
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        looked = f"Looked in {root}." if roots else "Looked in no place, as GENJAX_DATA is not set."
        raise DataError(
            f"The file of {name} was not found ({file}; plain or .gz). {looked} "
            "Set GENJAX_DATA to a folder that has it, or give path=."
        )
    data = read_bytes(found)
    hashed = hashlib.sha256(data).hexdigest()
    if hashed != sha256:
        raise DataError(
            f"{found}: not the published file of {name}: expected SHA-256 {sha256} of the "
            f"decompressed bytes, found {hashed}. "
            f"Fetch it again; a file of your own is opened by its path in place of the name {name}."
        )
    return data, str(found)
