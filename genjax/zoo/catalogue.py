"""The zoo with what is known of each row: its size, and the results that the benchmarks
measured.
"""

import json
from importlib import resources
from typing import Any

import jax

from genjax.evaluation.estimates import count
from genjax.runs.train import score_of
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe


def measured() -> dict[str, Any]:
    """Results by recipe, as `python -m benchmarks results` wrote them into
    genjax/zoo/results.json.
    """
    return json.loads(resources.files("genjax.zoo").joinpath("results.json").read_text())


def describe(recipe: Recipe, result: dict[str, Any] | None) -> dict[str, Any]:
    """One row of `genjax list`; a recipe that nobody has measured says so."""
    spec = recipe.source().spec
    model = recipe.build(spec)
    scoring = score_of(model)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    return {
        "name": recipe.name,
        "family": recipe.family.__name__,
        "summary": recipe.summary,
        "data": recipe.data,
        "score": "samples"
        if scoring is None
        else {"log_prob": "exact", "bound": "bound"}[scoring[0]],
        "conditional": "no"
        if not spec.conditional
        else f"{spec.n_classes} classes"
        if spec.n_classes
        else f"vector [{spec.cond_dim}]",
        "parameters": f"{count(params):,}",
        "expected": "not measured" if result is None else expected(result),
        "time": "not measured" if result is None else f"{result['train_seconds']['mean']:.0f} s",
    }


def expected(result: dict[str, Any]) -> str:
    """A result in words: mean and sd over seeds, unit, estimator, split and n."""
    spread = f" ± {result['sd']:.2f}" if result["sd"] is not None else ""
    seeds = f"{len(result['seeds'])} seed{'s' if len(result['seeds']) != 1 else ''}"
    about = f"{result['estimator']}; {result['split']}, n={result['n']:,}, {seeds}"
    if "per_step" in result:
        per = result["per_step"]
        spread = f" ± {per['sd']:.3f}" if per["sd"] is not None else ""
        return f"{per['nats']:.3f}{spread} nats per {per['step']} ({about})"
    if "figures" not in result:
        return f"{result['mean']:.2f}{spread} nats ({about})"
    return f"{result['kind']} {result['mean']:.3f}{spread} ({about})"


def rows() -> list[dict[str, Any]]:
    """Every row of the zoo, described."""
    results = measured()
    return [describe(recipe, results.get(name)) for name, recipe in ZOO.items()]
