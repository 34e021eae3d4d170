"""Pictures that were decoded and large tables, kept as one .npy file in the user's cache folder,
with what is known of them and their checksum in a .json file beside it.
"""

import contextlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from genjax.data import rows
from genjax.data.rows import in_npy
from genjax.errors import DataError, WriteError, in_words, replacing


def folder() -> Path:
    """Where data are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genjax" / "data"


def read(path: Path) -> tuple[Any, dict[str, Any]] | None:
    """An array that was kept, see `in_npy`, and what is known of it; None if it is not there or
    damaged.
    """
    with contextlib.suppress(Exception):  # of what is damaged, json and numpy raise many kinds
        about = json.loads(path.with_suffix(".json").read_text("utf-8"))
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        if path.stat().st_size == about["size"] and _checksum(path, mapped.offset) == about["crc"]:
            return in_npy(str(path)), about
    return None


def keep(
    path: Path,
    pictures: Iterator[np.ndarray],
    about: Callable[[], dict[str, Any]],
    check: Callable[[set[tuple[int, ...]]], None],
    where: str,
) -> tuple[Any, str | None]:
    """Pictures [H, W, C] of one size as one array [N, H, W, C], kept for the next time; of grey and
    coloured ones all have three channels. Beyond `rows.LIMIT` bytes they never are in memory
    together.

    Args:
        about: () -> what is known of them, once all have come.
        check: refuses shapes that do not go together.
        where: the folder or archive, for messages.

    Returns:
        The array, or `Rows` of the file; and a note, if it could not be kept.

    Raises:
        DataError: for more than the memory is to hold, where they cannot be kept.
    """
    first, size = [], 0
    for picture in pictures:
        first.append(picture)
        size += picture.nbytes
        if size > rows.LIMIT:
            return _streamed(path, itertools.chain(first, pictures), about, check, where), None
    check({one.shape for one in first})
    channels = max(one.shape[2] for one in first)
    x = np.stack([_with_channels(one, channels) for one in first])
    try:
        with replacing(path) as part:
            _save(part, x)
        _describe(path, about())
    except WriteError as error:
        return x, f"not kept for the next time: {error.__cause__ or error}"
    return x, None


def _save(part: Path, x: np.ndarray) -> None:
    with part.open("wb") as file:
        np.save(file, x)


def _streamed(
    path: Path,
    pictures: Iterator[np.ndarray],
    about: Callable[[], dict[str, Any]],
    check: Callable[[set[tuple[int, ...]]], None],
    where: str,
) -> Any:
    """`keep`, one picture after the other."""
    shapes: list[tuple[int, ...]] = []
    try:
        with replacing(path) as part:
            with part.open("wb") as file:
                begin = _header(file, (0, 1, 1, 1))
                for picture in pictures:
                    shapes.append(picture.shape)
                    file.write(np.ascontiguousarray(picture).data)
                check(set(shapes))
                channels = max(shape[2] for shape in shapes)
                shape = (len(shapes), *shapes[0][:2], channels)
                file.seek(0)
                if _header(file, shape) != begin:
                    raise AssertionError("numpy leaves room in a header for the number of rows")
            if len(set(shapes)) > 1:
                _colour(part, begin, shapes)
        _describe(path, about())
    except WriteError as error:
        size = in_words(sum(int(np.prod(shape)) for shape in shapes))
        raise _no_room(path, where, size, error) from error
    return in_npy(str(path))


def stream(path: Path, parts: Iterator[np.ndarray], where: str) -> Any:
    """Parts [n, *event] of one array, kept one after the other; at least one.

    Raises:
        DataError: where they cannot be kept.
    """
    first, n = next(parts), 0
    try:
        with replacing(path) as part, part.open("wb") as file:
            begin = _header(file, (0, *first.shape[1:]), first.dtype.str)
            for one in itertools.chain([first], parts):
                n += len(one)
                file.write(np.ascontiguousarray(one, first.dtype).data)
            file.seek(0)
            if _header(file, (n, *first.shape[1:]), first.dtype.str) != begin:
                raise AssertionError("numpy leaves room in a header for the number of rows")
            file.flush()
        _describe(path, {})
    except WriteError as error:
        size = in_words(n * first[:1].nbytes)
        raise _no_room(path, where, size, error) from error
    return in_npy(str(path))


def _no_room(path: Path, where: str, size: str, error: WriteError) -> DataError:
    return DataError(
        f"{where}: is more than is read into memory, and cannot be kept in {path.parent} after "
        f"{size} ({error.__cause__ or error}). Make room there, or say where there is some: "
        "XDG_CACHE_HOME=FOLDER genjax ..."
    )


def _header(file: Any, shape: tuple[int, ...], dtype: str = "|u1") -> int:
    """Write the header of an array, and say where it ends."""
    about = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.tell()


def _colour(part: Path, begin: int, shapes: list[tuple[int, ...]]) -> None:
    """Give every grey picture of a file as many channels as the others have."""
    other = part.with_suffix(".colour")
    channels = max(shape[2] for shape in shapes)
    try:
        with part.open("rb") as old, other.open("wb") as new:
            new.write(old.read(begin))
            for shape in shapes:
                picture = np.frombuffer(old.read(int(np.prod(shape))), np.uint8).reshape(shape)
                new.write(np.ascontiguousarray(_with_channels(picture, channels)).data)
        other.replace(part)
    finally:
        other.unlink(missing_ok=True)


def _with_channels(picture: np.ndarray, channels: int) -> np.ndarray:
    return picture if picture.shape[2] == channels else np.repeat(picture, channels, axis=2)


def _describe(path: Path, about: dict[str, Any]) -> None:
    """Write what is known of a file beside it."""
    offset = np.load(path, mmap_mode="r", allow_pickle=False).offset
    known = {**about, "size": path.stat().st_size, "crc": _checksum(path, offset)}
    with replacing(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(known), encoding="utf-8")


def _checksum(path: Path, offset: int) -> int:
    found = 0
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(rows.CHUNK):
            found = zlib.crc32(chunk, found)
    return found
