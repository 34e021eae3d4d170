"""A run in the place of data: `genjax train NAME --data runs/X`.

The recipe NAME is then trained on what runs/X has learned: a density of its latents, or what else
the builder makes of a trained model (`families/compose.py`). The run keeps where that was, the step
and a hash of its checkpoint (config.json, under "first"), its settings (the folder `first/`), and
in its checkpoints its parameters. So a run folder can be moved and shared alone, and a first stage
that changed since is told.
"""

import hashlib
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax

from genjax.data import Source, augmentation, batch_indices, is_run
from genjax.errors import ConfigError, writing
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.checksums import CHECKSUMS
from genjax.protocol import DataSpec, Trained
from genjax.runs.best import ended_early
from genjax.runs.folder import is_there, nothing_trained, read_config, read_spec, recipe_in
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe
from genjax.zoo.sections import sections_of

KEPT = "first"  # the folder in a run that has the settings of its first stage


class Opened(NamedTuple):
    """What a recipe is trained on.

    Attributes:
        on: what `Recipe.build` takes: the spec of the data, or a first stage.
        source: the data that batches are of.
        data: the recipe that has this source.
        first: of a first stage: its folder, the step and hash of its checkpoint; None without one.
    """

    on: DataSpec | Trained
    source: Source
    data: Recipe
    first: dict[str, Any] | None = None


def opened(recipe: Recipe, source: Source | None = None) -> Opened:
    """The data that a recipe names, or the run; or a source that is given.

    Raises:
        ConfigError: for a run that is not there, is not finished, or is a sweep, for an `augment`
            that does not fit the data, and for `lanes` of batches that do not go on from each
            other.
        CheckpointError: for one without a whole checkpoint.
        DataError: see `Recipe.source`.
    """
    if source is not None or not is_run(recipe.data):
        source = _augmented(source or recipe.source(), recipe)
        _check_streams(recipe, source)
        return Opened(source.spec, source, recipe)
    folder = Path(recipe.data)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{recipe.name} stands on {folder}, which is not there. {how_to_train(recipe)} "
            "If it was moved, move it back: what began on it goes on with that folder alone."
        )
    from genjax.runs.load import load, source_of

    run = load(folder)
    steps = run.recipe.schedule.steps
    if run.step < steps and not ended_early(folder, run.recipe.schedule, run.step):
        raise ConfigError(
            f"{folder} is at step {run.step} of {steps}, and a first stage has to be finished. Run "
            "its command again, which goes on where it stopped."
        )
    source = _augmented(source_of(run), recipe)
    about = {"folder": str(folder), "step": run.step, "hash": checkpoint_hash(folder, run.step)}
    return Opened(Trained(run.model, run.params, run.state), source, run.data, about)


def _augmented(source: Source, recipe: Recipe) -> Source:
    """The source with the random changes of the training set that a recipe asks for, or its own."""
    asked = augmentation(recipe.schedule.augment, source.spec)
    if asked is not None and source.augment is not None:
        raise ConfigError(
            f"augment={recipe.schedule.augment!r}, and the source of {source.spec.name} has "
            "changes of its own: leave one out."
        )
    return source if asked is None else source._replace(augment=asked)


def _check_streams(recipe: Recipe, source: Source) -> None:
    """Refuse to carry a state on from a batch to the next where the batches are not such."""
    _, lanes, _ = sections_of(recipe)["model"].get("lanes", (None, 0, ""))
    if lanes and source.order is batch_indices:
        raise ConfigError(
            f"lanes={lanes} carries a state on from batch to batch, and the batches of "
            f"{source.spec.name} do not go on from each other. Say --lanes 0 (in Python lanes=0)."
        )


def first_of(recipe: Recipe) -> Trained | None:
    """The first stage of a recipe that stands on one, for what needs no data; None for others.

    Raises:
        ConfigError, CheckpointError, DataError: see `opened`.
    """
    if not is_run(recipe.data):
        return None
    on = opened(recipe).on
    assert isinstance(on, Trained)
    return on


