"""Text as tokens: characters or bytes, as windows of one long stream or as one item a line.

A stream is split by position, and its training set is every window of `context` tokens, a view that
copies nothing; validation and test windows do not overlap. Lines are padded with the end token, the
newline, to one length.
"""

import functools
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genjax.data.files import read_published
from genjax.data.idx import read_bytes
from genjax.data.lines import (
    about_lengths,
    line_lengths,
    lines_source,
    pad_lines,
    sizes,
    split_rows,
    without_long,
)
from genjax.data.pieces import decode_pieces, encode_pieces, pieces_source
from genjax.data.source import Source, Splits, TooFew, cast, validate
from genjax.data.streams import (
    Layout,
    Order,
    Parts,
    Unit,
    by_position,
    check_layout,
    check_name,
    stream_source,
    stream_windows,
    text_spec,
)
from genjax.errors import ConfigError, DataError
from genjax.protocol import Array, Batch, DataSpec
from genjax.settings import Count, Whole

BYTES = tuple(
    map(chr, range(256))
)  # the vocabulary of bytes: each stands under the character of its Latin-1 form

_CAPITALS, _SMALL = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
_UNICODE = tuple("\n -0123456789" + _CAPITALS)
_LONGEST = 83  # characters of a Unicode name
_COMMON = 40  # a first word of at least so many names is a class
_SHAKESPEARE = tuple("\n !$&',-.3:;?" + _CAPITALS + _SMALL)
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_NAMES_SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"


def unicode_names(
    conditional: bool = False,
    layout: Layout = "stream",
    context: Count = 64,
    order: Order = "shuffle",
) -> Source:
    """The 12,886 names of the characters of Unicode 3.2, without CJK ideographs and Hangul
    syllables; no file is needed.

    Python's `unicodedata.ucd_3_2_0`, the same in every version: 354,743 characters with the
    newlines between, 39 symbols. The names are put in a fixed random order and split 10,308 / 1,289
    / 1,289 before they are joined by newlines, so that no name is in two splits; both layouts have
    the same names in each.

    Args:
        conditional: give the first word of the name as the condition, a label named as
            `unicode_classes` lists; lines only.
        layout: "stream" joins the names by newlines and takes windows; "lines" makes each name,
            ended by a newline, an example.
        context: how many characters a window of the stream has.
        order: "shuffle" takes windows at random; "stream" lets each place in the batch read on from
            step to step.

    Raises:
        ConfigError: for a condition or order that the layout does not allow, an unknown layout or
            order, or a context below 1.
    """
    check_layout(layout, order)
    if conditional and layout != "lines":
        raise ConfigError(
            "A window of a stream holds several names, so it has no class: conditional needs "
            "layout='lines'."
        )
    classes = unicode_classes() if conditional else ()
    every = _unicode_names()
    shuffled = [[every[i] for i in rows] for rows in split_rows(len(every), round(len(every) / 10))]
    about = f"{sizes(shuffled)} names of Unicode characters, from Python's unicodedata, no download"
    train, valid, test = (
        encode("\n".join(part), _UNICODE, "a name").astype(np.uint8) for part in shuffled
    )
    if layout == "stream":
        spec = text_spec("unicode_names", _UNICODE, context)
        return stream_source(spec, lambda: (train, valid, test), order, about, "the Unicode names")
    spec = text_spec("unicode_names", _UNICODE, _LONGEST + 1, "\n", classes or None)

    def load() -> Splits:
        number = {word: i for i, word in enumerate(classes)}
        other = len(classes) - 1
        labels = [
            np.array([number.get(name.split()[0], other) for name in part], np.int32)
            for part in shuffled
        ]
        xs = [pad_lines(tokens, spec) for tokens in (train, valid, test)]
        batches = [
            Batch(x, label if conditional else None) for x, label in zip(xs, labels, strict=True)
        ]
        return validate(Splits(*batches), spec, "the Unicode names")

    about += f"; {len(classes)} classes by the first word" if conditional else ""
    return Source(spec, load, cast(spec), description=about)


@functools.cache
def unicode_classes() -> tuple[str, ...]:
    """The classes of `unicode_names(conditional=True)` in the order of their labels.

    The first words of at least 40 names, the most frequent first, and "OTHER", which stands for all
    the rest.
    """
    counts = Counter(name.split()[0] for name in _unicode_names())
    common = [word for word, count in counts.items() if count >= _COMMON]
    return (*sorted(common, key=lambda word: (-counts[word], word)), "OTHER")


