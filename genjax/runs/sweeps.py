"""Sweeps over settings and seeds as one compiled program, with a table of the results."""

import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from genjax.data import Splits
from genjax.errors import ConfigError
from genjax.evaluation import quality
from genjax.evaluation.estimates import counted, estimate, score_examples, scorer
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import Progress, fit
from genjax.learning.members import Mode, ensemble, grid, sweep
from genjax.learning.step import eval_params
from genjax.profiling.room import check_training
from genjax.protocol import Array, Batch, Key, Params, State, Training, TrainState
from genjax.runs.folder import check_folder, environment, open_folder, with_buckets_of, write_json
from genjax.runs.identity import (
    check_kept,
    check_note,
    files_of,
    keep_files,
    note_of,
    read_files,
)
from genjax.runs.lock import locked
from genjax.runs.log import logging_in
from genjax.runs.smaller import fitting, widest
from genjax.runs.stages import Opened, opened
from genjax.runs.train import VALID_SEED, about_data, about_settings, feed_of, go_on
from genjax.settings import Within, check_setting
from genjax.zoo.recipe import Recipe, config_hash, to_dict
from genjax.zoo.sections import replace, settings_of

Seeds = Annotated[int, Within(1, 10_000)]
TRACED = ("model", "optimizer")  # what a program is made of; the data are read before it


def check_axes(recipe: Recipe, axes: Mapping[str, Sequence[float]]) -> None:
    """Refuse axes that cannot be traced.

    Raises:
        ConfigError: for a setting that does not exist or is not a real number: only those can
            differ within one program.
    """
    settings = settings_of(recipe).items()
    real = {name: one for name, one in settings if _is_real(one.hint) and one.field in TRACED}
    known = {*real, *(setting.full for setting in real.values())}
    for name, values in axes.items():
        if name not in known:
            raise ConfigError(
                f"--{name.replace('_', '-')} cannot be swept in one program: only real-valued "
                f"settings can ({', '.join(sorted(real))}). Train once for each value instead."
            )
        if not values:
            raise ConfigError(f"--{name.replace('_', '-')} has no values to sweep over.")


def check_values(recipe: Recipe, axes: Mapping[str, Sequence[float]], stage: Opened) -> None:
    """Refuse values that a setting cannot have, alone or beside a member's others: within the
    program they are traced, and nobody sees them.

    Raises:
        ConfigError: from the settings and the builder.
    """
    for own in _combinations(recipe, axes):
        own.build(stage.on)


