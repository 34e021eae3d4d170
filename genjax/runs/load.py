"""A run that is there: its model with the parameters of its last checkpoint, and samples of it."""

import dataclasses
import functools
import logging
import os
import shlex
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from genjax.checks import check_cond
from genjax.data import MEMORY, SOURCES, Source, loader
from genjax.data.labels import condition_of
from genjax.errors import CheckpointError, ConfigError, DataError, GenjaxError, unknown_name
from genjax.families.cnf import cnf
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.memory import explained, fetched
from genjax.learning.step import eval_params
from genjax.protocol import DataSpec, Key, Model, Params, State, Trained
from genjax.runs import samples
from genjax.runs.averages import lengths_of, rebuilt
from genjax.runs.best import WHICH, best_of
from genjax.runs.folder import check_spec, read_config, read_spec, recipe_in
from genjax.runs.identity import (
    check_files,
    check_settings,
    file_of,
    files_of,
    read_files,
)
from genjax.runs.own_model import is_own
from genjax.runs.stages import kept
from genjax.zoo.recipe import Recipe
from genjax.zoo.sections import sections_of

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A trained run: recipe, model, and the parameters of a checkpoint, averaged where there is an
    average.

    Attributes:
        folder: where it is.
        recipe: what was trained.
        data: the recipe whose `source` has its data: its own or, for a run on another run, that of
            the first stage. A file stands in it with its absolute path.
        on: what the model was built on: the spec of the data, or the first stage.
        files: the files of these data, as `identity.files_of` has them; None for a run from before
            they were kept.
        which: whose checkpoint it is, see `load`.
        sigma_rel: the length of the average that its parameters are, see `load`.
        off: how far the profile of that average is from what it should be, as a part of itself.
        finer: the same model with twice the solver's steps, where the loss itself solves an ODE.
    """

    folder: Path
    recipe: Recipe
    data: Recipe
    on: DataSpec | Trained
    model: Model
    params: Params
    state: State
    step: int
    files: list[dict[str, Any]] | None = None
    which: str = "newest"
    sigma_rel: float | None = None
    off: float = 0.0
    finer: Model | None = None


# Families that are trained through a solver, and what its steps are called. The loss of such a
# model falls as well where the solver errs in its favour.
SOLVED = {cnf: "n_steps"}


def _finer(recipe: Recipe, on: DataSpec | Trained, changes: dict[str, Any]) -> Model | None:
    """The model with twice the solver's steps, if it has steps."""
    name = SOLVED.get(recipe.family)
    if name is None:
        return None
    settings = {key: value for key, (_, value, _) in sections_of(recipe)["model"].items()}
    steps, solver = changes.get(name, settings[name]), changes.get("solver", settings["solver"])
    if solver == "adaptive":
        return None
    return recipe.build(on, **{**changes, name: 2 * steps})


def changed(run: Loaded, **changes: Any) -> Loaded:
    """The run with a model built with other arguments that do not change the parameters, such as
    `n_bound_samples`.
    """
    model = run.recipe.build(run.on, **changes)
    return run._replace(model=model, finer=_finer(run.recipe, run.on, changes))


def load(folder: Path, which: str = "newest", sigma_rel: float | None = None) -> Loaded:
    """A run's model with the parameters of its newest whole checkpoint.

    Args:
        which: "newest", or "best": that with the best figure on the validation split.
        sigma_rel: have averages of this relative length for parameters, made of those that the run
            tracked (see `averages.rebuilt`), in the place of the average or weights that it is
            otherwise evaluated with.

    Raises:
        ConfigError: if the folder is no run, or is a sweep, or the average cannot be made.
        CheckpointError: if it has no checkpoint, or none that is whole; or if its settings are not
            those that the checkpoint was saved with.
    """
    if which not in WHICH:
        raise unknown_name("checkpoint", which, WHICH)
    if is_own(folder):
        raise ConfigError(
            f"{folder} has the states of a model of one's own, which a folder cannot rebuild. In "
            f"Python genjax.load({str(folder)!r}, model=...) takes the model that was trained."
        )
    values = read_config(folder)
    if "sweep" in values:
        raise ConfigError(
            f"{folder} is a sweep of several members, of which only the table is kept: give the "
            "folder of a single run. `genjax train` with a member's settings makes one."
        )
    recipe = recipe_in(folder)
    on, data = kept(folder)
    t = recipe.training(on)

    def check(note: dict[str, Any]) -> None:
        check_settings(note, values, read_spec(folder), folder)

    if which == "best":
        checkpoints = best_of(folder, recipe.build(on), check=check)
    else:
        checkpoints = Checkpoints(folder / "checkpoints", check=check)
    restored = checkpoints.restore(jax.eval_shape(t.init, jax.random.key(0)))
    if restored is None:
        raise CheckpointError(
            f"{folder} has no checkpoint yet. If a process trains there, wait for its first one; "
            "else run its `genjax train` command again."
        )
    for path, reason in restored.passed_over.items():
        logger.warning("passed over a damaged checkpoint, %s: %s", path, reason)
    state, files, now = restored.state, restored.note.get("files"), read_files(folder)
    if files is None or [one["sha256"] for one in now or ()] == [one["sha256"] for one in files]:
        files = now  # which says where they were last
    if files and data.data not in (*SOURCES, MEMORY):
        # The file itself is the first; a tokenizer, which an option names, comes after it.
        path, options = files[0]["path"], dict(data.data_options)
        if options.get("tokenizer") is not None:
            options["tokenizer"] = files[1]["path"]
        known = read_spec(folder)
        if known is not None and known.columns and options.get("columns") is None:
            # As they were read then: the row index of pandas was one of them once.
            takes = signature(loader(path)).parameters
            options |= {"columns": known.columns} if "columns" in takes else {}
        data = dataclasses.replace(data, data=path, data_options=options)
    params, off = eval_params(state), 0.0
    model = recipe.build(on)
    if sigma_rel is not None:
        params, off = rebuilt(folder, lengths_of(recipe, model.losses), state, sigma_rel, check)
    found = (folder, recipe, data, on, model, params, state.state, int(state.step), files, which)
    return Loaded(*found, sigma_rel, off, _finer(recipe, on, {}))