def text(
    path: str,
    unit: Unit = "character",
    layout: Layout = "stream",
    context: Count = 64,
    order: Order = "shuffle",
    max_length: Whole = 0,
    tokenizer: str | None = None,
) -> Source:
    """A text file of one's own, as one stream or as one item a line; it is read at once, as the
    spec depends on it.

    The vocabulary is the sorted characters of the file, or the 256 bytes. A stream is split by
    position: 85 % training, 5 % validation, and the last 10 % test. Lines are split 80 / 10 / 10 in
    a fixed random order; empty ones are dropped, and equal ones may fall into two splits. A gzipped
    file will do. Windows line ends and a byte order mark are taken off (but for a stream of bytes,
    which is the file as it is).

    Args:
        path: the text file; it must be UTF-8 for characters, and may be anything for bytes.
        unit: whether a token is a "character" or a "byte".
        layout: "stream" takes windows of the whole text; "lines" makes each line, ended by a
            newline, an example.
        context: how many tokens a window of the stream has.
        order: "shuffle" takes windows at random; "stream" lets each place in the batch read on from
            step to step.
        max_length: leave out lines of more tokens than this, 0 for none: all are padded to the
            longest. Lines only.
        tokenizer: the tokenizer.json of Hugging Face's tokenizers, whose pieces of words are then
            the tokens of the stream.

    Raises:
        DataError: for a file that is missing, empty, no UTF-8, or too short for its context or its
            split.
        ConfigError: for an order or a longest line that the layout does not allow, an unknown unit,
            layout or order, or a context below 1.
    """
    if max_length and layout != "lines":
        raise ConfigError("max_length is for lines: it needs layout='lines'.")
    check_name("unit", unit, ("character", "byte"))
    check_layout(layout, order)
    raw = read_bytes(path)
    if not raw:
        raise DataError(f"{path}: the file is empty.")
    if tokenizer is not None:
        whole = _decode_utf8(raw, path)
        return pieces_source(whole, tokenizer, unit, layout, context, order, str(path))
    name, left = Path(path).stem, 0
    if unit == "byte":
        vocabulary = BYTES
        if layout == "lines":
            raw = raw.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
        if max_length:
            raw, left = without_long(raw, b"\n", max_length, path)
        tokens = np.frombuffer(raw, np.uint8)
    else:
        symbols = _decode_utf8(raw, path)
        if max_length:
            symbols, left = without_long(symbols, "\n", max_length, path)
        vocabulary = tuple(sorted({*symbols, "\n"} if layout == "lines" else set(symbols)))
        if len(vocabulary) < 2:
            raise DataError(
                f"{path}: a text needs at least 2 different characters; found {len(vocabulary)}."
            )
        tokens = encode(symbols, vocabulary, str(path)).astype(
            np.uint8 if len(vocabulary) <= 256 else np.int32
        )
    if layout == "stream":
        spec = text_spec(name, vocabulary, context, step=unit)
        parts = by_position(tokens)
        # Refuse a short text now, before a run folder is made.
        stream_windows(parts, spec, str(path))
        about = f"{sizes(parts)} {unit}s, {len(vocabulary)} symbols, from {path}"
        source = stream_source(spec, lambda: parts, order, about, str(path))
        return source._replace(files=(str(path),), notes=(about,))
    lengths = line_lengths(tokens, vocabulary.index("\n"))
    n = len(lengths)
    if n < 3:
        longer = f" ({left:,} longer than {max_length} were left out)" if left else ""
        raise TooFew(
            f"{path}: {n} lines that are not empty are too few{longer}; expected one each for "
            "train, valid and test."
        )
    spec = text_spec(name, vocabulary, int(lengths.max()) + 1, "\n", step=unit)
    held = max(1, round(n / 10))
    source = lines_source(
        spec, lambda: tokens, n, held, str(path), f"{len(vocabulary)} symbols, from {path}"
    )
    notes = about_lengths(lengths, unit, max_length, left)
    return source._replace(files=(str(path),), notes=(source.description, *notes))


def shakespeare(path: str | None = None, context: Count = 64, order: Order = "shuffle") -> Source:
    """Tiny Shakespeare (Karpathy 2015): 1,115,394 characters of his plays, 65 symbols, split by
    position 85 / 5 / 10.

    The test set, the last 10 %, is what nanoGPT calls its validation set; it trains on all the
    rest.

    Args:
        path: the file input.txt or the folder that has it; without it, it is looked for in
            $GENJAX_DATA.
        context: how many characters a window has.
        order: "shuffle" takes windows at random; "stream" lets each place in the batch read on from
            step to step.

    Raises:
        ConfigError: for an unknown order or a context below 1. DataError, by `load`: for a file
            that is missing or another one.
    """
    check_layout("stream", order)
    spec = text_spec("shakespeare", _SHAKESPEARE, context)
    where = "tinyshakespeare/input.txt"

    def parts() -> Parts:
        raw, found = read_published("shakespeare", where, _SHAKESPEARE_SHA256, path)
        return by_position(encode(_decode_utf8(raw, found), _SHAKESPEARE, found).astype(np.uint8))

    place = path or f"$GENJAX_DATA/{where}"
    about = f"948,084 train / 55,770 valid / 111,540 test characters, from {place}"
    return stream_source(spec, parts, order, about, "shakespeare")


