"""Run folders: what `train`, `sweep`, `sample` and `evaluate` read and write.

config.json      every setting of the run
spec.json        what its data look like (shape, vocabulary, end token ...), so that sampling needs
no data
metrics.jsonl    one JSON object a line: step, seconds of training so far, means over the window,
    validation
tensorboard/     the same numbers as TensorBoard events
checkpoints/     the newest few states
samples/         pictures or text of samples, and *.npz (and *.mid) of what `genjax sample` drew
curves.png       learning curves
report.json      what `genjax evaluate` found
"""

import dataclasses
import functools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax.checks import check_cond
from genjax.data import Source, Splits, example_batch
from genjax.errors import CheckpointError, ConfigError, GenjaxError, replacing
from genjax.evaluation import quality
from genjax.evaluation.estimates import (
    Estimate,
    bits_per_dim,
    estimate,
    per_step,
    score_examples,
    scorer,
)
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.distributed import check_shared, first, several, told, whole
from genjax.learning.loop import Hook, Progress, choose_feed, fit
from genjax.learning.sharding import layout, make_mesh, shard
from genjax.learning.step import eval_params
from genjax.protocol import (
    Batch,
    DataSpec,
    Key,
    Model,
    Params,
    ScoreFn,
    State,
    TrainState,
    step_mask,
)
from genjax.runs import pictures, samples
from genjax.runs.log import Log, logging_in
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, config_hash, flatten, from_dict, to_dict

# Fixed keys, so that a validation curve compares like with like and a grid shows the same latent
# points as it trains.
VALID_SEED, PICTURE_SEED = 1_000_003, 1_000_033


def write_json(path: Path, values: Any) -> None:
    """Write JSON, whole or not at all.

    Raises:
        CheckpointError: if the disk does not take it; what was there before stays.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


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


def open_folder(folder: Path, values: dict[str, Any]) -> None:
    """Make a run folder, or check that the one that is there belongs to the same settings.

    Raises:
        ConfigError: if it holds another run (the message lists the differences) or something that
            is no run.
        CheckpointError: if it cannot be written.
    """
    path = folder / "config.json"
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder} exists and is not a run folder; nothing was written. Give another one "
                "with --out."
            )
        write_json(path, values)
        return
    there = read_config(folder)
    if there == values:
        return
    old, new = flatten(there), flatten(values)
    missing = "(not set)"
    lines = [
        f"  {name}: there {old.get(name, missing)!r}, now {new.get(name, missing)!r}"
        for name in sorted({*old, *new})
        if old.get(name, missing) != new.get(name, missing)
    ]
    raise ConfigError(
        f"{folder} holds a run with other settings; nothing was changed:\n"
        + "\n".join(lines)
        + "\n"
        "Give the same settings to go on with it, or another folder with --out."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a run folder.

    Raises:
        ConfigError: if there are none, or they are no JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has no config.json. `genjax train NAME` makes one."
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: expected JSON, found {error}.") from error
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
    path, values = folder / "spec.json", json.loads(json.dumps(dataclasses.asdict(spec)))
    if not path.exists():
        write_json(path, values)
        return
    there = read_spec(folder)
    if there != spec:
        old = dataclasses.asdict(there)  # type: ignore[arg-type]  # there is a file, so there is a spec
        changed = [name for name, value in dataclasses.asdict(spec).items() if old[name] != value]
        raise ConfigError(
            f"The data are not those that {folder} was trained on: {', '.join(changed)} changed "
            "since. "
            "Bring the old data back, or train in another folder with --out."
        )


def read_spec(folder: Path) -> DataSpec | None:
    """The spec of a run's data; None in a folder from before there was one.

    Raises:
        ConfigError: for a damaged file.
    """
    path = folder / "spec.json"
    if not path.exists():
        return None
    try:
        return DataSpec(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}.") from error


def score_of(model: Model) -> tuple[str, ScoreFn] | None:
    """("log_prob" or "bound", function): the exact one where there is one; None for a model that
    has neither.
    """
    if model.log_prob is not None:
        return "log_prob", model.log_prob
    return ("bound", model.bound) if model.bound is not None else None


def picture_cond(spec: Any, n: int, arrays: Batch | None = None) -> np.ndarray | None:
    """Conditions for a picture of n samples: every class equally often, or vectors of the data."""
    if not spec.conditional:
        return None
    if spec.n_classes:
        per = max(1, n // spec.n_classes)
        return np.repeat(np.arange(spec.n_classes, dtype=np.int32), per)
    vectors: Any = None if arrays is None else arrays.cond
    return np.resize(np.asarray(vectors, np.float32), (n, spec.cond_dim))


def train(
    recipe: Recipe,
    folder: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
    mesh: Mapping[str, int] | None = None,
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

    Raises:
        GenjaxError: see the modules that this one calls; whatever was saved before stays.
    """
    source, schedule = recipe.source(), recipe.schedule
    model = recipe.build(source.spec)
    splits = source.load()
    t, devices = recipe.training(source.spec), None
    if several():
        mesh = mesh or {"data": jax.device_count()}
    if mesh:
        devices = make_mesh(mesh)
        t = shard(t, devices)
        # Refuse one that does not fit now, before a run folder is made.
        fake = functools.partial(example_batch, source.spec, n=schedule.batch_size)
        jax.eval_shape(lambda key: t.step(t.init(key), fake(key)), jax.random.key(0))
    feed = choose_feed(
        t, source, splits.train, schedule.batch_size, schedule.seed, schedule.place, devices
    )
    # Not before everything else fits: a folder keeps its settings for good.
    told(lambda: (open_folder(folder, to_dict(recipe)), keep_spec(folder, source.spec)))
    check_shared(folder / "config.json")
    checkpoints = Checkpoints(folder / "checkpoints", schedule.keep_checkpoints)
    hooks = [
        _valid_hook(model, source, splits, schedule.evaluate_every),
        _picture_hook(model, source, splits, folder, schedule.sample_every),
    ]

    with (
        logging_in(folder, f"{recipe.name} on {source.spec.name}")
        if first()
        else nullcontext() as log
    ):
        state = fit(
            feed,
            key=jax.random.key(schedule.seed),
            steps=schedule.steps,
            steps_per_call=schedule.steps_per_call,
            log_every=schedule.log_every,
            log=log or (lambda line: None),
            on_restore=lambda step: go_on(log, step, schedule.steps, say) if log else None,
            hooks=[hook for hook in hooks if hook is not None],
            checkpoints=checkpoints,
            checkpoint_every=schedule.checkpoint_every,
            stop_on_nonfinite=not schedule.skip_nonfinite,
            progress=progress if log else None,
            layout=None if devices is None else functools.partial(layout, mesh=devices),
        )
    told(
        lambda: None
    )  # until process 0 has drawn its curves: at the end jax does not wait long for the others
    return state


