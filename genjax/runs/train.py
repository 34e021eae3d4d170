"""Training a recipe in a run folder, with scores and pictures of it on the way."""

import functools
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from genjax.data import Source, Splits, example_batch
from genjax.data.buckets import buckets_for
from genjax.data.view import no_picture
from genjax.errors import ConfigError
from genjax.evaluation.estimates import estimate, score_examples, scorer
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.distributed import agreed, check_shared, several, whole, writes
from genjax.learning.loop import Feed, Hook, Progress, choose_feed, fit
from genjax.learning.memory import fetched
from genjax.learning.sharding import layout, make_mesh, shard
from genjax.learning.step import eval_params
from genjax.parts.flow_density import Invertible
from genjax.profiling.room import check_training
from genjax.protocol import Batch, Model, Training, TrainState
from genjax.runs import samples, stages
from genjax.runs.averages import lengths_of, snapshot_hook
from genjax.runs.best import Best, no_gain
from genjax.runs.folder import (
    check_folder,
    keep_spec,
    nothing_trained,
    open_folder,
    with_buckets_of,
    write_json,
)
from genjax.runs.identity import (
    check_kept,
    check_note,
    files_of,
    keep_files,
    note_of,
    read_files,
)
from genjax.runs.init_from import started_from
from genjax.runs.lock import locked
from genjax.runs.log import Log, logging_in
from genjax.runs.smaller import fitting, widest
from genjax.runs.speed import speed_of
from genjax.runs.writers import Writer, Writers, writing_to
from genjax.zoo.recipe import Recipe, Schedule, to_dict

# Fixed keys, so that a validation curve compares like with like and the pictures of a run show the
# same latent points.
VALID_SEED, PICTURE_SEED = 1_000_003, 1_000_033


def train(
    recipe: Recipe,
    folder: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
    mesh: Mapping[str, int] | None = None,
    source: Source | None = None,
    init_from: Path | None = None,
    log_to: str | Iterable[str | Writer] = (),
) -> TrainState:
    """Train a recipe in a run folder, or go on with the run that is there.

    Args:
        recipe: what to train.
        folder: where; see `default_folder`.
        progress: what is told after each dispatch.
        say: what is told of going on.
        mesh: the axes of a mesh to train on, see `sharding`. It is no part of the settings: values
            are those of one device to rounding, and a run may go on with another mesh. Several
            processes (see `distributed`) each call this, and share the batch among all their
            devices unless it is given.
        source: the data, where they are in memory and the recipe cannot open them.
        init_from: a run whose parameters this one begins with, where names and shapes are the same.
        log_to: "wandb", "trackio" or writers of one's own, see `writers`; no part of the settings.

    Raises:
        GenjaxError: see the modules that this one calls; whatever was saved before stays.
    """
    recipe = with_buckets_of(recipe, folder)
    with fitting(recipe, folder), writing_to(log_to) as writers, ExitStack() as held:
        return _train(recipe, folder, progress, say, mesh, source, init_from, held, writers)


