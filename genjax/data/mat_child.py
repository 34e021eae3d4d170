"""A MATLAB file read in a process of its own: standard input to standard output.

scipy's reader is C code that a damaged file can crash, and with it whatever runs in the same
process. This is a program, which imports nothing of genjax, and writes an .npz archive: under
"names" the variables that the file has and whether each is a cell array, and under "NAME:i" its
cells, or under "NAME" the variable itself.
"""

import io
import sys
from typing import Any

import numpy as np
import scipy.io


def main() -> None:
    found = scipy.io.loadmat(io.BytesIO(sys.stdin.buffer.read()))
    arrays: dict[str, Any] = {}
    names = []
    for name, value in found.items():
        if name.startswith("__"):
            continue
        cells = isinstance(value, np.ndarray) and value.dtype == object
        names.append([name, "cells" if cells else "array"])
        parts = enumerate(value.ravel()) if cells else [(None, value)]
        for index, part in parts:
            plain = isinstance(part, np.ndarray) and part.dtype.kind in "buifcU"
            key = name if index is None else f"{name}:{index}"
            arrays[key] = part if plain else np.asarray(f"no numbers: {type(part).__name__}")
    out = io.BytesIO()
    np.savez(out, names=np.asarray(names, str).reshape(-1, 2), **arrays)
    sys.stdout.buffer.write(out.getvalue())


if __name__ == "__main__":
    try:
        main()
    except NotImplementedError:  # scipy's own, for the format of version 7.3
        sys.exit(3)
    except Exception as error:  # scipy, zlib and struct raise a dozen kinds at a damaged file
        sys.stderr.write(f"{type(error).__name__}: {error}")
        sys.exit(4)
