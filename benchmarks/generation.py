"""Tokens per second of cached generation, by batch and by length, for recurrent networks and a
Transformer.

Sizes are those of the zoo's `lstm`, `gru` and `transformer-shakespeare`, with random weights: what
is drawn costs the same. A call generates the whole length from a prompt, sampling at temperature 1,
as `genjax sample` does.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import alternate, summary, write
from genjax.protocol import DataSpec, Model
from genjax.zoo import ZOO

ROWS = ("lstm", "gru", "transformer-shakespeare")
BATCHES = (1, 64)
LENGTHS = (64, 256, 512)
LEVELS = 65


def model_of(name: str, length: int) -> Model:
    """A row's model for sequences of one length: the context is the length."""
    return ZOO[name].build(
        DataSpec((length,), "tokens", levels=LEVELS, step="character", name="random characters")
    )


def generation(
    name: str, length: int, batch: int
) -> tuple[Callable[[int], jax.Array], Callable[[], int]]:
    """(prompt length) -> tokens [batch, length], and how many programs that took so far."""
    model = model_of(name, length)
    assert model.autoregressive is not None
    generate = model.autoregressive.generate
    params, state = jax.jit(model.init)(jax.random.key(0))
    prompt = jnp.zeros((batch, length), jnp.int32)

    @jax.jit
    def run(key: jax.Array, prompt_length: jax.Array) -> jax.Array:
        return generate(params, state, key, batch, prompt=prompt, prompt_length=prompt_length)

    return lambda n: run(jax.random.key(1), jnp.asarray(n, jnp.int32)), run._cache_size  # pyright: ignore[reportAttributeAccessIssue]


def measure(seconds: float) -> dict[str, Any]:
    """Tokens per second and microseconds per step of every row, length and batch, and programs for
    all prompt lengths.
    """
    rows = []
    for name in ROWS:
        for batch in BATCHES:
            made = {length: generation(name, length, batch) for length in LENGTHS}
            calls = {str(length): functools.partial(run, 1) for length, (run, _) in made.items()}
            rounds = alternate(calls, seconds)
            for length, (run, programs) in made.items():
                for n in (0, 1, length // 2, length - 1):
                    jax.block_until_ready(run(n))
                each = summary([1e6 * t / length for t in rounds[str(length)]])
                rows.append(
                    {
                        "recipe": name,
                        "batch": batch,
                        "length": length,
                        "us_per_step": each,
                        "tokens_per_second": 1e6 * batch / each["median"],
                        "programs": programs(),
                    }
                )
                print(
                    f"{name}, batch {batch}, length {length}: {rows[-1]['tokens_per_second']:,.0f} "
                    "tokens/s",
                    flush=True,
                )
    return {"rows": rows, "levels": LEVELS}


def main(seconds: float = 10.0) -> None:
    """Measure and write results/generation.json."""
    write("generation", measure(seconds))


if __name__ == "__main__":
    main()
