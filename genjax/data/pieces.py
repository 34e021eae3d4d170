"""Text in pieces of words (byte-pair encoding and its like), by a tokenizer of Hugging Face's
`tokenizers`, whose JSON the spec keeps.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from genjax.data.idx import read_bytes
from genjax.data.lines import sizes
from genjax.data.source import Source, stored_dtype
from genjax.data.streams import by_position, stream_source, stream_windows
from genjax.errors import ConfigError, DataError
from genjax.protocol import DataSpec

_LOOKED_AT = 10_000  # characters of a text that are encoded and decoded again, to see what is lost


def pieces_source(
    text: str, tokenizer: str, unit: str, layout: str, context: int, order: str, where: str
) -> Source:
    """The source of one stream of text as the tokens of a tokenizer.

    Args:
        tokenizer: the path of its JSON file.

    Raises:
        ConfigError: for lines or bytes, which it does not go with, or a missing package.
        DataError: for a file that is no tokenizer, or a text that is too short.
    """
    if layout != "stream" or unit != "character":
        raise ConfigError(
            "--tokenizer goes with --layout stream and --unit character. Leave those out, or the "
            "tokenizer."
        )
    try:
        saved = read_bytes(tokenizer).decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{tokenizer}: not UTF-8, so no JSON of a tokenizer.") from None
    made = _tokenizer(saved, tokenizer)
    levels = made.get_vocab_size(with_added_tokens=True)
    if levels < 2:
        raise DataError(f"{tokenizer}: has {levels} tokens, where at least 2 are expected.")
    tokens = _encoded(made, text)
    spec = DataSpec(
        (context,),
        "tokens",
        max(levels, int(tokens.max(initial=0)) + 1),
        step="token",
        name=Path(where).stem.removesuffix(".jsonl"),
        tokenizer=saved,
    )
    parts = by_position(tokens.astype(stored_dtype(spec)))
    stream_windows(parts, spec, where)  # refuse a short text now, before a run folder is made
    about = f"{sizes(parts)} tokens, {spec.levels:,} in {tokenizer}, from {where}"
    notes = [f"{len(text) / max(1, len(tokens)):.1f} characters a token"]
    start = text[:_LOOKED_AT]
    if decode_pieces(_encoded(made, start), spec) != start:
        notes.append("the tokenizer does not give every text back as it was")
    source = stream_source(spec, lambda: parts, order, about, where)
    return source._replace(files=(where, tokenizer), notes=(about, *notes))


def encode_pieces(text: str, spec: DataSpec) -> np.ndarray:
    """The tokens of a text, int32 [T], by the tokenizer of the spec.

    Raises:
        ConfigError: if the package is missing. DataError: for a damaged tokenizer.
    """
    return _encoded(_tokenizer(spec.tokenizer or "", spec.name), text)


def decode_pieces(tokens: np.ndarray, spec: DataSpec) -> str:
    """The text of tokens [T], by the tokenizer of the spec.

    Raises:
        ConfigError: if the package is missing. DataError: for a damaged tokenizer.
    """
    made = _tokenizer(spec.tokenizer or "", spec.name)
    return made.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)


def _encoded(made: Any, text: str) -> np.ndarray:
    return np.asarray(made.encode(text, add_special_tokens=False).ids, np.int32)


@functools.lru_cache(maxsize=4)
def _tokenizer(saved: str, where: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ConfigError(
            "Text in pieces is read and written by tokenizers, which is not installed: pip install "
            "'genjax-zoo[tokenizers]'."
        ) from None
    try:
        made = Tokenizer.from_str(saved)
    except Exception as error:  # it raises plain Exceptions
        raise DataError(
            f"{where}: cannot be read as a tokenizer ({str(error)[:200]}). Expected the "
            "tokenizer.json of Hugging Face's tokenizers, which Tokenizer.save writes."
        ) from None
    made.no_padding()
    made.no_truncation()  # which would cut the text without a word
    return made
