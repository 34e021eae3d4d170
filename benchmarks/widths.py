"""Training steps of an MLP, a Transformer and a U-Net by their widths, as shares of the machine's
matrix-product peak, measured in turns with it.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.common import alternate, summary, write
from genjax.data import example_batch
from genjax.learning.transforms import compiled, scan_steps
from genjax.profiling import allocators
from genjax.profiling.measure import cost_of, stepper
from genjax.zoo import ZOO
from genjax.zoo.recipe import replace


class Case(NamedTuple):
    """A row of the zoo at several sizes: the setting that is its width, the setting's values, and
    the batch sizes, the fewest first, None for the row's own.

    A dense layer reads and writes its matrix as often for few examples as for many, and so does
    the optimiser; hence the other batches of the MLP: with 8 it is nearly all that a step does.
    """

    setting: str
    widths: tuple[Any, ...]
    batches: tuple[int | None, ...] = (None,)


CASES: dict[str, Case] = {
    "vae": Case("hidden", ((256, 256), (1024, 1024), (2048, 2048)), (8, None, 512)),
    "transformer": Case("d_model", (128, 256, 512)),
    "edm-mnist": Case("channels", ((32, 64), (48, 96), (96, 192))),
}
STEPS = 4  # a dispatch
PRODUCT = 2048  # the side of the square matrices whose product is the peak


def measure(name: str, width: Any, batch: int | None, seconds: float) -> dict[str, Any]:
    """Milliseconds and FLOPs of a step at one width, and the peak in its rounds, in FLOP/s."""
    recipe = replace(ZOO[name], **{CASES[name].setting: width})
    if batch is not None:
        recipe = replace(recipe, batch_size=batch)
    spec, batch_size = recipe.source().spec, recipe.schedule.batch_size
    t = recipe.training(spec)
    one = jax.jit(partial(example_batch, spec), static_argnums=1)(jax.random.key(1), batch_size)
    state = jax.jit(t.init)(jax.random.key(0))
    flops, _ = cost_of(jax.jit(t.step).lower(state, one).compile())
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * STEPS), one)
    a = jnp.ones((PRODUCT, PRODUCT))
    product = jax.jit(jnp.matmul)
    calls = {
        "step": stepper(compiled(scan_steps(t)).step, state, many),
        "product": lambda: product(a, a),
    }
    rounds = alternate(calls, seconds, block=0.3)
    peak = 2 * PRODUCT**3 / min(rounds["product"])
    rates = [STEPS * flops / second for second in rounds["step"]]
    return {
        "recipe": name,
        "setting": CASES[name].setting,
        "width": width,
        "batch_size": batch_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "ms": 1000 * summary(rounds["step"])["median"] / STEPS,
        "flops": flops,
        "peak_gflops": peak / 1e9,
        "share_of_peak": summary([rate / peak for rate in rates]),
    }


def with_products_at_peak(row: dict[str, Any], few: dict[str, Any]) -> float:
    """The share of the peak of a step whose products ran at the peak, while the rest took what it
    takes with `few` examples.
    """
    products, of_few = (each["flops"] / each["peak_gflops"] / 1e6 for each in (row, few))
    rest = max(few["ms"] - of_few, 0.0)
    return products / (products + rest)


def main(seconds: float = 20.0) -> None:
    """Measure and write results/widths.json; `seconds` for each width and batch size."""
    rows, fewest = [], {}
    for name, case in CASES.items():
        for batch, width in itertools.product(case.batches, case.widths):
            row = measure(name, width, batch, seconds)
            few = fewest.setdefault((name, width), row)
            if few is not row:
                row["with_products_at_peak"] = with_products_at_peak(row, few)
            rows.append(row)
            share = row["share_of_peak"]["median"]
            print(
                f"{name}, {case.setting} {width}, batches of {row['batch_size']}: "
                f"{row['ms']:.1f} ms a step, {100 * share:.0f} % of the peak",
                flush=True,
            )
    about = {"allocator": allocators.in_use(), "steps_per_dispatch": STEPS}
    write("widths", {**about, "rows": rows})
