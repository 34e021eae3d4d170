"""Runs of a model of one's own: a folder of checkpoints, which the model itself must be given to
load.

A checkpoint keeps what the data looked like, and the optimiser's state in whatever structure it
has: parameters and state are matched by name with the model's `init`, and an average of the weights
is found by what it is called.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from genjax.checks import by_name, leaves_by_name
from genjax.data import Source
from genjax.errors import CheckpointError, ConfigError, unknown_name
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.optim import TrackEmaState, averaged
from genjax.learning.step import with_followers
from genjax.protocol import DataSpec, Model, Params, PyTree, State, TrainState
from genjax.runs.best import FOLDER, WHICH
from genjax.runs.folder import as_known, is_there
from genjax.runs.identity import check_files, differences, files_of, plain


class Weights(NamedTuple):
    """What a checkpoint has of a model: averaged parameters where an average was kept."""

    params: Params
    state: State
    step: int


def checkpoints_of(
    folder: Path,
    model: Model,
    source: Source | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Checkpoints:
    """Where the training of a model keeps its states; what is there must be of data like its own
    and, to go on with them, of the same data.

    Args:
        source: what it is trained on; None to read only.
        settings: of the training, such as the size of batches; what is there must have been trained
            with the same.

    Raises:
        CheckpointError, DataError: from the reading, for states of other data or settings.
        ConfigError: for the folder of a recipe's run, to train in.
    """
    if source is not None and is_there(folder / "config.json"):
        raise ConfigError(f"{folder} is the run of a recipe: give a model of one's own another.")
    files = [] if source is None else files_of(source)
    data = None if source is None else source.spec.name

    def check(note: dict[str, Any]) -> None:
        if note.get("spec") is None:
            return
        there = DataSpec(**note["spec"])
        if lines := differences(plain(there), plain(as_known(model.spec, there))):
            raise CheckpointError(
                f"{folder} was trained on other data than this model is of:\n  "
                + "\n  ".join(lines)
                + "\nGive the model of those data, or another folder."
            )

        was = note.get("settings") or {}
        lines = [
            f"{name}: there {was[name]!r}, now {value!r}"
            for name, value in (settings or {}).items()
            if name in was and was[name] != value
        ]
        if lines:
            raise CheckpointError(
                f"{folder} was trained with other settings:\n  "
                + "\n  ".join(lines)
                + "\nGive those, or another folder."
            )

        if files and note.get("files"):
            check_files(files, note["files"], folder, "Give the old data, or another folder.")
        elif data is not None and note.get("data", data) != data:
            raise CheckpointError(
                f"{folder} was trained on {note['data']}, and these data are {data}. Give the old "
                "data, or another folder."
            )

    about = {"spec": plain(model.spec), "files": files, "settings": dict(settings or {})}
    about |= {"data": data}
    return Checkpoints(folder, about=about, check=check)


def is_own(folder: Path) -> bool:
    """Whether a folder has states of a model that no settings beside them describe."""
    return not is_there(folder / "config.json") and bool(Checkpoints(folder).steps())


def weights_of(folder: Path, model: Model, which: str = "newest") -> Weights:
    """The parameters that a model of one's own, or of a recipe, has in a folder.

    Args:
        which: "newest", or of a recipe's run "best".

    Raises:
        CheckpointError: if there is no checkpoint, or it is of another model.
        ConfigError: for the best state of a run that keeps none.
    """
    if which not in WHICH:
        raise unknown_name("checkpoint", which, WHICH)
    place = folder
    if is_there(folder / "config.json"):
        place = folder / (FOLDER if which == "best" else "checkpoints")
    elif which == "best":
        raise ConfigError(
            f"{folder} is a run of a model of one's own, of which the newest state is kept and no "
            "best one. Leave which out."
        )
    checkpoints = checkpoints_of(place, model)
    opt = checkpoints.saved("opt")
    if opt is None:
        raise CheckpointError(f"There is no checkpoint in {place}.")
    restored = checkpoints.restore(_like(model, opt))
    assert restored is not None
    ts = restored.state
    params = {
        player: averaged(_typed(ts.opt.get(player, ()), own), own)
        for player, own in ts.params.items()
    }
    return Weights(params, ts.state, int(ts.step))


def _like(model: Model, opt: PyTree) -> TrainState:
    """The shapes of a state of a model with such an optimiser's state."""

    def start(key: jax.Array) -> TrainState:
        params, state = model.init(key)
        params = with_followers(model, params)
        return TrainState(jax.numpy.zeros((), jax.numpy.int32), key, params, state, {})

    return jax.eval_shape(start, jax.random.key(0))._replace(opt=opt)


def _typed(node: Any, params: PyTree) -> Any:
    """An optimiser's state, read as dicts and lists, with the parts that hold averages as the types
    that they are.
    """
    from optax import contrib

    if isinstance(node, Mapping):
        names = set(node)
        if names == set(TrackEmaState._fields):
            return TrackEmaState(node["count"], _part_of(params, node["ema"]))
        if names == set(contrib.ScheduleFreeState._fields):
            fields = dict(node) | {"z": _part_of(params, node["z"])}
            return contrib.ScheduleFreeState(**fields)
        return {name: _typed(one, params) for name, one in node.items()}
    if isinstance(node, list | tuple):
        return [_typed(one, params) for one in node]
    return node


def _part_of(params: PyTree, average: PyTree) -> PyTree:
    """An average in the structure of the parameters, with optax's mark where an optimiser did not
    have them.
    """
    import optax

    found, wanted = leaves_by_name(average), leaves_by_name(params)
    part = [found.get(name, optax.MaskedNode()) for name in wanted]
    by_name(found, {name: leaf for name, leaf in wanted.items() if name in found}, "The average")
    return jax.tree.unflatten(jax.tree.structure(params), part)
