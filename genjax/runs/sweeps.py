"""Sweeps over settings and seeds as one compiled program, with a table of the results."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from genjax.errors import ConfigError
from genjax.evaluation import quality
from genjax.evaluation.estimates import score_examples, scorer
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import Progress, choose_feed, fit
from genjax.learning.members import Mode, ensemble, grid, sweep
from genjax.learning.step import eval_params
from genjax.protocol import Array, Batch, Key, Params, State
from genjax.runs.folder import environment, open_folder, write_json
from genjax.runs.log import logging_in
from genjax.runs.train import VALID_SEED, go_on
from genjax.zoo.recipe import Recipe, config_hash, to_dict
from genjax.zoo.sections import replace, settings_of


def check_axes(recipe: Recipe, axes: Mapping[str, Sequence[float]]) -> None:
    """Refuse axes that cannot be traced.

    Raises:
        ConfigError: for a setting that does not exist or is not a real number: only those can
            differ within one program.
    """
    real = {
        name: setting
        for name, setting in settings_of(recipe).items()
        if setting.hint is float or float in getattr(setting.hint, "__args__", ())
    }
    floats = sorted(real)
    for name, values in axes.items():
        if name not in (*real, *(setting.full for setting in real.values())):
            raise ConfigError(
                f"--{name.replace('_', '-')} cannot be swept in one program: only real-valued "
                "settings can "
                f"({', '.join(floats)}). Train once for each value instead."
            )
        if not values:
            raise ConfigError(f"--{name.replace('_', '-')} has no values to sweep over.")


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
    if n_seeds < 1:
        raise ConfigError(f"--seeds must be at least 1; got {n_seeds}.")
    source, schedule = recipe.source(), recipe.schedule
    recipe.build(
        source.spec
    )  # settings that do not fit are refused here, before anything is written
    splits = source.load()
    settings = to_dict(recipe) | {
        "sweep": {
            "axes": {name: list(values) for name, values in axes.items()},
            "seeds": n_seeds,
            "mode": mode,
        }
    }
    combinations = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    ]
    seeds = [schedule.seed + index for index in range(n_seeds)]
    keys = jax.vmap(jax.random.key)(np.tile(np.asarray(seeds, np.uint32), len(combinations)))
    columns = (
        {name: np.repeat(column, n_seeds) for name, column in grid(**axes).items()} if axes else {}
    )
    if axes:
        t = sweep(
            lambda **hyper: replace(recipe, **hyper).training(source.spec), mode=mode, **columns
        )
    else:
        t = ensemble(recipe.training(source.spec), mode=mode)
    feed = choose_feed(t, source, splits.train, schedule.batch_size, schedule.seed, schedule.place)
    open_folder(folder, settings)
    with logging_in(folder, f"{recipe.name}: {len(keys)} members") as log:
        state = fit(
            feed,
            key=keys,
            steps=schedule.steps,
            steps_per_call=schedule.steps_per_call,
            log_every=schedule.log_every,
            log=log,
            on_restore=lambda step: go_on(log, step, schedule.steps, say),
            checkpoints=Checkpoints(folder / "checkpoints", schedule.keep_checkpoints),
            checkpoint_every=schedule.checkpoint_every,
            stop_on_nonfinite=False,
            progress=progress,
        )
    of_members: list[dict[str, float]] = []
    model = recipe.build(source.spec)
    estimator = model.estimator
    if model.score is not None:
        name, unit = f"valid/{model.score_name}", "nats"
        values = _score_members(
            recipe, columns, eval_params(state), state.state, source, splits.valid
        )
    else:
        figures = _figures_of_members(
            recipe, columns, len(keys), eval_params(state), state.state, say
        )
        first = next((member[0] for member in figures if member), None)
        name, unit = (
            ("valid/samples", "no member is finite")
            if first is None
            else (f"valid/{first.name}", first.unit)
        )
        estimator = "" if first is None else first.estimator
        values = np.asarray([member[0].value if member else np.nan for member in figures])
        of_members = [{figure.name: figure.value for figure in member} for member in figures]
    table = []
    for index, combination in enumerate(combinations):
        own = np.asarray(values[index * n_seeds : (index + 1) * n_seeds], np.float64)
        good = own[np.isfinite(own)]
        table.append(
            {
                "settings": combination,
                "mean": float(good.mean()) if len(good) else None,
                "sd": float(good.std(ddof=1)) if len(good) > 1 else None,
                "members": [
                    value if np.isfinite(value) else None for value in own.tolist()
                ],  # JSON has no NaN
                "not_finite": int(len(own) - len(good)),
            }
            | (
                {"figures": of_members[index * n_seeds : (index + 1) * n_seeds]}
                if of_members
                else {}
            )
        )
    results = {
        "recipe": recipe.name,
        "metric": name,
        "unit": unit,
        "estimator": estimator,
        "n": len(splits.valid.x),
        "split": "valid",
        "seeds": seeds,
        "steps": int(state.step),
        "config_hash": config_hash(settings),
        "results": table,
        **environment(),
    }
    write_json(folder / "results.json", results)
    return results


def _figures_of_members(
    recipe: Recipe,
    columns: dict[str, Any],
    n_members: int,
    params: Params,
    state: State,
    say: Callable[[str], None],
) -> list[list[quality.Figure]]:
    """The figures about the samples of every member, against the validation split; none of a member
    that is not finite.
    """
    found = []
    for member in range(n_members):
        own = replace(recipe, **{name: float(column[member]) for name, column in columns.items()})
        model = own.build(own.source().spec)
        of_member = [
            jax.tree.map(lambda leaf, member=member: leaf[member], tree) for tree in (params, state)
        ]
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_member)):
            found.append([])
            continue
        found.append(
            quality.figures_of(own, quality.sampler_of(model, *of_member), split="valid", say=say)
        )
    return found


def _score_members(
    recipe: Recipe, columns: dict[str, Any], params: Params, state: State, source: Any, valid: Batch
) -> np.ndarray:
    """The validation score of every member, [S]: the mean over the split in nats."""

    def one(hyper: dict[str, Array], params: Params, state: State, batch: Batch, key: Key) -> Array:
        score = replace(recipe, **hyper).build(source.spec).score
        assert score is not None
        return score(params, state, batch, key)

    def all_members(params: Params, state: State, batch: Batch, key: Key) -> Array:
        return jax.vmap(lambda hyper, p, s: one(hyper, p, s, batch, key), out_axes=1)(
            columns, params, state
        )  # [B, S]

    run = scorer(all_members, source.prepare)
    return score_examples(run, params, state, valid, jax.random.key(VALID_SEED)).mean(axis=0)
