"""Token ids of a user's own: long streams in .bin and .npy files, memory-mapped, sequences in
arrays, and the vocabulary beside them.
"""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from genjax.data.lines import sizes
from genjax.data.source import Source
from genjax.data.streams import Order, Parts, by_position, stream_source, stream_windows
from genjax.errors import ConfigError, DataError, regular_file
from genjax.protocol import DataSpec
from genjax.settings import Count, Within

Tokens = Annotated[int, Within(2, 2**31 - 1)]
STEP = "token"  # what a step is called
_CHUNK = 1 << 24  # so many ids of a file are looked at at a time
_WIDE = '--data.dtype uint32 (in Python dtype="uint32")'
_HEADED = (
    "a file of llm.c or modded-nanogpt, with a header of 1,024 bytes before the ids: take it off "
    "(tail -c +1025 "
)
# What other files begin with: a .bin of ids has no mark of its own.
_MARKS = {
    b"\x93NUMPY": "a .npy file: name it so",
    b"PK\x03\x04": "a zip archive (.npz, or weights of PyTorch)",
    b"\x1f\x8b": "compressed by gzip: unpack it (gunzip)",
    b"\x89PNG": "a picture",
    b"GGUF": "weights of a model",
    (20240520).to_bytes(4, "little"): f"{_HEADED}FILE.bin > ids.bin)",
    (20240801).to_bytes(4, "little"): f"{_HEADED}FILE.bin > ids.bin), and give {_WIDE}",
}
# CIFAR's binary files have the same ending; those of CIFAR-100 have names that others have, too.
_CIFAR = re.compile(r"(data_batch_\d+|test_batch)\.bin", re.IGNORECASE)
_CIFAR_100 = {"train.bin": 50_000 * 3074, "test.bin": 10_000 * 3074}


class Symbols(NamedTuple):
    """What a file beside the ids says.

    Attributes:
        size: how many tokens there are; None where nothing says it.
        vocabulary: the symbol of each, if all are single characters.
        note: what was found, or what was not read.
        files: the file it is in.
    """

    size: int | None
    vocabulary: tuple[str, ...] | None
    note: str | None
    files: tuple[str, ...] = ()


def token_stream(
    path: str,
    context: Count = 64,
    order: Order = "shuffle",
    vocab_size: Tokens | None = None,
    dtype: Literal["uint16", "uint32"] = "uint16",
) -> Source:
    """A stream of token ids in a .bin file: little-endian numbers and nothing else, as nanoGPT
    writes it. It stays on the disk, memory-mapped.

    The symbols are those of vocabulary.json or meta.json beside it: a list, {"itos": ...},
    {"stoi": ...} or {"vocab_size": N}; meta.pkl is never unpickled. Without symbols, samples are
    ids. The stream is split by position, 85 / 5 / 10 %; of train.bin with a val.bin beside it, all
    is for training, and the first half of val.bin is validation, the other half test.

    Args:
        path: the .bin file.
        context: how many tokens a window has.
        order: "shuffle" takes windows at random; "stream" lets each place in the batch read on from
            step to step.
        vocab_size: how many tokens there are; what the vocabulary says, or else the largest id + 1.
        dtype: what each id is written as.

    Raises:
        DataError: for a file that is missing, empty, cut short, too short for its context or no
            such stream, and for ids outside the vocabulary.
        ConfigError: for a size that is not that of the vocabulary.
    """
    where = os.fspath(path)
    ids = _mapped(where, dtype)
    parts, files, notes = by_position(ids), [where], []
    held = Path(where).with_name("val.bin")
    if Path(where).name == "train.bin" and held.is_file():
        one, two = np.array_split(_mapped(str(held), dtype), 2)
        parts = ids, one, two
        files.append(str(held))
        notes.append(f"the first half of {held} is validation, the other half test")
    symbols = symbols_beside(where)
    return stream_of(
        parts, symbols, vocab_size, "--vocab-size ", context, order, where, files, notes
    )


