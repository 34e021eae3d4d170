"""A step of many small models: `ensemble` vmapped, mapped and "auto" beside one program after the
other.

The models are the GAN and the VAE of points in the plane. Each variant takes several optimiser
steps a dispatch, as `fit` does, on data that are resident, so that what is measured is the
arithmetic and not how fast Python can ask for it.
"""

import dataclasses
from typing import Any

import jax

from benchmarks.common import alternate, ratio, summary, write
from genjax.data import batch_at
from genjax.learning.members import ensemble
from genjax.learning.transforms import compiled, feed, repeat_steps
from genjax.profiling.measure import stepper
from genjax.zoo import ZOO

ROWS = ("gan-ring", "vae-ring")
MEMBERS = (1, 2, 4, 8, 16)
BATCHES = (32, 128, 512)
MODES = ("vmap", "map", "auto")
STEPS = 10  # a dispatch
APART = "one by one"


def compared(
    name: str, members: int, batch_size: int, seconds: float, **settings: Any
) -> dict[str, Any]:
    """Milliseconds of a step of all members by each mode, in turns, and its ratios to one by one
    and to one member alone.
    """
    recipe = dataclasses.replace(ZOO[name], model={**ZOO[name].model, **settings})
    source = recipe.source()
    arrays = jax.device_put(source.load().train)
    t = feed(recipe.training(source.spec), batch_at(source, batch_size, 0))
    keys = jax.random.split(jax.random.key(0), members)
    alone = compiled(repeat_steps(t, STEPS))
    each = [stepper(alone.step, alone.init(key), arrays) for key in keys]
    calls = {
        "one": stepper(alone.step, alone.init(keys[0]), arrays),
        APART: lambda: [call() for call in each],
    }
    for mode in MODES:
        # The members are inside of the scan, where "auto" chooses with steps of all of them.
        c = compiled(repeat_steps(ensemble(t, mode), STEPS))  # type: ignore[arg-type]
        calls[mode] = stepper(c.step, c.init(keys), arrays)
    rounds = alternate(calls, seconds)
    found = {
        mode: {
            "ms": 1000 * summary(times)["median"] / STEPS,
            "to_one_by_one": ratio(times, rounds[APART]),
            "to_one_member": ratio(times, rounds["one"]),
        }
        for mode, times in rounds.items()
    }
    return {"recipe": name, "members": members, "batch_size": batch_size, "modes": found}


def main(seconds: float = 40.0) -> None:
    """Measure and write results/ensemble.json; `seconds` for each recipe, batch size and number of
    members.
    """
    rows = []
    for name in ROWS:
        for batch_size in BATCHES:
            for members in MEMBERS:
                rows.append(compared(name, members, batch_size, seconds))
                shown = {
                    mode: f"{one['to_one_member']['median']:.2f}"
                    for mode, one in rows[-1]["modes"].items()
                }
                print(
                    f"{name}, batch {batch_size}, {members} members, in steps of one: {shown}",
                    flush=True,
                )
    write("ensemble", {"steps_per_dispatch": STEPS, "rows": rows})