def how_to_train(recipe: Recipe) -> str:
    """How the first stage of a recipe comes to be, in a sentence."""
    if recipe.first is None:
        return "Give the folder of a run that `genjax train NAME` has made."
    out = data = ""
    if Path(recipe.data) != Path("runs", recipe.first):  # where it comes to be by itself
        folder = shlex.quote(recipe.data)
        out, data = f" --out {folder}", f" --data {folder}"
    return (
        f"`genjax train {recipe.first}{out}` makes it, and `genjax train {recipe.name}{data} "
        "--first` trains both."
    )


def first_to_train(recipe: Recipe) -> Recipe | None:
    """What is to be trained before a recipe that stands on it: the row of the zoo or, where that
    was begun, the run that is there, with its own settings; None where it is trained to its end.

    Raises:
        ConfigError: if the recipe stands on no other run, or on none that is known.
        CheckpointError: for a folder that cannot be read.
    """
    folder = Path(recipe.data)
    there = is_run(recipe.data) and is_there(folder / "config.json")
    if there and not nothing_trained(folder):
        begun = recipe_in(folder)
        step = max(Checkpoints(folder / "checkpoints").steps(), default=0)
        done = step >= begun.schedule.steps or ended_early(folder, begun.schedule, step)
        return None if done else begun
    if not is_run(recipe.data):
        raise ConfigError(
            f"{recipe.name} on {recipe.data} stands on no other run: leave --first out, or give "
            "--data runs/NAME."
        )
    if recipe.first is None:
        raise ConfigError(
            f"{folder} is not there, and of {recipe.name} --first does not know what to train "
            f"there. {how_to_train(recipe)}"
        )
    return ZOO[recipe.first]


def checkpoint_hash(folder: Path, step: int) -> str:
    """The SHA-256 of a run's settings and of the checksums of a checkpoint, so of all its bytes."""
    return _hash(folder / "config.json", _checksums(folder, step))


def _checksums(folder: Path, step: int) -> Path:
    return Checkpoints(folder / "checkpoints").folder / str(step) / CHECKSUMS


def _hash(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def keep(folder: Path, stage: Opened) -> None:
    """Copy the settings of a first stage, and of what it stands on itself, into a run folder.

    Raises:
        CheckpointError: if the disk does not take them.
    """
    if stage.first is None or (folder / KEPT).exists():
        return
    origin, part = Path(stage.first["folder"]), folder / f"{KEPT}.part"
    with writing(folder / KEPT):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name in ("config.json", "spec.json"):
            if (origin / name).exists():  # the earliest runs kept no spec, see `read_spec`
                shutil.copyfile(origin / name, part / name)
        # With these the hash can be found again, see `kept`.
        shutil.copyfile(_checksums(origin, stage.first["step"]), part / CHECKSUMS)
        if (origin / KEPT).is_dir():
            shutil.copytree(origin / KEPT, part / KEPT)
        part.rename(folder / KEPT)


MOST = 8  # stages; a folder that somebody made may lead back to itself


def kept(folder: Path, depth: int = 0) -> tuple[DataSpec | Trained, Recipe]:
    """What the run in a folder was trained on, from the folder alone, and the recipe whose `source`
    gives its data. The parameters of a first stage are those of its init, until a checkpoint of the
    run is restored.

    Raises:
        ConfigError: for settings that are damaged.
    """
    if depth > MOST:
        raise ConfigError(f"{folder} is damaged: it stands on more than {MOST} other runs.")
    values = read_config(folder)
    recipe = recipe_in(folder)
    if "first" not in values:
        return read_spec(folder) or recipe.source().spec, recipe
    if not (folder / KEPT / "config.json").is_file():
        raise ConfigError(f"{folder} is damaged: it has no {KEPT}/config.json, of its first stage.")
    on, owner = kept(folder / KEPT, depth + 1)
    about, own = values["first"], folder / KEPT
    known = isinstance(about, dict) and is_there(own / CHECKSUMS)  # earlier runs kept none
    if known and _hash(own / "config.json", own / CHECKSUMS) != about.get("hash"):
        raise ConfigError(
            f"{own / 'config.json'} is not the one that {folder} was trained with. Bring the old "
            "file back."
        )
    model = recipe_in(own).build(on)
    return Trained(model, *model.init(jax.random.key(0))), owner
