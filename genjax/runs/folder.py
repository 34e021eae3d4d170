"""A run folder and what is in it: what `train`, `sweep`, `sample` and `evaluate` read and write.

config.json      every setting of the run
spec.json        what its data look like (shape, vocabulary, end token ...), so that sampling needs
                 no data
data.json        the files that the data are read from: absolute path, size, times, SHA-256
first/           of a run that stands on another: the settings of that one, by which it is rebuilt
metrics.jsonl    one JSON object a line: step, seconds of training so far, means over the window,
                 validation; what else was found in it is in metrics.jsonl.bad
.lock            who trains there, for as long as somebody does
tensorboard/     the same numbers as TensorBoard events
wandb_id.txt     with --log-to wandb: the id of the run there; trackio_id.txt likewise
checkpoints/     the newest few states
best/            the best state by the figure on the validation split
averages/        with --sigma-rels: what is stored of the weights' averages, see `runs.averages`
samples/         pictures or text of samples, and *.npz (and *.mid) of what `genjax sample` drew
curves.png       learning curves
report.json      what `genjax evaluate` found; report-valid.json of another split, and so on
export/          what `genjax export` wrote: weights, sampler and score for other programs
"""

import dataclasses
import json
import os
import platform
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from genjax.errors import ConfigError, DataError, reading, replacing
from genjax.protocol import DataSpec
from genjax.runs.json_text import dumps
from genjax.settings import check_fields
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, as_now, config_hash, flatten, from_dict, to_dict
from genjax.zoo.sections import settings_of