def names(path: str | None = None) -> Source:
    """32,033 first names, a line each, of 26 letters and the newline: 30,033 / 1,000 / 1,000 in a
    fixed random order.

    The names of the US Social Security Administration, as published with makemore (Karpathy 2022),
    which also tests on 1,000 random lines but has no validation set. 2,539 lines repeat another
    one, so that, as there, some of the test names are trained on.

    Args:
        path: the file names.txt or the folder that has it; without it, it is looked for in
            $GENJAX_DATA.

    Raises:
        DataError, by `load`: for a file that is missing or another one.
    """
    spec = text_spec("names", ("\n", *_SMALL), 16, "\n")
    where = "names/names.txt"

    def tokens() -> np.ndarray:
        raw, found = read_published("names", where, _NAMES_SHA256, path)
        return encode(_decode_utf8(raw, found), ("\n", *_SMALL), found).astype(np.uint8)

    return lines_source(
        spec, tokens, 32_033, 1000, "names", f"from {path or f'$GENJAX_DATA/{where}'}"
    )


# --- text and tokens ----------------------------------------------------------------------------


def encode(text: str, vocabulary: Sequence[str], where: str) -> np.ndarray:
    """The tokens of a text, int32 [number of characters, or of UTF-8 bytes if the vocabulary is
    `BYTES`].

    Args:
        vocabulary: one character for each token, in any order.
        where: what the text is, for messages: a file, or "the prompt".

    Raises:
        DataError: for a character that the vocabulary lacks; the message names the first and its
            position, from 0.
    """
    if tuple(vocabulary) == BYTES:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    known = np.array([ord(symbol) for symbol in vocabulary], np.uint32)
    ranked = np.argsort(known)
    tokens = ranked[np.minimum(np.searchsorted(known, codes, sorter=ranked), len(known) - 1)]
    lacking = np.flatnonzero(known[tokens] != codes)
    if lacking.size:
        first = int(lacking[0])
        raise DataError(
            f"{where}: the character {text[first]!r} (U+{ord(text[first]):04X}) at position "
            f"{first} is not in the vocabulary, "
            f"whose {len(known)} symbols are {''.join(vocabulary)!r}."
        )
    return tokens.astype(np.int32)


def encode_by(spec: DataSpec, text: str, where: str) -> np.ndarray:
    """The tokens of a text, int32 [T], by the vocabulary or the tokenizer of a spec.

    Raises:
        DataError: see `encode`.
    """
    if spec.tokenizer is not None:
        return encode_pieces(text, spec)
    return encode(text, spec.vocabulary or (), where)


def decode(tokens: Sequence[int] | np.ndarray | Array, spec: DataSpec) -> str:
    """The text of one sequence of tokens [T], up to its end token where the spec has one.

    Bytes are read as UTF-8, with U+FFFD for what is none, such as a character that the end cuts in
    two.

    Raises:
        ConfigError: for data without a vocabulary.
    """
    if spec.tokenizer is not None:
        return decode_pieces(np.asarray(tokens), spec)
    if spec.vocabulary is None:
        raise ConfigError(f"{spec.name} is no text: its spec has no vocabulary.")
    whole = np.asarray(tokens)
    ends = np.flatnonzero(whole == spec.end) if spec.end is not None else np.zeros(0, int)
    kept = whole[: ends[0]] if ends.size else whole
    if spec.vocabulary == BYTES:
        return kept.astype(np.uint8).tobytes().decode("utf-8", "replace")
    return "".join(spec.vocabulary[token] for token in kept)


# --- sources ------------------------------------------------------------------------------------


@functools.cache
def _unicode_names() -> tuple[str, ...]:
    """In the order of the characters."""
    name = unicodedata.ucd_3_2_0.name
    every = (name(chr(code), "") for code in range(sys.maxunicode + 1))
    left_out = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLLABLE")
    return tuple(found for found in every if found and not found.startswith(left_out))


def _decode_utf8(raw: bytes, path: str) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} "
            f"({error.reason}). "
            "Convert the file to UTF-8, or take its bytes as they are with unit='byte'."
        ) from None