def stream_of(
    parts: Parts,
    symbols: Symbols,
    size: int | None,
    flag: str,
    context: int,
    order: str,
    where: str,
    files: list[str],
    notes: list[str],
) -> Source:
    """The source of a stream of ids in its three parts.

    Args:
        size: the user's own number of tokens, which `flag` gives: "--levels ", "levels=".

    Raises:
        DataError, ConfigError: see `token_stream`.
    """
    levels, note = levels_of(parts, symbols, size, flag, where)
    spec = DataSpec(
        (context,),
        "tokens",
        levels,
        vocabulary=symbols.vocabulary,
        step=STEP,
        name=Path(where).stem,
    )
    stream_windows(parts, spec, where)  # refuse a short stream now, before a run folder is made
    about = f"{sizes(parts)} tokens, {note}, from {where}"
    more = [] if symbols.note is None else [symbols.note]
    source = stream_source(spec, lambda: parts, order, about, where)
    return source._replace(files=(*files, *symbols.files), notes=(about, *more, *notes))


def levels_of(
    parts: Any, symbols: Symbols, size: int | None, flag: str, where: str
) -> tuple[int, str]:
    """How many tokens there are, and why so many; every id is held to it.

    Raises:
        DataError: for ids outside, with the position of the first, and for what is no whole number.
        ConfigError: for a size that is not that of the vocabulary.
    """
    if size is not None and symbols.size is not None and size != symbols.size:
        raise ConfigError(
            f"{flag}{size} and {symbols.files[0]}, which has {symbols.size} tokens, do not fit "
            f"each other. Leave {flag.strip(' =')} out, or mend that."
        )
    known, top = size or symbols.size, 0
    for name, part in zip(("train", "valid", "test"), parts, strict=True):
        if part.dtype.kind not in "iu":
            raise DataError(
                f"{where}: token ids must be whole numbers; found {part.dtype}. Save them as "
                "uint16 or int32."
            )
        top = max(top, _held(part, known, flag, f"{where}: the {name} part"))
    if known is not None:
        why = "as declared" if size else f"by {symbols.files[0]}"
        return known, f"a vocabulary of {known:,} ({why})"
    levels = max(2, top + 1)
    return levels, f"a vocabulary of {levels:,} (the largest id + 1; {flag}N says otherwise)"