def write_json(path: Path, values: Any) -> None:
    """Write JSON, whole or not at all; null stands for NaN and infinity, which JSON has not.

    Raises:
        CheckpointError: if the disk does not take it; what was there before stays.
    """
    with replacing(path) as temporary:
        temporary.write_text(dumps(values, indent=2) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Versions and hardware, for reports."""
    names = ("genjax-zoo", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = jax.devices()[0]
    hardware = {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
    }
    return {"versions": versions, "hardware": hardware}


# Settings with which a run may go on that was begun with others.
MAY_CHANGE = ("schedule.steps", "schedule.stop_after")


def open_folder(
    folder: Path,
    values: dict[str, Any],
    say: Callable[[str], None] = print,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Make a run folder, or check that the one that is there belongs to the same settings. It may
    go on to more steps than it was to have, and end early or not.

    Args:
        say: what is told of settings that change.
        check: refuses what else does not belong to the run that is there, before its settings are
            changed.

    Raises:
        ConfigError: if it holds another run (the message lists the differences) or something that
            is no run.
        CheckpointError: if it cannot be written.
    """
    check_folder(folder)
    if not is_there(folder / "config.json"):
        write_json(folder / "config.json", values)
        return
    there = read_config(folder)
    old, new = flatten(completed(there)), flatten(values)
    if old == new:
        return
    if goes_on(old, new):
        check()
        for name in (name for name in MAY_CHANGE if old.get(name) != new.get(name)):
            say(f"{folder} goes on with {name} {new[name]}, which was {old[name]}")
        if old["schedule.steps"] != new["schedule.steps"]:
            say_schedules(old, say)
        write_json(folder / "config.json", values)
        return
    missing = "(not set)"
    lines = [
        f"  {name}: there {old.get(name, missing)!r}, now {new.get(name, missing)!r}\n"
        for name in sorted({*old, *new})
        if old.get(name, missing) != new.get(name, missing)
    ]
    raise ConfigError(
        f"{folder} holds a run with other settings; nothing was changed:\n{''.join(lines)}"
        "Give the same settings to go on with it, or another folder with --out."
    )


def goes_on(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether settings differ in nothing but what may change: steps may only grow."""
    same = all(old.get(name) == new.get(name) for name in {*old, *new} - set(MAY_CHANGE))
    before, now = old.get("schedule.steps"), new.get("schedule.steps")
    return same and isinstance(before, int) and isinstance(now, int) and before <= now


def say_schedules(old: dict[str, Any], say: Callable[[str], None]) -> None:
    """That a step size which falls over the whole run now falls over a longer one."""
    falling = {
        value
        for name, value in old.items()
        if name.startswith("optimizer.") and name.split(".")[-1] == "schedule"
    } - {"constant"}
    if falling:
        say(
            f"the {' and '.join(sorted(falling))} schedule of the step size is now over all steps, "
            "so that where training goes on the step size is larger than it was"
        )


# What may lie in a folder before its settings do, where a process was killed: see `lock` and
# `errors.replacing`.
_OURS = re.compile(r"\.lock|\.[0-9a-f]{16}\.part")


# What a training writes before its first step.
_BEGUN = {"config.json", "spec.json", "data.json", "first", "metrics.jsonl", "tensorboard"}


def nothing_trained(folder: Path) -> bool:
    """Whether a run folder holds settings and nothing that was made with them, as where the first
    step was refused.
    """
    names = {name for name in os.listdir(folder) if not _OURS.fullmatch(name)}
    trained = "metrics.jsonl" in names and (folder / "metrics.jsonl").stat().st_size
    return names <= _BEGUN and "config.json" in names and not trained


def check_folder(folder: Path) -> None:
    """Refuse a folder that has something else than a run in it, before anything is written there.

    Raises:
        ConfigError: for such a folder, or one that cannot be read.
    """
    if is_there(folder / "config.json"):
        return
    with reading(folder, ConfigError):
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            names = [""] if folder.exists() else []  # else a file stands above it, which is said
    if all(_OURS.fullmatch(name) for name in names):
        return
    raise ConfigError(
        f"{folder} exists and is not a run folder; nothing was written. Give another one with "
        "--out."
    )


def is_there(path: Path) -> bool:
    """Whether there is something of that name. `Path.exists` takes what it may not look at for
    missing, in some versions.

    Raises:
        ConfigError: if it cannot be known, as in a folder that may not be read.
    """
    with reading(path, ConfigError):
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as they are written now, with those that its version did not have yet:
    their defaults mean what was there before.
    """
    try:
        now = to_dict(from_dict(values, ZOO))
    except ConfigError:  # not of a recipe that there still is
        return values
    own = {name: now[name] | as_now(values[name]) for name in now if isinstance(now[name], dict)}
    return values | own


def with_buckets_of(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe without buckets of lengths if it is to go on with a run from before there were
    any, unless it says how many.
    """
    if recipe.schedule.buckets is not None or not is_there(folder / "config.json"):
        return recipe
    schedule = read_config(folder).get("schedule")
    if not isinstance(schedule, dict) or "buckets" in schedule:
        return recipe
    return dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, buckets=1))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a run folder.

    Raises:
        ConfigError: if there are none, or they are no JSON.
    """
    path = folder / "config.json"
    if not is_there(path) or not path.is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has no config.json. `genjax train NAME` makes one."
        )
    return read_json(path)


def recipe_in(folder: Path) -> Recipe:
    """The recipe whose settings a run folder keeps.

    Raises:
        ConfigError: from `read_config`, and for settings that there are not (any more).
    """
    values = read_config(folder)
    try:
        return from_dict(values, ZOO)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may hold anything.

    Raises:
        ConfigError: for anything else, or a file that cannot be read, which is another message.
    """
    with reading(path, ConfigError):
        raw = path.read_bytes()
    try:
        values = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{path} is damaged: expected JSON, found {reason}.") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} is damaged: expected a JSON object, found {type(values).__name__}."
        )
    return values


def keep_spec(folder: Path, spec: DataSpec) -> None:
    """Write the spec of a run's data beside its settings, or check that the data are still as they
    were.

    Raises:
        ConfigError: if they are not, such as a text file whose vocabulary has changed since.
    """
    there = read_spec(folder)
    if there is not None:
        check_spec(spec, there, folder)
    if spec != there:  # with names that came to be known, too: checkpoints note them from now on
        write_json(folder / "spec.json", json.loads(json.dumps(dataclasses.asdict(spec))))


def as_known(now: DataSpec, there: DataSpec) -> DataSpec:
    """The spec `now` without the names of classes and of columns, and the values of binary data,
    where `there` is from before they were kept.
    """
    if there.class_names is None and now.n_classes == there.n_classes:
        now = dataclasses.replace(now, class_names=None)
    absent = [name for name in ("columns", "values") if getattr(there, name) is None]
    return dataclasses.replace(now, **dict.fromkeys(absent))


def check_spec(now: DataSpec, there: DataSpec, folder: Path) -> None:
    """Refuse data of another spec than those that a run was trained on.

    Raises:
        DataError: with the fields that differ, and both values.
    """
    new, old = dataclasses.asdict(as_known(now, there)), dataclasses.asdict(there)
    changed = [f"{name} was {old[name]!r:.100}, is {new[name]!r:.100}" for name in new]
    changed = [text for text, name in zip(changed, new, strict=True) if new[name] != old[name]]
    if changed:
        raise DataError(
            f"The data are not those that {folder} was trained on: {'; '.join(changed)}. Bring the "
            "old data back, or train in another folder with --out."
        )


def read_spec(folder: Path) -> DataSpec | None:
    """The spec of a run's data; None in a folder from before there was one.

    Raises:
        ConfigError: for a damaged file.
    """
    path = folder / "spec.json"
    if not is_there(path):
        return None
    if not path.is_file():
        raise ConfigError(f"{path} is damaged: expected a file.")
    values = read_json(path)
    try:
        if not isinstance(values.get("shape"), list):
            raise TypeError(f"shape must be a list; found {values.get('shape')!r:.80}")
        spec = DataSpec(**values)
        check_fields(spec)
        if spec.vocabulary is not None and any(len(symbol) != 1 for symbol in spec.vocabulary):
            raise ConfigError("each symbol of vocabulary must be one character")
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"{path} is damaged: {error}.") from None
    return spec


def default_folder(recipe: Recipe, row: Recipe, prefix: str = "", **more: Any) -> Path:
    """runs/NAME, followed by the settings that differ from the zoo's row, so that each command has
    its own folder.

    Args:
        **more: what else tells this command from others, such as the axes of a sweep.
    """
    # Another data set has options of its own, of which only the changed ones need naming.
    theirs = flatten(to_dict(row.on(recipe.data))) | {"data": row.data}
    mine = flatten(to_dict(recipe))
    names = {setting.path: name for name, setting in settings_of(recipe).items()}
    changed = {
        names.get(path, path): value for path, value in mine.items() if theirs[path] != value
    }
    parts = [
        f"{name.replace('_', '-')}={_short(value)}"
        for name, value in [*sorted(changed.items()), *more.items()]
    ]
    suffix = ",".join(parts)
    # A name has at most 255 bytes; and one with line ends and the like is no name for a person.
    if len(os.fsencode(suffix)) > 100 or not suffix.isprintable():
        suffix = config_hash(to_dict(recipe) | more)
    return Path("runs") / (prefix + recipe.name + (f",{suffix}" if suffix else ""))


def _short(value: Any) -> str:
    text = "_".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("/", "_")
