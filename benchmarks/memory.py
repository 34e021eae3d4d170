"""Memory of the compiled train step of each family: in float32, with bfloat16 arithmetic,
accumulated, and rematerialised.

Nothing is run: the figures are the compiler's, of programs at the recipes' real sizes.
"""

import contextlib
import dataclasses
from typing import Any

import jax

from benchmarks.common import first_rows, write
from benchmarks.programs import options
from genjax.errors import ConfigError
from genjax.profiling.measure import state_bytes, step_program, step_shapes
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, replace

# The first row of each family, the cell with the most gates, a recurrent VAE with particles, and a
# U-Net.
ROWS = (*first_rows(), "lstm", "vrnn-jsb", "edm-mnist")
PARTS = 4
# A recurrent network that carries its streams on cannot take a batch in parts.
CHANGES: dict[str, dict[str, Any]] = {"rnn": {"lanes": 0}, "lstm": {"lanes": 0}}
REMAT: dict[str, dict[str, Any]] = {"transformer": {"remat": "full", "scan_layers": True}}


def recipe_of(name: str) -> Recipe:
    """A row as it is measured."""
    return replace(ZOO[name], **CHANGES.get(name, {}))


def ways(recipe: Recipe) -> dict[str, Recipe]:
    """How to compute the same step: way -> recipe. Parameters, their gradients and the losses are
    float32 in all.
    """
    schedule = dataclasses.replace(recipe.schedule, microbatches=PARTS)
    checkpointed = dataclasses.replace(recipe, family=_whole_losses(recipe.family))
    table = {
        "float32": recipe,
        "bfloat16": replace(recipe, dtype="bfloat16"),
        "accumulated": dataclasses.replace(recipe, schedule=schedule),
        "whole loss again": checkpointed,
    }
    with contextlib.suppress(
        ConfigError
    ):  # of a family without loops or blocks to compute again, which has no such setting
        table["remat"] = replace(recipe, **REMAT.get(recipe.name, {"remat": "full"}))
    return table


def _whole_losses(family: Any) -> Any:
    """A family's builder with `jax.checkpoint` around each loss, to see whether that alone saves
    anything.
    """

    def build(spec: Any, **settings: Any) -> Any:
        model = family(spec, **settings)
        return model._replace(
            losses={player: jax.checkpoint(loss) for player, loss in model.losses.items()}
        )

    return build


def measured(recipe: Recipe) -> dict[str, Any]:
    """Bytes that the compiled step takes: at its peak beside its arguments, of the state, and of
    the state reused in place.
    """
    spec, size = recipe.source().spec, recipe.schedule.batch_size
    t = recipe.training(spec)
    found = step_program(t, spec, size, options(quick=True)).memory_analysis()
    return {
        "temporary_bytes": int(found.temp_size_in_bytes),
        "state_bytes": state_bytes(step_shapes(t, spec, size)[0]),
        "reused_bytes": int(found.alias_size_in_bytes),
    }


def main() -> None:
    """Measure and write results/memory.json."""
    rows = []
    for name in ROWS:
        recipe = recipe_of(name)
        row = {
            "recipe": name,
            "changes": CHANGES.get(name, {}),
            "batch_size": recipe.schedule.batch_size,
        }
        rows.append(row | {"ways": {way: measured(one) for way, one in ways(recipe).items()}})
        shown = {
            way: f"{found['temporary_bytes'] / 2**20:.2f} MiB"
            for way, found in rows[-1]["ways"].items()
        }
        print(f"{name}: {shown}", flush=True)
    write("memory", {"parts": PARTS, "rows": rows})
