"""Polyphonic music as piano rolls: which of the 88 keys sound in each frame; and rolls written as
MIDI files.
"""

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from genjax.data.files import read_published
from genjax.data.idx import read_bytes
from genjax.data.source import Source, Splits, cast, validate
from genjax.errors import ConfigError, DataError, replacing
from genjax.protocol import Batch, DataSpec

KEYS = 88
LOWEST = 21  # the MIDI number of the first key, A0: key k is note 21 + k

_FILE, _LONGEST = "poly_music/JSB_Chorales.mat", 160
_SHA256 = "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4"
_PARTS = {"train": "traindata", "valid": "validdata", "test": "testdata"}
_TICKS = 480  # of a frame, which is written as a quarter note


def jsb(path: str | None = None) -> Source:
    """The four-part chorales of J. S. Bach, 229 / 76 / 77 of 25 to 160 frames
    (Boulanger-Lewandowski et al. 2012).

    An event is the 88 keys in one frame, a quarter note, 1 where a key sounds; pieces are padded
    with zeros to 160 frames, and `length` says how many count. The standard split, in the MATLAB
    file of Bai, Kolter & Koltun (2018).

    Args:
        path: the file JSB_Chorales.mat or the folder that has it; without it, it is looked for in
            $GENJAX_DATA.

    Raises:
        DataError, by `load`: for a file that is missing or another one.
    """
    spec = DataSpec((_LONGEST, KEYS), "binary", step="frame", lengths=True, name="jsb")

    def load() -> Splits:
        data, found = read_published("jsb", _FILE, _SHA256, path)
        return validate(_pad(_parse(data, found), _LONGEST), spec, found)

    where = path or f"$GENJAX_DATA/{_FILE}"
    about = f"229 train / 76 valid / 77 test chorales of up to 160 frames, from {where}"
    return Source(spec, load, cast(spec), description=about)


def rolls(path: str) -> Source:
    """Piano rolls of one's own, in a MATLAB file as those of `jsb`; it is read at once, as the spec
    depends on it.

    The cell arrays traindata, validdata and testdata hold one matrix [T, 88] of zeros and ones for
    each piece. Pieces are padded with zeros to the length of the longest, and `length` says how
    many frames count.

    Args:
        path: the .mat file (version 5 to 7.2, as `save -v7` or scipy.io.savemat write).

    Raises:
        DataError: for a file that is missing, damaged, or not as above.
    """
    parts = _parse(read_bytes(path), path)
    longest = max(len(roll) for part in parts.values() for roll in part)
    spec = DataSpec((longest, KEYS), "binary", step="frame", lengths=True, name=Path(path).stem)
    splits = validate(_pad(parts, longest), spec, str(path))
    sizes = " / ".join(f"{len(parts[split]):,} {split}" for split in Splits._fields)
    return Source(
        spec,
        lambda: splits,
        cast(spec),
        description=f"{sizes} pieces of up to {longest} frames, from {path}",
        files=(str(path),),
    )


def midi(roll: np.ndarray, path: str | os.PathLike[str], frames_per_second: float = 2.0) -> None:
    """Write a piano roll [T, 88] as a standard MIDI file of one piano, in which key k is note 21 +
    k.

    A roll does not say where a note is struck again, so a key that sounds in frames next to each
    other is one long note. The file is as long as the roll, T / frames_per_second seconds, and a
    frame is a quarter note. Cut padding off first, by roll[:length].

    Args:
        roll: zeros and ones, of any dtype.
        path: the .mid file; the folder is made if need be.
        frames_per_second: the tempo; at least 0.06.

    Raises:
        DataError: for another shape than [T, 88] or other values than 0 and 1.
        ConfigError: for a tempo that MIDI cannot say.
        CheckpointError: if the disk does not take the file.
    """
    import mido

    roll = np.asarray(roll)
    if roll.ndim != 2 or roll.shape[1] != KEYS:
        raise DataError(
            f"A piano roll must have the shape [T, {KEYS}]; got {list(roll.shape)}. Write one "
            "piece at a time."
        )
    if not np.isin(roll, (0, 1)).all():
        raise DataError(
            "A piano roll must hold 0 and 1 only; got other values. Draw from the probabilities "
            "first."
        )
    tempo = (
        round(1e6 / frames_per_second) if frames_per_second > 0 else 0
    )  # microseconds of a quarter, in 24 bits
    if not 1 <= tempo < 2**24:
        raise ConfigError(f"frames_per_second must be from 0.06 to 1e6; got {frames_per_second}.")
    silence = np.zeros((1, KEYS), np.int8)
    change = np.diff(
        np.concatenate([silence, roll.astype(np.int8), silence]), axis=0
    )  # [T + 1, 88]
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=tempo)])
    now = 0
    for frame, changes in enumerate(change):
        # Notes end before others begin, as numpy sorts -1 before 1.
        for key in sorted(np.flatnonzero(changes), key=lambda key: changes[key]):
            kind = "note_on" if changes[key] > 0 else "note_off"
            track.append(
                mido.Message(kind, note=LOWEST + int(key), velocity=64, time=(frame - now) * _TICKS)
            )
            now = frame
    track.append(mido.MetaMessage("end_of_track", time=(len(roll) - now) * _TICKS))
    with replacing(Path(path)) as temporary:
        mido.MidiFile(type=0, ticks_per_beat=_TICKS, tracks=[track]).save(temporary)


