"""Run folders: what `train`, `sweep`, `sample` and `evaluate` read and write.

config.json      every setting of the run
metrics.jsonl    one JSON object a line: step, seconds of training so far, means over the window, validation
tensorboard/     the same numbers as TensorBoard events
checkpoints/     the newest few states
samples/*.png    pictures of samples, and *.npz of what `genjax sample` drew
curves.png       learning curves
report.json      what `genjax evaluate` found
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax import figures
from genjax.checkpoint import Checkpoints
from genjax.config import Recipe, config_hash, flatten, from_dict, to_dict
from genjax.data import Source, Splits
from genjax.errors import CheckpointError, ConfigError
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
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"Could not write {path}: {error}. Check the disk's space and permissions.") from error


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
    """metrics.jsonl and TensorBoard events of one run; cut back to a step when a run goes on from there."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.folder = folder
        self.before = 0.0  # seconds of training in earlier processes
        self.started = time.perf_counter()
        self.writer: Any = None

    def restore(self, step: int) -> None:
        """Forget what was logged after `step`: the run does those steps again."""
        from tensorboardX import SummaryWriter

        lines = figures.read_metrics(self.path) if self.path.exists() else []
        kept = [line for line in lines if line["step"] <= step]
        self.before = kept[-1].get("seconds", 0.0) if kept else 0.0
        temporary = self.path.with_name(".metrics.jsonl.part")
        try:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self.path)
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if kept else None)
        except OSError as error:
            raise CheckpointError(f"Could not write {self.path}: {error}. Check the disk's space and permissions.") from error
        self.started = time.perf_counter()

    def __call__(self, line: dict[str, Any]) -> None:
        seconds = round(self.before + time.perf_counter() - self.started, 3)
        line = {"step": line["step"], "seconds": seconds, **{k: v for k, v in line.items() if k != "step"}}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in line.items():
                if name == "step":
                    continue
                for index, number in enumerate(value) if isinstance(value, list) else [("", value)]:
                    self.writer.add_scalar(f"{name}{f'/{index}' if index != '' else ''}", number, line["step"])
            self.writer.flush()
        except OSError as error:
            raise CheckpointError(f"Could not write {self.path}: {error}. Check the disk's space and permissions.") from error

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


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
    open_folder(folder, to_dict(recipe))
    checkpoints, log = Checkpoints(folder / "checkpoints", schedule.keep_checkpoints), Log(folder)
    t = recipe.training(source.spec)
    feed = choose_feed(t, source, splits.train, schedule.batch_size, schedule.seed, schedule.place)
    hooks = [
        _valid_hook(model, source, splits, schedule.evaluate_every),
        _picture_hook(model, source, splits, folder, schedule.sample_every),
    ]

    def on_restore(step: int) -> None:
        log.restore(step)
        if step:
            say(f"going on from step {step} of {schedule.steps} in {folder}")

    try:
        state = fit(
            feed,
            key=jax.random.key(schedule.seed),
            steps=schedule.steps,
            steps_per_call=schedule.steps_per_call,
            log_every=schedule.log_every,
            log=log,
            on_restore=on_restore,
            hooks=[hook for hook in hooks if hook is not None],
            checkpoints=checkpoints,
            checkpoint_every=schedule.checkpoint_every,
            stop_on_nonfinite=not schedule.skip_nonfinite,
            progress=progress,
        )
    finally:
        log.close()
        lines = figures.read_metrics(log.path) if log.path.exists() else []
        if lines:
            figures.save(figures.curves(lines, f"{recipe.name} on {source.spec.name}"), folder / "curves.png")
    return state


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
    for line in restored.passed_over:
        print(f"warning: passed over a damaged checkpoint, {line}", file=sys.stderr)
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
) -> dict[str, Any]:
    """The run's log-probability or bound on a split, as the dictionary that goes into report.json.

    Args:
        n: the first n examples only; None means all.
        seed: of the estimator's noise and of the binarisation of the data.

    Raises:
        ConfigError: if the model has neither a log-probability nor a bound, or the split does not exist.
    """
    scoring = score_of(run.model)
    if scoring is None:
        raise ConfigError(f"{run.recipe.name} has neither a log-probability nor a bound to evaluate.")
    if split not in Splits._fields:
        raise ConfigError(f"There is no split {split!r}; there are: {', '.join(Splits._fields)}.")
    name, score = scoring
    arrays: Batch = getattr(run.source.load(), split)
    if n is not None:
        if n < 1:
            raise ConfigError(f"--n must be at least 1; got {n}.")
        arrays = jax.tree.map(lambda leaf: leaf[:n], arrays)
    started = time.perf_counter()
    run_score = scorer(score, run.source.prepare)
    values = score_examples(run_score, run.params, run.state, arrays, jax.random.key(seed), batch_size, progress)
    result: Estimate = estimate(values)
    spec = run.source.spec
    report = {
        "recipe": run.recipe.name,
        "data": spec.name,
        "value": result.mean,
        "unit": "nats per example" + (", density" if spec.kind == "continuous" else ""),
        "kind": "exact log-probability" if name == "log_prob" else "lower bound on the log-probability",
        "estimator": run.model.estimator,
        "n": result.n,
        "split": split,
        "seed": seed,
        "mean": result.mean,
        "standard_error": result.standard_error,
        "step": run.step,
        "training_seed": run.recipe.schedule.seed,
        "config_hash": config_hash(to_dict(run.recipe)),
        "seconds": round(time.perf_counter() - started, 2),
        **environment(),
    }
    if spec.kind in ("discrete", "binary"):
        report["bits_per_dim"] = bits_per_dim(result.mean, spec)
    if run.source.log_prob is not None:
        prepared = run.source.prepare(jax.random.key(seed), arrays)
        report["true_log_prob"] = estimate(np.asarray(run.source.log_prob(prepared.x)))._asdict()
    return report


def default_folder(recipe: Recipe, row: Recipe, prefix: str = "") -> Path:
    """runs/NAME, followed by the settings that differ from the zoo's row, so that each command has its own folder."""
    mine, theirs = flatten(to_dict(recipe)), flatten(to_dict(row))
    changed = {
        name.split(".", 1)[-1]: value for name, value in mine.items() if theirs.get(name, value) != value or name not in theirs
    }
    parts = [f"{name.replace('_', '-')}={_short(value)}" for name, value in sorted(changed.items())]
    suffix = ",".join(parts)
    if len(suffix) > 100:
        suffix = config_hash(to_dict(recipe))
    return Path("runs") / (prefix + recipe.name + (f",{suffix}" if suffix else ""))


def _short(value: Any) -> str:
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("/", "_")
