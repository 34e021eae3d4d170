"""What the data and the settings of a run are, so that a change of them is told.

data.json in a run folder has the absolute path and the SHA-256 of each file that the data are read
from; so does every checkpoint, beside a copy of config.json and spec.json. `genjax evaluate` and
going on compare the files, and everything that reads a checkpoint compares the settings. Of data
sets that are made, or whose published hash is checked as they are read, there are no files here.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genjax.data import Source
from genjax.errors import CheckpointError, ConfigError, DataError, regular_file
from genjax.runs.folder import (
    MAY_CHANGE,
    as_known,
    check_spec,
    completed,
    is_there,
    read_json,
    read_spec,
    write_json,
)
from genjax.spec import DataSpec

FILE = "data.json"
_OLD_DATA = "Bring the old data back, or train in another folder with --out."


# --- files ----------------------------------------------------------------------------------------


def files_of(source: Source, known: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The files of a source: path, size, times and SHA-256. What is `known` of a file of the same
    path, size and times is not computed again.

    Raises:
        DataError: for a file that cannot be read.
    """
    found = [file_of(os.path.abspath(path), known) for path in source.files]
    if source.contents is not None:
        path, sha256 = source.contents
        nothing = {"size": 0, "mtime_ns": 0, "ctime_ns": 0}
        where = os.path.abspath(path) if os.path.exists(path) else path
        found.append({"path": where, **nothing, "sha256": sha256})
    return found


def file_of(path: str, known: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """One file, as `files_of` has it.

    Raises:
        DataError: for a file that cannot be read.
    """
    before = {one.get("path"): one for one in known}
    regular_file(path)
    try:
        about = os.stat(path)
        times = {"mtime_ns": about.st_mtime_ns, "ctime_ns": about.st_ctime_ns}
        found = {"path": path, "size": about.st_size, **times}
        old = dict(before.get(path, {}))
        sha256 = old.pop("sha256", None)
        if sha256 is None or old != found:
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return {**found, "sha256": sha256}


def check_files(
    now: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]], folder: Path, advice: str
) -> None:
    """Refuse files whose bytes are not those that a run was trained on, wherever they are.

    Raises:
        DataError: with what differs, and the advice.
    """
    if [one["sha256"] for one in now] == [one["sha256"] for one in kept]:
        return
    lines = [f"  in training: {_told(one)}\n" for one in kept]
    lines += [f"  now: {_told(one)}\n" for one in now]
    raise DataError(
        f"The data are not those that {folder} was trained on:\n{''.join(lines)}{advice}"
    )


def _told(one: Mapping[str, Any]) -> str:
    size = f", {one['size']:,} bytes" if one["size"] else ""
    return f"{one['path']}{size}, SHA-256 {one['sha256'][:12]}"


def check_kept(folder: Path, spec: DataSpec, files: Sequence[Mapping[str, Any]]) -> None:
    """Refuse data of another spec or other files than a run folder says; nothing is written.

    Raises:
        DataError: with what differs.
    """
    there, kept = read_spec(folder), read_files(folder)
    if there is not None:
        check_spec(spec, there, folder)
    if kept is not None:
        check_files(files, kept, folder, _OLD_DATA)


def keep_files(folder: Path, files: Sequence[Mapping[str, Any]]) -> None:
    """Write data.json, or check that the files are still those of which it is.

    Raises:
        DataError: if they are not.
        CheckpointError: if the disk does not take it.
    """
    kept = read_files(folder)
    if kept is not None:
        check_files(files, kept, folder, _OLD_DATA)
    if kept != list(files):
        write_json(folder / FILE, {"files": list(files)})


def read_files(folder: Path) -> list[dict[str, Any]] | None:
    """What data.json in a run folder says; None in a folder from before there was one.

    Raises:
        ConfigError: for a damaged file.
    """
    path = folder / FILE
    if not is_there(path) or not path.is_file():
        return None
    values = read_json(path)
    try:
        files = values["files"]
        kinds = {"path": str, "size": int, "mtime_ns": int, "ctime_ns": int, "sha256": str}
        for one in files:
            if not all(type(one[name]) is kind for name, kind in kinds.items()):
                raise TypeError(f"found {one}")
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__} {error}.") from error
    return files


# --- settings -------------------------------------------------------------------------------------


def note_of(config: Mapping[str, Any], spec: DataSpec, files: Sequence[Mapping[str, Any]]) -> dict:
    """What every checkpoint keeps of the run that it belongs to."""
    return {"config": dict(config), "spec": plain(spec), "files": [dict(one) for one in files]}


def plain(spec: DataSpec) -> dict[str, Any]:
    """A spec as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def check_note(note: Mapping[str, Any], about: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on from a checkpoint of other settings or data than `about` says, which is the
    note that new ones would get.

    Raises:
        CheckpointError, DataError: with what differs.
    """
    check_settings(note, about["config"], DataSpec(**about["spec"]), folder)
    if "files" in note:
        check_files(about["files"], note["files"], folder, _OLD_DATA)


def check_settings(
    note: Mapping[str, Any], config: Mapping[str, Any], spec: DataSpec | None, folder: Path
) -> None:
    """Refuse a config.json or spec.json that is not the one that a checkpoint was saved with.

    Raises:
        CheckpointError: with what differs, and both values.
    """
    was, now = note.get("config"), dict(config)
    if was is not None:
        _refuse(folder / "config.json", completed(was), completed(now))
    if note.get("spec") is not None and spec is not None:
        # A spec from before there was some field has its default.
        there = DataSpec(**note["spec"])
        _refuse(folder / "spec.json", plain(there), plain(as_known(spec, there)))


def _refuse(path: Path, was: Any, now: Any) -> None:
    lines = differences(was, now)
    lines = [line for line in lines if not line.startswith(tuple(f"{one}:" for one in MAY_CHANGE))]
    if lines:
        raise CheckpointError(
            f"{path} is not the one that the checkpoint was saved with:\n  "
            + "\n  ".join(lines)
            + "\nBring the old file back. Nothing was changed."
        )


def differences(was: Any, now: Any, path: str = "", most: int = 8) -> list[str]:
    """Where two trees of JSON differ, a line each: "model.hidden: 64 in the checkpoint, 65 now"."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        lines = []
        for name in [*was, *(name for name in now if name not in was)]:
            inner = f"{path}.{name}" if path else str(name)
            lines += differences(was.get(name), now.get(name), inner, most)
        return lines[:most]
    return [] if was == now else [f"{path}: {_short(was)} in the checkpoint, {_short(now)} now"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
