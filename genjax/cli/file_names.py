"""What the files of samples, reports and pictures are called: names that say what is in them, and
never those of files that hold something else.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genjax.cli.terminal import say
from genjax.errors import ConfigError, regular_file

ENDINGS = (".npz", ".png", ".txt", ".mid")  # of samples


def sample_stem(options: Any, n: int, asked: dict[str, Any], arrays: dict[str, Any]) -> Path:
    """Where samples are written: a name that says how they were made. Where it does not say all, as
    of a prompt, and the name is taken by others, a hash of it all is added.
    """
    parts = [f"sample_n{n}_seed{options.seed}"]
    if options.cond:
        parts.append(f"cond{options.cond}")
    parts += [name for name in ("means", "film") if getattr(options, name)]
    parts += ["best"] * (options.which == "best")
    parts += [] if options.sigma_rel is None else [f"sigma{options.sigma_rel:g}"]
    if "prompt" in asked:
        parts.append("prompt")
    parts += [f"{name}{value}" for name, value in asked.items() if name != "prompt"]
    name = "_".join(parts)
    given = repr((parts, asked.get("prompt")))
    added = "_" + hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    # Some file systems do not tell A from a.
    if len(name) > 150 or not re.fullmatch(r"[a-z0-9,.=+-]*", options.cond or ""):
        name = re.sub(r"[^\w,.=+ -]", "_", name, flags=re.ASCII)[:150] + added
    stem = options.run / "samples" / name
    if "prompt" in asked and not name.endswith(added) and _taken(stem) and not _same(stem, arrays):
        return stem.with_name(name + added)
    return stem


def free(path: Path, arrays: dict[str, Any]) -> Path:
    """A name for samples that somebody gave, without an ending that they get anyway, and with a
    number where something else is there.

    Raises:
        ConfigError: for what is no name of a file.
    """
    _check_name(path)
    stem = path.with_suffix("") if path.suffix.lower() in ENDINGS else path
    numbered = (stem.with_name(f"{stem.name}-{number}") for number in itertools.count(2))
    for candidate in itertools.chain([stem], numbered):
        if not _taken(candidate) or _same(candidate, arrays):
            if candidate != stem:
                say(f"{stem} is taken by something else, which stays: written as {candidate}")
            return candidate
    raise AssertionError("there is always another number")


def _taken(stem: Path) -> bool:
    """Whether there is a file that samples of that name would be written to."""
    names = (stem.name + ending for ending in (".npz", ".png", ".txt", "_0.mid"))
    return any(os.path.lexists(stem.with_name(name)) for name in names)


def _same(stem: Path, arrays: dict[str, Any]) -> bool:
    """Whether these very samples were written there before."""
    import numpy as np

    path = stem.with_name(stem.name + ".npz")
    try:
        regular_file(path)
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            there = dict(file)
    except Exception:  # none, or anything else that somebody has put there
        return False
    here = {name: np.asarray(value) for name, value in arrays.items()}
    kinds = [{name: (one.dtype, one.shape) for name, one in of.items()} for of in (here, there)]
    return kinds[0] == kinds[1] and all(
        here[name].tobytes() == there[name].tobytes() for name in here
    )


def report_name(
    split: str, data: str | None, which: str = "newest", sigma_rel: float | None = None
) -> str:
    """What a report is called: report.json is that of the test split."""
    usual = "test" if data is None else "all"
    parts = ["report", *[data] * (data is not None), *[split] * (split != usual)]
    parts += [which] * (which != "newest")
    parts += [] if sigma_rel is None else [f"sigma{sigma_rel:g}"]
    return "-".join(parts).replace("/", "_") + ".json"


def report_path(path: Path, report: dict[str, Any]) -> Path:
    """Where a report is written: over an earlier one of the same, and under a name with a number
    where that has a report about something else, such as another file of the same name, of another
    estimator, or about more: examples, or figures about samples.
    """
    for candidate in _numbered(path):
        if _replaceable(candidate, report):
            if candidate != path:
                say(f"{path} is about other or more data, and stays: written as {candidate}")
            return candidate
    raise AssertionError("there is always another number")


def _replaceable(path: Path, report: dict[str, Any]) -> bool:
    """Whether there is nothing, what is no report, or one about the same and of no more of it."""
    from genjax.runs.folder import read_json

    if not path.is_file():
        return True
    try:
        there = read_json(path)
    except ConfigError:  # which is damaged
        return True
    same = all(there.get(name) == report[name] for name in ("data", "split"))
    same &= there.get("which", "newest") == report["which"]
    how = report.get("estimator")
    same &= there.get("estimator", how) == how
    same &= bool(report.get("figures")) or not there.get("figures")
    same &= not _more(there.get("n"), report["n"])
    return same and ("files" not in there or _hashes(there) == _hashes(report))


def _more(there: Any, here: int) -> bool:
    return isinstance(there, int) and there > here


def _hashes(report: dict[str, Any]) -> list[Any]:
    files = report["files"] if isinstance(report["files"], list) else []
    return [one.get("sha256") for one in files if isinstance(one, dict)]


def _check_name(path: Path) -> None:
    if path.name in ("", ".."):
        raise ConfigError(
            f"--out takes the name of a file, such as {path / 'NAME'}; {str(path)!r} is a folder."
        )


def unused_png(path: Path) -> Path:
    """The path, which ends in .png as what is written is one, with a number where something is
    there already.

    Raises:
        ConfigError: for what is no name of a file.
    """
    _check_name(path)
    if path.suffix.lower() != ".png":
        path = path.with_name(f"{path.name}.png")
    if not os.path.lexists(path):
        return path
    found = next(one for one in _numbered(path) if not os.path.lexists(one))
    say(f"{path} is there already, and stays: written as {found}")
    return found


def _numbered(path: Path) -> Iterator[Path]:
    """The path, and the same with numbers, from 2 on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