def _held(part: np.ndarray, known: int | None, flag: str, where: str) -> int:
    """The largest id."""
    rows, top = max(1, _CHUNK // max(1, part[:1].size)), 0
    for begin in range(0, len(part), rows):
        chunk = np.asarray(part[begin : begin + rows])  # of what lies on the disk, too
        low, high = int(chunk.min()), int(chunk.max())
        top = max(top, high)
        limit = 2**31 if known is None else known
        if low >= 0 and high < limit:
            continue
        first = np.argwhere((chunk < 0) | (chunk >= limit))[0]
        at = [int(index) for index in first]
        value, at[0] = int(chunk[tuple(first)]), at[0] + begin
        place = at[0] if len(at) == 1 else at
        raise DataError(
            f"{where} has the id {value} at position {place}, where ids go from 0 to {limit - 1}. "
            f"Tokenise the data again, or say how many tokens there are ({flag}N)."
        )
    return top


def symbols_beside(where: str) -> Symbols:
    """The vocabulary in the folder of a file of ids: vocabulary.json or meta.json.

    Raises:
        DataError: for a vocabulary.json that is none.
    """
    folder, notes = Path(where).parent, []
    for name in ("vocabulary.json", "meta.json"):
        path = folder / name
        if not path.is_file():
            continue
        found = _symbols_in(path, strict=name == "vocabulary.json")
        if isinstance(found, Symbols):
            return found
        notes += [found] if found else []
    if (folder / "meta.pkl").is_file():
        notes.append(
            f"{folder / 'meta.pkl'} is not read, as to unpickle is to run what is in it: if it is "
            "your own, write its itos as a list into vocabulary.json beside it, and samples are "
            "text"
        )
    return Symbols(None, None, "; ".join(notes) or None)


def _symbols_in(path: Path, strict: bool) -> Symbols | str | None:
    """What a file of symbols says; where it may be about something else, None if it is, and a note
    if it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if not strict:
            return f"samples are ids: {path} cannot be read as JSON ({error})"
        raise DataError(f"{path}: cannot be read as JSON ({error}). Mend or move it.") from None
    size = value.get("vocab_size") if isinstance(value, dict) else None
    symbols = _in_order(value)
    if symbols is None and type(size) is int and size > 1:
        return Symbols(size, None, "samples are ids, as no symbols are known", (str(path),))
    if symbols is None or len(symbols) < 2:
        if not strict:
            return None
        raise DataError(
            f"{path}: expected a list of the symbol of each token, {{symbol: id}} with ids "
            'from 0, or {"vocab_size": N}. Mend or move it.'
        )
    return symbols_of(symbols, str(path))


def symbols_of(symbols: tuple[str, ...], where: str) -> Symbols:
    """What symbols say, which `where` has: a vocabulary if all are single characters."""
    single = all(len(symbol) == 1 and not _half(symbol) for symbol in symbols)
    if single and len(set(symbols)) == len(symbols):
        return Symbols(len(symbols), symbols, None, (where,))
    note = f"samples are ids: the symbols of {where} are not single, different characters"
    return Symbols(len(symbols), None, note, (where,))


def _half(symbol: str) -> bool:
    """Whether this is half of a surrogate pair, which no file or terminal takes."""
    return "\ud800" <= symbol <= "\udfff"


def _in_order(value: Any) -> tuple[str, ...] | None:
    """The symbols of the ids 0, 1, ...; None for what does not say them."""
    if isinstance(value, dict):
        value = value.get("itos", value.get("stoi", value))
    if isinstance(value, dict) and all(type(one) is int for one in value.values()):
        value = {str(index): symbol for symbol, index in value.items()}
    if isinstance(value, dict):
        value = [value.get(str(index)) for index in range(len(value))]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return None
    return tuple(value)


def _is_text(start: bytes) -> bool:
    """Whether a file begins with so many bytes of printable ASCII as ids of 2 bytes do not have by
    chance.
    """
    return len(start) >= 64 and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in start)


def _misread(start: bytes, kind: np.dtype) -> str | None:
    """What the numbers that a file begins with show the ids to be, if that is not what they are
    read as; else they would be trained on as they are, as nothing in the file says it.
    """
    words = np.frombuffer(start[: len(start) // 8 * 8], "<u2").reshape(-1, 4)
    if len(words) < 32:
        return None
    low, high = words[:, ::2], words[:, 1::2]
    if words.any() and not words[:, 2:].any():
        return (
            "of every 8 bytes the last 4 are 0, as if ids were written in 8 bytes (int64). Save "
            f"them as uint16, or as uint32 and give {_WIDE}."
        )
    # Ids of 4 bytes whose vocabulary ends below 2^20, the largest that there are, have an upper
    # half below 16. In a stream of 2 bytes every second id would be one of the first 16 tokens
    # while the others go beyond 32,768, and no tokeniser writes that.
    most = int(high.max())
    if kind.itemsize == 2 and (most == 0 or (most < 16 and low.max() >= 1 << 15)):
        return (
            f"every second number is {most}{' or less' * (most > 0)}, as if ids were written in 4 "
            f"bytes: {_WIDE} reads those."
        )
    numbers = words.view(kind)
    if numbers.any() and not (numbers % 256).any():
        return (
            "every number is a multiple of 256, as if ids were written big-endian. Save them "
            f"little-endian: numpy's {kind.str!r}."
        )
    return None


def _mapped(where: str, dtype: str) -> np.ndarray:
    """The ids of a .bin file, on the disk.

    Raises:
        DataError: for a file that is none.
    """
    regular_file(where)
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        size = os.path.getsize(where)
        with open(where, "rb") as file:
            start = file.read(1 << 13)
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such file.") from None
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}.") from error
    if size == 0:
        raise DataError(f"{where}: the file is empty.")
    name = Path(where).name
    if _CIFAR.fullmatch(name) or _CIFAR_100.get(name) == size:
        raise DataError(
            f"{where}: expected token ids; this is a batch of CIFAR's pictures, by its name. Give "
            f"the folder that it is in: --data {shlex.quote(str(Path(where).parent))}"
        )
    for mark, called in _MARKS.items():
        if start.startswith(mark):
            raise DataError(f"{where}: expected token ids and nothing else; this is {called}.")
    if _is_text(start):
        raise DataError(
            f"{where}: expected token ids and nothing else; this is text. Name it .txt, or .jsonl "
            "if it is JSON lines."
        )
    if size % kind.itemsize:
        raise DataError(
            f"{where}: {size:,} bytes are no whole number of {dtype} ids of {kind.itemsize} bytes: "
            "the file is cut short, or something else. Write it again."
        )
    wrong = _misread(start, kind)
    if wrong is not None:
        raise DataError(f"{where}: {wrong}")
    return np.memmap(where, kind, mode="r")