def _train(
    recipe: Recipe,
    folder: Path,
    progress: Progress | None,
    say: Callable[[str], None],
    mesh: Mapping[str, int] | None,
    given: Source | None,
    init_from: Path | None,
    held: ExitStack,
    writers: Writers,
) -> TrainState:
    """See `train`; the lock of the folder is `held` until the end."""
    stage, schedule = stages.opened(recipe, given), recipe.schedule
    if writes():  # before the model may refuse the data for what they were taken for
        for line in (*about_data(stage.source), *about_settings(recipe)):
            say(line)
    source, model = stage.source, recipe.build(stage.on)
    valid_every = _valid_every(recipe, model)
    if writes() and schedule.evaluate_every not in (valid_every, Schedule.evaluate_every):
        say(
            f"evaluate_every {schedule.evaluate_every} has no effect: {recipe.name} has no "
            "log-probability and no bound"
        )
    start = None if init_from is None else started_from(init_from, model, folder)
    t = recipe.training(stage.on) if start is None else recipe.training(stage.on, start.begin)
    key = jax.random.key(schedule.seed)
    sent = min(schedule.steps_per_call, schedule.steps) if schedule.place == "host" else 1
    check_training(t, key, source.spec, schedule.batch_size, sent, widest(recipe))
    splits = source.load()
    for line in about_tails(model, splits.train) if writes() else []:
        say(line)
    if several():
        mesh = mesh or {"data": jax.device_count()}
    devices = None if not mesh else make_mesh(mesh)
    t = t if devices is None else _sharded(t, devices, source, schedule.batch_size)
    feed = feed_of(recipe, model, t, source, splits.train, say, devices)
    # Not before everything else fits: a folder keeps its settings for good.
    settings = to_dict(recipe) | ({} if stage.first is None else {"first": stage.first})
    settings |= {} if start is None else {"init_from": start.about}

    for line in start.lines if start is not None and writes() else []:
        say(line)
    opening = functools.partial(_open_run, folder, settings, stage, held, say)
    about = note_of(settings, source.spec, agreed(opening))
    check_shared(folder / "config.json")
    checkpoints = Checkpoints(
        folder / "checkpoints",
        schedule.keep_checkpoints,
        about,
        functools.partial(check_note, about=about, folder=folder),
    )
    best = Best(folder, about) if valid_every else None
    hooks = [
        _valid_hook(model, source, splits, best, valid_every),
        _picture_hook(model, source, splits, folder, schedule.sample_every, writers),
    ]
    if lengths_of(recipe, model.losses):
        hooks.append(snapshot_hook(folder, about, schedule.snapshot_every))

    speed = speed_of(t, source.spec, schedule.batch_size, mesh, say)
    title = f"{recipe.name} on {source.spec.name}"
    with logging_in(folder, title) if writes() else nullcontext() as log:

        def on_restore(step: int) -> None:
            writers.begin(settings, folder)
            if log is not None:
                go_on(log, step, schedule.steps, say, _enough(best, schedule, step))

        def write(line: dict[str, Any]) -> None:
            if log is not None:
                log(line)
                writers.write(line)

        state = fit(
            feed,
            key=key,
            steps=schedule.steps,
            steps_per_call=schedule.steps_per_call,
            log_every=schedule.log_every,
            log=write,
            on_restore=on_restore,
            hooks=[hook for hook in hooks if hook is not None],
            checkpoints=checkpoints,
            checkpoint_every=schedule.checkpoint_every,
            stop_on_nonfinite=not schedule.skip_nonfinite,
            progress=progress if log else None,
            layout=None if devices is None else functools.partial(layout, mesh=devices),
            enough=functools.partial(_enough, best, schedule),
            speed=speed,
        )
    if best is not None and writes():
        say_best(best, schedule, int(state.step), say)
    # Until process 0 has drawn its curves: at the end jax does not wait long for the others.
    agreed(lambda: None)
    return state


def _valid_every(recipe: Recipe, model: Model) -> int:
    """After how many steps a model is scored on the validation split; 0 if it has no score."""
    schedule = recipe.schedule
    every = 0 if model.score is None else schedule.evaluate_every
    if schedule.stop_after and not schedule.evaluate_every:
        raise ConfigError("stop_after counts evaluations: it needs evaluate_every above 0.")
    if schedule.stop_after and not every:
        raise ConfigError(
            f"--stop-after needs a figure on the validation split, and {recipe.name} has none (a "
            "log-probability or a bound): leave it out."
        )
    return every


def _sharded(t: Training, devices: Mesh, source: Source, batch_size: int) -> Training:
    """`shard`; a mesh that does not fit is refused now, before a run folder is made."""
    t = shard(t, devices)
    fake = functools.partial(example_batch, source.spec, n=batch_size)
    jax.eval_shape(lambda key: t.step(t.init(key), fake(key)), jax.random.key(0))
    return t


