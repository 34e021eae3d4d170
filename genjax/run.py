"""Run folders: what `train`, `sweep`, `sample` and `evaluate` read and write.

config.json      every setting of the run
metrics.jsonl    one JSON object a line: step, seconds of training so far, means over the window, validation
tensorboard/     the same numbers as TensorBoard events
checkpoints/     the newest few states
samples/*.png    pictures of samples, and *.npz of what `genjax sample` drew
curves.png       learning curves
report.json      what `genjax evaluate` found
"""

import contextlib
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax import figures, quality
from genjax.checkpoint import Checkpoints
from genjax.config import Recipe, config_hash, flatten, from_dict, to_dict
from genjax.data import Source, Splits
from genjax.errors import CheckpointError, ConfigError, replacing, writing
from genjax.loop import Hook, Progress, choose_feed, fit
from genjax.metrics import Estimate, bits_per_dim, estimate, score_examples, scorer
from genjax.protocol import Batch, Key, Model, Params, ScoreFn, State, TrainState, check_cond
from genjax.train import eval_params
from genjax.zoo import ZOO

# Fixed keys, so that a validation curve compares like with like and a grid shows the same latent points as it trains.
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
        ConfigError: if it holds another run (the message lists the differences) or something that is no run.
        CheckpointError: if it cannot be written.
    """
    path = folder / "config.json"
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and is not a run folder; nothing was written. Give another one with --out.")
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
        f"{folder} holds a run with other settings; nothing was changed:\n" + "\n".join(lines) + "\n"
        "Give the same settings to go on with it, or another folder with --out."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a run folder.

    Raises:
        ConfigError: if there are none, or they are no JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.json. `genjax train NAME` makes one.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: expected JSON, found {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: expected a JSON object, found {type(values).__name__}.")
    return values


class Log:
    """metrics.jsonl and TensorBoard events of one run; cut back to a step when a run goes on from there.

    Every line is on its way to the disk when the call returns. TensorBoard's usual writer hands its events to a thread
    instead, which dies of a full disk without a word and then blocks the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.folder = folder
        self.before = 0.0  # seconds of training in earlier processes
        self.started = time.perf_counter()
        self.events: Any = None

    def restore(self, step: int) -> None:
        """Forget what was logged after `step`: the run does those steps again.

        Raises:
            CheckpointError: if the disk does not take it.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]  # made at run time

        lines = figures.read_metrics(self.path) if self.path.exists() else []
        kept = [line for line in lines if line["step"] <= step]
        self.before = kept[-1].get("seconds", 0.0) if kept else 0.0
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        folder = self.folder / "tensorboard"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            # The step in the name keeps apart two processes that start within one second.
            self.events = EventsWriter(str(folder / "events"), f".from_{step}")
            # TensorBoard then forgets the events of this step and later ones that an earlier process wrote.
            self.events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
            self.events.flush()
        self.started = time.perf_counter()

    def __call__(self, line: dict[str, Any]) -> None:
        seconds = round(self.before + time.perf_counter() - self.started, 3)
        line = {"step": line["step"], "seconds": seconds, **{k: v for k, v in line.items() if k != "step"}}
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        with writing(self.folder / "tensorboard"):
            self.events.write_event(_event(line))
            self.events.flush()

    def draw(self, title: str) -> None:
        """Draw what was logged into curves.png.

        Raises:
            CheckpointError: if the disk does not take it.
        """
        lines = figures.read_metrics(self.path) if self.path.exists() else []
        if lines:
            figures.save(figures.curves(lines, title), self.folder / "curves.png")

    def close(self) -> None:
        """Close the file of events. All of them were flushed, so a disk that complains even now has cost nothing."""
        with contextlib.suppress(OSError):
            if self.events is not None:
                self.events.close()


def _event(line: dict[str, Any]) -> Any:
    """A line of metrics.jsonl as a TensorBoard event; the members of a sweep are scalars of their own, "name/0", "name/1"."""
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]  # made at run time
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]  # made at run time

    scalars: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            scalars |= {f"{name}/{index}": number for index, number in enumerate(value)}
        elif name != "step":
            scalars[name] = value
    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()])
    return Event(wall_time=time.time(), step=line["step"], summary=summary)


@contextlib.contextmanager
def logging_in(folder: Path, title: str) -> Iterator[Log]:
    """The log of a run that is about to start or go on. However the run ends, the log is closed and its curves are drawn."""
    log = Log(folder)
    try:
        yield log
    except BaseException:
        with contextlib.suppress(CheckpointError):  # what stopped the run is what there is to say
            log.draw(title)
        raise
    else:
        log.draw(title)
    finally:
        log.close()


def score_of(model: Model) -> tuple[str, ScoreFn] | None:
    """("log_prob" or "bound", function): the exact one where there is one; None for a model that has neither."""
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


def train(recipe: Recipe, folder: Path, progress: Progress | None = None, say: Callable[[str], None] = print) -> TrainState:
    """Train a recipe in a run folder, or go on with the run that is there.

    Raises:
        GenjaxError: see the modules that this one calls; whatever was saved before stays.
    """
    source, schedule = recipe.source(), recipe.schedule
    model = recipe.build(source.spec)
    splits = source.load()
    t = recipe.training(source.spec)
    feed = choose_feed(t, source, splits.train, schedule.batch_size, schedule.seed, schedule.place)
    open_folder(folder, to_dict(recipe))  # not before everything else fits: a folder keeps its settings for good
    checkpoints = Checkpoints(folder / "checkpoints", schedule.keep_checkpoints)
    hooks = [
        _valid_hook(model, source, splits, schedule.evaluate_every),
        _picture_hook(model, source, splits, folder, schedule.sample_every),
    ]

    with logging_in(folder, f"{recipe.name} on {source.spec.name}") as log:
        return fit(
            feed,
            key=jax.random.key(schedule.seed),
            steps=schedule.steps,
            steps_per_call=schedule.steps_per_call,
            log_every=schedule.log_every,
            log=log,
            on_restore=lambda step: go_on(log, step, schedule.steps, say),
            hooks=[hook for hook in hooks if hook is not None],
            checkpoints=checkpoints,
            checkpoint_every=schedule.checkpoint_every,
            stop_on_nonfinite=not schedule.skip_nonfinite,
            progress=progress,
        )


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
        key = jax.random.key(VALID_SEED)
        return {f"valid/{name}": estimate(score_examples(run, eval_params(state), state.state, splits.valid, key)).mean}

    return Hook(every, call)


def _picture_hook(model: Model, source: Source, splits: Splits, folder: Path, every: int) -> Hook:
    n = 2000 if source.spec.shape == (2,) else 100 if source.spec.n_classes else 64
    cond = picture_cond(source.spec, n, splits.train)
    n = n if cond is None else len(cond)
    draw = jax.jit(picture_sampler(model), static_argnums=3)

    def call(step: int, state: TrainState) -> None:
        x = np.asarray(draw(eval_params(state), state.state, jax.random.key(PICTURE_SEED), n, cond))
        title = f"{picture_title(model)} at step {step}"
        figure = figures.samples(x, source.spec, title, true_log_prob(source), cond if source.spec.n_classes else None)
        if figure is not None:
            figures.save(figure, folder / "samples" / f"step_{step:08d}.png")

    return Hook(every, call)


def true_log_prob(source: Source) -> Callable[[np.ndarray], Any] | None:
    return None if source.log_prob is None else lambda x: source.log_prob(jnp.asarray(x, jnp.float32))  # type: ignore[misc]


def picture_sampler(model: Model) -> Callable[..., Any]:
    """What a picture shows: the mean of p(x|z) for images where the family has it, as papers do, otherwise samples."""
    return model.extras["sample_mean"] if _shows_means(model) else model.sample


def picture_title(model: Model) -> str:
    """What such a picture shows, in words."""
    return "means of p(x|z), z ~ p(z)," if _shows_means(model) else "samples"


def _shows_means(model: Model) -> bool:
    return "sample_mean" in model.extras and figures.is_image(model.spec)


class Loaded(NamedTuple):
    """A trained run: recipe, data, model, and the parameters of its last checkpoint, averaged where there is an average."""

    recipe: Recipe
    source: Source
    model: Model
    params: Params
    state: State
    step: int


def load(folder: Path, **changes: Any) -> Loaded:
    """A run's model with the parameters of its newest whole checkpoint.

    Args:
        **changes: builder arguments to change that do not change the parameters, such as `n_bound_samples`.

    Raises:
        ConfigError: if the folder is no run, or is a sweep.
        CheckpointError: if it has no checkpoint, or none that is whole.
    """
    values = read_config(folder)
    if "sweep" in values:
        raise ConfigError(f"{folder} is a sweep of several members; sample and evaluate take the folder of a single run.")
    recipe = from_dict(values, ZOO)
    source = recipe.source()
    t = recipe.training(source.spec)
    restored = Checkpoints(folder / "checkpoints").restore(jax.eval_shape(t.init, jax.random.key(0)))
    if restored is None:
        raise CheckpointError(f"{folder} has no checkpoint yet. Run its `genjax train` command again.")
    for path, reason in restored.passed_over.items():
        print(f"genjax: warning: passed over a damaged checkpoint, {path}: {reason}", file=sys.stderr)
    state = restored.state
    model = recipe.build(source.spec, **changes)
    return Loaded(recipe, source, model, eval_params(state), state.state, int(state.step))


def sample(run: Loaded, key: Key, n: int, cond: np.ndarray | None = None, means: bool = False) -> np.ndarray:
    """n samples of a run as an array [n, *shape]; with `means` the means of p(x|z) instead.

    Raises:
        ConfigError: for a condition that is missing, not wanted, or out of range, or means of a family without them.
    """
    try:
        check_cond(run.model.spec, cond, n)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    if means and "sample_mean" not in run.model.extras:
        raise ConfigError(f"{run.recipe.name} has no means of p(x|z) to show; sample without --means.")
    draw = run.model.extras["sample_mean"] if means else run.model.sample
    return np.asarray(jax.jit(draw, static_argnums=3)(run.params, run.state, key, n, cond))


def evaluate(
    run: Loaded,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 100,
    progress: Callable[[int, int], None] = lambda done, total: None,
    samples: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """What a run is worth on a split, as the dictionary that goes into report.json.

    Its value is the log-probability or bound or, for a model that has neither, the first of the figures about its samples.

    Args:
        n: the first n examples only; None means all.
        seed: of the estimator's noise, of the binarisation of the data, and of the samples.
        samples: give figures about samples beside a log-probability or bound, too.

    Raises:
        ConfigError: if the split does not exist, or n is too small.
    """
    if split not in Splits._fields:
        raise ConfigError(f"There is no split {split!r}; there are: {', '.join(Splits._fields)}.")
    if n is not None and n < 2:
        raise ConfigError(f"--n must be at least 2, so that there is a standard error; got {n}.")
    spec, scoring, started = run.source.spec, score_of(run.model), time.perf_counter()
    found: dict[str, Any] = {}
    if scoring is not None:
        found = _score(run, scoring, split, n, seed, batch_size, progress)
    if scoring is None or samples:
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
    spec = run.source.spec
    arrays: Batch = getattr(run.source.load(), split)
    if n is not None:
        arrays = jax.tree.map(lambda leaf: leaf[:n], arrays)
    run_score = scorer(score, run.source.prepare)
    values = score_examples(run_score, run.params, run.state, arrays, jax.random.key(seed), batch_size, progress)
    result: Estimate = estimate(values)
    found: dict[str, Any] = {
        "mean": result.mean,
        "standard_error": result.standard_error,
        "unit": "nats per example" + (", density" if spec.kind == "continuous" else ""),
        "kind": "exact log-probability" if name == "log_prob" else "lower bound on the log-probability",
        "estimator": run.model.estimator,
        "n": result.n,
    }
    if spec.kind in ("discrete", "binary"):
        found["bits_per_dim"] = bits_per_dim(result.mean, spec)
    if run.source.log_prob is not None:
        prepared = run.source.prepare(jax.random.key(seed), arrays)
        found["true_log_prob"] = estimate(np.asarray(run.source.log_prob(prepared.x)))._asdict()
    return found


def default_folder(recipe: Recipe, row: Recipe, prefix: str = "", **more: Any) -> Path:
    """runs/NAME, followed by the settings that differ from the zoo's row, so that each command has its own folder.

    Args:
        **more: what else tells this command from others, such as the axes of a sweep.
    """
    if recipe.data != row.data:  # another data set has options of its own, of which only the changed ones need naming
        theirs = flatten(to_dict(dataclasses.replace(row, data=recipe.data, data_options={}))) | {"data": row.data}
    else:
        theirs = flatten(to_dict(row))
    mine = flatten(to_dict(recipe))
    changed = {name.split(".", 1)[-1]: value for name, value in mine.items() if theirs[name] != value}
    parts = [f"{name.replace('_', '-')}={_short(value)}" for name, value in [*sorted(changed.items()), *more.items()]]
    suffix = ",".join(parts)
    if len(suffix) > 100:
        suffix = config_hash(to_dict(recipe) | more)
    return Path("runs") / (prefix + recipe.name + (f",{suffix}" if suffix else ""))


def _short(value: Any) -> str:
    text = "_".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("/", "_")