def _parse(data: bytes, path: str) -> dict[str, list[np.ndarray]]:
    """The pieces [T, 88] of each split, with every array held to its shape."""
    found = _read_mat(data, path)
    missing = [key for key in _PARTS.values() if key not in found]
    if missing:
        there = ", ".join(key for key in found if not key.startswith("__")) or "nothing"
        wanted = ", ".join(_PARTS.values())
        raise DataError(
            f"{path}: expected the cell arrays {wanted}; found {there}, so {', '.join(missing)} is "
            "missing."
        )
    parts = {}
    for split, key in _PARTS.items():
        cells = found[key]
        if cells.dtype != object:
            raise DataError(
                f"{path}: {key} must be a cell array of matrices [T, {KEYS}]; found "
                f"{cells.dtype}{list(cells.shape)}. "
                "Pieces of unequal length go into cells, one each."
            )
        parts[split] = [
            _roll(cell, f"{path}: piece {i} of {key}") for i, cell in enumerate(cells.ravel())
        ]
        if not parts[split]:
            raise DataError(f"{path}: {key} is empty; expected at least 1 piece.")
    return parts


def _read_mat(data: bytes, path: str) -> dict[str, Any]:
    """The variables of a MATLAB file, cell arrays as arrays of objects.

    Raises:
        DataError: for one that is damaged, which must not take this process with it.
    """
    command = [sys.executable, "-P", str(Path(__file__).with_name("mat_child.py"))]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode == 3:
        raise DataError(
            f"{path}: a MATLAB file of version 7.3, which cannot be read. Save it with -v7."
        )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").splitlines()
        reason = lines[-1] if lines else f"its reader ended with {done.returncode}"
        raise DataError(f"{path}: not a MATLAB file, or damaged ({reason}). Fetch it again.")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as file:
        arrays = dict(file)
    found: dict[str, Any] = {}
    for name, kind in arrays["names"]:
        if kind == "array":
            found[str(name)] = arrays[name]
            continue
        parts = [arrays[f"{name}:{index}"] for index in range(_cells(arrays, name))]
        cells = np.empty(len(parts), object)
        cells[:] = parts
        found[str(name)] = cells
    return found


def _cells(arrays: Mapping[str, np.ndarray], name: str) -> int:
    return sum(key.rpartition(":")[0] == name for key in arrays)


def _roll(cell: Any, where: str) -> np.ndarray:
    if not isinstance(cell, np.ndarray) or cell.dtype.kind not in "buif":
        raise DataError(
            f"{where} must be a matrix of numbers; found "
            f"{getattr(cell, 'dtype', type(cell).__name__)}."
        )
    if cell.size == 0:
        raise DataError(f"{where} is empty: shape {list(cell.shape)}. Leave such pieces out.")
    if cell.ndim != 2 or cell.shape[1] != KEYS:
        raise DataError(
            f"{where} must have the shape [T, {KEYS}], a column for each key; found "
            f"{list(cell.shape)}."
        )
    if not np.isin(cell, (0, 1)).all():
        raise DataError(
            f"{where} must hold 0 and 1 only; found values from {cell.min()} to {cell.max()}."
        )
    return cell.astype(np.uint8)


def _pad(parts: dict[str, list[np.ndarray]], longest: int) -> Splits:
    def batch(pieces: list[np.ndarray]) -> Batch:
        x = np.zeros((len(pieces), longest, KEYS), np.uint8)
        for row, piece in zip(x, pieces, strict=True):
            row[: len(piece)] = piece
        length: Any = np.array([len(piece) for piece in pieces], np.int32)
        return Batch(x, length=length)

    return Splits(*(batch(parts[split]) for split in Splits._fields))
