"""A run that is there: its model with the parameters of its last checkpoint, and samples of it."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from genjax.checks import check_cond
from genjax.data import Source
from genjax.errors import CheckpointError, ConfigError, GenjaxError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.step import eval_params
from genjax.protocol import Key, Model, Params, State
from genjax.runs import samples
from genjax.runs.folder import read_config
from genjax.runs.stages import kept
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, from_dict


class Loaded(NamedTuple):
    """A trained run: recipe, model, and the parameters of its last checkpoint, averaged where there
    is an average. `data` is the recipe whose `source` has its data: its own or, for a run on
    another run, that of the first stage.
    """

    recipe: Recipe
    data: Recipe
    model: Model
    params: Params
    state: State
    step: int


def load(folder: Path, **changes: Any) -> Loaded:
    """A run's model with the parameters of its newest whole checkpoint.

    Args:
        **changes: builder arguments to change that do not change the parameters, such as
            `n_bound_samples`.

    Raises:
        ConfigError: if the folder is no run, or is a sweep.
        CheckpointError: if it has no checkpoint, or none that is whole.
    """
    values = read_config(folder)
    if "sweep" in values:
        raise ConfigError(
            f"{folder} is a sweep of several members; sample and evaluate take the folder of a "
            "single run."
        )
    recipe = from_dict(values, ZOO)
    on, data = kept(folder)
    t = recipe.training(on)
    restored = Checkpoints(folder / "checkpoints").restore(
        jax.eval_shape(t.init, jax.random.key(0))
    )
    if restored is None:
        raise CheckpointError(
            f"{folder} has no checkpoint yet. Run its `genjax train` command again."
        )
    for path, reason in restored.passed_over.items():
        print(
            f"genjax: warning: passed over a damaged checkpoint, {path}: {reason}", file=sys.stderr
        )
    state = restored.state
    model = recipe.build(on, **changes)
    return Loaded(recipe, data, model, eval_params(state), state.state, int(state.step))


def source_of(run: Loaded) -> Source | None:
    """The data that a run was trained on; None where they are no longer there, which sampling can
    do without.
    """
    try:
        return run.data.source()
    except GenjaxError:
        return None


def sample(
    run: Loaded,
    key: Key,
    n: int,
    cond: np.ndarray | None = None,
    means: bool = False,
    how: samples.Decoding | None = None,
    film: bool = False,
) -> np.ndarray:
    """n samples of a run as an array [n, *shape]; with `means` the means of p(x|z) instead, or made
    as `how` says.

    With `film` all that a solver passes through on its way from noise to data, [n_steps + 1, n,
    *shape].

    Raises:
        ConfigError: for a condition that is missing, not wanted, or out of range, or means or a
            film of a family without them.
    """
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
        draw = jax.jit(latent.sample_mean, static_argnums=3)
        return np.asarray(draw(run.params, run.state, key, n, cond))
    make = samples.film if film else samples.draw
    return make(run.model, run.params, run.state, key, n, cond, how or samples.Decoding())
