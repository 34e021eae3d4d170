"""Data sets: sources, their loaders, and the order in which they are visited.

`open_source("digits", conditional=True)`, `open_source("mine.npz")` or `open_source("book.txt")`
gives a `Source`; `batch_at` takes batches from it.
"""

import contextlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genjax.data.arrays import arrays
from genjax.data.augment import augmentation
from genjax.data.densities import checkerboard, grid, moons, pinwheel, ring, swiss_roll
from genjax.data.folders import files_below
from genjax.data.idx import read_idx, write_idx
from genjax.data.image_files import ARCHIVES, image_files
from genjax.data.image_files import ENDINGS as IMAGE_ENDINGS
from genjax.data.images import digit_pixels, digit_rows, digits, fashion_mnist, mnist
from genjax.data.json_lines import json_lines
from genjax.data.memory import from_arrays
from genjax.data.midi_files import ENDINGS as MIDI_ENDINGS
from genjax.data.midi_files import midi_files
from genjax.data.music import jsb, midi, rolls
from genjax.data.order import batch_indices, permutation
from genjax.data.processes import hmm, lgssm, markov
from genjax.data.source import (
    Source,
    Splits,
    batch_at,
    cast,
    example_batch,
    prepare_at,
    validate,
)
from genjax.data.synthetic import textures, zipf
from genjax.data.tables import table
from genjax.data.text import (
    decode,
    encode,
    encode_by,
    names,
    shakespeare,
    text,
    unicode_classes,
    unicode_names,
)
from genjax.data.tokens import token_stream
from genjax.errors import ConfigError, DataError, unknown_name
from genjax.settings import check_call

SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "ring": ring,
    "grid": grid,
    "moons": moons,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
    "swiss_roll": swiss_roll,
    "digit_rows": digit_rows,
    "digit_pixels": digit_pixels,
    "unicode_names": unicode_names,
    "shakespeare": shakespeare,
    "names": names,
    "jsb": jsb,
    "markov": markov,
    "hmm": hmm,
    "lgssm": lgssm,
    "zipf": zipf,
    "textures": textures,
}

# What makes a source of a user's own file, by the ending of its path, in whatever case. A folder is
# of pictures or music.
FILES: dict[str, Callable[..., Source]] = {
    ".npz": arrays,
    ".npy": arrays,
    ".csv": table,
    ".tsv": table,
    ".parquet": table,
    ".txt": text,
    ".txt.gz": text,
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines,
    ".ndjson": json_lines,
    ".ndjson.gz": json_lines,
    ".bin": token_stream,
    ".mat": rolls,
    **dict.fromkeys(MIDI_ENDINGS, midi_files),
    **dict.fromkeys(ARCHIVES, image_files),
}


MEMORY = "memory"  # what stands in the place of a name or path of data that were in memory


def in_memory() -> Source:
    """The data of a run that were in memory, and so are not there any more.

    Raises:
        DataError: always.
    """
    raise DataError(
        "The data of this run were in memory and are not kept. In Python, give them again: "
        "run.evaluate(data=x); on the command line, `genjax evaluate RUN --data PATH`."
    )


def loader(name: str | os.PathLike[str]) -> Callable[..., Source]:
    """The function that makes the source: one of `SOURCES`, or one of `FILES` for a path with its
    ending; for a run folder one without options, since `runs.stages` opens those.

    Raises:
        ConfigError: for a name that is none of these.
    """
    name = os.fspath(name)
    if name == MEMORY:
        return in_memory
    if is_run(name):
        return run_folder
    if _is_path(name):
        return next(make for ending, make in FILES.items() if name.lower().endswith(ending))
    if os.path.isdir(name) and name not in SOURCES:
        return midi_files if _holds_music(name) else image_files
    if name not in SOURCES:
        *endings, last = FILES
        if os.path.exists(name) or os.sep in name or Path(name).suffix:
            there = "is of no kind that is read" if os.path.exists(name) else "is not there"
            raise DataError(
                f"{name} {there}; files end in {', '.join(endings)} or {last}, and a run folder "
                "has a config.json."
            )
        raise unknown_name(
            "data set",
            name,
            [*SOURCES, f"a path ending in {', '.join(endings)} or {last}"],
        )
    return SOURCES[name]


