"""Training that begins with the parameters of another run, matched by name and shape. What this
run keeps frozen, a first stage or a teacher, is its own and is never taken from there. Classes,
symbols and columns go by their number, not by what they are called; where they are called
otherwise, that is said.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax.checks import leaves_by_name
from genjax.errors import ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.protocol import DataSpec, Key, Model, Params, PyTree, State
from genjax.runs.folder import is_there, read_config
from genjax.runs.load import load
from genjax.runs.stages import checkpoint_hash

SHOWN = 8  # names in a message


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
        about: where it comes from, as config.json keeps it: folder, step, hash.
        begin: model -> the model whose `init` has those parameters.
        lines: what is said of it.
    """

    about: dict[str, Any]
    begin: Callable[[Model], Model]
    lines: list[str]


def started_from(origin: Path, model: Model, folder: Path) -> Start:
    """Begin with what another run has learned: its averaged weights where it keeps an average.

    A run that has a checkpoint already goes on from that, and needs the other one no more.

    Args:
        origin: the folder of the other run.
        model: what is to be trained.
        folder: where.

    Raises:
        ConfigError: if not one array of it fits, or the other run is this one.
        CheckpointError: if it has no checkpoint.
    """
    if origin.resolve() == folder.resolve():
        raise ConfigError(
            f"--init-from {origin} is the run itself, which goes on without it: leave it out."
        )
    if is_there(folder / "config.json") and Checkpoints(folder / "checkpoints").steps():
        kept = read_config(folder).get("init_from")
        if isinstance(kept, dict) and kept.get("folder") == str(origin.absolute()):
            return Start(kept, lambda model: model, [])
    run = load(origin)
    about = {
        "folder": str(origin.absolute()),
        "step": run.step,
        "hash": checkpoint_hash(origin, run.step),
    }
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    own = partial(_without, _frozen(model, params))
    given = own(run.params), own(run.state)
    lines = _lines(origin, run.step, leaves_by_name(given[0]), leaves_by_name(own(params)))
    lines += renamed(run.model.spec, model.spec)
    if model.prepare is not None:
        lines.append("initialisation from the first batch is left out, as it would overwrite them")

    def begin(model: Model) -> Model:
        return model._replace(init=partial(_init, model, given), prepare=None)

    return Start(about, begin, lines)


def _frozen(model: Model, params: Params) -> set[str]:
    """The entries of `params` that no training changes: they have no loss, and follow no player."""
    return set(params) - set(model.losses) - set(model.follows)


def _without(names: set[str], tree: PyTree) -> PyTree:
    """The other entries of params or state."""
    return {name: entry for name, entry in tree.items() if name not in names}


def _init(model: Model, given: tuple[Params, State], key: Key) -> tuple[Params, State]:
    """What `init` makes, with what there is of the other run. (Entries that follow a player begin
    as its copies in `training`.)
    """
    params, state = model.init(key)
    return matched(params, given[0]), matched(state, given[1])


def matched(tree: PyTree, given: PyTree) -> PyTree:
    """The tree with the leaves of another that have the same name and shape, in its own dtypes."""
    there = leaves_by_name(given)
    leaves = [
        jnp.asarray(there[name], leaf.dtype) if _fits(leaf, there.get(name)) else leaf
        for name, leaf in leaves_by_name(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _fits(leaf: Any, given: Any) -> bool:
    """Whether a leaf can be had from another; keys are a run's own."""
    if given is None or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return False
    return tuple(leaf.shape) == tuple(given.shape)


def _lines(origin: Path, step: int, there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What matched and what did not.

    Raises:
        ConfigError: if nothing did.
    """
    found = [name for name, leaf in here.items() if _fits(leaf, there.get(name))]
    other = [
        f"{name} ({list(there[name].shape)} there, {list(here[name].shape)} here)"
        for name in here
        if name in there and name not in found
    ]
    new = [name for name in here if name not in there]
    left = [name for name in there if name not in here]
    if not found:
        raise ConfigError(
            f"No array of {origin} has the name and the shape of one of this model. It has "
            f"{_some(list(there))}; this model has {_some(list(here))}."
        )
    lines = [f"{len(found)} of {len(here)} arrays are those of {origin} at step {step}"]
    for what, names in (
        ("of another shape, so they begin anew", other),
        ("not there, so they begin anew", new),
        ("there, and not in this model", left),
    ):
        if names:
            lines.append(f"{what}: {_some(names)}")
    return lines


def renamed(there: DataSpec, here: DataSpec) -> list[str]:
    """What is said of what the data call otherwise there, where as many have a name."""
    lines = []
    for what, name in (
        ("classes", "class_names"),
        ("symbols", "vocabulary"),
        ("columns", "columns"),
        ("binary values", "values"),
    ):
        both = getattr(there, name), getattr(here, name)
        if name == "values" and there.kind == here.kind == "binary":
            both = both[0] or (0, 1), both[1] or (0, 1)
        if None in both or len(both[0]) != len(both[1]):
            continue
        pairs = enumerate(zip(*both, strict=True))
        other = [f"{index} is {a!r} there and {b!r} here" for index, (a, b) in pairs if a != b]
        if other:
            lines.append(f"{what} are not those of there, and are taken by number: {_some(other)}")
    return lines


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
