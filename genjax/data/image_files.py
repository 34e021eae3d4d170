"""A user's own pictures: a folder, zip or tar of PNG, JPEG, WebP, GIF, BMP and TIFF files, of the
classes that its sub-folders name; and the binary files of CIFAR-10 and CIFAR-100.

What was decoded is kept as one array in the user's cache folder, under a name that its files and
settings decide, so that the next time costs no decoding.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from genjax.data import kept
from genjax.data.folders import files_below, is_hidden
from genjax.data.own import SPLITS, Reading, contents_of, own_source
from genjax.data.rows import rows_at
from genjax.data.source import Source
from genjax.errors import DataError, regular_file
from genjax.protocol import Batch
from genjax.settings import Within, builder

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_LARGEST = 1 << 28  # bytes of one packed picture, and pixels of one that is unpacked
_AT_ONCE = 64  # pictures that are decoded before the next are read
_BITS = 258  # TIFF's tag BitsPerSample
_CIFAR = {3073: 1, 3074: 2}  # bytes of an example -> of its labels, the last of which is taken

Side = Annotated[int, Within(1, 2**13)]  # of a picture, several of which are in memory at a time
Mode = Literal["auto", "grey", "rgb", "rgba"]
Fit = Literal["crop", "pad"]


class Member(NamedTuple):
    """A picture that is not decoded yet.

    Attributes:
        name: its path below the folder or in the archive.
        read: () -> its bytes.
        stamp: what changes when it does.
    """

    name: str
    read: Callable[[], bytes]
    stamp: tuple[Any, ...]


@builder
def image_files(
    path: str,
    *,
    conditional: bool = False,
    size: Side | None = None,
    fit: Fit = "crop",
    mode: Mode = "auto",
    skip_bad: bool = False,
    reading: Reading = Reading(),
) -> Source:
    """Pictures in a folder, a zip or a tar; their classes are the names of the folders they are in.

    Folders called train and test at the top, and valid if there is one, are the splits. Pictures
    are turned as their EXIF data say, palettes and greys of more bits become 8 bits (of 16,
    divided by 257), and what is transparent lies on white unless `mode` is "rgba". Hidden folders
    are passed over, and links to folders elsewhere followed. CIFAR's binary files (data_batch_1.bin
    ..., test_batch.bin) are read, too.

    What was decoded is kept in the cache folder; beyond 512 MiB it stays there, and rows of it are
    read as they are asked for.

    Args:
        path: the folder or archive.
        conditional: use the names of the sub-folders as classes.
        size: height and width that pictures are brought to; needed where they differ.
        fit: how: "crop" fills the square and cuts off what is over, "pad" puts all of it on black.
        mode: "grey", "rgb", "rgba", or "auto": grey if all are, else rgb.
        skip_bad: leave out files that cannot be read, and say how many, instead of stopping.

    Raises:
        DataError: for a path without pictures, one that cannot be decoded or has several frames,
            and sizes that differ.
        ConfigError: for settings that do not fit.
    """
    where = os.fspath(path)
    with _members(where, ENDINGS) as members:
        if not members:
            return _cifar(where, conditional, reading)
        settings = {"size": size, "fit": fit, "mode": mode, "skip_bad": skip_bad}
        names, x, notes = _decoded(members, settings, where)
    read = _by_split(names, x, conditional, where)
    return _source(read, reading, where, notes)


def _source(
    read: dict[str, Batch], reading: Reading, where: str, notes: Sequence[str] = ()
) -> Source:
    """The source of pictures that were read, with the archive or the pixels as what they are."""
    name = Path(where).resolve().name.split(".")[0]
    files = () if os.path.isdir(where) else (where,)
    source = own_source(read, reading, name, where, files=files, notes=notes)
    return source if files else source._replace(contents=(where, contents_of(read)))


# --- finding --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _members(where: str, endings: Sequence[str]) -> Iterator[list[Member]]:
    """The files with some endings below a folder or in an archive, in the order of their names."""
    if os.path.isdir(where):
        yield _in_folder(where, endings)
        return
    regular_file(where)
    try:
        stamp = _stamp(where)
        if zipfile.is_zipfile(where):
            with zipfile.ZipFile(where) as archive:
                yield _in_zip(archive, endings, stamp, where)
            return
        with tarfile.open(where) as archive:
            yield _in_tar(archive, endings, stamp, where)
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such file or folder.") from None
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{where}: cannot be read as a zip or tar ({error}).") from error


def _stamp(path: str) -> tuple[Any, ...]:
    about = os.stat(path)
    # A copy that keeps the time of its original has another ctime.
    return (about.st_size, about.st_mtime_ns, about.st_ctime_ns)


def _in_folder(where: str, endings: Sequence[str]) -> list[Member]:
    found = []
    for path in files_below(where, endings):
        name = os.path.relpath(path, where).replace(os.sep, "/")
        found.append(Member(name, _reader(path), _stamp(path)))
    return sorted(found, key=lambda member: member.name)


def _reader(path: str) -> Callable[[], bytes]:
    def read() -> bytes:
        regular_file(path)
        with open(path, "rb") as file:
            return file.read()

    return read


def _in_zip(
    archive: zipfile.ZipFile, endings: Sequence[str], stamp: Any, where: str
) -> list[Member]:
    found = []
    for info in archive.infolist():
        if _wanted(info.filename, endings) and not info.is_dir():
            _check_member(info.filename, info.file_size, where)
            read = _locked(archive.read, info)
            found.append(Member(info.filename, read, (*stamp, info.CRC, info.file_size)))
    return sorted(found, key=lambda member: member.name)


def _in_tar(
    archive: tarfile.TarFile, endings: Sequence[str], stamp: Any, where: str
) -> list[Member]:
    found = []
    for info in archive.getmembers():
        # A link in an archive is read as what it leads to there.
        if _wanted(info.name, endings) and (info.isfile() or info.islnk() or info.issym()):
            _check_member(info.name, info.size, where)

            def read(info: tarfile.TarInfo) -> bytes:
                file = archive.extractfile(info)
                return b"" if file is None else file.read()

            found.append(Member(info.name, _locked(read, info), (*stamp, info.size)))
    return sorted(found, key=lambda member: member.name)


def _wanted(name: str, endings: Sequence[str]) -> bool:
    folders = [part for part in PurePosixPath(name).parts[:-1] if part != ".."]
    return name.lower().endswith(tuple(endings)) and not any(map(is_hidden, folders))


def _check_member(name: str, size: int, where: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{where}: {name} lies outside the archive, and is not read. Write the archive anew, "
            "with names below one folder."
        )
    if size > _LARGEST:
        raise DataError(
            f"{where}: {name} would unpack to {size:,} bytes; at most {_LARGEST:,} are read. Write "
            "the archive without it."
        )


def _locked(read: Callable[[Any], bytes], info: Any) -> Callable[[], bytes]:
    """Archives are read by one thread at a time; here, as they are listed for decoding."""
    return lambda: read(info)


# --- decoding -------------------------------------------------------------------------------------


def _decoded(
    members: list[Member], settings: dict[str, Any], where: str
) -> tuple[list[str], Any, list[str]]:
    """Names, pictures [N, H, W, C] uint8, see `kept.keep`, and notes; from the cache if they are
    there.
    """
    stamps = [[member.name, *member.stamp] for member in members]
    text = json.dumps([os.path.abspath(where), settings, stamps, 3])
    path = kept.folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npy"
    names, bad, note = [], [], None
    found = kept.read(path)
    if found is not None:
        x, about = found
        names, bad = about["names"], about["bad"]
    else:
        pictures = _pictures(members, settings, where, names, bad)
        check = functools.partial(_check_shapes, where=where)
        x, note = kept.keep(path, pictures, lambda: {"names": names, "bad": bad}, check, where)
    notes = [f"left out {len(bad)} files that cannot be read"] if bad else []
    return names, x, [*notes, note] if note else notes


def _pictures(
    members: list[Member],
    settings: dict[str, Any],
    where: str,
    names: list[str],
    bad: list[str],
) -> Iterator[np.ndarray]:
    """The pictures in their order, decoded by several threads; `names` and `bad` are told which can
    be read and which cannot.
    """
    reason, black = "", True
    with ThreadPoolExecutor() as pool:
        for begin in range(0, len(members), _AT_ONCE):
            some = members[begin : begin + _AT_ONCE]
            raw = [_bytes(member) for member in some]
            decoded = pool.map(functools.partial(_picture, settings=settings), raw)
            for member, one in zip(some, decoded, strict=True):
                if isinstance(one, str):
                    reason = reason or one
                    bad.append(member.name)
                else:
                    names.append(member.name)
                    black = black and not one.any()
                    yield one
    if bad and not settings["skip_bad"]:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DataError(
            f"{where}: {bad[0]} cannot be read as a picture ({reason}){more}. "
            "Repair it, or leave such files out with --skip-bad."
        )
    if not names:
        raise DataError(f"{where}: none of {len(members)} pictures can be read.")
    if black:
        raise DataError(
            f"{where}: all {len(names)} pictures are black. 16-bit ones are divided by 257: if "
            "these hold values up to 255, save them with 8 bits."
        )


def _bytes(member: Member) -> bytes | str:
    try:
        return member.read()
    except Exception as error:  # zlib, zipfile and the system raise a dozen kinds
        return _reason(error)


def _reason(error: Exception) -> str:
    """What an error says, without the address of an object in memory."""
    said = re.sub(r" <[\w.]+ object at 0x[0-9a-f]+>", "", str(error)).strip()
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _picture(data: bytes | str, settings: dict[str, Any]) -> np.ndarray | str:
    """A picture as [H, W, C] uint8, or what is wrong with it."""
    from PIL import Image, ImageOps

    if isinstance(data, str):
        return data
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > _LARGEST:
                return f"{opened.width} x {opened.height} pixels are too many"
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != "MPO":  # a telephone's JPEG with a preview
                return f"it has {frames} frames: split it into one picture a frame"
            image = ImageOps.exif_transpose(_in_eight_bits(opened))
        image = _in_mode(image, settings["mode"])
        if settings["size"] is not None:
            square = (settings["size"], settings["size"])
            bring = ImageOps.fit if settings["fit"] == "crop" else ImageOps.pad
            image = bring(image, square, Image.Resampling.LANCZOS)
        array = np.asarray(image, np.uint8)
    except Exception as error:  # of a file that is cut short or no picture, PIL raises many kinds
        return _reason(error)
    return array[..., None] if array.ndim == 2 else array


def _in_eight_bits(image: Any) -> Any:
    """The picture with 8 bits a channel, in a mode of PIL that has no palette."""
    from PIL import Image

    # By its mode and not by its values: a dark one among others has their scale. Pillow before 11
    # has 16-bit PNG as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # A TIFF of 12 bits has this mode, too.
        bits = getattr(image, "tag_v2", {}).get(_BITS, (16,))[0]
        grey = np.asarray(image, np.uint32) * 255 // (2**bits - 1)
        found = Image.fromarray(grey.astype("u1"))
        # How to turn it, as it is once it is loaded: Pillow turns a TIFF by itself.
        found.getexif().update(image.getexif())
        return found
    if image.mode == "I":
        grey = np.asarray(image)
        raise ValueError(
            f"its whole numbers, from {grey.min()} to {grey.max()}, are no 16 bits without a sign "
            "and have no scale; save them as such, or as .npy"
        )
    if image.mode == "F":
        raise ValueError("pictures of floating-point numbers have no scale; save them as .npy")
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("P", "PA") or "transparency" in image.info:
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.convert("RGB") if image.mode not in ("L", "LA", "RGB", "RGBA") else image.copy()


def _in_mode(image: Any, mode: str) -> Any:
    """Grey, colour or colour with transparency, as asked; with "auto" without transparency."""
    from PIL import Image

    if mode == "rgba":
        return image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", image.size, "white")
        opaque = Image.alpha_composite(white, image.convert("RGBA"))
        image = opaque.convert("L" if image.mode == "LA" else "RGB")
    wanted = {"grey": "L", "rgb": "RGB"}.get(mode)
    return image if wanted is None else image.convert(wanted)


def _check_shapes(shapes: set[tuple[int, ...]], where: str) -> None:
    """Refuse pictures of several sizes."""
    sizes = {shape[:2] for shape in shapes}
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = sorted(sizes)[0], sorted(sizes)[-1]
        raise DataError(
            f"{where}: the pictures have {len(sizes)} different sizes, from {width} x {height} to "
            f"{other_width} x {other_height}. --size 32 brings them to one, by cutting (--fit "
            "crop) or on black (--fit pad)."
        )


def _by_split(names: list[str], x: Any, conditional: bool, where: str) -> dict[str, Batch]:
    """The pictures of each split, and the names of their folders as classes."""
    split = [name.split("/")[:-1] for name in names]  # thousands, for which pathlib takes seconds
    paths = [tuple(part for part in parts if part not in ("", ".")) for parts in split]
    depth = _shared(paths)
    tops = [path[depth] if len(path) > depth else "" for path in paths]
    splits = {top: SPLITS.get(top.lower()) for top in tops}
    own = _are_splits(splits, where)
    labels = [path[-1] if len(path) > depth + own else "" for path in paths]
    if conditional and len({*labels}) < 2:
        raise DataError(
            f"{where}: conditional needs labels, which are the folders that the pictures are in; "
            f"found {len({*labels})}. Sort them into folders, or conditional=False "
            "(--no-conditional)."
        )
    y = np.asarray(labels) if conditional else None
    if not own:
        return {"all": Batch(x, y)}
    read = {}
    of_each = np.asarray([splits[top] for top in tops])
    for split in sorted(set(of_each)):
        index = np.flatnonzero(of_each == split)
        read[split] = Batch(rows_at(x, index), None if y is None else y[index])
    return read


def _are_splits(splits: dict[str, str | None], where: str) -> bool:
    """Whether the folders at the top, with the splits that they are called like, are splits.

    Raises:
        DataError: for some that are and others that are missing, or are none: pictures that were
            held out must not be trained on.
    """
    found = {split for split in splits.values() if split is not None}
    if len(found) < 2:
        return False  # a class may be called so
    called = ", ".join(f"{top}/" for top, split in splits.items() if split is not None)
    if not {"train", "test"} <= found:
        raise DataError(
            f"{where}: {called} are splits, and train/ or test/ is missing. Rename one, or give "
            "the folder of those alone that are to be split anew."
        )
    if None in splits.values():
        other = ", ".join(top or "pictures" for top, split in splits.items() if split is None)
        raise DataError(
            f"{where}: {called} are splits, and beside them there are {other}. Move these away."
        )
    return True


def _shared(paths: list[tuple[str, ...]]) -> int:
    """How many folders all paths begin with, beside which there is another one."""
    depth, first = 0, min(paths, key=len)
    while depth < len(first) and len({path[depth] for path in paths}) == 1:
        depth += 1
    return depth


# --- CIFAR ----------------------------------------------------------------------------------------


def _cifar(where: str, conditional: bool, reading: Reading) -> Source:
    """CIFAR-10 and CIFAR-100 as binary files: a label or two, then 3 x 32 x 32 bytes."""
    with _members(where, (".bin",)) as members:
        names = [PurePosixPath(member.name).name for member in members]
        train = [
            m for m, n in zip(members, names, strict=True) if n.startswith(("data_b", "train"))
        ]
        test = [m for m, n in zip(members, names, strict=True) if n.startswith("test")]
        if not (train and test):
            endings = ", ".join(ENDINGS)
            raise DataError(
                f"{where}: holds no pictures ({endings}) and no CIFAR files (data_batch_1.bin ... "
                "and test_batch.bin, or train.bin and test.bin)."
            )
        read = {
            split: _cifar_batch([(m.name, m.read()) for m in part], conditional, where)
            for split, part in (("train", train), ("test", test))
        }
    return _source(read, reading, where, ["CIFAR's binary files"])


def _cifar_batch(parts: list[tuple[str, bytes]], conditional: bool, where: str) -> Batch:
    xs, ys = [], []
    for name, data in parts:
        sizes = [size for size in _CIFAR if data and len(data) % size == 0]
        if not sizes:
            raise DataError(
                f"{where}: {name} has {len(data):,} bytes, which are no whole number of examples "
                "of 3,073 (CIFAR-10) or 3,074 bytes (CIFAR-100). Fetch it again."
            )
        rows = np.frombuffer(data, np.uint8).reshape(-1, sizes[0])
        labels = _CIFAR[sizes[0]]
        ys.append(rows[:, labels - 1].astype(np.int32))
        xs.append(np.moveaxis(rows[:, labels:].reshape(-1, 3, 32, 32), 1, -1))
    return Batch(np.concatenate(xs), np.concatenate(ys) if conditional else None)