def open_source(name: str | os.PathLike[str], **options: Any) -> Source:
    """The source of that name (see `SOURCES`) or of a file (see `FILES`), made with the options
    that its loader takes.

    Raises:
        ConfigError: for an unknown name, an option that the loader does not take, or a value that
            is not what its annotation says.
        DataError: for a file of one's own that cannot be used; files of named data sets are read by
            `Source.load`.

    Example:
        >>> from genjax import open_source
        >>> source = open_source("digits")
        >>> source.spec.shape, source.load().train.x.shape[1:]
        ((8, 8, 1), (8, 8, 1))
    """
    name = os.fspath(name)
    make = loader(name)
    own = name not in SOURCES and name != MEMORY
    bound = {"path": name} if own else {}
    takes = [option for option in inspect.signature(make).parameters if option not in bound]
    for option in options:
        if option not in takes:
            raise ConfigError(
                f"The data set {name!r} does not take the option {option!r}. It takes: "
                f"{', '.join(takes)}."
            )
    check_call(make, options)
    return make(**bound, **options)


def is_run(name: str) -> bool:
    """Whether a name is that of a run folder, there or still to be trained: a folder that has a
    config.json, or a path below a folder `runs` that is no file and no folder of something else. A
    folder called like a data set is not meant by that name: ./digits is.
    """
    if name in SOURCES or name == MEMORY:
        return False
    path = Path(name)
    if (path / "config.json").is_file():
        return True
    below = len(path.parts) > 1 and "runs" in path.parts
    return below and not _is_path(name) and not path.is_file() and not _holds_files(path)


def run_folder(path: str) -> Source:
    """Not a source by itself: what a run has made is read by `genjax.runs.stages`.

    Raises:
        DataError: always, with the commands that open a run as data.
    """
    raise DataError(
        f"{path} is a run folder, which commands take in the place of data and `open_source` does "
        "not: genjax.runs.stages.opened reads it."
    )


def _holds_files(path: Path) -> bool:
    """Whether there is a folder with something in it that a person sees: the lock of a run that is
    still to write its settings is hidden.
    """
    with contextlib.suppress(OSError):
        return path.is_dir() and not all(inner.name.startswith(".") for inner in path.iterdir())
    return False


def _holds_music(folder: str) -> bool:
    """Whether a folder's first files of a known kind are MIDI files."""
    first = next(files_below(folder, (*MIDI_ENDINGS, *IMAGE_ENDINGS)), "")
    return first.lower().endswith(MIDI_ENDINGS)


def _is_path(name: str) -> bool:
    return name.lower().endswith(tuple(FILES))


__all__ = [
    "FILES",
    "MEMORY",
    "SOURCES",
    "Source",
    "Splits",
    "arrays",
    "augmentation",
    "batch_at",
    "batch_indices",
    "cast",
    "checkerboard",
    "decode",
    "digit_pixels",
    "digit_rows",
    "digits",
    "encode",
    "encode_by",
    "example_batch",
    "fashion_mnist",
    "from_arrays",
    "grid",
    "hmm",
    "image_files",
    "is_run",
    "jsb",
    "json_lines",
    "lgssm",
    "loader",
    "markov",
    "midi",
    "midi_files",
    "mnist",
    "moons",
    "names",
    "open_source",
    "permutation",
    "pinwheel",
    "prepare_at",
    "read_idx",
    "ring",
    "rolls",
    "shakespeare",
    "swiss_roll",
    "table",
    "text",
    "textures",
    "token_stream",
    "unicode_classes",
    "unicode_names",
    "validate",
    "write_idx",
    "zipf",
]