def _combinations(recipe: Recipe, axes: Mapping[str, Sequence[float]]) -> list[Recipe]:
    """The recipe of each combination of values."""
    return [
        replace(recipe, **dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    ]


def _is_real(hint: Any) -> bool:
    if typing.get_origin(hint) in (tuple, list):
        return False
    return hint is float or float in typing.get_args(hint)


class Members(NamedTuple):
    """Every combination of some settings, with every seed.

    Attributes:
        axes: the values of each setting.
        seeds: of each combination.
        columns: each setting's value for each member, [S]; the seeds of a combination are
            neighbours.
    """

    axes: Mapping[str, Sequence[float]]
    seeds: list[int]
    columns: dict[str, np.ndarray]

    @property
    def combinations(self) -> list[dict[str, float]]:
        """The settings of each combination by their names, the last one changing fastest."""
        values = itertools.product(*self.axes.values())
        return [dict(zip(self.axes, chosen, strict=True)) for chosen in values]

    @property
    def keys(self) -> Key:
        """The PRNG key of each member's seed, [S]."""
        seeds = np.tile(np.asarray(self.seeds, np.uint32), len(self.combinations))
        return jax.vmap(jax.random.key)(seeds)

    def settings_of(self, member: int) -> dict[str, float]:
        """What is set of a member, from 0 to S-1, by the names of the settings."""
        return {name: float(column[member]) for name, column in self.columns.items()}


def members_of(axes: Mapping[str, Sequence[float]], first_seed: int, n_seeds: int) -> Members:
    """The members of a sweep.

    Raises:
        ConfigError: for no seed, or more than there are.
    """
    check_setting("--seeds", n_seeds, Seeds)
    if first_seed + n_seeds > 2**32:
        raise ConfigError(
            f"{n_seeds} seeds from --seed {first_seed} on go past 2**32 - 1: take a smaller one."
        )
    product = grid(**axes) if axes else {}
    columns = {name: np.repeat(column, n_seeds) for name, column in product.items()}
    return Members(axes, [first_seed + index for index in range(n_seeds)], columns)


def run_sweep(
    recipe: Recipe,
    axes: Mapping[str, Sequence[float]],
    n_seeds: int,
    folder: Path,
    mode: Mode = "vmap",
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train every combination of `axes` with every seed as the members of one program; returns what
    results.json holds.

    Members see the same batches and differ in their settings, initial weights and noise. A member
    whose loss turns non-finite does not stop the others, and is reported as such. Members are
    compared on the validation split, never the test split.

    Raises:
        ConfigError: see `check_axes`; or if the folder holds something else.
    """
    check_axes(recipe, axes)
    if recipe.schedule.stop_after:
        raise ConfigError(
            "The members of a sweep take the same steps: leave --stop-after out, and train what is "
            "best alone."
        )
    own = recipe.optimizer
    if any(one.sigma_rels for one in (own.values() if isinstance(own, Mapping) else [own])):
        raise ConfigError(
            "A sweep stores no averages of weights: leave --sigma-rels out, and train what is best "
            "alone."
        )
    members = members_of(axes, recipe.schedule.seed, n_seeds)
    also = "; --seeds, for fewer members at once; --mode map"
    recipe = with_buckets_of(recipe, folder)
    with fitting(recipe, folder, also), ExitStack() as held:
        return _run(recipe, members, folder, mode, progress, say, held)


def _run(
    recipe: Recipe,
    members: Members,
    folder: Path,
    mode: Mode,
    progress: Progress | None,
    say: Callable[[str], None],
    held: ExitStack,
) -> dict[str, Any]:
    """See `run_sweep`; the lock of the folder is `held` until the end."""
    stage = opened(recipe)
    check_values(recipe, members.axes, stage)  # before anything is written
    idle = [line for own in _combinations(recipe, members.axes) for line in about_settings(own)]
    for line in (*about_data(stage.source), *dict.fromkeys(idle)):
        say(line)
    splits = stage.source.load()
    scored = recipe.build(stage.on).score is not None
    if not scored:  # before it is trained
        quality.check_figures(stage.source.spec, splits.valid)
    settings = to_dict(recipe) | ({} if stage.first is None else {"first": stage.first})
    listed = {name: list(values) for name, values in members.axes.items()}
    settings |= {"sweep": {"axes": listed, "seeds": len(members.seeds), "mode": mode}}
    state = _train_members(
        recipe, stage, splits, members, folder, settings, mode, progress, say, held
    )
    params = eval_params(state)
    if scored:
        found = _scores_of_members(recipe, stage, members, params, state.state, splits.valid)
    else:
        found = _figures_of_members(recipe, stage, members, params, state.state, say)
    results = {
        "recipe": recipe.name,
        "metric": found.metric,
        "unit": found.unit,
        "estimator": found.estimator,
        "n": counted(splits.valid),
        "split": "valid",
        "seeds": members.seeds,
        "steps": int(state.step),
        "config_hash": config_hash(settings),
        "results": _table(members, found),
        **environment(),
    }
    write_json(folder / "results.json", results)
    return results


def _train_members(
    recipe: Recipe,
    stage: Opened,
    splits: Splits,
    members: Members,
    folder: Path,
    settings: dict[str, Any],
    mode: Mode,
    progress: Progress | None,
    say: Callable[[str], None],
    held: ExitStack,
) -> TrainState:
    schedule, keys = recipe.schedule, members.keys
    if members.columns:

        def train_with(**hyper: Any) -> Training:
            return replace(recipe, **hyper).training(stage.on)

        t = sweep(train_with, mode=mode, **members.columns)
    else:
        t = ensemble(recipe.training(stage.on), mode=mode)
    check_training(t, keys, stage.source.spec, schedule.batch_size, widest=widest(recipe))
    model = recipe.build(stage.on)
    feed = feed_of(recipe, model, t, stage.source, splits.train, say)  # members share buckets
    check_folder(folder)
    held.enter_context(locked(folder, say))
    files = files_of(stage.source, read_files(folder) or ())
    open_folder(folder, settings, say, partial(check_kept, folder, stage.source.spec, files))
    keep_files(folder, files)
    about = note_of(settings, stage.source.spec, files)
    with logging_in(folder, f"{recipe.name}: {len(keys)} members") as log:
        return fit(
            feed,
            key=keys,
            steps=schedule.steps,
            steps_per_call=schedule.steps_per_call,
            log_every=schedule.log_every,
            log=log,
            on_restore=lambda step: go_on(log, step, schedule.steps, say),
            checkpoints=Checkpoints(
                folder / "checkpoints",
                schedule.keep_checkpoints,
                about,
                partial(check_note, about=about, folder=folder),
            ),
            checkpoint_every=schedule.checkpoint_every,
            stop_on_nonfinite=False,
            progress=progress,
        )


class _Found(NamedTuple):
    """What the members of a sweep are worth: `values` [S], one figure of each, NaN where there is
    none; and all `figures` about their samples, where it is one of those.
    """

    metric: str
    unit: str
    estimator: str
    values: np.ndarray
    figures: list[dict[str, float]]


def _table(members: Members, found: _Found) -> list[dict[str, Any]]:
    """A line for each combination of settings: mean and standard deviation over its seeds."""
    n, table = len(members.seeds), []
    for index, combination in enumerate(members.combinations):
        of_these = slice(index * n, (index + 1) * n)
        own = np.asarray(found.values[of_these], np.float64)
        good = own[np.isfinite(own)]
        line = {
            "settings": combination,
            "mean": float(good.mean()) if len(good) else None,
            "sd": float(good.std(ddof=1)) if len(good) > 1 else None,
            # JSON has no NaN.
            "members": [value if np.isfinite(value) else None for value in own.tolist()],
            "not_finite": int(len(own) - len(good)),
        }
        if found.figures:
            line["figures"] = found.figures[of_these]
        table.append(line)
    return table


def _figures_of_members(
    recipe: Recipe,
    stage: Opened,
    members: Members,
    params: Params,
    state: State,
    say: Callable[[str], None],
) -> _Found:
    """The figures about the samples of every member, against the validation split; none of a member
    that is not finite.
    """
    figures: list[list[quality.Figure]] = []
    for member in range(len(members.keys)):
        own = replace(recipe, **members.settings_of(member))
        trained = _member((params, state), member)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained)):
            figures.append([])
            continue
        sampler = quality.sampler_of(own.build(stage.on), *trained)
        figures.append(quality.figures_of(stage.data, sampler, split="valid", say=say))
    values = np.asarray([of_one[0].value if of_one else np.nan for of_one in figures])
    by_name = [{figure.name: figure.value for figure in of_one} for of_one in figures]
    main = next((of_one[0] for of_one in figures if of_one), None)
    if main is None:
        return _Found("valid/samples", "no member is finite", "", values, by_name)
    return _Found(f"valid/{main.name}", main.unit, main.estimator, values, by_name)


def _member(tree: Any, member: int) -> Any:
    """One member's part of a tree with the members' axis first."""
    return jax.tree.map(lambda leaf: leaf[member], tree)


def _scores_of_members(
    recipe: Recipe, stage: Opened, members: Members, params: Params, state: State, valid: Batch
) -> _Found:
    """The validation score of every member: the mean over the split in nats, weighted as its
    examples are.
    """

    def one(hyper: dict[str, Any], params: Params, state: State, batch: Batch, key: Key) -> Array:
        score = replace(recipe, **hyper).build(stage.on).score
        assert score is not None
        return score(params, state, batch, key)

    def all_members(params: Params, state: State, batch: Batch, key: Key) -> Array:
        over_members = jax.vmap(one, in_axes=(0, 0, 0, None, None), out_axes=1)
        return over_members(members.columns, params, state, batch, key)  # [B, S]

    program = scorer(all_members, stage.source.prepare)
    nats = score_examples(program, params, state, valid, jax.random.key(VALID_SEED))
    model = recipe.build(stage.on)
    values = np.asarray([estimate(own, valid.weight).mean for own in nats.T])
    return _Found(f"valid/{model.score_name}", "nats", model.estimator, values, [])