def go_on(log: Log, step: int, steps: int, say: Callable[[str], None]) -> None:
    """Go on from a step: cut the log back to it, and tell the user."""
    log.restore(step)
    if step >= steps:
        say(f"all {step} steps of {log.folder} were done before; nothing is left to train")
    elif step:
        say(f"going on from step {step} of {steps} in {log.folder}")


def _valid_hook(model: Model, source: Source, splits: Splits, every: int) -> Hook | None:
    scoring = score_of(model)
    if scoring is None or every == 0:
        return None
    name, score = scoring
    run = scorer(score, source.prepare)

    def call(step: int, state: TrainState) -> dict[str, Any]:
        params, extra = whole((eval_params(state), state.state))
        if not first():
            return {}
        values = score_examples(run, params, extra, splits.valid, jax.random.key(VALID_SEED))
        return {f"valid/{name}": estimate(values).mean}

    return Hook(every, call)


def _picture_hook(model: Model, source: Source, splits: Splits, folder: Path, every: int) -> Hook:
    spec = source.spec
    n = 2000 if spec.shape == (2,) else 16 if spec.step else 100 if spec.n_classes else 64
    cond = picture_cond(spec, n, splits.train)
    n = n if cond is None else len(cond)
    draw = jax.jit(picture_sampler(model), static_argnums=3)

    def call(step: int, state: TrainState) -> None:
        params, extra = whole((eval_params(state), state.state))
        if not first():
            return
        x = np.asarray(draw(params, extra, jax.random.key(PICTURE_SEED), n, cond))
        stem, title = (
            folder / "samples" / f"step_{step:08d}",
            f"{picture_title(model)} at step {step}",
        )
        samples.show(x, spec, stem, title, samples.true_log_prob(source), cond)

    return Hook(every, call)


def picture_sampler(model: Model) -> Callable[..., Any]:
    """What a picture shows: the mean of p(x|z) for images where the family has it, as papers do,
    otherwise samples.
    """
    return model.extras["sample_mean"] if _shows_means(model) else model.sample


def picture_title(model: Model) -> str:
    """What such a picture shows, in words."""
    return "means of p(x|z), z ~ p(z)," if _shows_means(model) else "samples"


def _shows_means(model: Model) -> bool:
    return "sample_mean" in model.extras and pictures.is_image(model.spec)


class Loaded(NamedTuple):
    """A trained run: recipe, model, and the parameters of its last checkpoint, averaged where there
    is an average.
    """

    recipe: Recipe
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
    spec = read_spec(folder) or recipe.source().spec
    t = recipe.training(spec)
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
    model = recipe.build(spec, **changes)
    return Loaded(recipe, model, eval_params(state), state.state, int(state.step))


def source_of(run: Loaded) -> Source | None:
    """The data that a run was trained on; None where they are no longer there, which sampling can
    do without.
    """
    try:
        return run.recipe.source()
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
    if means and "sample_mean" not in run.model.extras:
        raise ConfigError(
            f"{run.recipe.name} has no means of p(x|z) to show; sample without --means."
        )
    if not means:
        make = samples.film if film else samples.draw
        return make(run.model, run.params, run.state, key, n, cond, how or samples.Decoding())
    return np.asarray(
        jax.jit(run.model.extras["sample_mean"], static_argnums=3)(
            run.params, run.state, key, n, cond
        )
    )


