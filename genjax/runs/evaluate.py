"""What a run is worth on a split: the dictionary that goes into report.json."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data import Splits
from genjax.errors import ConfigError
from genjax.evaluation import quality
from genjax.evaluation.estimates import (
    Estimate,
    bits_per_dim,
    estimate,
    per_step,
    score_examples,
    scorer,
)
from genjax.protocol import (
    Array,
    Batch,
    Key,
    Params,
    ScoreFn,
    State,
    step_mask,
)
from genjax.runs.folder import environment
from genjax.runs.load import Loaded
from genjax.zoo.recipe import config_hash, to_dict


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
    spec, score, started = run.model.spec, run.model.score, time.perf_counter()
    found: dict[str, Any] = {}
    if score is not None:
        found = _score(run, score, split, n, seed, batch_size, progress)
    if score is None or about_samples:
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
    score: ScoreFn,
    split: str,
    n: int | None,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """The part of a report that is about log-probabilities."""
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
        if run.model.score_name == "log_prob"
        else "lower bound on the log-probability",
        "estimator": run.model.estimator,
        "n": result.n,
    }
    if spec.step is not None:

        def counted(params: Params, state: State, batch: Batch, key: Key) -> Array:
            return step_mask(spec, batch).sum(1).astype(jnp.float32)

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