def source_of(run: Loaded) -> Source:
    """The data that a run was trained on, compared with what it was then.

    Raises:
        ConfigError, DataError: for data that are no longer there, or changed since; with what to
            do.
    """
    if run.data.data == MEMORY:
        return run.data.source()  # which says so
    quoted = shlex.quote(str(run.folder))
    advice = f"`genjax evaluate {quoted} --data PATH` scores other data of the same kind."
    for one in run.files or ():
        if not os.path.exists(one["path"]):
            raise DataError(
                f"{one['path']}, which {run.folder} was trained on, is not there. Bring it back; "
                f"or {advice}"
            )
    known, advice = read_files(run.folder) or (), f"Bring the old data back; or {advice}"
    if run.files and all(one.get("size") and os.path.isfile(one["path"]) for one in run.files):
        # Before they are opened: a changed file may not even be readable any more.
        now = [file_of(one["path"], known) for one in run.files]
        check_files(now, run.files, run.folder, advice)
    source = run.data.source()
    if run.files:
        check_files(files_of(source, known), run.files, run.folder, advice)
    check_spec(source.spec, run.model.spec, run.folder)
    return source


def made_source(run: Loaded) -> Source | None:
    """The data set that a run was trained on if it is one of the zoo's; None for files, which
    sampling does not open.
    """
    try:
        return run.data.source() if run.data.data in SOURCES else None
    except GenjaxError:
        return None


def sample(
    run: Loaded,
    key: Key,
    n: int,
    cond: Any = None,
    means: bool = False,
    how: samples.Decoding | None = None,
    film: bool = False,
) -> np.ndarray:
    """n samples of a run as an array [n, *shape]; with `means` the means of p(x|z) instead, or made
    as `how` says. `cond` is an array as the model takes it, or classes by name or number: see
    `condition_of`.

    With `film` all that a solver passes through on its way from noise to data, [n_steps + 1, n,
    *shape].

    Raises:
        ConfigError: for a condition that is missing, not wanted, or out of range, or means or a
            film of a family without them.
    """
    if cond is not None and not isinstance(cond, np.ndarray):
        cond = condition_of(run.model.spec, cond, n)
    try:
        check_cond(run.model.spec, cond, n)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    if means:
        latent = run.model.latent
        if latent is None or latent.sample_mean is None:
            raise ConfigError(
                f"{run.recipe.name} has no means of p(x|z) to show; sample without --means."
            )
        if asked := (how or samples.Decoding()).asked():
            raise ConfigError(
                f"{samples.as_flags(asked)}: for samples, and --means shows means of p(x|z) in "
                "their place. Leave one of them out."
            )
        drawn = latent.sample_mean
    else:
        drawn = run.model.sample
    make = samples.film if film else samples.draw
    program = functools.partial(drawn, n=n, cond=cond)
    with explained(lambda: f"for {n} samples", lambda: (program, (run.params, run.state, key))):
        if means:
            draw = jax.jit(drawn, static_argnums=3)
            return fetched(draw(run.params, run.state, key, n, cond))
        return make(run.model, run.params, run.state, key, n, cond, how or samples.Decoding())