def evaluate(
    run: Loaded,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 100,
    progress: Callable[[int, int], None] = lambda done, total: None,
    about_samples: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """What a run is worth on a split, as the dictionary that goes into report.json.

    Its value is the log-probability or bound or, for a model that has neither, the first of the
    figures about its samples.

    Args:
        n: the first n examples only; None means all.
        seed: of the estimator's noise, of the binarisation of the data, and of the samples.
        about_samples: give figures about samples beside a log-probability or bound, too.

    Raises:
        ConfigError: if the split does not exist, or n is too small.
    """
    if split not in Splits._fields:
        raise ConfigError(f"There is no split {split!r}; there are: {', '.join(Splits._fields)}.")
    if n is not None and n < 2:
        raise ConfigError(f"--n must be at least 2, so that there is a standard error; got {n}.")
    spec, scoring, started = run.model.spec, score_of(run.model), time.perf_counter()
    found: dict[str, Any] = {}
    if scoring is not None:
        found = _score(run, scoring, split, n, seed, batch_size, progress)
    if scoring is None or about_samples:
        sampler = quality.sampler_of(run.model, run.params, run.state)
        figures_found = quality.figures_of(run.recipe, sampler, split, n, seed, say)
        first = figures_found[0]
        headline = {
            "mean": first.value,
            "standard_error": first.standard_error,
            "unit": first.unit,
            "kind": first.name,
            "estimator": first.estimator,
            "n": first.n_reference,
        }
        found = headline | found | {"figures": [figure._asdict() for figure in figures_found]}
    return {
        "recipe": run.recipe.name,
        "data": spec.name,
        "value": found["mean"],
        **found,
        "split": split,
        "seed": seed,
        "step": run.step,
        "training_seed": run.recipe.schedule.seed,
        "config_hash": config_hash(to_dict(run.recipe)),
        "seconds": round(time.perf_counter() - started, 2),
        **environment(),
    }


def _score(
    run: Loaded,
    scoring: tuple[str, ScoreFn],
    split: str,
    n: int | None,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """The part of a report that is about log-probabilities."""
    name, score = scoring
    spec, source = run.model.spec, run.recipe.source()
    arrays: Batch = getattr(source.load(), split)
    if n is not None:
        arrays = jax.tree.map(lambda leaf: leaf[:n], arrays)
    run_score = scorer(score, source.prepare)
    values = score_examples(
        run_score, run.params, run.state, arrays, jax.random.key(seed), batch_size, progress
    )
    result: Estimate = estimate(values)
    found: dict[str, Any] = {
        "mean": result.mean,
        "standard_error": result.standard_error,
        "unit": "nats per example" + (", density" if spec.kind == "continuous" else ""),
        "kind": "exact log-probability"
        if name == "log_prob"
        else "lower bound on the log-probability",
        "estimator": run.model.estimator,
        "n": result.n,
    }
    if spec.step is not None:
        counted = lambda params, state, batch, key: (
            step_mask(spec, batch).sum(1).astype(jnp.float32)
        )  # noqa: E731
        steps = score_examples(
            scorer(counted, source.prepare), {}, {}, arrays, jax.random.key(seed), batch_size
        )
        code = per_step(-values, steps)
        found["per_step"] = {
            "step": spec.step,
            "nats": code.mean,
            "standard_error": code.standard_error,
            "bits": code.mean / math.log(2),
            "perplexity": math.exp(code.mean),
            "n": code.n,
        }
    if spec.kind in ("discrete", "binary") and not spec.lengths:
        found["bits_per_dim"] = bits_per_dim(result.mean, spec)
    if source.log_prob is not None:
        prepared = source.prepare(jax.random.key(seed), arrays)
        found["true_log_prob"] = estimate(np.asarray(source.log_prob(prepared.x)))._asdict()
    return found


def default_folder(recipe: Recipe, row: Recipe, prefix: str = "", **more: Any) -> Path:
    """runs/NAME, followed by the settings that differ from the zoo's row, so that each command has
    its own folder.

    Args:
        **more: what else tells this command from others, such as the axes of a sweep.
    """
    # Another data set has options of its own, of which only the changed ones need naming.
    theirs = flatten(to_dict(row.on(recipe.data))) | {"data": row.data}
    mine = flatten(to_dict(recipe))
    changed = {
        name.split(".", 1)[-1]: value for name, value in mine.items() if theirs[name] != value
    }
    parts = [
        f"{name.replace('_', '-')}={_short(value)}"
        for name, value in [*sorted(changed.items()), *more.items()]
    ]
    suffix = ",".join(parts)
    if len(suffix) > 100:
        suffix = config_hash(to_dict(recipe) | more)
    return Path("runs") / (prefix + recipe.name + (f",{suffix}" if suffix else ""))


def _short(value: Any) -> str:
    text = "_".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("/", "_")
