"""Samples per second of each family's sampler, by batch, and how long it takes to compile.

Sizes are those of the zoo's rows, with random weights: what is drawn costs the same. Denoisers take
the number of solver steps that their row says. A sampler of sequences draws whole ones;
`generation.py` has cached decoding by length.
"""

import inspect
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import alternate, first_rows, summary, write
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, replace

ROWS = (*first_rows(), "edm-mnist")
BATCHES = (1, 16, 256)
SETTINGS: dict[str, Any] = {}  # what a test makes smaller


def solver_steps(recipe: Recipe) -> int | None:
    """Steps from noise to data, of a denoiser."""
    default = inspect.signature(recipe.family).parameters.get("n_steps")
    return None if default is None else int(recipe.model.get("n_steps", default.default))


def sampler(recipe: Recipe, n: int) -> tuple[Callable[[], Any], float]:
    """A call that draws n samples, with classes in turn where the model is conditional, and the
    seconds to compile it.
    """
    spec = recipe.source().spec
    model = recipe.build(spec)
    params, state = jax.jit(model.init)(jax.random.key(0))
    cond = None
    if spec.n_classes:
        cond = jnp.arange(n, dtype=jnp.int32) % spec.n_classes
    elif spec.cond_dim:
        cond = jnp.zeros((n, spec.cond_dim))
    draw = jax.jit(lambda params, state, key, cond: model.sample(params, state, key, n, cond))
    key = jax.random.key(1)
    start = time.perf_counter()
    program = draw.lower(params, state, key, cond).compile()
    return lambda: program(params, state, key, cond), time.perf_counter() - start


def measure(seconds: float) -> list[dict[str, Any]]:
    """Every row at every batch: seconds of a call with quartiles, samples and steps of sequences
    per second.
    """
    rows = []
    for name in ROWS:
        recipe = replace(ZOO[name], **SETTINGS.get(name, {}))
        spec = recipe.source().spec
        made = {n: sampler(recipe, n) for n in BATCHES}
        rounds = alternate({str(n): call for n, (call, _) in made.items()}, seconds)
        for n, (_, compile_seconds) in made.items():
            each = summary(rounds[str(n)])
            rate = n / each["median"]
            rows.append(
                {
                    "recipe": name,
                    "batch": n,
                    "solver_steps": solver_steps(recipe),
                    "seconds": each,
                    "samples_per_second": rate,
                    "step": spec.step,
                    "steps_per_second": rate * spec.shape[0] if spec.step else None,
                    "compile_seconds": compile_seconds,
                }
            )
            print(
                f"{name}, batch {n}: {rate:,.1f} samples/s, compiled in {compile_seconds:.1f} s",
                flush=True,
            )
    return rows


def main(seconds: float = 10.0) -> None:
    """Measure and write results/sampling.json; `seconds` of timing for each row."""
    write("sampling", {"rows": measure(seconds)})
