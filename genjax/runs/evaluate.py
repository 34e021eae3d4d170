"""What a run is worth on a split: the dictionary that goes into report.json."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data import Source, Splits
from genjax.data.source import rows_of
from genjax.errors import ConfigError
from genjax.evaluation import quality
from genjax.evaluation.estimates import (
    Estimate,
    bits_per_dim,
    counting,
    estimate,
    per_step,
    score_examples,
    scorer,
)
from genjax.families.compose import latent_spec
from genjax.protocol import (
    Array,
    Batch,
    DataSpec,
    Key,
    Params,
    ScoreFn,
    State,
    Trained,
    step_mask,
)
from genjax.runs.folder import environment
from genjax.runs.identity import files_of
from genjax.runs.load import Loaded, changed, source_of
from genjax.settings import Count, check_setting
from genjax.values import key_of
from genjax.zoo import ZOO
from genjax.zoo.recipe import config_hash, parameters_of, to_dict
from genjax.zoo.sections import sections_of

BATCH_SIZE = 100  # examples at a time, unless given


def as_evaluated(run: Loaded, n_samples: int | None = None) -> Loaded:
    """A run with what its recipe says for evaluation, such as more samples in a bound, but for what
    was set otherwise when it was trained.

    Args:
        n_samples: draws of the bound's estimator, in the place of the recipe's: K of an
            importance-weighted bound, noise levels of a diffusion bound, draws of dequantisation
            noise.

    Raises:
        ConfigError: if the model has no bound with samples.
    """
    recipe = run.recipe
    changes, row = dict(recipe.evaluation), ZOO.get(recipe.name)
    if row is not None:
        now, own = (sections_of(one)["model"] for one in (recipe, row))
        changes = {name: value for name, value in changes.items() if now[name][1] == own[name][1]}
    if n_samples is not None:
        check_setting("n_samples", n_samples, Count)
        model = run.model
        if isinstance(run.on, Trained) and not recipe.composed:  # of the two, the second has them
            model = recipe.family(latent_spec(run.on.model), **recipe.model)
        exact = model.score_name == "log_prob"
        if exact or "n_bound_samples" not in parameters_of(run.recipe.family):
            raise ConfigError(
                f"{run.recipe.name} has no bound with samples; leave --n-samples out."
            )
        changes["n_bound_samples"] = n_samples
    return changed(run, **changes)


def evaluate(
    run: Loaded,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    about_samples: bool = False,
    say: Callable[[str], None] = print,
    source: Source | None = None,
    trained_on: Source | None = None,
) -> dict[str, Any]:
    """What a run is worth on a split, as the dictionary that goes into report.json.

    Its value is the log-probability or bound or, for a model that has neither, the first of the
    figures about its samples. Of training windows that overlap only such count as do not, see
    `data.source.rows_of`; examples with weights count by them, see `estimates.estimate`.

    Args:
        n: the first n examples only; None means all.
        seed: of the estimator's noise, of the binarisation of the data, and of the samples.
        about_samples: give figures about samples beside a log-probability or bound, too.
        source: other data of the run's spec, see `other_source`; its own unless given, which are
            compared with what they were in training.
        trained_on: the run's own data, where they are in memory: what judges samples learns of
            them.

    Raises:
        ConfigError: if the split does not exist, or n is too small.
        DataError: for data that are not there, or changed since training.
    """
    if split not in (*Splits._fields, "all"):
        known = ", ".join((*Splits._fields, "all"))
        raise ConfigError(f"There is no split {split!r}; there are: {known}.")
    if n is not None and n < 2:
        raise ConfigError(f"--n must be at least 2, so that there is a standard error; got {n}.")
    check_setting("n", n, Count | None)
    check_setting("batch_size", batch_size, Count)
    key_of(seed)
    started, found = time.perf_counter(), {}
    if run.model.score is None and batch_size != BATCH_SIZE:
        say(
            f"batch_size {batch_size} has no effect: {run.recipe.name} has no log-probability and "
            "no bound"
        )
    if source is None:
        source = trained_on = source_of(run)
    if run.model.score is not None:
        found = _score(run, source, run.model.score, split, n, seed, batch_size, progress)
        if run.finer is not None:
            found["solver"] = _of_solver(run, source, split, found, seed, batch_size, say)
    if run.model.score is None or about_samples:
        sampler = quality.sampler_of(run.model, run.params, run.state)
        figures = quality.figures_of(run.data, sampler, split, n, seed, say, source, trained_on)
        found = _headline(figures[0]) | found | {"figures": [one._asdict() for one in figures]}
    return {
        "recipe": run.recipe.name,
        "data": source.spec.name,
        "files": files_of(source, run.files or ()),
        "value": found["mean"],
        **found,
        "split": split,
        "seed": seed,
        "step": run.step,
        "which": run.which,
        **({} if run.sigma_rel is None else {"sigma_rel": run.sigma_rel, "sigma_rel_off": run.off}),
        "training_seed": run.recipe.schedule.seed,
        "config_hash": config_hash(to_dict(run.recipe)),
        "seconds": round(time.perf_counter() - started, 2),
        **environment(),
    }


def _headline(figure: quality.Figure) -> dict[str, Any]:
    """A figure about samples in the place of a log-probability."""
    return {
        "mean": figure.value,
        "standard_error": figure.standard_error,
        "unit": figure.unit,
        "kind": figure.name,
        "estimator": figure.estimator,
        "n": figure.n_reference,
    }


def _score(
    run: Loaded,
    source: Source,
    score: ScoreFn,
    split: str,
    n: int | None,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """The part of a report that is about log-probabilities."""
    spec, key = run.model.spec, key_of(seed)
    arrays = rows_of(source.load(), split, source.apart)
    if n is not None:
        arrays = jax.tree.map(lambda leaf: leaf[:n], arrays)
    program = scorer(score, source.prepare)
    values = score_examples(program, run.params, run.state, arrays, key, batch_size, progress)
    result = estimate(values, arrays.weight)
    kind = "lower bound on the log-probability"
    if run.model.score_name == "log_prob":
        kind = "unbiased log-probability" if run.model.probed else "exact log-probability"
    found: dict[str, Any] = {
        "mean": result.mean,
        "standard_error": result.standard_error,
        "unit": "nats per example" + (", density" if spec.kind == "continuous" else ""),
        "kind": kind,
        "estimator": run.model.estimator,
        "n": result.n,
    }
    if spec.step is not None:
        program = scorer(partial(_steps, spec), source.prepare)
        steps = score_examples(program, {}, {}, arrays, key, batch_size)
        found["per_step"] = _code_length(spec.step, per_step(-values, steps, arrays.weight))
    if spec.kind in ("discrete", "binary") and not spec.lengths:
        found["bits_per_dim"] = bits_per_dim(result.mean, spec)
    if source.log_prob is not None and not spec.conditional:  # it is of all classes together
        prepared = source.prepare(key, arrays)
        truth = np.asarray(source.log_prob(prepared.x))
        found["true_log_prob"] = estimate(truth, arrays.weight)._asdict()
    return found


SOLVED_AGAIN = 500  # examples that are solved with twice the steps, too
SOLVER_NATS = 0.1  # a difference of more than this is said


def _of_solver(
    run: Loaded,
    source: Source,
    split: str,
    found: dict[str, Any],
    seed: int,
    batch_size: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What twice the solver's steps change, by the same noise: its error, about. A model that is
    trained through a solver can learn to be wrong in its favour.
    """
    arrays = counting(rows_of(source.load(), split, source.apart))
    arrays = jax.tree.map(lambda leaf: leaf[: min(SOLVED_AGAIN, found["n"])], arrays)

    def mean(score: ScoreFn) -> float:
        program, key = scorer(score, source.prepare), key_of(seed)
        nats = score_examples(program, run.params, run.state, arrays, key, batch_size)
        return estimate(nats, arrays.weight).mean

    assert run.model.score is not None
    assert run.finer is not None
    assert run.finer.score is not None
    value, finer = mean(run.model.score), mean(run.finer.score)
    if not abs(value - finer) <= SOLVER_NATS:  # nor where one is not finite
        say(
            f"With twice the solver's steps the same {len(arrays.x)} examples have {finer:.4g} "
            f"nats, not {value:.4g}: what {run.folder} is said to be worth is the solver's error. "
            "Train with more --n-steps, or with --solver adaptive."
        )
    return {"estimator": run.finer.estimator, "n": len(arrays.x), "difference": value - finer}


def _steps(spec: DataSpec, params: Params, state: State, batch: Batch, key: Key) -> Array:
    """How many steps of each sequence count, as a score has them."""
    return step_mask(spec, batch).sum(1).astype(jnp.float32)


def _code_length(step: str, nats: Estimate) -> dict[str, Any]:
    """The part of a report that is about the code length of a step."""
    return {
        "step": step,
        "nats": nats.mean,
        "standard_error": nats.standard_error,
        "bits": nats.mean / math.log(2),
        # Of wide steps it is no number that float64 has.
        "perplexity": math.exp(nats.mean) if nats.mean < 700 else None,
        "n": nats.n,
    }
