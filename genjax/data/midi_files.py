"""A user's own music: a MIDI file or a folder of them, as piano rolls."""

import io
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from genjax.data.folders import files_below
from genjax.data.lines import sizes, split_rows
from genjax.data.music import KEYS, LOWEST
from genjax.data.own import contents_of
from genjax.data.source import Source, Splits, cast, validate
from genjax.errors import DataError, regular_file
from genjax.protocol import Batch, DataSpec
from genjax.settings import Count, Within, builder

ENDINGS = (".mid", ".midi")
Frames = Annotated[float, Within(0.01, 1000)]  # of a quarter note
_MOST = 2**20  # frames of a piece, which is some days of music
_DRUMS = 9  # the channel whose notes are no pitches


@builder
def midi_files(
    path: str,
    *,
    frames_per_quarter: Frames = 4.0,
    context: Count | None = None,
    skip_bad: bool = False,
) -> Source:
    """MIDI files as piano rolls [T, 88]: which keys sound in each frame.

    A frame is a part of a quarter note, so the roll is in beats and does not depend on the tempo.
    Drums, and notes outside the 88 keys of a piano, are left out; a note that is shorter than a
    frame sounds for one. A folder's pieces are split 80 / 10 / 10 in a fixed order; they are padded
    to the longest, and `length` says how many frames count. Fewer than three pieces, such as a
    single file, are each split by position, 80 / 10 / 10, and what comes of it is cut into windows.
    With `context` the pieces of a folder are cut into windows too, after they were split.

    Args:
        path: the file, or a folder of .mid and .midi files.
        frames_per_quarter: 4 makes a frame a sixteenth note.
        context: cut pieces into windows of so many frames, the last one padded; of fewer than
            three pieces a quarter of the longest, and at most 64, unless given.
        skip_bad: leave out files that cannot be read, and say how many, instead of stopping.

    Raises:
        DataError: for a file that is missing or damaged, pieces without notes, or fewer than three
            of which one has fewer than three frames.
    """
    where = os.fspath(path)
    folder = os.path.isdir(where)
    files = _found(where) if folder else [where]
    pieces, names, bad = [], [], 0
    for file in files:
        try:
            pieces.append(roll_of(file, frames_per_quarter))
            names.append(file)
        except DataError:
            if not skip_bad:
                raise
            bad += 1
    if not pieces:
        raise DataError(f"{where}: none of {len(files)} MIDI files can be read.")
    parts = _split(pieces, names)
    if context is None and len(pieces) < 3:
        context = max(1, min(64, max(map(len, pieces)) // 4))
    if context is not None:  # after the split, so that no piece is in two parts of it
        parts = [[cut for piece in part for cut in _windows(piece, context)] for part in parts]
    whole = pieces if context is None else None
    return _source(parts, whole, where, folder, len(names), bad, frames_per_quarter)


def _split(pieces: list[np.ndarray], names: list[str]) -> list[list[np.ndarray]]:
    """The pieces of train, valid and test; of fewer than three the beginning, what follows, and the
    end of each.
    """
    if len(pieces) >= 3:
        rows = split_rows(len(pieces), max(1, round(len(pieces) / 10)))
        return [[pieces[row] for row in part] for part in rows]
    parts = [[], [], []]
    for piece, name in zip(pieces, names, strict=True):
        n, held = len(piece), max(1, round(len(piece) / 10))
        if n < 3:
            raise DataError(
                f"{name}: {n} frames are too few to split; expected at least 3. Take a longer "
                "piece, a folder of at least 3 pieces, or a larger --frames-per-quarter."
            )
        for part, cut in zip(parts, np.split(piece, [n - 2 * held, n - held]), strict=True):
            part.append(cut)
    return parts


def _windows(piece: np.ndarray, context: int) -> list[np.ndarray]:
    return [piece[at : at + context] for at in range(0, len(piece), context)]


def _padded(pieces: list[np.ndarray], longest: int) -> Batch:
    """Pieces [T, 88] as x [N, longest, 88], with their lengths."""
    x = np.zeros((len(pieces), longest, KEYS), np.uint8)
    for row, piece in zip(x, pieces, strict=True):
        row[: len(piece)] = piece
    length: Any = np.asarray([len(piece) for piece in pieces], np.int32)
    return Batch(x, length=length)


def _found(where: str) -> list[str]:
    found = sorted(files_below(where, ENDINGS))
    if not found:
        raise DataError(f"{where}: holds no MIDI files ({', '.join(ENDINGS)}).")
    return found


def _source(
    parts: list[list[np.ndarray]],
    whole: list[np.ndarray] | None,
    where: str,
    folder: bool,
    n_files: int,
    bad: int,
    per_quarter: float,
) -> Source:
    """The source of train, valid and test; `whole` are the pieces, where none was cut."""
    longest = max(len(piece) for part in parts for piece in part)
    splits = Splits(*(_padded(part, longest) for part in parts))
    name = Path(where).resolve().name.split(".")[0]
    spec = DataSpec((longest, KEYS), "binary", step="frame", lengths=True, name=name)
    validate(splits, spec, where)
    about = f"{sizes(parts)} pieces of up to {longest} frames, from {n_files} MIDI files in {where}"
    notes = [about, f"a frame is 1/{per_quarter:g} of a quarter note, in beats of any tempo"]
    if bad:
        notes.append(f"left out {bad} files that cannot be read")
    files = () if folder else (where,)
    contents = None
    if folder or whole is None:  # where pieces are cut, a file alone does not say how
        read = splits._asdict() if whole is None else {"all": _padded(whole, longest)}
        contents = (where, contents_of(read))
    return Source(
        spec,
        lambda: splits,
        cast(spec),
        description=about,
        notes=tuple(notes),
        files=files,
        contents=contents,
    )


def roll_of(path: str | os.PathLike[str], frames_per_quarter: float = 4.0) -> np.ndarray:
    """The piano roll [T, 88] uint8 of one MIDI file.

    Raises:
        DataError: for a file that is missing or damaged, that counts time in seconds, or has no
            notes of a piano.
    """
    regular_file(path)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    import mido

    try:
        read = mido.MidiFile(file=io.BytesIO(data), clip=True)
        merged = list(mido.merge_tracks(read.tracks))
    except Exception as error:  # mido raises a dozen kinds at a damaged file
        reason = str(error) or type(error).__name__
        raise DataError(f"{path}: not a MIDI file, or damaged ({reason}).") from error
    if read.ticks_per_beat <= 0 or read.ticks_per_beat >= 0x8000:
        raise DataError(
            f"{path}: counts time in frames of film (SMPTE), not in beats. Save it with ticks for "
            "each beat."
        )
    notes = _notes(merged)
    if not notes:
        raise DataError(f"{path}: has no notes within the 88 keys of a piano.")
    ticks = read.ticks_per_beat / frames_per_quarter
    first = min(begin for _, begin, _ in notes)
    frames = [
        (key, round((begin - first) / ticks), round((end - first) / ticks))
        for key, begin, end in notes
    ]
    length = max(max(end, begin + 1) for _, begin, end in frames)
    if length > _MOST:
        raise DataError(
            f"{path}: has {length:,} frames, and at most {_MOST:,} of a piece are read: the file "
            "is damaged, or --frames-per-quarter too large."
        )
    roll = np.zeros((length, KEYS), np.uint8)
    for key, begin, end in frames:
        roll[begin : max(end, begin + 1), key] = 1
    return roll


def _notes(messages: list[Any]) -> list[tuple[int, int, int]]:
    """(key, first tick, last tick) of every note; one that never ends ends with the piece."""
    now, found = 0, []
    sounding: dict[tuple[int, int], int] = {}
    for message in messages:
        now += int(message.time)
        if message.type not in ("note_on", "note_off") or message.channel == _DRUMS:
            continue
        key = message.note - LOWEST
        if not 0 <= key < KEYS:
            continue
        begun = sounding.pop((message.channel, key), None)
        if begun is not None:
            found.append((key, begun, now))
        if message.type == "note_on" and message.velocity > 0:
            sounding[message.channel, key] = now
    return found + [(key, begun, now) for (_, key), begun in sounding.items()]