def _open_run(
    folder: Path,
    settings: dict[str, Any],
    stage: stages.Opened,
    held: ExitStack,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Lock the run folder until `held` ends, make it or hold it to these settings and data, and
    note the files that the data are read from, which it returns.
    """
    source = stage.source
    check_folder(folder)
    held.enter_context(locked(folder, say))
    if nothing_trained(folder):  # whatever its settings were
        for name in ("spec.json", "data.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / stages.KEPT, ignore_errors=True)
        write_json(folder / "config.json", settings)
    files = files_of(source, read_files(folder) or ())
    check = functools.partial(check_kept, folder, source.spec, files)
    open_folder(folder, settings, say, check)
    keep_spec(folder, source.spec)
    keep_files(folder, files)
    stages.keep(folder, stage)
    return files


def _enough(best: Best | None, schedule: Schedule, step: int) -> bool:
    """Whether as many evaluations as `stop_after` says have brought no gain."""
    return best is not None and no_gain(schedule, best.step, step)


def say_best(best: Best, schedule: Schedule, step: int, say: Callable[[str], None]) -> None:
    """Where a run ended, if it was early, and which of its states was the best."""
    if step < schedule.steps and _enough(best, schedule, step):
        say(
            f"ended at step {step} of {schedule.steps}: {schedule.stop_after} evaluations in a row "
            "brought no gain"
        )
    if 0 < best.step < step and best.value > -math.inf:  # else it was damaged
        say(
            f"best on the validation split: {best.value:.3f} nats at step {best.step}, kept beside "
            "the newest (--which best of sample, evaluate and export)"
        )


def feed_of(
    recipe: Recipe,
    model: Model,
    t: Training,
    source: Source,
    arrays: Batch,
    say: Callable[[str], None],
    mesh: Mesh | None = None,
) -> Feed:
    """`choose_feed` as the schedule has it; buckets of lengths are told."""
    schedule = recipe.schedule
    own = (source, arrays, schedule.batch_size)
    buckets = buckets_for(model, *own, schedule.buckets, schedule.place)
    feed = choose_feed(t, *own, schedule.seed, schedule.place, mesh, buckets)
    if buckets is not None and writes():
        say(buckets.note)
    return feed


def about_data(source: Source) -> list[str]:
    """What was decided about a user's own data, and whether there will be pictures, a line each."""
    lines = [f"data: {'; '.join(source.notes)}"] if source.notes else []
    why = no_picture(source.spec)
    return lines if why is None else [*lines, why]


def about_settings(recipe: Recipe) -> list[str]:
    """Settings of the training that were changed and do nothing beside the others, or keep others
    from what they are for, a line each.
    """
    given, every = recipe.optimizer, recipe.schedule.snapshot_every
    players = given if isinstance(given, Mapping) else {"": given}
    lines = [
        f"{player}{'.' if player else ''}{line}"
        for player, optimizer in players.items()
        for line in (*optimizer.idle(), *optimizer.overlap(recipe.schedule.steps))
    ]
    if every != Schedule.snapshot_every and not any(one.sigma_rels for one in players.values()):
        lines.append(f"snapshot_every {every} has no effect: no sigma_rels are tracked")
    return lines


def about_tails(model: Model, arrays: Batch) -> list[str]:
    """Of a flow with splines, how many of the data's numbers lie where they are straight lines, if
    there are any, in one line. The first 10,000 examples are looked at.
    """
    covers = model.extras.covers if isinstance(model.extras, Invertible) else None
    if covers is None:
        return []
    x = np.asarray(arrays.x[:10_000], np.float64).reshape(min(len(arrays.x), 10_000), -1)
    spread = x.std(axis=0)
    beyond = np.abs(x - x.mean(axis=0)) > covers * spread
    n = int(beyond[:, spread > 0].sum())
    if not n:
        return []
    return [
        f"{n:,} of {x.size:,} numbers lie more than {covers:g} standard deviations from their "
        "mean, where the splines are straight lines: a larger tail_bound covers more of them"
    ]


def go_on(log: Log, step: int, steps: int, say: Callable[[str], None], ended: bool = False) -> None:
    """Go on from a step: cut the log back to it, and tell the user."""
    log.restore(step)
    if ended:
        return  # which is said at the end
    if step >= steps:
        say(f"all {step} steps of {log.folder} were done before; nothing is left to train")
    elif step:
        say(f"going on from step {step} of {steps} in {log.folder}")


def _valid_hook(
    model: Model, source: Source, splits: Splits, best: Best | None, every: int
) -> Hook | None:
    if best is None or model.score is None:
        return None
    name, run = model.score_name, scorer(model.score, source.prepare)

    def call(step: int, state: TrainState) -> dict[str, Any]:
        params, extra = whole((eval_params(state), state.state))

        def figure() -> float:
            values = score_examples(run, params, extra, splits.valid, jax.random.key(VALID_SEED))
            return estimate(values, splits.valid.weight).mean

        return {f"valid/{name}": best.offer(step, state, figure)}

    return Hook(every, call, "the evaluation on the validation split")


def _picture_hook(
    model: Model, source: Source, splits: Splits, folder: Path, every: int, writers: Writers
) -> Hook:
    spec, n = source.spec, samples.picture_size(source.spec)
    cond = samples.picture_cond(spec, n, splits.train)
    n = n if cond is None else len(cond)
    draw = jax.jit(samples.picture_sampler(model), static_argnums=3)

    def call(step: int, state: TrainState) -> None:
        params, extra = whole((eval_params(state), state.state))
        if not writes():
            return
        x = fetched(draw(params, extra, jax.random.key(PICTURE_SEED), n, cond))
        stem = folder / "samples" / f"step_{step:08d}"
        title = f"{samples.picture_title(model)} at step {step}"
        samples.show(x, spec, stem, title, samples.true_log_prob(source), cond)
        writers.image(step, "samples", stem.with_name(stem.name + ".png"))

    return Hook(every, call, "the picture of samples")
