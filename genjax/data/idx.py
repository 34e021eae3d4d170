"""The IDX format of MNIST: two zero bytes, a type code, the number of axes, their big-endian uint32
sizes, the values.
"""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from genjax.errors import DataError, regular_file

UBYTE = 0x08  # the type code of unsigned bytes, the only one that is read here


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, plain or gzipped (told by its content, not by its
    name), any rank.

    Raises:
        DataError: for a file that is missing, cut short, corrupt, not IDX, of another type, or not
            as long as it says.
    """
    return parse_idx(read_bytes(path), path)


# gzip gives at most a thousand bytes for one, and real data a few: more than so many is a bomb.
_RATIO, _FREE = 250, 1 << 26


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes, decompressed if they are gzip; a checksum of these does not depend on who
    compressed them.

    Raises:
        DataError: for a file that is missing or unreadable, or a gzip stream that is cut short,
            corrupt, or a bomb.
    """
    regular_file(path)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if data[:2] != b"\x1f\x8b":
        return data
    out, packed = bytearray(), len(data)
    # zlib instead of gzip.open, because it says how far it came. A gzip file may hold several
    # streams in a row.
    while data[:2] == b"\x1f\x8b":
        stream = zlib.decompressobj(wbits=31)
        try:
            for start in range(0, len(data), 1 << 16):
                out += stream.decompress(data[start : start + (1 << 16)])
                if len(out) > max(_FREE, _RATIO * packed):
                    raise DataError(
                        f"{path}: {packed:,} bytes of gzip give more than {len(out):,}, as no "
                        "data of use do. If it is what you mean, unpack it (gunzip -k) and give "
                        "the plain file."
                    )
                if stream.eof:
                    data = stream.unused_data + data[start + (1 << 16) :]
                    break
        except zlib.error as error:
            raise DataError(
                f"{path}: the gzip data are corrupt after {len(out)} decompressed bytes ({error}). "
                "Fetch the file again."
            ) from error
        if not stream.eof:
            raise DataError(
                f"{path}: the gzip data are cut short after {len(out)} decompressed bytes. Fetch "
                "the file again."
            )
    return bytes(out)


def parse_idx(data: bytes, path: str | os.PathLike[str]) -> np.ndarray:
    """The array in the decompressed bytes of an IDX file; `path` is for messages.

    Raises:
        DataError: for bytes that are not IDX, another type, or another number of bytes than the
            header says.
    """
    if len(data) < 4 or data[:2] != b"\0\0":
        raise DataError(
            f"{path}: not an IDX file: expected it to start with 00 00 08 0n; found "
            f"{data[:4].hex(' ') or 'nothing'}."
        )
    code, ndim = data[2], data[3]
    if code != UBYTE:
        raise DataError(
            f"{path}: expected the IDX type code 0x08 (unsigned bytes); found 0x{code:02x}. "
            "Convert it to bytes."
        )
    header = 4 + 4 * ndim
    if len(data) < header:
        raise DataError(
            f"{path}: expected an IDX header of {header} bytes for {ndim} axes; found {len(data)} "
            "bytes in all."
        )
    shape = struct.unpack(f">{ndim}I", data[4:header])
    wanted, found = math.prod(shape), len(data) - header
    if wanted != found:
        fewer = "fewer" if found < wanted else "more"
        raise DataError(
            f"{path}: {fewer} values than its header says: expected {wanted} bytes for shape "
            f"{list(shape)}; found {found}."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def write_idx(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write an array of unsigned bytes as IDX; gzipped if the name ends in .gz, with no time stamp
    in it.

    Raises:
        DataError: for another dtype than uint8.
    """
    if array.dtype != np.uint8:
        raise DataError(f"{path}: IDX files are written from uint8; got {array.dtype}.")
    data = (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, UBYTE, array.ndim, *array.shape) + array.tobytes()
    )
    Path(path).write_bytes(gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)
